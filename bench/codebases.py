"""Operations as code for optical flow usually has them, written anew from their formulas: what a drop-in of ours replaces."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)


@functools.cache
def _unit_grid(height: int, width: int) -> Tensor:
    """(1, H, W, 2): x and y from -1 to 1, kept for the next call as RIFE and IFRNet do."""
    x, y = torch.linspace(-1, 1, width), torch.linspace(-1, 1, height)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]


def interpolation_warp(image: Tensor, flow: Tensor) -> Tensor:
    """RIFE's and IFRNet's kind: a cached grid, to which the flow is added in units of half the picture; border."""
    height, width = image.shape[2:]
    unit = torch.tensor([2 / (width - 1), 2 / (height - 1)], dtype=flow.dtype)
    grid = _unit_grid(height, width) + flow.permute(0, 2, 3, 1) * unit
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def masked_warp(image: Tensor, flow: Tensor) -> Tensor:
    """PWC-Net's kind, with align_corners=True: zeros outside, and zero where a warped picture of ones is below 0.9999."""
    n, _, height, width = image.shape
    rows = torch.arange(height, dtype=flow.dtype).view(1, 1, -1, 1).expand(n, 1, height, width)
    columns = torch.arange(width, dtype=flow.dtype).view(1, 1, 1, -1).expand(n, 1, height, width)
    position = torch.cat([columns, rows], 1) + flow
    x, y = 2 * position[:, 0] / max(width - 1, 1) - 1, 2 * position[:, 1] / max(height - 1, 1) - 1
    grid = torch.stack([x, y], 3)
    warped = F.grid_sample(image, grid, align_corners=True)
    covered = F.grid_sample(torch.ones_like(image), grid, align_corners=True)
    return warped * (covered >= 0.9999).to(image.dtype)


def _ternary(grey: Tensor, patch: int) -> Tensor:
    """Normalised differences to the neighbours, which a convolution of one-hot kernels moves to the pixel."""
    taps = torch.eye(patch * patch, dtype=grey.dtype).view(patch * patch, 1, patch, patch)
    difference = F.conv2d(grey, taps, padding=patch // 2) - grey
    return difference / torch.sqrt(0.81 + difference.square())


def _frame(grey: Tensor, width: int) -> Tensor:
    inner = torch.ones_like(grey[:, :, width:-width, width:-width])
    return F.pad(inner, [width] * 4)


def _distance(first: Tensor, second: Tensor, patch: int) -> Tensor:
    squared = (_ternary(first, patch) - _ternary(second, patch)).square()
    return (squared / (0.1 + squared)).mean(1, keepdim=True)


def ternary_loss(first: Tensor, second: Tensor) -> Tensor:
    """IFRNet's kind: grey by the mean, windows of 7, the mean over all pixels."""
    greys = first.mean(1, keepdim=True), second.mean(1, keepdim=True)
    return (_distance(*greys, 7) * _frame(greys[0], 3)).mean()


def ternary_map(first: Tensor, second: Tensor) -> Tensor:
    """RIFE's kind: grey by luma, windows of 7, a picture of distances whose outermost pixels are zero."""
    greys = _luma(first), _luma(second)
    return _distance(*greys, 7) * _frame(greys[0], 1)


def occlusion_census(first: Tensor, second: Tensor, visible: Tensor) -> Tensor:
    """UnFlow's and ARFlow's kind: grey by luma from 0 to 255, windows of 3, the mean over pixels that are visible."""
    greys = 255 * _luma(first), 255 * _luma(second)
    return (_distance(*greys, 3) * _frame(greys[0], 1) * visible).sum() / visible.sum()


def _luma(picture: Tensor) -> Tensor:
    red, green, blue = picture.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
