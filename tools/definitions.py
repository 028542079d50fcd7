"""The operators by PyTorch's own functions, apart from safnet_ops: what `tools.features` compares every backend with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

REC601 = (0.2989, 0.587, 0.114)


def warp(image: Tensor, flow: Tensor, padding: str = "border") -> Tensor:
    n, (height, width) = max(len(image), len(flow)), flow.shape[2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    last = torch.tensor(image.shape[:1:-1]) - 1
    grid = 2 * (flow.permute(0, 2, 3, 1) + torch.stack([x, y], -1)) / last - 1
    pictures, grids = image.expand(n, -1, -1, -1), grid.expand(n, -1, -1, -1)
    return F.grid_sample(pictures, grids, padding_mode=padding, align_corners=True)


def is_inside(image: Tensor, flow: Tensor) -> Tensor:
    """The validity that `backward_warp` returns: whether a picture of ones, sampled with zeros around it, is one there."""
    return warp(torch.ones_like(image[:, :1]), flow, "zeros") > 1 - 1e-9


def triangles(ldr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Base weights of the short, the reference and the long exposure."""
    return (2 * ldr - 1).relu(), 1 - (2 * ldr - 1).abs(), (1 - 2 * ldr).relu()


def merge(
    reference: Tensor,
    frames: Sequence[Tensor],
    flows: Sequence[Tensor],
    masks: Sequence[Tensor],
    base: Sequence[Tensor],
) -> Tensor:
    """The mean of the reference and the warped frames; what a mask takes from a frame's base weight the reference gets."""
    given = [weight * mask for weight, mask in zip(base[1:], masks, strict=True)]
    own = base[0] + sum(weight - part for weight, part in zip(base[1:], given, strict=True))
    warped = [warp(frame, flow) for frame, flow in zip(frames, flows, strict=True)]
    total = own * reference + sum(weight * frame for weight, frame in zip(given, warped, strict=True))
    return total / (own + sum(given) + 1e-9)


def fuse(*inputs: Tensor, mask_logits: bool = False) -> Tensor:
    """In the order of `fused_fuse`: either the reference's LDR value or the three base weights come last."""
    short, reference, long, flow_short, flow_long, *masks = inputs[:7]
    first, own, last = inputs[7:] if len(inputs) == 10 else triangles(inputs[7])
    masks = [mask.sigmoid() for mask in masks] if mask_logits else masks
    return merge(reference, [short, long], [flow_short, flow_long], masks, [own, first, last])


def upsample_and_fuse(*inputs: Tensor) -> tuple[Tensor, ...]:
    size, low = inputs[0].shape[2:], inputs[3].shape[2:]
    scale = torch.tensor([size[1] / low[1], size[0] / low[0]], dtype=inputs[3].dtype).view(1, 2, 1, 1)
    flow_short, flow_long, mask_short, mask_long = (
        F.interpolate(value, tuple(size), mode="bilinear", align_corners=False) for value in inputs[3:7]
    )
    full = (scale * flow_short, scale * flow_long, mask_short.sigmoid(), mask_long.sigmoid())
    return fuse(*inputs[:3], *full, *inputs[7:]), *full


def census(
    first: Tensor, second: Tensor, patch: int = 3, grey: Sequence[float] | None = None, border: int | None = None
) -> Tensor:
    """The distance of every pixel (N, 1, H, W)."""
    weights = torch.tensor(grey or [1 / first.shape[1]] * first.shape[1], dtype=first.dtype).view(1, -1, 1, 1)

    def transform(picture: Tensor) -> Tensor:
        plane = (picture * weights).sum(1, keepdim=True)
        difference = F.unfold(plane, patch, padding=patch // 2).unflatten(2, plane.shape[2:]) - plane
        return difference / (0.81 + difference.square()).sqrt()

    squared = (transform(first) - transform(second)).square()
    distance = (squared / (0.1 + squared)).mean(1, keepdim=True)
    frame = patch // 2 if border is None else border
    height, width = distance.shape[2:]
    return F.pad(distance[:, :, frame : height - frame, frame : width - frame], [frame] * 4)


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    residual: Tensor | None = None,
    groups: int = 1,
    stride: int = 1,
    dilation: int = 1,
    shuffle: bool = True,
    relu: bool = False,
) -> Tensor:
    sums = F.conv2d(input, weight, bias, stride, dilation * (weight.shape[2] // 2), dilation, groups)
    sums = sums if residual is None else sums + residual
    out = sums.relu() if relu else sums if slopes is None else F.prelu(sums, slopes)
    return out.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2) if shuffle else out
