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
BAND = 64  # rows that a CPU weighs at a time, so that what is between stays in its cache


def measure_noise(long: Tensor, reference: Tensor, ratios: Sequence[float]) -> Tensor:
    """Mean difference in LDR values (LEVELS,) of the aligned long exposure from the reference, by the reference's level; 0
    where there are too few values.

    Args:
        long, reference: (N, 6, H, W), as of `exposure_input`, long warped to the reference.
        ratios: exposure ratios of short, reference and long.
    """
    difference, readable = _differences(long, reference, ratios)
    readable = readable.expand_as(difference)
    level, values = _level(reference[:, 3:6])[readable], difference[readable]
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
        short, reference, long: (N, 6, H, W), as of `exposure_input`, the outer ones warped to the reference.
        mask_long: in [0, 1].
        ratios: exposure ratios of short, reference and long.
        noise: as of `measure_noise`.
    """
    n, _, height, width = reference.shape
    band = BAND if reference.device.type == "cpu" else height
    weights = tuple(reference.new_empty(n, 3, height, width) for _ in range(3))
    mask = torch.empty_like(mask_long)
    for first in range(0, height, band):
        seen = slice(max(first - NEIGHBOURHOOD, 0), first + band + NEIGHBOURHOOD)
        cut = (short[:, :, seen], reference[:, :, seen], long[:, :, seen], mask_long[:, :, seen])
        found = _weigh_band(*cut, ratios, noise)
        kept = slice(first - seen.start, first - seen.start + band)
        for whole, part in zip((*weights, mask), found, strict=True):
            whole[:, :, first : first + band] = part[:, :, kept]
    short_weight, reference_weight, long_weight = weights
    return (short_weight, reference_weight, long_weight), mask


def _weigh_band(
    short: Tensor, reference: Tensor, long: Tensor, mask_long: Tensor, ratios: Sequence[float], noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reference_ldr = reference[:, 3:6]
    triangle = triangle_weights(reference_ldr)
    expected = noise.index_select(0, _level(reference_ldr).flatten()).view_as(reference_ldr)
    if not expected.max() > NOISELESS:
        return *triangle, mask_long
    expected = _box_mean(expected)
    share = _smoothstep(_largest(expected), NOISELESS, NOISY)
    difference, readable = _differences(long, reference, ratios)
    unlike = _largest(_box_mean(difference).div_(expected + 1e-4))
    agrees = _smoothstep(unlike, DIFFERS, AGREES) * readable
    inverse = [
        (CLIPPED - exposure[:, 3:6]).mul_(ratio**NOISE_EXPONENT / (CLIPPED - FADING)).clamp_(0, ratio**NOISE_EXPONENT)
        for exposure, ratio in zip((short, reference, long), ratios, strict=True)
    ]
    inverse[0].clamp_(min=LEAST_SHORT)
    inverse[1].add_(LEAST_WEIGHT)
    for number in (0, 2):
        # The masks mean something only where the triangle function gives that exposure weight.
        inverse[number].mul_((triangle[number] / FULL_WEIGHT).clamp_(max=1))
    part = share / (inverse[0] + inverse[1]).add_(inverse[2])
    rest = 1 - share
    short_weight, reference_weight, long_weight = (
        (plain * rest).addcmul_(weight, part) for plain, weight in zip(triangle, inverse, strict=True)
    )
    return short_weight, reference_weight, long_weight, torch.maximum(mask_long, agrees * share)


def trust_in_refining(reference_ldr: Tensor) -> Tensor:
    """Trust in the refine module (N, 1, H, W), in [0, 1]: none where one colour clips and another is black.

    What is clipped it judges by the colours that are not. In narrow-band light one of these holds nothing: under magenta lamps
    red and blue clip, and green is noise.
    """
    clipped = reference_ldr >= CLIPPED
    if not clipped.any():
        return torch.ones_like(reference_ldr[:, 0:1])
    some = clipped.any(1, keepdim=True) & ~clipped.all(1, keepdim=True)
    return torch.where(some, _smoothstep(-_largest(-reference_ldr), *TELLING), 1)


def _differences(long: Tensor, reference: Tensor, ratios: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Absolute differences of the long exposure, exposed as the reference, from it, and where all can be read (N, 1, H, W)."""
    long_ldr, reference_ldr = long[:, 3:6], reference[:, 3:6]
    readable = (_largest(reference_ldr) < READABLE) & (_largest(long_ldr) < CLIPPED)
    return (long_ldr * (ratios[1] / ratios[2]) ** (1 / GAMMA)).sub_(reference_ldr).abs_(), readable


def _level(ldr: Tensor) -> Tensor:
    return ldr.clamp(0, 1).sqrt_().mul_(LEVELS).int().clamp_(max=LEVELS - 1)


def _smoothstep(values: Tensor, low: float, high: float) -> Tensor:
    x = (values - low).div_(high - low).clamp_(0, 1)
    return (3 - 2 * x).mul_(x).mul_(x)


def _box_mean(values: Tensor) -> Tensor:
    # Sums of shifted pictures, along rows and then along columns, take a fifth of the time of a pooling operator.
    side, (height, width) = 2 * NEIGHBOURHOOD + 1, values.shape[2:]
    padded = F.pad(values, (NEIGHBOURHOOD,) * 4, mode="replicate")
    rows = padded[..., 0:width].clone()
    for shift in range(1, side):
        rows += padded[..., shift : shift + width]
    sums = rows[..., 0:height, :].clone()
    for shift in range(1, side):
        sums += rows[..., shift : shift + height, :]
    return sums.mul_(1 / side**2)


def _largest(of_colours: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N, 1, H, W); several times as fast as `amax`."""
    red, green, blue = of_colours.split(1, 1)
    return torch.maximum(torch.maximum(red, green), blue)
