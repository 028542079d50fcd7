"""backward_warp's CUDA kernels, executed on the CPU, against the reference."""

import pytest
import torch

import ptxsim
import safnet_ops
from operator_inputs import off_grid, warp_inputs
from safnet_ops import reference
from safnet_ops.operators import needed_bits
from tests.support.operators import DTYPES, LAYOUTS, assert_close, channels_last, check_operator, contiguous, gradients


def inputs(shape=(2, 3, 7, 13), dtype=torch.float32, flow_dtype=None, reach=4.0):
    n, channels, *size = shape
    return warp_inputs(size, n=n, channels=channels, dtype=dtype, flow_dtype=flow_dtype, pixels=reach)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(cuda, dtype, layout):
    image, flow = inputs(dtype=dtype)
    check_operator(safnet_ops.backward_warp, reference.backward_warp, (layout(image), layout(flow)), (True, True))


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 2, 1, 5), (3, 1, 6, 1), (1, 40, 5, 12), (2, 9, 4, 8), (2, 64, 3, 4)], ids=str
)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_sizes(cuda, shape, layout):
    image, flow = inputs(shape)
    check_operator(safnet_ops.backward_warp, reference.backward_warp, (layout(image), flow), (True, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [3, 16])
def test_half_images_with_float32_flow(cuda, dtype, channels):
    image, flow = inputs((1, channels, 6, 16), dtype, torch.float32)
    for layout in (contiguous, channels_last):
        check_operator(safnet_ops.backward_warp, reference.backward_warp, (layout(image), flow), (True, True))


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=str)
def test_only_the_needed_gradient_is_computed(cuda, needed):
    image, flow = inputs()
    check_operator(safnet_ops.backward_warp, reference.backward_warp, (image, flow), needed)
    found = cuda.call("backward_warp_backward", torch.ones_like(image), image, flow, needed_bits(needed), False)
    assert [g.numel() > 0 for g in found] == list(needed)


@pytest.mark.parametrize("shape", [(2, 3, 7, 13), (2, 3, 5, 8), (1, 16, 5, 6)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_64bit_offsets_give_the_same_bits(cuda, monkeypatch, shape, layout):
    image, flow = inputs(shape)
    image = layout(image)
    grad = torch.randn(shape)

    def run():
        forward = cuda.call("backward_warp", image, flow)
        return forward, *cuda.call("backward_warp_backward", grad, image, flow, 0b11, True)

    narrow = run()
    monkeypatch.setenv("SAFNET_OPS_FORCE_64BIT_OFFSETS", "1")
    for one, other in zip(narrow, run(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()
    assert cuda.saw("Ifl")  # a kernel of the 64-bit path did run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 16])
def test_deterministic_gradient_under_any_order(cuda, dtype, channels):
    image, flow = inputs((1, channels, 24, 23), dtype, reach=0.5)
    flow[:, :, :, :9] = off_grid(torch.zeros_like(flow[:, :, :, :9]))  # many pixels of one cell
    flow[:, 0] -= torch.arange(23).to(dtype) * 0.5
    image = (channels_last if channels == 16 else contiguous)(image)
    grad = torch.randn_like(image)
    found = []
    for seed in (None, 1, 2):
        with ptxsim.options(seed=seed):
            found.append(cuda.call("backward_warp_backward", grad, image, flow, 0b11, True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    _, expected = gradients(reference.backward_warp, (image.double(), flow.double()), (True, True), grad.double())
    for one, other in zip(found[0], expected, strict=True):
        assert_close("gradient", one, other)


@pytest.mark.parametrize("deterministic", [False, True])
def test_nan_and_infinite_flow(cuda, deterministic):
    image, flow = inputs((1, 2, 6, 8))
    flow[0, 0, 2, 3] = float("nan")
    flow[0, 1, 4, 4] = float("nan")
    flow[0, :, 0, 0] = float("inf")
    flow[0, :, 5, 7] = float("-inf")
    flow[0, 0, 3, 3], flow[0, 0, 3, 4] = 1e30, -1e30
    out = safnet_ops.backward_warp(image, flow)
    expected = reference.backward_warp(image, flow)
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert out.isnan().sum() == 4
    grad = torch.randn_like(image)
    found = cuda.call("backward_warp_backward", grad, image, flow, 0b11, deterministic)
    _, wanted = gradients(reference.backward_warp, (image, flow), (True, True), grad)
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other)


def test_infinite_gradient_stays_infinite_in_fixed_point(cuda):
    image, flow = inputs((1, 1, 4, 6))
    grad = torch.randn_like(image)
    grad[0, 0, 1, 2], grad[0, 0, 3, 5] = float("inf"), float("nan")
    found = cuda.call("backward_warp_backward", grad, image, flow, 0b01, True)[0]
    expected = cuda.call("backward_warp_backward", grad, image, flow, 0b01, False)[0]
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found.isinf().any()
    assert found.isnan().any()


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e30])
def test_fixed_point_follows_the_gradients_magnitude(cuda, scale):
    image, flow = inputs((1, 1, 4, 6))
    grad = torch.randn_like(image) * scale
    found = cuda.call("backward_warp_backward", grad, image, flow, 0b01, True)[0]
    expected = gradients(reference.backward_warp, (image.double(), flow.double()), (True, False), grad.double())[1][0]
    assert_close("gradient", found, expected)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty(cuda, shape):
    image = torch.rand(shape, requires_grad=True)
    flow = torch.zeros(shape[0], 2, *shape[2:], requires_grad=True)
    out = safnet_ops.backward_warp(image, flow)
    assert out.shape == shape
    image_grad, flow_grad = torch.autograd.grad(out.sum(), (image, flow))
    assert image_grad.shape == shape
    assert flow_grad.eq(0).all()


def test_gradient_of_a_sum(cuda):
    """The gradient comes expanded: all strides are zero."""
    image, flow = inputs()
    image.requires_grad_()
    (found,) = torch.autograd.grad(safnet_ops.backward_warp(image, flow).sum(), image)
    (expected,) = torch.autograd.grad(reference.backward_warp(image, flow).sum(), image)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_options(cuda, padding):
    torch.manual_seed(0)
    image, flow = torch.rand(1, 3, 6, 7), 3 * torch.randn(2, 2, 5, 9)
    check_operator(
        lambda image, flow: safnet_ops.backward_warp(image, flow, padding=padding),
        lambda image, flow: safnet_ops.backward_warp(image, flow, padding=padding, backend="reference"),
        (image, flow),
        (True, True),
    )
