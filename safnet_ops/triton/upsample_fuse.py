"""upsample_fuse in Triton: each program resizes flows and masks for its pixels, stores them, and fuses right away.

The low-resolution fields are read through the caches, four neighbours a pixel; nothing of full size is read back.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from safnet_ops.checks import empty_image
from safnet_ops.triton.common import (
    accumulator,
    channel_block,
    compute_type,
    interpolate,
    jit,
    launch,
    load_corners,
    needs_wide,
    offset,
    over_channels,
    over_pixels,
    pixel_block,
    place_corners,
    size_class,
    stride,
    with_strides,
)
from safnet_ops.triton.fusion import fuse, triangle_weights

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


@triton.jit
def _resize(
    field, strides, n, channel: tl.constexpr, top, bottom, left, right, fraction_x, fraction_y, valid, ACC: tl.constexpr
):
    at = n * stride(strides, 0) + channel * stride(strides, 1)
    v00, v01, v10, v11 = load_corners(field, at, top, bottom, left, right, strides, valid, 1, ACC)
    return interpolate(v00, v01, v10, v11, fraction_x, fraction_y)


@jit
def _forward(
    short,
    short_strides,
    reference,
    reference_strides,
    long,
    long_strides,
    flow_short,
    flow_short_strides,
    flow_long,
    flow_long_strides,
    mask_short,
    mask_short_strides,
    mask_long,
    mask_long_strides,
    reference_ldr,
    reference_ldr_strides,
    out,
    out_strides,
    full_flow_short,
    full_flow_long,
    full_flow_strides,
    full_mask_short,
    full_mask_long,
    full_mask_strides,
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
    left, right, fx = _source(x, low_width, width, ACC)
    top, bottom, fy = _source(y, low_height, height, ACC)
    ratio_x, ratio_y = _ratio(width, low_width, ACC), _ratio(height, low_height, ACC)
    x_s = _resize(flow_short, flow_short_strides, n, 0, top, bottom, left, right, fx, fy, valid, ACC) * ratio_x
    y_s = _resize(flow_short, flow_short_strides, n, 1, top, bottom, left, right, fx, fy, valid, ACC) * ratio_y
    x_l = _resize(flow_long, flow_long_strides, n, 0, top, bottom, left, right, fx, fy, valid, ACC) * ratio_x
    y_l = _resize(flow_long, flow_long_strides, n, 1, top, bottom, left, right, fx, fy, valid, ACC) * ratio_y
    mask_s = tl.sigmoid(_resize(mask_short, mask_short_strides, n, 0, top, bottom, left, right, fx, fy, valid, ACC))
    mask_l = tl.sigmoid(_resize(mask_long, mask_long_strides, n, 0, top, bottom, left, right, fx, fy, valid, ACC))
    tl.store(full_flow_short + offset(n, 0, y, x, full_flow_strides), x_s, mask=valid)
    tl.store(full_flow_short + offset(n, 1, y, x, full_flow_strides), y_s, mask=valid)
    tl.store(full_flow_long + offset(n, 0, y, x, full_flow_strides), x_l, mask=valid)
    tl.store(full_flow_long + offset(n, 1, y, x, full_flow_strides), y_l, mask=valid)
    tl.store(full_mask_short + offset(n, 0, y, x, full_mask_strides), mask_s, mask=valid)
    tl.store(full_mask_long + offset(n, 0, y, x, full_mask_strides), mask_l, mask=valid)

    top_s, bottom_s, left_s, right_s, fx_s, fy_s, _, _ = place_corners(x_s, y_s, y, x, height, width, False, ACC)
    top_l, bottom_l, left_l, right_l, fx_l, fy_l, _, _ = place_corners(x_l, y_l, y, x, height, width, False, ACC)
    trust_s, trust_l = over_channels(mask_s, False), over_channels(mask_l, False)
    valid = over_channels(valid, False)
    y, x = over_channels(y, False), over_channels(x, False)
    for first in range(0, channels, BLOCK_C):
        c = over_pixels(first + tl.arange(0, BLOCK_C), False).to(n.dtype)
        mask = valid & (c < channels)
        at = n * stride(short_strides, 0) + c * stride(short_strides, 1)
        v00, v01, v10, v11 = load_corners(short, at, top_s, bottom_s, left_s, right_s, short_strides, mask, 1, ACC)
        warped_short = interpolate(v00, v01, v10, v11, fx_s, fy_s)
        at = n * stride(long_strides, 0) + c * stride(long_strides, 1)
        v00, v01, v10, v11 = load_corners(long, at, top_l, bottom_l, left_l, right_l, long_strides, mask, 1, ACC)
        warped_long = interpolate(v00, v01, v10, v11, fx_l, fy_l)
        still = tl.load(reference + offset(n, c, y, x, reference_strides), mask=mask, other=0.0).to(ACC)
        z = tl.load(reference_ldr + offset(n, c, y, x, reference_ldr_strides), mask=mask, other=0.0).to(ACC)
        base_s, base_r, base_l = triangle_weights(z)
        fused = fuse(warped_short, still, warped_long, base_s, base_r, base_l, trust_s, trust_l)
        tl.store(out + offset(n, c, y, x, out_strides), fused.to(out.dtype.element_ty), mask=mask)


_tuned = triton.autotune(CONFIGS, ["scale_class"])(_forward)


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
    kind = compute_type(short)
    out = empty_image(short)
    flows = [torch.empty((n, 2, height, width), dtype=kind, device=short.device) for _ in range(2)]
    masks = [torch.empty((n, 1, height, width), dtype=kind, device=short.device) for _ in range(2)]
    if flows[0].numel() > 0:
        inputs = (short, reference, long, flow_short, flow_long, mask_short, mask_long, reference_ldr, out)
        launch(
            "upsample_fuse",
            short.device,
            _tuned,
            lambda meta: (n * triton.cdiv(height * width, meta["BLOCK"]),),
            *with_strides(*inputs),
            *(*flows, with_strides(flows[0])[1], *masks, with_strides(masks[0])[1]),
            *(channels, height, width, *flow_short.shape[2:]),
            size_class(n * height * width),
            ACC=accumulator(short),
            WIDE=needs_wide(*inputs, *flows),
            BLOCK_C=channel_block(channels, False),
        )
    return out, flows[0], flows[1], masks[0], masks[1]
