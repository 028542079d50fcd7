"""NaN flows and masks in backward: the reference and the C++ kernels, on one thread or several."""

import pytest
import torch

import safnet_ops
from tests.support import lost_pixels
from tests.support.operators import DTYPES

BACKENDS = ("reference", "cpp")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_warp(backend, dtype, channels_last):
    lost_pixels.check_warp(backend, dtype, channels_last=channels_last)


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fuse(backend, dtype, logits):
    lost_pixels.check_fuse(backend, dtype, logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_masks_the_pixel_out_gets_finite_gradients(backend):
    image, flow = torch.rand(1, 3, 4, 5, requires_grad=True), torch.zeros(1, 2, 4, 5)
    flow[0, 0, 1, 2] = torch.nan
    flow.requires_grad_()
    warped = safnet_ops.backward_warp(image, flow, backend=backend)
    torch.where(warped.isnan(), 0, warped).sum().backward()
    assert image.grad.isfinite().all()
    assert flow.grad.isfinite().all()
    assert not image.grad[0, :, 1, 2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_agrees(backend):
    image, flow = torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 4, 5)
    flow[0, 1, 1, 2] = torch.nan
    warped, tangent = torch.func.jvp(
        lambda *x: safnet_ops.backward_warp(*x, backend=backend), (image, flow), (image, torch.ones_like(flow))
    )
    assert warped[0, :, 1, 2].isnan().all()
    assert not tangent[0, :, 1, 2].any()
    assert tangent.isfinite().all()
