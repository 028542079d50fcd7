"""Training losses. Pictures are linear radiance (N, 3, H, W) in [0, 1] and are compared after the mu-law tone map."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import safnet_ops
from safnet.model import Alignment
from safnet.radiance import tone_map

SHARPNESS = 0.1  # pixels: flow errors below this count little more than none
SOFTNESS = 4.0  # pixels: beyond, flow errors count by their logarithm, so that what cannot be found does not rule
COARSE = 0.4  # weight of each level but the last
MOSTLY = 0.7  # a coarse cell trains the flow when this part of it is visible
LINEAR = 0.4  # weight of linear radiance beside what is tone-mapped


def picture_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """L1 of the tone-mapped pictures."""
    return F.l1_loss(tone_map(prediction), tone_map(truth))


def census_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Census distance of the tone-mapped pictures: structure, whatever the local brightness."""
    return safnet_ops.census_loss(tone_map(prediction), tone_map(truth))


def psnr_loss(prediction: Tensor, truth: Tensor) -> Tensor:
    """Logarithm of each picture's squared error, tone-mapped and linear: what PSNR-mu and PSNR-l measure."""

    def logarithm(one: Tensor, other: Tensor, no_error: float) -> Tensor:
        return ((one - other).square().mean((1, 2, 3)) + no_error).log().mean()

    mapped = logarithm(tone_map(prediction), tone_map(truth), 1e-5)
    return mapped + LINEAR * logarithm(prediction, truth, 1e-6)


def flow_loss(levels: Sequence[Alignment], flow: Tensor, visible: Tensor) -> Tensor:
    """How far the flows of the decoder's levels are from the true flow, where the surface is visible in both frames.

    SOFTNESS * log(1 + e / SOFTNESS) of the end point error e in pixels of the picture, in the mean of what each picture shows.
    Coarse levels are compared with their cells' mean flow and count less.

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
        weight = 1.0 if number == len(levels) else COARSE
        for frame, estimate in enumerate((level.flow_short, level.flow_long)):
            part = F.avg_pool2d(seen[:, frame : frame + 1], cell)
            mean = F.avg_pool2d(flow[:, frame] * seen[:, frame : frame + 1], cell) / part.clamp(min=1e-3)
            error = ((estimate * scale - mean).square().sum(1, keepdim=True) + SHARPNESS**2).sqrt()
            counts = part > MOSTLY
            soft = SOFTNESS * torch.log1p(error / SOFTNESS)
            total = total + weight * ((soft * counts).sum((1, 2, 3)) / counts.sum((1, 2, 3)).clamp(min=1)).mean()
    return total
