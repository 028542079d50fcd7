"""Exposure values, linear radiance and the display tone map: the input and output protocol of SAFNet.

Linear value = ldr^2.2 / t with t = 2^(EV - lowest EV): radiance in units of the short exposure, where 1 is its clipping point.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GAMMA = 2.2  # the camera curve that the protocol assumes
INTEGER_SCALES = {torch.uint8: 255.0, torch.uint16: 2.0**16}  # of the values in files
LOOK_UP_ROWS = 64
MU = 5000.0  # compression of the mu-law tone map (Kalantari and Ramamoorthi 2017, equation 5)


def exposure_ratios(evs: Sequence[float]) -> list[float]:
    """Exposure values in stops -> ratios 2^(EV - lowest EV), so that the shortest exposure has ratio 1."""
    lowest = min(evs)
    return [2.0 ** (ev - lowest) for ev in evs]


@dataclass(frozen=True)
class StoredFrame:
    """A frame in the bits of its file, and what they mean; has a tensor's shape and dtype, and is cut as one.

    Attributes:
        codes: (N, C, H, W), uint8 or uint16.
        table: the LDR value of gamma 2.2 of each code, float32.
    """

    codes: Tensor
    table: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.codes.dtype

    def __getitem__(self, part: Any) -> "StoredFrame":
        return StoredFrame(self.codes[part], self.table)


Frame = Tensor | StoredFrame


def map_codes(frame: Frame, function: Callable[[Tensor], Tensor]) -> Frame:
    """A frame with other pixels, of the same meaning."""
    return StoredFrame(function(frame.codes), frame.table) if isinstance(frame, StoredFrame) else function(frame)


def ldr_values(frame: Frame) -> Tensor:
    """LDR values in [0, 1] as float32 of a frame in any floating-point type, or in the 8 or 16 bits of its file.

    Without a table 8-bit values are divided by 255, 16-bit ones by 2^16, as the published SAFNet does.
    """
    if isinstance(frame, StoredFrame):
        return _look_up(frame)
    if frame.is_floating_point():
        return frame.float()
    if frame.dtype not in INTEGER_SCALES:
        raise TypeError(f"ldr_values: frame must be uint8, uint16 or floating-point, got {frame.dtype}")
    return frame.to(torch.float32, memory_format=torch.contiguous_format) * (1 / INTEGER_SCALES[frame.dtype])


def code_values(frame: Frame) -> Tensor:
    """The LDR value in [0, 1] of each code of a frame in the 8 or 16 bits of its file: float32."""
    if isinstance(frame, StoredFrame):
        return frame.table
    return torch.arange(torch.iinfo(frame.dtype).max + 1).float() * (1 / INTEGER_SCALES[frame.dtype])


def _look_up(frame: StoredFrame) -> Tensor:
    values = torch.empty(frame.shape, device=frame.codes.device)
    # By rows: torch looks up by indices of 32 bits, which for a whole picture would take twice its memory.
    for codes, part in zip(frame.codes.split(LOOK_UP_ROWS, 2), values.split(LOOK_UP_ROWS, 2), strict=True):
        part.copy_(frame.table.index_select(0, codes.int().flatten()).view(codes.shape))
    return values


def linearize(ldr: Tensor, ratio: float) -> Tensor:
    """LDR values in [0, 1] of a frame with the given exposure ratio -> linear radiance in the short exposure's units."""
    return ldr.pow(GAMMA) / ratio


def exposure_input(ldr: Tensor, ratio: float) -> Tensor:
    """LDR picture (N, 3, H, W) in [0, 1] -> the network's input (N, 6, H, W): linear RGB, then LDR RGB."""
    return torch.cat([linearize(ldr, ratio), ldr], 1)


class ExposureReader:
    """Reads cuts of a frame (N, 3, H, W) as the network's input (N, 6, h, w): see `exposure_input`.

    What the bits of a file stand for is worked out once for each code and looked up.

    Args:
        frame: LDR values in any form that `ldr_values` takes.
        ratio: exposure ratio.
        straighten: LDR values, of any shape, to those of gamma 2.2.
        device: of the result.
    """

    def __init__(
        self, frame: Frame, ratio: float, straighten: Callable[[Tensor], Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self._frame, self._ratio, self._straighten, self._device = frame, ratio, straighten, device
        self._tables = None
        if not frame.dtype.is_floating_point:
            ldr = straighten(code_values(frame))
            self._tables = torch.stack([linearize(ldr, ratio), ldr]).to(device)

    def read(self, rows: slice, columns: slice) -> Tensor:
        cut = self._frame[:, :, rows, columns]
        if self._tables is None:
            return exposure_input(self._straighten(ldr_values(cut).to(self._device)), self._ratio)
        codes = cut.codes if isinstance(cut, StoredFrame) else cut
        indices = codes.to(self._device).to(torch.int32, memory_format=torch.contiguous_format)
        n, channels, height, width = indices.shape
        found = self._tables.new_empty(n, 2, channels, height, width)
        for picture, values in zip(indices, found, strict=True):
            for table, half in zip(self._tables, values, strict=True):
                torch.index_select(table, 0, picture.view(-1), out=half.view(-1))
        return found.flatten(1, 2)


def tone_map(radiance: Tensor, mu: float = MU) -> Tensor:
    """mu-law tone map of linear radiance in [0, 1] to display values in [0, 1]: log(1 + mu x) / log(1 + mu)."""
    return torch.log1p(mu * radiance) / torch.log1p(torch.tensor(mu, dtype=radiance.dtype)).item()
