"""Weights to start training from: Kaiming's, and weights that already compare the frames with each other.

Finding out by gradient descent that flow comes from comparing small structures in two frames takes longer than all that
comes after. `match_frames` writes that down: the encoder makes bounded, contrast-independent edges of log radiance, the
decoder the differences of the shifted frames, and votes on which shift makes them smaller. `fit_flow` then reads the flow
off these votes, by least squares on scenes whose flow is known.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safnet_ops
from safnet.model import DECODER_CHANNELS, DECODER_GROUPS, FEATURES, LEVELS, Encoder, SAFNet, network_size

PRELU_SLOPE = 0.25  # with which torch begins
GROUP = DECODER_CHANNELS // DECODER_GROUPS

# 3 x 3 kernels
SMOOTH = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16
MEAN = torch.ones(3, 3) / 9
HERE = F.pad(torch.ones(1, 1), (1, 1, 1, 1))
ALONG_X = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 4
ALONG_Y = ALONG_X.T
CURVATURE = 2 * (HERE - SMOOTH)
CROSS = torch.tensor([[1.0, 0, -1], [0, 0, 0], [-1, 0, 1]]) / 2

THRESHOLDS = tuple(
    0.0005 * 2.0**k for k in range(11)
)  # of radiance: the sum of min(x / t, 1) over them is a log to base 4
FINE, COARSE = 0.05, 0.2  # contrasts, in units of that log, from which an edge counts whole
LOG, LDR, EDGES = 0, 3, 6  # first channel of each in every level: three colours, three colours, two hinges an edge
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))  # y, x
# Of the differences under these shifts: which of two directions fits better, and how much the middle one is off the best.
COMBINATIONS: dict[str, dict[int, float]] = {
    "x": {1: 1, 2: -1},
    "y": {3: 1, 4: -1},
    "off x": {1: 1, 2: 1, 0: -2},
    "off y": {3: 1, 4: 1, 0: -2},
}
RATIOS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of the two, at which votes change sides
VOTE = 0.15  # difference at which a vote is whole
RANDOM = 0.5  # Kaiming's weights of channels without a purpose, relative to his
NOISE = 1.0  # pixels of a level, of the flows that `fit_flow` mends
RIDGE = 3e-3


def kaiming(model: SAFNet, scale: float = 1.0) -> None:
    """Kaiming's initialisation of encoder and decoder, with zero biases; torch's default loses the signal in the encoder."""
    for module in (*model.encoder.modules(), *model.decoder.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, PRELU_SLOPE)
            module.weight.data *= scale
            assert module.bias is not None
            nn.init.zeros_(module.bias)


@torch.no_grad()
def match_frames(model: SAFNet) -> None:
    """Encoder and decoder up to the last layer: votes on the flow from bounded edges of log radiance."""
    kaiming(model, RANDOM)
    _encode(model.encoder)
    differences = _compare(model.decoder.conv1)
    combined = _combine(model.decoder.conv2, differences)
    votes = _vote(model.decoder.conv3, combined)
    pooled = _pool(model.decoder.conv4, votes)
    for output, channel in enumerate(pooled):
        conv = _unit(model.decoder.conv5, output, 1.0)
        conv.weight[output, channel] = MEAN


def _unit(layer: Any, output: int, slope: float, bias: float = 0.0) -> nn.Conv2d:
    """A layer's convolution, after emptying one of its outputs; slope 1 passes all, 0 cuts negatives, -1 takes absolutes."""
    conv, prelu = layer
    conv.weight[output] = 0
    conv.bias[output] = bias
    prelu.weight[output] = slope
    return conv


def _shuffled(channel: int) -> int:
    """Where the channel shuffle puts a channel."""
    return channel % GROUP * DECODER_GROUPS + channel // GROUP


def _encode(encoder: Encoder) -> None:
    """Each level: log radiance and LDR value of the colours, and edges as pairs of hinges, clip(edge / contrast, -1, 1)."""
    first, second = encoder.get_submodule("pyramid1").children()
    for number, threshold in enumerate(THRESHOLDS):
        for colour in range(3):
            # 1 - min(x / t, 1): one bounded unit a threshold. Unbounded ones reach 2000 and make training explode.
            output = 3 * number + colour
            _unit(first, output, 0.0, 1.0).weight[output, colour] = -SMOOTH / threshold
    encoded = 3 * len(THRESHOLDS)
    for colour in range(3):
        _unit(first, encoded + colour, 1.0).weight[encoded + colour, 3 + colour] = SMOOTH
    steps = range(len(THRESHOLDS))
    _find_edges(second, [[(3 * number + colour, -0.5) for number in steps] for colour in range(3)], encoded)
    for level in range(2, LEVELS + 1):
        first, second = encoder.get_submodule(f"pyramid{level}").children()
        for output in range(LOG, EDGES):
            _unit(first, output, 1.0).weight[output, output] = SMOOTH
        _find_edges(second, [[(LOG + colour, 1.0)] for colour in range(3)], LDR)


def _find_edges(layer: Any, log_radiance: list[list[tuple[int, float]]], ldr: int) -> None:
    """Fill a level's second layer, given as which sums of channels the colours' log radiance comes, and the first LDR one."""
    for colour, parts in enumerate(log_radiance):
        for channel, weight in parts:
            conv = _unit(layer, LOG + colour, 1.0) if channel == parts[0][0] else layer[0]
            conv.weight[LOG + colour, channel] = weight * HERE
        _unit(layer, LDR + colour, 1.0).weight[LDR + colour, ldr + colour] = HERE
    luminance = [(channel, weight / 3) for parts in log_radiance for channel, weight in parts]
    hue = log_radiance[0] + [(channel, -weight) for channel, weight in log_radiance[2]]
    edges = [
        *((ALONG_X, luminance, FINE), (ALONG_X, luminance, COARSE), (ALONG_X, hue, FINE)),
        *((ALONG_Y, luminance, FINE), (ALONG_Y, luminance, COARSE), (ALONG_Y, hue, FINE)),
        *((CURVATURE, luminance, FINE), (CURVATURE, luminance, COARSE), (CROSS, luminance, FINE)),
    ]
    for number, (kernel, source, contrast) in enumerate(edges):
        for hinge, bias in enumerate((1.0, -1.0)):
            output = EDGES + 2 * number + hinge
            conv = _unit(layer, output, 0.0, bias)
            for channel, weight in source:
                conv.weight[output, channel] += weight / contrast * kernel


def _compare(layer: Any) -> dict[tuple[int, int, int], int]:
    """|warped and shifted edge - reference's| for both frames, three edges a group: channels by (frame, edge, shift)."""
    layer[0].weight[:, 3 * FEATURES :] = 0  # flows of +-16 would drown the differences
    layer[0].weight *= 0.5
    channels = {}
    for group in range(DECODER_GROUPS):
        output = group * GROUP
        for edge in range(3 * group, 3 * group + 3):
            for frame, start in enumerate((0, 2 * FEATURES)):
                for shift, (dy, dx) in enumerate(SHIFTS):
                    conv = _unit(layer, output, -1.0)
                    for hinge, sign in ((0, 0.5), (1, -0.5)):
                        channel = EDGES + 2 * edge + hinge
                        conv.weight[output, start + channel, 1 + dy, 1 + dx] += sign
                        conv.weight[output, FEATURES + channel, 1, 1] -= sign
                    channels[frame, edge, shift] = output
                    output += 1
    return channels


def _combine(layer: Any, differences: dict[tuple[int, int, int], int]) -> dict[tuple[int, str], list[int]]:
    """Sums over 3 x 3 pixels, by (frame, name); frames are placed so that the shuffle parts them into groups 0 and 1."""
    channels: dict[tuple[int, str], list[int]] = {}
    for group in range(DECODER_GROUPS):
        for frame, start in enumerate((0, 14)):
            output = group * GROUP + start
            for name, shifts in {**COMBINATIONS, "middle": {0: 0.5}}.items():
                for edges in ((0, 1, 2),) if name == "middle" else ((0, 1), (2,)):
                    conv = _unit(layer, output, 1.0)
                    for edge in edges:
                        for shift, weight in shifts.items():
                            conv.weight[output, differences[frame, 3 * group + edge, shift] % GROUP] += weight * MEAN
                    channels.setdefault((frame, name), []).append(_shuffled(output))
                    output += 1
    return channels


def _vote(layer: Any, combined: dict[tuple[int, str], list[int]]) -> list[list[tuple[int, float]]]:
    """clip((better side - ratio * off) / VOTE), which stands for a division, and the sums themselves, as sums of channels."""
    votes, sums = [], []
    for frame in (0, 1):
        output = GROUP * frame
        for axis in "xy":
            for ratio in RATIOS:
                hinges = []
                for bias in (1.0, -1.0):
                    conv = _unit(layer, output, 0.0, bias)
                    for channel in combined[frame, axis]:
                        conv.weight[output, channel % GROUP] += MEAN / VOTE
                    for channel in combined[frame, f"off {axis}"]:
                        conv.weight[output, channel % GROUP] -= ratio * MEAN / VOTE
                    hinges.append((output, 0.5 * bias))
                    output += 1
                votes.append(hinges)
        for name in (*COMBINATIONS, "middle"):
            conv = _unit(layer, output, 1.0)
            for channel in combined[frame, name]:
                conv.weight[output, channel % GROUP] += MEAN
            sums.append([(output, 1.0)])
            output += 1
    return votes + sums


def _pool(layer: Any, sums: list[list[tuple[int, float]]]) -> list[int]:
    """The given sums of channels, smoothed; a sum over two groups of the layer becomes two channels."""
    grouped: list[list[list[tuple[int, float]]]] = [[] for _ in range(DECODER_GROUPS)]
    for parts in sums:
        placed = [(_shuffled(channel), weight) for channel, weight in parts]
        for group in dict.fromkeys(channel // GROUP for channel, _ in placed):
            grouped[group].append([(c % GROUP, weight) for c, weight in placed if c // GROUP == group])
    channels = []
    for group, members in enumerate(grouped):
        for output, parts in enumerate(members, group * GROUP):
            conv = _unit(layer, output, 1.0)
            for channel, weight in parts:
                conv.weight[output, channel] += weight * (MEAN + HERE) / 2
            channels.append(_shuffled(output))
    return channels


# ---- reading the flow off the votes ----------------------------------------------------------------------------------


@torch.no_grad()
def fit_flow(model: SAFNet, batches: Iterable[tuple[Tensor, Tensor, Tensor]], scale_factor: float = 0.5) -> None:
    """Set the decoder's last layer so that it mends flows that are off by smooth noise, as well as least squares can.

    Args:
        batches: exposures (N, 3, 6, H, W), true flow (N, 2, 2, H, W) and where it holds (N, 2, H, W), of square crops.

    Raises:
        ValueError: the flow is known nowhere.
    """
    noise = torch.Generator().manual_seed(0)
    samples: list[list[tuple[float, Tensor, Tensor]]] = [[], []]
    for exposures, flow, visible in batches:
        size = network_size(exposures.shape[3], exposures.shape[4], scale_factor)
        pyramids = [model.encoder(F.interpolate(part, size, mode="bilinear")) for part in exposures.unbind(1)]
        for level in range(LEVELS):
            features = [pyramid[level] for pyramid in pyramids]
            cell = exposures.shape[3] // features[0].shape[2]
            means = [mean_flow(flow[:, frame], visible[:, frame : frame + 1], cell) for frame in (0, 1)]
            errors = [smooth_noise(mean.shape, NOISE, noise) for mean, _ in means]
            flows = [mean / cell + error for (mean, _), error in zip(means, errors, strict=True)]
            last = _last_features(model, features, flows)
            weight = min(4.0**level, 16.0)  # for the fewer cells of coarse levels
            for frame in (0, 1):
                known = (means[frame][1] > 0.9).flatten()
                rows = last.permute(0, 2, 3, 1).reshape(-1, DECODER_CHANNELS)[known]
                target = -errors[frame].permute(0, 2, 3, 1).reshape(-1, 2)[known]
                samples[frame].append((weight, F.pad(rows, (0, 1), value=1.0).double(), target.double()))
    if not any(len(rows) for _, rows, _ in samples[0]) or not any(len(rows) for _, rows, _ in samples[1]):
        raise ValueError("fit_flow: scenes must have a known flow, none has")
    kernel = torch.tensor([0.25, 0.75, 0.75, 0.25])  # a transposed convolution that is bilinear
    conv = model.decoder.conv6
    for frame in (0, 1):
        solution = _ridge(samples[frame])
        for axis in (0, 1):
            output = 2 * frame + axis
            # Flow in the cells of the next level is twice as long.
            conv.weight[:, output] = 2 * solution[:-1, axis].float()[:, None, None] * (kernel[:, None] * kernel)
            conv.bias[output] = 2 * solution[-1, axis]  # type: ignore[index]


def mean_flow(flow: Tensor, visible: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """Mean of flow (N, 2, H, W) over the visible (N, 1, H, W) pixels of each cell, and which part of it they are."""
    part = F.avg_pool2d(visible.to(flow.dtype), cell)
    return F.avg_pool2d(flow * visible, cell) / part.clamp(min=1e-3), part


def smooth_noise(shape: torch.Size, size: float, generator: torch.Generator) -> Tensor:
    """Random flow of a batch: sums of smooth fields, of another strength, up to about `size`, in each sample."""
    n, channels, height, width = shape
    fields = torch.zeros(shape)
    for cells in (1, 2, 4, 8):
        if cells <= min(height, width):
            coarse = torch.randn(n, channels, cells, cells, generator=generator)
            fields += 0.5 * F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return size * (torch.rand(n, 1, 1, 1, generator=generator) + 0.1) * fields


def _last_features(model: SAFNet, features: list[Tensor], flows: list[Tensor]) -> Tensor:
    """What the decoder's last layer gets, given flows and no masks yet."""
    decoder: Any = model.decoder
    warped = [safnet_ops.backward_warp(features[2 * frame], flows[frame].contiguous()) for frame in (0, 1)]
    masks = torch.zeros_like(flows[0])
    x = decoder.conv1(torch.cat([warped[0], features[1], warped[1], *flows, masks], 1))
    for conv, prelu in (decoder.conv2, decoder.conv3, decoder.conv4):
        x = safnet_ops.group_conv_shuffle(x, conv.weight, conv.bias, prelu.weight, DECODER_GROUPS)
    return decoder.conv5(x)


def _ridge(samples: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """Weights (channels + 1, 2) of least squares on standardised rows."""
    total = sum(weight * len(rows) for weight, rows, _ in samples)
    power = torch.stack([weight * rows.square().sum(0) for weight, rows, _ in samples]).sum(0) / total
    deviation = power.sqrt().clamp(min=1e-6)
    scaled = [(weight, rows / deviation, target) for weight, rows, target in samples]
    left = torch.stack([weight * rows.T @ rows for weight, rows, _ in scaled]).sum(0)
    right = torch.stack([weight * rows.T @ target for weight, rows, target in scaled]).sum(0)
    identity = torch.eye(len(left), dtype=left.dtype)
    return torch.linalg.solve(left + RIDGE * total * identity, right) / deviation[:, None]
