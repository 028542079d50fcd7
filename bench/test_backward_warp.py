"""Speed of backward_warp: features of the decoder and colour pictures."""

import pytest
import torch

import safnet_ops
from bench.baselines import grid_sample_warp
from bench.inputs import smooth_flow
from safnet_ops import reference

CASES = [(40, 500, 752), (3, 1000, 1500)]


def prepare(case, channels_last, backward):
    channels, height, width = case
    image, flow = torch.randn(1, channels, height, width), smooth_flow(height, width)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    if backward:
        image.requires_grad_()
        flow.requires_grad_()
    layout = "channels_last" if channels_last else "contiguous"
    return (image, flow), f"backward_warp {channels}x{height}x{width} {layout} {'both' if backward else 'forward'}"


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backend(compare, backend, case, channels_last, backward):
    inputs, group = prepare(case, channels_last, backward)
    compare(group, safnet_ops.backward_warp, inputs, reference.backward_warp, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_grid_sample(compare, case, channels_last, backward):
    inputs, group = prepare(case, channels_last, backward)
    compare(group, grid_sample_warp, inputs, reference.backward_warp, backward)
