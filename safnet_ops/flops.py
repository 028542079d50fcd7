"""What torch.utils.flop_counter.FlopCounterMode counts for the operators: arithmetic on numbers, not on indices.

A forward counts what its definition in `safnet_ops.reference` adds, subtracts, multiplies, divides and takes roots of, with a
sigmoid as three and a bilinear resize as nine a value; a kernel may need less. A convolution counts two a multiplication, like
PyTorch's. A backward counts what is recomputed, once, and what each needed gradient takes. `pixels` are N * H * W, `values`
those times C.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from safnet_ops.backends import COMPILED, TRITON
from safnet_ops.operators import OPERATORS

Shape = tuple[int, ...]

SCATTER, SLOPES = 10, 14  # a value: adding to four pixels by weights; both slopes, times the incoming gradient, summed
# A value of a fusion's gradient, given the weights, the samples and the incoming gradient over the sum of weights.
FUSION_GRADIENTS = {
    "short": 1 + SCATTER,
    "reference": 1,
    "long": 1 + SCATTER,
    "flow_short": 1 + SLOPES,
    "flow_long": 1 + SLOPES,
    "mask_short": 4,
    "mask_long": 4,
    "reference_ldr": 17,
    "weight_short": 5,
    "weight_reference": 2,
    "weight_long": 5,
}


def _sizes(picture: Shape) -> tuple[int, int]:
    """(values, pixels)"""
    return prod(picture), picture[0] * prod(picture[2:])


def _needed(operator: str, needs: int) -> list[str]:
    return [name for name in OPERATORS[operator].differentiable if needs & OPERATORS[operator].bit(name)]


def _backward_warp(image: Shape, flow: Shape, **_: Any) -> int:
    values, pixels = _sizes(image)
    return 9 * values + 7 * pixels


def _backward_warp_backward(grad: Shape, image: Shape, flow: Shape, needs: int, *_: Any, **__: Any) -> int:
    values, pixels = _sizes(image)
    found = sum({"image": SCATTER, "flow": SLOPES}[name] * values for name in _needed("backward_warp", needs))
    return found + 7 * pixels if found else 0


def _fused_fuse(short: Shape, *arguments: Any, **_: Any) -> int:
    *_others, weight_short, _weight_reference, _weight_long, mask_logits = arguments
    values, pixels = _sizes(short)
    return (40 if weight_short is None else 33) * values + (16 + 6 * mask_logits) * pixels


def _fused_fuse_backward(grad: Shape, *arguments: Any, **_: Any) -> int:
    *inputs, needs, _deterministic = arguments
    values, _pixels = _sizes(grad)
    found = sum(FUSION_GRADIENTS[name] * values for name in _needed("fused_fuse", needs))
    return _fused_fuse(*inputs) + values + found if found else 0


def _upsample_fuse(short: Shape, *_: Any, **__: Any) -> int:
    values, pixels = _sizes(short)
    return 40 * values + (16 + 6 * 9 + 4 + 6) * pixels


def _convolution(input: Shape, weight: Shape, out: Shape) -> int:
    return 2 * prod(weight) * out[0] * prod(out[2:])


def _group_conv_shuffle(input: Shape, weight: Shape, *_: Any, out_shape: tuple[Shape, Shape], **__: Any) -> int:
    return _convolution(input, weight, out_shape[0])


def _group_conv_shuffle_backward(
    grad: Shape, preactivation: Shape, input: Shape, weight: Shape, *arguments: Any, **_: Any
) -> int:
    *_others, needs, _deterministic = arguments
    convolutions = {"input", "weight"} & set(_needed("group_conv_shuffle", needs))
    return len(convolutions) * _convolution(input, weight, grad)


def _census_loss(prediction: Shape, target: Shape, patch_size: int, *_: Any, **__: Any) -> int:
    values, pixels = _sizes(prediction)
    return (15 * patch_size**2 + 2) * pixels + 2 * values


def _census_loss_backward(grad: Shape, prediction: Shape, target: Shape, patch_size: int, *_: Any, **__: Any) -> int:
    values, pixels = _sizes(prediction)
    return 27 * patch_size**2 * pixels + 3 * values


FORMULAS: dict[str, Callable[..., int]] = {
    "backward_warp": _backward_warp,
    "backward_warp_backward": _backward_warp_backward,
    "fused_fuse": _fused_fuse,
    "fused_fuse_backward": _fused_fuse_backward,
    "upsample_fuse": _upsample_fuse,
    "group_conv_shuffle": _group_conv_shuffle,
    "group_conv_shuffle_backward": _group_conv_shuffle_backward,
    "census_loss": _census_loss,
    "census_loss_backward": _census_loss_backward,
}


def register() -> None:
    """Tell the counter of all registered operators."""
    for name, formula in FORMULAS.items():
        register_flop_formula([getattr(getattr(torch.ops, library.ns), name) for library in (COMPILED, TRITON)])(
            formula
        )
