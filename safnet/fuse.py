"""Fusing frames of any size in bounded memory.

Flow and mask are estimated once, on the whole frame at half size, and everything is warped on the whole frame, so
motion may reach across tiles. Only the refine module's convolutions run in tiles, each read with a margin as wide as
they see, so that no seam can arise.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import safnet_ops
from safnet.calibrate import Calibration, calibrate, check_bracket
from safnet.model import Fusion, SAFNet
from safnet.radiance import exposure_input, exposure_ratios

TILE = 1024  # pixels a side; the full model's refine module then takes about 2 GB
WHOLE_PIXELS = 2 * TILE**2  # frames up to this are refined in one piece

Progress = Callable[[str, int, int], None]  # stage, steps done, steps in all


class Result(NamedTuple):
    """Linear radiance (1, 3, H, W) in [0, 1] in the short exposure's units, and what is behind it.

    Attributes:
        radiance: on the model's device.
        fusion: the explicit fusion before the refine module, with full-size flows and masks.
        evs, curve: exposures and camera curve, given or measured (see `safnet.calibrate.Calibration`).
        given_evs: the exposures before anything was measured.
    """

    radiance: Tensor
    fusion: Fusion
    evs: tuple[float, ...]
    curve: Tensor | None
    given_evs: tuple[float, ...]


def fuse_exposures(
    model: SAFNet,
    frames: Sequence[Tensor],
    evs: Sequence[float],
    *,
    measure: bool = False,
    tile: int | None = None,
    precision: torch.dtype = torch.float32,
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """Fuse three LDR frames; unless measuring, equal to the model's forward to 1e-4, in memory that tiles keep in bounds.

    Args:
        model: in eval mode, on the device where the work shall run.
        frames: short, reference, long: (1, 3, H, W) float32, LDR values in [0, 1], on any device.
        evs: their exposure values in stops, ascending; only differences matter.
        measure: find out the outer frames' true exposures and the camera's curve (see `calibrate`), instead of trusting
            `evs` and assuming gamma 2.2.
        tile: side of the refine module's tiles in pixels; 0 for the whole frame, None to choose by the frame's size.
        precision: type of the convolutions. Radiance, flows, masks and warps stay float32.
        progress: called after each step with its name, the number of steps done, and of all.

    Raises:
        ValueError: not three frames of one such shape, type and range, not three finite EVs that ascend, or a negative tile.
    """
    _check(frames, evs, tile)
    device = next(model.parameters()).device

    def inputs(frames: Sequence[Tensor], evs: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        short, reference, long = (
            exposure_input(frame.to(device), ratio) for frame, ratio in zip(frames, exposure_ratios(evs), strict=True)
        )
        return short, reference, long

    height, width = frames[1].shape[2:]
    if tile is None:
        tile = 0 if height * width <= WHOLE_PIXELS else TILE
    tile = tile or max(height, width)
    with torch.inference_mode(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        progress("aligning", 0, 1)
        bracket = Calibration(tuple(evs))
        if measure:
            bracket = calibrate(frames, evs, lambda frames, evs: model.estimate(*inputs(frames, evs))[:2])
        short, reference, long = inputs([bracket.straighten(frame) for frame in frames], bracket.evs)
        fusion = model.fuse(short, reference, long, model.estimate(short, reference, long))
        progress("aligning", 1, 1)
        radiance = _refine(model, short, reference, long, fusion, tile, progress)
    return Result(radiance, fusion, bracket.evs, bracket.curve, tuple(evs))


def _check(frames: Sequence[Tensor], evs: Sequence[float], tile: int | None) -> None:
    check_bracket("fuse_exposures", frames, evs)
    for name, frame in zip(("short", "reference", "long"), frames, strict=True):
        if frame.dtype != torch.float32:
            raise ValueError(f"fuse_exposures: the {name} frame must be float32, got {frame.dtype}")
        low, high = (limit.item() for limit in frame.aminmax())
        if not 0 <= low <= high <= 1:
            raise ValueError(f"fuse_exposures: the {name} frame must have values in [0, 1], got {low:g} to {high:g}")
    if tile is not None and tile < 0:
        raise ValueError(f"fuse_exposures: tile must be at least 0, got {tile}")


def _refine(
    model: SAFNet, short: Tensor, reference: Tensor, long: Tensor, fusion: Fusion, tile: int, progress: Progress
) -> Tensor:
    """SAFNet.refine with its convolutions in tiles."""
    net = model.refinenet

    def warped(features: Callable[[Tensor], Tensor], exposure: Tensor, flow: Tensor) -> Tensor:
        return safnet_ops.backward_warp(in_tiles(features, [exposure], tile, net.FEATURE_RADIUS), flow)

    def refined(*inputs: Tensor) -> Tensor:
        warped_short, warped_long, reference, fused, *alignment = inputs
        part = Fusion(fused, type(fusion.alignment)(*alignment))
        return (fused + net.body((warped_short, warped_long), reference, part)).clamp(0, 1)

    warped_short = warped(net.short_features, short, fusion.alignment.flow_short)
    warped_long = warped(net.long_features, long, fusion.alignment.flow_long)
    inputs = [warped_short, warped_long, reference, fusion.fused, *fusion.alignment]
    return in_tiles(refined, inputs, tile, net.RADIUS, lambda done, total: progress("refining", done, total))


def in_tiles(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tile: int,
    radius: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """function(*inputs) computed tile by tile, for a function that sees at most `radius` pixels to each side.

    A tile is cut with a margin of `radius`, except where the frame ends: there the function's own padding must act.
    """
    height, width = inputs[0].shape[2:]
    rows, columns = list(_spans(height, tile)), list(_spans(width, tile))
    if radius == 0 or len(rows) * len(columns) == 1:
        whole = function(*inputs)
        progress(1, 1)
        return whole
    output = None
    for number, (row, column) in enumerate(((row, column) for row in rows for column in columns), 1):
        top, left = max(row.start - radius, 0), max(column.start - radius, 0)
        cut = (..., slice(top, row.stop + radius), slice(left, column.stop + radius))
        part = function(*(tensor[cut] for tensor in inputs))
        if output is None:
            output = part.new_empty(*part.shape[:2], height, width)
        output[..., row, column] = part[..., row.start - top : row.stop - top, column.start - left : column.stop - left]
        progress(number, len(rows) * len(columns))
    assert output is not None
    return output


def _spans(length: int, tile: int) -> Iterator[slice]:
    """Cut a side into spans of nearly equal length, at most `tile` each."""
    count = -(-length // tile)
    for number in range(count):
        yield slice(number * length // count, (number + 1) * length // count)
