"""Fusing frames of any size in bounded memory.

Flows and masks are found once, on the whole frame reduced. Everything at full size is done tile by tile, from the frames as
their files hold them to the result: straighten, linearise, warp, fuse and refine. A tile is computed with a margin as wide as
the refine module sees, so that no seam can arise.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

import safnet_ops
from safnet.advice import NAMES, advise
from safnet.align import Aligned, Bracket, align, full_size, judge, reduce_frames
from safnet.calibrate import Calibration, calibrate, check_bracket
from safnet.choices import FEWEST_FRAMES, MOST_FRAMES, Ghosts
from safnet.merge import measure_noise, trust_in_refining, weigh_by_noise
from safnet.model import Alignment, Fusion, SAFNet
from safnet.radiance import (
    INTEGER_SCALES,
    ExposureReader,
    Frame,
    StoredFrame,
    exposure_input,
    exposure_ratios,
    ldr_values,
)
from safnet.series import Three, best_exposed, merge_, threes

TILE = 576  # root of the pixels on a CPU: larger ones waste less on margins, smaller ones stay in memory that is used again
TILE_ASPECT = 16 / 9  # memory is read along rows, and convolutions take wide pieces of them
GPU_TILE = 2048  # elsewhere, where every tile costs launches
NO_SURPRISE = 0.05  # stops between given and measured exposures that do not change an alignment
SAMPLES, SAMPLE = 4, 160  # places along each side where noise is measured, and their pixels

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


class Result(NamedTuple):
    """Linear radiance (1, 3, H, W) in [0, 1] in the short exposure's units, and what is behind it.

    Attributes:
        radiance: on the CPU.
        fusion: the explicit fusion before the refine module, with full-size flows and masks of the darkest and the brightest
            frame; None unless it was to be kept.
        evs, curve: exposures and camera curve, given or measured (see `safnet.calibrate.Calibration`).
        given_evs: the exposures before anything was measured.
        covered: shares of the reference frame that the darkest and the brightest frame show; the rest is the reference alone.
        advice: sentences about what does not fit together in the frames (see `safnet.advice`).
        reference: number of the frame that the result is aligned to, from 0.
    """

    radiance: Tensor
    fusion: Fusion | None
    evs: tuple[float, ...]
    curve: Tensor | None
    given_evs: tuple[float, ...]
    covered: tuple[float, float] = (1.0, 1.0)
    advice: tuple[str, ...] = ()
    reference: int = 1


class Merging(NamedTuple):
    """How aligned exposures are merged: the arguments of these names of `fuse_exposures`."""

    ghosts: Ghosts = "normal"
    fusion_only: bool = False
    mask: Tensor | None = None


def fuse_exposures(
    model: SAFNet,
    frames: Sequence[Frame],
    evs: Sequence[float],
    *,
    reference: int | None = None,
    measure: bool = False,
    known_curve: bool = False,
    alignment: Literal["frame", "paper"] = "frame",
    global_motion: bool = True,
    ghosts: Ghosts = "normal",
    fusion_only: bool = False,
    mask: Tensor | None = None,
    keep_fusion: bool = True,
    tile: int | None = None,
    precision: torch.dtype = torch.float32,
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """Fuse two to nine LDR frames in memory that tiles keep in bounds.

    The network takes three: one darker and one brighter than the reference. Of other frames, threes that share the reference
    are fused one after the other, and their results merged (see `safnet.series`).

    Args:
        model: in eval mode, on the device where the work shall run.
        frames: in ascending order of exposure: (1, 3, H, W), LDR values: floats in [0, 1], or uint8 or uint16 as files hold
            them, with a table of what they mean where that is not gamma 2.2 (`radiance.StoredFrame`).
        evs: their exposure values in stops, ascending.
        reference: number of the frame to align to; None for the middle one of three, the best exposed one of others.
        measure: find out the other frames' true exposures and the camera's curve (see `calibrate`), instead of trusting
            `evs` and assuming gamma 2.2.
        known_curve: the frames are of gamma 2.2 for certain, as those from linear files are: measure the exposures alone.
        alignment: "frame": as far as the frame needs, whatever its size (see `safnet.align`). "paper": four levels on the
            frame at half size, which makes the result, unless measuring, that of the model's forward to 1e-4.
        global_motion: of alignment "frame": look for the motion of the whole camera first.
        ghosts: "normal": the outer frames count where the network's masks say so. "off": everywhere, as in a scene in which
            nothing moves by itself. "strong": only where the network is sure.
        fusion_only: leave the refine module out: every pixel is a weighted mean of photographed ones, nothing is invented.
        mask: (1, 1, H, W), in [0, 1], or uint8 in which 255 is 1: share of the reference alone, as it was exposed, in each
            pixel of the result.
        keep_fusion: keep the explicit fusion, flows and masks in the result, which take three times its memory.
        tile: root of the pixels of a tile, which is TILE_ASPECT times as wide and as low; 0 for the whole frame, None for
            `default_tile`.
        precision: type of the convolutions. Radiance, flows, masks and warps stay float32.
        progress: called after each step.

    Raises:
        ValueError: not two to nine frames of one such shape, type and range, not as many finite EVs that ascend, a negative
            tile, a mask of another shape or range, or a reference that is no frame's number.
    """
    device = next(model.parameters()).device
    _check(frames, evs, tile, reference)
    merging = Merging(ghosts, fusion_only, mask)
    _check_merging(merging, frames[0].shape)
    chosen = best_exposed(frames) if reference is None else reference

    def fuse_three(three: Three, first: Result | None) -> Result:
        bracket = reduce_frames(three.frames, three.evs, global_motion) if alignment == "frame" else None
        given = Calibration(three.evs, None if first is None else first.curve)
        known = known_curve or first is not None
        return _fuse_three(
            model, three, bracket, given, measure, known, len(frames), merging, keep_fusion, tile, progress
        )

    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        return fuse_threes(frames, evs, chosen, fuse_three)


def fuse_threes(
    frames: Sequence[Frame], evs: Sequence[float], reference: int, fuse_three: Callable[[Three, Result | None], Result]
) -> Result:
    """The result of a bracket from those of its threes (see `safnet.series`).

    Args:
        frames, evs: in ascending order of the EVs.
        reference: its number.
        fuse_three: makes a result of a three; it is also given what was made of those before.
    """
    result, seen = None, list[float]()
    for three in threes(frames, evs, reference):
        part = fuse_three(three, result)
        result = part._replace(evs=tuple(evs), given_evs=tuple(evs)) if result is None else _merged(result, seen, part)
        result = result._replace(evs=_put(result.evs, three.numbers, part.evs))
        seen += part.evs
    assert result is not None
    _in_units_of_darkest_(result, seen[0])
    return result


def _fuse_three(
    model: SAFNet,
    three: Three,
    bracket: Bracket | None,
    given: Calibration,
    measure: bool,
    known_curve: bool,
    count: int,
    merging: Merging,
    keep_fusion: bool,
    tile: int | None,
    progress: Progress,
) -> Result:
    """The result of three frames, with their EVs alone."""
    frames, evs = three.frames, three.evs
    height, width = frames[1].shape[2:]
    progress("aligning", 0, 1)
    found, aligned = _calibrate(model, frames, bracket, given, known_curve) if measure else (given, None)
    if aligned is None:
        aligned = _align(model, frames, bracket, found)
    advice = advise(bracket, aligned, found, evs, _names(three, count)) if bracket is not None and measure else ()
    ratios, device = exposure_ratios(found.evs), next(model.parameters()).device
    exposures = [
        ExposureReader(frame, ratio, found.straighten, device) for frame, ratio in zip(frames, ratios, strict=True)
    ]
    whole = _Whole(exposures, ratios, (height, width), judge(aligned.alignment, merging.ghosts))
    noise = _measure_noise(model, whole) if bracket is not None else None
    progress("aligning", 1, 1)
    if tile is None:
        tile = default_tile(next(model.parameters()).device)
    tiles = _tiles(height, width, tile)
    # Channels innermost, as pictures are written.
    radiance = torch.empty(1, 3, height, width).to(memory_format=torch.channels_last)
    fusion = _empty_fusion(height, width) if keep_fusion else None
    for number, (rows, columns) in enumerate(tiles, 1):
        refined, part = _fuse_tile(model, whole, noise, (rows, columns), merging)
        radiance[..., rows, columns] = refined
        if fusion is not None:
            fusion.fused[..., rows, columns] = part.fused
            for kept, piece in zip(fusion.alignment, part.alignment, strict=True):
                kept[..., rows, columns] = piece
        progress("refining", number, len(tiles))
    return Result(radiance, fusion, found.evs, found.curve, evs, aligned.covered, advice, three.numbers[1])


def default_tile(device: torch.device) -> int:
    return TILE if device.type == "cpu" else GPU_TILE


def _names(three: Three, count: int) -> tuple[str | None, ...]:
    """How the frames of a three are called; None for one that the reference stands in for."""
    if count == 3 and three.numbers == (0, 1, 2):
        return NAMES
    short, reference, long = (
        None if number is None else f"{number + 1}. darkest" if number else "darkest" for number in three.numbers
    )
    return short, reference, long


def _merged(result: Result, evs: Sequence[float], part: Result) -> Result:
    """What the exposures of some EVs show, with what those of another three do; in the memory of the former."""
    merge_(result.radiance, evs, part.radiance, part.evs)
    if result.fusion is not None and part.fusion is not None:
        merge_(result.fusion.fused, evs, part.fusion.fused, part.evs)
    new = tuple(sentence for sentence in part.advice if sentence not in result.advice)
    return result._replace(advice=result.advice + new)


def _in_units_of_darkest_(result: Result, ev: float) -> None:
    """From units of an exposure of this EV: another one if the reference stood in for a darker frame."""
    if ev == result.evs[0]:
        return
    for picture in (result.radiance, result.fusion.fused if result.fusion is not None else None):
        if picture is not None:
            picture.mul_(2.0 ** (result.evs[0] - ev)).clamp_(max=1)


def _put(evs: Sequence[float], numbers: Sequence[int | None], new: Sequence[float]) -> tuple[float, ...]:
    """EVs of all frames with new ones for some."""
    changed = {number: ev for number, ev in zip(numbers, new, strict=True) if number is not None}
    return tuple(changed.get(number, ev) for number, ev in enumerate(evs))


def _check(frames: Sequence[Frame], evs: Sequence[float], tile: int | None, reference: int | None) -> None:
    check_bracket("fuse_exposures", frames, evs, FEWEST_FRAMES, MOST_FRAMES)
    if reference is not None and not 0 <= reference < len(frames):
        raise ValueError(f"fuse_exposures: reference must be from 0 to {len(frames) - 1}, got {reference}")
    names = NAMES if len(frames) == 3 else [f"{number + 1}. darkest" for number in range(len(frames))]
    for name, frame in zip(names, frames, strict=True):
        if isinstance(frame, StoredFrame) or frame.dtype in INTEGER_SCALES:
            continue
        _check_floats(f"the {name} frame", frame, "float32, uint8 or uint16")
    if tile is not None and tile < 0:
        raise ValueError(f"fuse_exposures: tile must be at least 0, got {tile}")


def _check_merging(merging: Merging, shape: torch.Size) -> None:
    if merging.ghosts not in get_args(Ghosts):
        raise ValueError(f"fuse_exposures: ghosts must be {', '.join(get_args(Ghosts))}, got {merging.ghosts!r}")
    if (mask := merging.mask) is None:
        return
    expected = (1, 1, *shape[2:])
    if mask.shape != expected:
        raise ValueError(f"fuse_exposures: mask must be {expected}, got {tuple(mask.shape)}")
    if mask.dtype != torch.uint8:
        _check_floats("mask", mask, "float32 or uint8")


def _check_floats(name: str, values: Tensor, types: str) -> None:
    if values.dtype != torch.float32:
        raise ValueError(f"fuse_exposures: {name} must be {types}, got {values.dtype}")
    low, high = (limit.item() for limit in values.aminmax())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"fuse_exposures: {name} must have values in [0, 1], got {low:g} to {high:g}")


def _whole_exposures(
    frames: Sequence[Frame], calibration: Calibration, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    short, reference, long = (
        exposure_input(calibration.straighten(ldr_values(frame).to(device)), ratio)
        for frame, ratio in zip(frames, exposure_ratios(calibration.evs), strict=True)
    )
    return short, reference, long


def _calibrate(
    model: SAFNet, frames: Sequence[Frame], bracket: Bracket | None, given: Calibration, known_curve: bool
) -> tuple[Calibration, Aligned | None]:
    """What the frames show of curve and exposures, and the alignment found on the way if another would hardly differ."""
    seen: list[Aligned] = []

    def flows(_: Sequence[Tensor], evs: Sequence[float]) -> tuple[Tensor, Tensor]:
        if bracket is None:
            return _align_as_published(model, frames, given).visible_flows()
        seen.append(align(model, bracket, evs, given.straighten))
        return seen[0].visible_flows()

    values = bracket.frames if bracket is not None else [ldr_values(frame) for frame in frames]
    found = calibrate([given.straighten(frame) for frame in values], given.evs, flows, known_curve)
    surprise = max(abs(first - second) for first, second in zip(found.evs, given.evs, strict=True))
    as_given = found.curve is None and surprise <= NO_SURPRISE
    if known_curve:
        found = found._replace(curve=given.curve)
    return found, seen[0] if seen and as_given else None


def _align(model: SAFNet, frames: Sequence[Frame], bracket: Bracket | None, calibration: Calibration) -> Aligned:
    if bracket is not None:
        return align(model, bracket, calibration.evs, calibration.straighten)
    return _align_as_published(model, frames, calibration)


def _align_as_published(model: SAFNet, frames: Sequence[Frame], calibration: Calibration) -> Aligned:
    device = next(model.parameters()).device
    found = model.estimate(*_whole_exposures(frames, calibration, device))
    return Aligned(found, float("nan"), (1.0, 1.0))


def _empty_fusion(height: int, width: int) -> Fusion:
    fused, *alignment = (torch.empty(1, channels, height, width) for channels in (3, 2, 2, 1, 1))
    return Fusion(fused, Alignment(*alignment))


class _Whole(NamedTuple):
    """What all tiles are fused from.

    Attributes:
        exposures: short, reference and long.
        ratios: their exposure ratios.
        size: rows and columns.
        alignment: flows and masks, reduced.
    """

    exposures: Sequence[ExposureReader]
    ratios: Sequence[float]
    size: tuple[int, int]
    alignment: Alignment


class _Warped(NamedTuple):
    """What one tile of the frame is fused from: everything aligned to the reference.

    Attributes:
        short, reference, long: (1, 6, h, w), as of `exposure_input`.
        features: the refine module's, of short and long.
        alignment: flows and masks of the tile.
    """

    short: Tensor
    reference: Tensor
    long: Tensor
    features: tuple[Tensor, Tensor]
    alignment: Alignment


def _warp_part(model: SAFNet, whole: _Whole, part: tuple[slice, slice]) -> _Warped:
    """A part of the frame, aligned."""
    aligned = full_size(whole.alignment, *whole.size, *part)

    def warped(number: int, flow: Tensor, features: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        source, moved = _source_of(flow, part, whole.size, model.refinenet.FEATURE_RADIUS)
        cut = whole.exposures[number].read(*source)
        seen = features(cut)
        found = safnet_ops.backward_warp(cut if seen is cut else torch.cat([cut, seen], 1), moved)
        found = found[..., : flow.shape[2], : flow.shape[3]]
        return found[:, 0:6], found if seen is cut else found[:, 6:]

    short, short_features = warped(0, aligned.flow_short, model.refinenet.short_features)
    long, long_features = warped(2, aligned.flow_long, model.refinenet.long_features)
    return _Warped(short, whole.exposures[1].read(*part), long, (short_features, long_features), aligned)


def _measure_noise(model: SAFNet, whole: _Whole) -> Tensor:
    """What `merge.measure_noise` finds in a few places of the frame, at full size."""
    height, width = whole.size
    places = [_warp_part(model, whole, (rows, columns)) for rows in _samples(height) for columns in _samples(width)]
    long, reference = (
        torch.cat([exposure.flatten(2) for exposure in exposures], 2)[..., None]
        for exposures in ([place.long for place in places], [place.reference for place in places])
    )
    return measure_noise(long, reference, whole.ratios)


def _samples(length: int) -> list[slice]:
    """Spans of a side in which noise is measured: all of a short one, else a few evenly placed."""
    if length <= SAMPLES * SAMPLE:
        return [slice(0, length)]
    starts = [round((number + 0.5) * length / SAMPLES - SAMPLE / 2) for number in range(SAMPLES)]
    return [slice(start, start + SAMPLE) for start in starts]


def _fuse_tile(
    model: SAFNet,
    whole: _Whole,
    noise: Tensor | None,
    tile: tuple[slice, slice],
    merging: Merging,
) -> tuple[Tensor, Fusion]:
    """Refined result and explicit fusion of one tile of the frame."""
    radius = model.refinenet.RADIUS
    # Where the frame ends there is no margin: there the convolutions' own padding must act.
    outer, inner = zip(
        *(_with_margin(span, radius, length) for span, length in zip(tile, whole.size, strict=True)),
        strict=True,
    )
    part = _warp_part(model, whole, (outer[0], outer[1]))
    still = torch.zeros_like(part.alignment.flow_short)
    images = part.short[:, 0:3], part.reference[:, 0:3], part.long[:, 0:3], still, still
    reference_ldr, masks, weights = part.reference[:, 3:6], part.alignment[2:], None
    if noise is not None:
        weights, mask_long = weigh_by_noise(part.short, part.reference, part.long, masks[1], whole.ratios, noise)
        masks = masks[0], mask_long
    if merging.mask is not None:
        rows, columns = outer
        free = 1 - ldr_values(merging.mask[:, :, rows, columns]).to(masks[0].device)
        masks = masks[0] * free, masks[1] * free
    aligned = Alignment(*part.alignment[:2], *masks)
    fused = safnet_ops.fused_fuse(*images, *masks, None if weights else reference_ldr, weights=weights)
    fusion, refined = Fusion(fused, aligned), fused
    if not merging.fusion_only:
        residual = model.refinenet(part.features, part.reference, fusion)
        if noise is not None:
            residual = residual * trust_in_refining(reference_ldr)
        if merging.mask is not None:
            residual = residual * free
        refined = fused + residual
    refined = refined.clamp(0, 1)
    cut = (..., *inner)
    return refined[cut], Fusion(fused[cut], Alignment(*(field[cut] for field in aligned)))


def _with_margin(span: slice, margin: int, length: int) -> tuple[slice, slice]:
    """A span with a margin that ends where the frame does, and where the span lies in it."""
    outer = slice(max(span.start - margin, 0), min(span.stop + margin, length))
    return outer, slice(span.start - outer.start, span.stop - outer.start)


def _source_of(
    flow: Tensor, tile: tuple[slice, slice], size: tuple[int, int], margin: int
) -> tuple[tuple[slice, slice], Tensor]:
    """The part of a frame that a tile's flow leads into, and the flow from the tile to that part, padded to its size."""
    parts, offsets = [], []
    for axis, (span, length) in enumerate(zip(tile, size, strict=True)):
        pixels = torch.arange(span.start, span.stop, device=flow.device, dtype=flow.dtype)
        target = flow[:, 1 - axis] + (pixels[:, None] if axis == 0 else pixels)
        low, high = (int(end) for end in target.clamp(0, length - 1).aminmax())
        start, stop = max(low - margin, 0), min(high + 2 + margin, length)
        # The warp takes pictures and flows of one size.
        stop = min(max(stop, start + span.stop - span.start), length)
        start = max(min(start, stop - (span.stop - span.start)), 0)
        parts.append(slice(start, stop))
        offsets.append(span.start - start)
    moved = flow + flow.new_tensor([offsets[1], offsets[0]]).view(1, 2, 1, 1)
    missing = [part.stop - part.start - moved.shape[2 + axis] for axis, part in enumerate(parts)]
    return (parts[0], parts[1]), torch.nn.functional.pad(moved, (0, missing[1], 0, missing[0]))


def _tiles(height: int, width: int, tile: int) -> list[tuple[slice, slice]]:
    """Cut a frame: see `fuse_exposures`."""
    high, wide = (max(1, round(tile / TILE_ASPECT)), round(tile * TILE_ASPECT)) if tile else (height, width)
    return [(rows, columns) for rows in _spans(height, high) for columns in _spans(width, wide)]


def _spans(length: int, most: int) -> Iterator[slice]:
    """Cut a side into spans of nearly equal length, at most `most` each."""
    count = -(-length // most)
    for number in range(count):
        yield slice(number * length // count, (number + 1) * length // count)
