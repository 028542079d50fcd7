"""group_conv_shuffle's CUDA kernels, executed on the CPU, against the reference."""

import pytest
import torch

import ptxsim
import safnet_ops
from operator_inputs import conv_inputs
from safnet_ops import reference
from tests.support.operators import DTYPES, LAYOUTS, assert_close, channels_last, check_operator, contiguous

CASES = {  # channels in, channels out, groups, stride, dilation, height, width
    "decoder": (30, 30, 3, 1, 1, 6, 9),
    "forty channels of a group": (40, 40, 1, 1, 1, 5, 34),
    "refine": (16, 80, 1, 1, 2, 17, 7),
    "dilation 4": (8, 16, 1, 1, 4, 9, 10),
    "dilation 3": (8, 5, 1, 1, 3, 7, 8),
    "stride 2": (6, 20, 1, 2, 1, 9, 11),
    "stride 3, dilation 2": (9, 6, 3, 3, 2, 10, 7),
    "one pixel": (4, 4, 2, 1, 1, 1, 1),
    "depthwise": (6, 6, 6, 1, 1, 5, 5),
    "five chunks": (80, 8, 1, 1, 1, 3, 5),
    "tall": (4, 8, 1, 1, 4, 35, 3),
}


def inputs(case, dtype=torch.float32, layout=contiguous, n=1):
    channels_in, channels_out, groups, stride, dilation, *size = CASES[case]
    image, *others, residual = conv_inputs(size, (channels_in, channels_out), groups, n=n, stride=stride, dtype=dtype)
    return [layout(image), *others, layout(residual)], {"groups": groups, "stride": stride, "dilation": dilation}


def call(function, geometry):
    def wrapped(image, weight, bias=None, prelu=None, residual=None):
        return function(image, weight, bias, prelu, residual=residual, **geometry)

    return wrapped


def compare(values, geometry, needed=None, **more):
    needed = needed or [True] * len(values)
    return check_operator(
        call(safnet_ops.group_conv_shuffle, geometry),
        call(reference.group_conv_shuffle, geometry),
        values,
        needed,
        **more,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(cuda, dtype, layout):
    compare(*inputs("decoder", dtype, layout))


@pytest.mark.parametrize("case", [case for case in CASES if case != "decoder"])
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.float32, contiguous), (torch.float16, contiguous), (torch.float16, channels_last)],
    ids=str,
)
def test_geometries(cuda, dtype, layout, case):
    compare(*inputs(case, dtype, layout))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("case", ["decoder", "stride 2", "refine"])
def test_tf32_where_torch_allows_it(cuda, float32_products, case, layout):
    float32_products("tf32")
    values, geometry = inputs(case, torch.float32, layout)
    # Without PReLU: rounding may change the sign of a preactivation near zero, and gradients by the whole step of the slope.
    compare(values[:3], geometry, slack=300)  # 10 bits of mantissa
    assert cuda.saw("convolve_tensorIf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [75, 86])
def test_less_shared_memory_and_older_tensor_cores(cuda, dtype, capability):
    with cuda.capability(capability):
        compare(*inputs("refine", dtype, n=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_geometry_beyond_shared_memory(cuda, dtype):
    CASES["wide"] = (2, 3, 1, 1, 70, 5, 90)
    compare(*inputs("wide", dtype))
    assert cuda.saw("convolve_direct")


def test_without_bias_prelu_and_residual(cuda):
    values, geometry = inputs("decoder")
    compare(values[:2], geometry)
    compare(values[:3], geometry)
    with_slope = [*values[:3], values[3][:1]]
    compare(with_slope, geometry)


def test_every_gradient_alone(cuda):
    values, geometry = inputs("stride 3, dilation 2")
    for position in range(5):
        compare(values, geometry, [i == position for i in range(5)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_64bit_offsets_give_the_same_bits(cuda, monkeypatch, dtype, layout):
    values, geometry = inputs("refine", dtype, layout)

    def run():
        out, before = cuda.call("group_conv_shuffle", *values, *geometry.values(), True)
        return (
            out,
            before,
            *cuda.call(
                "group_conv_shuffle_backward",
                torch.ones_like(out),
                before,
                *values[:2],
                values[3],
                *geometry.values(),
                31,
                False,
            ),
        )

    narrow = run()
    monkeypatch.setenv("SAFNET_OPS_FORCE_64BIT_OFFSETS", "1")
    assert all(torch.equal(one, other) for one, other in zip(narrow, run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_under_any_order(cuda, dtype):
    values, geometry = inputs("decoder", dtype, n=2)
    found = []
    for seed in (None, 7):
        with ptxsim.options(seed=seed):
            out, before = cuda.call("group_conv_shuffle", *values, *geometry.values(), True)
            grads = cuda.call(
                "group_conv_shuffle_backward", out, before, *values[:2], values[3], *geometry.values(), 31, True
            )
            found.append((out, before, *grads))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_infinite_input_stays_infinite(cuda):
    """Padding of channels and taps multiplies by zero: it must not meet an infinity."""
    values, geometry = inputs("forty channels of a group", torch.float16)
    values[0][0, 35, 2, 20] = float("inf")
    out = call(safnet_ops.group_conv_shuffle, geometry)(*values)
    expected = call(reference.group_conv_shuffle, geometry)(*(value.float() for value in values))
    assert torch.equal(out.isinf(), expected.isinf())
    assert not out.isnan().any()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (1, 4, 0, 3)], ids=str)
def test_empty(cuda, shape):
    image, weight = torch.rand(shape, requires_grad=True), torch.rand(4, 4, 3, 3, requires_grad=True)
    out = safnet_ops.group_conv_shuffle(image, weight)
    assert out.shape == shape
    image_grad, weight_grad = torch.autograd.grad(out.sum(), (image, weight))
    assert image_grad.shape == shape
    assert_close("weight gradient", weight_grad, torch.zeros(4, 4, 3, 3))


@pytest.mark.parametrize("options", [{"shuffle": False}, {"shuffle": False, "activation": "relu"}], ids=str)
def test_options(cuda, options):
    (image, weight, bias, _slopes, residual), geometry = inputs("decoder")

    def without_slopes(function):
        return lambda *values: function(*values[:3], None, residual=values[3], **geometry, **options)

    check_operator(
        without_slopes(safnet_ops.group_conv_shuffle),
        without_slopes(reference.group_conv_shuffle),
        [image, weight, bias, residual],
        [True] * 4,
    )
    assert cuda.saw("convol")
