"""census_loss: the soft census (ternary) loss, without the patches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from safnet_ops import reference
from safnet_ops.autocast import is_autocast, promote, register_autocast
from safnet_ops.autograd import Rule, differentiate, kernel, pull_back
from safnet_ops.backends import choose, define
from safnet_ops.checks import check_device, check_same_kind, check_shape, check_tensor, empty_image

LARGEST_PATCH = 15  # the kernels keep a tile with this much halo on chip
REDUCTIONS = ("mean", "sum", "none")
GREYS = ("mean", "rec601")


def census_loss(
    prediction: Tensor,
    target: Tensor,
    patch_size: int = 7,
    *,
    reduction: str = "mean",
    mask: Tensor | None = None,
    grey: str = "mean",
    border: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Soft census distance of two pictures: compares local structure, whatever the local brightness.

    With g the mean over channels and d_k = g_k - g over the patch_size^2 window around a pixel, n_k = d_k / sqrt(0.81 + d_k^2).
    A pixel's distance is the mean over k of dn^2 / (0.1 + dn^2), dn being the difference of the two pictures' n_k. Pixels
    whose window leaves the picture count 0; the loss is the mean over ALL pixels (the ternary census transform of Stein 2004,
    softened as in UnFlow, Meister et al. 2018).

    The kernels compute the mean and the sum. Distances of single pixels, with reduction="none", a mask or another border, are
    computed by PyTorch, at patch_size^2 numbers a pixel.

    Args:
        prediction: (N, C, H, W), float32, float64, float16 or bfloat16, any strides.
        target: the same shape, dtype and device. Both receive gradients where they ask for them; detach what is to have none.
            Under autocast, two dtypes become the wider one.
        patch_size: side of the window, odd, from 3 to 15.
        reduction: "mean" over all pixels, "sum" of their distances, or "none".
        mask: (N, 1, H, W), floating-point or bool: factors of the pixels' distances. "mean" is over all pixels still: divide a
            "sum" by the mask's for a mean over what it leaves. It does not hide NaN.
        grey: "mean" over the channels, or "rec601": 0.2989 R + 0.587 G + 0.114 B.
        border: width of the frame of pixels that count 0, patch_size // 2 if None. In a narrower one windows leave the picture
            and read zeros there.
        backend: "reference", "cpp", "cuda" or "triton" instead of the one that the device suggests; what kernels do not compute
            takes "reference" alone. Within `use_backend` it is computed by PyTorch.

    Returns:
        A scalar, float32 (float64 for float64 pictures), NaN for the mean of an empty batch, as mean() gives; or
        (N, 1, H, W) of that type with reduction="none".

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
    _check_options(prediction, patch_size, reduction, mask, grey, border)
    chosen = choose("census_loss", prediction.device, backend)
    if grey == "rec601":
        prediction, target = reference.grey_rec601(prediction), reference.grey_rec601(target)
    frame = patch_size // 2 if border is None else border
    if reduction == "none" or mask is not None or frame != patch_size // 2 or prediction.numel() == 0:
        if backend not in (None, "reference") and prediction.numel() > 0:
            raise ValueError(
                "census_loss: backend must be 'reference' or None for reduction='none', a mask or a border of its own, "
                f"got {backend!r}"
            )
        distance = reference.census_distance(prediction, target, patch_size, frame)
        if mask is not None:
            distance = distance * mask.to(distance.dtype)
        return distance if reduction == "none" else distance.sum() if reduction == "sum" else distance.mean()
    if chosen == "reference":
        loss = reference.census_loss(prediction, target, patch_size)
    else:
        deterministic = torch.are_deterministic_algorithms_enabled()
        loss = kernel(chosen, "census_loss")(prediction, target, patch_size, deterministic)
    n, _, height, width = prediction.shape
    return loss * (n * height * width) if reduction == "sum" else loss


def _check_options(
    prediction: Tensor, patch_size: int, reduction: str, mask: Tensor | None, grey: str, border: int | None
) -> None:
    n, channels, height, width = prediction.shape
    if channels == 0:
        raise ValueError(f"census_loss: prediction must have at least one channel, got {tuple(prediction.shape)}")
    if not isinstance(patch_size, int) or patch_size % 2 == 0 or not 3 <= patch_size <= LARGEST_PATCH:
        raise ValueError(f"census_loss: patch_size must be odd, from 3 to {LARGEST_PATCH}, got {patch_size!r}")
    for name, value, choices in (("reduction", reduction, REDUCTIONS), ("grey", grey, GREYS)):
        if value not in choices:
            raise ValueError(f"census_loss: {name} must be one of {', '.join(choices)}, got {value!r}")
    if grey == "rec601" and channels != 3:
        raise ValueError(
            f"census_loss: prediction must have 3 channels for grey='rec601', got {tuple(prediction.shape)}"
        )
    if border is not None and (not isinstance(border, int) or border < 0):
        raise ValueError(f"census_loss: border must be an integer of at least 0, got {border!r}")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or not (mask.is_floating_point() or mask.dtype == torch.bool):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"census_loss: mask must be a floating-point or bool tensor, got {kind}")
    check_shape("census_loss", "mask", mask, "(N, 1, H, W)", (n, 1, height, width))
    check_device("census_loss", "mask", mask, "prediction", prediction)


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
        (prediction, target), (patch_size, _deterministic) = ctx.saved_tensors, ctx.options
        deterministic = torch.are_deterministic_algorithms_enabled()
        operator = ctx.rule.operators("census_loss_backward")
        needed = ctx.needs_input_grad
        # The distance is the same with the pictures exchanged.
        of_prediction = operator(*grads, prediction, target, patch_size, deterministic) if needed[0] else None
        of_target = operator(*grads, target, prediction, patch_size, deterministic) if needed[1] else None
        return of_prediction, of_target, None, None


def _fake_forward(prediction: Tensor, target: Tensor, patch_size: int, deterministic: bool) -> Tensor:
    return prediction.new_empty((), dtype=reference.compute_type(prediction))


def _fake_backward(grad: Tensor, prediction: Tensor, target: Tensor, patch_size: int, deterministic: bool) -> Tensor:
    return empty_image(prediction)


define("census_loss", _fake_forward)
define("census_loss_backward", _fake_backward)
differentiate("census_loss", _Forward, _definition, _Whole, _backward_definition)
register_autocast("census_loss", promote)
