"""The refine module of SAFNet-S as a second, sharper merge of the aligned exposures, fitted by least squares.

The explicit fusion weighs frames by fixed triangles and by masks of half the picture's size. `write_second_merge` gives the
refine module's layers the differences of the frames from it and from each other, let through where the reference is clipped or
dark, pixel by pixel; `fit_second_merge` finds how much of each to add. Each colour is treated alone, and where the frames
agree nothing is added: neither coloured light nor darkness can make the residual large.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import safnet_ops
from safnet.initialisation import HERE
from safnet.model import SAFNet, SmallRefine
from safnet.radiance import MU, tone_map

COLOURS = 3
SHORT, REFERENCE, REFERENCE_LDR, LONG, FUSED = 0, 6, 9, 12, 24  # first channels in the refine module's input
# What the residual is made of: factors by channel of a colour.
DIFFERENCES = (
    {SHORT: 1.0, FUSED: -1.0},
    {REFERENCE: 1.0, FUSED: -1.0},
    {LONG: 1.0, FUSED: -1.0},
    {SHORT: 1.0, REFERENCE: -1.0},
    {SHORT: 1.0, REFERENCE: -0.7},
)
TO_SHORT, TO_REFERENCE, TO_LONG, SHORT_ABOVE, SHORT_FAR_BELOW = range(len(DIFFERENCES))


class Gate(NamedTuple):
    """Open, which is 0, where the reference's LDR value is on one side of `edge`; else it closes by `slope` times the way."""

    edge: float
    slope: float


GATES = (Gate(0.98, -16.0), Gate(0.35, 10.0), Gate(0.2, 20.0))
CLIPPED, DARK, NEARLY_BLACK = range(len(GATES))


class Part(NamedTuple):
    """A difference, its sign, and the gates that must be open for its positive values to pass; without gates all pass."""

    difference: int
    sign: float
    gates: tuple[int, ...]


# Chosen among 91 as the ten of a colour, which is what 32 channels hold, whose least squares fit leaves the smallest error.
PARTS = (
    Part(TO_REFERENCE, 1.0, ()),
    Part(TO_SHORT, 1.0, (CLIPPED,)),
    # The radiance is at least the reference's where that is clipped: a darker short frame shows something else.
    Part(TO_REFERENCE, -1.0, (CLIPPED,)),
    Part(SHORT_ABOVE, -1.0, (CLIPPED,)),
    Part(SHORT_FAR_BELOW, -1.0, (CLIPPED,)),
    Part(TO_REFERENCE, 1.0, (DARK,)),
    Part(TO_REFERENCE, -1.0, (DARK,)),
    *(Part(difference, -1.0, (NEARLY_BLACK,)) for difference in (TO_SHORT, TO_REFERENCE, TO_LONG)),
)
SAMPLES = 20000  # pixels of a scene that the fit looks at
RIDGE = 1e-4  # relative to each unknown's own sum of squares: kernels of alike parts must not grow against each other
FLOOR = 3e-6  # squared error that is as good as none
TOLERANCE = 0.01  # error beyond which a pixel counts less: motion gone wrong cannot be mended, and must not rule


@torch.no_grad()
def write_second_merge(refine: SmallRefine) -> None:
    """Set a refine module's layers but the last, which becomes 0: its residual is nothing until it is fitted."""
    for parameter in refine.parameters():
        parameter.zero_()
    layers: list[Any] = list(refine.children())
    for colour in range(COLOURS):
        first = colour * len(PARTS)
        _write_differences(layers[0], colour, first)
        _write_parts(layers[1], first)
        for conv, prelu in layers[2:-1]:
            for channel in range(first, first + len(PARTS)):
                conv.weight[channel, channel] = HERE
                prelu.weight[channel] = 1


def _write_differences(layer: Any, colour: int, first: int) -> None:
    """A colour's differences and gates, from channel `first` on."""
    conv, prelu = layer
    for output, factors in enumerate(DIFFERENCES, first):
        for channel, factor in factors.items():
            conv.weight[output, channel + colour] = factor * HERE
        prelu.weight[output] = 1
    for output, gate in enumerate(GATES, first + len(DIFFERENCES)):
        conv.weight[output, REFERENCE_LDR + colour] = gate.slope * HERE
        conv.bias[output] = -gate.slope * gate.edge


def _write_parts(layer: Any, first: int) -> None:
    """A colour's parts of the residual: relu(sign * difference - gates), which is exact where the gates are open."""
    conv, prelu = layer
    for output, part in enumerate(PARTS, first):
        conv.weight[output, first + part.difference] = part.sign * HERE
        for gate in part.gates:
            conv.weight[output, first + len(DIFFERENCES) + gate] = -HERE
        prelu.weight[output] = 0 if part.gates else 1


@torch.no_grad()
def fit_second_merge(model: SAFNet, scenes: Iterable[tuple[Tensor, Tensor]], scale_factor: float = 0.5) -> int:
    """Replace the refine module by the second merge that fits the given scenes best; flows and masks stay.

    Least squares of the tone-mapped error, every scene counting as much as its PSNR-mu.

    Args:
        model: a small SAFNet.
        scenes: exposures (3, 6, H, W) as the network takes them, and true radiance (3, H, W) in [0, 1].
        scale_factor: as of `SAFNet.estimate`.

    Returns:
        How many scenes there were.

    Raises:
        ValueError: the model is not a small one, there are no scenes, or one has another shape or values that are not finite.
    """
    refine = model.refinenet
    if not isinstance(refine, SmallRefine):
        raise ValueError(f"fit_second_merge: model must be small, got {model.variant!r}")
    write_second_merge(refine)
    draw = torch.Generator().manual_seed(0)
    size = 9 * len(PARTS)
    left, right, count = torch.zeros(size, size, dtype=torch.double), torch.zeros(size, dtype=torch.double), 0
    for exposures, truth in scenes:
        _check_scene(exposures, truth, count)
        rows, wanted = _equations(model, refine, exposures, truth, scale_factor, draw)
        left += (rows.T @ rows).cpu()
        right += (rows.T @ wanted).cpu()
        count += 1
    if not count:
        raise ValueError("fit_second_merge: scenes must not be empty")
    deviation = left.diagonal().sqrt().clamp(min=1e-12)
    scaled = left / deviation[:, None] / deviation + RIDGE * torch.eye(size, dtype=torch.double)
    solution = torch.linalg.solve(scaled, right / deviation) / deviation
    kernels = solution.to(refine.conv7.weight).view(len(PARTS), 3, 3)
    for colour in range(COLOURS):
        first = colour * len(PARTS)
        refine.conv7.weight[colour, first : first + len(PARTS)] = kernels
    return count


def _check_scene(exposures: Tensor, truth: Tensor, number: int) -> None:
    where = f"fit_second_merge: scene {number}:"
    if truth.dim() != 3 or truth.shape[0] != COLOURS:
        raise ValueError(f"{where} truth must be (3, H, W), got {tuple(truth.shape)}")
    if exposures.shape != (3, 6, *truth.shape[1:]):
        raise ValueError(f"{where} exposures must be {(3, 6, *truth.shape[1:])}, got {tuple(exposures.shape)}")
    for name, values in (("exposures", exposures), ("truth", truth)):
        if bad := int(values.numel() - values.isfinite().sum()):
            raise ValueError(f"{where} {name} must be finite, {bad} values are not")


def _equations(
    model: SAFNet, refine: SmallRefine, exposures: Tensor, truth: Tensor, scale_factor: float, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Weighted rows (k, 9 * parts) of what could be added at some pixels, and the tone-mapped error that should go there."""
    short, reference, long = (exposure[None].contiguous() for exposure in exposures)
    fusion = model.fuse(short, reference, long, model.estimate(short, reference, long, scale_factor))
    alignment = fusion.alignment
    warped = (
        safnet_ops.backward_warp(short, alignment.flow_short),
        safnet_ops.backward_warp(long, alignment.flow_long),
    )
    features = refine.features(warped, reference, fusion)[0, : COLOURS * len(PARTS)]
    colours, height, width = truth.shape
    features = F.pad(features.view(colours, len(PARTS), height, width), (1, 1, 1, 1))

    fused = fusion.fused[0].clamp(0, 1)
    error = tone_map(truth) - tone_map(fused)
    change = truth - fused
    slope = MU / (1 + MU * fused) / math.log1p(MU)
    # The secant of the tone map is exact for the change that is right.
    slope = torch.where(change.abs() > 1e-5, (error / change).abs(), slope)
    weight = (error.abs() + TOLERANCE).rsqrt() / (error.square().mean() + FLOOR).sqrt()

    pixels = torch.randperm(truth.numel(), generator=draw)[:SAMPLES].to(truth.device)
    colour, y, x = pixels // (height * width), pixels // width % height, pixels % width
    taps = [features[colour, :, y + dy, x + dx] for dy in range(3) for dx in range(3)]
    rows = torch.stack(taps, 2).flatten(1) * (weight * slope).flatten()[pixels, None]
    return rows.double(), (weight * error).flatten()[pixels].double()
