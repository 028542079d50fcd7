"""Speed of fuse_frames for five exposures by the hat function, beside the same with grid_sample; forward and with gradients."""

import pytest
import torch

import safnet_ops
from bench.baselines import grid_sample_warp
from bench.inputs import smooth_flow

FRAMES = 4  # beside the reference


def stock(reference, frames, flows, masks, ldr):
    base, *outer = (1 - (2 * value - 1) ** 12 for value in (ldr[0], *map(grid_sample_warp, ldr[1:], flows)))
    given = [weight * mask for weight, mask in zip(outer, masks, strict=True)]
    own = base.clamp(min=1e-4) + sum(weight - part for weight, part in zip(outer, given, strict=True))
    warped = map(grid_sample_warp, frames, flows)
    total = own * reference + sum(part * frame for part, frame in zip(given, warped, strict=True))
    return total / (own + sum(given))


def ours(reference, frames, flows, masks, ldr):
    return safnet_ops.fuse_frames(reference, frames, flows, masks, ldr=ldr, table="hat")


WAYS = {"ours": ours, "stock": stock}


def inputs(height, width):
    torch.manual_seed(0)
    images = [torch.rand(1, 3, height, width) for _ in range(2 * FRAMES + 2)]
    flows = [smooth_flow(height, width) for _ in range(FRAMES)]
    masks = [torch.rand(1, 1, height, width) for _ in range(FRAMES)]
    return images[0], images[1 : FRAMES + 1], flows, masks, images[FRAMES + 1 :]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("height", "width", "direction"), [(1000, 1500, "forward"), (512, 512, "both")])
def test_speed(benchmark, height, width, direction, way):
    reference, frames, flows, masks, ldr = inputs(height, width)
    learned = [value.requires_grad_(direction == "both") for value in (*flows, *masks)]

    def run():
        fused = WAYS[way](reference, frames, flows, masks, ldr)
        if direction == "both":
            torch.autograd.grad(fused.sum(), learned)
        return fused

    # A grid over the whole picture rounds positions by 1e-4 of a pixel.
    assert (run() - stock(reference, frames, flows, masks, ldr)).abs().max() < 1e-2
    benchmark.group = f"fuse_frames {FRAMES + 1} exposures {height}x{width} {direction}"
    benchmark.pedantic(run, rounds=7, warmup_rounds=1)
