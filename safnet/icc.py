"""ICC profiles: what they say, by LittleCMS, and new ones of matrix and curve for files that are written."""

import io
import struct
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms

from safnet.colour import D50, Colour, Curve, Space, Values, adaptation, space_of_matrix
from safnet.radiance import GAMMA

CODES = 256  # at which a profile's curve is asked for, which 8-bit transforms allow
EXACT = ImageCms.Flags.NOOPTIMIZE  # else LittleCMS interpolates in coarse tables
SAME_CURVE = 0.01  # of gamma-2.2 values, by which the curves of two channels may differ


class ProfileError(ValueError):
    """A profile that cannot be followed."""


def read_profile(profile: bytes) -> Colour:
    """Primaries and curve of a profile of RGB or grey; of others, and of tables, that pixels must be converted by it.

    Raises:
        ProfileError: it is damaged, or of no colours of pictures.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
        name = (opened.profile_description or "unnamed profile").strip()
        kind = opened.xcolor_space.strip()
        if kind == "CMYK":
            return Colour(profile=profile)
        if kind == "GRAY":
            return Colour(curve=_curve(name, _grey_values(profile, "L", (1,))))
        if kind != "RGB":
            raise ProfileError(f"its colour profile ({name}) is one of {kind}, not of RGB, grey or CMYK")
        if not opened.is_matrix_shaper or not _channels_alike(profile):
            return Colour(profile=profile)
        return Colour(_space(name, opened), _curve(name, _grey_values(profile, "RGB", (1, 1, 1))))
    except (OSError, ImageCms.PyCMSError) as error:
        raise ProfileError(f"its colour profile cannot be read: {error}") from error


def to_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """8-bit pixels converted to sRGB as a profile says."""
    converted = ImageCms.profileToProfile(
        picture,
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.createProfile("sRGB"),
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        "RGB",
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    assert converted is not None
    return converted


def make_profile(space: Space, curve: Literal["linear", "srgb"]) -> bytes:
    """An ICC profile (version 4.3) of a space, of linear values or of sRGB's curve."""
    colourants = space.to_d50().T
    coding = (
        _parametric(0, 1.0) if curve == "linear" else _parametric(3, 2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    )
    white = space.to_xyz().sum(1)
    tags = {
        b"desc": _text(f"{space.name}, {'linear' if curve == 'linear' else 'sRGB curve'}"),
        b"cprt": _text("No copyright, use freely"),
        b"wtpt": _xyz(D50),
        b"chad": b"sf32" + bytes(4) + _fixed(*adaptation(white, D50).ravel()),
        **{key: _xyz(value) for key, value in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colourants, strict=True)},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), coding),
    }
    return _assemble(b"RGB ", tags)


def _space(name: str, profile: Any) -> Space:
    """Colourants in a profile are adapted to D50; the space is that before."""
    colourants = np.array(
        [colourant[0] for colourant in (profile.red_colorant, profile.green_colorant, profile.blue_colorant)]
    )
    if profile.chromatic_adaptation is not None:
        undone = np.linalg.inv(np.array(profile.chromatic_adaptation[0], np.float64))
    else:
        white = np.array(profile.media_white_point[0], np.float64)
        undone = adaptation(D50, white / white[1])
    return space_of_matrix(name, undone @ colourants.T)


def _grey_values(profile: bytes, mode: str, channels: tuple[int, ...]) -> Values:
    """LDR values of gamma 2.2 of the luminance of 256 codes in some channels."""
    codes = np.arange(CODES, dtype=np.uint8)
    ramp = codes if len(channels) == 1 else codes[:, None] * np.array(channels, np.uint8)
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        ImageCms.ImageCmsProfile(io.BytesIO(_GREY)),
        mode,
        "I;16",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        EXACT,
    )
    values = np.asarray(transform.apply(Image.fromarray(ramp[None]))).astype(np.float64)[0] / 65535
    return values / values[-1]


def _channels_alike(profile: bytes) -> bool:
    grey = _grey_values(profile, "RGB", (1, 1, 1))
    single = [_grey_values(profile, "RGB", channels) for channels in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    return all(np.abs(values - grey).max() < SAME_CURVE for values in single)


def _curve(name: str, values: Values) -> Curve:
    """The curve through gamma-2.2 values of equally spaced codes; between them, and below the first, powers of the code."""
    codes, light = np.log(np.arange(1, CODES) / (CODES - 1)), GAMMA * np.log(values[1:].clip(1e-12))
    slope = max((light[1] - light[0]) / (codes[1] - codes[0]), 0.0)

    def decode(wanted: Values) -> Values:
        position = np.log(np.maximum(wanted, 1e-12))
        found = np.interp(position, codes, light)
        below = light[0] + slope * (position - codes[0])
        return np.where(wanted > 0, np.exp(np.where(position < codes[0], below, found)), 0.0)

    return Curve(name, decode)


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(float(value) * 65536) for value in values))


def _xyz(values: Values) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(*values)


def _parametric(kind: int, *parameters: float) -> bytes:
    return b"para" + bytes(4) + struct.pack(">HH", kind, 0) + _fixed(*parameters)


def _text(text: str) -> bytes:
    coded = text.encode("utf-16-be")
    return b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(coded), 28) + coded


def _assemble(colours: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Header, table and data of a display profile; equal data stands once (ICC.1:2022, section 7)."""
    start = 128 + 4 + 12 * len(tags)
    places: dict[bytes, int] = {}
    data = b""
    for value in tags.values():
        if value not in places:
            places[value] = start + len(data)
            data += value + bytes(-len(value) % 4)
    table = b"".join(name + struct.pack(">II", places[value], len(value)) for name, value in tags.items())
    header = struct.pack(
        ">I4xI4s4s4s12x4s28x12s48x", start + len(data), 0x04300000, b"mntr", colours, b"XYZ ", b"acsp", _fixed(*D50)
    )
    return header + struct.pack(">I", len(tags)) + table + data


_GREY = _assemble(
    b"GRAY", {b"desc": _text("grey"), b"cprt": _text("none"), b"wtpt": _xyz(D50), b"kTRC": _parametric(0, GAMMA)}
)
