"""group_conv_shuffle: the C++ kernels against the reference, and the reference against a stock model's layers."""

import contextlib
import itertools
from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

import safnet_ops
from operator_inputs import conv_inputs
from safnet_ops import reference
from tests.support.operators import DTYPES, LAYOUTS, SIZES, assert_close, channels_last, check_operator, contiguous

cpp = torch.ops.safnet_ops
NAMES = ("input", "weight", "bias", "prelu_weight", "residual")

# (groups, input channels, output channels, stride, dilation): whole and broken blocks of channels, depthwise, strides
# that divide the dilation or not, more input channels than are summed at once, taps that never meet the picture.
GEOMETRIES = [
    (1, 3, 4, 1, 1),
    (3, 12, 24, 1, 1),
    (1, 5, 7, 1, 2),
    (2, 6, 4, 2, 1),
    (4, 4, 4, 1, 1),
    (1, 9, 1, 2, 2),
    (2, 4, 6, 3, 2),
    (3, 6, 9, 1, 4),
    (1, 50, 5, 1, 1),
    (1, 6, 20, 2, 1),
    (2, 2, 2, 1, 300),
    (1, 3, 2, 7, 3),
]

# Enough channels, and a dilation, for Winograd's method; whole and broken blocks of channels.
WINOGRAD = [(1, 8, 8, 1, 1), (3, 27, 39, 1, 1), (2, 20, 22, 1, 2), (1, 9, 11, 1, 4)]


def make(size=(5, 7), n=2, geometry=(3, 12, 24, 1, 1), dtype=torch.float32):
    groups, channels_in, channels_out, stride, _ = geometry
    return conv_inputs(size, (channels_in, channels_out), groups, n=n, stride=stride, dtype=dtype, exact=True)


def bound(function, geometry):
    """`function` of the tensors alone; the operator by its kernel, even where the library would be faster."""
    groups, _, _, stride, dilation = geometry
    options = {"backend": "cpp"} if function is safnet_ops.group_conv_shuffle else {}

    def call(input, weight, bias, prelu_weight, residual):
        return function(
            input, weight, bias, prelu_weight, groups, stride=stride, dilation=dilation, residual=residual, **options
        )

    return call


def check(tensors, geometry, needed=(True,) * 5, terms=0.0):
    operator, expected = (bound(f, geometry) for f in (safnet_ops.group_conv_shuffle, reference.group_conv_shuffle))
    return check_operator(operator, expected, tensors, needed, terms=terms)


def test_reference_equals_layers():
    conv, prelu, shuffle = (
        torch.nn.Conv2d(6, 12, 3, padding=1, groups=3),
        torch.nn.PReLU(12),
        torch.nn.ChannelShuffle(3),
    )
    input = torch.randn(2, 6, 5, 7)
    expected = shuffle(prelu(conv(input)))
    assert torch.equal(reference.group_conv_shuffle(input, conv.weight, conv.bias, prelu.weight, 3), expected)
    assert_close("kernel", safnet_ops.group_conv_shuffle(input, conv.weight, conv.bias, prelu.weight, 3), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference_in_any_layout(dtype, layout, size, poisoned):
    for geometry in ((3, 12, 24, 1, 1), (1, 9, 10, 2, 1)):
        input, weight, bias, prelu_weight, residual = make(size, geometry=geometry, dtype=dtype)
        tensors = layout(input), layout(weight), bias, prelu_weight, layout(residual)
        out = check(tensors, geometry)
        assert out.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_matches_reference_in_any_geometry(dtype, layout, geometry, poisoned):
    for size in ((8, 13), (21, 110)):
        input, weight, bias, prelu_weight, residual = make(size, 1, geometry, dtype)
        check((layout(input), weight, bias, prelu_weight, residual), geometry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("geometry", WINOGRAD, ids=str)
def test_winograd_matches_reference(dtype, layout, geometry, poisoned):
    """Sizes below 2x2 and 4x4 outputs, of odd sides, and of several tiles each way."""
    for size in ((17, 110), (70, 1), (5, 49), (67, 203)):
        input, weight, bias, prelu_weight, residual = make(size, 1, geometry, dtype)
        tensors = layout(input), layout(weight), bias, prelu_weight, layout(residual)
        check(tensors, geometry)


def error_of_sums(height, width, dilation, reach):
    """Largest error against float64, in float32's unit of rounding of what the terms of a sum add up to: of the largest of
    the sums up to `reach` times the dilation away. Radiance of very different size meets in a sum."""
    input, weight = torch.randn(1, 40, height, width) * torch.logspace(-3, 3, width), torch.randn(40, 40, 3, 3)
    out = safnet_ops.group_conv_shuffle(input, weight, dilation=dilation).double()
    exact = reference.group_conv_shuffle(input.double(), weight.double(), dilation=dilation)
    terms = reference.group_conv_shuffle(input.double().abs(), weight.double().abs(), dilation=dilation)
    radius = reach * dilation
    around = torch.nn.functional.max_pool2d(terms, 2 * radius + 1, 1, radius)
    return ((out - exact).abs() / around).max() / torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_winograd_is_as_exact_as_the_definition(dilation):
    """F(2x2, 3x3), which serves smaller pictures."""
    assert error_of_sums(15 * dilation, 16 * dilation, dilation, reach=0) < 4


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_error_of_larger_squares(dilation):
    """F(4x4, 3x3): an output's error is that of the 4x4 it is made with."""
    assert error_of_sums(64, 90, dilation, reach=3) < 8
    input, weight = torch.randn(1, 80, 64, 90), torch.randn(80, 80, 3, 3)
    out = safnet_ops.group_conv_shuffle(input, weight, dilation=dilation).double()
    exact = reference.group_conv_shuffle(input.double(), weight.double(), dilation=dilation)
    assert (out - exact).square().mean().sqrt() < 1.1e-6 * exact.std()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_channels(layout):
    input, weight = layout(torch.randn(1, 126, 20, 30)), torch.randn(40, 126, 3, 3)
    out = safnet_ops.group_conv_shuffle(input, weight)
    assert_close("the result", out, reference.group_conv_shuffle(input.double(), weight.double()))


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=5)), ids=str)
def test_only_needed_gradients(needed):
    for layout in LAYOUTS[:2]:
        input, *others = make((9, 30))
        check((layout(input), *others), (3, 12, 24, 1, 1), needed)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("groups", [1, 3])
def test_optional_arguments(given, groups, poisoned):
    geometry = (groups, 12, 24, 1, 1)
    input, weight, *optional = make(geometry=geometry)
    tensors = [input, weight, *(value for value, here in zip(optional, given, strict=True) if here)]

    def call(function, input, weight, *present):
        present = iter(present)
        bias, prelu_weight, residual = (next(present) if here else None for here in given)
        return function(input, weight, bias, prelu_weight, groups, residual=residual)

    operators = (partial(call, f) for f in (safnet_ops.group_conv_shuffle, reference.group_conv_shuffle))
    check_operator(*operators, tensors, [True] * len(tensors))


def test_one_slope_for_all_channels():
    input, weight, bias, _, residual = make()
    tensors = input, weight, bias, torch.tensor([0.3]), residual
    check(tensors, (3, 12, 24, 1, 1))


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_expanded_input(dimension):
    input, *others = make((9, 30))
    input = input.narrow(dimension, 0, 1).expand(2, 12, 9, 30)
    check((input, *others), (3, 12, 24, 1, 1))


def test_channels_last_stays_channels_last():
    tensors = [value.requires_grad_() for value in make((6, 8))]
    tensors[0] = channels_last(tensors[0].detach()).requires_grad_()
    out = bound(safnet_ops.group_conv_shuffle, (3, 12, 24, 1, 1))(*tensors)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.sum().backward()  # a gradient of stride 0
    assert tensors[0].grad.is_contiguous(memory_format=torch.channels_last)
    expected = [value.detach().double().requires_grad_() for value in tensors]
    bound(reference.group_conv_shuffle, (3, 12, 24, 1, 1))(*expected).sum().backward()
    for name, value, exact in zip(NAMES, tensors, expected, strict=True):
        assert_close(name, value.grad, exact.grad)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_empty_batch(layout):
    tensors = [value.requires_grad_() for value in make(n=0)]
    out = bound(safnet_ops.group_conv_shuffle, (3, 12, 24, 1, 1))(layout(tensors[0]), *tensors[1:])
    assert out.shape == (0, 24, 5, 7)
    out.sum().backward()
    assert all(not value.grad.any() and value.grad.shape == value.shape for value in tensors)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize(
    "geometry", [(3, 12, 24, 1, 1), (3, 24, 24, 1, 1), (3, 24, 24, 1, 2), (3, 24, 24, 1, 4)], ids=str
)
@pytest.mark.parametrize("height", [5, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_and_infinity_stay_where_they_belong(value, layout, geometry, height, dtype):
    """A pixel reaches 3x3 outputs and no others, in every column: the last share vectors with what is not there.

    An infinite one, and one that a sum overflows with, makes them infinite and not NaN.
    """
    dilation, middle = geometry[-1], height // 2
    for x in range(45, 53):
        input, weight, bias, prelu_weight, residual = make((height, 53), 1, geometry, dtype)
        input[0, 0, middle, x] = value
        weight, prelu_weight = weight.abs() + 2, prelu_weight + 0.1
        out = bound(safnet_ops.group_conv_shuffle, geometry)(layout(input), weight, bias, prelu_weight, residual)
        reached = torch.zeros(height, 53, dtype=torch.bool)
        for row in (middle - dilation, middle, middle + dilation):
            for column in (x - dilation, x, x + dilation):
                if 0 <= row < height and column < 53:
                    reached[row, column] = True
        assert torch.equal(~out[0].isfinite().all(0), reached)
        assert torch.equal(out[0].isnan().any(0), reached & torch.tensor(value != value))
        assert out[0, 1::3].isfinite().all()  # of the other groups
        assert out[0, 2::3].isfinite().all()


def test_tiles_that_are_not_finite_are_made_by_definition():
    """All of a tile, with the weights of its group, whatever else is computed with it."""
    geometry = (2, 40, 48, 1, 1)
    input, weight, bias, prelu_weight, residual = make((70, 210), 2, geometry)
    input[1, 3, 40, 100] = torch.nan
    check((input, weight, bias, prelu_weight, residual), geometry)
    weight[7, 2, 1, 1] = torch.inf
    check((input, weight, bias, prelu_weight, residual), geometry, (False,) * 5)


def test_infinity_beside_the_last_column_spoils_no_weight_gradient():
    input, weight, *_ = make((3, 5), 1, (1, 1, 1, 1, 1))
    input[..., 4] = torch.inf
    weight.requires_grad_()
    safnet_ops.group_conv_shuffle(input, weight).backward(torch.ones(1, 1, 3, 5))
    # The last column is read one to the left of nothing: the weights of the left column never meet it.
    assert weight.grad[..., 0].isfinite().all()
    assert weight.grad[..., 1:].isinf().all()


def test_nan_activation_has_nan_gradient():
    input, weight, bias, prelu_weight, residual = make((4, 6), 1)
    residual[0, 5, 1, 2] = torch.nan
    input.requires_grad_()
    bound(safnet_ops.group_conv_shuffle, (3, 12, 24, 1, 1))(
        input, weight, bias, prelu_weight, residual
    ).sum().backward()
    assert input.grad.isfinite().all()  # PReLU's slope there is a number, as in PyTorch


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    groups = draw(1, 4)
    geometry = (groups, groups * draw(1, 10), groups * draw(1, 10), draw(1, 4), draw(1, 6))
    tensors = make((draw(1, 20), draw(1, 60)), draw(0, 2), geometry)
    needed = [data.draw(st.booleans()) for _ in tensors]
    layout = data.draw(st.sampled_from(LAYOUTS))
    check((layout(tensors[0]), *tensors[1:]), geometry, needed, terms=1)


@pytest.mark.parametrize("geometry", [(1, 2, 3, 1, 1), (2, 2, 2, 2, 1), (2, 2, 4, 1, 2), (1, 1, 2, 2, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_gradcheck(geometry, layout):
    input, *others = make((3, 4), 1, geometry, torch.float64)
    inputs = [value.requires_grad_() for value in (layout(input), *others)]
    operator = bound(safnet_ops.group_conv_shuffle, geometry)
    assert torch.autograd.gradcheck(operator, inputs)
    assert torch.autograd.gradgradcheck(operator, inputs)


def operator_arguments(layout, groups, stride, needs):
    """Arguments of the registered forward and backward operators."""
    input, weight, bias, prelu_weight, residual = make((3, 4), geometry=(groups, 6, 12, stride, 1))
    input, weight, residual = layout(input), layout(weight), layout(residual)
    forward = input, weight, bias, prelu_weight, residual, groups, stride, 1, True
    out, preactivation = cpp.group_conv_shuffle(*forward)
    grad = layout(torch.randn_like(out))
    return forward, (grad, preactivation, input, weight, prelu_weight, groups, stride, 1, needs, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    forward, backward = operator_arguments(layout, 3, 1, needs=31)
    torch.library.opcheck(cpp.group_conv_shuffle.default, forward)
    torch.library.opcheck(cpp.group_conv_shuffle_backward.default, backward)


@pytest.mark.parametrize("needs", [1, 2, 4, 8, 16])
def test_opcheck_of_single_gradients(needs):
    _, backward = operator_arguments(LAYOUTS[0], 1, 2, needs)
    torch.library.opcheck(cpp.group_conv_shuffle_backward.default, backward)


def test_opcheck_without_options():
    (input, weight, *_), _ = operator_arguments(LAYOUTS[0], 1, 2, needs=0)
    torch.library.opcheck(cpp.group_conv_shuffle.default, (input, weight, None, None, None, 1, 2, 1, False))


def test_compile_and_export():
    def loss(input, weight, bias, prelu_weight, residual):
        out = safnet_ops.group_conv_shuffle(input * 2, weight, bias, prelu_weight, 3, residual=residual)
        return out.square().sum()

    tensors = make((12, 16))
    leaves, compiled = ([value.clone().requires_grad_() for value in tensors] for _ in range(2))
    loss(*leaves).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for name, leaf, other in zip(NAMES, leaves, compiled, strict=True):
        assert_close(f"the compiled gradient of {name}", other.grad, leaf.grad)

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return bound(safnet_ops.group_conv_shuffle, (3, 12, 24, 1, 1))(*tensors)

    program = torch.export.export(Layer(), tuple(tensors))
    assert any("safnet_ops.group_conv_shuffle" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*tensors), Layer()(*tensors))


def test_autocast():
    input, weight, bias, prelu_weight, residual = make()
    with torch.autocast("cpu", torch.bfloat16):
        out = safnet_ops.group_conv_shuffle(input, weight, bias, prelu_weight, 3, residual=residual)
    assert out.dtype == torch.bfloat16
    expected = reference.group_conv_shuffle(input, weight, bias, prelu_weight, 3, residual=residual)
    assert_close("the result", out, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "geometry", [(3, 12, 24, 1, 1), (3, 12, 24, 2, 1), (3, 24, 24, 1, 1), (1, 24, 80, 1, 2)], ids=str
)
def test_deterministic_over_runs_and_threads(layout, geometry):
    sizes = [value.shape for value in make((150, 160), geometry=geometry)]
    tensors = [torch.randn(size) for size in sizes]
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 2, 4, 3):
        torch.set_num_threads(count)
        leaves = [value.clone().requires_grad_() for value in (layout(tensors[0]), *tensors[1:])]
        out = bound(safnet_ops.group_conv_shuffle, geometry)(*leaves)
        out.square().sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("size", [(840, 500), (67, 203)], ids=str)
def test_layouts_and_threads_agree_in_bfloat16(size, groups, given):
    """To the bit. The larger results, of more than 32 MiB, are written past the caches in channels_last."""
    input, weight, bias, slopes, residual = make(size, 1, (groups, 48, 48, 1, 2), torch.bfloat16)
    results = []
    threads = torch.get_num_threads()
    for count, layout in ((2, contiguous), (2, channels_last), (1, channels_last), (1, contiguous)):
        torch.set_num_threads(count)
        options = {"prelu_weight": slopes, "residual": layout(residual)} if given else {}
        found = safnet_ops.group_conv_shuffle(layout(input), weight, bias, groups=groups, dilation=2, **options)
        assert found.is_contiguous(memory_format=torch.channels_last) == (layout is channels_last)
        results.append(found)
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_slices_in_bfloat16():
    """Pixels that begin between vectors, and lie further apart than their channels."""
    input, weight, bias, slopes, residual = make((630, 400), 1, (1, 70, 70, 1, 1), torch.bfloat16)
    whole = safnet_ops.group_conv_shuffle(input[:, 3:67], weight[:64, 3:67], bias[:64], slopes[:64])
    last = channels_last(input)[:, 3:67]
    assert last.stride(1) == 1
    assert torch.equal(safnet_ops.group_conv_shuffle(last, weight[:64, 3:67], bias[:64], slopes[:64]), whole)
    added = safnet_ops.group_conv_shuffle(last, weight[:64, 3:67], residual=channels_last(residual)[:, 5:69])
    expected = safnet_ops.group_conv_shuffle(input[:, 3:67], weight[:64, 3:67], residual=residual[:, 5:69])
    assert torch.equal(added, expected)


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """4.4 GB of bfloat16: the last channels of the last picture lie beyond 32 bits."""
    n, channels, height, width = 2, 130, 2048, 4200
    assert n * channels * height * width > 2**31
    input = torch.zeros(n, channels, height, width, dtype=torch.bfloat16)
    input[-1, -1] = torch.randn(height, width)
    weight = torch.zeros(1, channels, 3, 3, dtype=torch.bfloat16)
    weight[0, -1, 1, 1] = 1
    out = safnet_ops.group_conv_shuffle(input, weight)
    assert torch.equal(out[-1, 0], input[-1, -1])
    assert not out[0].any()


def arguments(**changed):
    input, weight, bias, prelu_weight, residual = make(n=1)
    return {
        "input": input,
        "weight": weight,
        "bias": bias,
        "prelu_weight": prelu_weight,
        "groups": 3,
        "residual": residual,
    } | changed


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"input": 1}, TypeError, "group_conv_shuffle: input must be a torch.Tensor, got int"),
        ({"input": torch.zeros(12, 5, 7)}, ValueError, r"input must have 4 dimensions .* got shape \(12, 5, 7\)"),
        ({"input": torch.zeros(1, 12, 5, 7).int()}, TypeError, "input must be float32.* got torch.int32"),
        (
            {"weight": torch.zeros(24, 4, 3, 3).double()},
            TypeError,
            "weight must be torch.float32 like input, got torch.float64",
        ),
        (
            {"weight": torch.zeros(24, 12, 3, 3)},
            ValueError,
            r"weight must be \(C_out, C_in / groups, K, K\) with K 1, 3 or 5 = \(24, 4, 3, 3\), got \(24, 12, 3, 3\)",
        ),
        ({"weight": torch.zeros(24, 4, 5, 3)}, ValueError, r"weight must be .* = \(24, 4, 5, 5\), got \(24, 4, 5, 3\)"),
        ({"weight": torch.zeros(24, 4, 7, 7)}, ValueError, r"with K 1, 3 or 5 = \(24, 4, 3, 3\), got \(24, 4, 7, 7\)"),
        (
            {"weight": torch.zeros(24, 4, 5, 5), "residual": None, "backend": "cpp"},
            ValueError,
            "backend must be 'reference' or None for weights other than 3x3, got 'cpp'",
        ),
        ({"activation": "gelu"}, ValueError, "activation must be 'relu' or None, got 'gelu'"),
        ({"activation": "relu"}, ValueError, "prelu_weight must be None beside activation='relu', got a tensor"),
        ({"stride": (1, 2)}, ValueError, r"stride must be the same for both directions, got \(1, 2\)"),
        ({"dilation": (1, 1, 1)}, ValueError, r"dilation must be the same for both directions, got \(1, 1, 1\)"),
        ({"stride": ()}, ValueError, r"stride must be the same for both directions, got \(\)"),
        ({"weight": torch.zeros(24, 4, 3, 3, device="meta")}, ValueError, "weight must be on cpu like input, got meta"),
        ({"groups": 5}, ValueError, "groups must divide the 12 input and 24 output channels, got 5"),
        ({"groups": 0}, ValueError, "groups must be an integer of at least 1, got 0"),
        ({"stride": 0}, ValueError, "stride must be an integer of at least 1, got 0"),
        ({"dilation": 1.5}, ValueError, "dilation must be an integer of at least 1, got 1.5"),
        ({"bias": 1.0}, TypeError, "bias must be a torch.Tensor or None, got float"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias must be \(C_out,\) = \(24,\), got \(1,\)"),
        ({"prelu_weight": torch.zeros(2)}, ValueError, r"prelu_weight must be \(C_out,\) = \(24,\), got \(2,\)"),
        (
            {"prelu_weight": torch.zeros(24).half()},
            TypeError,
            "prelu_weight must be torch.float32 like input, got torch.float16",
        ),
        (
            {"residual": torch.zeros(1, 24, 5, 8)},
            ValueError,
            r"residual must be the output's shape = \(1, 24, 5, 7\), got \(1, 24, 5, 8\)",
        ),
        ({"backend": "fast"}, ValueError, "backend must be one of reference, cpp, cuda, triton, got 'fast'"),
    ],
    ids=str,
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        safnet_ops.group_conv_shuffle(**arguments(**changed))


# ---- options that are composed of a kernel and PyTorch's operators, or are PyTorch's ----------------------------------


def stock(input, weight, bias, groups, residual=None, activation=None, shuffle=True, stride=1, dilation=1):
    padding = dilation * (weight.shape[2] - 1) // 2
    out = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    out = out if residual is None else out + residual
    out = torch.clamp(out, min=0) if activation == "relu" else out
    if shuffle:
        n, channels, height, width = out.shape
        out = out.reshape(n, groups, channels // groups, height, width).swapaxes(1, 2).reshape(out.shape)
    return out


@pytest.mark.parametrize("backend", [None, "reference", "cpp"])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize(
    "options", [{}, {"shuffle": False}, {"activation": "relu"}, {"shuffle": False, "activation": "relu"}], ids=str
)
@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"dilation": 3}], ids=str)
def test_options(backend, layout, side, options, geometry):
    torch.manual_seed(0)
    input, weight, bias = torch.randn(2, 6, 11, 13), torch.randn(12, 2, side, side), torch.randn(12)
    inputs = [layout(input), weight, bias, layout(torch.randn_like(stock(input, weight, bias, 3, **geometry)))]
    exact = [value.double().requires_grad_() for value in inputs]
    inputs = [value.requires_grad_() for value in inputs]
    with safnet_ops.use_backend(backend) if backend else contextlib.nullcontext():
        out = safnet_ops.group_conv_shuffle(*inputs[:3], None, 3, residual=inputs[3], **options, **geometry)
    expected = stock(*exact[:3], 3, exact[3], **options, **geometry)
    assert_close("options", out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last) == (layout is channels_last)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, inputs, grad)
    for value, right in zip(found, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_close("options", value, right)


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("options", [{"shuffle": False}, {"activation": "relu"}], ids=str)
def test_derivatives_of_options(side, options):
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 5, 6), torch.randn(6, 2, side, side), torch.randn(6)
    inputs = tuple(value.double().requires_grad_() for value in inputs)

    def function(input, weight, bias):
        return safnet_ops.group_conv_shuffle(input, weight, bias, None, 2, **options)

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, inputs)
    batch = torch.stack([inputs[0], 2 * inputs[0]])
    mapped = torch.func.vmap(lambda input: function(input, *inputs[1:]))(batch)
    assert torch.allclose(mapped[1], function(batch[1], *inputs[1:]))
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    assert counter.get_total_flops() == 2 * inputs[1].numel() * 2 * 5 * 6


@pytest.mark.parametrize("side", [1, 3, 5])
def test_options_under_autocast_compiled_and_exported(side):
    torch.manual_seed(0)
    input, weight, bias = torch.randn(2, 6, 9, 8), torch.randn(12, 2, side, side), torch.randn(12)

    class Layer(torch.nn.Module):
        def forward(self, input, weight, bias):
            return safnet_ops.group_conv_shuffle(input, weight, bias, None, 3, activation="relu", shuffle=False)

    expected = stock(input, weight, bias, 3, activation="relu", shuffle=False)
    assert_close("options", torch.compile(Layer(), fullgraph=True, backend="aot_eager")(input, weight, bias), expected)
    assert_close("options", torch.export.export(Layer(), (input, weight, bias)).module()(input, weight, bias), expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = Layer()(input, weight, bias)
    assert out.dtype == torch.bfloat16
    assert_close("options", out, expected, slack=3)


def test_relu_of_what_is_not_finite():
    input = torch.tensor([torch.nan, torch.inf, -torch.inf]).view(3, 1, 1, 1)
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1
    out = safnet_ops.group_conv_shuffle(input, weight, activation="relu").flatten()
    assert out[0].isnan()
    assert out[1:].tolist() == [torch.inf, 0]


def test_numbers_of_other_types():
    input, weight = torch.randn(1, 4, 9, 9), torch.randn(4, 2, 3, 3)
    expected = safnet_ops.group_conv_shuffle(input, weight, groups=2, stride=2, dilation=3)
    for kind in (np.int64, np.uint8, lambda number: (number, number), lambda number: [np.int32(number)]):
        out = safnet_ops.group_conv_shuffle(input, weight, groups=np.int64(2), stride=kind(2), dilation=kind(3))
        assert torch.equal(out, expected)


@pytest.mark.parametrize(("side", "library"), [(8, True), (600, False)])
def test_small_depthwise_takes_the_library(monkeypatch, side, library):
    called = []
    real = reference.group_conv_shuffle
    monkeypatch.setattr(reference, "group_conv_shuffle", lambda *a, **k: called.append(1) or real(*a, **k))
    torch.manual_seed(0)
    input, weight, bias, slopes = torch.randn(1, 4, side, side), torch.randn(4, 1, 3, 3), torch.randn(4), torch.randn(4)
    out = safnet_ops.group_conv_shuffle(input, weight, bias, slopes, 4)
    assert bool(called) == library
    called.clear()
    assert_close("options", out, safnet_ops.group_conv_shuffle(input, weight, bias, slopes, 4, backend="cpp"))
    with safnet_ops.use_backend("cpp"):
        safnet_ops.group_conv_shuffle(input, weight, bias, slopes, 4)
    assert not called
