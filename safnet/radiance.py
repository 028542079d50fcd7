"""Exposure values, linear radiance and the display tone map: the input and output protocol of SAFNet.

Linear value = ldr^2.2 / t with t = 2^(EV - lowest EV): radiance in units of the short exposure, where 1 is its clipping point.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

GAMMA = 2.2  # the camera curve that the protocol assumes
INTEGER_SCALES = {torch.uint8: 255.0, torch.uint16: 2.0**16}  # of the values in files
MU = 5000.0  # compression of the mu-law tone map (Kalantari and Ramamoorthi 2017, equation 5)


def exposure_ratios(evs: Sequence[float]) -> list[float]:
    """Exposure values in stops -> ratios 2^(EV - lowest EV), so that the shortest exposure has ratio 1."""
    lowest = min(evs)
    return [2.0 ** (ev - lowest) for ev in evs]


def ldr_values(frame: Tensor) -> Tensor:
    """LDR values in [0, 1] as float32 of a frame in any floating-point type, or in the 8 or 16 bits of its file.

    8-bit values are divided by 255, 16-bit ones by 2^16, as the published SAFNet does.
    """
    if frame.is_floating_point():
        return frame.float()
    if frame.dtype not in INTEGER_SCALES:
        raise TypeError(f"ldr_values: frame must be uint8, uint16 or floating-point, got {frame.dtype}")
    return frame.to(torch.float32, memory_format=torch.contiguous_format) * (1 / INTEGER_SCALES[frame.dtype])


def linearize(ldr: Tensor, ratio: float) -> Tensor:
    """LDR values in [0, 1] of a frame with the given exposure ratio -> linear radiance in the short exposure's units."""
    return ldr.pow(GAMMA) / ratio


def exposure_input(ldr: Tensor, ratio: float) -> Tensor:
    """LDR picture (N, 3, H, W) in [0, 1] -> the network's input (N, 6, H, W): linear RGB, then LDR RGB."""
    return torch.cat([linearize(ldr, ratio), ldr], 1)


def tone_map(radiance: Tensor, mu: float = MU) -> Tensor:
    """mu-law tone map of linear radiance in [0, 1] to display values in [0, 1]: log(1 + mu x) / log(1 + mu)."""
    return torch.log1p(mu * radiance) / torch.log1p(torch.tensor(mu, dtype=radiance.dtype)).item()
