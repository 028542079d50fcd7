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
from safnet_ops.triton.common import (
    FILL,
    accumulator,
    channel_block,
    jit,
    launch,
    needs_wide,
    offset,
    over_channels,
    over_pixels,
    pixel_block,
    size_class,
    stride,
    strides,
    sum_pixels,
    vector_length,
    vectors,
    with_strides,
)

# Tensor cores: 64 or 128 pixels against 48 to 128 rows keep an accumulator of at most 64 registers a thread.
TENSOR_CORE = [
    triton.Config({"BLOCK_P": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    triton.Config({"BLOCK_P": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    triton.Config({"BLOCK_P": 128, "BLOCK_K": 16}, num_warps=8, num_stages=4),  # 40 channels: 48 instead of 64
]
# Exact float32 and float64 multiply on the ordinary units, whose operands all sit in registers.
EXACT = [
    triton.Config({"BLOCK_P": 64, "BLOCK_K": 16}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK_P": 32, "BLOCK_K": 16}, num_warps=4, num_stages=2),
]
REDUCED = 1024  # pixels of one channel block that a program of the activation's backward sums
CHUNK = 32  # pixels in one step of the weight gradient


@triton.jit
def _load_weight(weight, tap, rows, m, k, depth, groups, group, VECTOR: tl.constexpr):
    """A block (rows of the group, depth) of one tap's weights, which are dense along the depth."""
    at = ((tap * groups + group) * rows + m)[:, None] * depth + k[None, :]
    mask = (m < rows)[:, None] & (k < depth // VECTOR * VECTOR)[None, :]
    return tl.load(vectors(weight, at, VECTOR), mask=mask, other=0.0)


@triton.jit
def _multiply(weights, pixels, sums, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    if CHANNELS_LAST:
        return tl.dot(pixels, tl.trans(weights), sums, input_precision=PRECISION, out_dtype=ACC)
    else:
        return tl.dot(weights, pixels, sums, input_precision=PRECISION, out_dtype=ACC)


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
    residual_strides,
    preactivation,
    preactivation_strides,
    out,
    out_strides,
    TRANSPOSED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACC: tl.constexpr,
):
    """Add bias and residual, keep the result if asked, apply PReLU, and store in shuffled order."""
    y, x = over_channels(y.to(n.dtype), CHANNELS_LAST), over_channels(x.to(n.dtype), CHANNELS_LAST)
    c = group * rows + m
    mask = over_channels(valid, CHANNELS_LAST) & over_pixels(m < rows, CHANNELS_LAST)
    tile_c = over_pixels(c, CHANNELS_LAST).to(n.dtype)
    if bias is not None:
        sums += over_pixels(tl.load(bias + c, mask=m < rows, other=0.0).to(ACC), CHANNELS_LAST)
    if residual is not None:
        sums += tl.load(residual + offset(n, tile_c, y, x, residual_strides), mask=mask, other=0.0).to(ACC)
    if preactivation is not None:
        kind: tl.constexpr = preactivation.dtype.element_ty
        tl.store(preactivation + offset(n, tile_c, y, x, preactivation_strides), sums.to(kind), mask=mask)
    if prelu is not None:
        slope = over_pixels(tl.load(prelu + c, mask=m < rows, other=0.0).to(ACC), CHANNELS_LAST)
        sums = tl.where(sums > 0, sums, slope * sums)
    if not TRANSPOSED:
        tile_c = over_pixels(m * groups + group, CHANNELS_LAST).to(n.dtype)
    tl.store(out + offset(n, tile_c, y, x, out_strides), sums.to(out.dtype.element_ty), mask=mask)


@jit
def _convolve(
    source,
    source_strides,
    weight,
    bias,
    prelu,
    residual,
    residual_strides,
    preactivation,
    preactivation_strides,
    out,
    out_strides,
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
    TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    SOURCE_VECTOR: tl.constexpr,
    WEIGHT_VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    REST_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`rows` output and `depth` input channels a group; `step` is the convolution's stride. Groups run fastest
    through the grid, so that the lines of memory that a shuffle shares among them meet in L2."""
    row_blocks = tl.cdiv(rows, BLOCK_M + REST_M)
    part = tl.program_id(0) % (groups * row_blocks)
    group, first_row = part % groups, part // groups * (BLOCK_M + REST_M)
    n, y, x, valid = pixel_block(tl.program_id(0) // (groups * row_blocks), height, width, BLOCK_P, WIDE)
    m = first_row + tl.arange(0, BLOCK_M)
    sums = tl.zeros([BLOCK_P, BLOCK_M] if CHANNELS_LAST else [BLOCK_M, BLOCK_P], ACC)
    if REST_M > 0:
        rest = first_row + BLOCK_M + tl.arange(0, REST_M)
        rest_sums = tl.zeros([BLOCK_P, REST_M] if CHANNELS_LAST else [REST_M, BLOCK_P], ACC)
    base = source + n * stride(source_strides, 0) + group.to(n.dtype) * depth * stride(source_strides, 1)
    depth_blocks = tl.cdiv(depth, BLOCK_K)
    row, column = y.to(tl.int32), x.to(tl.int32)  # only offsets ever need 64 bits
    for turn in range(0, 9 * depth_blocks):
        tap = turn // depth_blocks
        k = turn % depth_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            # The outputs that read pixel (y, x) through this tap: those at whole multiples of the stride.
            far_y, far_x = row + (1 - tap // 3) * dilation, column + (1 - tap % 3) * dilation
            from_y, from_x = far_y // step, far_x // step
            inside = valid & (far_y >= 0) & (far_x >= 0) & (far_y % step == 0) & (far_x % step == 0)
        else:
            from_y, from_x = row * step + (tap // 3 - 1) * dilation, column * step + (tap % 3 - 1) * dilation
            inside = valid & (from_y >= 0) & (from_x >= 0)
        inside = inside & (from_y < source_height) & (from_x < source_width)
        pixel = from_y.to(n.dtype) * stride(source_strides, 2) + from_x.to(n.dtype) * stride(source_strides, 3)
        at = over_channels(pixel, CHANNELS_LAST) + over_pixels(k.to(n.dtype) * stride(source_strides, 1), CHANNELS_LAST)
        mask = over_channels(inside, CHANNELS_LAST) & over_pixels(
            k < depth // SOURCE_VECTOR * SOURCE_VECTOR, CHANNELS_LAST
        )
        pixels = tl.load(vectors(base, at, SOURCE_VECTOR), mask=mask, other=0.0)
        weights = _load_weight(weight, tap, rows, m, k, depth, groups, group, WEIGHT_VECTOR)
        sums = _multiply(weights, pixels, sums, CHANNELS_LAST, ACC, PRECISION)
        if REST_M > 0:
            weights = _load_weight(weight, tap, rows, rest, k, depth, groups, group, WEIGHT_VECTOR)
            rest_sums = _multiply(weights, pixels, rest_sums, CHANNELS_LAST, ACC, PRECISION)
    _finish(
        *(sums, m, n, row, column, valid, rows, groups, group, bias, prelu, residual, residual_strides),
        *(preactivation, preactivation_strides, out, out_strides, TRANSPOSED, CHANNELS_LAST, ACC),
    )
    if REST_M > 0:
        _finish(
            *(rest_sums, rest, n, row, column, valid, rows, groups, group, bias, prelu, residual, residual_strides),
            *(preactivation, preactivation_strides, out, out_strides, TRANSPOSED, CHANNELS_LAST, ACC),
        )


@jit
def _activation_backward(
    grad,
    grad_strides,
    preactivation,
    preactivation_strides,
    prelu,
    inner_grad,
    inner_grad_strides,
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
    g = tl.load(grad + offset(n, shuffled, y, x, grad_strides), mask=mask, other=0.0).to(ACC)
    row = tl.program_id(0).to(n.dtype) * channels + channel
    if prelu is not None:
        before = tl.load(preactivation + offset(n, c, y, x, preactivation_strides), mask=mask, other=0.0).to(ACC)
        slope = over_pixels(tl.load(prelu + channel, mask=channel < channels, other=0.0).to(ACC), CHANNELS_LAST)
        if prelu_sums is not None:
            bent = sum_pixels(tl.where(before > 0, 0.0, g * before), CHANNELS_LAST)
            tl.store(prelu_sums + row, bent, mask=channel < channels)
        g = tl.where(before > 0, g, g * slope)
    if bias_sums is not None:
        tl.store(bias_sums + row, sum_pixels(g, CHANNELS_LAST), mask=channel < channels)
    if inner_grad is not None:
        value = g.to(inner_grad.dtype.element_ty)
        tl.store(inner_grad + offset(n, c, y, x, inner_grad_strides), value, mask=mask)


@triton.jit
def _walk(n, y, x, steps, height, width):
    """(n, y, x) of the pixel `steps` further on, in the order of rows and pictures; all divisions are 32 bits wide."""
    pixels = height.to(n.dtype) * width
    beyond = steps - tl.minimum(pixels - (y * width + x), 1 << 30).to(tl.int32)  # of this picture's last pixel
    whole = tl.minimum(pixels, 1 << 30).to(tl.int32)
    along = tl.where(beyond >= 0, beyond % whole, x.to(tl.int32) + steps)
    n += tl.where(beyond >= 0, beyond // whole + 1, 0)
    return n, tl.where(beyond >= 0, 0, y) + along // width, (along % width).to(n.dtype)


@jit
def _weight_backward(
    source,
    source_strides,
    inner_grad,
    inner_grad_strides,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tap's (rows, depth) weights of a group, summed over the program_id(1)-th run of `run` pixels of the batch."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    part = tl.program_id(0)
    tap, part = part % 9, part // 9
    group, part = part % groups, part // groups
    depth_blocks = tl.cdiv(depth, BLOCK_N)
    m = part // depth_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    k = part % depth_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    out_c, in_c = (group * rows + m).to(INDEX), (group * depth + k).to(INDEX)
    sums = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    pixels = height.to(INDEX) * width
    first = tl.program_id(1).to(INDEX) * run
    at_n, at_y, at_x = first // pixels, first % pixels // width, first % width
    for start in range(first, tl.minimum(first + run, batch * pixels), BLOCK_K):
        q = start + tl.arange(0, BLOCK_K)
        valid = q < batch * pixels
        if WIDE:
            n, y, x = _walk(at_n, at_y, at_x, tl.arange(0, BLOCK_K), height, width)
            at_n, at_y, at_x = _walk(at_n, at_y, at_x, BLOCK_K, height, width)
        else:
            n, y, x = q // pixels, q % pixels // width, q % width
        from_y, from_x = y * step + (tap // 3 - 1) * dilation, x * step + (tap % 3 - 1) * dilation
        inside = valid & (from_y >= 0) & (from_x >= 0) & (from_y < source_height) & (from_x < source_width)
        if CHANNELS_LAST:
            at = offset(n[:, None], out_c[None, :], y[:, None], x[:, None], inner_grad_strides)
            g = tl.trans(tl.load(inner_grad + at, mask=valid[:, None] & (m < rows)[None, :], other=0.0))
            at = offset(n[:, None], in_c[None, :], from_y[:, None], from_x[:, None], source_strides)
            values = tl.load(source + at, mask=inside[:, None] & (k < depth)[None, :], other=0.0)
        else:
            at = offset(n[None, :], out_c[:, None], y[None, :], x[None, :], inner_grad_strides)
            g = tl.load(inner_grad + at, mask=valid[None, :] & (m < rows)[:, None], other=0.0)
            at = offset(n[None, :], in_c[:, None], from_y[None, :], from_x[None, :], source_strides)
            values = tl.trans(tl.load(source + at, mask=inside[None, :] & (k < depth)[:, None], other=0.0))
        sums = tl.dot(g, values, sums, input_precision=PRECISION, out_dtype=ACC)
    # Each run owns a slice laid out like the weight itself.
    at = tl.program_id(1).to(INDEX) * (groups * rows * depth * 9) + (out_c[:, None] * depth + k[None, :]) * 9 + tap
    tl.store(weight_sums + at, sums, mask=(m < rows)[:, None] & (k < depth)[None, :])


_KEY = ["scale_class", "CHANNELS_LAST", "BLOCK_M", "REST_M", "TRANSPOSED"]
_tuned_convolve = {exact: triton.autotune(EXACT if exact else TENSOR_CORE, _KEY)(_convolve) for exact in (False, True)}


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
        packed = weight.permute(2, 3, 0, 1).contiguous()
        epilogue = (_dense(bias), _dense(prelu_weight), residual, saved)
        _run_convolution(input, packed, epilogue, out, (groups, stride, dilation), transposed=False)
    return out, preactivation


def group_conv_shuffle_backward(
    grad: Tensor,
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
    need_input, need_weight, need_bias, need_prelu, need_residual = (bool(needs >> bit & 1) for bit in range(5))
    input_grad = empty_gradient(input, need_input)
    if grad.numel() == 0 or input.numel() == 0:
        return _nothing_flows(grad, input_grad, weight, needs)
    inner_grad, bias_grad, prelu_grad = _undo_activation(
        grad,
        preactivation,
        input,
        prelu_weight,
        groups,
        inner=need_input or need_weight or need_residual,
        bias=need_bias,
        prelu=need_prelu,
    )
    weight_grad = weight.new_empty(0)
    if need_weight:
        weight_grad = _weight_gradient(inner_grad, input, weight, groups, stride, dilation)
    if need_input:
        rows, depth = weight.shape[0] // groups, weight.shape[1]
        packed = weight.view(groups, rows, depth, 3, 3).permute(3, 4, 0, 2, 1).contiguous()
        _run_convolution(inner_grad, packed, (None,) * 4, input_grad, (groups, stride, dilation), transposed=True)
    return input_grad, weight_grad, bias_grad, prelu_grad, inner_grad if need_residual else grad.new_empty(0)


def _dense(vector: Tensor | None) -> Tensor | None:
    """Kernels read bias and slopes with stride 1 (one slope of all channels comes with stride 0)."""
    return None if vector is None else vector.contiguous()


def _run_convolution(
    source: Tensor,
    packed: Tensor,
    epilogue: tuple[Tensor | None, ...],
    out: Tensor,
    geometry: tuple[int, int, int],
    *,
    transposed: bool,
) -> None:
    """Launch `_convolve`; `packed` holds (3, 3, groups * rows, depth) in whatever shape, `epilogue` bias to
    pre-activation."""
    groups, step, dilation = geometry
    n, channels, height, width = out.shape
    rows, depth = channels // groups, source.shape[1] // groups
    bias, prelu, residual, preactivation = epilogue
    exact = is_exact(source)
    block_m, rest_m = row_tiles(rows, 32 if exact else 128)
    parts = groups * triton.cdiv(rows, block_m + rest_m)
    channels_last = is_channels_last(source) and is_channels_last(out)
    dense = depth * packed.element_size() % 16 == 0
    launch(
        "group_conv_shuffle",
        out.device,
        _tuned_convolve[exact],
        lambda meta: (parts * n * triton.cdiv(height * width, meta["BLOCK_P"]),),
        *(source, strides(source), packed, bias, prelu),
        *with_strides(residual, preactivation, out),
        *(groups, rows, depth, height, width, *source.shape[2:], step, dilation, size_class(n * height * width)),
        TRANSPOSED=transposed,
        ACC=accumulator(source),
        WIDE=needs_wide(source, out, residual),
        CHANNELS_LAST=channels_last,
        PRECISION="ieee" if exact else "tf32",
        SOURCE_VECTOR=vector_length((source,)) if channels_last and dense else 1,
        WEIGHT_VECTOR=16 // packed.element_size() if dense else 1,
        BLOCK_M=block_m,
        REST_M=rest_m,
    )


def _undo_activation(
    grad: Tensor,
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
    n, channels, height, width = grad.shape
    channels_last = is_channels_last(input) and channels > 1
    layout = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    inner_grad = torch.empty_like(grad, memory_format=layout) if inner else None
    block_c = channel_block(channels, channels_last)
    block = REDUCED // block_c
    programs = n * triton.cdiv(height * width, block)
    kind = torch.float64 if grad.dtype == torch.float64 else torch.float32
    # One row of sums for each program, added up afterwards in the same order every time.
    bias_sums = torch.empty((programs, channels), dtype=kind, device=grad.device) if bias else None
    prelu_sums = torch.empty((programs, channels), dtype=kind, device=grad.device) if prelu else None
    saved = preactivation if prelu_weight is not None else None
    launch(
        "group_conv_shuffle",
        grad.device,
        _activation_backward,
        (programs, triton.cdiv(channels, block_c)),
        *(*with_strides(grad, saved), _dense(prelu_weight), *with_strides(inner_grad), bias_sums, prelu_sums),
        *(channels, groups, height, width),
        ACC=accumulator(grad),
        WIDE=needs_wide(grad, saved, inner_grad),
        CHANNELS_LAST=channels_last,
        BLOCK_C=block_c,
        BLOCK=block,
    )
    return tuple(  # type: ignore[return-value]
        grad.new_empty(0) if found is None else found
        for found in (inner_grad, *(None if s is None else s.sum(0).to(grad.dtype) for s in (bias_sums, prelu_sums)))
    )


def _weight_gradient(
    inner_grad: Tensor, input: Tensor, weight: Tensor, groups: int, step: int, dilation: int
) -> Tensor:
    batch, channels, height, width = inner_grad.shape
    rows, depth = channels // groups, weight.shape[1]
    exact = is_exact(input)
    # Exact products keep both operands in registers: 32 x 32 of them spilled on sm_100.
    largest = (32, 16) if exact else (64, 64)
    block_m, block_n = (
        max(16, min(triton.next_power_of_2(size), most)) for size, most in zip((rows, depth), largest, strict=True)
    )
    parts = 9 * groups * triton.cdiv(rows, block_m) * triton.cdiv(depth, block_n)
    pixels = batch * height * width
    run = triton.cdiv(triton.cdiv(pixels, max(1, FILL // parts)), CHUNK) * CHUNK
    runs = triton.cdiv(pixels, run)
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    sums = torch.empty((runs, *weight.shape), dtype=kind, device=weight.device)
    launch(
        "group_conv_shuffle",
        weight.device,
        _weight_backward,
        (parts, runs),
        *(*with_strides(input, inner_grad), sums),
        *(groups, rows, depth, batch, height, width, *input.shape[2:], step, dilation, run),
        ACC=accumulator(input),
        WIDE=needs_wide(input, inner_grad, sums),
        CHANNELS_LAST=is_channels_last(input),
        PRECISION="ieee" if exact else "tf32",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=CHUNK if not exact else CHUNK // 2,
    )
    return sums.sum(0).to(weight.dtype)


def _nothing_flows(grad: Tensor, input_grad: Tensor, weight: Tensor, needs: int) -> Any:
    """Gradients of a call without pixels."""
    wanted = [
        weight.new_zeros(shape if needs >> bit & 1 else 0)
        for bit, shape in ((1, weight.shape), (2, len(weight)), (3, len(weight)))
    ]
    return input_grad.zero_(), *wanted, torch.zeros_like(grad) if needs >> 4 & 1 else grad.new_empty(0)
