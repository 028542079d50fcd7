"""fuse_frames: two to nine exposures merged as `fused_fuse` merges three, by passes of that operator."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from safnet_ops.autocast import is_autocast, promote
from safnet_ops.backward_warp import backward_warp
from safnet_ops.checks import check_device, check_same_kind, check_shape, check_tensor
from safnet_ops.fused_fuse import fused_fuse
from safnet_ops.reference import compute_type

MOST_FRAMES = 8  # beside the reference
LEAST_WEIGHT = 1e-4  # of the reference by a table, so that a pixel that is clipped in all exposures is not black

# How far an exposure is trusted by its LDR value z in [0, 1].
TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "triangle": lambda z: 1 - (2 * z - 1).abs(),  # Debevec and Malik 1997, equation 4
    "hat": lambda z: 1 - (2 * z - 1) ** 12,  # Reinhard et al., High Dynamic Range Imaging, 2005, section 4.7
    "gaussian": lambda z: torch.exp(-((z - 0.5) ** 2) / (2 * 0.2**2)),  # Mertens et al. 2007, section 3.1
}


def fuse_frames(
    reference: Tensor,
    frames: Sequence[Tensor],
    flows: Sequence[Tensor],
    masks: Sequence[Tensor] | None = None,
    *,
    ldr: Sequence[Tensor] | None = None,
    table: str = "triangle",
    weigh_aligned: bool = True,
    weights: Sequence[Tensor] | None = None,
    mask_logits: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Warp one to eight frames onto the reference and average them all with mask-reweighted weights.

    With base weights L of the reference and L_i of the frames, and the frames' masks M_i,

        W_i = L_i M_i,   W = L + sum L_i (1 - M_i),   out = (W reference + sum W_i warp(frame_i, flow_i)) / (W + sum W_i)

    per colour channel: what a mask takes from a frame goes to the reference, as in `fused_fuse`, which this equals for a short
    and a long frame and the same weights. Every pass of `fused_fuse` merges two more frames, and adds 1e-9 to the sum. Where a
    flow or a mask is NaN, so is the result, as a constant; where all weights are zero, it is zero.

    Args:
        reference: linear radiance (N, C, H, W): float32, float64, float16 or bfloat16.
        frames: one to eight of the same shape, dtype and device, in any order.
        flows: one a frame, (N, 2, H, W), from the reference to that frame, x then y, in pixels.
        masks: one a frame, (N, 1, H, W), or (N, C, H, W) with one a colour, in [0, 1]: how far to trust the warped frame; or
            logits of it. All ones if None. Flows and masks: the images' dtype or float32 (float64 for float64 images).
        ldr: LDR values (N, C, H, W) in [0, 1] of the reference, then of the frames, in the images' dtype; an exposure's base
            weight is its own value's in `table`, the reference's at least 1e-4. Either this or `weights`.
        table: "triangle", 1 - |2z - 1|; "hat", 1 - (2z - 1)^12; or "gaussian", exp(-(z - 0.5)^2 / 0.08).
        weigh_aligned: look the frames' weights up from `ldr` warped by their flows; if False, from `ldr` as it is.
        weights: base weights >= 0 of the reference, then of the frames as they are when warped: (N, C, H, W) or (N, 1, H, W).
        mask_logits: the masks are logits.
        backend: "reference", "cpp", "cuda" or "triton" instead of the one that the device suggests.

    Returns:
        (N, C, H, W), in the images' dtype and units, channels_last if the frames are.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, length or device than stated.
        RuntimeError: the backend asked for is not available.
    """
    frames = _check_list("frames", frames, None)
    flows = _check_list("flows", flows, len(frames))
    masks = None if masks is None else _check_list("masks", masks, len(frames))
    if (ldr is None) == (weights is None):
        raise ValueError(f"fuse_frames: give either ldr or weights, got {'neither' if weights is None else 'both'}")
    if table not in TABLES:
        raise ValueError(f"fuse_frames: table must be one of {', '.join(TABLES)}, got {table!r}")
    name = "weights" if ldr is None else "ldr"
    base = _check_list(name, weights if ldr is None else ldr, len(frames) + 1)
    if is_autocast(reference):
        reference, frames, flows, masks, base = _promote(reference, frames, flows, masks, base)
    _check_tensors(reference, frames, flows, masks, name, base)

    kind = compute_type(reference)
    # Lost pixels are filled last: a NaN that went through a pass would meet the gradients of the next one's weights.
    lost = torch.stack([_is_nan(value) for value in (*flows, *(masks or ()))]).any(0)
    flows = [flow.masked_fill(lost, 0) for flow in flows]
    whole = torch.ones_like(lost, dtype=flows[0].dtype)  # masks of the passes, whose weights are reweighted already
    if ldr is not None:
        base = _look_up(base, flows if weigh_aligned else None, TABLES[table], backend)
    total, *outer = (weight.to(kind).expand(reference.shape) for weight in base)
    if masks is not None:
        trust = [mask.to(kind).masked_fill(lost, 0) for mask in masks]
        trust = [mask.sigmoid() for mask in trust] if mask_logits else trust
        for weight, mask in zip(outer, trust, strict=True):
            total = total + weight * (1 - mask)
        outer = [weight * mask for weight, mask in zip(outer, trust, strict=True)]

    fused = reference
    aligned = list(zip(frames, flows, outer, strict=True))
    if len(aligned) % 2:
        frame, flow, weight = aligned[-1]
        aligned[-1:] = [(frame, flow, weight / 2)] * 2  # for a pass takes two
    for (first, flow_first, weight_first), (second, flow_second, weight_second) in zip(
        aligned[::2], aligned[1::2], strict=True
    ):
        sides = first, fused, second, flow_first, flow_second, whole, whole
        one, base_weight, two = (weight.to(reference.dtype) for weight in (weight_first, total, weight_second))
        fused = fused_fuse(*sides, weights=(one, base_weight, two), backend=backend)
        total = total + weight_first + weight_second
    return fused.masked_fill_(lost, torch.nan)


def _look_up(
    ldr: Sequence[Tensor], flows: Sequence[Tensor] | None, table: Callable[[Tensor], Tensor], backend: str | None
) -> list[Tensor]:
    """Base weights of the reference and of the frames, whose LDR values `flows` align first."""
    own, *others = ldr
    if flows is not None:
        others = [backward_warp(value, flow, backend=backend) for value, flow in zip(others, flows, strict=True)]
    kind = compute_type(own)
    return [table(own.to(kind)).clamp(min=LEAST_WEIGHT), *(table(value.to(kind)) for value in others)]


def _is_nan(value: Tensor) -> Tensor:
    """(N, 1, H, W): whether any channel of a pixel is."""
    return value.detach().isnan().any(1, keepdim=True)


def _promote(
    reference: Tensor,
    frames: list[Tensor],
    flows: list[Tensor],
    masks: list[Tensor] | None,
    base: list[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor] | None, list[Tensor]]:
    images = [reference, *frames, *base]
    geometry = [*flows, *(masks or ())]
    found = list(promote((*images, *geometry), range(len(images), len(images) + len(geometry))))
    count = len(frames)
    given_masks = None if masks is None else found[len(images) + count :]
    return (
        found[0],
        found[1 : count + 1],
        found[len(images) : len(images) + count],
        given_masks,
        found[count + 1 : len(images)],
    )


def _check_list(name: str, values: object, count: int | None) -> list[Tensor]:
    """A list of `count` tensors, or of one to eight if that is None."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"fuse_frames: {name} must be a list of tensors, got {type(values).__name__}")
    if count is None and not 1 <= len(values) <= MOST_FRAMES:
        raise ValueError(f"fuse_frames: {name} must hold 1 to {MOST_FRAMES} tensors, got {len(values)}")
    if count is not None and len(values) != count:
        whose = "one of the reference, then one a frame" if name in ("ldr", "weights") else "one a frame"
        raise ValueError(f"fuse_frames: {name} must hold {count} tensors, {whose}, got {len(values)}")
    return list(values)


def _check_tensors(
    reference: Tensor,
    frames: list[Tensor],
    flows: list[Tensor],
    masks: list[Tensor] | None,
    base_name: str,
    base: list[Tensor],
) -> None:
    check_tensor("fuse_frames", "reference", reference)
    n, channels, height, width = reference.shape
    pictures = {f"frames[{place}]": value for place, value in enumerate(frames)}
    weighing = {f"{base_name}[{place}]": value for place, value in enumerate(base)}
    for name, value in (pictures | weighing).items():
        check_tensor("fuse_frames", name, value)
        check_same_kind("fuse_frames", name, value, "reference", reference)
        one = name.startswith("weights") and value.shape[1] == 1
        expected = (n, 1 if one else channels, height, width)
        check_shape("fuse_frames", name, value, "(N, C, H, W) like reference", expected)
    geometry = {f"flows[{place}]": value for place, value in enumerate(flows)}
    geometry |= {f"masks[{place}]": value for place, value in enumerate(masks or ())}
    for name, value in geometry.items():
        check_tensor("fuse_frames", name, value)
        check_device("fuse_frames", name, value, "reference", reference)
        if value.dtype not in (reference.dtype, compute_type(reference)):
            kinds = " or ".join(sorted({str(reference.dtype), str(compute_type(reference))}))
            raise TypeError(f"fuse_frames: {name} must be {kinds}, got {value.dtype}")
        if name.startswith("flows"):
            check_shape("fuse_frames", name, value, "(N, 2, H, W)", (n, 2, height, width))
        elif value.shape[1] == 1:
            check_shape("fuse_frames", name, value, "(N, 1, H, W)", (n, 1, height, width))
        else:
            check_shape("fuse_frames", name, value, "(N, 1 or C, H, W)", (n, channels, height, width))
