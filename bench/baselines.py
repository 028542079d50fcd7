"""Warp and fusion as they are written with PyTorch's own grid_sample: the fastest stock formulation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from safnet_ops.reference import FUSION_EPSILON, triangle_weights


def grid_sample_warp(image: Tensor, flow: Tensor) -> Tensor:
    """Warp over an absolute grid, normalised to [-1, 1]."""
    height, width = image.shape[2:]
    x = torch.linspace(-1, 1, width) + flow[:, 0] * (2 / (width - 1))
    y = torch.linspace(-1, 1, height)[:, None] + flow[:, 1] * (2 / (height - 1))
    return F.grid_sample(image, torch.stack([x, y], -1), padding_mode="border", align_corners=True)


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
