"""Ultra HDR: a JPEG that every reader shows, and beside it a gain map from which others know the light above.

By the Ultra HDR image format 1.1 and Adobe's gain map specification 1.0: light = (shown + OFFSET) 2^gain - OFFSET, where 1 is
the white of the picture that is shown, and gain is coded in 8 bits for each colour.
"""

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from safnet.files import written_whole
from safnet.images import BytePicture, FloatPicture, ImageError, Metadata, open_by_pillow, write_picture

OFFSET = 1 / 64  # keeps gains of dark pixels small
QUALITY = 97  # of the gain map; that of the picture is `write_picture`'s
ROWS = 256  # that are computed at a time
LARGEST_SEGMENT = 65533  # bytes in a JPEG marker segment
XMP = b"http://ns.adobe.com/xap/1.0/\0"
PRIMARY, OTHER = 0x030000, 0  # types of pictures in CIPA's multi-picture format

_META = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" hdrgm:Version="1.0"{}'
    "</rdf:RDF></x:xmpmeta>"
)
_DIRECTORY = (
    ' xmlns:Container="http://ns.google.com/photos/1.0/container/"'
    ' xmlns:Item="http://ns.google.com/photos/1.0/container/item/"><Container:Directory><rdf:Seq>'
    '<rdf:li rdf:parseType="Resource"><Container:Item Item:Semantic="Primary" Item:Mime="image/jpeg"/></rdf:li>'
    '<rdf:li rdf:parseType="Resource"><Container:Item Item:Semantic="GainMap" Item:Mime="image/jpeg" Item:Length="{}"/>'
    "</rdf:li></rdf:Seq></Container:Directory></rdf:Description>"
)
_GAINS = (
    ' hdrgm:GainMapMin="{low:.6f}" hdrgm:GainMapMax="{high:.6f}" hdrgm:Gamma="1" hdrgm:OffsetSDR="{offset}"'
    ' hdrgm:OffsetHDR="{offset}" hdrgm:HDRCapacityMin="0" hdrgm:HDRCapacityMax="{headroom:.6f}"'
    ' hdrgm:BaseRenditionIsHDR="False"/>'
)


def write_ultra_hdr(
    path: Path, light: FloatPicture, exposure: float, shown: BytePicture, metadata: Metadata | None = None
) -> None:
    """Write an Ultra HDR JPEG, whole or not at all.

    Args:
        light: linear Rec.709 (H, W, 3).
        exposure: by which it is multiplied to be 1 where the shown picture's white is.
        shown: 8-bit sRGB (H, W, 3) for displays without headroom.
        metadata: of the reference frame.
    """
    try:
        with written_whole(path) as partial:
            base = partial.with_name(partial.name + path.suffix)
            try:
                write_picture(base, shown, metadata)
                coded = base.read_bytes()
            finally:
                base.unlink(missing_ok=True)
            with open_by_pillow(BytesIO(coded)) as picture:  # with what JPEG made of it, for which the gains make up
                gains, low, high = _gain_map(light, exposure, np.asarray(picture.convert("RGB")))
            partial.write_bytes(_assemble(coded, gains, low, high))
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror or error}") from error


def _gain_map(light: FloatPicture, exposure: float, shown: BytePicture) -> tuple[BytePicture, float, float]:
    """Gains in stops as codes from 0 to 255, and what these two stand for."""
    codes = np.arange(256) / 255
    table = np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4).astype(np.float32)

    def gains(first: int) -> FloatPicture:
        rows = slice(first, first + ROWS)
        wanted = np.maximum(light[rows], 0) * np.float32(exposure) + np.float32(OFFSET)
        return np.log2(wanted / (table[shown[rows]] + np.float32(OFFSET)))

    parts = range(0, len(light), ROWS)
    low = min(float(gains(first).min()) for first in parts)
    high = max(max(float(gains(first).max()) for first in parts), low + 0.01)
    coded = np.empty(light.shape, np.uint8)
    for first in parts:
        coded[first : first + ROWS] = np.round((gains(first) - low) * (255 / (high - low))).clip(0, 255)
    return coded, low, high


def _assemble(coded: bytes, gains: BytePicture, low: float, high: float) -> bytes:
    """One file of both JPEGs: XMP says what they are, and the multi-picture format where."""
    headroom = max(high, 0.01)
    second = BytesIO()
    Image.fromarray(gains).save(second, "JPEG", quality=QUALITY, subsampling=0)
    text = _META.format(_GAINS.format(low=low, high=high, offset=OFFSET, headroom=headroom))
    gain_map = _inserted(second.getvalue(), _segment(0xE1, XMP + text.encode()))
    xmp = _segment(0xE1, XMP + _META.format(_DIRECTORY.format(len(gain_map))).encode())
    return _with_index(_inserted(coded, xmp), gain_map)


def _segment(marker: int, data: bytes) -> bytes:
    assert len(data) <= LARGEST_SEGMENT
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def _inserted(jpeg: bytes, segment: bytes) -> bytes:
    """A JPEG with one more segment, after those that must come first: JFIF's and EXIF's."""
    place = _place(jpeg)
    return jpeg[:place] + segment + jpeg[place:]


def _place(jpeg: bytes) -> int:
    place = 2
    while jpeg[place] == 0xFF and jpeg[place + 1] in (0xE0, 0xE1):
        place += 2 + struct.unpack_from(">H", jpeg, place + 2)[0]
    return place


def _with_index(primary: bytes, other: bytes) -> bytes:
    """Both pictures, the first with an index of the multi-picture format (CIPA DC-007)."""
    place = _place(primary)
    header = b"MM\0*" + struct.pack(">I", 8)
    entries = 8 + 2 + 3 * 12 + 4  # where they begin
    fields = struct.pack(">HHI4s", 0xB000, 7, 4, b"0100")
    fields += struct.pack(">HHII", 0xB001, 4, 1, 2) + struct.pack(">HHII", 0xB002, 7, 32, entries)
    length = 4 + 4 + entries + 32  # of the segment
    size = len(primary) + length
    offset = size - (place + 8)  # counts from the header
    pictures = struct.pack(">IIIHH", PRIMARY, size, 0, 0, 0) + struct.pack(">IIIHH", OTHER, len(other), offset, 0, 0)
    index = b"MPF\0" + header + struct.pack(">H", 3) + fields + struct.pack(">I", 0) + pictures
    return primary[:place] + _segment(0xE2, index) + primary[place:] + other
