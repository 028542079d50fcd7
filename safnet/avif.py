"""AVIF of 10 bits for HDR screens, through imagecodecs (libavif): BT.2020's primaries and PQ, which codes light in cd/m2.

The white that the reference exposure just clips at is shown with 203 cd/m2, the diffuse white of ITU-R BT.2408. Primaries,
curve and matrix are signalled as 9, 16 and 9 of ITU-T H.273, full range, 4:4:4. imagecodecs writes no metadata: they are put
into the file here, by ISO/IEC 14496-12 and 23008-12.
"""

import struct
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from safnet.colour import REC709, REC2020, Space, conversion
from safnet.exif import exif_bytes
from safnet.files import written_whole
from safnet.images import FloatPicture, ImageError, Metadata

DIFFUSE_WHITE = 203.0  # cd/m2
BRIGHTEST = 10000.0  # cd/m2, as far as PQ goes
PRIMARIES, TRANSFER, MATRIX = 9, 16, 9  # BT.2020, PQ, BT.2020 not constant
BITS = 10
QUALITY = 100  # without loss but for the rounding of RGB to YCbCr
SPEED = 8  # of 10; slower ones save little
ROWS = 256  # that are coded at a time
# SMPTE ST 2084
M1, M2 = 2610 / 16384, 2523 / 4096 * 128
C1, C2, C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32

_HEADER = struct.Struct(">I4s")  # of a box


def check_avif(option: str, path: Path) -> None:
    """Raise ImageError unless AVIF can be written here; `option` is what the message calls the path."""
    _codecs(f"{option} {path}")


def write_avif(
    path: Path, light: FloatPicture, exposure: float, space: Space = REC709, metadata: Metadata | None = None
) -> float:
    """Write a picture for HDR screens, whole or not at all.

    Args:
        light: linear (H, W, 3).
        exposure: by which it is multiplied to be 1 where diffuse white is.
        space: primaries of `light`.
        metadata: of the reference frame; None if this is no result of a fusion.

    Returns:
        Share of the pixels that are brighter than PQ holds, and are clipped.
    """
    codecs = _codecs(str(path))
    codes, clipped = _pq_codes(light, exposure, space)
    try:
        coded = codecs.avif_encode(
            codes,
            level=QUALITY,
            speed=SPEED,
            bitspersample=BITS,
            pixelformat="yuv444",
            primaries=PRIMARIES,
            transfer=TRANSFER,
            matrix=MATRIX,
            numthreads=torch.get_num_threads(),
        )
        with written_whole(path) as partial:
            partial.write_bytes(_with_exif(coded, exif_bytes(metadata)))
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}") from error
    except RuntimeError as error:  # of libavif
        raise ImageError(f"{path} cannot be written: {error}") from error
    return clipped


def _codecs(wanted: str) -> Any:
    try:
        import imagecodecs
    except ImportError as error:
        raise ImageError(f"{wanted}: AVIF files need imagecodecs: pip install 'safnet-ops[avif]'") from error
    if "primaries" not in signature(imagecodecs.avif_encode).parameters:
        raise ImageError(
            f"{wanted}: AVIF files need imagecodecs 2025.11.11 or newer, for Python 3.11 or newer, got "
            f"{imagecodecs.__version__}: pip install 'safnet-ops[avif]'"
        )
    return imagecodecs


def _pq_codes(light: FloatPicture, exposure: float, space: Space) -> tuple[npt.NDArray[np.uint16], float]:
    """Codes from 0 to 1023, and the share of the pixels of which a colour lies above."""
    matrix = conversion(space, REC2020)
    scale = np.float32(exposure * DIFFUSE_WHITE / BRIGHTEST)
    codes, above = np.empty(light.shape, np.uint16), 0
    for first in range(0, len(light), ROWS):
        rows = light[first : first + ROWS]
        if matrix is not None:
            rows = rows @ matrix.T.astype(np.float32)
        rows = rows * scale
        above += int((rows.max(2) > 1).sum())
        raised = rows.clip(0, 1) ** np.float32(M1)
        shares = ((np.float32(C1) + np.float32(C2) * raised) / (1 + np.float32(C3) * raised)) ** np.float32(M2)
        codes[first : first + ROWS] = np.round(shares * np.float32(2**BITS - 1))
    return codes, above / (light.shape[0] * light.shape[1])


# ---- Exif in AVIF ----------------------------------------------------------------------------------------------------


def _with_exif(avif: bytes, exif: bytes) -> bytes:
    """An AVIF file, with the boxes that libavif writes, and an item of Exif that belongs to its picture.

    Its data come before the picture's, as libavif has it: readers that open a file bit by bit want them there.
    """
    place, end = _boxes(avif, 0, len(avif))[b"meta"]
    parts = _boxes(avif, place + 4, end)  # after version and flags
    picture = struct.unpack_from(">H", avif, parts[b"pitm"][0] + 4)[0]
    item = picture + 1
    entry = bytes([2, 0, 0, 0]) + struct.pack(">HH4s", item, 0, b"Exif") + b"\0"
    reference = _box(b"iref", bytes(4) + _box(b"cdsc", struct.pack(">HHH", item, 1, picture)))
    data = _box(b"mdat", struct.pack(">I", 0) + exif)  # which begins at once, says the number

    def meta(moved: int) -> bytes:
        contents = {name: avif[slice(*part)] for name, part in parts.items()}
        contents[b"iinf"] = _with_entry(contents[b"iinf"], _box(b"infe", entry))
        start = end + moved - len(data) + _HEADER.size
        contents[b"iloc"] = _locations(contents[b"iloc"], moved, item, start, len(data) - _HEADER.size)
        return _box(b"meta", bytes(4) + b"".join(_box(*part) for part in contents.items()) + reference)

    moved = len(meta(len(data))) - (end - place + _HEADER.size) + len(data)
    return avif[: place - _HEADER.size] + meta(moved) + data + avif[end:]


def _boxes(data: bytes, place: int, end: int) -> dict[bytes, tuple[int, int]]:
    """Where the contents of boxes lie, by their types."""
    found = {}
    while place < end:
        size, name = _HEADER.unpack_from(data, place)
        found[name] = place + _HEADER.size, place + size
        place += size
    return found


def _box(name: bytes, content: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(content), name) + content


def _with_entry(iinf: bytes, entry: bytes) -> bytes:
    """A list of items with one more."""
    count = struct.unpack_from(">H", iinf, 4)[0]
    return iinf[:4] + struct.pack(">H", count + 1) + iinf[6:] + entry


def _locations(iloc: bytes, moved: int, item: int, start: int, length: int) -> bytes:
    """Where items lie, all of them moved by some bytes, and one more."""
    version, sizes, count = iloc[0], iloc[4:6], struct.unpack_from(">H", iloc, 6)[0]
    if version != 0 or sizes != b"\x44\0":
        raise RuntimeError(f"libavif wrote offsets of another kind than is known here: {iloc[:6].hex()}")
    located, place = iloc[:6] + struct.pack(">H", count + 1), 8
    for _ in range(count):
        number, source, extents = struct.unpack_from(">HHH", iloc, place)
        located += struct.pack(">HHH", number, source, extents)
        place += 6
        for _ in range(extents):
            offset, size = struct.unpack_from(">II", iloc, place)
            located += struct.pack(">II", offset + moved, size)
            place += 8
    return located + struct.pack(">HHHII", item, 0, 1, start, length)
