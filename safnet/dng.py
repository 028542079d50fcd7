"""Linear DNG, which raw converters develop: light of 16 bits that needs no demosaicing, by Adobe's Digital Negative 1.4.

The camera that it claims to be from has the primaries of the result and white at (1, 1, 1). BaselineExposure makes converters
show it as bright as the reference exposure. Its tags are written by Pillow.
"""

from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffTags
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from safnet.choices import Depth
from safnet.colour import Space
from safnet.exif import EXIF_IFD, GPS_IFD, exif_bytes
from safnet.files import written_whole
from safnet.images import FloatPicture, ImageError, Metadata

LINEAR_RAW, D65 = 34892, 21
VERSION = bytes([1, 4, 0, 0])
READERS = {"uint16": bytes([1, 1, 0, 0]), "half": VERSION}  # the oldest that can read it: 1.4 is the first with floats
HEADER = b"II*\0\x08\0\0\0"
ROWS = 256  # that are written at a time
MODEL = "safnet"  # no converter has a profile of it that would replace the matrix


def write_dng(
    path: Path, light: FloatPicture, depth: Depth, space: Space, exposure: float, metadata: Metadata | None
) -> None:
    """Write linear RGB (H, W, 3), whole or not at all.

    Args:
        light: stored as it is, between 0 and 1.
        depth: "uint16", in which 65535 is 1, or "half".
        space: its primaries.
        exposure: by which it is multiplied to be 1 where the reference exposure clips.
        metadata: of the reference frame; None if this is no result of a fusion.
    """
    directory = _directory(light.shape[:2], depth, space, exposure, exif_bytes(metadata))
    try:
        with written_whole(path) as partial, partial.open("wb") as file:
            file.write(HEADER)
            file.write(directory.tobytes(len(HEADER)))  # which makes the strip's offset that of what follows
            for first in range(0, len(light), ROWS):
                _codes(light[first : first + ROWS].clip(0, 1), depth).tofile(file)
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}") from error


def _codes(rows: FloatPicture, depth: Depth) -> npt.NDArray[Any]:
    return rows.astype("<f2") if depth == "half" else np.round(rows * np.float32(65535)).astype("<u2")


def _directory(
    size: tuple[int, ...], depth: Depth, space: Space, exposure: float, metadata: bytes
) -> ImageFileDirectory_v2:
    height, width = size
    from_xyz = np.linalg.inv(space.to_xyz())
    integers = depth == "uint16"
    tags: list[tuple[int, int, Any]] = [
        (254, TiffTags.LONG, 0),  # NewSubfileType: the picture itself
        (256, TiffTags.LONG, width),
        (257, TiffTags.LONG, height),
        (258, TiffTags.SHORT, (16, 16, 16)),  # BitsPerSample
        (259, TiffTags.SHORT, 1),  # Compression: none
        (262, TiffTags.SHORT, LINEAR_RAW),
        (273, TiffTags.LONG, 0),  # StripOffsets
        (274, TiffTags.SHORT, 1),  # Orientation: upright
        (277, TiffTags.SHORT, 3),  # SamplesPerPixel
        (278, TiffTags.LONG, height),  # RowsPerStrip
        (279, TiffTags.LONG, height * width * 6),  # StripByteCounts
        (284, TiffTags.SHORT, 1),  # PlanarConfiguration: colours side by side
        (339, TiffTags.SHORT, (1 if integers else 3,) * 3),  # SampleFormat
        (50706, TiffTags.BYTE, VERSION),  # DNGVersion
        (50707, TiffTags.BYTE, READERS[depth]),  # DNGBackwardVersion
        (50708, TiffTags.ASCII, f"{MODEL} {space.name}"),  # UniqueCameraModel
        (50713, TiffTags.SHORT, (1, 1)),  # BlackLevelRepeatDim
        (50714, TiffTags.LONG, (0, 0, 0)),  # BlackLevel
        (50717, TiffTags.LONG, (65535 if integers else 1,) * 3),  # WhiteLevel
        (50721, TiffTags.SIGNED_RATIONAL, tuple(float(number) for number in from_xyz.ravel())),  # ColorMatrix1
        (50728, TiffTags.RATIONAL, (1.0, 1.0, 1.0)),  # AsShotNeutral
        (50730, TiffTags.SIGNED_RATIONAL, float(log2(exposure))),  # BaselineExposure
        (50778, TiffTags.SHORT, D65),  # CalibrationIlluminant1
    ]
    directory = ImageFileDirectory_v2(HEADER)
    exif = Image.Exif()
    exif.load(metadata)
    for tag, value in exif.items():
        if isinstance(value, str):
            directory.tagtype[tag] = TiffTags.ASCII
            directory[tag] = value.encode("latin-1")  # the bytes of UTF-8, as Pillow read them
    for tag in (EXIF_IFD, GPS_IFD):
        if inner := exif.get_ifd(tag):
            directory.tagtype[tag] = TiffTags.LONG
            directory[tag] = inner
    for tag, kind, value in tags:
        directory.tagtype[tag] = kind
        directory[tag] = value
    return directory
