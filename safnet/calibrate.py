"""What the aligned frames themselves tell of their exposures and of the camera's curve.

The network assumes exact EVs and a curve of gamma 2.2. Cameras round the exposure times that they report, shutters scatter, and
the pictures that cameras develop have an S-shaped curve: two stops of light are four in the shadows and less than one in the
highlights. Wherever the fusion turns from one frame to another that shows as a patch of another brightness or colour.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import safnet_ops
from safnet.radiance import GAMMA, Frame

DARKEST, BRIGHTEST = 0.03, 0.96  # LDR values between which a frame is neither noise nor clipped
SMALLEST_PART = 0.01  # of the values, which must be well exposed in both frames
MOST_PIXELS = 2**20  # at which frames are aligned and compared
MOST_VALUES = 2**17  # of a colour, which tell as much of medians and modes as all would
LARGEST_SPREAD = 0.3  # stops over which the more alike half may spread; beyond, motion or noise hides the exposure
LARGEST_SURPRISE = 0.5  # stops between given and measured exposure; beyond, only overwhelming evidence counts:
SURE_SPREAD, SURE_PART = 0.1, 0.1  # a spread no larger, among so large a part of the values
LEVELS = 48  # of brightness at which frames are compared; equal steps of the LDR value's root, as the eye's are
FEWEST_LEVELS = 24
FEWEST_AT_LEVEL = 30  # values
NOISY_LEVEL = 1.0  # stops between the quartiles at a level, beyond which its median is one of noise or of other things
COMMON_LEVEL = 0.02  # part of the values from which a level counts fully
KNOTS = 24  # of a curve, in equal steps of the root
SMOOTHNESS, RIDGE = 2.0, 0.01  # weights of second differences and of the deviation from gamma 2.2 itself
SMALLEST_BEND = 0.15  # stops, root mean square, by which levels must differ from each other before a curve is blamed
LARGEST_REST = 0.5  # part of that which a curve may leave

QUARTILES = torch.tensor([0.25, 0.75])

Align = Callable[[Sequence[Tensor], Sequence[float]], Sequence[Tensor]]


class Calibration(NamedTuple):
    """How frames were exposed and developed.

    Attributes:
        evs: in stops, ascending.
        curve: stops by which the camera's pictures are darker than gamma 2.2 tells, at KNOTS equal steps of the LDR value's
            root from 0 to 1; None where they fit gamma 2.2.
        measured: EVs of the outer frames as the frames show them, whether they were taken or not; None where they do not.
    """

    evs: tuple[float, ...]
    curve: Tensor | None = None
    measured: tuple[float | None, float | None] = (None, None)

    def straighten(self, frame: Tensor) -> Tensor:
        """LDR values of a frame in [0, 1] -> those that a curve of gamma 2.2 gives, of the same shape."""
        return frame if self.curve is None else develop(frame, self.curve)


def calibrate(frames: Sequence[Tensor], evs: Sequence[float], align: Align, known_curve: bool = False) -> Calibration:
    """Find the camera's curve and correct the EVs, as far as frames show them.

    Where levels of brightness contradict each other, the camera's curve is fitted to them as by Debevec and Malik 1997, but
    as a smooth deviation from gamma 2.2, and to the median at each level. Then the outer frames' EVs are measured. What is
    not clear stays as given.

    Args:
        frames: short, reference, long: (1, 3, H, W), LDR values in [0, 1].
        evs: exposure values in stops, ascending.
        align: frames and EVs -> flows of short and long (1, 2, h, w) from the reference, in pixels of h x w, where the frames
            are compared.
        known_curve: the values are of gamma 2.2 for certain: measure EVs alone.

    Raises:
        ValueError: not three frames of that shape and one size, or not three finite EVs that ascend.
    """
    check_bracket("calibrate", frames, evs)
    frames = [_shrink(frame) for frame in frames]
    flows = align(frames, evs)
    found = Calibration(tuple(evs), None if known_curve else measure_curve(frames, flows, evs))
    exposures = measure_exposures([found.straighten(frame) for frame in frames], flows)
    measured = tuple(None if exposure is None else evs[1] + exposure.stops for exposure in exposures)
    return found._replace(evs=believed_evs(exposures, evs), measured=(measured[0], measured[1]))


class Exposure(NamedTuple):
    """How much more a frame is exposed than the reference.

    Attributes:
        stops: of all colours together.
        of_colours: of red, green and blue alone; NaN where a colour does not show it.
        spread: stops over which the more alike half of the values lies.
        part: of the values, which is well exposed in both frames.
    """

    stops: float
    of_colours: tuple[float, ...]
    spread: float
    part: float

    @property
    def is_sure(self) -> bool:
        return self.spread <= SURE_SPREAD and self.part >= SURE_PART


def measure_exposures(frames: Sequence[Tensor], flows: Sequence[Tensor]) -> tuple[Exposure | None, Exposure | None]:
    """Exposures of short and long against the reference, with which they are as bright as it is; None where unclear:
    where too few pixels are well exposed in both frames, or these contradict each other.

    The measured ratio of two frames is the shorth of the ratios of their values, the middle of the shortest interval that
    holds half of them (Andrews et al. 1972): what moved elsewhere than the flow says does not pull it.

    Args:
        frames, flows: as of `calibrate`.
    """
    short, long = (_exposure(*pair) for pair in _aligned(frames, flows))
    return short, long


def measure_evs(frames: Sequence[Tensor], flows: Sequence[Tensor], evs: Sequence[float]) -> tuple[float, ...]:
    """`evs` with those of short and long as the frames show them: `believed_evs` of `measure_exposures`."""
    return believed_evs(measure_exposures(frames, flows), evs)


def believed_evs(exposures: Sequence[Exposure | None], evs: Sequence[float]) -> tuple[float, ...]:
    """`evs` with those of short and long as measured.

    One stays as given where nothing was measured, or something far from it that is not sure; both do where the measured
    ones would not ascend.
    """
    matched = list(evs)
    for frame, exposure in zip((0, 2), exposures, strict=True):
        if exposure is not None:
            ev = evs[1] + exposure.stops
            if abs(ev - evs[frame]) <= LARGEST_SURPRISE or exposure.is_sure:
                matched[frame] = ev
    return tuple(matched) if all(low < high for low, high in pairwise(matched)) else tuple(evs)


def measure_curve(frames: Sequence[Tensor], flows: Sequence[Tensor], evs: Sequence[float]) -> Tensor | None:
    """The camera's curve, as of `Calibration`; None where gamma 2.2 fits, or no smooth ascending curve does.

    Args:
        frames, flows, evs: as of `calibrate`.
    """
    levels = []
    for (aligned, reference), ev in zip(_aligned(frames, flows), (evs[0], evs[2]), strict=True):
        # By the levels of the one frame and of the other: noise in the levels then does not tilt the curve.
        levels += [_levels(aligned, reference, ev - evs[1]), _levels(reference, aligned, evs[1] - ev)]
    first, second, error, weight = torch.cat(levels).unbind(1)
    if len(first) < FEWEST_LEVELS:
        return None
    rows = weight[:, None] * (_knot_weights(first) - _knot_weights(second))
    smooth = SMOOTHNESS * torch.eye(KNOTS, dtype=torch.double).diff(n=2, dim=0)
    system = torch.cat([rows, smooth, RIDGE * torch.eye(KNOTS, dtype=torch.double)])[:, :-1]  # at the brightest it is 0
    right = torch.cat([weight * error, error.new_zeros(len(system) - len(rows))])
    curve = F.pad(torch.linalg.lstsq(system, right[:, None]).solution[:, 0], (0, 1))
    rest = (weight * error - rows @ curve).norm() / weight.norm()
    # An error that is the same at all levels is one of the EVs.
    bends = [part[:, 3] * (part[:, 2] - (part[:, 2] * part[:, 3]).sum() / part[:, 3].sum()) for part in levels]
    bend = torch.cat(bends).norm() / weight.norm()
    ascends = bool((2 * GAMMA * torch.arange(1, KNOTS).log2() + curve[1:]).diff().min() > 0)
    if bend < SMALLEST_BEND or rest > LARGEST_REST * bend or not ascends:
        return None
    return curve.float()


def develop(frame: Tensor, curve: Tensor) -> Tensor:
    """LDR values in [0, 1] of a camera with that curve -> those that a curve of gamma 2.2 gives, of the same shape."""
    curve = curve.to(frame)
    position = frame.clamp(0, 1).sqrt() * (KNOTS - 1)
    knot = position.long().clamp(max=KNOTS - 2)
    return frame * (torch.lerp(curve[knot], curve[knot + 1], position - knot) / GAMMA).exp2()


def check_bracket(operator: str, frames: Sequence[Frame], evs: Sequence[float], fewest: int = 3, most: int = 3) -> None:
    """Raise ValueError, naming the operator, unless there are so many frames (1, 3, H, W) and finite EVs that ascend."""
    shapes = [tuple(frame.shape) for frame in frames]
    number = "three" if fewest == most == 3 else f"{fewest} to {most}"
    if not fewest <= len(shapes) <= most or len(set(shapes)) != 1 or len(shapes[0]) != 4 or shapes[0][:2] != (1, 3):
        raise ValueError(f"{operator}: frames must be {number} of (1, 3, H, W), got {shapes}")
    if len(evs) != len(frames) or not all(map(math.isfinite, evs)) or any(low >= high for low, high in pairwise(evs)):
        number = "three" if len(frames) == 3 else str(len(frames))
        raise ValueError(f"{operator}: evs must be {number} finite numbers that ascend, got {tuple(evs)}")


def _shrink(frame: Tensor) -> Tensor:
    height, width = frame.shape[2:]
    factor = (MOST_PIXELS / (height * width)) ** 0.5
    if factor >= 1:
        return frame
    size = max(1, round(height * factor)), max(1, round(width * factor))
    return F.interpolate(frame, size, mode="bilinear", align_corners=False, antialias=True)


def _aligned(frames: Sequence[Tensor], flows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """LDR values (3, n) of the aligned short and long frame, each with the reference's at the same pixels.

    Pixels without a flow (NaN) are left out; NaN in frames counts as 0.
    """
    short, reference, long = (
        F.interpolate(frame.to(flows[0]), flows[0].shape[2:], mode="bilinear", align_corners=False) for frame in frames
    )
    pairs = []
    for frame, flow in zip((short, long), flows, strict=True):
        aligned, seen = safnet_ops.backward_warp(frame, flow)[0], ~flow[0].isnan().any(0)
        pairs.append((_some(aligned[:, seen]).nan_to_num(), _some(reference[0][:, seen]).nan_to_num()))
    return pairs


def _some(values: Tensor) -> Tensor:
    """At most MOST_VALUES of a colour (3, n), evenly taken, at a step that no width is likely to be a multiple of."""
    return values[:, :: 2 * (values.shape[1] // (2 * MOST_VALUES)) + 1]


def _exposure(aligned: Tensor, reference: Tensor) -> Exposure | None:
    """How much more the frame (3, n) is exposed than the reference; None where that cannot be seen."""
    exposed = (torch.minimum(aligned, reference) > DARKEST) & (torch.maximum(aligned, reference) < BRIGHTEST)
    stops = GAMMA * (aligned / reference).log2()
    fewest = max(2, SMALLEST_PART * exposed.numel())
    found = _shorth(stops[exposed], fewest)
    if found is None:
        return None
    colours = [_shorth(colour[seen], fewest / 3) for colour, seen in zip(stops, exposed, strict=True)]
    return Exposure(
        found[0],
        tuple(math.nan if colour is None else colour[0] for colour in colours),
        found[1],
        float(exposed.float().mean()),
    )


def _shorth(values: Tensor, fewest: float) -> tuple[float, float] | None:
    """The middle of the shortest interval that holds half of the values, and its length; None of too few or too wide."""
    if len(values) < max(2, fewest):
        return None
    values = values.sort().values
    half = len(values) // 2
    spread, first = (values[half:] - values[: len(values) - half]).min(0)
    return (values[first + half // 2].item(), spread.item()) if spread <= LARGEST_SPREAD else None


def _levels(first: Tensor, second: Tensor, stops: float) -> Tensor:
    """By levels of `second` (n, 4): medians of both, the error in stops if gamma is 2.2, and a weight."""
    first, second = first.flatten(), second.flatten()
    order = second.argsort()
    first, second = first[order], second[order]
    counts = (second.clamp(0, 1).sqrt() * LEVELS).long().bincount(minlength=LEVELS).tolist()
    levels = []
    for ones, others in zip(first.split(counts), second.split(counts), strict=True):
        if len(ones) < FEWEST_AT_LEVEL:
            continue
        # Medians of all values, dark and clipped ones too, are those of the well exposed ones if they are well exposed.
        one, other = ones.median().item(), others.median().item()
        low, high = ones.clamp(min=1e-4).quantile(QUARTILES).tolist()
        if GAMMA * math.log2(high / low) > NOISY_LEVEL:
            continue
        if min(one, other) > DARKEST and max(one, other) < BRIGHTEST:
            weight = min(1.0, len(ones) / len(first) / COMMON_LEVEL) ** 0.5
            levels.append((one, other, stops - GAMMA * math.log2(one / other), weight))
    return torch.tensor(levels, dtype=torch.double).view(-1, 4)


def _knot_weights(values: Tensor) -> Tensor:
    """Rows (n, KNOTS) whose products with a curve are its values there."""
    distance = values.sqrt()[:, None] * (KNOTS - 1) - torch.arange(KNOTS)
    return (1 - distance.abs()).clamp(min=0)
