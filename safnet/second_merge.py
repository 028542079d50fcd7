"""The refine module as a second, sharper merge of the aligned exposures, fitted by least squares.

The explicit fusion weighs frames by fixed triangles and by masks of half the picture's size. `write_second_merge` gives the
refine module's layers the differences of the frames from it and from each other, let through where the reference is clipped or
dark, pixel by pixel; `fit_second_merge` finds how much of each to add. Each colour is treated alone, and where the frames
agree nothing is added: neither coloured light nor darkness can make the residual large.

The full model's refine module has room for twice the parts: the same once more, but only where short and reference frame
agree in those colours in which the reference is not clipped. Where they do not, the flow is wrong, and what the short frame
shows is another surface.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from safnet.initialisation import HERE
from safnet.model import FullRefine, ResidualBlock, SAFNet, SmallRefine
from safnet.radiance import MU, tone_map

COLOURS = 3


# What the residual is made of: factors by the names of Layout.
DIFFERENCES = (
    {"short": 1.0, "fused": -1.0},
    {"reference": 1.0, "fused": -1.0},
    {"long": 1.0, "fused": -1.0},
    {"short": 1.0, "reference": -1.0},
    {"short": 1.0, "reference": -0.7},
)
TO_SHORT, TO_REFERENCE, TO_LONG, SHORT_ABOVE, SHORT_FAR_BELOW = range(len(DIFFERENCES))


class Gate(NamedTuple):
    """Open, which is 0, where the reference's LDR value is on one side of `edge`; else it closes by `slope` times the way."""

    edge: float
    slope: float


GATES = (Gate(0.98, -16.0), Gate(0.35, 10.0), Gate(0.2, 20.0))
CLIPPED, DARK, NEARLY_BLACK = range(len(GATES))
DISAGREEMENT = len(GATES)  # in the full model a gate too: open where short and reference frame show the same


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
FULL_PARTS = (
    *PARTS,
    *(part._replace(gates=(*part.gates, DISAGREEMENT)) for part in PARTS),
    Part(TO_REFERENCE, -1.0, (DISAGREEMENT,)),
)
# Short and reference frame disagree by what they differ by beyond these, relative to the reference and absolutely.
NOISE, NOISE_FLOOR = 0.1, 0.002
UNSURE = Gate(
    0.95, 20.0
)  # from here on the reference may be clipped, and its difference from the short frame means nothing
DISAGREEMENT_SLOPE = 10.0


class Layout(NamedTuple):
    """How a refine module holds a second merge.

    Attributes:
        short, reference, reference_ldr, long, fused: first channels, of three colours each, in the input of the layers that
            make the parts.
        parts: of each colour.
        free: channels that are 0 there, for the parts of one colour after the other.
    """

    short: int
    reference: int
    reference_ldr: int
    long: int
    fused: int
    parts: tuple[Part, ...]
    free: Sequence[int]

    def channels(self, colour: int) -> list[int]:
        """Where a colour's parts are."""
        return list(self.free[colour * len(self.parts) : (colour + 1) * len(self.parts)])


SMALL = Layout(short=0, reference=6, reference_ldr=9, long=12, fused=24, parts=PARTS, free=range(32))
# 20 channels are the short frame's, 40 the reference's and the fusion's, 20 the long frame's.
FULL_FREE = (*range(3, 20), *range(29, 60), *range(63, 80))
FULL = Layout(short=0, reference=20, reference_ldr=23, long=60, fused=26, parts=FULL_PARTS, free=FULL_FREE)
DISAGREES = FULL_FREE[-1]
# Outputs of the layer that makes differences and gates: those of one colour after the other.
PER_COLOUR = len(DIFFERENCES) + len(GATES)
GATES_OF_ALL = COLOURS * PER_COLOUR
SAMPLES = 20000  # pixels of a scene that the fit looks at
RIDGE = 1e-4  # relative to each unknown's own sum of squares: kernels of alike parts must not grow against each other
FLOOR = 3e-6  # squared error that is as good as none
TOLERANCE = 0.01  # error beyond which a pixel counts less: motion gone wrong cannot be mended, and must not rule


@torch.no_grad()
def write_second_merge(refine: SmallRefine | FullRefine) -> None:
    """Make a refine module's features the parts of a second merge; the last layer becomes 0, which is no residual."""
    for parameter in refine.parameters():
        parameter.zero_()
    if isinstance(refine, SmallRefine):
        _write_small(refine)
    else:
        _write_full(refine)


def _write_small(refine: SmallRefine) -> None:
    layers: list[Any] = list(refine.children())
    _write_differences(layers[0], SMALL)
    conv, prelu = layers[1]
    _write_parts(conv, prelu, SMALL)
    for layer in layers[2:-1]:
        _pass_on(layer, range(COLOURS * len(PARTS)))


def _write_full(refine: FullRefine) -> None:
    for exposure in (refine.conv0, refine.conv2):
        for layer in exposure:
            _pass_on(layer, range(COLOURS))
    # Of the reference come 3 linear colours and 3 LDR ones, of the fusion 4 flows, 2 masks, and 3 colours.
    layers: list[Any] = list(refine.conv1)
    _pass_on(layers[0], [*range(6), *range(12, 15)])
    _pass_on(layers[1], range(9))
    blocks: list[Any] = [block for block in refine.children() if isinstance(block, ResidualBlock)]
    for block in blocks:
        block.prelu.weight.fill_(1)
    _write_disagreement(blocks[0], blocks[1])
    _write_differences(blocks[-1].conv1, FULL)
    _write(blocks[-1].conv1[0], GATES_OF_ALL, {DISAGREES: DISAGREEMENT_SLOPE})
    _write_parts(blocks[-1].conv2, blocks[-1].prelu, FULL)


def _write_disagreement(first: Any, second: Any) -> None:
    """Mean over colours of relu(|short - reference| - noise), 0 where the reference may be clipped, in channel DISAGREES."""
    conv = first.conv1[0]
    for colour in range(COLOURS):
        _write(conv, colour, {FULL.short + colour: 1.0})
        _write(conv, COLOURS + colour, {FULL.reference + colour: 1.0})
        unsure = 2 * COLOURS + colour  # PReLU's slope of 0 makes it a gate
        _write(conv, unsure, {FULL.reference_ldr + colour: UNSURE.slope}, -UNSURE.slope * UNSURE.edge)
        for output, sign in ((colour, 1.0), (COLOURS + colour, -1.0)):
            factors = {colour: sign, COLOURS + colour: -sign - NOISE, unsure: -1.0}
            _write(first.conv2, FULL.free[output], factors, -NOISE_FLOOR)
            first.prelu.weight[FULL.free[output]] = 0
    excess = FULL.free[: 2 * COLOURS]
    _pass_on(second.conv1, excess)
    _write(second.conv2, DISAGREES, dict.fromkeys(range(len(excess)), 1 / COLOURS))
    for channel, output in enumerate(excess):
        _write(second.conv2, output, {channel: -1.0})  # leaves 0, where the parts go


def _pass_on(layer: Any, channels: Iterable[int]) -> None:
    """Make a layer's first outputs the given input channels."""
    conv, prelu = layer
    for output, channel in enumerate(channels):
        _write(conv, output, {channel: 1.0})
        prelu.weight[output] = 1


def _write(conv: Any, output: int, factors: dict[int, float], bias: float = 0.0) -> None:
    """Make an output the sum of input channels times factors, at the same pixel."""
    for channel, factor in factors.items():
        conv.weight[output, channel] = factor * HERE
    conv.bias[output] = bias


def _write_differences(layer: Any, layout: Layout) -> None:
    """Of each colour the differences, then the gates."""
    conv, prelu = layer
    for colour in range(COLOURS):
        first = colour * PER_COLOUR
        for output, factors in enumerate(DIFFERENCES, first):
            _write(conv, output, {getattr(layout, name) + colour: factor for name, factor in factors.items()})
            prelu.weight[output] = 1
        for output, gate in enumerate(GATES, first + len(DIFFERENCES)):
            _write(conv, output, {layout.reference_ldr + colour: gate.slope}, -gate.slope * gate.edge)


def _write_parts(conv: Any, prelu: Any, layout: Layout) -> None:
    """Of each colour the parts of the residual: relu(sign * difference - gates), exact where the gates are open."""
    for colour in range(COLOURS):
        first = colour * PER_COLOUR
        for output, part in zip(layout.channels(colour), layout.parts, strict=True):
            gates = [GATES_OF_ALL if gate == DISAGREEMENT else first + len(DIFFERENCES) + gate for gate in part.gates]
            _write(conv, output, {first + part.difference: part.sign, **dict.fromkeys(gates, -1.0)})
            prelu.weight[output] = 0 if part.gates else 1


@torch.no_grad()
def fit_second_merge(model: SAFNet, scenes: Iterable[tuple[Tensor, Tensor]], scale_factor: float = 0.5) -> int:
    """Replace the refine module by the second merge that fits the given scenes best; flows and masks stay.

    Least squares of the tone-mapped error, every scene counting as much as its PSNR-mu.

    Args:
        model: a SAFNet, small or full.
        scenes: exposures (3, 6, H, W) as the network takes them, and true radiance (3, H, W) in [0, 1].
        scale_factor: as of `SAFNet.estimate`.

    Returns:
        How many scenes there were.

    Raises:
        ValueError: there are no scenes, or one has another shape or values that are not finite.
    """
    refine = model.refinenet
    write_second_merge(refine)
    draw = torch.Generator().manual_seed(0)
    layout = _layout(refine)
    size = 9 * len(layout.parts)
    left, right, count = torch.zeros(size, size, dtype=torch.double), torch.zeros(size, dtype=torch.double), 0
    for exposures, truth in scenes:
        _check_scene(exposures, truth, count)
        rows, wanted = _equations(model, exposures, truth, scale_factor, draw)
        left += (rows.T @ rows).cpu()
        right += (rows.T @ wanted).cpu()
        count += 1
    if not count:
        raise ValueError("fit_second_merge: scenes must not be empty")
    deviation = left.diagonal().sqrt().clamp(min=1e-12)
    scaled = left / deviation[:, None] / deviation + RIDGE * torch.eye(size, dtype=torch.double)
    solution = torch.linalg.solve(scaled, right / deviation) / deviation
    weight = refine.residual_layer.weight
    for colour in range(COLOURS):
        weight[colour, layout.channels(colour)] = solution.to(weight).view(-1, 3, 3)
    return count


def _layout(refine: SmallRefine | FullRefine) -> Layout:
    return SMALL if isinstance(refine, SmallRefine) else FULL


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
    model: SAFNet, exposures: Tensor, truth: Tensor, scale_factor: float, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Weighted rows (k, 9 * parts) of what could be added at some pixels, and the tone-mapped error that should go there."""
    short, reference, long = (exposure[None].contiguous() for exposure in exposures)
    fusion = model.fuse(short, reference, long, model.estimate(short, reference, long, scale_factor))
    features = model.refinenet.features(model.warp_features(short, long, fusion.alignment), reference, fusion)[0]
    layout = _layout(model.refinenet)
    parts = F.pad(torch.stack([features[layout.channels(colour)] for colour in range(COLOURS)]), (1, 1, 1, 1))

    fused = fusion.fused[0].clamp(0, 1)
    error = tone_map(truth) - tone_map(fused)
    change = truth - fused
    slope = MU / (1 + MU * fused) / math.log1p(MU)
    # The secant of the tone map is exact for the change that is right.
    slope = torch.where(change.abs() > 1e-5, (error / change).abs(), slope)
    weight = (error.abs() + TOLERANCE).rsqrt() / (error.square().mean() + FLOOR).sqrt()

    pixels = torch.randperm(truth.numel(), generator=draw)[:SAMPLES].to(truth.device)
    _, height, width = truth.shape
    colour, y, x = pixels // (height * width), pixels // width % height, pixels % width
    taps = [parts[colour, :, y + dy, x + dx] for dy in range(3) for dx in range(3)]
    rows = torch.stack(taps, 2).flatten(1) * (weight * slope).flatten()[pixels, None]
    return rows.double(), (weight * error).flatten()[pixels].double()
