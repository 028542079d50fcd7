"""Alignment of frames of any size: global motion first, then the network, coarse to fine, on a frame of about a megapixel.

What a network of a fixed number of levels can follow is a fixed number of pixels, which in a frame of 24 megapixels is
little. So frames are reduced, the motion of the whole camera is taken out, and as many of the network's levels run as the
frame needs: all from a coarsest size on, then finer ones as long as they make the frames more alike.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor

import safnet_ops
from safnet.choices import Ghosts
from safnet.model import SIZE_MULTIPLE, Alignment, SAFNet
from safnet.motion import Motion, apply_motion, estimate_motion, motion_at, motion_flow
from safnet.radiance import GAMMA, Frame, exposure_input, exposure_ratios, ldr_values, map_codes

WORKING_PIXELS = 1.5e6  # at which frames are aligned
COARSEST_SIDE = 160  # pixels of the shorter side where the network begins, those of its training scenes
WORTHWHILE = 0.98  # of the disagreement, which a finer level must leave at most
DARKEST, BRIGHTEST = 0.03, 0.96  # LDR values between which two exposures can be compared
LARGEST_DISAGREEMENT = (
    0.1  # of LDR values: beyond it what a pixel shows is something else, and how else does not matter
)
STILL = 2.0  # pixels of the network's size, up to which a flow may be an error of what did not move
STILL_RADIUS = 4  # pixels to each side over which frames are compared with flow and without
HIDDEN = -20.0  # logit of a mask where the reference alone serves
TRUSTED = 20.0  # logit where an outer exposure counts fully
DOUBT = 2.0  # by which logits are lower where the outer exposures are to count only if the network is sure


class Bracket(NamedTuple):
    """Three exposures of one scene at the size where they are aligned.

    Attributes:
        frames: short, reference, long (1, 3, h, w), LDR values in [0, 1].
        motions: global motions from the reference to short and to long, in pixels of h x w.
    """

    frames: tuple[Tensor, Tensor, Tensor]
    motions: tuple[Motion, Motion]

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.frames[1].shape[2:]
        return height, width


class Aligned(NamedTuple):
    """What `align` found.

    Attributes:
        alignment: flows and mask logits, in pixels of their own size, which is the network's and not the frames'.
        disagreement: mean difference of the aligned outer frames from the reference, in LDR values, where all are well
            exposed and at most LARGEST_DISAGREEMENT; NaN where nothing can be compared.
        covered: shares of the reference that lie inside the short and inside the long frame.
    """

    alignment: Alignment
    disagreement: float
    covered: tuple[float, float]

    def visible_flows(self) -> tuple[Tensor, Tensor]:
        """The flows, NaN where they lead out of the frames."""
        flow_short, flow_long, mask_short, mask_long = self.alignment
        return flow_short.masked_fill(mask_short <= HIDDEN, torch.nan), flow_long.masked_fill(
            mask_long <= HIDDEN, torch.nan
        )


def reduce_frames(frames: Sequence[Frame], evs: Sequence[float], global_motion: bool = True) -> Bracket:
    """Frames of any size -> what is aligned of them.

    Args:
        frames: short, reference, long (1, 3, H, W): LDR values, in [0, 1] or as files hold them (`radiance.ldr_values`).
        evs: exposure values in stops, ascending.
        global_motion: look for the motion of the whole camera.
    """
    short, reference, long = (_reduce(frame) for frame in frames)
    motions = Motion.none(), Motion.none()
    if global_motion:
        ratios = exposure_ratios(evs)
        motions = (
            estimate_motion(reference[0], short[0], ratios[1], ratios[0]),
            estimate_motion(reference[0], long[0], ratios[1], ratios[2]),
        )
    return Bracket((short, reference, long), motions)


def align(
    model: SAFNet, bracket: Bracket, evs: Sequence[float], straighten: Callable[[Tensor], Tensor] = lambda frame: frame
) -> Aligned:
    """Flows and masks by the network, on frames from which the global motion is taken out, and composed with it.

    Args:
        model: in eval mode.
        bracket: of `reduce_frames`.
        evs: exposure values in stops, ascending.
        straighten: LDR values of the camera -> those of gamma 2.2 (`Calibration.straighten`).
    """
    device = next(model.parameters()).device
    exposures = [
        exposure_input(straighten(frame).to(device), ratio)
        for frame, ratio in zip(_without_motion(bracket), exposure_ratios(evs), strict=True)
    ]
    ratios = exposure_ratios(evs)
    alignment, disagreement = _finest_worthwhile(model, exposures, ratios)
    return _with_motion(_hold_still(exposures, alignment, ratios), disagreement, bracket)


def judge(alignment: Alignment, ghosts: Ghosts) -> Alignment:
    """The alignment with masks that trust the outer exposures wherever they reach (ghosts "off"), as the network does
    ("normal"), or only where it is sure ("strong").
    """
    if ghosts == "normal":
        return alignment
    short, long = (
        mask.masked_fill(mask > HIDDEN, TRUSTED) if ghosts == "off" else mask - DOUBT
        for mask in (alignment.mask_short, alignment.mask_long)
    )
    return alignment._replace(mask_short=short, mask_long=long)


def full_size(alignment: Alignment, height: int, width: int, rows: slice, columns: slice) -> Alignment:
    """Rows and columns of the alignment resized to height x width: flows in its pixels, masks as probabilities."""
    low_height, low_width = alignment.flow_short.shape[2:]
    flow_scale = alignment.flow_short.new_tensor([width / low_width, height / low_height]).view(1, 2, 1, 1)
    lower, upper, fraction = _neighbours(low_height, height, rows)
    first, last = int(lower[0]), int(upper[-1])
    # Along rows, the slow way through memory, on the few rows that are needed; then along columns.
    stacked = torch.cat([field[:, :, first : last + 1] for field in alignment], 1)
    stacked = _between(stacked, 3, *_neighbours(low_width, width, columns))
    stacked = _between(stacked, 2, lower - first, upper - first, fraction)
    flow_short, flow_long, mask_short, mask_long = stacked.split([2, 2, 1, 1], 1)
    return Alignment(flow_short * flow_scale, flow_long * flow_scale, mask_short.sigmoid(), mask_long.sigmoid())


def _neighbours(size: int, length: int, part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """For a part of what interpolation of `size` values to `length` gives (align_corners False): between which values each
    lies, and how far from the first of them.
    """
    position = (torch.arange(part.start, part.stop, dtype=torch.float64) + 0.5) * (size / length) - 0.5
    position = position.clamp(0, size - 1)
    lower = position.long()
    return lower, (lower + 1).clamp(max=size - 1), position - lower


def _between(values: Tensor, axis: int, lower: Tensor, upper: Tensor, fraction: Tensor) -> Tensor:
    """Linear interpolation along an axis, as `_neighbours` says."""
    below, above = (values.index_select(axis, number.to(values.device)) for number in (lower, upper))
    return torch.lerp(below, above, fraction.to(values).view(-1, *(1,) * (3 - axis)))


def _reduce(frame: Frame) -> Tensor:
    """LDR values in [0, 1] of a frame reduced to WORKING_PIXELS, each pixel the mean of those that it covers."""
    height, width = frame.shape[2:]
    factor = (WORKING_PIXELS / (height * width)) ** 0.5
    if factor >= 1:
        return ldr_values(frame)
    size = max(1, round(height * factor)), max(1, round(width * factor))
    if not frame.dtype.is_floating_point and factor < 0.4:
        # In integers first, which is ten times faster; their rounding is averaged out by the second step.
        frame = map_codes(frame, lambda codes: _mean_of_areas(codes, (2 * size[0], 2 * size[1])))
    return _mean_of_areas(ldr_values(frame), size)


def _mean_of_areas(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """Means of the areas (1, 3, *size) that pixels cover, in the frame's type."""
    picture = frame[0].permute(1, 2, 0).cpu().contiguous().numpy()
    shrunk = cv2.resize(picture, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return torch.from_numpy(shrunk).permute(2, 0, 1)[None].contiguous()


def _interpolate(frame: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(frame, size, mode="bilinear", align_corners=False, antialias=True)


def _without_motion(bracket: Bracket) -> list[Tensor]:
    """The frames as a camera would have taken them that did not move."""
    short, reference, long = bracket.frames
    motion_short, motion_long = bracket.motions

    def undo(frame: Tensor, motion: Motion) -> Tensor:
        return frame if motion.is_still else safnet_ops.backward_warp(frame, motion_flow(motion.matrix, *bracket.size))

    return [undo(short, motion_short), reference, undo(long, motion_long)]


def network_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Heights and widths at which the network can run, each twice the one before, up to that of the frame."""
    factor = min(1.0, COARSEST_SIDE / min(height, width))
    low, wide = (max(1, round(side * factor / SIZE_MULTIPLE)) * SIZE_MULTIPLE for side in (height, width))
    sizes = [(low, wide)]
    while 2 * sizes[-1][0] <= height + SIZE_MULTIPLE and 2 * sizes[-1][1] <= width + SIZE_MULTIPLE:
        sizes.append((2 * sizes[-1][0], 2 * sizes[-1][1]))
    return sizes


def _finest_worthwhile(model: SAFNet, exposures: list[Tensor], ratios: Sequence[float]) -> tuple[Alignment, float]:
    """The network's alignment at the size beyond which the frames get hardly more alike, and how unlike they are left."""
    best, least = None, float("nan")
    for size in network_sizes(*exposures[1].shape[2:]):
        short, reference, long = (_interpolate(exposure, size) for exposure in exposures)
        if best is None:
            best = model.estimate(short, reference, long, scale_factor=1.0)
            least = disagreement(exposures, best, ratios)
            continue
        finer = model.refine_alignment(short, reference, long, best)
        left = disagreement(exposures, finer, ratios)
        if not left <= WORTHWHILE * least:
            return (finer, left) if left < least else (best, least)
        best, least = finer, left
    assert best is not None
    return best, least


def disagreement(exposures: Sequence[Tensor], alignment: Alignment, ratios: Sequence[float]) -> float:
    """Mean difference in LDR values, at most LARGEST_DISAGREEMENT each, of the aligned outer exposures from the reference,
    where both are well exposed; NaN where that is nowhere.

    Args:
        exposures: short, reference, long (1, 6, h, w) as of `exposure_input`.
        ratios: their exposure ratios.
    """
    short, reference, long = (exposure[:, 3:6] for exposure in exposures)
    height, width = reference.shape[2:]
    aligned = full_size(alignment, height, width, slice(0, height), slice(0, width))
    total, count = 0.0, 0
    for frame, flow, ratio in ((short, aligned.flow_short, ratios[0]), (long, aligned.flow_long, ratios[2])):
        difference, exposed = _difference(frame, reference, flow, ratio, ratios[1])
        total += float(difference.sum())
        count += int(exposed.sum())
    return total / count if count else float("nan")


def _difference(frame: Tensor, reference: Tensor, flow: Tensor, ratio: float, own: float) -> tuple[Tensor, Tensor]:
    """Differences of an aligned frame from the reference in LDR values, at most LARGEST_DISAGREEMENT, and where both are well
    exposed; 0 elsewhere. The frame's exposure ratio is `ratio`, the reference's `own`.
    """
    warped = safnet_ops.backward_warp(frame, flow)
    exposed = _well_exposed(reference) & _well_exposed(warped)
    difference = (_exposed_as(warped, ratio, own) - reference).abs_().clamp_(max=LARGEST_DISAGREEMENT)
    return difference * exposed, exposed


def _hold_still(exposures: Sequence[Tensor], alignment: Alignment, ratios: Sequence[float]) -> Alignment:
    """The alignment without small flows where the frames are as much alike without them.

    The network's flow is wrong by a tenth of a pixel or two where nothing moved, which costs more sharpness than all else.
    """
    height, width = alignment.flow_short.shape[2:]
    short, reference, long = (_interpolate(exposure[:, 3:6], (height, width)) for exposure in exposures)
    flows = []
    for frame, flow, ratio in ((short, alignment.flow_short, ratios[0]), (long, alignment.flow_long, ratios[2])):

        def mean_difference(flow: Tensor, frame: Tensor = frame, ratio: float = ratio) -> Tensor:
            difference, exposed = _difference(frame, reference, flow, ratio, ratios[1])
            pixels = _mean_around(exposed.to(flow).mean(1, keepdim=True), STILL_RADIUS)
            return _mean_around(difference.mean(1, keepdim=True), STILL_RADIUS) / (pixels + 1e-4)

        still = mean_difference(torch.zeros_like(flow)) <= mean_difference(flow)
        still &= flow.norm(dim=1, keepdim=True) < STILL
        # From the one to the other within a few pixels.
        flows.append(flow * (1 - _mean_around(still.to(flow), 2)))
    return alignment._replace(flow_short=flows[0], flow_long=flows[1])


def _mean_around(values: Tensor, radius: int) -> Tensor:
    return F.avg_pool2d(values, 2 * radius + 1, 1, radius, count_include_pad=False)


def _exposed_as(ldr: Tensor, ratio: float, other: float) -> Tensor:
    """LDR values of a frame with an exposure ratio as they would be with the other one."""
    return (ldr * (other / ratio) ** (1 / GAMMA)).clamp_(0, 1)


def exposed_alike(frame: Tensor, reference: Tensor, flow: Tensor, ev: float, reference_ev: float) -> Tensor:
    """Largest difference over the colours (n) of a frame, aligned and exposed as the reference, from it, in LDR values; NaN
    where it cannot be seen.

    Args:
        frame, reference: (1, 3, H, W), LDR values in [0, 1].
        flow: (1, 2, h, w) from the reference to the frame, NaN where there is none.
    """
    height, width = flow.shape[2:]
    frame, reference = (_interpolate(picture, (height, width)) for picture in (frame, reference))
    aligned = safnet_ops.backward_warp(frame, flow)
    exposed = (_well_exposed(aligned) & _well_exposed(reference)).all(1)
    as_reference = _exposed_as(aligned, 2.0**ev, 2.0**reference_ev)
    return (as_reference - reference).abs().amax(1).masked_fill(~exposed, torch.nan).flatten()


def _well_exposed(ldr: Tensor) -> Tensor:
    return (ldr > DARKEST) & (ldr < BRIGHTEST)


def _with_motion(alignment: Alignment, disagreement: float, bracket: Bracket) -> Aligned:
    """Flows from the reference into the frames as they were taken; what leads out of them is masked."""
    height, width = alignment.flow_short.shape[2:]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    flows, masks, covered = [], [], []
    for flow, mask, motion in zip(alignment[:2], alignment[2:], bracket.motions, strict=True):
        matrix = motion_at(motion.matrix, bracket.size, (height, width))
        to_x, to_y = apply_motion(matrix, x + flow[0, 0].cpu(), y + flow[0, 1].cpu())
        if not motion.is_still:
            flow = torch.stack([to_x - x, to_y - y])[None].to(flow)
        inside = (to_x >= -0.5) & (to_x <= width - 0.5) & (to_y >= -0.5) & (to_y <= height - 0.5)
        flows.append(flow)
        masks.append(mask if motion.is_still else mask.masked_fill(~inside.to(mask.device), HIDDEN))
        covered.append(float(inside.double().mean()))
    return Aligned(Alignment(flows[0], flows[1], masks[0], masks[1]), disagreement, (covered[0], covered[1]))
