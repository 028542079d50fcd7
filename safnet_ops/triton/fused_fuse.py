"""fused_fuse in Triton: a program fuses a block of pixels, all channels, reading every input once.

Nothing is stored between forward and backward; backward gathers again, which costs less than keeping the warped
images would.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from safnet_ops.checks import empty_gradient, empty_image
from safnet_ops.operators import OPERATORS
from safnet_ops.triton.backward_warp import ImageGradient, backpropagate
from safnet_ops.triton.fusion import fuse, reweigh, triangle_weights
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
from safnet_ops.triton.sampling import point_where, sample, sample_with_slopes, sampling_point, scatter_corners
from safnet_ops.triton.tiles import load_tile, over_channels, over_pixels, pixel_block, store_tile, sum_channels

# One pixel a thread, with its gathers from all (up to four) channels in flight at once. A channels_last picture is read
# in the same way: its three channels share sectors, which stay in L1.
CONFIGS = [triton.Config({"BLOCK": 128}, num_warps=4), triton.Config({"BLOCK": 64}, num_warps=2)]

OPERATOR = OPERATORS["fused_fuse"]
SHORT, REFERENCE, LONG = (tl.constexpr(OPERATOR.bit(name)) for name in ("short", "reference", "long"))
FLOW_SHORT, FLOW_LONG = (tl.constexpr(OPERATOR.bit(name)) for name in ("flow_short", "flow_long"))
MASK_SHORT, MASK_LONG = (tl.constexpr(OPERATOR.bit(name)) for name in ("mask_short", "mask_long"))
REFERENCE_LDR = tl.constexpr(OPERATOR.bit("reference_ldr"))
WEIGHT_SHORT = tl.constexpr(OPERATOR.bit("weight_short"))
WEIGHT_REFERENCE = tl.constexpr(OPERATOR.bit("weight_reference"))
WEIGHT_LONG = tl.constexpr(OPERATOR.bit("weight_long"))


@triton.jit
def _load_mask(mask, strides, n, y, x, valid, LOGITS: tl.constexpr, ACC: tl.constexpr):
    """A mask at the pixels, in [0, 1]."""
    value = load_tile(mask, strides, n, 0, y, x, valid, ACC)
    return tl.sigmoid(value) if LOGITS else value


@triton.jit
def _store_flow_gradient(grad_flow, strides, n, y, x, slope_x, slope_y, inside, valid):
    inside_x, inside_y, _ = inside
    store_tile(grad_flow, strides, n, 0, y, x, tl.where(inside_x, slope_x, 0.0), valid)
    store_tile(grad_flow, strides, n, 1, y, x, tl.where(inside_y, slope_y, 0.0), valid)


@triton.jit
def _store_mask_gradient(grad_mask, strides, n, y, x, found, mask, valid, LOGITS: tl.constexpr):
    found *= mask * (1 - mask) if LOGITS else 1.0
    store_tile(grad_mask, strides, n, 0, y, x, found, valid)


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
    weight_short,
    weight_reference,
    weight_long,
    out,
    strides,
    channels,
    height,
    width,
    scale_class,
    LOGITS: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, y, x, valid = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    to_short, _ = sampling_point(flow_short, strides.flow_short, n, y, x, valid, height, width, False, ACC)
    to_long, _ = sampling_point(flow_long, strides.flow_long, n, y, x, valid, height, width, False, ACC)
    m_short = over_channels(_load_mask(mask_short, strides.mask_short, n, y, x, valid, LOGITS, ACC), False)
    m_long = over_channels(_load_mask(mask_long, strides.mask_long, n, y, x, valid, LOGITS, ACC), False)
    valid = over_channels(valid, False)
    y, x = over_channels(y, False), over_channels(x, False)
    for first in range(0, channels, BLOCK_C):
        c = over_pixels(first + tl.arange(0, BLOCK_C), False).to(n.dtype)
        mask = valid & (c < channels)
        v_short = sample(short, strides.short, n, c, to_short, mask, 1, ACC)
        v_long = sample(long, strides.long, n, c, to_long, mask, 1, ACC)
        v_reference = load_tile(reference, strides.reference, n, c, y, x, mask, ACC)
        if reference_ldr is None:
            base_short = load_tile(weight_short, strides.weight_short, n, c, y, x, mask, ACC)
            base_reference = load_tile(weight_reference, strides.weight_reference, n, c, y, x, mask, ACC)
            base_long = load_tile(weight_long, strides.weight_long, n, c, y, x, mask, ACC)
        else:
            z = load_tile(reference_ldr, strides.reference_ldr, n, c, y, x, mask, ACC)
            base_short, base_reference, base_long = triangle_weights(z)
        fused = fuse(v_short, v_reference, v_long, base_short, base_reference, base_long, m_short, m_long)
        store_tile(out, strides.out, n, c, y, x, fused, mask)


@jit
def _backward(
    grad_out,
    short,
    reference,
    long,
    flow_short,
    flow_long,
    mask_short,
    mask_long,
    reference_ldr,
    weight_short,
    weight_reference,
    weight_long,
    grad_short,
    grad_reference,
    grad_long,
    grad_flow_short,
    grad_flow_long,
    grad_mask_short,
    grad_mask_long,
    grad_reference_ldr,
    grad_weight_short,
    grad_weight_reference,
    grad_weight_long,
    strides,
    channels,
    height,
    width,
    scale_class,
    NEEDS: tl.constexpr,
    SCATTER: tl.constexpr,
    LOGITS: tl.constexpr,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """NEEDS has the operator's bits; loads that only serve other gradients are dropped by the compiler.

    Without SCATTER, `grad_short` and `grad_long` receive the gradients of the warped images, to be scattered afterwards.
    """
    n, row, column, valid = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    to_short, inside_short = sampling_point(
        flow_short, strides.flow_short, n, row, column, valid, height, width, False, ACC
    )
    to_long, inside_long = sampling_point(
        flow_long, strides.flow_long, n, row, column, valid, height, width, False, ACC
    )
    pixel_mask_short = _load_mask(mask_short, strides.mask_short, n, row, column, valid, LOGITS, ACC)
    pixel_mask_long = _load_mask(mask_long, strides.mask_long, n, row, column, valid, LOGITS, ACC)
    # Where a flow or a mask is NaN, the result is NaN whatever the inputs, and passes no gradient on: all is read as zero.
    _, _, known_short = inside_short
    _, _, known_long = inside_long
    counts = valid & known_short & known_long
    counts &= (pixel_mask_short == pixel_mask_short) & (pixel_mask_long == pixel_mask_long)
    pixel_mask_short, pixel_mask_long = tl.where(counts, pixel_mask_short, 0.0), tl.where(counts, pixel_mask_long, 0.0)
    m_short, m_long = over_channels(pixel_mask_short, False), over_channels(pixel_mask_long, False)
    valid_tile, counts = over_channels(valid, False), over_channels(counts, False)
    to_short, to_long = point_where(counts, to_short), point_where(counts, to_long)
    y, x = over_channels(row, False), over_channels(column, False)
    x_short, y_short = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    x_long, y_long = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    by_mask_short, by_mask_long = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for first in range(0, channels):
        c = over_pixels(first + tl.arange(0, 1), False).to(n.dtype)  # one at a time: four take 255 registers and spill
        mask, read = valid_tile & (c < channels), counts & (c < channels)
        v_short, across_short, down_short = sample_with_slopes(short, strides.short, n, c, to_short, read, 1, ACC)
        v_long, across_long, down_long = sample_with_slopes(long, strides.long, n, c, to_long, read, 1, ACC)
        v_reference = load_tile(reference, strides.reference, n, c, y, x, read, ACC)
        if reference_ldr is None:
            base_short = load_tile(weight_short, strides.weight_short, n, c, y, x, read, ACC)
            base_reference = load_tile(weight_reference, strides.weight_reference, n, c, y, x, read, ACC)
            base_long = load_tile(weight_long, strides.weight_long, n, c, y, x, read, ACC)
        else:
            z = load_tile(reference_ldr, strides.reference_ldr, n, c, y, x, read, ACC)
            base_short, base_reference, base_long = triangle_weights(z)
        of_short, of_reference, of_long, total = reweigh(base_short, base_reference, base_long, m_short, m_long)
        fused = (of_short * v_short + of_reference * v_reference + of_long * v_long) / total
        share = load_tile(grad_out, strides.grad_out, n, c, y, x, read, ACC) / total
        # d fused / d weight = (picture - fused) / total, since the weights stand above and below the fraction's line.
        by_short, by_long = share * (v_short - fused), share * (v_long - fused)
        by_reference = share * (v_reference - fused)
        warped_short, warped_long = share * of_short, share * of_long  # gradients of the warped images
        if NEEDS & SHORT:
            if SCATTER:
                scatter_corners(grad_short, None, strides.grad_short, n, c, to_short, warped_short, 0.0, read, False)
            else:
                store_tile(grad_short, strides.grad_short, n, c, y, x, warped_short, mask)
        if NEEDS & REFERENCE:
            store_tile(grad_reference, strides.grad_reference, n, c, y, x, share * of_reference, mask)
        if NEEDS & LONG:
            if SCATTER:
                scatter_corners(grad_long, None, strides.grad_long, n, c, to_long, warped_long, 0.0, read, False)
            else:
                store_tile(grad_long, strides.grad_long, n, c, y, x, warped_long, mask)
        if NEEDS & FLOW_SHORT:
            x_short += sum_channels(tl.where(mask, warped_short * across_short, 0.0), False)
            y_short += sum_channels(tl.where(mask, warped_short * down_short, 0.0), False)
        if NEEDS & FLOW_LONG:
            x_long += sum_channels(tl.where(mask, warped_long * across_long, 0.0), False)
            y_long += sum_channels(tl.where(mask, warped_long * down_long, 0.0), False)
        if NEEDS & MASK_SHORT:
            by_mask_short += sum_channels(tl.where(mask, base_short * (by_short - by_reference), 0.0), False)
        if NEEDS & MASK_LONG:
            by_mask_long += sum_channels(tl.where(mask, base_long * (by_long - by_reference), 0.0), False)
        by_base_short = by_short * m_short + by_reference * (1 - m_short)
        by_base_long = by_long * m_long + by_reference * (1 - m_long)
        if NEEDS & REFERENCE_LDR:
            # Torch's conventions at the kinks: clamp passes the gradient at its bound, abs has slope 0 at 0.
            bend = tl.where(z > 0.5, 1.0, 0.0) - tl.where(z < 0.5, 1.0, 0.0)
            rise = tl.where(z >= 0.5, by_base_short, 0.0) - tl.where(z <= 0.5, by_base_long, 0.0) - bend * by_reference
            store_tile(grad_reference_ldr, strides.grad_reference_ldr, n, c, y, x, 2 * rise, mask)
        if NEEDS & WEIGHT_SHORT:
            store_tile(grad_weight_short, strides.grad_weight_short, n, c, y, x, by_base_short, mask)
        if NEEDS & WEIGHT_REFERENCE:
            store_tile(grad_weight_reference, strides.grad_weight_reference, n, c, y, x, by_reference, mask)
        if NEEDS & WEIGHT_LONG:
            store_tile(grad_weight_long, strides.grad_weight_long, n, c, y, x, by_base_long, mask)
    if NEEDS & FLOW_SHORT:
        _store_flow_gradient(
            grad_flow_short, strides.grad_flow_short, n, row, column, x_short, y_short, inside_short, valid
        )
    if NEEDS & FLOW_LONG:
        _store_flow_gradient(grad_flow_long, strides.grad_flow_long, n, row, column, x_long, y_long, inside_long, valid)
    if NEEDS & MASK_SHORT:
        at = strides.grad_mask_short
        _store_mask_gradient(grad_mask_short, at, n, row, column, by_mask_short, pixel_mask_short, valid, LOGITS)
    if NEEDS & MASK_LONG:
        at = strides.grad_mask_long
        _store_mask_gradient(grad_mask_long, at, n, row, column, by_mask_long, pixel_mask_long, valid, LOGITS)


_tuned_forward = autotune(_forward, CONFIGS, ["scale_class"])
_tuned_backward = autotune(_backward, CONFIGS, ["scale_class", "NEEDS", "SCATTER"], sums=["grad_short", "grad_long"])


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
    tensors = {
        "short": short,
        "reference": reference,
        "long": long,
        "flow_short": flow_short,
        "flow_long": flow_long,
        "mask_short": mask_short,
        "mask_long": mask_long,
        "reference_ldr": reference_ldr,
        "weight_short": weight_short,
        "weight_reference": weight_reference,
        "weight_long": weight_long,
        "out": out,
    }
    grid, switches = _tiling(short, tensors, mask_logits)
    switches["BLOCK_C"] = channel_block(short.shape[1], False)
    launch("fused_fuse", short.device, _tuned_forward, grid, **arguments(**tensors), **switches)
    return out


def fused_fuse_backward(
    grad_out: Tensor,
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
    inputs: dict[str, Tensor | None] = {
        "short": short,
        "reference": reference,
        "long": long,
        "flow_short": flow_short,
        "flow_long": flow_long,
        "mask_short": mask_short,
        "mask_long": mask_long,
        "reference_ldr": reference_ldr,
        "weight_short": weight_short,
        "weight_reference": weight_reference,
        "weight_long": weight_long,
    }
    needed = {name: bool(needs & OPERATOR.bit(name)) for name in inputs}

    def gradient(name: str) -> Tensor:
        tensor = inputs[name]
        return grad_out.new_empty(0) if tensor is None else empty_gradient(tensor, needed[name])

    if short.numel() == 0 or needs == 0:
        return tuple(gradient(name).zero_() for name in inputs)
    # The deterministic variant stores what each pixel would scatter, and leaves the scattering to backward_warp's integers.
    scattered = {name: image for name, image in (("short", short), ("long", long)) if needed[name]}
    grads = {
        name: empty_image(scattered[name], dtype=compute_type(short)) if name in scattered else gradient(name)
        for name in inputs
    }
    if not deterministic:
        for name in scattered:
            grads[name].zero_()
    stored = {f"grad_{name}": found if needed[name] else None for name, found in grads.items()}
    tensors = {"grad_out": grad_out, **inputs, **stored}
    grid, switches = _tiling(short, tensors, mask_logits)
    switches |= {"NEEDS": needs, "SCATTER": not deterministic}
    launch("fused_fuse", short.device, _tuned_backward, grid, **arguments(**tensors), **switches)
    flows = {"short": flow_short, "long": flow_long}
    for name, image in scattered.items():
        found = grads[name]
        grads[name] = _scatter(found, image, flows[name]) if deterministic else found.to(short.dtype)
    return tuple(grads.values())


def _scatter(grad_warped: Tensor, image: Tensor, flow: Tensor) -> Tensor:
    total = ImageGradient(image, grad_warped, deterministic=True)
    backpropagate(grad_warped, image, flow, total, None, operator="fused_fuse")
    return total.result()


def _tiling(short: Tensor, tensors: dict[str, Tensor | None], logits: bool) -> tuple[Any, dict[str, Any]]:
    """The launch grid, and the arguments that both kernels take beside tensors."""
    n, channels, height, width = short.shape
    switches = {
        "channels": channels,
        "height": height,
        "width": width,
        "scale_class": size_class(n * height * width),
        "LOGITS": logits,
        "ACC": accumulator(short),
        "WIDE": needs_wide(*tensors.values()),
    }
    return lambda meta: (n * triton.cdiv(height * width, meta["BLOCK"]),), switches
