"""FlopCounterMode: the operators' formulas against the arithmetic of the reference, and against PyTorch's own convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import safnet_ops
from operator_inputs import census_inputs, conv_inputs, fusion_inputs, upsample_inputs, warp_inputs
from safnet_ops import flops, reference
from safnet_ops.operators import OPERATORS

# Operations of ATen -> flops an element of the result; a mean adds up the elements of its argument.
ARITHMETIC = {
    "add": 1,
    "sub": 1,
    "rsub": 1,
    "mul": 1,
    "div": 1,
    "pow": 1,
    "sqrt": 1,
    "sigmoid": 3,
    "upsample_bilinear2d": 9,
}


class Arithmetic(TorchDispatchMode):
    """Counts what the reference computes."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        out = operation(*arguments, **(options or {}))
        name = operation._schema.name.partition("::")[2]
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.total += arguments[0].numel() if name == "mean" else ARITHMETIC.get(name, 0) * out.numel()
        return out


def count(function, *inputs, **options):
    with FlopCounterMode(display=False) as counter:
        function(*inputs, **options)
    return counter.get_total_flops()


SIZES = [(3, 4), (9, 11)]
FORWARD = {
    "warp": (safnet_ops.backward_warp, reference.backward_warp, lambda size: warp_inputs(size, n=2), {}),
    "fuse": (safnet_ops.fused_fuse, reference.fused_fuse, lambda size: fusion_inputs(size, channels=4), {}),
    "fuse logits": (safnet_ops.fused_fuse, reference.fused_fuse, fusion_inputs, {"mask_logits": True}),
    "upsample": (safnet_ops.upsample_fuse, reference.upsample_fuse, lambda size: upsample_inputs(size, (2, 3)), {}),
    "census": (safnet_ops.census_loss, reference.census_loss, lambda size: census_inputs(size, channels=2), {}),
    "census 3": (safnet_ops.census_loss, reference.census_loss, census_inputs, {"patch_size": 3}),
}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_forward_counts_the_arithmetic_of_the_definition(name, size):
    operator, definition, make, options = FORWARD[name]
    inputs = make(size)
    with Arithmetic() as arithmetic:
        definition(*inputs, **options)
    assert count(operator, *inputs, **options) == arithmetic.total


def test_fusion_by_weights_counts_the_arithmetic_of_the_definition():
    *inputs, short, middle, long = fusion_inputs((3, 5), weights=(3, 3, 3))
    with Arithmetic() as arithmetic:
        reference.fused_fuse(*inputs, weights=(short, middle, long))
    assert count(safnet_ops.fused_fuse, *inputs, weights=(short, middle, long)) == arithmetic.total


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_convolution_counts_as_pytorchs(groups, stride):
    input, weight, bias, slopes, residual = conv_inputs((7, 9), (6, 12), groups, n=2, stride=stride)
    found = count(safnet_ops.group_conv_shuffle, input, weight, bias, slopes, groups, stride=stride, residual=residual)
    expected = count(F.conv2d, input, weight, bias, stride, 1, 1, groups)
    assert found == expected
    assert found == 2 * 12 * (6 // groups) * 9 * 2 * -(-7 // stride) * -(-9 // stride)


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_convolutions_count_as_pytorchs(stride, needed):
    input, weight, *_ = conv_inputs((7, 9), (6, 12), n=2, stride=stride)

    def both_ways(function):
        leaves = [value.detach().requires_grad_(need) for value, need in zip((input, weight), needed, strict=True)]
        return lambda: function(*leaves).sum().backward()

    found = count(both_ways(lambda *leaves: safnet_ops.group_conv_shuffle(*leaves, stride=stride)))
    assert found == count(both_ways(lambda *leaves: F.conv2d(*leaves, None, stride, 1)))


def test_gradients_of_grouped_convolutions_count_each_as_the_forward():
    input, weight, *_ = (value.requires_grad_() for value in conv_inputs((7, 9), (6, 12), 3))
    forward = count(safnet_ops.group_conv_shuffle, input, weight, groups=3)
    assert count(lambda: safnet_ops.group_conv_shuffle(input, weight, groups=3).sum().backward()) == 3 * forward


def backward_flops(operator, inputs, needed, **options):
    leaves = [value.requires_grad_(need) for value, need in zip(inputs, needed, strict=True)]
    out = operator(*leaves, **options)
    return count(lambda: out.backward(torch.ones_like(out), inputs=[leaf for leaf in leaves if leaf.requires_grad]))


@pytest.mark.parametrize(
    ("operator", "make"), [(safnet_ops.backward_warp, warp_inputs), (safnet_ops.fused_fuse, fusion_inputs)]
)
def test_every_needed_gradient_counts(operator, make):
    inputs = make((4, 6))
    single = [
        backward_flops(operator, inputs, [place == k for k in range(len(inputs))]) for place in range(len(inputs))
    ]
    together = backward_flops(operator, inputs, [True] * len(inputs))
    assert max(single) < together < sum(single)  # what is recomputed counts once
    shared = (sum(single) - together) / (len(inputs) - 1)
    assert 0 < shared == int(shared)


def test_census_gradient_counts_by_neighbours():
    pictures = census_inputs((9, 11))
    pixels = 9 * 11
    found = [backward_flops(safnet_ops.census_loss, pictures, (True, False), patch_size=size) for size in (3, 5)]
    assert found[1] - found[0] == 27 * (25 - 9) * pixels


def test_every_registered_operator_has_a_formula():
    names = {name for operator in OPERATORS.values() for name in operator.registered}
    assert set(flops.FORMULAS) == names
    for namespace in (torch.ops.safnet_ops, torch.ops.safnet_ops_triton):
        assert all(getattr(namespace, name) in flop_registry for name in names)
