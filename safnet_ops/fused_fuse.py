"""fused_fuse: warp, weigh and merge three exposures in one pass."""

from functools import partial
from typing import Any

from torch import Tensor

from safnet_ops import reference as references
from safnet_ops.autocast import is_autocast, promote, register_autocast
from safnet_ops.autograd import Forward, differentiate, kernel
from safnet_ops.backends import choose, define
from safnet_ops.checks import (
    check_same_kind,
    check_shape,
    check_tensor,
    empty_gradient,
    empty_image,
    in_layout,
    unify_geometry,
)
from safnet_ops.operators import is_needed

GEOMETRY = range(3, 7)  # the places of flows and masks among the arguments


def fused_fuse(
    short: Tensor,
    reference: Tensor,
    long: Tensor,
    flow_short: Tensor,
    flow_long: Tensor,
    mask_short: Tensor,
    mask_long: Tensor,
    reference_ldr: Tensor | None = None,
    *,
    weights: tuple[Tensor, Tensor, Tensor] | None = None,
    mask_logits: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Warp short and long exposure onto the reference and average the three with mask-reweighted weights, in one pass.

    With base weights L1, L2, L3 of short, reference and long, per colour channel,

        W1 = L1 M1,   W3 = L3 M3,   W2 = L2 + L1 (1 - M1) + L3 (1 - M3)
        out = (W1 warp(short, flow_short) + W2 reference + W3 warp(long, flow_long)) / (W1 + W2 + W3 + 1e-9)

    (SAFNet, equations 3 to 5). The base weights are the triangle functions of the reference's LDR value, as
    `safnet_ops.reference.triangle_weights` gives them, or your own. `backward_warp` says how the warp treats borders. Where a
    flow or a mask is NaN, so is the result, as a constant: nothing receives a gradient from that pixel.

    Args:
        short, reference, long: linear radiance (N, C, H, W) of one dtype: float32, float64, float16 or bfloat16.
        flow_short, flow_long: (N, 2, H, W), from the reference to that exposure, x then y, in pixels.
        mask_short, mask_long: (N, 1, H, W) in [0, 1]: how far to trust the warped exposure; or logits of it.
            Flows and masks: the images' dtype or float32 (float64 for float64 images). Under autocast, pictures and weights of
            several dtypes become the widest of them, and with float64 anywhere all become float64.
        reference_ldr: (N, C, H, W), the reference's LDR value in [0, 1], in the images' dtype. Either this or `weights`.
        weights: three tensors (N, C, H, W) or (N, 1, H, W) in the images' dtype: base weights >= 0 of short, reference, long.
        mask_logits: the masks are logits; the kernel applies the sigmoid.
        backend: "reference", "cpp", "cuda" or "triton" instead of the one that the device suggests.

    Returns:
        (N, C, H, W), in the images' dtype and units, channels_last if `short` is.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or device than stated.
        RuntimeError: the backend asked for is not available.
    """
    if is_autocast(short):
        given = weights if isinstance(weights, tuple | list) else ()
        tensors = (short, reference, long, flow_short, flow_long, mask_short, mask_long, reference_ldr, *given)
        tensors = promote(tensors, GEOMETRY)
        short, reference, long, flow_short, flow_long, mask_short, mask_long, reference_ldr = tensors[:8]
        weights = tensors[8:] if given else weights
    shape = _check_images(short, reference, long)
    masks_and_flows = {
        "flow_short": flow_short,
        "flow_long": flow_long,
        "mask_short": mask_short,
        "mask_long": mask_long,
    }
    for name, value in masks_and_flows.items():
        channels = 2 if name.startswith("flow") else 1
        check_tensor("fused_fuse", name, value)
        check_shape("fused_fuse", name, value, f"(N, {channels}, H, W)", (shape[0], channels, *shape[2:]))
    geometry = unify_geometry("fused_fuse", short, masks_and_flows)
    base = check_base_weights("fused_fuse", short, reference_ldr, weights)
    backend = choose("fused_fuse", short.device, backend)
    inputs = (short, reference, long, *geometry, *base)
    if backend == "reference":
        return in_layout(_definition(*inputs, mask_logits), short)
    return kernel(backend, "fused_fuse")(*inputs, mask_logits)


def _check_images(short: Tensor, reference: Tensor, long: Tensor) -> tuple[int, ...]:
    for name, value in (("short", short), ("reference", reference), ("long", long)):
        check_tensor("fused_fuse", name, value)
        check_same_kind("fused_fuse", name, value, "short", short)
        check_shape("fused_fuse", name, value, "(N, C, H, W) like short", tuple(short.shape))
    return tuple(short.shape)


def check_base_weights(
    operator: str, short: Tensor, reference_ldr: Tensor | None, weights: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(reference_ldr, None, None, None) or (None, *weights), the latter expanded to the images' shape."""
    if (reference_ldr is None) == (weights is None):
        given = "neither" if weights is None else "both"
        raise ValueError(f"{operator}: give either reference_ldr or weights, got {given}")
    if weights is None:
        check_tensor(operator, "reference_ldr", reference_ldr)
        assert reference_ldr is not None
        check_same_kind(operator, "reference_ldr", reference_ldr, "short", short)
        check_shape(operator, "reference_ldr", reference_ldr, "(N, C, H, W) like short", tuple(short.shape))
        return reference_ldr, None, None, None
    if not isinstance(weights, tuple | list) or len(weights) != 3:
        got = f"{len(weights)} of them" if isinstance(weights, tuple | list) else type(weights).__name__
        raise ValueError(f"{operator}: weights must be three tensors (short, reference, long), got {got}")
    for position, weight in enumerate(weights):
        name = f"weights[{position}]"
        check_tensor(operator, name, weight)
        check_same_kind(operator, name, weight, "short", short)
        n, channels, height, width = short.shape
        if weight.shape[1] not in (1, channels) or (weight.shape[0], *weight.shape[2:]) != (n, height, width):
            raise ValueError(
                f"{operator}: {name} must be (N, C or 1, H, W) = {(n, channels, height, width)}, got {tuple(weight.shape)}"
            )
    expanded = [weight.expand(short.shape) for weight in weights]
    return None, expanded[0], expanded[1], expanded[2]


def _definition(*arguments: Any) -> Tensor:
    """The reference, called with the registered operator's arguments."""
    *images_and_geometry, reference_ldr, weight_short, weight_reference, weight_long, mask_logits = arguments
    weights = None if weight_short is None else (weight_short, weight_reference, weight_long)
    return references.fused_fuse(*images_and_geometry, reference_ldr, weights=weights, mask_logits=mask_logits)  # type: ignore[misc]


def _fake_forward(short: Tensor, *inputs: Any) -> Tensor:
    return empty_image(short)


def _fake_backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    *tensors, _mask_logits, needs, _deterministic = inputs
    return tuple(
        grad.new_empty(0) if tensor is None else empty_gradient(tensor, is_needed(needs, position))
        for position, tensor in enumerate(tensors)
    )


define("fused_fuse", _fake_forward)
define("fused_fuse_backward", _fake_backward)
differentiate("fused_fuse", Forward, _definition)
register_autocast("fused_fuse", partial(promote, geometry=GEOMETRY))
