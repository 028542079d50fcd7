"""Device functions for bilinear sampling at pixel + flow, clamped to the border, and for its transpose.

A sampling point is a tuple (top, bottom, left, right, fraction_x, fraction_y) of tiles with one channel; the four pixels
around it are a tuple too: upper left, upper right, lower left, lower right.
"""

import triton
import triton.language as tl

from safnet_ops.triton.tiles import offset, over_channels, stride, vectors


@triton.jit
def clamp_coordinate(position, move, size, ACC: tl.constexpr):
    """(lower neighbour, upper neighbour, fraction, inside) of position + move, clamped to [0, size - 1].

    NaN moves give NaN fractions, and neighbours that can be read. `inside`: the result depends on the move.
    """
    moved = position.to(ACC) + move
    is_nan = moved != moved
    last = size - 1
    clamped = tl.minimum(tl.maximum(moved, 0.0), last.to(ACC))  # maximum gives 0 for NaN
    lower = tl.minimum(clamped.to(tl.int32), last)  # above 2^24 `last` itself may have been rounded up
    # Not `clamped - lower.to(ACC)`, the same to the bit: Triton 3.6 fails to compile that conversion for float64.
    fraction = tl.where(is_nan, moved, clamped - tl.floor(clamped))
    inside = (moved > 0.0) & (moved < last.to(ACC))
    return lower.to(position.dtype), tl.minimum(lower + 1, last).to(position.dtype), fraction, inside


@triton.jit
def load_flow(flow, strides, n, y, x, valid, ACC: tl.constexpr):
    """Both components of a flow at the pixels (0 where not valid)."""
    at = flow + offset(n, 0, y, x, strides)
    move_x = tl.load(at, mask=valid, other=0.0).to(ACC)
    return move_x, tl.load(at + stride(strides, 1), mask=valid, other=0.0).to(ACC)


@triton.jit
def sampling_point(flow, strides, n, y, x, valid, height, width, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr):
    """`move_pixel` for a flow in memory."""
    move_x, move_y = load_flow(flow, strides, n, y, x, valid, ACC)
    return move_pixel(move_x, move_y, y, x, height, width, CHANNELS_LAST, ACC)


@triton.jit
def move_pixel(move_x, move_y, y, x, height, width, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr):
    """Where moves lead: the sampling point; and, for each pixel, whether x and y are inside, and whether neither is NaN.

    Where one is NaN, the sample is, and depends on the other no more.
    """
    left, right, fraction_x, inside_x = clamp_coordinate(x, move_x, width, ACC)
    top, bottom, fraction_y, inside_y = clamp_coordinate(y, move_y, height, ACC)
    top, bottom = over_channels(top, CHANNELS_LAST), over_channels(bottom, CHANNELS_LAST)
    left, right = over_channels(left, CHANNELS_LAST), over_channels(right, CHANNELS_LAST)
    fraction_x, fraction_y = over_channels(fraction_x, CHANNELS_LAST), over_channels(fraction_y, CHANNELS_LAST)
    known = (move_x == move_x) & (move_y == move_y)
    return (top, bottom, left, right, fraction_x, fraction_y), (inside_x & known, inside_y & known, known)


@triton.jit
def point_where(condition, point):
    """The sampling point, on a pixel itself where the condition is not met."""
    top, bottom, left, right, fraction_x, fraction_y = point
    return top, bottom, left, right, tl.where(condition, fraction_x, 0.0), tl.where(condition, fraction_y, 0.0)


@triton.jit
def corner_offsets(point, strides):
    """Offsets of the four pixels within their picture and channel."""
    top, bottom, left, right, _, _ = point
    above, below = top * stride(strides, 2), bottom * stride(strides, 2)
    before, behind = left * stride(strides, 3), right * stride(strides, 3)
    return above + before, above + behind, below + before, below + behind


@triton.jit
def load_corners(image, strides, n, c, point, valid, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """The four pixels around a sampling point.

    Rows and columns are added first, then channels: their sums leave a loop over channels.
    """
    at = n * stride(strides, 0) + c * stride(strides, 1)
    at00, at01, at10, at11 = corner_offsets(point, strides)
    v00 = tl.load(vectors(image, at + at00, VECTOR), mask=valid, other=0.0).to(ACC)
    v01 = tl.load(vectors(image, at + at01, VECTOR), mask=valid, other=0.0).to(ACC)
    v10 = tl.load(vectors(image, at + at10, VECTOR), mask=valid, other=0.0).to(ACC)
    v11 = tl.load(vectors(image, at + at11, VECTOR), mask=valid, other=0.0).to(ACC)
    return v00, v01, v10, v11


@triton.jit
def interpolate(corners, point):
    v00, v01, v10, v11 = corners
    _, _, _, _, fraction_x, fraction_y = point
    upper = v00 * (1 - fraction_x) + v01 * fraction_x
    lower = v10 * (1 - fraction_x) + v11 * fraction_x
    return upper * (1 - fraction_y) + lower * fraction_y


@triton.jit
def slopes(corners, point):
    """Derivatives of `interpolate` along x and y."""
    v00, v01, v10, v11 = corners
    _, _, _, _, fraction_x, fraction_y = point
    across = (v01 - v00) * (1 - fraction_y) + (v11 - v10) * fraction_y
    down = (v10 - v00) * (1 - fraction_x) + (v11 - v01) * fraction_x
    return across, down


@triton.jit
def sample(image, strides, n, c, point, valid, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """Values at sampling points."""
    return interpolate(load_corners(image, strides, n, c, point, valid, VECTOR, ACC), point)


@triton.jit
def sample_with_slopes(image, strides, n, c, point, valid, VECTOR: tl.constexpr, ACC: tl.constexpr):
    """(values at sampling points, their derivatives along x and y)"""
    corners = load_corners(image, strides, n, c, point, valid, VECTOR, ACC)
    across, down = slopes(corners, point)
    return interpolate(corners, point), across, down


@triton.jit
def scatter_corners(sums, exact, strides, n, c, point, g, scale, valid, DETERMINISTIC: tl.constexpr):
    """The transpose of `sample`: add `g`, by its weights, to the four pixels around a sampling point."""
    at = n * stride(strides, 0) + c * stride(strides, 1)
    at00, at01, at10, at11 = corner_offsets(point, strides)
    _, _, _, _, fraction_x, fraction_y = point
    upper, lower = g * (1 - fraction_y), g * fraction_y
    scatter(sums, exact, at + at00, upper * (1 - fraction_x), scale, valid, DETERMINISTIC)
    scatter(sums, exact, at + at01, upper * fraction_x, scale, valid, DETERMINISTIC)
    scatter(sums, exact, at + at10, lower * (1 - fraction_x), scale, valid, DETERMINISTIC)
    scatter(sums, exact, at + at11, lower * fraction_x, scale, valid, DETERMINISTIC)


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
