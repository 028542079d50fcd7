"""upsample_fuse in Triton: each program resizes flows and masks for its pixels, stores them, and fuses right away.

The low-resolution fields are read through the caches, four neighbours a pixel; nothing of full size is read back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from safnet_ops.checks import empty_image
from safnet_ops.triton.fusion import fuse, triangle_weights
from safnet_ops.triton.launching import (
    accumulator,
    arguments,
    autotune,
    channel_block,
    compute_type,
    jit,
    launch,
    needs_wide,
    size_class,
)
from safnet_ops.triton.sampling import move_pixel, sample
from safnet_ops.triton.tiles import load_tile, over_channels, over_pixels, pixel_block, store_tile

CONFIGS = [triton.Config({"BLOCK": 128}, num_warps=4), triton.Config({"BLOCK": 64}, num_warps=2)]  # as for fused_fuse


@triton.jit
def _ratio(numerator, denominator, ACC: tl.constexpr):
    """A correctly rounded quotient of two sizes: `/` alone is two bits short in float32, and coordinates are
    multiplied by it."""
    if tl.float32 == ACC:
        return tl.div_rn(numerator.to(ACC), denominator.to(ACC))
    else:
        return numerator.to(ACC) / denominator.to(ACC)


@triton.jit
def _source(position, size, full_size, ACC: tl.constexpr):
    """(lower neighbour, upper neighbour, fraction) in a low-resolution field: interpolate with align_corners False."""
    at = tl.maximum((position.to(ACC) + 0.5) * _ratio(size, full_size, ACC) - 0.5, 0.0)
    lower = tl.minimum(at.to(tl.int32), size - 1)
    return lower.to(position.dtype), tl.minimum(lower + 1, size - 1).to(position.dtype), at - lower.to(ACC)


@jit
def _forward(
    short,
    reference,
    long,
    flow_short,
    flow_long,
    mask_short,
    mask_long,
    reference_ldr,
    out,
    full_flow_short,
    full_flow_long,
    full_mask_short,
    full_mask_long,
    strides,
    channels,
    height,
    width,
    low_height,
    low_width,
    scale_class,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, y, x, valid = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    left, right, fraction_x = _source(x, low_width, width, ACC)
    top, bottom, fraction_y = _source(y, low_height, height, ACC)
    point = (top, bottom, left, right, fraction_x, fraction_y)
    ratio_x, ratio_y = _ratio(width, low_width, ACC), _ratio(height, low_height, ACC)
    x_short = sample(flow_short, strides.flow_short, n, 0, point, valid, 1, ACC) * ratio_x
    y_short = sample(flow_short, strides.flow_short, n, 1, point, valid, 1, ACC) * ratio_y
    x_long = sample(flow_long, strides.flow_long, n, 0, point, valid, 1, ACC) * ratio_x
    y_long = sample(flow_long, strides.flow_long, n, 1, point, valid, 1, ACC) * ratio_y
    pixel_mask_short = tl.sigmoid(sample(mask_short, strides.mask_short, n, 0, point, valid, 1, ACC))
    pixel_mask_long = tl.sigmoid(sample(mask_long, strides.mask_long, n, 0, point, valid, 1, ACC))
    # Both flows are laid out alike, and both masks: one offset serves two stores.
    store_tile(full_flow_short, strides.full_flow_short, n, 0, y, x, x_short, valid)
    store_tile(full_flow_short, strides.full_flow_short, n, 1, y, x, y_short, valid)
    store_tile(full_flow_long, strides.full_flow_short, n, 0, y, x, x_long, valid)
    store_tile(full_flow_long, strides.full_flow_short, n, 1, y, x, y_long, valid)
    store_tile(full_mask_short, strides.full_mask_short, n, 0, y, x, pixel_mask_short, valid)
    store_tile(full_mask_long, strides.full_mask_short, n, 0, y, x, pixel_mask_long, valid)

    to_short, _ = move_pixel(x_short, y_short, y, x, height, width, False, ACC)
    to_long, _ = move_pixel(x_long, y_long, y, x, height, width, False, ACC)
    m_short, m_long = over_channels(pixel_mask_short, False), over_channels(pixel_mask_long, False)
    valid = over_channels(valid, False)
    y, x = over_channels(y, False), over_channels(x, False)
    for first in range(0, channels, BLOCK_C):
        c = over_pixels(first + tl.arange(0, BLOCK_C), False).to(n.dtype)
        mask = valid & (c < channels)
        v_short = sample(short, strides.short, n, c, to_short, mask, 1, ACC)
        v_long = sample(long, strides.long, n, c, to_long, mask, 1, ACC)
        v_reference = load_tile(reference, strides.reference, n, c, y, x, mask, ACC)
        z = load_tile(reference_ldr, strides.reference_ldr, n, c, y, x, mask, ACC)
        base_short, base_reference, base_long = triangle_weights(z)
        fused = fuse(v_short, v_reference, v_long, base_short, base_reference, base_long, m_short, m_long)
        store_tile(out, strides.out, n, c, y, x, fused, mask)


_tuned = autotune(_forward, CONFIGS, ["scale_class"])


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
    n, channels, height, width = short.shape
    out = empty_image(short)
    full_flow_short, full_flow_long, full_mask_short, full_mask_long = (
        torch.empty((n, size, height, width), dtype=compute_type(short), device=short.device) for size in (2, 2, 1, 1)
    )
    if n * height * width > 0:
        tensors = {
            "short": short,
            "reference": reference,
            "long": long,
            "flow_short": flow_short,
            "flow_long": flow_long,
            "mask_short": mask_short,
            "mask_long": mask_long,
            "reference_ldr": reference_ldr,
            "out": out,
            "full_flow_short": full_flow_short,
            "full_flow_long": full_flow_long,
            "full_mask_short": full_mask_short,
            "full_mask_long": full_mask_long,
        }
        launch(
            "upsample_fuse",
            short.device,
            _tuned,
            lambda meta: (n * triton.cdiv(height * width, meta["BLOCK"]),),
            **arguments(**tensors),
            channels=channels,
            height=height,
            width=width,
            low_height=flow_short.shape[2],
            low_width=flow_short.shape[3],
            scale_class=size_class(n * height * width),
            ACC=accumulator(short),
            WIDE=needs_wide(*tensors.values()),
            BLOCK_C=channel_block(channels, False),
        )
    return out, full_flow_short, full_flow_long, full_mask_short, full_mask_long
