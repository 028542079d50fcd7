"""census_loss in Triton: grey planes, then every pair of neighbours compared once; no patch is ever stored.

The distance of a pair does not depend on which of the two pixels is the centre, so forward visits half of each
window and
counts a pair once for each end whose window lies inside the picture. Backward gathers the whole window instead of
scattering halves. So neither needs atomics, and both repeat to the bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from safnet_ops.checks import empty_image
from safnet_ops.triton.launching import (
    accumulator,
    arguments,
    autotune,
    compute_type,
    jit,
    launch,
    needs_wide,
    size_class,
)
from safnet_ops.triton.tiles import load_tile, pixel_block, store_tile

SOFTNESS = tl.constexpr(0.81)  # as in safnet_ops.reference
KNEE = tl.constexpr(0.1)

# One or two pixels a thread: the window's neighbours come from L1, two planes of them.
CONFIGS = [triton.Config({"BLOCK": 256}, num_warps=4), triton.Config({"BLOCK": 128}, num_warps=4)]
KEY = ["scale_class", "PATCH"]


@jit
def _grey(
    prediction,
    target,
    strides,
    grey_prediction,
    grey_target,
    channels,
    height,
    width,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean over the channels of both pictures."""
    n, y, x, valid = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    sum_prediction, sum_target = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for c in range(channels):
        sum_prediction += load_tile(prediction, strides.prediction, n, c, y, x, valid, ACC)
        sum_target += load_tile(target, strides.target, n, c, y, x, valid, ACC)
    at = (n * height + y) * width + x
    tl.store(grey_prediction + at, sum_prediction / channels.to(ACC), mask=valid)
    tl.store(grey_target + at, sum_target / channels.to(ACC), mask=valid)


@triton.jit
def _is_inside(y, x, height, width, RADIUS: tl.constexpr):
    """Whether the window around a pixel lies inside the picture."""
    return (y >= RADIUS) & (y < height - RADIUS) & (x >= RADIUS) & (x < width - RADIUS)


@triton.jit
def _neighbour(y, x, valid, k, height, width, PATCH: tl.constexpr):
    """(distance in memory, whether to compare, how many windows count the pair) of the window's k-th pixel."""
    RADIUS: tl.constexpr = PATCH // 2
    down, right = k // PATCH - RADIUS, k % PATCH - RADIUS
    here = _is_inside(y, x, height, width, RADIUS)
    there = _is_inside(y + down, x + right, height, width, RADIUS)
    # One inside window is enough for both pixels to lie in the picture.
    return down * width + right, valid & (here | there), here.to(tl.int32) + there.to(tl.int32)


@jit
def _forward(
    grey_prediction,
    grey_target,
    partial_sums,
    height,
    width,
    scale_class,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, y, x, valid = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    at = (n * height + y) * width + x
    own_prediction = tl.load(grey_prediction + at, mask=valid, other=0.0)
    own_target = tl.load(grey_target + at, mask=valid, other=0.0)
    total = tl.zeros([BLOCK], ACC)
    for k in range(PATCH * PATCH // 2 + 1, PATCH * PATCH):
        move, use, count = _neighbour(y, x, valid, k, height, width, PATCH)
        d_prediction = tl.load(grey_prediction + at + move, mask=use, other=0.0) - own_prediction
        d_target = tl.load(grey_target + at + move, mask=use, other=0.0) - own_target
        difference = d_prediction * tl.rsqrt(SOFTNESS + d_prediction * d_prediction)
        difference -= d_target * tl.rsqrt(SOFTNESS + d_target * d_target)
        squared = difference * difference
        total += tl.where(use, count.to(ACC) * (squared / (KNEE + squared)), 0.0)
    tl.store(partial_sums + tl.program_id(0), tl.sum(total))


@jit
def _backward(
    grey_prediction,
    grey_target,
    scale,
    grad_prediction,
    strides,
    channels,
    height,
    width,
    scale_class,
    ACC: tl.constexpr,
    WIDE: tl.constexpr,
    PATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, y, x, valid = pixel_block(tl.program_id(0), height, width, BLOCK, WIDE)
    at = (n * height + y) * width + x
    own_prediction = tl.load(grey_prediction + at, mask=valid, other=0.0)
    own_target = tl.load(grey_target + at, mask=valid, other=0.0)
    total = tl.zeros([BLOCK], ACC)
    for k in range(PATCH * PATCH):
        move, use, count = _neighbour(y, x, valid, k, height, width, PATCH)
        d_prediction = tl.load(grey_prediction + at + move, mask=use, other=0.0) - own_prediction
        d_target = tl.load(grey_target + at + move, mask=use, other=0.0) - own_target
        root = tl.rsqrt(SOFTNESS + d_prediction * d_prediction)
        difference = d_prediction * root - d_target * tl.rsqrt(SOFTNESS + d_target * d_target)
        bounded = KNEE + difference * difference
        # d distance / d difference, times d normalised / d d; the own pixel enters d with a minus sign.
        slope = 2 * KNEE * difference / (bounded * bounded) * (SOFTNESS * root * root * root)
        total -= tl.where(use, count.to(ACC) * slope, 0.0)
    value = (total * tl.load(scale)).to(grad_prediction.dtype.element_ty)
    for c in range(channels):
        store_tile(grad_prediction, strides.grad_prediction, n, c, y, x, value, valid)


_tuned_forward = autotune(_forward, CONFIGS, KEY)
_tuned_backward = autotune(_backward, CONFIGS, KEY)


def census_loss(prediction: Tensor, target: Tensor, patch_size: int, deterministic: bool) -> Tensor:
    n, _, height, width = prediction.shape
    count = patch_size**2 * n * height * width
    if count == 0:
        return prediction.new_full((), float("nan"), dtype=compute_type(prediction))
    greys = _grey_planes(prediction, target)
    smallest = min(config.kwargs["BLOCK"] for config in CONFIGS)
    # Larger blocks fill fewer of the sums, hence the zeros.
    sums = torch.zeros(n * triton.cdiv(height * width, smallest), dtype=greys.dtype, device=greys.device)
    launch(
        "census_loss",
        prediction.device,
        _tuned_forward,
        lambda meta: (n * triton.cdiv(height * width, meta["BLOCK"]),),
        grey_prediction=greys[0],
        grey_target=greys[1],
        partial_sums=sums,
        height=height,
        width=width,
        scale_class=size_class(n * height * width),
        ACC=accumulator(prediction),
        WIDE=needs_wide(prediction, target, greys[0]),
        PATCH=patch_size,
    )
    return sums.sum() / count


def census_loss_backward(
    grad_out: Tensor, prediction: Tensor, target: Tensor, patch_size: int, deterministic: bool
) -> Tensor:
    n, channels, height, width = prediction.shape
    grad_prediction = empty_image(prediction)
    if grad_prediction.numel() == 0:
        return grad_prediction
    greys = _grey_planes(prediction, target)
    # As a tensor, since reading grad_out here would wait for the device.
    scale = grad_out.to(greys.dtype) / (patch_size**2 * n * height * width * channels)
    launch(
        "census_loss",
        prediction.device,
        _tuned_backward,
        lambda meta: (n * triton.cdiv(height * width, meta["BLOCK"]),),
        **arguments(grad_prediction=grad_prediction),
        grey_prediction=greys[0],
        grey_target=greys[1],
        scale=scale,
        channels=channels,
        height=height,
        width=width,
        scale_class=size_class(n * height * width),
        ACC=accumulator(prediction),
        WIDE=needs_wide(prediction, target, grad_prediction),
        PATCH=patch_size,
    )
    return grad_prediction


def _grey_planes(prediction: Tensor, target: Tensor) -> Tensor:
    """(2, N, H, W): the grey values of prediction and target, which is all the memory that the loss takes."""
    n, channels, height, width = prediction.shape
    greys = torch.empty((2, n, height, width), dtype=compute_type(prediction), device=prediction.device)
    launch(
        "census_loss",
        prediction.device,
        _grey,
        (n * triton.cdiv(height * width, 256),),
        **arguments(prediction=prediction, target=target),
        grey_prediction=greys[0],
        grey_target=greys[1],
        channels=channels,
        height=height,
        width=width,
        ACC=accumulator(prediction),
        WIDE=needs_wide(prediction, target, greys),
        BLOCK=256,
    )
    return greys
