"""The operators as they are usually written with PyTorch's own: what a user has without this library.

The reference samples by exact integer gathers, which are slower than grid_sample, so ratios to it alone would flatter. For
group_conv_shuffle the reference is itself the library's convolution and needs no second baseline.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import safnet_ops
from safnet_ops.reference import CENSUS_KNEE, CENSUS_SOFTNESS, FUSION_EPSILON, resize_flow, triangle_weights


def grid_sample_warp(image: Tensor, flow: Tensor) -> Tensor:
    """Warp over an absolute grid, normalised to [-1, 1]."""
    height, width = image.shape[2:]
    x = torch.linspace(-1, 1, width) + flow[:, 0] * (2 / (width - 1))
    y = torch.linspace(-1, 1, height)[:, None] + flow[:, 1] * (2 / (height - 1))
    grid = torch.stack([x, y], -1).to(image.dtype)
    return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


def grid_sample_fuse(
    short: Tensor,
    reference: Tensor,
    long: Tensor,
    flow_short: Tensor,
    flow_long: Tensor,
    mask_short: Tensor,
    mask_long: Tensor,
    reference_ldr: Tensor,
) -> Tensor:
    """The explicit fusion over two such warps."""
    base_short, base_reference, base_long = triangle_weights(reference_ldr)
    weight_short, weight_long = base_short * mask_short, base_long * mask_long
    weight_reference = base_reference + base_short * (1 - mask_short) + base_long * (1 - mask_long)
    warped_short, warped_long = grid_sample_warp(short, flow_short), grid_sample_warp(long, flow_long)
    total = weight_short * warped_short + weight_reference * reference + weight_long * warped_long
    return total / (weight_short + weight_reference + weight_long + FUSION_EPSILON)


def grid_sample_upsample_fuse(
    short: Tensor,
    reference: Tensor,
    long: Tensor,
    flow_short: Tensor,
    flow_long: Tensor,
    mask_short: Tensor,
    mask_long: Tensor,
    reference_ldr: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Flows and masks resized by F.interpolate, then that fusion."""
    height, width = short.shape[2:]
    flows = [resize_flow(flow, height, width) for flow in (flow_short, flow_long)]
    masks = [
        F.interpolate(mask, (height, width), mode="bilinear", align_corners=False).sigmoid()
        for mask in (mask_short, mask_long)
    ]
    fused = grid_sample_fuse(short, reference, long, flows[0], flows[1], masks[0], masks[1], reference_ldr)
    return fused, flows[0], flows[1], masks[0], masks[1]


def conv_census(prediction: Tensor, target: Tensor, patch_size: int = 7) -> Tensor:
    """The census loss with patches taken by a convolution with one-hot kernels."""
    squared = (_conv_census_transform(prediction, patch_size) - _conv_census_transform(target, patch_size)).square()
    distance = (squared / (CENSUS_KNEE + squared)).mean(1)
    margin = patch_size // 2
    inside = F.pad(torch.ones_like(distance[:, margin:-margin, margin:-margin]), [margin] * 4)
    return (distance * inside).mean()


def _conv_census_transform(picture: Tensor, patch_size: int) -> Tensor:
    grey = picture.mean(1, keepdim=True)
    taps = torch.eye(patch_size**2, dtype=grey.dtype).view(-1, 1, patch_size, patch_size)
    difference = F.conv2d(grey, taps, padding=patch_size // 2) - grey
    return difference / (CENSUS_SOFTNESS + difference.square()).sqrt()


@contextlib.contextmanager
def stock_operators() -> Iterator[None]:
    """Models called in this block run on PyTorch's own operators: grid_sample, convolution, activation, shuffle."""

    def warp(image: Tensor, flow: Tensor, **_: Any) -> Tensor:
        return grid_sample_warp(image, flow)

    with (
        safnet_ops.use_backend("reference"),
        mock.patch.object(safnet_ops, "backward_warp", warp),
        mock.patch.object(safnet_ops, "upsample_fuse", grid_sample_upsample_fuse),
    ):
        yield
