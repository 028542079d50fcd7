"""The refine module as a second, sharper merge of the aligned exposures, fitted by least squares.

The explicit fusion weighs frames by fixed triangles and by masks of half the picture's size. `write_second_merge` gives the
refine module's layers the differences of the frames from it and from each other, let through where the reference is clipped or
dark, pixel by pixel; `fit_second_merge` finds how much of each to add. No colour adds to another, and where the frames agree
nothing is added: neither coloured light nor darkness can make the residual large. Where the reference is clipped, its other
colours tell whether the short frame shows the same surface: if they disagree, the flow is wrong.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from safnet.choices import DatasetName, Variant
from safnet.data.datasets import find_scenes
from safnet.model import FullRefine, ResidualBlock, SAFNet, SmallRefine
from safnet.radiance import MU, tone_map
from safnet.training.crops import Whole
from safnet.training.initialisation import HERE
from safnet.weights import load_model, save_model, take_fitting

COLOURS = 3


FRAMES = ("short", "reference", "long", "fused")
# What the residual is made of: factors of frames.
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


GATES = (Gate(0.98, -16.0), Gate(0.35, 10.0), Gate(0.2, 20.0), Gate(0.95, 20.0))
CLIPPED, DARK, NEARLY_BLACK, SURELY_NOT_CLIPPED = range(len(GATES))
# Short and reference frame disagree by what they differ by beyond these, relative to the reference and absolutely.
NOISE, NOISE_FLOOR = 0.1, 0.002
DISAGREEMENT_SLOPE = 10.0  # of the mean over colours


class Part(NamedTuple):
    """A difference, its sign, and the gates that must be open for its positive values to pass; without gates all pass.

    `agreeing` is one gate more: short and reference frame must agree in the colours that are surely not clipped.
    """

    difference: int
    sign: float
    gates: tuple[int, ...]
    agreeing: bool = False


IN_HIGHLIGHTS = (
    Part(TO_SHORT, 1.0, (CLIPPED,)),
    # The radiance is at least the reference's where that is clipped: a darker short frame shows something else.
    Part(TO_REFERENCE, -1.0, (CLIPPED,)),
    Part(SHORT_ABOVE, -1.0, (CLIPPED,)),
    Part(SHORT_FAR_BELOW, -1.0, (CLIPPED,)),
)
# Chosen among 91, before there was `agreeing`, as the ten of a colour, which is what 32 channels hold, whose least squares fit
# leaves the smallest error.
PARTS = (
    Part(TO_REFERENCE, 1.0, ()),
    *(part._replace(agreeing=True) for part in IN_HIGHLIGHTS),
    Part(TO_REFERENCE, 1.0, (DARK,)),
    Part(TO_REFERENCE, -1.0, (DARK,)),
    *(Part(difference, -1.0, (NEARLY_BLACK,)) for difference in (TO_SHORT, TO_REFERENCE, TO_LONG)),
)
# The full model has room for more: highlights where the frames disagree too, shadows where they agree.
FULL_PARTS = (
    *PARTS,
    *IN_HIGHLIGHTS,
    Part(TO_REFERENCE, -1.0, (), agreeing=True),
    Part(TO_REFERENCE, 1.0, (DARK,), agreeing=True),
    Part(TO_REFERENCE, -1.0, (DARK,), agreeing=True),
)
# Outputs of the layer before the parts: frames, gates, and by how much short and reference frame disagree, either way.
FIRST_GATE = COLOURS * len(FRAMES)
FIRST_EXCESS = FIRST_GATE + COLOURS * len(GATES)
# Channels in the full refine module: 20 are the short frame's, 40 the reference's and the fusion's, 20 the long frame's.
IN_SMALL = {"short": 0, "reference": 6, "ldr": 9, "long": 12, "fused": 24}
IN_FULL = {"short": 0, "reference": 20, "ldr": 23, "fused": 26, "long": 60}
GATES_IN_FULL = 3
PARTS_IN_FULL = (*range(15, 20), *range(29, 60), *range(63, 80))
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
    for frame, name in enumerate(FRAMES):
        _pass_on(layers[0], range(IN_SMALL[name], IN_SMALL[name] + COLOURS), COLOURS * frame)
    _write_gates(layers[0][0], IN_SMALL["ldr"], FIRST_GATE)
    _write_excess(layers[1], {name: COLOURS * frame for frame, name in enumerate(FRAMES)}, FIRST_GATE)
    conv, prelu = layers[2]
    _write_parts(conv, prelu, refine)
    for layer in layers[3:-1]:
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
    *_, gates, parts = blocks
    _write_gates(gates.conv1[0], IN_FULL["ldr"], 0)
    _pass_on((gates.conv2, gates.prelu), range(COLOURS * len(GATES)), GATES_IN_FULL)
    _write_excess(parts.conv1, IN_FULL, GATES_IN_FULL)
    _write_parts(parts.conv2, parts.prelu, refine)


def _pass_on(layer: Any, channels: Iterable[int], first: int = 0) -> None:
    """Make a layer's outputs from `first` on the given input channels."""
    conv, prelu = layer
    for output, channel in enumerate(channels, first):
        _write(conv, output, {channel: 1.0})
        prelu.weight[output] = 1


def _write(conv: Any, output: int, factors: dict[int, float], bias: float = 0.0) -> None:
    """Make an output the sum of input channels times factors, at the same pixel."""
    for channel, factor in factors.items():
        conv.weight[output, channel] = factor * HERE
    conv.bias[output] = bias


def _write_gates(conv: Any, ldr: int, first: int) -> None:
    """Outputs from `first` on: the gates of one colour after the other. PReLUs' slopes of 0 make them gates."""
    outputs = product(range(COLOURS), GATES)
    for output, (colour, gate) in enumerate(outputs, first):
        _write(conv, output, {ldr + colour: gate.slope}, -gate.slope * gate.edge)


def _write_excess(layer: Any, frames: dict[str, int], gates: int) -> None:
    """Frames and gates passed on, and of each colour relu(+-(short - reference) - noise - gate)."""
    for frame, name in enumerate(FRAMES):
        _pass_on(layer, range(frames[name], frames[name] + COLOURS), COLOURS * frame)
    _pass_on(layer, range(gates, gates + COLOURS * len(GATES)), FIRST_GATE)
    outputs = product(range(COLOURS), (1.0, -1.0))
    for output, (colour, sign) in enumerate(outputs, FIRST_EXCESS):
        factors = {frames["short"] + colour: sign, frames["reference"] + colour: -sign - NOISE}
        _write(layer[0], output, {**factors, gates + colour * len(GATES) + SURELY_NOT_CLIPPED: -1.0}, -NOISE_FLOOR)


def _write_parts(conv: Any, prelu: Any, refine: SmallRefine | FullRefine) -> None:
    """Of each colour the parts of the residual: relu(sign * difference - gates), exact where the gates are open."""
    disagreement = dict.fromkeys(range(FIRST_EXCESS, FIRST_EXCESS + 2 * COLOURS), -DISAGREEMENT_SLOPE / COLOURS)
    for colour in range(COLOURS):
        for output, part in zip(_channels(refine, colour), _parts(refine), strict=True):
            frames = {
                COLOURS * FRAMES.index(name) + colour: part.sign * factor
                for name, factor in DIFFERENCES[part.difference].items()
            }
            gates = {FIRST_GATE + colour * len(GATES) + gate: -1.0 for gate in part.gates}
            _write(conv, output, {**frames, **gates, **(disagreement if part.agreeing else {})})
            prelu.weight[output] = 0 if part.gates or part.agreeing else 1


def _parts(refine: SmallRefine | FullRefine) -> tuple[Part, ...]:
    return PARTS if isinstance(refine, SmallRefine) else FULL_PARTS


def _channels(refine: SmallRefine | FullRefine, colour: int) -> list[int]:
    """Where a colour's parts are in the module's features."""
    count = len(_parts(refine))
    room = range(COLOURS * count) if isinstance(refine, SmallRefine) else PARTS_IN_FULL
    return list(room[colour * count : (colour + 1) * count])


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
    size = 9 * len(_parts(refine))
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
        weight[colour, _channels(refine, colour)] = solution.to(weight).view(-1, 3, 3)
    return count


def fit_files(
    folders: Sequence[Path],
    output: Path,
    *,
    model: str | Path = "safnet-s",
    variant: Variant | None = None,
    dataset: DatasetName = "kalantari17",
    device: str = "auto",
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> int:
    """Fit a model's refine module to the scenes of folders, and write the model's weights.

    Args:
        folders: of scenes with truth, or of data sets, whose training scenes are taken.
        output: .safetensors file.
        model: as of `safnet.load_model`; its flows and masks are kept.
        variant: kind of model to write; None for the model's own.
        dataset: layout of the scenes.
        device: where to compute: one of torch's, or "auto" for a GPU if there is one.
        overwrite: replace `output` if it exists.
        progress: called before each scene.

    Returns:
        How many scenes there were.

    Raises:
        DatasetError, WeightsError, ValueError: a folder, file, scene or device that cannot be used; nothing was written.
    """
    _check_output(output, overwrite)
    files = [scene for folder in folders for scene in find_scenes(dataset, folder, "Training")]
    for scene in files:
        scene.check()
    network = load_model(model, device)
    where = next(network.parameters()).device
    if variant not in (None, network.variant):
        start, network = network, SAFNet(variant).to(where).eval()
        take_fitting(network, start)
    pictures = Whole(files)

    def read() -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(len(pictures)):
            progress("scenes", number, len(pictures))
            exposures, truth = pictures[number]
            yield exposures.to(where), truth.to(where)

    count = fit_second_merge(network, read())
    save_model(network, output)
    return count


def _check_output(output: Path, overwrite: bool) -> None:
    if output.suffix != ".safetensors":
        raise ValueError(f"--output must end in .safetensors, got {str(output)!r}")
    if output.exists() and not overwrite:
        raise ValueError(f"--output {str(output)!r} exists; --overwrite replaces it")
    if not output.parent.is_dir():
        raise ValueError(f"--output {str(output)!r}: the folder {str(output.parent)!r} does not exist")


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
    by_colour = torch.stack([features[_channels(model.refinenet, colour)] for colour in range(COLOURS)])
    parts = F.pad(by_colour, (1, 1, 1, 1))

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
