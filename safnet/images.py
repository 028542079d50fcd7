"""Pictures in and out, through OpenImageIO: frames by the network's input protocol, results by their file names."""

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import OpenImageIO as oiio
import torch

from safnet.choices import Depth
from safnet.files import written_whole
from safnet.radiance import GAMMA, ldr_values

FloatPicture = npt.NDArray[np.float32]
BytePicture = npt.NDArray[np.uint8]
FramePicture = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | FloatPicture

FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".exr")
PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg")
# What each radiance format can hold; the first is the default.
DEPTHS: dict[str, tuple[Depth, ...]] = {
    ".exr": ("half", "float"),
    ".hdr": ("float",),  # stored as RGBE, the only form that .hdr has
    ".tif": ("float", "uint16"),
    ".tiff": ("float", "uint16"),
}
# 16-bit values are divided by 2^16, not by 65535, as the published SAFNet does; 32-bit ones follow suit.
INTEGER_SCALES = {"uint8": 255.0, "uint16": 2.0**16, "uint32": 2.0**32}
FLOAT_TYPES = ("half", "float", "double")


class ImageError(ValueError):
    """A picture that cannot be read, or written where it was asked for."""


@dataclass(frozen=True)
class Header:
    """What a picture file says of itself; sizes are those of the upright picture, in pixels."""

    path: Path
    width: int
    height: int
    exposure_time: float | None  # seconds
    f_number: float | None
    iso: float | None
    profile: bytes | None  # ICC colour profile


def find_frames(folder: Path, besides: Iterable[Path] = ()) -> list[Path]:
    """The pictures of a folder by file name, without hidden files and those in `besides` (an earlier run's results)."""
    left_out = {path.resolve() for path in besides}
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in FRAME_EXTENSIONS and not path.name.startswith(".") and path.resolve() not in left_out
    )


def read_header(path: Path) -> Header:
    """Size, exposure metadata and colour profile, without reading pixels. Raises ImageError if it is no picture."""
    with _open(path) as source:
        spec = source.spec()
        _colour_channels(path, spec)
        _decoding_scale(path, spec)
        width, height = spec.width, spec.height
        if _orientation(spec) >= 5:
            width, height = height, width
        return Header(
            path,
            width,
            height,
            _positive(spec, "ExposureTime"),
            _positive(spec, "FNumber"),
            _positive(spec, "Exif:PhotographicSensitivity") or _positive(spec, "Exif:ISOSpeedRatings"),
            _profile(spec),
        )


def read_ldr(path: Path) -> FloatPicture:
    """Read one exposure as LDR RGB (H, W, 3) in [0, 1], gamma 2.2, upright: `read_frame`, in floats."""
    return np.ascontiguousarray(ldr_values(torch.from_numpy(read_frame(path))).numpy())


def read_frames(paths: Sequence[Path]) -> list[FramePicture]:
    """`read_frame` of several files at once: decoding takes one core each."""
    with _silent_codecs(), ThreadPoolExecutor(len(paths)) as pool:
        return list(pool.map(read_frame, paths))


def read_frame(path: Path) -> FramePicture:
    """Read one exposure as LDR RGB (H, W, 3), gamma 2.2, upright, in the bits of its file: see `radiance.ldr_values`.

    8 and 16-bit values are as in the file, 32-bit ones are floats in [0, 1]. Float files hold linear values of which 1 is the
    frame's clipping point: they are clipped to [0, 1] and encoded by x^(1 / 2.2), which the network undoes. Grey is
    repeated to RGB, CMYK converted, alpha and further channels are ignored.

    Raises:
        ImageError: the file is missing, unreadable, truncated, or its channels are neither RGB nor grey.
    """
    with _open(path) as source, _silent_codecs():
        spec = source.spec()
        pixels = source.read_image(0, 0, 0, spec.nchannels, spec.format)
        if pixels is None or source.has_error:
            raise ImageError(f"{path} cannot be read, it may be truncated: {_first_line(source.geterror())}")
    channels = _colour_channels(path, spec)
    if channels != [0, 1, 2] or pixels.shape[2] != 3:
        pixels = pixels[:, :, channels]
    scale = _decoding_scale(path, spec)
    if scale is None:
        pixels = pixels.astype(np.float32)
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=1.0).clip(0, 1) ** np.float32(1 / GAMMA)
    elif pixels.dtype == np.uint32:
        pixels = (pixels * (1 / scale)).astype(np.float32)
    upright = np.broadcast_to(_upright(pixels, _orientation(spec)), _upright_shape(spec))
    return np.require(upright, requirements=["C", "W"])


def write_radiance(path: Path, radiance: FloatPicture, depth: Depth | None = None) -> None:
    """Write linear RGB (H, W, 3) by the file name's extension, whole or not at all.

    Args:
        radiance: values in [0, 1]; stored linear in every format.
        depth: number format (see DEPTHS), the format's first when None. 16-bit TIFF holds 65535 times the value.
    """
    depth = depth or DEPTHS[path.suffix.lower()][0]
    pixels: npt.NDArray[Any] = radiance
    if depth == "uint16":
        pixels = np.round(radiance.clip(0, 1) * 65535).astype(np.uint16)
    attributes = {"compression": "zip", "oiio:ColorSpace": "lin_rec709_scene"}
    _write(path, pixels, depth, {} if path.suffix.lower() == ".hdr" else attributes)


def write_picture(path: Path, picture: BytePicture, profile: bytes | None = None) -> None:
    """Write an 8-bit RGB picture (H, W, 3) as PNG or JPEG, with an ICC profile if given, whole or not at all."""
    attributes: dict[str, Any] = {"compression": "jpeg:95"} if path.suffix.lower() != ".png" else {}
    if profile is not None:
        attributes["ICCProfile"] = np.frombuffer(profile, np.uint8)
    _write(path, picture, "uint8", attributes)


def check_destination(option: str, path: Path, extensions: Iterable[str], overwrite: bool) -> None:
    """Raise ImageError unless a file may be written at `path`; `option` is what the message calls it."""
    if path.suffix.lower() not in extensions:
        raise ImageError(f"{option} {path}: the name must end in {', '.join(extensions)}")
    if not path.parent.is_dir():
        raise ImageError(f"{option} {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ImageError(f"{option} {path} is a folder")
    if path.exists() and not overwrite:
        raise ImageError(f"{option} {path} exists already; give --overwrite to replace it")
    if not os.access(path.parent, os.W_OK):
        raise ImageError(f"{option} {path}: the folder {path.parent} is not writable")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    if not path.exists():
        raise ImageError(f"{path} does not exist")
    if path.suffix.lower() not in FRAME_EXTENSIONS:
        raise ImageError(f"{path}: frames must be {', '.join(FRAME_EXTENSIONS)} files")
    raw = oiio.ImageSpec()
    raw.attribute("oiio:UnassociatedAlpha", 1)  # else colour would come multiplied by alpha
    with _silent_codecs():
        source = oiio.ImageInput.open(str(path), raw)
    if source is None:
        raise ImageError(f"{path} cannot be read: {_first_line(oiio.geterror())}")
    try:
        yield source
    finally:
        source.close()


def _write(path: Path, pixels: npt.NDArray[Any], depth: str, attributes: dict[str, Any]) -> None:
    spec = oiio.ImageSpec(pixels.shape[1], pixels.shape[0], pixels.shape[2], depth)
    spec.attribute("Software", "safnet")
    for name, value in attributes.items():
        if isinstance(value, np.ndarray):
            spec.attribute(name, oiio.TypeDesc(f"uint8[{value.size}]"), value)
        else:
            spec.attribute(name, value)
    target = oiio.ImageOutput.create(f"name{path.suffix.lower()}")
    assert target is not None, f"OpenImageIO was built without {path.suffix}"
    pixels = np.ascontiguousarray(pixels)
    try:
        with written_whole(path) as partial:
            written = target.open(str(partial), spec) and target.write_image(pixels) and target.close()
            if not written:
                raise ImageError(f"{path} cannot be written: {_first_line(target.geterror())}")
    except OSError as error:
        raise ImageError(f"{path} cannot be written: {error.strerror}") from error


def _colour_channels(path: Path, spec: Any) -> list[int]:
    """Indices of R, G, B; of the one channel of a grey picture (which broadcasts to RGB)."""
    names = list(spec.channelnames)
    if {"R", "G", "B"} <= set(names):
        return [names.index(name) for name in "RGB"]
    colours = [index for index in range(len(names)) if index != spec.alpha_channel]
    if len(colours) != 1:
        raise ImageError(f"{path}: channels must be RGB or grey, got {', '.join(names)}")
    return colours


def _decoding_scale(path: Path, spec: Any) -> float | None:
    """What integer values are divided by; None for linear float values."""
    kind = str(spec.format)
    if kind in FLOAT_TYPES:
        return None
    if kind not in INTEGER_SCALES:
        raise ImageError(f"{path}: pixels must be 8, 16 or 32-bit unsigned integers or floats, got {kind}")
    return INTEGER_SCALES[kind]


def _orientation(spec: Any) -> int:
    return spec.get_int_attribute("Orientation", 1)


def _upright(pixels: FloatPicture, orientation: int) -> FloatPicture:
    """Turn stored pixels upright by the EXIF orientation, 1 to 8 (EXIF 2.32, section 4.6.4); others count as 1."""
    match orientation:
        case 2:
            return pixels[:, ::-1]
        case 3:
            return pixels[::-1, ::-1]
        case 4:
            return pixels[::-1]
        case 5:
            return pixels.swapaxes(0, 1)
        case 6:
            return np.rot90(pixels, -1)
        case 7:
            return np.rot90(pixels, 2).swapaxes(0, 1)
        case 8:
            return np.rot90(pixels, 1)
    return pixels


def _upright_shape(spec: Any) -> tuple[int, int, int]:
    return (spec.width, spec.height, 3) if _orientation(spec) in (5, 6, 7, 8) else (spec.height, spec.width, 3)


def _positive(spec: Any, name: str) -> float | None:
    """A metadata number, None where it is missing or 0 (what cameras write for "unknown")."""
    value = spec.getattribute(name)
    if isinstance(value, tuple):
        value = value[0] if value else None
    return float(value) if isinstance(value, int | float) and 0 < value < float("inf") else None


def _profile(spec: Any) -> bytes | None:
    value = spec.getattribute("ICCProfile")
    return None if value is None else bytes(bytearray(value))


def _first_line(message: str) -> str:
    return message.strip().splitlines()[0] if message.strip() else "unknown reason"


_silencing = threading.Lock()
_silent_readers = 0  # in how many blocks of `_silent_codecs` the process is
_kept_stderr = -1


@contextmanager
def _silent_codecs() -> Iterator[None]:
    """Keep codecs from printing errors on stderr themselves (libpng does): they reach the user through ImageError.

    stderr is the whole process's: of blocks in several threads the first one turns it off and the last one on again.
    """
    global _silent_readers, _kept_stderr
    with _silencing:
        if _silent_readers == 0:
            _kept_stderr = os.dup(2)
            sink = os.open(os.devnull, os.O_WRONLY)
            os.dup2(sink, 2)
            os.close(sink)
        _silent_readers += 1
    try:
        yield
    finally:
        with _silencing:
            _silent_readers -= 1
            if _silent_readers == 0:
                os.dup2(_kept_stderr, 2)
                os.close(_kept_stderr)
