"""What the numbers of a picture file mean: a transfer curve from codes to light, and the primaries that they are amounts of.

Frames stay in their own primaries until they are fused, where each channel clips at 1; the result is converted to the
space that is asked for. All conversions are relative colorimetric, by Bradford's adaptation of the white points, as those of
ICC profiles are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from safnet.radiance import GAMMA

Values = npt.NDArray[np.float64]

SAME_SPACE = 3e-3  # largest entry by which a matrix between two spaces may differ from one: profiles are rounded
SAME_LIGHT = 2e-3  # largest deviation of a linear curve
GAMMAS = 0.4, 4.0  # that --curve takes
ROWS = 256  # which are converted at a time

BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
D50 = np.array([0.9642, 1.0, 0.8249])  # of ICC profiles
D65_WHITE = 0.3127, 0.3290


class CurveError(ValueError):
    """A curve that is none."""


class Space(NamedTuple):
    """Primaries of linear RGB: x and y of red, green, blue and white, as EXR files state them."""

    name: str
    chromaticities: tuple[float, ...]

    def to_xyz(self) -> Values:
        """RGB -> CIE XYZ of this white, of Y 1."""
        x, y = np.array(self.chromaticities, np.float64).reshape(4, 2).T
        columns = np.stack([x, y, 1 - x - y])
        white = columns[:, 3] / y[3]
        return columns[:, :3] * np.linalg.solve(columns[:, :3], white)

    def to_d50(self) -> Values:
        """RGB -> XYZ as ICC profiles have it."""
        matrix = self.to_xyz()
        return adaptation(matrix.sum(1), D50) @ matrix


REC709 = Space("Rec.709", (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, *D65_WHITE))
P3 = Space("Display P3", (0.68, 0.32, 0.265, 0.69, 0.15, 0.06, *D65_WHITE))
REC2020 = Space("Rec.2020", (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *D65_WHITE))
ADOBE_RGB = Space("Adobe RGB", (0.64, 0.33, 0.21, 0.71, 0.15, 0.06, *D65_WHITE))
ACES_CG = Space("ACEScg", (0.713, 0.293, 0.165, 0.830, 0.128, 0.044, 0.32168, 0.33767))
ACES = Space("ACES2065-1", (0.7347, 0.2653, 0.0, 1.0, 0.0001, -0.077, 0.32168, 0.33767))
SPACES = {"rec709": REC709, "p3": P3, "rec2020": REC2020}


def space_of_matrix(name: str, to_xyz: Values) -> Space:
    """The space of a matrix from RGB to CIE XYZ, of the white that RGB (1, 1, 1) is."""
    columns = np.concatenate([to_xyz, to_xyz.sum(1, keepdims=True)], 1)
    return Space(name, tuple(float(value) for value in (columns[:2] / columns.sum(0)).T.ravel()))


def adaptation(white: Values, target: Values) -> Values:
    """XYZ under one white -> XYZ under another."""
    cones = (BRADFORD @ target) / (BRADFORD @ white)
    return np.linalg.solve(BRADFORD, cones[:, None] * BRADFORD)


def conversion(source: Space, target: Space) -> Values | None:
    """The matrix from linear RGB of one space to that of another; None where they are one."""
    matrix = np.linalg.solve(target.to_d50(), source.to_d50()).astype(np.float64)
    return None if np.abs(matrix - np.eye(3)).max() < SAME_SPACE else matrix


def convert_(radiance: Tensor, source: Space, target: Space) -> None:
    """Convert linear RGB (N, 3, H, W) to another space, in place; what lies outside of it becomes negative, or more than 1."""
    matrix = conversion(source, target)
    if matrix is None:
        return
    with torch.inference_mode():  # in which results are made
        weights = torch.from_numpy(matrix).to(radiance)
        for part in radiance.split(ROWS, 2):
            part.copy_(torch.einsum("ij,njhw->nihw", weights, part))


class Curve(NamedTuple):
    """How light is coded: `decode` takes codes in [0, 1] to light in [0, 1]."""

    name: str
    decode: Callable[[Values], Values]

    @property
    def is_linear(self) -> bool:
        codes = np.linspace(0, 1, 33)
        return bool(np.abs(self.decode(codes) - codes).max() < SAME_LIGHT)


def gamma_curve(gamma: float) -> Curve:
    return Curve(f"gamma {gamma:.4g}", lambda codes: codes**gamma)


def _srgb(codes: Values) -> Values:
    return np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)


def _bt709(codes: Values) -> Values:
    return np.where(codes < 0.081, codes / 4.5, ((codes + 0.099) / 1.099) ** (1 / 0.45))


LINEAR = Curve("linear", lambda codes: codes)
SRGB = Curve("sRGB", _srgb)
BT709 = Curve("BT.709", _bt709)


def parse_curve(text: str) -> Curve | None:
    """The curve that a command line names: srgb, linear or a gamma; None for auto, that of the file.

    Raises:
        CurveError: none of these.
    """
    named = {"auto": None, "srgb": SRGB, "linear": LINEAR}
    if text.lower() in named:
        return named[text.lower()]
    try:
        gamma = float(text.replace(",", "."))
    except ValueError:
        gamma = float("nan")
    if not GAMMAS[0] <= gamma <= GAMMAS[1]:
        raise CurveError(
            f"--curve must be auto, srgb, linear or a gamma of {GAMMAS[0]:g} to {GAMMAS[1]:g}, for example --curve 2.2, "
            f"got {text!r}"
        )
    return LINEAR if gamma == 1 else gamma_curve(gamma)


@dataclass(frozen=True)
class Colour:
    """What a file says of its colours.

    Attributes:
        space: its primaries; Rec.709 where it names none.
        curve: None where it names none: gamma 2.2 then, as the published SAFNet assumes.
        profile: ICC profile by which LittleCMS must convert the pixels to sRGB as they are read: one of CMYK, or a table.
    """

    space: Space = REC709
    curve: Curve | None = None
    profile: bytes | None = None

    @property
    def is_linear(self) -> bool:
        return self.curve is not None and self.curve.is_linear

    def with_curve(self, curve: Curve | None) -> "Colour":
        """The same with another curve; None changes nothing."""
        return self if curve is None else replace(self, curve=curve)

    def table(self, codes: int) -> Tensor | None:
        """LDR values of gamma 2.2 for integer codes from 0 to `codes` - 1, float32; None where these are such values."""
        if self.curve is None:
            return None
        light = self.curve.decode(np.arange(codes) / (codes - 1)).clip(0, 1)
        return torch.from_numpy((light ** (1 / GAMMA)).astype(np.float32))


UNKNOWN = Colour()
