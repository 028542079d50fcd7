"""backward_warp in Triton: one program gathers the four corners of a block of pixels for a run of channels.

Backward scatters with atomics; the deterministic variant adds integers instead (`ImageGradient`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from safnet_ops.checks import empty_gradient, empty_image
from safnet_ops.operators import is_needed
from safnet_ops.triton.common import (
    accumulator,
    channel_block,
    channel_splits,
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
    sampling_point,
    scatter_corners,
    size_class,
    slopes,
    stride,
    strides,
    sum_channels,
    vector_length,
    vectors,
    with_strides,
)

# Planar: one pixel (of four channels) a thread. Gathers gain nothing from wider threads, whose lanes lie further
# apart in memory.
PLANAR = [triton.Config({"TILE": 128}, num_warps=4), triton.Config({"TILE": 64}, num_warps=2)]
# Channels dense and aligned: four of one pixel a thread, 16 bytes of float32. Eight would spill.
INTERLEAVED = [triton.Config({"TILE": 512}, num_warps=4), triton.Config({"TILE": 256}, num_warps=2)]
KEY = ["scale_class", "BLOCK_C", "VECTOR"]


@jit
def _forward(
    image,
    image_strides,
    flow,
    flow_strides,
    out,
    out_strides,
    channels,
    height,
    width,
    channel_blocks,
    scale_class,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK: tl.constexpr = TILE // BLOCK_C if CHANNELS_LAST else TILE
    n, y, x, valid = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    top, bottom, left, right, fraction_x, fraction_y, _, _ = sampling_point(
        flow, flow_strides, n, y, x, valid, height, width, CHANNELS_LAST, ACC
    )
    target = out + over_channels(offset(n, 0, y, x, out_strides), CHANNELS_LAST)
    valid = over_channels(valid, CHANNELS_LAST)
    first = tl.program_id(1) * channel_blocks * BLOCK_C
    end = tl.minimum(first + channel_blocks * BLOCK_C, channels // VECTOR * VECTOR)
    for block in range(first, end, BLOCK_C):
        c = over_pixels(block + tl.arange(0, BLOCK_C), CHANNELS_LAST).to(n.dtype)
        mask = valid & (c < end)
        at = n * stride(image_strides, 0) + c * stride(image_strides, 1)
        v00, v01, v10, v11 = load_corners(image, at, top, bottom, left, right, image_strides, mask, VECTOR, ACC)
        value = interpolate(v00, v01, v10, v11, fraction_x, fraction_y)
        tl.store(vectors(target, c * stride(out_strides, 1), VECTOR), value.to(out.dtype.element_ty), mask=mask)


@jit
def _backward(
    grad,
    grad_strides,
    image,
    image_strides,
    flow,
    flow_strides,
    image_sums,
    image_exact,
    sums_strides,
    scale,
    flow_grad,
    flow_grad_strides,
    channels,
    height,
    width,
    channel_blocks,
    scale_class,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NEED_IMAGE: tl.constexpr,
    NEED_FLOW: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK: tl.constexpr = TILE // BLOCK_C if CHANNELS_LAST else TILE
    n, y, x, valid_pixel = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    top, bottom, left, right, fraction_x, fraction_y, inside_x, inside_y = sampling_point(
        flow, flow_strides, n, y, x, valid_pixel, height, width, CHANNELS_LAST, ACC
    )
    source = grad + over_channels(offset(n, 0, y, x, grad_strides), CHANNELS_LAST)
    valid = over_channels(valid_pixel, CHANNELS_LAST)
    quanta = tl.load(scale) if DETERMINISTIC else 0.0
    slope_x = tl.zeros([BLOCK], ACC)
    slope_y = tl.zeros([BLOCK], ACC)
    first = tl.program_id(1) * channel_blocks * BLOCK_C
    end = tl.minimum(first + channel_blocks * BLOCK_C, channels // VECTOR * VECTOR)
    for block in range(first, end, BLOCK_C):
        c = over_pixels(block + tl.arange(0, BLOCK_C), CHANNELS_LAST).to(n.dtype)
        mask = valid & (c < end)
        g = tl.load(source + c * stride(grad_strides, 1), mask=mask, other=0.0).to(ACC)
        if NEED_FLOW:
            at = n * stride(image_strides, 0) + c * stride(image_strides, 1)
            v00, v01, v10, v11 = load_corners(image, at, top, bottom, left, right, image_strides, mask, VECTOR, ACC)
            across, down = slopes(v00, v01, v10, v11, fraction_x, fraction_y)
            slope_x += sum_channels(tl.where(mask, g * across, 0.0), CHANNELS_LAST)
            slope_y += sum_channels(tl.where(mask, g * down, 0.0), CHANNELS_LAST)
        if NEED_IMAGE:
            at = n * stride(sums_strides, 0) + c * stride(sums_strides, 1)
            scatter_corners(
                *(
                    image_sums,
                    image_exact,
                    at,
                    top,
                    bottom,
                    left,
                    right,
                    fraction_x,
                    fraction_y,
                    sums_strides,
                    g,
                    quanta,
                    mask,
                ),
                DETERMINISTIC,
            )
    if NEED_FLOW:
        at = flow_grad + offset(n, 0, y, x, flow_grad_strides)
        kind: tl.constexpr = flow_grad.dtype.element_ty
        tl.store(at, tl.where(inside_x, slope_x, 0.0).to(kind), mask=valid_pixel)
        tl.store(at + stride(flow_grad_strides, 1), tl.where(inside_y, slope_y, 0.0).to(kind), mask=valid_pixel)


class ImageGradient:
    """Where a warp's image gradient is added up: in float32 (float64), or in integers where every bit must repeat.

    The integers count quanta of 2^-k. k is the largest with which no sum overflows 62 bits, even if all pixels of
    a picture hit one target, so a gradient is exact to about 2^-40 of the largest incoming one at a million pixels.
    """

    def __init__(self, image: Tensor, incoming: Tensor, deterministic: bool):
        self.image = image
        kind = compute_type(image)
        self.sums = empty_image(image, dtype=kind).zero_()
        self.exact = empty_image(image, dtype=torch.int64).zero_() if deterministic else None
        self.scale = self._scale(incoming) if deterministic else None

    def _scale(self, incoming: Tensor) -> Tensor:
        """2^k, as a tensor: reading it here would wait for the device."""
        largest = torch.nan_to_num(incoming, 0.0, 0.0, 0.0).to(torch.float64).abs().amax()
        exponent = torch.frexp(largest).exponent
        bits = 61 - max(incoming.shape[2] * incoming.shape[3], 2).bit_length()
        return torch.ldexp(torch.ones_like(largest), (bits - exponent).clamp(max=1000))

    def result(self) -> Tensor:
        if self.exact is not None and self.scale is not None:
            self.sums += (self.exact.to(torch.float64) / self.scale).to(self.sums.dtype)
        return self.sums.to(self.image.dtype)


_configs = {False: PLANAR, True: INTERLEAVED}
_tuned_forward = {last: triton.autotune(configs, KEY)(_forward) for last, configs in _configs.items()}
# Tuning runs a kernel many times: what it adds to is zeroed before each run, the last one included.
_tuned_backward = {
    last: triton.autotune(configs, [*KEY, "NEED_IMAGE", "NEED_FLOW"], reset_to_zero=["image_sums", "image_exact"])(
        _backward
    )
    for last, configs in _configs.items()
}


def _tiling(image: Tensor, tensors: tuple[Tensor, ...], *, split: bool) -> tuple[Any, dict[str, Any]]:
    """The launch grid, and the arguments that say how tiles cover the picture.

    Channels go along a tile where all `tensors` can be read in vectors of them; otherwise a thread keeps to its
    pixel, and channels that share a sector find it in L1.
    """
    n, channels, height, width = image.shape
    vector = vector_length(tensors)
    channels_last = vector > 1
    block_c = channel_block(channels, channels_last)
    tiles = n * triton.cdiv(height * width, 512 // block_c if channels_last else 128)
    splits, blocks = channel_splits(tiles, channels, block_c) if split else (1, triton.cdiv(channels, block_c))
    switches = {
        "channels": channels,
        "height": height,
        "width": width,
        "channel_blocks": blocks,
        "scale_class": size_class(n * height * width),
        "ACC": accumulator(image),
        "CHANNELS_LAST": channels_last,
        "VECTOR": vector,
        "BLOCK_C": block_c,
    }
    per_pixel = block_c if channels_last else 1
    return lambda meta: (n * triton.cdiv(height * width, meta["TILE"] // per_pixel), splits), switches


def backward_warp(image: Tensor, flow: Tensor) -> Tensor:
    out = empty_image(image)
    if out.numel() == 0:
        return out
    grid, switches = _tiling(image, (image, out), split=True)
    tensors = (image, flow, out)
    wide = needs_wide(*tensors)
    kernel = _tuned_forward[switches["CHANNELS_LAST"]]
    launch("backward_warp", image.device, kernel, grid, *with_strides(*tensors), **switches, WIDE=wide)
    return out


def backward_warp_backward(
    grad: Tensor, image: Tensor, flow: Tensor, needs: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    need_image, need_flow = is_needed(needs, 0), is_needed(needs, 1)
    flow_grad = empty_gradient(flow, need_flow)
    if image.numel() == 0 or not (need_image or need_flow):
        return empty_gradient(image, need_image), flow_grad.zero_()
    total = ImageGradient(image, grad, deterministic) if need_image else None
    backpropagate(grad, image, flow, total, flow_grad if need_flow else None)
    return total.result() if total is not None else empty_gradient(image, False), flow_grad


def backpropagate(
    grad: Tensor,
    image: Tensor,
    flow: Tensor,
    total: ImageGradient | None,
    flow_grad: Tensor | None,
    operator: str = "backward_warp",
) -> None:
    """Add the image's gradient to `total` and write `flow_grad`; either may be None."""
    sums = None if total is None else total.sums
    exact = None if total is None else total.exact
    grid, switches = _tiling(image, (image,), split=flow_grad is None)
    tensors = (
        *with_strides(grad, image, flow),
        *(sums, exact, strides(image if sums is None else sums), None if total is None else total.scale),
        *with_strides(flow_grad),
    )
    launch(
        operator,
        image.device,
        _tuned_backward[switches["CHANNELS_LAST"]],
        grid,
        *tensors,
        **switches,
        WIDE=needs_wide(grad, image, flow, sums),
        NEED_IMAGE=total is not None,
        NEED_FLOW=flow_grad is not None,
        DETERMINISTIC=exact is not None,
    )
