"""EXIF data of files that OpenImageIO does not open or write itself."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import OpenImageIO as oiio
from PIL import Image

from safnet.images import Metadata, exposure_metadata, kept_metadata, write_picture

MAKER_NOTE, ORIENTATION = 0x927C, 0x0112
EXIF_IFD, GPS_IFD = 0x8769, 0x8825
SUB_IFDS = 0x014A  # of raw files: pictures


class Exif(NamedTuple):
    """As of `safnet.images.Header`."""

    exposure_time: float | None = None
    f_number: float | None = None
    iso: float | None = None
    bias: float | None = None
    metadata: Metadata = ()


def read_exif(exif: Image.Exif) -> Exif:
    """What counts in EXIF data, by OpenImageIO, to which it is handed on in a small JPEG file."""
    small = Image.Exif()
    for tag, value in exif.items():
        if tag not in (EXIF_IFD, GPS_IFD, ORIENTATION) and isinstance(value, str | int | float):
            small[tag] = value.encode("latin-1", "replace") if isinstance(value, str) else value  # UTF-8's bytes
    for ifd in (EXIF_IFD, GPS_IFD):
        kept = small.get_ifd(ifd)
        for tag, value in exif.get_ifd(ifd).items():
            if tag != MAKER_NOTE:
                kept[tag] = value
    with TemporaryDirectory() as folder:
        path = Path(folder) / "exif.jpg"
        try:
            Image.new("L", (8, 8)).save(path, exif=small)
        except (ValueError, TypeError, OverflowError, OSError):  # values that EXIF data should not have
            return Exif()
        source = oiio.ImageInput.open(str(path))
        if source is None:
            oiio.geterror()
            return Exif()
        try:
            spec = source.spec()
            return Exif(*exposure_metadata(spec), kept_metadata(spec))
        finally:
            source.close()


def exif_bytes(metadata: Metadata | None) -> bytes:
    """Metadata of a reference frame (None where there was no fusion) as EXIF data, which begin as a TIFF file does: by
    OpenImageIO, from a small JPEG file."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "exif.jpg"
        write_picture(path, np.zeros((8, 8, 3), np.uint8), metadata, tagged=False)
        with Image.open(path) as picture:
            return bytes(picture.info["exif"]).removeprefix(b"Exif\0\0")
