"""NaN flows and masks in the backward of the Triton kernels, on the simulator."""

import pytest
import torch

from tests.support import lost_pixels


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def order(request):
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("channels", "channels_last"), [(3, False), (8, False), (40, True)])
def test_warp(simulated, order, channels, channels_last):
    lost_pixels.check_warp("triton", channels=channels, channels_last=channels_last)


@pytest.mark.parametrize("logits", [False, True])
def test_fuse(simulated, order, logits):
    lost_pixels.check_fuse("triton", logits=logits)


def test_fuse_in_half_precision(simulated):
    lost_pixels.check_fuse("triton", torch.float16)
