"""Pure-PyTorch references: what every operator computes, written for reading rather than for speed.

All kernels are checked against these functions, and `backend="reference"` runs them. They work on any device and dtype, are
differentiable to any order, and state the numerics that the kernels must reproduce: half-precision images are sampled and
summed in float32 and rounded once, at the end; float64 stays float64.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CENSUS_SOFTNESS = 0.81  # added to d^2 before the root: how small a difference still counts as "equal"
CENSUS_KNEE = 0.1  # dn^2 at which the robust distance reaches one half
REC601 = (0.2989, 0.587, 0.114)  # luma of red, green and blue, as the census losses of others have it
FUSION_EPSILON = 1e-9  # keeps the fusion finite where explicit weights sum to zero


def compute_type(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def backward_warp(image: Tensor, flow: Tensor) -> Tensor:
    """Sample `image` (N, C, H, W) bilinearly at pixel + `flow` (N, 2, H, W; x then y, in pixels), clamped to the border.

    Equal to grid_sample(padding_mode="border", align_corners=True) on an absolute grid, without that grid's rounding error.
    NaN flow gives NaN, a constant that passes no gradient on; the gradient of a flow component is zero where it points out of
    the picture.
    """
    n, channels, height, width = image.shape
    kind = compute_type(image)
    lost = _is_lost(flow)
    x, y = flow.to(kind).masked_fill(lost, 0).unbind(1)
    x = _clamp_coordinate(x + torch.arange(width, device=x.device, dtype=kind), width - 1)
    y = _clamp_coordinate(y + torch.arange(height, device=y.device, dtype=kind)[:, None], height - 1)
    left, top = _cell_corner(x, width), _cell_corner(y, height)
    fraction_x, fraction_y = (x - left).unsqueeze(1), (y - top).unsqueeze(1)
    pixels = image.to(kind).flatten(2)

    def corner(dx: int, dy: int) -> Tensor:
        index = (top + dy).clamp(max=height - 1) * width + (left + dx).clamp(max=width - 1)
        return pixels.gather(2, index.flatten(1).unsqueeze(1).expand(-1, channels, -1)).view(n, channels, height, width)

    upper = corner(0, 0) * (1 - fraction_x) + corner(1, 0) * fraction_x
    lower = corner(0, 1) * (1 - fraction_x) + corner(1, 1) * fraction_x
    return (upper * (1 - fraction_y) + lower * fraction_y).masked_fill(lost, torch.nan).to(image.dtype)


def _is_lost(*geometry: Tensor) -> Tensor:
    """Where a channel of flows or masks is NaN: (N, 1, H, W)."""
    return torch.stack([values.isnan().any(1, keepdim=True) for values in geometry]).any(0)


def _clamp_coordinate(position: Tensor, last: int) -> Tensor:
    """Clamp to [0, last]; the gradient is one inside and on pixel centres, zero beyond the border."""
    inside = (position > 0) & (position < last)
    return torch.where(inside, position, position.detach().clamp(0, last))


def _cell_corner(position: Tensor, size: int) -> Tensor:
    """Index of the left or top corner of the cell that holds `position`."""
    return position.detach().floor().clamp(0, max(size - 1, 0)).long()


def triangle_weights(reference_ldr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of short, reference and long exposure from the reference's LDR value z in [0, 1]; they sum to one.

    L1 = max(z - 0.5, 0) / 0.5, L3 = max(0.5 - z, 0) / 0.5, L2 = 1 - |2z - 1| (SAFNet, section 3.3; Kalantari and
    Ramamoorthi 2017, figure 5).
    """
    short = (reference_ldr - 0.5).clamp(min=0) / 0.5
    long = (0.5 - reference_ldr).clamp(min=0) / 0.5
    return short, 1 - (2 * reference_ldr - 1).abs(), long


def fused_fuse(
    short: Tensor,
    reference: Tensor,
    long: Tensor,
    flow_short: Tensor,
    flow_long: Tensor,
    mask_short: Tensor,
    mask_long: Tensor,
    reference_ldr: Tensor | None = None,
    *,
    weights: tuple[Tensor, Tensor, Tensor] | None = None,
    mask_logits: bool = False,
) -> Tensor:
    """Warp short and long onto the reference and average the three with mask-reweighted weights (see safnet_ops.fused_fuse)."""
    kind = compute_type(short)
    lost = _is_lost(flow_short, flow_long, mask_short, mask_long)
    flow_short, flow_long = flow_short.masked_fill(lost, 0), flow_long.masked_fill(lost, 0)
    mask_short, mask_long = (mask.to(kind).masked_fill(lost, 0) for mask in (mask_short, mask_long))
    if mask_logits:
        mask_short, mask_long = mask_short.sigmoid(), mask_long.sigmoid()
    if weights is None:
        assert reference_ldr is not None
        weights = triangle_weights(reference_ldr.to(kind))
    base_short, base_reference, base_long = (weight.to(kind) for weight in weights)
    weight_short, weight_long = base_short * mask_short, base_long * mask_long
    weight_reference = base_reference + base_short * (1 - mask_short) + base_long * (1 - mask_long)
    warped_short = backward_warp(short.to(kind), flow_short)
    warped_long = backward_warp(long.to(kind), flow_long)
    total = weight_short * warped_short + weight_reference * reference.to(kind) + weight_long * warped_long
    fused = total / (weight_short + weight_reference + weight_long + FUSION_EPSILON)
    return fused.masked_fill(lost, torch.nan).to(short.dtype)


def resize_flow(flow: Tensor, height: int, width: int) -> Tensor:
    """Resize a flow field bilinearly (align_corners False) and rescale its x and y by the true ratios of the sides."""
    x, y = F.interpolate(flow, (height, width), mode="bilinear", align_corners=False).unbind(1)
    return torch.stack([x * (width / flow.shape[3]), y * (height / flow.shape[2])], 1)


def upsample_alignment(low: Sequence[Tensor], image: Tensor) -> list[Tensor]:
    """Two flows (N, 2, h, w) in pixels and two mask logits (N, 1, h, w) as flows and masks in [0, 1] of the image's size."""
    size = image.shape[2:]
    flow_short, flow_long, *logits = (value.to(compute_type(image)) for value in low)
    masks = [F.interpolate(mask, size, mode="bilinear", align_corners=False).sigmoid() for mask in logits]
    return [resize_flow(flow_short, *size), resize_flow(flow_long, *size), *masks]


def upsample_fuse(
    short: Tensor,
    reference: Tensor,
    long: Tensor,
    flow_short: Tensor,
    flow_long: Tensor,
    mask_short: Tensor,
    mask_long: Tensor,
    reference_ldr: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Resize low-resolution flows and mask logits, apply the sigmoid, fuse; returns (fused, flows, masks) at full size."""
    full = upsample_alignment((flow_short, flow_long, mask_short, mask_long), short)
    flow_short, flow_long, mask_short, mask_long = full
    fused = fused_fuse(short, reference, long, flow_short, flow_long, mask_short, mask_long, reference_ldr)
    return fused, flow_short, flow_long, mask_short, mask_long


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """(N, g * k, H, W) -> (N, k * g, H, W): channel i * k + j moves to j * g + i (ShuffleNet, section 3.1)."""
    n, channels, height, width = x.shape
    return x.view(n, groups, channels // groups, height, width).transpose(1, 2).reshape(n, channels, height, width)


def group_conv_shuffle(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    prelu_weight: Tensor | None = None,
    groups: int = 1,
    *,
    stride: int = 1,
    dilation: int = 1,
    residual: Tensor | None = None,
    activation: str | None = None,
    shuffle: bool = True,
) -> Tensor:
    """channel_shuffle(prelu(conv(input) + residual)), zero padding to the input's size (see safnet_ops.group_conv_shuffle)."""
    sums = group_conv(input, weight, bias, residual, groups, stride, dilation)
    sums = sums.relu() if activation == "relu" else sums
    return activate_and_shuffle(sums, prelu_weight, groups if shuffle else 1)


def group_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    groups: int,
    stride: int,
    dilation: int,
) -> Tensor:
    """conv(input) + residual, padded to the input's size: what PReLU and shuffle come after."""
    padding = dilation * (int(weight.shape[2]) // 2)  # a number even where sizes are symbols
    out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return out if residual is None else out + residual


def activate_and_shuffle(sums: Tensor, prelu_weight: Tensor | None, groups: int) -> Tensor:
    """channel_shuffle(prelu(sums), groups)."""
    return channel_shuffle(sums if prelu_weight is None else F.prelu(sums, prelu_weight), groups)


def census_loss(prediction: Tensor, target: Tensor, patch_size: int = 7) -> Tensor:
    """Soft census (ternary) distance of two pictures, as a scalar (see safnet_ops.census_loss)."""
    return census_distance(prediction, target, patch_size, patch_size // 2).mean()


def census_distance(prediction: Tensor, target: Tensor, patch_size: int, border: int) -> Tensor:
    """The distance at every pixel, (N, 1, H, W), zero in a frame `border` wide; windows read zeros outside the pictures."""
    kind = compute_type(prediction)
    difference = _census_transform(prediction.to(kind), patch_size) - _census_transform(target.to(kind), patch_size)
    squared = difference.square()
    distance = (squared / (CENSUS_KNEE + squared)).mean(1, keepdim=True)
    height, width = distance.shape[2:]
    inside = F.pad(distance.new_ones(max(height - 2 * border, 0), max(width - 2 * border, 0)), [border] * 4)
    return distance * inside[:height, :width]


def grey_rec601(picture: Tensor) -> Tensor:
    """Luma of RGB pictures (N, 3, H, W) by Rec. 601: (N, 1, H, W)."""
    kind = compute_type(picture)
    return (picture.to(kind) * torch.tensor(REC601, dtype=kind, device=picture.device).view(3, 1, 1)).sum(
        1, keepdim=True
    )


def _census_transform(picture: Tensor, patch_size: int) -> Tensor:
    """Normalised differences of every pixel's grey value to its patch_size^2 neighbours: (N, patch_size^2, H, W)."""
    grey = picture.mean(1, keepdim=True)
    patches = F.unfold(grey, patch_size, padding=patch_size // 2)
    difference = patches.view(len(grey), patch_size**2, *grey.shape[2:]) - grey
    return difference / (CENSUS_SOFTNESS + difference.square()).sqrt()
