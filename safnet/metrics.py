"""Scores of an HDR picture against its truth.

Pictures are linear radiance (3, H, W) in [0, 1], RGB, in the short exposure's units. `-l` scores compare these values,
`-mu` scores compare them after the mu-law tone map. Values below 0 count as 0: the tone map is not defined there.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safnet.radiance import tone_map

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # an 11x11 Gaussian window (Wang et al. 2004)
SSIM_K1, SSIM_K2 = 0.01, 0.03
PEAK_LUMINANCE = 1000.0  # cd/m^2 of the value 1, for scores that judge absolute luminance
# PU21, "banding_glare" (Mantiuk and Azimi, PCS 2021, table 1), its range of luminance, and the range its scores assume.
PU21 = (0.353487901, 0.3734658629, 8.277049286e-05, 0.9062562627, 0.09150303166, 0.9099517204, 596.3148142)
PU21_LUMINANCE = (0.005, 10000.0)
PU21_RANGE = 256.0
NTIRE_PERCENTILE = 99.0


class ScoreKind(NamedTuple):
    """How a score is called, how many decimals it is shown with, and what it is."""

    label: str
    decimals: int
    meaning: str


# Every score this project computes, by its name in CSV and JSON files. Higher is better for all of them.
SCORES = {
    "psnr_mu": ScoreKind("PSNR-μ", 3, "PSNR in dB after the mu-law tone map, mu = 5000"),
    "psnr_l": ScoreKind("PSNR-l", 3, "PSNR in dB of linear radiance"),
    "ssim_mu": ScoreKind("SSIM-μ", 4, "SSIM after the mu-law tone map, as MATLAB's ssim on an RGB array"),
    "ssim_l": ScoreKind("SSIM-l", 4, "SSIM of linear radiance, as MATLAB's ssim on an RGB array"),
    "pu21_psnr": ScoreKind("PU21-PSNR", 2, "PSNR in dB of PU21-encoded luminance values"),
    "pu21_ssim": ScoreKind("PU21-SSIM", 4, "SSIM of PU21-encoded luminance values"),
    "cvvdp": ScoreKind("CVVDP", 3, "ColorVideoVDP quality in JOD, 10 is no visible difference"),
    "psnr_mu_clipped": ScoreKind("PSNR-μ clipped", 2, "PSNR-mu of the pixels that are clipped in the reference frame"),
    "psnr_mu_moving": ScoreKind("PSNR-μ moving", 2, "PSNR-mu of the pixels that move between the frames"),
    "fused_psnr_mu": ScoreKind("Hm PSNR-μ", 3, "PSNR-mu of the explicit fusion, before the refine module"),
    "fused_psnr_l": ScoreKind("Hm PSNR-l", 3, "PSNR-l of the explicit fusion, before the refine module"),
    "ntire_psnr_mu": ScoreKind("NTIRE PSNR-μ", 3, "NTIRE 2021: PSNR after 99th percentile, tanh and mu-law"),
    "ntire_psnr": ScoreKind("NTIRE PSNR", 3, "NTIRE 2021: PSNR of gamma-encoded values over the truth's maximum"),
}


def psnr(prediction: Tensor, truth: Tensor, data_range: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB over all elements; infinite for equal pictures."""
    _check_pair("psnr", prediction, truth)
    error = (prediction.double() - truth.double()).square().mean()
    return float(10 * torch.log10(data_range**2 / error))


def psnr_mu(prediction: Tensor, truth: Tensor) -> float:
    """PSNR after the mu-law tone map."""
    return psnr(_mu(prediction), _mu(truth))


def psnr_l(prediction: Tensor, truth: Tensor) -> float:
    """PSNR of linear values."""
    return psnr(prediction.clamp(min=0), truth.clamp(min=0))


def ssim(prediction: Tensor, truth: Tensor, data_range: float = 1.0, *, volume: bool = True) -> float:
    """Mean structural similarity (Wang et al. 2004) of two pictures (3, H, W), equal to MATLAB's `ssim`.

    Args:
        volume: what MATLAB's `ssim(A, ref)` does with an RGB array, and so what is published: the channels are planes
            of a volume and the window is a Gaussian of 11x11x11. False is its 'DataFormat' 'SSC': each channel alone.
    """
    return float(ssim_map(prediction, truth, data_range, volume=volume).double().mean())


def ssim_map(prediction: Tensor, truth: Tensor, data_range: float = 1.0, *, volume: bool = True) -> Tensor:
    """Structural similarity at each pixel (C, H, W), float32; borders are replicated, as MATLAB does."""
    _check_pair("ssim", prediction, truth)
    x, y = prediction.float(), truth.float()
    mean_x, mean_y = _blur(x, volume), _blur(y, volume)
    # Variances are only ever added, so one blur does for both.
    variances = _blur(x.square() + y.square(), volume) - (mean_x.square() + mean_y.square())
    covariance = _blur(x * y, volume) - mean_x * mean_y
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance * (2 * covariance + c2) / (variances + c2)


def pu21_encode(luminance: Tensor) -> Tensor:
    """PU21: absolute luminance in cd/m^2 -> perceptually uniform values, about 0 to 595 (256 at 100 cd/m^2)."""
    p = PU21
    y = luminance.double().clamp(*PU21_LUMINANCE).pow(p[3])
    return (p[6] * (((p[0] + p[1] * y) / (1 + p[2] * y)).pow(p[4]) - p[5])).clamp(min=0)


def pu21_scores(prediction: Tensor, truth: Tensor, peak_luminance: float = PEAK_LUMINANCE) -> tuple[float, float]:
    """PU21-PSNR and PU21-SSIM, RGB values encoded as luminances, over a range of 256 as in the authors' code."""
    encoded = pu21_encode(prediction * peak_luminance), pu21_encode(truth * peak_luminance)
    return psnr(*encoded, PU21_RANGE), ssim(*encoded, PU21_RANGE)


def ntire_scores(prediction: Tensor, truth: Tensor, gamma: float) -> tuple[float, float]:
    """PSNR-mu and PSNR of the NTIRE 2021 HDR challenge, for gamma-encoded pictures.

    PSNR-mu: linear values over the 99th percentile of the truth's, then tanh, then the mu-law. PSNR: encoded values
    over the truth's maximum.
    """
    linear, linear_truth = prediction.double().pow(gamma), truth.double().pow(gamma)
    bright = _percentile(linear_truth, NTIRE_PERCENTILE)
    bounded = tone_map(torch.tanh(linear / bright)), tone_map(torch.tanh(linear_truth / bright))
    return psnr(*bounded), psnr(prediction, truth, float(truth.max()))


def score(
    prediction: Tensor,
    truth: Tensor,
    regions: dict[str, Tensor] | None = None,
    *,
    peak_luminance: float = PEAK_LUMINANCE,
) -> dict[str, float]:
    """The scores of one picture by their names in SCORES, without those that need more than two pictures.

    Args:
        regions: masks (H, W) by name, "clipped" and "moving"; an empty one has no score.

    Raises:
        ValueError: shapes differ, or a value is not finite.
    """
    _check_pair("score", prediction, truth)
    for name, picture in (("prediction", prediction), ("truth", truth)):
        if bad := int((~picture.isfinite()).sum()):
            raise ValueError(f"score: {name} must hold finite numbers, but {bad} of {picture.numel()} are not")
    prediction, truth = prediction.clamp(min=0), truth.clamp(min=0)
    mapped, mapped_truth = _mu(prediction), _mu(truth)
    scores = {
        "psnr_mu": psnr(mapped, mapped_truth),
        "psnr_l": psnr(prediction, truth),
        "ssim_mu": ssim(mapped, mapped_truth),
        "ssim_l": ssim(prediction, truth),
    }
    scores["pu21_psnr"], scores["pu21_ssim"] = pu21_scores(prediction, truth, peak_luminance)
    for name, region in (regions or {}).items():
        if region.any():
            scores[f"psnr_mu_{name}"] = psnr(mapped[:, region], mapped_truth[:, region])
    return scores


def through_rgbe(radiance: Tensor) -> Tensor:
    """Values (3, H, W) as a .hdr file would return them: 8-bit mantissas, cut off, one exponent a pixel (Ward 1991).

    The evaluation scripts of SAFNet's authors score predictions that were stored so.
    """
    brightest = radiance.clamp(min=0).amax(0)
    _, exponent = torch.frexp(brightest)
    step = torch.ldexp(torch.ones_like(brightest), exponent - 8)
    return torch.where(brightest < 1e-32, torch.zeros_like(radiance), (radiance.clamp(min=0) / step).floor() * step)


class ColorVideoVDP:
    """ColorVideoVDP (Mantiuk et al. 2024) of still pictures on its standard HDR display; needs the package `cvvdp`."""

    DISPLAY = "standard_hdr_linear"

    def __init__(self, peak_luminance: float = PEAK_LUMINANCE, device: torch.device | str = "cpu") -> None:
        try:
            import pycvvdp
        except ImportError as error:
            raise ValueError(f"--cvvdp needs the package cvvdp ({error}); pip install 'safnet-ops[cvvdp]'") from error
        self.peak_luminance = peak_luminance
        self.metric: Any = pycvvdp.cvvdp(display_name=self.DISPLAY, device=torch.device(device), quiet=True)

    def __call__(self, prediction: Tensor, truth: Tensor) -> float:
        """Quality in just-objectionable differences; 10 when none is visible."""
        pictures = ((picture.float() * self.peak_luminance).contiguous() for picture in (prediction, truth))
        quality, _ = self.metric.predict(*pictures, dim_order="CHW")
        return float(quality)


def mean(values: Iterable[float]) -> float | None:
    """Arithmetic mean, as published means are; None of nothing."""
    collected = list(values)
    return sum(collected) / len(collected) if collected else None


def _mu(radiance: Tensor) -> Tensor:
    return tone_map(radiance.double().clamp(min=0))


def _blur(picture: Tensor, volume: bool) -> Tensor:
    """Gaussian blur (C, H, W) along rows and columns, and of a volume along channels too, borders replicated."""
    weights = [math.exp(-(offset**2) / (2 * SSIM_SIGMA**2)) for offset in range(-SSIM_RADIUS, SSIM_RADIUS + 1)]
    weights = [weight / sum(weights) for weight in weights]
    for dim in (1, 2):
        picture = _blur_along(picture, dim, weights)
    if not volume:
        return picture
    channels = len(picture)
    mixing = picture.new_zeros(channels, channels)
    for channel in range(channels):
        for offset, weight in enumerate(weights, channel - SSIM_RADIUS):
            mixing[channel, min(max(offset, 0), channels - 1)] += weight
    return (mixing @ picture.flatten(1)).view_as(picture)


def _blur_along(picture: Tensor, dim: int, weights: list[float]) -> Tensor:
    length, reach = picture.shape[dim], len(weights) // 2
    first, last = picture.narrow(dim, 0, 1), picture.narrow(dim, length - 1, 1)
    padded = torch.cat([first] * reach + [picture] + [last] * reach, dim)
    # Shifted sums: on CPUs they beat a convolution with so few channels.
    blurred = torch.zeros_like(picture)
    for offset, weight in enumerate(weights):
        blurred.add_(padded.narrow(dim, offset, length), alpha=weight)
    return blurred


def _percentile(values: Tensor, percent: float) -> float:
    """As numpy's default: linear between the two nearest ranks. torch.quantile refuses more than 16 million values."""
    ordered = values.flatten().sort().values
    position = percent / 100 * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (position - low) * (ordered[high] - ordered[low]))


def _check_pair(function: str, prediction: Tensor, truth: Tensor) -> None:
    if prediction.shape != truth.shape or prediction.numel() == 0:
        raise ValueError(
            f"{function}: prediction must have the truth's shape {tuple(truth.shape)}, got {tuple(prediction.shape)}"
        )
