"""fused_fuse in Triton: a program fuses a block of pixels, all channels, reading every input once.

Nothing is stored between forward and backward; backward gathers again, which costs less than keeping the warped
images would.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from safnet_ops.checks import empty_gradient, empty_image
from safnet_ops.triton.backward_warp import ImageGradient, backpropagate
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
    sampling_point,
    scatter_corners,
    size_class,
    slopes,
    stride,
    sum_channels,
    with_strides,
)
from safnet_ops.triton.fusion import fuse, reweigh, triangle_weights

# One pixel a thread, with its gathers from all (up to four) channels in flight at once. A channels_last picture is read
# in the same way: its three channels share sectors, which stay in L1.
CONFIGS = [triton.Config({"BLOCK": 128}, num_warps=4), triton.Config({"BLOCK": 64}, num_warps=2)]


@triton.jit
def _load(tensor, strides, n, c, y, x, mask, ACC: tl.constexpr):
    """A tile of a picture at the program's own pixels; rows and columns come as tiles with one channel."""
    return tl.load(tensor + offset(n, c, y, x, strides), mask=mask, other=0.0).to(ACC)


@triton.jit
def _store(tensor, strides, n, c, y, x, value, mask):
    tl.store(tensor + offset(n, c, y, x, strides), value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def _load_mask(mask, strides, n, y, x, valid, LOGITS: tl.constexpr, ACC: tl.constexpr):
    """A mask at the pixels, in [0, 1]."""
    value = tl.load(mask + offset(n, 0, y, x, strides), mask=valid, other=0.0).to(ACC)
    return tl.sigmoid(value) if LOGITS else value


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
    base0,
    base0_strides,
    base1,
    base1_strides,
    base2,
    base2_strides,
    out,
    out_strides,
    channels,
    height,
    width,
    scale_class,
    EXPLICIT: tl.constexpr,
    LOGITS: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`base0` is the reference's LDR value, or with EXPLICIT `base0` to `base2` are the weights."""
    n, y, x, valid = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    top_s, bottom_s, left_s, right_s, fx_s, fy_s, _, _ = sampling_point(
        flow_short, flow_short_strides, n, y, x, valid, height, width, False, ACC
    )
    top_l, bottom_l, left_l, right_l, fx_l, fy_l, _, _ = sampling_point(
        flow_long, flow_long_strides, n, y, x, valid, height, width, False, ACC
    )
    trust_s = over_channels(_load_mask(mask_short, mask_short_strides, n, y, x, valid, LOGITS, ACC), False)
    trust_l = over_channels(_load_mask(mask_long, mask_long_strides, n, y, x, valid, LOGITS, ACC), False)
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
        still = _load(reference, reference_strides, n, c, y, x, mask, ACC)
        base_s = _load(base0, base0_strides, n, c, y, x, mask, ACC)
        if EXPLICIT:
            base_r = _load(base1, base1_strides, n, c, y, x, mask, ACC)
            base_l = _load(base2, base2_strides, n, c, y, x, mask, ACC)
        else:
            base_s, base_r, base_l = triangle_weights(base_s)
        fused = fuse(warped_short, still, warped_long, base_s, base_r, base_l, trust_s, trust_l)
        _store(out, out_strides, n, c, y, x, fused, mask)


@jit
def _backward(
    grad,
    grad_strides,
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
    base0,
    base0_strides,
    base1,
    base1_strides,
    base2,
    base2_strides,
    short_sums,
    short_sums_strides,
    reference_grad,
    reference_grad_strides,
    long_sums,
    long_sums_strides,
    flow_short_grad,
    flow_short_grad_strides,
    flow_long_grad,
    flow_long_grad_strides,
    mask_short_grad,
    mask_short_grad_strides,
    mask_long_grad,
    mask_long_grad_strides,
    base0_grad,
    base0_grad_strides,
    base1_grad,
    base1_grad_strides,
    base2_grad,
    base2_grad_strides,
    channels,
    height,
    width,
    scale_class,
    NEEDS: tl.constexpr,
    SCATTER: tl.constexpr,
    EXPLICIT: tl.constexpr,
    LOGITS: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """NEEDS has one bit for each input, as in the operator; loads that only serve other gradients are dropped by
    the compiler.

    Without SCATTER, `short_sums` and `long_sums` receive the gradients of the warped images, to be scattered
    afterwards.
    """
    n, y_pixel, x_pixel, valid_pixel = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    top_s, bottom_s, left_s, right_s, fx_s, fy_s, inside_x_s, inside_y_s = sampling_point(
        flow_short, flow_short_strides, n, y_pixel, x_pixel, valid_pixel, height, width, False, ACC
    )
    top_l, bottom_l, left_l, right_l, fx_l, fy_l, inside_x_l, inside_y_l = sampling_point(
        flow_long, flow_long_strides, n, y_pixel, x_pixel, valid_pixel, height, width, False, ACC
    )
    mask_s = _load_mask(mask_short, mask_short_strides, n, y_pixel, x_pixel, valid_pixel, LOGITS, ACC)
    mask_l = _load_mask(mask_long, mask_long_strides, n, y_pixel, x_pixel, valid_pixel, LOGITS, ACC)
    trust_s, trust_l = over_channels(mask_s, False), over_channels(mask_l, False)
    valid = over_channels(valid_pixel, False)
    y, x = over_channels(y_pixel, False), over_channels(x_pixel, False)
    slope_x_s, slope_y_s = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    slope_x_l, slope_y_l = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    trust_grad_s, trust_grad_l = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for first in range(0, channels):
        c = over_pixels(first + tl.arange(0, 1), False).to(n.dtype)  # one at a time: four take 255 registers and spill
        mask = valid & (c < channels)
        at = n * stride(short_strides, 0) + c * stride(short_strides, 1)
        v00, v01, v10, v11 = load_corners(short, at, top_s, bottom_s, left_s, right_s, short_strides, mask, 1, ACC)
        warped_short = interpolate(v00, v01, v10, v11, fx_s, fy_s)
        across_s, down_s = slopes(v00, v01, v10, v11, fx_s, fy_s)
        at = n * stride(long_strides, 0) + c * stride(long_strides, 1)
        v00, v01, v10, v11 = load_corners(long, at, top_l, bottom_l, left_l, right_l, long_strides, mask, 1, ACC)
        warped_long = interpolate(v00, v01, v10, v11, fx_l, fy_l)
        across_l, down_l = slopes(v00, v01, v10, v11, fx_l, fy_l)
        still = _load(reference, reference_strides, n, c, y, x, mask, ACC)
        z = _load(base0, base0_strides, n, c, y, x, mask, ACC)
        if EXPLICIT:
            base_s = z
            base_r = _load(base1, base1_strides, n, c, y, x, mask, ACC)
            base_l = _load(base2, base2_strides, n, c, y, x, mask, ACC)
        else:
            base_s, base_r, base_l = triangle_weights(z)
        weight_s, weight_r, weight_l, total = reweigh(base_s, base_r, base_l, trust_s, trust_l)
        fused = (weight_s * warped_short + weight_r * still + weight_l * warped_long) / total
        share = _load(grad, grad_strides, n, c, y, x, mask, ACC) / total
        # d fused / d weight_i = (picture_i - fused) / total, since the weights stand above and below the
        # fraction's line.
        weight_grad_s, weight_grad_l = share * (warped_short - fused), share * (warped_long - fused)
        weight_grad_r = share * (still - fused)
        short_grad, long_grad = share * weight_s, share * weight_l
        if NEEDS & 1:
            at = n * stride(short_sums_strides, 0) + c * stride(short_sums_strides, 1)
            if SCATTER:
                scatter_corners(
                    *(short_sums, None, at, top_s, bottom_s, left_s, right_s, fx_s, fy_s, short_sums_strides),
                    *(short_grad, 0.0, mask, False),
                )
            else:
                _store(short_sums, short_sums_strides, n, c, y, x, short_grad, mask)
        if NEEDS & 2:
            _store(reference_grad, reference_grad_strides, n, c, y, x, share * weight_r, mask)
        if NEEDS & 4:
            at = n * stride(long_sums_strides, 0) + c * stride(long_sums_strides, 1)
            if SCATTER:
                scatter_corners(
                    *(long_sums, None, at, top_l, bottom_l, left_l, right_l, fx_l, fy_l, long_sums_strides),
                    *(long_grad, 0.0, mask, False),
                )
            else:
                _store(long_sums, long_sums_strides, n, c, y, x, long_grad, mask)
        if NEEDS & 8:
            slope_x_s += sum_channels(tl.where(mask, short_grad * across_s, 0.0), False)
            slope_y_s += sum_channels(tl.where(mask, short_grad * down_s, 0.0), False)
        if NEEDS & 16:
            slope_x_l += sum_channels(tl.where(mask, long_grad * across_l, 0.0), False)
            slope_y_l += sum_channels(tl.where(mask, long_grad * down_l, 0.0), False)
        if NEEDS & 32:
            trust_grad_s += sum_channels(tl.where(mask, base_s * (weight_grad_s - weight_grad_r), 0.0), False)
        if NEEDS & 64:
            trust_grad_l += sum_channels(tl.where(mask, base_l * (weight_grad_l - weight_grad_r), 0.0), False)
        base_grad_s = weight_grad_s * trust_s + weight_grad_r * (1 - trust_s)
        base_grad_l = weight_grad_l * trust_l + weight_grad_r * (1 - trust_l)
        if NEEDS & 128:
            # Torch's conventions at the kinks: clamp passes the gradient at its bound, abs has slope 0 at 0.
            bend = tl.where(z > 0.5, 1.0, 0.0) - tl.where(z < 0.5, 1.0, 0.0)
            rise = tl.where(z >= 0.5, base_grad_s, 0.0) - tl.where(z <= 0.5, base_grad_l, 0.0) - bend * weight_grad_r
            _store(base0_grad, base0_grad_strides, n, c, y, x, 2 * rise, mask)
        if NEEDS & 256:
            _store(base0_grad, base0_grad_strides, n, c, y, x, base_grad_s, mask)
        if NEEDS & 512:
            _store(base1_grad, base1_grad_strides, n, c, y, x, weight_grad_r, mask)
        if NEEDS & 1024:
            _store(base2_grad, base2_grad_strides, n, c, y, x, base_grad_l, mask)
    if NEEDS & 8:
        slope_x_s, slope_y_s = tl.where(inside_x_s, slope_x_s, 0.0), tl.where(inside_y_s, slope_y_s, 0.0)
        _store(flow_short_grad, flow_short_grad_strides, n, 0, y_pixel, x_pixel, slope_x_s, valid_pixel)
        _store(flow_short_grad, flow_short_grad_strides, n, 1, y_pixel, x_pixel, slope_y_s, valid_pixel)
    if NEEDS & 16:
        slope_x_l, slope_y_l = tl.where(inside_x_l, slope_x_l, 0.0), tl.where(inside_y_l, slope_y_l, 0.0)
        _store(flow_long_grad, flow_long_grad_strides, n, 0, y_pixel, x_pixel, slope_x_l, valid_pixel)
        _store(flow_long_grad, flow_long_grad_strides, n, 1, y_pixel, x_pixel, slope_y_l, valid_pixel)
    if NEEDS & 32:
        trust_grad_s *= mask_s * (1 - mask_s) if LOGITS else 1.0
        _store(mask_short_grad, mask_short_grad_strides, n, 0, y_pixel, x_pixel, trust_grad_s, valid_pixel)
    if NEEDS & 64:
        trust_grad_l *= mask_l * (1 - mask_l) if LOGITS else 1.0
        _store(mask_long_grad, mask_long_grad_strides, n, 0, y_pixel, x_pixel, trust_grad_l, valid_pixel)


_tuned_forward = triton.autotune(CONFIGS, ["scale_class"])(_forward)
# Tuning runs the kernel many times: what it adds to is zeroed before each run, the last one included.
_tuned_backward = triton.autotune(
    CONFIGS,
    ["scale_class", "NEEDS", "SCATTER"],
    reset_to_zero=["short_sums", "long_sums"],
)(_backward)


def fused_fuse(
    short: Tensor,
    reference: Tensor,
    long: Tensor,
    flow_short: Tensor,
    flow_long: Tensor,
    mask_short: Tensor,
    mask_long: Tensor,
    reference_ldr: Tensor | None,
    weight_short: Tensor | None,
    weight_reference: Tensor | None,
    weight_long: Tensor | None,
    mask_logits: bool,
) -> Tensor:
    out = empty_image(short)
    if out.numel() == 0:
        return out
    geometry = (flow_short, flow_long, mask_short, mask_long)
    base = (weight_short if reference_ldr is None else reference_ldr, weight_reference, weight_long)
    tensors = (short, reference, long, *geometry, *base, out)
    grid, switches = _tiling(short, tensors, reference_ldr is None, mask_logits)
    launch(
        "fused_fuse",
        short.device,
        _tuned_forward,
        grid,
        *with_strides(*tensors),
        **switches,
        BLOCK_C=channel_block(short.shape[1], False),
    )
    return out


def fused_fuse_backward(
    grad: Tensor,
    short: Tensor,
    reference: Tensor,
    long: Tensor,
    flow_short: Tensor,
    flow_long: Tensor,
    mask_short: Tensor,
    mask_long: Tensor,
    reference_ldr: Tensor | None,
    weight_short: Tensor | None,
    weight_reference: Tensor | None,
    weight_long: Tensor | None,
    mask_logits: bool,
    needs: int,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    images = (short, reference, long)
    geometry = (flow_short, flow_long, mask_short, mask_long)
    inputs = (*images, *geometry, reference_ldr, weight_short, weight_reference, weight_long)
    # Whole-image gradients that are scattered are allocated where they are added up.
    stored = needs & ~0b101
    grads = [
        grad.new_empty(0) if tensor is None else empty_gradient(tensor, bool(stored >> position & 1))
        for position, tensor in enumerate(inputs)
    ]
    if short.numel() == 0 or needs == 0:
        return tuple(
            g if t is None else empty_gradient(t, bool(needs >> i & 1)).zero_()
            for i, (g, t) in enumerate(zip(grads, inputs, strict=True))
        )
    sums: dict[int, Tensor] = {}
    for position in (0, 2):
        if needs >> position & 1:
            warped = empty_image(images[position], dtype=compute_type(short))
            sums[position] = warped if deterministic else warped.zero_()
    base = (weight_short if reference_ldr is None else reference_ldr, weight_reference, weight_long)
    base_grads = (grads[8] if reference_ldr is None else grads[7], grads[9], grads[10])
    outputs = (sums.get(0), grads[1], sums.get(2), *grads[3:7], *base_grads)
    tensors = (grad, *images, *geometry, *base, *(None if t is None or t.numel() == 0 else t for t in outputs))
    grid, switches = _tiling(short, tensors, reference_ldr is None, mask_logits)
    # The deterministic variant stores what each pixel would scatter, and leaves the scattering to backward_warp's
    # integers.
    switches |= {"NEEDS": needs, "SCATTER": not deterministic}
    launch("fused_fuse", short.device, _tuned_backward, grid, *with_strides(*tensors), **switches)
    for position, found in sums.items():
        grads[position] = (
            found.to(short.dtype) if not deterministic else _scatter(found, images[position], geometry[position // 2])
        )
    return tuple(grads)


def _scatter(warped_grad: Tensor, image: Tensor, flow: Tensor) -> Tensor:
    total = ImageGradient(image, warped_grad, deterministic=True)
    backpropagate(warped_grad, image, flow, total, None, operator="fused_fuse")
    return total.result()


def _tiling(
    short: Tensor, tensors: tuple[Tensor | None, ...], explicit: bool, logits: bool
) -> tuple[Any, dict[str, Any]]:
    """The launch grid, and the arguments that both kernels take after their tensors."""
    n, channels, height, width = short.shape
    switches = {
        "channels": channels,
        "height": height,
        "width": width,
        "scale_class": size_class(n * height * width),
        "EXPLICIT": explicit,
        "LOGITS": logits,
        "ACC": accumulator(short),
        "WIDE": needs_wide(*tensors),
    }
    return lambda meta: (n * triton.cdiv(height * width, meta["BLOCK"]),), switches
