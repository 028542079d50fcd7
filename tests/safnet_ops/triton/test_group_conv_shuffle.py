"""group_conv_shuffle in Triton: the library's own launches, executed from PTX by the simulator, against the
float64 reference."""

import pytest
import torch

import safnet_ops
from operator_inputs import conv_inputs
from safnet_ops import reference
from tests.support.operators import DTYPES, LAYOUTS, assert_close, channels_last, check_operator, contiguous

pytestmark = pytest.mark.usefixtures("simulated", "float32_products")
TF32 = 300  # slack: ten bits of mantissa in the products; sums are float32


def make(size=(6, 9), channels=(6, 9), groups=3, n=2, stride=1, dtype=torch.float32):
    return conv_inputs(size, channels, groups, n=n, stride=stride, dtype=dtype)


def call(function, groups, **options):
    """The operator as a function of its tensors; those left out are None."""
    return lambda input, weight, bias=None, prelu=None, residual=None: function(
        input, weight, bias, prelu, groups, residual=residual, **options
    )


def check(inputs, groups=3, needed=None, slack=1.0, **options):
    needed = (True,) * len(inputs) if needed is None else needed
    return check_operator(
        call(safnet_ops.group_conv_shuffle, groups, backend="triton", **options),
        call(reference.group_conv_shuffle, groups, **options),
        inputs,
        needed,
        slack=slack,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_matches_reference(dtype, layout):
    inputs = make(channels=(24, 9), dtype=dtype)
    inputs[0] = layout(inputs[0])
    out = check(inputs)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last) == (layout is channels_last)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_tf32_where_torch_allows_it(layout, float32_products):
    inputs = make(channels=(24, 9))
    exact = check([inputs[0].clone(), *inputs[1:]], needed=(False,) * 5)
    float32_products("tf32")
    inputs[0] = layout(inputs[0])
    rounded = check(inputs, slack=TF32)
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 70)], ids=str)
def test_layouts_and_odd_sizes(layout, size):
    input, weight, bias, prelu, residual = make(size)
    check([layout(input), weight, bias, prelu, layout(residual)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_any_strides(layout):
    input, weight, *others = make((5, 7))
    check([input, layout(weight), *others])


@pytest.mark.parametrize(("stride", "dilation"), [(2, 1), (1, 2), (2, 3), (3, 1)])
def test_stride_and_dilation(stride, dilation):
    check(make((7, 10), stride=stride), stride=stride, dilation=dilation)


@pytest.mark.parametrize(("groups", "channels"), [(1, (20, 3)), (2, (4, 80)), (1, (3, 130))])
def test_channel_counts_that_fill_no_tile(groups, channels):
    """3 rows in a tile of 16, 40 in 32 + 16 (or two of 32), and more than a tile holds."""
    check(make((4, 5), channels, groups, dtype=torch.float16), groups, needed=(False,) * 5)
    check(make((4, 5), channels, groups), groups, needed=(False, False, False, False, True))


@pytest.mark.parametrize("depth", [40, 80, 150])
def test_depths_of_two_parts_and_two_steps(depth):
    """32 + 16 and 64 + 16 channels in a step; 150 take two steps a tap, the last of them not full."""
    inputs = make((4, 5), (depth, 5), 1, dtype=torch.float16)[:2]
    inputs[0] = channels_last(inputs[0])
    check(inputs, 1)


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_backward_with_nothing_to_undo(layout):
    """One group, no PReLU, no residual: the incoming gradient is read as it is, whatever its layout."""
    inputs = make(channels=(5, 7), groups=1)[:3]
    check([layout(inputs[0]), *inputs[1:]], 1)
    leaves = [x.clone().requires_grad_() for x in (layout(inputs[0]), *inputs[1:])]
    call(safnet_ops.group_conv_shuffle, 1, backend="triton")(*leaves).sum().backward()  # a gradient of strides 0
    expected = [x.detach().double().requires_grad_() for x in leaves]
    call(reference.group_conv_shuffle, 1)(*expected).sum().backward()
    for leaf, other in zip(leaves, expected, strict=True):
        assert_close("gradient", leaf.grad, other.grad)


@pytest.mark.parametrize("present", [2, 3, 4])
def test_without_residual_activation_and_bias(present):
    check(make()[:present])


def test_one_slope_for_all_channels():
    inputs = make()
    inputs[3] = torch.tensor([0.3])
    check(inputs)


@pytest.mark.parametrize("position", range(5))
def test_only_needed_gradients(position):
    check(make(), needed=tuple(i == position for i in range(5)))


def test_gradients_repeat_to_the_bit_in_any_order():
    import ptxsim

    inputs = make((20, 40), n=1)
    found = []
    for seed in (1, 2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with ptxsim.options(seed=seed):
            call(safnet_ops.group_conv_shuffle, 3, backend="triton")(*leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_64bit_offsets_give_the_same_bits(wide):
    inputs = make()
    narrow = check(inputs)
    wide()
    assert torch.equal(check(inputs), narrow)


def test_empty_batch():
    leaves = [x.requires_grad_() for x in make(n=0)]
    out = call(safnet_ops.group_conv_shuffle, 3, backend="triton")(*leaves)
    assert out.shape == (0, 9, 6, 9)
    out.sum().backward()
    assert all(leaf.grad.shape == leaf.shape and not leaf.grad.any() for leaf in leaves)


@pytest.mark.parametrize("options", [{"shuffle": False}, {"shuffle": False, "activation": "relu"}], ids=str)
def test_options(options):
    image, weight, bias, _slopes, residual = make()

    def without_slopes(function, **more):
        return lambda input, weight, bias, residual: function(
            input, weight, bias, None, 3, residual=residual, **options, **more
        )

    check_operator(
        without_slopes(safnet_ops.group_conv_shuffle, backend="triton"),
        without_slopes(reference.group_conv_shuffle),
        [image, weight, bias, residual],
        (True,) * 4,
    )
