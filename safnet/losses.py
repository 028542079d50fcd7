"""Training losses. Pictures are linear radiance (N, 3, H, W) in [0, 1] and are compared after the mu-law tone map."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

import safnet_ops
from safnet.model import Alignment
from safnet.radiance import tone_map

SHARPNESS = 0.1  # pixels: flow errors below this count little more than none
MOSTLY = 0.7  # a coarse cell trains the flow when this part of it is visible


def picture_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """L1 of the tone-mapped pictures."""
    return F.l1_loss(tone_map(prediction), tone_map(truth))


def census_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Census distance of the tone-mapped pictures: structure, whatever the local brightness."""
    return safnet_ops.census_loss(tone_map(prediction), tone_map(truth))


def flow_loss(levels: Sequence[Alignment], flow: Tensor, visible: Tensor) -> Tensor:
    """How far the flows of the decoder's levels are from the true flow, where the surface is visible in both frames.

    The end point error in pixels of the picture. Coarse levels are compared with their cells' mean flow and count half.

    Args:
        levels: alignments from coarse to fine, sides dividing those of the picture.
        flow: (N, 2, 2, H, W) pixels, to the short and to the long frame.
        visible: (N, 2, H, W) bool.
    """
    seen = visible.to(flow.dtype)
    total = flow.new_zeros(())
    for number, level in enumerate(levels, 1):
        height, width = level.flow_short.shape[2:]
        cell = flow.shape[3] // height, flow.shape[4] // width
        scale = level.flow_short.new_tensor([cell[1], cell[0]]).view(1, 2, 1, 1)
        weight = 1.0 if number == len(levels) else 0.5
        for frame, estimate in enumerate((level.flow_short, level.flow_long)):
            part = F.avg_pool2d(seen[:, frame : frame + 1], cell)
            mean = F.avg_pool2d(flow[:, frame] * seen[:, frame : frame + 1], cell) / part.clamp(min=1e-3)
            error = ((estimate * scale - mean).square().sum(1, keepdim=True) + SHARPNESS**2).sqrt()
            total = total + weight * (error * (part > MOSTLY)).mean()
    return total
