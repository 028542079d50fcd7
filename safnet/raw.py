"""Camera raw files, through rawpy (LibRaw): demosaiced light in the camera's own primaries, each channel clipping at 1.

Of what raw converters do besides nothing is done: no brightening, no curve, no highlight recovery, and no adjustment of the
white level to the picture, which would differ between exposures.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from safnet.colour import LINEAR, REC709, Colour, Space, Values, space_of_matrix
from safnet.exif import EXIF_IFD, GPS_IFD, read_exif
from safnet.images import Header, ImageError

TURNED = (5, 6)  # LibRaw's flips by a quarter


def read_raw_header(path: Path) -> Header:
    """What a raw file says of itself.

    Raises:
        ImageError: rawpy is not installed, or LibRaw cannot read the file.
    """
    with _open(path) as raw:
        sizes, shot = raw.sizes, raw.other
        height, width = sizes.iheight, sizes.iwidth
        if sizes.flip in TURNED:
            height, width = width, height
        exif = read_exif(_exif(path, raw))
        return Header(
            path,
            width,
            height,
            _positive(shot.shutter_speed) or exif.exposure_time,
            _positive(shot.aperture) or exif.f_number,
            _positive(shot.iso_speed) or exif.iso,
            exif.bias,
            Colour(_camera_space(raw), LINEAR),
            exif.metadata,
        )


def read_raw_pixels(path: Path, balanced_as: Path) -> npt.NDArray[np.uint16]:
    """Linear camera RGB (H, W, 3), upright, white-balanced as a raw file says (this one, or another of its bracket); 65535 is
    where a channel clips."""
    import rawpy

    with _open(balanced_as) as raw:
        balance = _white_balance(raw)
    with _open(path) as raw:
        return raw.postprocess(
            user_wb=balance,
            output_color=rawpy.ColorSpace.raw,
            output_bps=16,
            gamma=(1, 1),
            no_auto_bright=True,
            adjust_maximum_thr=0.0,
            highlight_mode=rawpy.HighlightMode.Clip,
        )


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        import rawpy
    except ImportError as error:
        raise ImageError(
            f"{path}: camera raw files need rawpy: pip install 'safnet-ops[raw]', or develop the frames to TIFF, all alike"
        ) from error
    try:
        with rawpy.imread(str(path)) as raw:
            yield raw
    except rawpy.LibRawError as error:
        raise ImageError(f"{path} cannot be read by LibRaw: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = error.args[0] if error.args else error
    return text.decode() if isinstance(text, bytes) else str(text)


def _white_balance(raw: Any) -> list[float]:
    """Multipliers of R, G, B, G2 as shot; those of daylight where the camera names none."""
    shot = [float(value) for value in raw.camera_whitebalance]
    return shot if min(shot[:3]) > 0 else [float(value) for value in raw.daylight_whitebalance]


def _camera_space(raw: Any) -> Space:
    """Primaries of the white-balanced camera, for which white is (1, 1, 1)."""
    from_xyz: Values = np.array(raw.rgb_xyz_matrix, np.float64)[:3]
    to_rgb: Values = np.array(raw.color_matrix, np.float64)[
        :, :3
    ]  # to sRGB's primaries; of DNG files this one is there
    if from_xyz.any():
        to_rgb = np.linalg.inv(_rows_to_one(from_xyz @ REC709.to_xyz())).astype(np.float64)
    elif not to_rgb.any():
        return REC709
    return space_of_matrix("camera RGB", REC709.to_xyz() @ _rows_to_one(to_rgb))


def _rows_to_one(matrix: Values) -> Values:
    return matrix / matrix.sum(1, keepdims=True)


def _exif(path: Path, raw: Any) -> Image.Exif:
    """Of the file, if it is a TIFF as most are, else of the JPEG in it."""
    import rawpy

    exif = Image.Exif()
    with path.open("rb") as file:
        if file.read(4) in (b"II*\0", b"MM\0*"):
            file.seek(0)
            exif.load_from_fp(file)
            for ifd in (EXIF_IFD, GPS_IFD):  # which would be read when they are asked for
                exif.get_ifd(ifd)
            return exif
    try:
        thumbnail = raw.extract_thumb()
    except rawpy.LibRawError:
        return exif
    if thumbnail.format == rawpy.ThumbFormat.JPEG:
        with Image.open(BytesIO(thumbnail.data)) as picture:
            return picture.getexif()
    return exif


def _positive(value: float) -> float | None:
    return float(value) if value and value > 0 else None
