"""Brackets of two to nine frames as threes, which is what the network takes: a short exposure, the reference and a long one.

All threes share the reference, so that their results are aligned, and a pixel of the whole is their mean by what noise the
exposures behind it have.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safnet.calibrate import BRIGHTEST, DARKEST
from safnet.merge import CLIPPED, FADING, NOISE_EXPONENT
from safnet.radiance import GAMMA, Frame, StoredFrame, code_values, ldr_values

STAND_IN = (
    0.05  # stops by which the reference is made darker or lighter where it stands in for a frame that is not there
)
SAMPLES = 512  # rows and columns of a frame that are looked at to choose the reference
ROWS = 64  # that are merged at a time
LEAST_WEIGHT = 1e-3  # of what was merged first, so that no pixel is without weight


class Three(NamedTuple):
    """What is fused at once.

    Attributes:
        frames, evs: of short, reference and long.
        numbers: of these among all frames; None where the reference stands in for short or long.
    """

    frames: tuple[Frame, Frame, Frame]
    evs: tuple[float, float, float]
    numbers: tuple[int | None, int, int | None]


def best_exposed(frames: Sequence[Frame]) -> int:
    """The frame of which most is neither dark nor clipped; of three, the middle one."""
    if len(frames) == 3:
        return 1

    def share(frame: Frame) -> float:
        rows, columns = (max(1, side // SAMPLES) for side in frame.shape[2:])
        seen = ldr_values(frame[:, :, ::rows, ::columns])
        return float(((seen > DARKEST) & (seen < BRIGHTEST)).float().mean())

    return max(range(len(frames)), key=lambda number: share(frames[number]))


def threes(frames: Sequence[Frame], evs: Sequence[float], reference: int) -> list[Three]:
    """Threes in which every frame has a part: the darkest with the brightest first, then inwards.

    Args:
        frames, evs: in ascending order of the EVs.
        reference: its number.
    """
    darker, brighter = list(range(reference)), list(range(len(frames) - 1, reference, -1))

    def frame(number: int | None, stops: float) -> tuple[Frame, float]:
        if number is None:
            return _lighter(frames[reference], stops), evs[reference] + stops
        return frames[number], evs[number]

    found = []
    for place in range(max(len(darker), len(brighter))):
        short, long = (side[min(place, len(side) - 1)] if side else None for side in (darker, brighter))
        (short_frame, short_ev), (long_frame, long_ev) = frame(short, -STAND_IN), frame(long, STAND_IN)
        taken = short_frame, frames[reference], long_frame
        found.append(Three(taken, (short_ev, evs[reference], long_ev), (short, reference, long)))
    return found


def _lighter(frame: Frame, stops: float) -> Frame:
    """A frame as if it had been exposed longer."""
    factor = 2 ** (stops / GAMMA)
    if isinstance(frame, Tensor) and frame.is_floating_point():
        return (frame * factor).clamp(max=1)
    codes = frame.codes if isinstance(frame, StoredFrame) else frame
    return StoredFrame(codes, (code_values(frame) * factor).clamp(max=1))


def merge_(radiance: Tensor, evs: Sequence[float], other: Tensor, other_evs: Sequence[float]) -> None:
    """Add to radiance (1, 3, H, W), in place, what the result of another three shows of the same.

    Args:
        evs, other_evs: of all exposures in the one and in the other; each is in units of its first exposure.
    """
    unit = 2.0 ** (evs[0] - other_evs[0])
    ratios, other_ratios = ([2.0 ** (ev - evs[0]) for ev in some] for some in (evs, other_evs))
    for first, second in zip(radiance.split(ROWS, 2), other.split(ROWS, 2), strict=True):
        # Both by the first, which has the darkest frame: near its own end a result is too dark to tell what is clipped.
        weight, other_weight = _certainty(first, ratios) + LEAST_WEIGHT, _certainty(first, other_ratios)
        first.lerp_(second * unit, other_weight / (weight + other_weight))


def _certainty(radiance: Tensor, ratios: Sequence[float]) -> Tensor:
    """Inverse variance, but for a factor, that unclipped exposures of these ratios have together."""
    total = torch.zeros_like(radiance)
    for ratio in ratios:
        ldr = (radiance * ratio).clamp(0, 1).pow(1 / GAMMA)
        total += ((CLIPPED - ldr) / (CLIPPED - FADING)).clamp(0, 1) * ratio**NOISE_EXPONENT
    return total
