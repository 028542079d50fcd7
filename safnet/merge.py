"""How aligned exposures are weighed against each other at full size: by their noise, where noise is all that differs.

SAFNet weighs by triangle functions of the reference's value, and by masks that are often undecided where a scene is dark. The
result is then noisier than the long exposure alone. Where two exposures differ by no more than their noise nothing can be lost
by trusting the long one, and the least noise comes of weights by the inverse of the variance.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from safnet.radiance import GAMMA
from safnet_ops.reference import triangle_weights

NOISE_EXPONENT = 1.5  # radiance of ratio t has a variance of t^-1 where photons make the noise, t^-2 where reading does
FADING, CLIPPED = 0.8, 0.97  # LDR values between which an exposure loses its weight before it clips
READABLE = 0.9  # LDR value of the reference below which the long exposure can be compared with it
LEVELS = 24  # of brightness at which noise is measured; equal steps of the LDR value's root
FEWEST_AT_LEVEL = 200  # values
MEAN_OF_MEDIAN = 1.18  # of absolute differences that are normally distributed
LARGEST_NOISE = 0.02  # mean difference in LDR values; beyond it, something else differs
NOISELESS, NOISY = 0.003, 0.006  # mean differences up to which nothing, and from which all, depends on noise
NEIGHBOURHOOD = 2  # pixels to each side over which differences are averaged
AGREES, DIFFERS = 1.2, 1.6  # times the noise: mean differences up to which exposures surely agree, and no longer do
TELLING = (
    0.1,
    0.3,
)  # LDR values of an unclipped colour, up to which it tells nothing of clipped ones, and from which it does
FULL_WEIGHT = 0.25  # of an outer exposure's triangle weight, from which it counts by its noise alone
LEAST_SHORT = 1e-2  # weight of the short exposure where it clips itself: no other has more to tell there
LEAST_WEIGHT = 1e-6  # of the reference, so that no pixel is without weight


def measure_noise(long: Tensor, reference_ldr: Tensor, ratios: Sequence[float]) -> Tensor:
    """Mean difference in LDR values (LEVELS,) of the aligned long exposure from the reference, by the reference's level; 0
    where there are too few values.

    Args:
        long: radiance (N, 3, H, W) in the short exposure's units, warped to the reference.
        reference_ldr: LDR values (N, 3, H, W) in [0, 1].
        ratios: exposure ratios of short, reference and long.
    """
    difference, readable = _differences(long, reference_ldr, ratios)
    level = _level(reference_ldr)[readable]
    values = difference[readable]
    counts = level.bincount(minlength=LEVELS).tolist()
    groups = values[level.argsort()].split(counts)
    medians = [group.median() if len(group) >= FEWEST_AT_LEVEL else values.new_zeros(()) for group in groups]
    return (MEAN_OF_MEDIAN * torch.stack(medians)).clamp(max=LARGEST_NOISE)


def weigh_by_noise(
    short: Tensor, reference: Tensor, long: Tensor, mask_long: Tensor, ratios: Sequence[float], noise: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Base weights (N, 3, H, W) of three aligned exposures, and the long exposure's mask (N, 1, H, W), for `fused_fuse`.

    Without noise they are the triangle functions and the mask as it is.

    Args:
        short, long: radiance (N, 3, H, W) in the short exposure's units, warped to the reference.
        reference: (N, 6, H, W), as of `exposure_input`.
        mask_long: in [0, 1].
        ratios: exposure ratios of short, reference and long.
        noise: as of `measure_noise`.
    """
    radiance, reference_ldr = reference[:, 0:3], reference[:, 3:6]
    difference, readable = _differences(long, reference_ldr, ratios)
    expected = _box_mean(noise[_level(reference_ldr)])
    share = _smoothstep(expected.amax(1, keepdim=True), NOISELESS, NOISY)
    unlike = (_box_mean(difference) / (expected + 1e-4)).amax(1, keepdim=True)
    agrees = torch.where(readable.all(1, keepdim=True), 1 - _smoothstep(unlike, AGREES, DIFFERS), 0)
    triangle = triangle_weights(reference_ldr)
    inverse = [
        ratio**NOISE_EXPONENT * (1 - _smoothstep(_as_exposed(exposure, ratio), FADING, CLIPPED))
        for exposure, ratio in zip((short, radiance, long), ratios, strict=True)
    ]
    inverse[0] = inverse[0].clamp(min=LEAST_SHORT)
    inverse[1] = inverse[1] + LEAST_WEIGHT
    for number in (0, 2):
        # The masks mean something only where the triangle function gives that exposure weight.
        inverse[number] = inverse[number] * (triangle[number] / FULL_WEIGHT).clamp(max=1)
    total = inverse[0] + inverse[1] + inverse[2]
    short_weight, reference_weight, long_weight = (
        torch.lerp(plain, weight / total, share) for plain, weight in zip(triangle, inverse, strict=True)
    )
    return (short_weight, reference_weight, long_weight), torch.maximum(mask_long, agrees * share)


def trust_in_refining(reference_ldr: Tensor) -> Tensor:
    """Trust in the refine module (N, 1, H, W), in [0, 1]: none where colours clip and only noise is left of the rest.

    What is clipped it judges by the colours that are not. In narrow-band light these hold nothing: under magenta lamps red
    and blue clip, and green is noise.
    """
    clipped = reference_ldr >= CLIPPED
    some = clipped.any(1, keepdim=True) & ~clipped.all(1, keepdim=True)
    rest = reference_ldr.masked_fill(clipped, 0).amax(1, keepdim=True)
    return torch.where(some, _smoothstep(rest, *TELLING), 1)


def _differences(long: Tensor, reference_ldr: Tensor, ratios: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Absolute differences of the long exposure, exposed as the reference, from it, and where they can be read."""
    readable = (reference_ldr < READABLE) & (_as_exposed(long, ratios[2]) < CLIPPED)
    return (_as_exposed(long, ratios[1]) - reference_ldr).abs(), readable


def _level(ldr: Tensor) -> Tensor:
    return (ldr.clamp(0, 1).sqrt() * LEVELS).long().clamp(max=LEVELS - 1)


def _as_exposed(radiance: Tensor, ratio: float) -> Tensor:
    """LDR values of radiance in the short exposure's units, exposed with a ratio."""
    return (radiance * ratio).clamp(0, 1).pow(1 / GAMMA)


def _smoothstep(values: Tensor, low: float, high: float) -> Tensor:
    x = ((values - low) / (high - low)).clamp(0, 1)
    return x * x * (3 - 2 * x)


def _box_mean(values: Tensor) -> Tensor:
    side = 2 * NEIGHBOURHOOD + 1
    return F.avg_pool2d(values, side, 1, NEIGHBOURHOOD, count_include_pad=False)
