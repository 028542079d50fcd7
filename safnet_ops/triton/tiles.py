"""Device functions for tiles: which pixels a program computes, where elements lie, and sums along an axis.

Tiles hold pixels along one axis and channels along the other, the one that is dense in memory last.
"""

import triton
import triton.language as tl


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
def load_tile(tensor, strides, n, c, y, x, mask, ACC: tl.constexpr):
    """A picture's elements at n, c, y, x, which together have the shape of a tile; 0 where the mask is not set."""
    return tl.load(tensor + offset(n, c, y, x, strides), mask=mask, other=0.0).to(ACC)


@triton.jit
def store_tile(tensor, strides, n, c, y, x, value, mask):
    tl.store(tensor + offset(n, c, y, x, strides), value.to(tensor.dtype.element_ty), mask=mask)


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
