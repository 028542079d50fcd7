"""census_loss: the soft census (ternary) loss, without the patches."""

from typing import Any

import torch
from torch import Tensor

from safnet_ops import reference
from safnet_ops.autograd import reference_gradients
from safnet_ops.backends import choose, define, kernel
from safnet_ops.checks import check_same_kind, check_shape, check_tensor, empty_image, needs_gradient

LARGEST_PATCH = 15  # the kernels keep a tile with this much halo on chip


def census_loss(prediction: Tensor, target: Tensor, patch_size: int = 7, *, backend: str | None = None) -> Tensor:
    """Soft census distance of two pictures: compares local structure, whatever the local brightness.

    With g the mean over channels and d_k = g_k - g over the patch_size^2 window around a pixel, n_k = d_k / sqrt(0.81 + d_k^2).
    A pixel's distance is the mean over k of dn^2 / (0.1 + dn^2), dn being the difference of the two pictures' n_k. Pixels
    whose window leaves the picture count 0; the loss is the mean over ALL pixels (the ternary census transform of Stein 2004,
    softened as in UnFlow, Meister et al. 2018).

    Args:
        prediction: (N, C, H, W), float32, float64, float16 or bfloat16, any strides.
        target: the same shape, dtype and device; receives no gradient.
        patch_size: side of the window, odd, from 3 to 15.
        backend: "reference", "cpp", "cuda" or "triton" instead of the one that the device suggests.

    Returns:
        A scalar, float32 (float64 for float64 pictures); NaN for an empty batch, as mean() gives.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, value or device than stated.
        RuntimeError: the backend asked for is not available.
    """
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
    if needs_gradient(prediction):
        return _CensusLoss.apply(backend, patch_size, prediction, target)
    return kernel(backend, "census_loss")(prediction, target, patch_size, torch.are_deterministic_algorithms_enabled())


class _CensusLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, patch_size: int, prediction: Tensor, target: Tensor) -> Tensor:
        ctx.backend, ctx.patch_size = backend, patch_size
        ctx.save_for_backward(prediction, target)
        deterministic = torch.are_deterministic_algorithms_enabled()
        return kernel(backend, "census_loss")(prediction, target, patch_size, deterministic)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        prediction, target = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():

            def loss(prediction: Tensor) -> Tensor:
                return reference.census_loss(prediction, target, ctx.patch_size)

            return None, None, *reference_gradients(loss, (prediction,), (True,), grads), None
        deterministic = torch.are_deterministic_algorithms_enabled()
        found = kernel(ctx.backend, "census_loss_backward")(*grads, prediction, target, ctx.patch_size, deterministic)
        return None, None, found, None


def _fake_forward(prediction: Tensor, target: Tensor, patch_size: int, deterministic: bool) -> Tensor:
    return prediction.new_empty((), dtype=reference.compute_type(prediction))


def _fake_backward(grad: Tensor, prediction: Tensor, target: Tensor, patch_size: int, deterministic: bool) -> Tensor:
    return empty_image(prediction)


define("census_loss(Tensor prediction, Tensor target, int patch_size, bool deterministic) -> Tensor", _fake_forward)
define(
    "census_loss_backward(Tensor grad, Tensor prediction, Tensor target, int patch_size, bool deterministic) -> Tensor",
    _fake_backward,
)
