"""group_conv_shuffle in Triton: implicit GEMM over taps and channels, one epilogue for bias, residual, PReLU and
shuffle.

A program computes all (up to 128) channels of one group for a block of pixels. 40 channels would waste 24 rows of a tile
of 64, so a tile may be two: 32 + 16 rows share every block of the input. Weights are repacked once a call to (tap, row,
depth), which makes their reads dense; the backward of the input is the same kernel with weights transposed and taps
mirrored.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from safnet_ops.checks import empty_gradient, empty_image, is_channels_last
from safnet_ops.operators import OPERATORS
from safnet_ops.triton.launching import (
    FILL,
    accumulator,
    arguments,
    autotune,
    channel_block,
    jit,
    launch,
    needs_wide,
    size_class,
    vector_length,
)
from safnet_ops.triton.tiles import (
    load_tile,
    over_channels,
    over_pixels,
    pixel_block,
    store_tile,
    stride,
    sum_pixels,
    vectors,
)

OPERATOR = OPERATORS["group_conv_shuffle"]
# Tensor cores: a warp multiplies 32 pixels by the weights it reads, or 16 where there are too few programs. Two stages keep
# more programs on a multiprocessor, three bring more data ahead.
TENSOR_CORE = [
    triton.Config({"BLOCK_P": 128}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_P": 128}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_P": 64}, num_warps=4, num_stages=3),
]
# Exact float32 and float64 multiply on the ordinary units, whose operands all sit in registers.
EXACT = [
    triton.Config({"BLOCK_P": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_P": 32}, num_warps=4, num_stages=2),
]
PATCH_X = tl.constexpr(32)  # columns of the patch of pixels that a program of the convolution computes
REDUCED = 1024  # pixels of one channel block that a program of the activation's backward sums
CHUNK = 32  # pixels, all of one row, in a step of the weight gradient


@triton.jit
def _is_below(position, size):
    """0 <= position < size: negative numbers are large unsigned ones."""
    return position.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _multiply(weights, pixels, sums, CHANNELS_LAST: tl.constexpr, PRECISION: tl.constexpr):
    if CHANNELS_LAST:
        return tl.dot(pixels, tl.trans(weights), sums, input_precision=PRECISION, out_dtype=sums.dtype)
    else:
        return tl.dot(weights, pixels, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit
def _add_products(
    sums,
    rest_sums,
    pixels,
    weights,
    m,
    rest,
    k,
    stored_depth,
    REST_M: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Multiply a block of pixels by one tap's weights, which are stored densely and filled up to whole tiles."""
    VECTOR: tl.constexpr = 128 // weights.dtype.element_ty.primitive_bitwidth
    tile = tl.load(vectors(weights, m[:, None] * stored_depth + k[None, :], VECTOR))
    sums = _multiply(tile, pixels, sums, CHANNELS_LAST, PRECISION)
    if REST_M > 0:
        tile = tl.load(vectors(weights, rest[:, None] * stored_depth + k[None, :], VECTOR))
        rest_sums = _multiply(tile, pixels, rest_sums, CHANNELS_LAST, PRECISION)
    return sums, rest_sums


@triton.jit
def _load_pixels(base, at, k, inside, depth, channel_stride, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Channels k of the pixels at offsets `at`, 0 where not inside."""
    mask = over_channels(inside, CHANNELS_LAST) & over_pixels(k < depth // VECTOR * VECTOR, CHANNELS_LAST)
    channels = over_pixels(k.to(at.dtype) * channel_stride, CHANNELS_LAST)
    return tl.load(vectors(base, over_channels(at, CHANNELS_LAST) + channels, VECTOR), mask=mask, other=0.0)


@triton.jit
def _finish(
    sums,
    m,
    n,
    y,
    x,
    valid,
    rows,
    groups,
    group,
    bias,
    prelu,
    residual,
    preactivation,
    out,
    strides,
    SHUFFLED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Add bias and residual, keep the result if asked, apply PReLU, and store in shuffled order."""
    ACC: tl.constexpr = sums.dtype
    y, x = over_channels(y.to(n.dtype), CHANNELS_LAST), over_channels(x.to(n.dtype), CHANNELS_LAST)
    c = group * rows + m
    used = m < rows // VECTOR * VECTOR
    mask = over_channels(valid, CHANNELS_LAST) & over_pixels(used, CHANNELS_LAST)
    tile_c = over_pixels(c, CHANNELS_LAST).to(n.dtype)
    if bias is not None:
        sums += over_pixels(tl.load(bias + c, mask=used, other=0.0).to(ACC), CHANNELS_LAST)
    if residual is not None:
        at = _offsets(n, tile_c, y, x, strides.residual)
        sums += tl.load(vectors(residual, at, VECTOR), mask=mask, other=0.0).to(ACC)
    if preactivation is not None:
        at = _offsets(n, tile_c, y, x, strides.preactivation)
        tl.store(vectors(preactivation, at, VECTOR), sums.to(preactivation.dtype.element_ty), mask=mask)
    if prelu is not None:
        slope = over_pixels(tl.load(prelu + c, mask=used, other=0.0).to(ACC), CHANNELS_LAST)
        sums = tl.where(sums > 0, sums, slope * sums)
    value = sums.to(out.dtype.element_ty)
    if SHUFFLED:
        tile_c = over_pixels(m * groups + group, CHANNELS_LAST).to(n.dtype)
        tl.store(out + _offsets(n, tile_c, y, x, strides.out), value, mask=mask)
    else:
        tl.store(vectors(out, _offsets(n, tile_c, y, x, strides.out), VECTOR), value, mask=mask)


@triton.jit
def _offsets(n, c, y, x, strides):
    """`offset` of a tile, with one addition an element."""
    return (n * stride(strides, 0) + y * stride(strides, 2) + x * stride(strides, 3)) + c * stride(strides, 1)


@triton.jit
def _patch(program, height, width, BLOCK_P: tl.constexpr):
    """(n, y, x) of a program's pixels: rows of 32, so that taps share what they read and no lane has to divide."""
    PATCH_Y: tl.constexpr = BLOCK_P // PATCH_X
    across = tl.cdiv(width, PATCH_X)
    patches = tl.cdiv(height, PATCH_Y) * across
    patch, p = program % patches, tl.arange(0, BLOCK_P)
    return program // patches, patch // across * PATCH_Y + p // PATCH_X, patch % across * PATCH_X + p % PATCH_X


@jit
def _convolve(
    source,
    residual,
    preactivation,
    out,
    strides,
    weight,
    bias,
    prelu,
    groups,
    rows,
    depth,
    height,
    width,
    source_height,
    source_width,
    step,
    dilation,
    scale_class,
    SHUFFLED: tl.constexpr,
    SPREAD: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SOURCE_VECTOR: tl.constexpr,
    OUT_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REST_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    REST_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """`rows` output and `depth` input channels a group; `step` is the convolution's stride, or where the source is SPREAD
    over the result, the transposed convolution's. Groups run fastest through the grid, so that the lines of memory
    that a shuffle shares among them meet in L2."""
    TILE_M: tl.constexpr = BLOCK_M + REST_M
    TILE_K: tl.constexpr = BLOCK_K + REST_K
    row_blocks = tl.cdiv(rows, TILE_M)
    part = tl.program_id(0) % (groups * row_blocks)
    group, first_row = part % groups, part // groups * TILE_M
    n, y, x = _patch(tl.program_id(0) // (groups * row_blocks), height, width, BLOCK_P)
    n, valid = n.to(tl.int64 if WIDE else tl.int32), (y < height) & (x < width)
    m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    sums = tl.zeros([BLOCK_P, BLOCK_M] if CHANNELS_LAST else [BLOCK_M, BLOCK_P], ACC)
    rest = BLOCK_M + tl.arange(0, REST_M if REST_M > 0 else 1)
    rest_k = BLOCK_K + tl.arange(0, REST_K if REST_K > 0 else 1)
    rest_sums = sums
    if REST_M > 0:
        rest_sums = tl.zeros([BLOCK_P, REST_M] if CHANNELS_LAST else [REST_M, BLOCK_P], ACC)
    channel_stride, row_stride, column_stride = (
        stride(strides.source, 1),
        stride(strides.source, 2),
        stride(strides.source, 3),
    )
    base = source + n * stride(strides.source, 0) + group.to(n.dtype) * depth * channel_stride
    depth_blocks = tl.cdiv(depth, TILE_K)
    stored_depth = depth_blocks * TILE_K
    weight += (group * row_blocks * TILE_M + first_row) * stored_depth
    near_y, near_x = y, x
    if not SPREAD:
        near_y, near_x = y * step, x * step
    near = near_y.to(n.dtype) * row_stride + near_x.to(n.dtype) * column_stride
    near_y = tl.where(valid, near_y, -(1 << 30))  # outside whatever the tap
    tap_y, tap_x, first_k = -1, -1, 0
    for _ in range(9 * depth_blocks):
        from_y, from_x = near_y + tap_y * dilation, near_x + tap_x * dilation
        if SPREAD:
            inside = (from_y >= 0) & (from_x >= 0) & (from_y % step == 0) & (from_x % step == 0)
            from_y, from_x = from_y // step, from_x // step
            inside = inside & (from_y < source_height) & (from_x < source_width)
            at = from_y.to(n.dtype) * row_stride + from_x.to(n.dtype) * column_stride
        else:
            inside = _is_below(from_y, source_height) & _is_below(from_x, source_width)
            at = near
            shift = (tap_y * row_stride.to(n.dtype) + tap_x * column_stride) * dilation
        first = base + first_k * channel_stride.to(n.dtype)
        if not SPREAD:
            first += shift
        left = depth - first_k
        pixels = _load_pixels(first, at, k, inside, left, channel_stride, SOURCE_VECTOR, CHANNELS_LAST)
        sums, rest_sums = _add_products(
            sums, rest_sums, pixels, weight, m, rest, k, stored_depth, REST_M, CHANNELS_LAST, PRECISION
        )
        if REST_K > 0:
            pixels = _load_pixels(first, at, rest_k, inside, left, channel_stride, SOURCE_VECTOR, CHANNELS_LAST)
            sums, rest_sums = _add_products(
                sums, rest_sums, pixels, weight, m, rest, rest_k, stored_depth, REST_M, CHANNELS_LAST, PRECISION
            )
        # The next block of channels; after the last, the next tap.
        first_k += TILE_K
        weight += TILE_K
        ends_tap = first_k >= depth
        first_k = tl.where(ends_tap, 0, first_k)
        weight += tl.where(ends_tap, (groups * row_blocks * TILE_M - 1) * stored_depth, 0)
        tap_x += tl.where(ends_tap, 1, 0)
        ends_row = tap_x > 1
        tap_x = tl.where(ends_row, -1, tap_x)
        tap_y += tl.where(ends_row, 1, 0)
    _finish(
        *(sums, first_row + m, n, y, x, valid, rows, groups, group, bias, prelu),
        *(residual, preactivation, out, strides, SHUFFLED, CHANNELS_LAST, OUT_VECTOR),
    )
    if REST_M > 0:
        _finish(
            *(rest_sums, first_row + rest, n, y, x, valid, rows, groups, group, bias, prelu),
            *(residual, preactivation, out, strides, SHUFFLED, CHANNELS_LAST, OUT_VECTOR),
        )


@jit
def _activation_backward(
    grad_out,
    preactivation,
    grad_inner,
    strides,
    prelu,
    bias_sums,
    prelu_sums,
    channels,
    groups,
    height,
    width,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Undo the shuffle and the PReLU; sum over the block's pixels what bias and slopes receive."""
    n, y, x, valid = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    y, x = over_channels(y, CHANNELS_LAST), over_channels(x, CHANNELS_LAST)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c = over_pixels(channel, CHANNELS_LAST).to(n.dtype)
    mask = over_channels(valid, CHANNELS_LAST) & (c < channels)
    rows = channels // groups
    shuffled = over_pixels(channel % rows * groups + channel // rows, CHANNELS_LAST).to(n.dtype)
    g = load_tile(grad_out, strides.grad_out, n, shuffled, y, x, mask, ACC)
    row = tl.program_id(0).to(n.dtype) * channels + channel
    if prelu is not None:
        before = load_tile(preactivation, strides.preactivation, n, c, y, x, mask, ACC)
        slope = over_pixels(tl.load(prelu + channel, mask=channel < channels, other=0.0).to(ACC), CHANNELS_LAST)
        if prelu_sums is not None:
            bent = sum_pixels(tl.where(before > 0, 0.0, g * before), CHANNELS_LAST)
            tl.store(prelu_sums + row, bent, mask=channel < channels)
        g = tl.where(before > 0, g, g * slope)
    if bias_sums is not None:
        tl.store(bias_sums + row, sum_pixels(g, CHANNELS_LAST), mask=channel < channels)
    if grad_inner is not None:
        store_tile(grad_inner, strides.grad_inner, n, c, y, x, g, mask)


@triton.jit
def _load_piece(picture, strides, at, c, inside, number, numbers, VECTOR: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Channels c of pixels in one row, 0 where not inside or from the `numbers`-th channel of the group on."""
    n, y, x = at
    row = picture + (n * stride(strides, 0) + y * stride(strides, 2))
    mask = over_channels(inside, CHANNELS_LAST) & over_pixels(number < numbers // VECTOR * VECTOR, CHANNELS_LAST)
    tile = over_channels(x * stride(strides, 3), CHANNELS_LAST) + over_pixels(c * stride(strides, 1), CHANNELS_LAST)
    return tl.load(vectors(row, tile, VECTOR), mask=mask, other=0.0)


@jit
def _weight_backward(
    source,
    grad_inner,
    strides,
    weight_sums,
    groups,
    rows,
    depth,
    batch,
    height,
    width,
    source_height,
    source_width,
    step,
    dilation,
    run,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SOURCE_VECTOR: tl.constexpr,
    GRAD_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tap's (rows, depth) weights of a group, summed over the program_id(1)-th run of `run` pieces of rows, BLOCK_K
    pixels each."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    part = tl.program_id(0)
    tap, part = part % 9, part // 9
    group, part = part % groups, part // groups
    depth_blocks = tl.cdiv(depth, BLOCK_N)
    m = part // depth_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    k = part % depth_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_c, source_c = (group * rows + m).to(INDEX), (group * depth + k).to(INDEX)
    sums = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    pieces = tl.cdiv(width, BLOCK_K)
    first = tl.program_id(1) * run
    piece, y, n = first % pieces, first // pieces % height, first // pieces // height
    p = tl.arange(0, BLOCK_K)
    move_y, move_x = (tap // 3 - 1) * dilation, (tap % 3 - 1) * dilation
    for _ in range(first, tl.minimum(first + run, batch * height * pieces)):
        x = piece * BLOCK_K + p
        from_y, from_x = y * step + move_y, x * step + move_x
        inside = _is_below(from_y, source_height) & _is_below(from_x, source_width) & (x < width)
        at = (n.to(INDEX), y.to(INDEX), x.to(INDEX))
        g = _load_piece(grad_inner, strides.grad_inner, at, grad_c, x < width, m, rows, GRAD_VECTOR, CHANNELS_LAST)
        at = (n.to(INDEX), from_y.to(INDEX), from_x.to(INDEX))
        values = _load_piece(source, strides.source, at, source_c, inside, k, depth, SOURCE_VECTOR, CHANNELS_LAST)
        if CHANNELS_LAST:
            g = tl.trans(g)
        else:
            values = tl.trans(values)
        sums = tl.dot(g, values, sums, input_precision=PRECISION, out_dtype=ACC)
        piece += 1
        ends_row = piece == pieces
        piece = tl.where(ends_row, 0, piece)
        y += tl.where(ends_row, 1, 0)
        n += tl.where(y == height, 1, 0)
        y = tl.where(y == height, 0, y)
    # Each run owns a slice laid out like the weight itself.
    at = tl.program_id(1).to(INDEX) * (groups * rows * depth * 9) + (grad_c[:, None] * depth + k[None, :]) * 9 + tap
    tl.store(weight_sums + at, sums, mask=(m < rows)[:, None] & (k < depth)[None, :])


_KEY = ["scale_class", "CHANNELS_LAST", "BLOCK_M", "REST_M", "BLOCK_K", "REST_K", "SHUFFLED", "SPREAD"]
_tuned_convolve = {exact: autotune(_convolve, EXACT if exact else TENSOR_CORE, _KEY) for exact in (False, True)}


def is_exact(tensor: Tensor) -> bool:
    """Whether products keep all bits: float64, and float32 unless PyTorch's own convolutions may use TF32, as
    torch.backends.cudnn.allow_tf32 or its successor conv.fp32_precision says."""
    if tensor.dtype == torch.float32:
        return torch.backends.cudnn.conv.fp32_precision != "tf32"  # type: ignore[attr-defined]
    return tensor.dtype == torch.float64


def row_tiles(rows: int, largest: int) -> tuple[int, int]:
    """(rows of a tile, rows of a second one or 0): powers of two from 16 up that waste least, 40 giving 32 + 16."""
    rows = min(rows, largest)
    whole = max(triton.next_power_of_2(rows), 16)
    if whole == 16 or rows == whole:
        return whole, 0
    half = whole // 2
    rest = max(triton.next_power_of_2(rows - half), 16)
    return (half, rest) if rest < half else (whole, 0)


def depth_tiles(depth: int, largest: int) -> tuple[int, int]:
    """(channels of a step, channels of a second part of it or 0): at most `largest`, whichever fill least with zeros,
    and of these the most."""
    pairs = [(64, 16), (64, 0), (32, 16), (32, 0), (16, 0)]
    return min((p for p in pairs if sum(p) <= largest), key=lambda p: triton.cdiv(depth, sum(p)) * sum(p))


def group_conv_shuffle(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prelu_weight: Tensor | None,
    residual: Tensor | None,
    groups: int,
    stride: int,
    dilation: int,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    n, _, height, width = input.shape
    out = empty_image(input, (n, weight.shape[0], triton.cdiv(height, stride), triton.cdiv(width, stride)))
    preactivation = torch.empty_like(out) if save_preactivation else input.new_empty(0)
    if out.numel() > 0:
        saved = preactivation if save_preactivation else None
        epilogue = (_dense(bias), _dense(prelu_weight), residual, saved)
        _run_convolution(input, weight, epilogue, out, (groups, stride, dilation), transposed=False)
    return out, preactivation


def group_conv_shuffle_backward(
    grad_out: Tensor,
    preactivation: Tensor,
    input: Tensor,
    weight: Tensor,
    prelu_weight: Tensor | None,
    groups: int,
    stride: int,
    dilation: int,
    needs: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needed = {name: bool(needs & OPERATOR.bit(name)) for name in OPERATOR.differentiable}
    grad_input = empty_gradient(input, needed["input"])
    if grad_out.numel() == 0 or input.numel() == 0:
        return _nothing_flows(grad_out, grad_input, weight, needed)
    # Without PReLU and shuffle the gradient arrives as it is needed (but an operator must not return its argument).
    passes = prelu_weight is None and groups == 1 and not needed["residual"]
    passes = passes and is_channels_last(grad_out) == is_channels_last(input)
    grad_inner, grad_bias, grad_prelu = _undo_activation(
        grad_out,
        preactivation,
        input,
        prelu_weight,
        groups,
        inner=not passes and (needed["input"] or needed["weight"] or needed["residual"]),
        bias=needed["bias"],
        prelu=needed["prelu_weight"],
    )
    if passes:
        grad_inner = grad_out
    grad_weight = weight.new_empty(0)
    if needed["weight"]:
        grad_weight = _weight_gradient(grad_inner, input, weight, groups, stride, dilation)
    if needed["input"]:
        _run_convolution(grad_inner, weight, (None,) * 4, grad_input, (groups, stride, dilation), transposed=True)
    grad_residual = grad_inner if needed["residual"] else grad_out.new_empty(0)
    return grad_input, grad_weight, grad_bias, grad_prelu, grad_residual


def _dense(vector: Tensor | None) -> Tensor | None:
    """Kernels read bias and slopes with stride 1 (one slope of all channels comes with stride 0)."""
    return None if vector is None else vector.contiguous()


def _run_convolution(
    source: Tensor,
    weight: Tensor,
    epilogue: tuple[Tensor | None, ...],
    out: Tensor,
    geometry: tuple[int, int, int],
    *,
    transposed: bool,
) -> None:
    """Launch `_convolve`; `epilogue` holds bias, slopes, residual and where the pre-activation goes."""
    groups, step, dilation = geometry
    n, channels, height, width = out.shape
    rows, depth = channels // groups, source.shape[1] // groups
    bias, prelu, residual, preactivation = epilogue
    exact = is_exact(source)
    block_m, rest_m = row_tiles(rows, 32 if exact else 128)
    channels_last = is_channels_last(source) and is_channels_last(out)
    # Reads of 16 bytes bring more channels in fewer registers than reads of single numbers.
    most = 16 if exact else 80 if channels_last and source.element_size() == 2 else 32
    block_k, rest_k = depth_tiles(depth, most)
    stored = [t for t in (residual, preactivation, out) if t is not None]
    vector = vector_length(stored) if channels_last else 1
    launch(
        "group_conv_shuffle",
        out.device,
        _tuned_convolve[exact],
        lambda meta: (groups * triton.cdiv(rows, block_m + rest_m) * n * _patches(height, width, meta["BLOCK_P"]),),
        **arguments(source=source, residual=residual, preactivation=preactivation, out=out),
        weight=_pack(weight, groups, block_m + rest_m, block_k + rest_k, transposed),
        bias=bias,
        prelu=prelu,
        groups=groups,
        rows=rows,
        depth=depth,
        height=height,
        width=width,
        source_height=source.shape[2],
        source_width=source.shape[3],
        step=step,
        dilation=-dilation if transposed else dilation,
        scale_class=size_class(n * height * width),
        SHUFFLED=groups > 1 and not transposed,
        SPREAD=transposed and step > 1,
        ACC=accumulator(source),
        WIDE=needs_wide(source, out, residual),
        CHANNELS_LAST=channels_last,
        PRECISION="ieee" if exact else "tf32",
        SOURCE_VECTOR=_group_vector(source, depth) if channels_last else 1,
        OUT_VECTOR=vector if rows % vector == 0 else 1,
        BLOCK_M=block_m,
        REST_M=rest_m,
        BLOCK_K=block_k,
        REST_K=rest_k,
    )


def _patches(height: int, width: int, block_p: int) -> int:
    return triton.cdiv(height, block_p // PATCH_X.value) * triton.cdiv(width, PATCH_X.value)


def _pack(weight: Tensor, groups: int, tile_m: int, tile_k: int, transposed: bool) -> Tensor:
    """(9, groups, rows, depth), rows and depth filled up with zeros to whole tiles, so that no read needs a mask."""
    parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], 9)
    order = parts.permute(3, 0, 2, 1) if transposed else parts.permute(3, 0, 1, 2)
    rows, depth = order.shape[2:]
    packed = weight.new_zeros(9, groups, triton.cdiv(rows, tile_m) * tile_m, triton.cdiv(depth, tile_k) * tile_k)
    packed[:, :, :rows, :depth] = order
    return packed


def _undo_activation(
    grad_out: Tensor,
    preactivation: Tensor,
    input: Tensor,
    prelu_weight: Tensor | None,
    groups: int,
    *,
    inner: bool,
    bias: bool,
    prelu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the convolution's own output (also the residual's), of bias and of the slopes; empty where not
    wanted."""
    if not (inner or bias or prelu):
        return grad_out.new_empty(0), grad_out.new_empty(0), grad_out.new_empty(0)
    n, channels, height, width = grad_out.shape
    channels_last = is_channels_last(input) and channels > 1
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    grad_inner = torch.empty_like(grad_out, memory_format=layout) if inner else None
    block_c = channel_block(channels, channels_last)
    block = REDUCED // block_c
    programs = n * triton.cdiv(height * width, block)
    kind = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    # One row of sums for each program, added up afterwards in the same order every time.
    bias_sums = torch.empty((programs, channels), dtype=kind, device=grad_out.device) if bias else None
    prelu_sums = torch.empty((programs, channels), dtype=kind, device=grad_out.device) if prelu else None
    saved = preactivation if prelu_weight is not None else None
    launch(
        "group_conv_shuffle",
        grad_out.device,
        _activation_backward,
        (programs, triton.cdiv(channels, block_c)),
        **arguments(grad_out=grad_out, preactivation=saved, grad_inner=grad_inner),
        prelu=_dense(prelu_weight),
        bias_sums=bias_sums,
        prelu_sums=prelu_sums,
        channels=channels,
        groups=groups,
        height=height,
        width=width,
        ACC=accumulator(grad_out),
        WIDE=needs_wide(grad_out, saved, grad_inner),
        CHANNELS_LAST=channels_last,
        BLOCK_C=block_c,
        BLOCK=block,
    )
    return tuple(  # type: ignore[return-value]
        grad_out.new_empty(0) if found is None else found
        for found in (
            grad_inner,
            *(None if s is None else s.sum(0).to(grad_out.dtype) for s in (bias_sums, prelu_sums)),
        )
    )


def _group_vector(tensor: Tensor, channels: int) -> int:
    """`vector_length` where every group of channels begins at a whole vector, else 1."""
    length = vector_length((tensor,))
    return length if channels % length == 0 else 1


def _weight_gradient(
    grad_inner: Tensor, input: Tensor, weight: Tensor, groups: int, step: int, dilation: int
) -> Tensor:
    batch, channels, height, width = grad_inner.shape
    rows, depth = channels // groups, weight.shape[1]
    exact, channels_last = is_exact(input), is_channels_last(input)
    # Exact products keep both operands in registers: 32 x 32 of them spilled on sm_100.
    largest = (32, 16) if exact else (64, 64)
    block_m, block_n = (
        max(16, min(triton.next_power_of_2(size), most)) for size, most in zip((rows, depth), largest, strict=True)
    )
    parts = 9 * groups * triton.cdiv(rows, block_m) * triton.cdiv(depth, block_n)
    pixels_at_once = CHUNK // 2 if exact else CHUNK
    pieces = batch * height * triton.cdiv(width, pixels_at_once)
    run = triton.cdiv(pieces, max(1, FILL // parts))
    runs = triton.cdiv(pieces, run)
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    sums = torch.empty((runs, *weight.shape), dtype=kind, device=weight.device)
    launch(
        "group_conv_shuffle",
        weight.device,
        _weight_backward,
        (parts, runs),
        **arguments(source=input, grad_inner=grad_inner),
        weight_sums=sums,
        groups=groups,
        rows=rows,
        depth=depth,
        batch=batch,
        height=height,
        width=width,
        source_height=input.shape[2],
        source_width=input.shape[3],
        step=step,
        dilation=dilation,
        run=run,
        ACC=accumulator(input),
        WIDE=needs_wide(input, grad_inner, sums),
        CHANNELS_LAST=channels_last,
        PRECISION="ieee" if exact else "tf32",
        SOURCE_VECTOR=_group_vector(input, depth) if channels_last else 1,
        GRAD_VECTOR=_group_vector(grad_inner, rows) if channels_last else 1,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=pixels_at_once,
        num_stages=2,  # a third made ptxas spill
    )
    return sums.sum(0).to(weight.dtype)


def _nothing_flows(grad_out: Tensor, grad_input: Tensor, weight: Tensor, needed: dict[str, bool]) -> Any:
    """Gradients of a call without pixels."""
    shapes = {"weight": weight.shape, "bias": weight.shape[:1], "prelu_weight": weight.shape[:1]}
    wanted = [weight.new_zeros(shape if needed[name] else (0,)) for name, shape in shapes.items()]
    return grad_input.zero_(), *wanted, torch.zeros_like(grad_out) if needed["residual"] else grad_out.new_empty(0)
