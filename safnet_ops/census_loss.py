"""census_loss: the soft census (ternary) loss, without the patches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safnet_ops import reference
from safnet_ops.autocast import is_autocast, promote, register_autocast
from safnet_ops.autograd import Rule, differentiate, kernel, pull_back
from safnet_ops.backends import choose, define
from safnet_ops.checks import check_same_kind, check_shape, check_tensor, empty_image

LARGEST_PATCH = 15  # the kernels keep a tile with this much halo on chip


def census_loss(prediction: Tensor, target: Tensor, patch_size: int = 7, *, backend: str | None = None) -> Tensor:
    """Soft census distance of two pictures: compares local structure, whatever the local brightness.

    With g the mean over channels and d_k = g_k - g over the patch_size^2 window around a pixel, n_k = d_k / sqrt(0.81 + d_k^2).
    A pixel's distance is the mean over k of dn^2 / (0.1 + dn^2), dn being the difference of the two pictures' n_k. Pixels
    whose window leaves the picture count 0; the loss is the mean over ALL pixels (the ternary census transform of Stein 2004,
    softened as in UnFlow, Meister et al. 2018).

    Args:
        prediction: (N, C, H, W), float32, float64, float16 or bfloat16, any strides.
        target: the same shape, dtype and device; receives no gradient. Under autocast, two dtypes become the wider one.
        patch_size: side of the window, odd, from 3 to 15.
        backend: "reference", "cpp", "cuda" or "triton" instead of the one that the device suggests.

    Returns:
        A scalar, float32 (float64 for float64 pictures); NaN for an empty batch, as mean() gives.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, value or device than stated.
        RuntimeError: the backend asked for is not available.
    """
    if is_autocast(prediction):
        prediction, target = promote((prediction, target))
    check_tensor("census_loss", "prediction", prediction)
    check_tensor("census_loss", "target", target)
    check_same_kind("census_loss", "target", target, "prediction", prediction)
    check_shape("census_loss", "target", target, "(N, C, H, W) like prediction", tuple(prediction.shape))
    if prediction.shape[1] == 0:
        raise ValueError(f"census_loss: prediction must have at least one channel, got {tuple(prediction.shape)}")
    if not isinstance(patch_size, int) or patch_size % 2 == 0 or not 3 <= patch_size <= LARGEST_PATCH:
        raise ValueError(f"census_loss: patch_size must be odd, from 3 to {LARGEST_PATCH}, got {patch_size!r}")
    backend = choose("census_loss", prediction.device, backend)
    if backend == "reference":
        return reference.census_loss(prediction, target, patch_size)
    target = target.detach()
    return kernel(backend, "census_loss")(prediction, target, patch_size, torch.are_deterministic_algorithms_enabled())


def _definition(prediction: Tensor, target: Tensor, patch_size: int, deterministic: bool) -> Tensor:
    return reference.census_loss(prediction, target, patch_size)


def _backward_definition(grad: Tensor, *arguments: Any) -> Tensor:
    (gradient,) = pull_back(_definition, arguments, (True,), (grad,))[:1]
    assert gradient is not None
    return gradient


class _Whole(Rule):
    @classmethod
    def folds(cls, batched: Sequence[bool], arguments: Sequence[Any]) -> bool:
        return False  # the mean is over all pictures


class _Forward(_Whole):
    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        patch_size, _deterministic = ctx.options
        deterministic = torch.are_deterministic_algorithms_enabled()
        found = ctx.rule.operators("census_loss_backward")(*grads, *ctx.saved_tensors, patch_size, deterministic)
        return found, None, None, None


def _fake_forward(prediction: Tensor, target: Tensor, patch_size: int, deterministic: bool) -> Tensor:
    return prediction.new_empty((), dtype=reference.compute_type(prediction))


def _fake_backward(grad: Tensor, prediction: Tensor, target: Tensor, patch_size: int, deterministic: bool) -> Tensor:
    return empty_image(prediction)


define("census_loss(Tensor prediction, Tensor target, int patch_size, bool deterministic) -> Tensor", _fake_forward)
define(
    "census_loss_backward(Tensor grad, Tensor prediction, Tensor target, int patch_size, bool deterministic) -> Tensor",
    _fake_backward,
)
differentiate("census_loss", _Forward, _definition, _Whole, _backward_definition)
register_autocast("census_loss", promote)
