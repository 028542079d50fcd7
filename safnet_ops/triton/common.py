"""What the Triton kernels share: compilation for all sizes at once, launching, tiles of pixels, and bilinear sampling.

A kernel is compiled once for each combination of dtypes and constexpr switches, never for a size: sizes and strides are
not specialised. Tiles hold pixels along one axis and channels along the other, the one that is dense in memory last.
"""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from safnet_ops.checks import is_channels_last

# Offsets from here on are computed in 64 bits. 2^30, not 2^31: `strides` sends a stride twice as large.
WIDE_FROM = 1 << 30
FILL = 1024  # programs that keep a large GPU busy (about 8 for each multiprocessor)


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit without specialisation on argument values, so that a new image size or alignment compiles nothing."""
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])


def launch(operator: str, device: torch.device, kernel: Any, grid: Any, *args: Any, **switches: Any) -> None:
    """Run `kernel` on `device`; `grid` is a tuple or a function of the constexprs.

    Raises:
        RuntimeError: Triton cannot launch on that device.
    """
    if device.type != "cuda" and not _launches_on(device):
        raise RuntimeError(f"{operator}: backend 'triton' runs CUDA tensors, got device {str(device)!r}")
    if isinstance(kernel, triton.runtime.Autotuner) and torch.are_deterministic_algorithms_enabled():
        # Tuning may choose otherwise when the program runs again, and another tile sums in another order.
        kernel, switches = kernel.fn, switches | kernel.configs[0].all_kwargs()
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Fusing a * b + c is what nvcc does too; Triton's own default is about to change.
        kernel[grid](*args, **switches, enable_fp_fusion=True)


def _launches_on(device: torch.device) -> bool:
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == device.type
    except RuntimeError:  # "0 active drivers"
        return False


def strides(tensor: Tensor) -> tuple[int, ...]:
    """The strides as `offset` takes them: odd numbers of at least 3, since Triton specialises 1 and multiples of
    16 in tuples."""
    return tuple(
        2 * (stride if size > 1 else 0) + 3 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def with_strides(*tensors: Tensor | None) -> list[Any]:
    """Kernels take every tensor with its strides; nothing reads the strides of a tensor that is absent."""
    return [value for t in tensors for value in ((None, (3, 3, 3, 3)) if t is None else (t, strides(t)))]


def needs_wide(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of the tensors, or a count of pixels, asks for 64 bits."""
    return any(t is not None and _largest_offset(t) >= WIDE_FROM for t in tensors)


def _largest_offset(tensor: Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return max(reach, tensor.numel())


def accumulator(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def compute_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def size_class(pixels: int) -> int:
    """What autotuning distinguishes of a size: whether it leaves a large GPU mostly idle."""
    return int(pixels >= 1 << 17)


def channel_block(channels: int, channels_last: bool) -> int:
    """Channels in a tile. Four planes are enough loads in flight; dense channels come in blocks that waste at most
    an eighth."""
    if channels < 4 or not channels_last:
        return min(triton.next_power_of_2(channels), 4)
    return next(
        block for block in (32, 16, 8, 4) if block == 4 or 8 * triton.cdiv(channels, block) * block <= 9 * channels
    )


def channel_splits(tiles: int, channels: int, block: int) -> tuple[int, int]:
    """(programs that share the channels of a tile of pixels, blocks of channels for each): more where there are
    few tiles."""
    blocks = triton.cdiv(channels, block)
    each = triton.cdiv(blocks, min(blocks, triton.cdiv(FILL, max(tiles, 1))))
    return triton.cdiv(blocks, each), each


def vector_length(tensors: Sequence[Tensor]) -> int:
    """Elements of a 16-byte access along the channels of channels_last tensors; 1 where one of them does not allow
    it."""
    length = 16 // min(t.element_size() for t in tensors)
    for t in tensors:
        aligned = t.shape[1] % length == 0 and t.data_ptr() % 16 == 0
        if not (
            is_channels_last(t) and aligned and all(t.stride(d) % length == 0 for d in (0, 2, 3) if t.shape[d] > 1)
        ):
            return 1
    return length


# --- device functions


@triton.jit
def pixel_block(program, height, width, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(n, y, x, valid) of the BLOCK pixels that a program computes; `program` counts blocks, then pictures."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    pixels = height.to(INDEX) * width
    blocks = tl.cdiv(pixels, BLOCK)
    program = program.to(INDEX)
    first = program % blocks * BLOCK
    p = first + tl.arange(0, BLOCK)
    if WIDE:
        # Lanes divide in 32 bits: a division of 64 is a subroutine, with registers spilled around its call.
        along = (first % width).to(tl.int32) + tl.arange(0, BLOCK)
        return program // blocks, first // width + along // width, (along % width).to(INDEX), p < pixels
    else:
        return program // blocks, p // width, p % width, p < pixels


@triton.jit
def stride(strides, axis: tl.constexpr):
    return (strides[axis] - 3) >> 1


@triton.jit
def offset(n, c, y, x, strides):
    """Offset of an element; 64 bits wide where n, y and x are."""
    return n * stride(strides, 0) + c * stride(strides, 1) + y * stride(strides, 2) + x * stride(strides, 3)


@triton.jit
def over_channels(value, CHANNELS_LAST: tl.constexpr):
    """A value for each pixel, as a tile with one channel."""
    if CHANNELS_LAST:
        return tl.expand_dims(value, 1)
    else:
        return tl.expand_dims(value, 0)


@triton.jit
def over_pixels(value, CHANNELS_LAST: tl.constexpr):
    """A value for each channel, as a tile with one pixel."""
    if CHANNELS_LAST:
        return tl.expand_dims(value, 0)
    else:
        return tl.expand_dims(value, 1)


@triton.jit
def sum_channels(tile, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return tl.sum(tile, axis=1)
    else:
        return tl.sum(tile, axis=0)


@triton.jit
def sum_pixels(tile, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return tl.sum(tile, axis=0)
    else:
        return tl.sum(tile, axis=1)


@triton.jit
def vectors(base, offsets, VECTOR: tl.constexpr):
    """base + offsets, a tile of pointers of which VECTOR neighbours along the last axis are one aligned 16-byte
    access."""
    pointers = base + offsets
    if VECTOR > 1:
        return tl.max_contiguous(tl.multiple_of(pointers, [1, 16]), [1, VECTOR])
    else:
        return pointers


@triton.jit
def clamp_coordinate(position, move, size, ACC: tl.constexpr):
    """(lower neighbour, upper neighbour, fraction, inside) of position + move, clamped to [0, size - 1].

    NaN moves give NaN fractions, and neighbours that can be read. `inside`: the result depends on the move (or is NaN).
    """
    moved = position.to(ACC) + move
    is_nan = moved != moved
    last = size - 1
    clamped = tl.minimum(tl.maximum(moved, 0.0), last.to(ACC))  # maximum gives 0 for NaN
    lower = tl.minimum(clamped.to(tl.int32), last)  # above 2^24 `last` itself may have been rounded up
    fraction = tl.where(is_nan, moved, clamped - lower.to(ACC))
    inside = is_nan | ((moved > 0.0) & (moved < last.to(ACC)))
    return lower.to(position.dtype), tl.minimum(lower + 1, last).to(position.dtype), fraction, inside


@triton.jit
def sampling_point(flow, strides, n, y, x, valid, height, width, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr):
    """`place_corners` for a flow in memory."""
    move_x, move_y = load_flow(flow, strides, n, y, x, valid, ACC)
    return place_corners(move_x, move_y, y, x, height, width, CHANNELS_LAST, ACC)


@triton.jit
def place_corners(move_x, move_y, y, x, height, width, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr):
    """Where moves lead: tiles of rows, columns and fractions; and, for each pixel, whether x and y are inside."""
    left, right, fraction_x, inside_x = clamp_coordinate(x, move_x, width, ACC)
    top, bottom, fraction_y, inside_y = clamp_coordinate(y, move_y, height, ACC)
    top, bottom = over_channels(top, CHANNELS_LAST), over_channels(bottom, CHANNELS_LAST)
    left, right = over_channels(left, CHANNELS_LAST), over_channels(right, CHANNELS_LAST)
    fraction_x, fraction_y = over_channels(fraction_x, CHANNELS_LAST), over_channels(fraction_y, CHANNELS_LAST)
    return top, bottom, left, right, fraction_x, fraction_y, inside_x, inside_y


@triton.jit
def load_flow(flow, strides, n, y, x, valid, ACC: tl.constexpr):
    """Both components of a flow at the pixels (0 where not valid)."""
    at = flow + offset(n, 0, y, x, strides)
    move_x = tl.load(at, mask=valid, other=0.0).to(ACC)
    return move_x, tl.load(at + stride(strides, 1), mask=valid, other=0.0).to(ACC)


@triton.jit
def load_corners(image, at_channels, top, bottom, left, right, strides, valid, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """The four pixels around a sampling point: upper left, upper right, lower left, lower right.

    The parentheses matter: sums of rows and columns leave a loop over channels.
    """
    above, below = top * stride(strides, 2), bottom * stride(strides, 2)
    before, behind = left * stride(strides, 3), right * stride(strides, 3)
    v00 = tl.load(vectors(image, at_channels + (above + before), VECTOR), mask=valid, other=0.0).to(ACC)
    v01 = tl.load(vectors(image, at_channels + (above + behind), VECTOR), mask=valid, other=0.0).to(ACC)
    v10 = tl.load(vectors(image, at_channels + (below + before), VECTOR), mask=valid, other=0.0).to(ACC)
    v11 = tl.load(vectors(image, at_channels + (below + behind), VECTOR), mask=valid, other=0.0).to(ACC)
    return v00, v01, v10, v11


@triton.jit
def interpolate(v00, v01, v10, v11, fraction_x, fraction_y):
    upper = v00 * (1 - fraction_x) + v01 * fraction_x
    lower = v10 * (1 - fraction_x) + v11 * fraction_x
    return upper * (1 - fraction_y) + lower * fraction_y


@triton.jit
def slopes(v00, v01, v10, v11, fraction_x, fraction_y):
    """Derivatives of `interpolate` along x and y."""
    across = (v01 - v00) * (1 - fraction_y) + (v11 - v10) * fraction_y
    down = (v10 - v00) * (1 - fraction_x) + (v11 - v01) * fraction_x
    return across, down


@triton.jit
def scatter_corners(
    sums,
    exact,
    at,
    top,
    bottom,
    left,
    right,
    fraction_x,
    fraction_y,
    strides,
    g,
    scale,
    valid,
    DETERMINISTIC: tl.constexpr,
):
    """The transpose of `interpolate` after `load_corners`: add `g`, by its weights, to the four pixels."""
    above, below = top * stride(strides, 2), bottom * stride(strides, 2)
    before, behind = left * stride(strides, 3), right * stride(strides, 3)
    upper, lower = g * (1 - fraction_y), g * fraction_y
    scatter(sums, exact, at + (above + before), upper * (1 - fraction_x), scale, valid, DETERMINISTIC)
    scatter(sums, exact, at + (above + behind), upper * fraction_x, scale, valid, DETERMINISTIC)
    scatter(sums, exact, at + (below + before), lower * (1 - fraction_x), scale, valid, DETERMINISTIC)
    scatter(sums, exact, at + (below + behind), lower * fraction_x, scale, valid, DETERMINISTIC)


@triton.jit
def scatter(sums, exact, at, value, scale, valid, DETERMINISTIC: tl.constexpr):
    """Add to a gradient. Integers add up to the same in any order, and so does what is not finite (to inf or NaN)."""
    if DETERMINISTIC:
        finite = tl.abs(value) < float("inf")
        quanta = tl.floor(value.to(tl.float64) * scale + 0.5)
        tl.atomic_add(exact + at, tl.where(finite, quanta, 0.0).to(tl.int64), mask=valid & finite, sem="relaxed")
        tl.atomic_add(sums + at, value, mask=valid & (finite == 0), sem="relaxed")
    else:
        tl.atomic_add(sums + at, value, mask=valid, sem="relaxed")
