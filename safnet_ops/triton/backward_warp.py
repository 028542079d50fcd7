"""backward_warp in Triton: one program gathers the four corners of a block of pixels for a run of channels.

Backward scatters with atomics; the deterministic variant adds integers instead (`ImageGradient`).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from safnet_ops.checks import empty_gradient, empty_image
from safnet_ops.operators import OPERATORS
from safnet_ops.triton.launching import (
    accumulator,
    arguments,
    autotune,
    channel_block,
    channel_splits,
    compute_type,
    jit,
    launch,
    needs_wide,
    size_class,
    vector_length,
)
from safnet_ops.triton.sampling import load_corners, sample, sampling_point, scatter_corners, slopes
from safnet_ops.triton.tiles import offset, over_channels, over_pixels, pixel_block, stride, sum_channels, vectors

OPERATOR = OPERATORS["backward_warp"]

# Planar: one pixel (of four channels) a thread. Gathers gain nothing from wider threads, whose lanes lie further
# apart in memory.
PLANAR = [triton.Config({"TILE": 128}, num_warps=4), triton.Config({"TILE": 64}, num_warps=2)]
# Channels dense and aligned: four of one pixel a thread, 16 bytes of float32. Eight would spill.
INTERLEAVED = [triton.Config({"TILE": 512}, num_warps=4), triton.Config({"TILE": 256}, num_warps=2)]
KEY = ["scale_class", "BLOCK_C", "VECTOR"]


@jit
def _forward(
    image,
    flow,
    out,
    strides,
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
    point, _ = sampling_point(flow, strides.flow, n, y, x, valid, height, width, CHANNELS_LAST, ACC)
    target = out + over_channels(offset(n, 0, y, x, strides.out), CHANNELS_LAST)
    valid = over_channels(valid, CHANNELS_LAST)
    first = tl.program_id(1) * channel_blocks * BLOCK_C
    end = tl.minimum(first + channel_blocks * BLOCK_C, channels // VECTOR * VECTOR)
    for block in range(first, end, BLOCK_C):
        c = over_pixels(block + tl.arange(0, BLOCK_C), CHANNELS_LAST).to(n.dtype)
        mask = valid & (c < end)
        value = sample(image, strides.image, n, c, point, mask, VECTOR, ACC)
        tl.store(vectors(target, c * stride(strides.out, 1), VECTOR), value.to(out.dtype.element_ty), mask=mask)


@jit
def _backward(
    grad_out,
    image,
    flow,
    grad_image,
    grad_image_exact,
    grad_flow,
    strides,
    scale,
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
    """The image's gradient is added to `grad_image`, or to `grad_image_exact` in quanta of 1 / scale."""
    BLOCK: tl.constexpr = TILE // BLOCK_C if CHANNELS_LAST else TILE
    n, y, x, valid_pixel = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    point, inside = sampling_point(flow, strides.flow, n, y, x, valid_pixel, height, width, CHANNELS_LAST, ACC)
    inside_x, inside_y, known = inside
    source = grad_out + over_channels(offset(n, 0, y, x, strides.grad_out), CHANNELS_LAST)
    # Where the flow is NaN, so is the result whatever the image, and passes no gradient on.
    valid = over_channels(valid_pixel & known, CHANNELS_LAST)
    quanta = tl.load(scale) if DETERMINISTIC else 0.0
    slope_x = tl.zeros([BLOCK], ACC)
    slope_y = tl.zeros([BLOCK], ACC)
    first = tl.program_id(1) * channel_blocks * BLOCK_C
    end = tl.minimum(first + channel_blocks * BLOCK_C, channels // VECTOR * VECTOR)
    for block in range(first, end, BLOCK_C):
        c = over_pixels(block + tl.arange(0, BLOCK_C), CHANNELS_LAST).to(n.dtype)
        mask = valid & (c < end)
        g = tl.load(source + c * stride(strides.grad_out, 1), mask=mask, other=0.0).to(ACC)
        if NEED_FLOW:
            corners = load_corners(image, strides.image, n, c, point, mask, VECTOR, ACC)
            across, down = slopes(corners, point)
            slope_x += sum_channels(tl.where(mask, g * across, 0.0), CHANNELS_LAST)
            slope_y += sum_channels(tl.where(mask, g * down, 0.0), CHANNELS_LAST)
        if NEED_IMAGE:
            at = strides.grad_image
            scatter_corners(grad_image, grad_image_exact, at, n, c, point, g, quanta, mask, DETERMINISTIC)
    if NEED_FLOW:
        at = grad_flow + offset(n, 0, y, x, strides.grad_flow)
        kind: tl.constexpr = grad_flow.dtype.element_ty
        tl.store(at, tl.where(inside_x, slope_x, 0.0).to(kind), mask=valid_pixel)
        tl.store(at + stride(strides.grad_flow, 1), tl.where(inside_y, slope_y, 0.0).to(kind), mask=valid_pixel)


class ImageGradient:
    """Where a warp's image gradient is added up: in float32 (float64), or in integers where every bit must repeat.

    The integers count quanta of 2^-k. k is the largest with which no sum overflows 62 bits, even if all pixels of
    a picture hit one target, so a gradient is exact to about 2^-40 of the largest in grad_out at a million pixels.
    """

    def __init__(self, image: Tensor, grad_out: Tensor, deterministic: bool):
        self.image = image
        kind = compute_type(image)
        self.sums = empty_image(image, dtype=kind).zero_()
        self.exact = empty_image(image, dtype=torch.int64).zero_() if deterministic else None
        self.scale = self._scale(grad_out) if deterministic else None

    def _scale(self, grad_out: Tensor) -> Tensor:
        """2^k, as a tensor: reading it here would wait for the device."""
        largest = torch.nan_to_num(grad_out, 0.0, 0.0, 0.0).to(torch.float64).abs().amax()
        exponent = torch.frexp(largest).exponent
        bits = 61 - max(grad_out.shape[2] * grad_out.shape[3], 2).bit_length()
        return torch.ldexp(torch.ones_like(largest), (bits - exponent).clamp(max=1000))

    def result(self) -> Tensor:
        if self.exact is not None and self.scale is not None:
            self.sums += (self.exact.to(torch.float64) / self.scale).to(self.sums.dtype)
        return self.sums.to(self.image.dtype)


_configs = {False: PLANAR, True: INTERLEAVED}
_tuned_forward = {last: autotune(_forward, configs, KEY) for last, configs in _configs.items()}
_tuned_backward = {
    last: autotune(_backward, configs, [*KEY, "NEED_IMAGE", "NEED_FLOW"], sums=["grad_image", "grad_image_exact"])
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
    kernel, wide = _tuned_forward[switches["CHANNELS_LAST"]], needs_wide(image, flow, out)
    tensors = arguments(image=image, flow=flow, out=out)
    launch("backward_warp", image.device, kernel, grid, **tensors, **switches, WIDE=wide)
    return out


def backward_warp_backward(
    grad_out: Tensor, image: Tensor, flow: Tensor, needs: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    need_image, need_flow = (bool(needs & OPERATOR.bit(name)) for name in ("image", "flow"))
    grad_flow = empty_gradient(flow, need_flow)
    if image.numel() == 0 or not (need_image or need_flow):
        return empty_gradient(image, need_image), grad_flow.zero_()
    total = ImageGradient(image, grad_out, deterministic) if need_image else None
    backpropagate(grad_out, image, flow, total, grad_flow if need_flow else None)
    return total.result() if total is not None else empty_gradient(image, False), grad_flow


def backpropagate(
    grad_out: Tensor,
    image: Tensor,
    flow: Tensor,
    total: ImageGradient | None,
    grad_flow: Tensor | None,
    operator: str = "backward_warp",
) -> None:
    """Add the image's gradient to `total` and write `grad_flow`; either may be None."""
    sums, exact, scale = (None, None, None) if total is None else (total.sums, total.exact, total.scale)
    grid, switches = _tiling(image, (image,), split=grad_flow is None)
    tensors = arguments(
        grad_out=grad_out, image=image, flow=flow, grad_image=sums, grad_image_exact=exact, grad_flow=grad_flow
    )
    launch(
        operator,
        image.device,
        _tuned_backward[switches["CHANNELS_LAST"]],
        grid,
        **tensors,
        scale=scale,
        **switches,
        WIDE=needs_wide(grad_out, image, flow, sums),
        NEED_IMAGE=total is not None,
        NEED_FLOW=grad_flow is not None,
        DETERMINISTIC=exact is not None,
    )
