"""upsample_fuse: the whole explicit fusion of inference, from the decoder's low-resolution flows and mask logits."""

from functools import partial
from typing import Any

from torch import Tensor

from safnet_ops import reference as references
from safnet_ops.autocast import is_autocast, promote, register_autocast
from safnet_ops.autograd import Operation, Result, Rule, differentiate, kernel
from safnet_ops.backends import choose, define
from safnet_ops.checks import check_same_kind, check_shape, check_tensor, empty_image, in_layout, unify_geometry
from safnet_ops.fused_fuse import GEOMETRY, check_base_weights, fused_fuse


def upsample_fuse(
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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Resize low-resolution flows and mask logits to the images' size, apply the sigmoid, and fuse, in one pass.

    The resizing is bilinear with align_corners False; a flow's x and y are multiplied by the true ratios of widths and heights.
    The fusion is that of `fused_fuse`. One pass is for inference with triangle weights: where a gradient is needed, and with
    weights of your own, PyTorch resizes and `fused_fuse` fuses.

    Args:
        short, reference, long: (N, C, H, W) of one dtype, as in `fused_fuse`.
        flow_short, flow_long: (N, 2, h, w), x then y, in pixels of their own size.
        mask_short, mask_long: (N, 1, h, w), logits. Flows and masks: the images' dtype or float32 (float64 for float64).
            Under autocast, what is mixed is promoted as in `fused_fuse`.
        reference_ldr, weights: as in `fused_fuse`, one of the two.
        backend: "reference", "cpp", "cuda" or "triton" instead of the one that the device suggests.

    Returns:
        fused (N, C, H, W) in the images' dtype, flow_short and flow_long (N, 2, H, W) in pixels of the full size,
        mask_short and mask_long (N, 1, H, W) in [0, 1]. Flows and masks are contiguous float32 (float64 for float64 images).

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
    for name, value in (("short", short), ("reference", reference), ("long", long)):
        check_tensor("upsample_fuse", name, value)
        check_same_kind("upsample_fuse", name, value, "short", short)
        check_shape("upsample_fuse", name, value, "(N, C, H, W) like short", tuple(short.shape))
    check_base_weights("upsample_fuse", short, reference_ldr, weights)
    low = {"flow_short": flow_short, "flow_long": flow_long, "mask_short": mask_short, "mask_long": mask_long}
    for name, value in low.items():
        channels = 2 if name.startswith("flow") else 1
        check_tensor("upsample_fuse", name, value)
        expected = (short.shape[0], channels, *flow_short.shape[2:])
        check_shape("upsample_fuse", name, value, f"(N, {channels}, h, w)", expected)
        if value.shape[2] == 0 or value.shape[3] == 0:
            raise ValueError(f"upsample_fuse: {name} must have pixels to resize, got {tuple(value.shape)}")
    backend = choose("upsample_fuse", short.device, backend)
    if reference_ldr is None:
        flow_short, flow_long, mask_short, mask_long = references.upsample_alignment(
            unify_geometry("upsample_fuse", short, low), short
        )
        full = flow_short, flow_long, mask_short, mask_long
        return fused_fuse(short, reference, long, *full, weights=weights, backend=backend), *full
    inputs = (short, reference, long, *unify_geometry("upsample_fuse", short, low), reference_ldr)
    if backend == "reference":
        fused, flow_short, flow_long, mask_short, mask_long = references.upsample_fuse(*inputs)
        return in_layout(fused, short), flow_short, flow_long, mask_short, mask_long
    return kernel(backend, "upsample_fuse")(*inputs)


class _Rule(Rule):
    @classmethod
    def derive(cls, apply: Operation, *arguments: Any) -> Result:
        """In two passes: the one pass keeps nothing that a derivative could start from."""
        short, reference, long, *low, reference_ldr = arguments
        full = references.upsample_alignment(low, short)
        explicit_weights = (None, None, None)
        inputs = (short, reference, long, *full, reference_ldr, *explicit_weights)
        return cls.operators("fused_fuse")(*inputs, False), *full


def _fake(short: Tensor, reference: Tensor, long: Tensor, flow_short: Tensor, *others: Any) -> tuple[Tensor, ...]:
    kind = references.compute_type(short)
    n, _, height, width = short.shape
    full = [short.new_empty((n, channels, height, width), dtype=kind) for channels in (2, 2, 1, 1)]
    return empty_image(short), *full


define("upsample_fuse", _fake)
differentiate("upsample_fuse", _Rule, references.upsample_fuse)
register_autocast("upsample_fuse", partial(promote, geometry=GEOMETRY))
