"""HEIC and AVIF files, through pillow-heif (libheif): HEIC in all its bits, AVIF in the 8 that Pillow decodes."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from safnet.colour import UNKNOWN, Colour, Curve
from safnet.exif import read_exif
from safnet.images import FramePicture, Header, ImageError, cicp_colour, open_by_pillow, profile_colour


def read_heif_header(path: Path, curve: Curve | None = None) -> Header:
    """What a file says of itself.

    Raises:
        ImageError: pillow-heif is not installed, libheif cannot read the file, or its colours cannot be known.
    """
    picture = _open(path)
    width, height = picture.size
    exif = Image.Exif()
    if picture.info.get("exif"):
        exif.load(picture.info["exif"])
    found = read_exif(exif)
    return Header(
        path,
        width,
        height,
        found.exposure_time,
        found.f_number,
        found.iso,
        found.bias,
        _colour(path, picture.info, curve),
        found.metadata,
    )


def read_heif_pixels(path: Path) -> FramePicture:
    """RGB (H, W, 3), upright, 8-bit, or 16-bit where a HEIC file has more than 8."""
    try:
        if path.suffix.lower() == ".avif":  # which libheif opens, but in pillow-heif's wheels does not decode
            with open_by_pillow(path) as coded:
                pixels = np.asarray(ImageOps.exif_transpose(coded).convert("RGB"))
        else:
            picture = _open(path)
            pixels = np.array(picture)  # a copy: the picture's memory goes with it
    except (OSError, ValueError, RuntimeError) as error:
        raise ImageError(f"{path} cannot be read, it may be truncated: {error}") from error
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] < 3:
        pixels = np.repeat(pixels[:, :, :1], 3, 2)
    return np.require(pixels[:, :, :3], requirements=["C", "W"])


def _open(path: Path) -> Any:
    try:
        import pillow_heif
    except ImportError as error:
        raise ImageError(
            f"{path}: HEIC and AVIF files need pillow-heif: pip install 'safnet-ops[heif]', or convert the frames to TIFF"
        ) from error
    try:
        return pillow_heif.open_heif(path, convert_hdr_to_8bit=False)
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        raise ImageError(f"{path} cannot be read by libheif: {error}") from error


def _colour(path: Path, info: dict[str, Any], curve: Curve | None) -> Colour:
    if info.get("icc_profile"):
        return profile_colour(path, info["icc_profile"], curve)
    if nclx := info.get("nclx_profile"):
        return cicp_colour(path, nclx["color_primaries"], nclx["transfer_characteristics"], curve)
    return UNKNOWN.with_curve(curve)
