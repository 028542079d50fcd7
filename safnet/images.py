"""Pictures in and out, through OpenImageIO: frames by what they say of their colours, results by their file names.

Camera raw files are read by `safnet.raw`, HEIC and AVIF by `safnet.heif`, where these libraries are installed; DNG, AVIF and
Ultra HDR are written by `safnet.dng`, `safnet.avif` and `safnet.ultrahdr`.
"""

import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import OpenImageIO as oiio
import torch
from PIL import Image
from torch import Tensor

from safnet import icc
from safnet.choices import Depth
from safnet.colour import (
    ACES,
    ACES_CG,
    ADOBE_RGB,
    BT709,
    LINEAR,
    P3,
    REC709,
    REC2020,
    SRGB,
    UNKNOWN,
    Colour,
    Curve,
    Space,
    conversion,
    gamma_curve,
)
from safnet.files import written_whole
from safnet.radiance import GAMMA, Frame, StoredFrame, ldr_values

FloatPicture = npt.NDArray[np.float32]
BytePicture = npt.NDArray[np.uint8]
FramePicture = npt.NDArray[np.uint8] | npt.NDArray[np.uint16] | FloatPicture

# Read by OpenImageIO itself; those of further libraries follow.
PLAIN_EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".tif", ".tiff", ".exr", ".webp", ".jxl")
RAW_EXTENSIONS = (
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".raf", ".rw2", ".orf", ".pef", ".srw", ".iiq"),
    *(".3fr", ".fff", ".rwl", ".mrw", ".erf", ".kdc", ".mos", ".x3f"),
)
HEIF_EXTENSIONS = (".heic", ".heif", ".hif", ".avif")
FRAME_EXTENSIONS = (*PLAIN_EXTENSIONS, *RAW_EXTENSIONS, *HEIF_EXTENSIONS)
# Pictures that a folder may hold and that are named where frames are wanting.
FOREIGN_EXTENSIONS = (
    ".bmp",
    ".gif",
    ".psd",
    ".psb",
    ".tga",
    ".jp2",
    ".j2k",
    ".hdr",
    ".ppm",
    ".xcf",
    ".dpx",
    ".jpe",
    ".jxr",
)
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jfif")
PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg")
ULTRA_HDR_EXTENSIONS = (".jpg", ".jpeg")
AVIF_EXTENSIONS = (".avif",)
# What results for screens hold, and nothing else.
SCREEN_DEPTHS = {
    **dict.fromkeys(ULTRA_HDR_EXTENSIONS, "8 bits and a gain map"),
    **dict.fromkeys(AVIF_EXTENSIONS, "10 bits of PQ"),
}
# What each radiance format can hold; the first is the default.
DEPTHS: dict[str, tuple[Depth, ...]] = {
    ".exr": ("half", "float"),
    ".hdr": ("float",),  # stored as RGBE, the only form that .hdr has
    ".tif": ("float", "uint16"),
    ".tiff": ("float", "uint16"),
    ".dng": ("uint16", "half"),
}
RESULT_EXTENSIONS = (*DEPTHS, *SCREEN_DEPTHS)
# 16-bit values are divided by 2^16, not by 65535, as the published SAFNet does; 32-bit ones follow suit.
INTEGER_SCALES = {"uint8": 255.0, "uint16": 2.0**16, "uint32": 2.0**32}
FLOAT_TYPES = ("half", "float", "double")
RESULT = "safnet fuse"  # the "Software" of what it wrote
SOFTWARE = 0x0131  # EXIF's number of that
# Primaries and transfer characteristics by their numbers in ITU-T H.273, as PNG, HEIF and AVIF name them.
CICP_SPACES = {1: REC709, 2: REC709, 9: REC2020, 12: P3}
CICP_CURVES = {**dict.fromkeys((1, 6, 14, 15), BT709), 4: gamma_curve(2.2), 5: gamma_curve(2.8), 8: LINEAR, 13: SRGB}
LINEAR_SPACES = {  # by the colorInteropID of EXR files
    "lin_rec709_scene": REC709,
    "lin_p3d65_scene": P3,
    "lin_rec2020_scene": REC2020,
    "lin_adobergb_scene": ADOBE_RGB,
    "lin_ap1_scene": ACES_CG,
    "lin_ap0_scene": ACES,
}
# Of the reference frame's metadata, what goes on into results: camera, lens, settings, date, place, author.
KEPT = re.compile(
    "Make|Model|Artist|Copyright|ImageDescription|DateTime|ExposureTime|FNumber|GPS:.+|IPTC:.+|Exif:(Lens.+|BodySerialNumber"
    "|CameraOwnerName|FocalLength.*|PhotographicSensitivity|ISOSpeedRatings|DateTime.+|SubsecTime.*|OffsetTime.*|MeteringMode"
    "|Flash|ExposureProgram|ExposureMode|LightSource|WhiteBalance|UserComment)"
)

Metadata = tuple[tuple[str, Any, Any], ...]  # names, OpenImageIO's types, values


class ImageError(ValueError):
    """A picture that cannot be read, or written where it was asked for."""


@dataclass(frozen=True)
class Header:
    """What a picture file says of itself; sizes are those of the upright picture, in pixels.

    Attributes:
        exposure_time: in seconds.
        bias: exposure compensation in stops.
        colour: what its numbers mean.
        metadata: what goes on into results.
        software: that wrote it.
    """

    path: Path
    width: int
    height: int
    exposure_time: float | None = None
    f_number: float | None = None
    iso: float | None = None
    bias: float | None = None
    colour: Colour = UNKNOWN
    metadata: Metadata = ()
    software: str = ""


def find_frames(folder: Path, besides: Iterable[Path] = ()) -> list[Path]:
    """The pictures of a folder by file name, without hidden files, earlier results of `safnet fuse` and those in `besides`."""
    left_out = {path.resolve() for path in besides}
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in FRAME_EXTENSIONS
        and not path.name.startswith(".")
        and path.resolve() not in left_out
        and not is_result(path)
    )


def is_result(path: Path) -> bool:
    """Whether `safnet fuse` wrote a file, be it result, preview or inspection."""
    if path.suffix.lower() not in (*RESULT_EXTENSIONS, *PICTURE_EXTENSIONS) or not path.is_file():
        return False
    if path.suffix.lower() in AVIF_EXTENSIONS:
        try:
            with open_by_pillow(path) as picture:
                return picture.getexif().get(SOFTWARE) == RESULT
        except (OSError, ValueError, SyntaxError):
            return False
    with _silent_codecs():
        source = oiio.ImageInput.open(str(path))
    if source is None:
        oiio.geterror()
        return False
    try:
        return source.spec().get_string_attribute("Software") == RESULT
    finally:
        source.close()


def read_header(path: Path, curve: Curve | None = None) -> Header:
    """Size, metadata and colour, without reading pixels.

    Args:
        curve: wins over what the file says of its curve.

    Raises:
        ImageError: it is no picture, or its colours cannot be known.
    """
    _check_frame_name(path)
    if path.suffix.lower() in RAW_EXTENSIONS:
        from safnet.raw import read_raw_header

        if curve is not None and not curve.is_linear:
            raise ImageError(
                f"{path}: camera raw files are linear: --curve {curve.name} cannot be theirs; leave it out"
            )
        return read_raw_header(path)
    if path.suffix.lower() in HEIF_EXTENSIONS:
        from safnet.heif import read_heif_header

        return read_heif_header(path, curve)
    with _open(path) as source:
        spec = source.spec()
        _colour_channels(path, spec)
        _decoding_scale(path, spec)
        width, height = spec.width, spec.height
        if _orientation(spec) >= 5:
            width, height = height, width
        time, aperture, iso, bias = exposure_metadata(spec)
        return Header(
            path,
            width,
            height,
            time,
            aperture,
            iso,
            bias,
            _colour(path, spec, curve),
            kept_metadata(spec),
            spec.get_string_attribute("Software"),
        )


def exposure_metadata(spec: Any) -> tuple[float | None, float | None, float | None, float | None]:
    """Exposure time in seconds, f-number, ISO and bias in stops; time and f-number from APEX values if from nothing else."""
    time, aperture = _positive(spec, "ExposureTime"), _positive(spec, "FNumber")
    shutter_value, aperture_value = (_number(spec, f"Exif:{name}") for name in ("ShutterSpeedValue", "ApertureValue"))
    if time is None and shutter_value is not None:
        time = 2.0**-shutter_value
    if aperture is None and aperture_value is not None:
        aperture = 2.0 ** (aperture_value / 2)
    iso = _positive(spec, "Exif:PhotographicSensitivity") or _positive(spec, "Exif:ISOSpeedRatings")
    return time, aperture, iso, _number(spec, "Exif:ExposureBiasValue")


def kept_metadata(spec: Any) -> Metadata:
    return tuple(
        (item.name, item.type, item.value)
        for item in spec.extra_attribs
        if KEPT.fullmatch(item.name) and item.value is not None
    )


def read_ldr(path: Path) -> FloatPicture:
    """Read one exposure as LDR RGB (H, W, 3) in [0, 1], upright, as the published SAFNet does: of gamma 2.2, whatever the file
    says; float values are linear."""
    _check_frame_name(path)
    return np.ascontiguousarray(ldr_values(torch.from_numpy(_read_pixels(path, UNKNOWN))).numpy())


def read_frames(frames: Sequence[Header]) -> list[Frame]:
    """`read_frame` of the frames of a bracket at once: decoding takes one core each. Raw files get the middle one's white
    balance."""
    with _silent_codecs(), ThreadPoolExecutor(len(frames)) as pool:
        return list(pool.map(read_frame, frames, [frames[len(frames) // 2]] * len(frames)))


def read_frame(frame: Header, balanced_as: Header | None = None) -> Frame:
    """Read one exposure as RGB (1, 3, H, W), upright, in the bits of its file and in its own primaries, with what they mean.

    8 and 16-bit values are as in the file. 32-bit ones become floats in [0, 1], LDR values of gamma 2.2; 1 is the frame's
    clipping point, to which float files are clipped. Grey is repeated to RGB, alpha and further channels are ignored. CMYK,
    and colours whose profile is a table, are converted to sRGB.

    Args:
        frame: of `read_header`.
        balanced_as: raw files are white-balanced as this one of them; as they say themselves if None.

    Raises:
        ImageError: the file is missing, unreadable, truncated, or its channels are neither RGB nor grey.
    """
    colour = frame.colour
    if frame.path.suffix.lower() in RAW_EXTENSIONS:
        from safnet.raw import read_raw_pixels

        pixels: FramePicture = read_raw_pixels(frame.path, (balanced_as or frame).path)
    elif frame.path.suffix.lower() in HEIF_EXTENSIONS:
        from safnet.heif import read_heif_pixels

        pixels = read_heif_pixels(frame.path)
    else:
        pixels = _read_pixels(frame.path, colour)
    codes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    table = None if codes.is_floating_point() else colour.table(torch.iinfo(codes.dtype).max + 1)
    return codes if table is None else StoredFrame(codes, table)


def _read_pixels(path: Path, colour: Colour) -> FramePicture:
    """Pixels (H, W, 3) in the bits of the file, floats as LDR values of gamma 2.2."""
    with _open(path) as source, _silent_codecs():
        spec = source.spec()
        shown = _has_gain_map(path, spec)
        pixels: Any = _shown_pixels(path) if shown else source.read_image(0, 0, 0, spec.nchannels, spec.format)
        if pixels is None or source.has_error:
            raise ImageError(f"{path} cannot be read, it may be truncated: {_first_line(source.geterror())}")
    if colour.profile is not None:
        pixels = _converted(path, colour.profile)
    else:
        channels = _colour_channels(path, spec)
        if channels != [0, 1, 2] or pixels.shape[2] != 3:
            pixels = pixels[:, :, channels]
    scale = _decoding_scale(path, spec)
    if scale is None:
        pixels = _coded(
            np.nan_to_num(pixels.astype(np.float32), nan=0.0, posinf=1.0).clip(0, 1), colour.curve or LINEAR
        )
    elif pixels.dtype == np.uint32:
        pixels = (pixels * (1 / scale)).astype(np.float32)
        if colour.curve is not None:
            pixels = _coded(pixels, colour.curve)
    upright = np.broadcast_to(_upright(pixels, _orientation(spec)), _upright_shape(spec))
    return np.require(upright, requirements=["C", "W"])


def mask_numbers(path: Path, width: int, height: int) -> tuple[int, int]:
    """Pixels and channels of a mask, without reading it.

    Raises:
        ImageError: it cannot be opened, or has other proportions.
    """
    with _open_mask(path) as source:
        spec = source.spec()
        _colour_channels(path, spec)
        rows, columns, _ = _upright_shape(spec)
        if abs(columns - rows * width / height) > 1 or abs(rows - columns * height / width) > 1:
            raise ImageError(
                f"--mask {path} must be {width} x {height} pixels like the frames, or have their proportions, got {columns} "
                f"x {rows}"
            )
        return rows * columns, spec.nchannels


def read_mask(path: Path, width: int, height: int) -> Tensor:
    """A painted picture as (1, 1, height, width) uint8, upright: its grey values as they stand, black where it is transparent.

    Raises:
        ImageError: it cannot be read.
    """
    with _open_mask(path) as source:
        spec = source.spec()
        pixels: Any = source.read_image(0, 0, 0, spec.nchannels, "float")  # multiplied by alpha
        if pixels is None or source.has_error:
            raise ImageError(f"--mask {path} cannot be read, it may be truncated: {_first_line(source.geterror())}")
    grey = _upright(pixels[:, :, _colour_channels(path, spec)].mean(2), _orientation(spec))
    way = cv2.INTER_AREA if grey.shape[1] > width else cv2.INTER_LINEAR
    share = cv2.resize(np.nan_to_num(grey, nan=0.0).clip(0, 1), (width, height), interpolation=way)
    codes = np.round(share * 255).astype(np.uint8)
    return torch.from_numpy(codes)[None, None]


@contextmanager
def _open_mask(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise ImageError(f"--mask {path} is no file")
    with _silent_codecs():
        source = oiio.ImageInput.open(str(path))
        if source is None:
            raise ImageError(f"--mask {path} cannot be read: {_first_line(oiio.geterror())}")
        try:
            yield source
        finally:
            source.close()


def _has_gain_map(path: Path, spec: Any) -> bool:
    """Whether a JPEG is an Ultra HDR one, as phones write them. OpenImageIO makes floats of both of its pictures; an exposure
    is the one that is shown."""
    return path.suffix.lower() in JPEG_EXTENSIONS and str(spec.format) in FLOAT_TYPES


def _shown_pixels(path: Path) -> BytePicture:
    try:
        with open_by_pillow(path) as picture:
            return np.array(picture.convert("RGB"))
    except OSError as error:
        raise ImageError(f"{path} cannot be read, it may be truncated: {error}") from error


_pillow_limit = threading.Lock()


def open_by_pillow(source: Path | BytesIO) -> Image.Image:
    """A picture of any size: Pillow takes those of a large camera for an attack, and refuses those of twice its size."""
    with _pillow_limit:
        kept, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(source)
        finally:
            Image.MAX_IMAGE_PIXELS = kept


def _format(path: Path, spec: Any) -> str:
    return "uint8" if _has_gain_map(path, spec) else str(spec.format)


def _coded(values: FloatPicture, curve: Curve) -> FloatPicture:
    """Float values of a curve as LDR values of gamma 2.2."""
    light = values if curve is LINEAR else curve.decode(values.astype(np.float64)).clip(0, 1)
    return (light ** (1 / GAMMA)).astype(np.float32)


def _converted(path: Path, profile: bytes) -> BytePicture:
    """8-bit pixels (H, W, 3) as stored, converted to sRGB."""
    try:
        with open_by_pillow(path) as picture:
            return np.array(icc.to_srgb(picture, profile))
    except (OSError, ValueError) as error:
        raise ImageError(f"{path} cannot be converted by its colour profile: {error}; convert it to sRGB") from error


def write_radiance(
    path: Path,
    radiance: FloatPicture,
    depth: Depth | None = None,
    space: Space = REC709,
    metadata: Metadata | None = None,
    exposure: float = 1.0,
) -> None:
    """Write linear RGB (H, W, 3) by the file name's extension, whole or not at all.

    Args:
        radiance: linear, stored as it is in every format.
        depth: number format (see DEPTHS), the format's first when None. 16-bit TIFF and DNG hold 65535 times the value.
        space: primaries of the values, which the file states; .hdr holds Rec.709 alone.
        metadata: of the reference frame; None if this is no result of a fusion.
        exposure: by which radiance is multiplied to be 1 where the reference exposure clips, which .dng states.
    """
    kind = path.suffix.lower()
    depth = depth or DEPTHS[kind][0]
    if kind == ".dng":
        from safnet.dng import write_dng

        return write_dng(path, radiance, depth, space, exposure, metadata)
    pixels: npt.NDArray[Any] = radiance
    if depth == "uint16":
        pixels = np.round(radiance.clip(0, 1) * 65535).astype(np.uint16)
    attributes: dict[str, Any] = {}
    if kind == ".exr":
        attributes = {"compression": "zip", "chromaticities": space.chromaticities}
        identifiers = [name for name, known in LINEAR_SPACES.items() if conversion(space, known) is None]
        if identifiers:
            attributes["oiio:ColorSpace"] = identifiers[0]
    elif kind != ".hdr":
        attributes = {"compression": "zip", "ICCProfile": icc.make_profile(space, "linear")}
    elif conversion(space, REC709) is not None:
        raise ImageError(f"{path} cannot hold {space.name}: .hdr files are of Rec.709; write .exr or .tif")
    _write(path, pixels, depth, attributes, metadata)


def write_picture(path: Path, picture: BytePicture, metadata: Metadata | None = None, tagged: bool = True) -> None:
    """Write an 8-bit picture (H, W, 3) as PNG or JPEG, whole or not at all; as sRGB, with a profile, if `tagged`."""
    attributes: dict[str, Any] = (
        {"compression": "jpeg:95", "jpeg:subsampling": "4:4:4"} if path.suffix.lower() != ".png" else {}
    )
    if tagged:
        attributes["ICCProfile"] = icc.make_profile(REC709, "srgb")
        attributes["Exif:ColorSpace"] = 1
    _write(path, picture, "uint8", attributes, metadata)


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


def _check_frame_name(path: Path) -> None:
    if not path.exists():
        raise ImageError(f"{path} does not exist")
    if path.suffix.lower() not in FRAME_EXTENSIONS:
        raise ImageError(
            f"{path}: frames must be {', '.join(PLAIN_EXTENSIONS)}, camera raw or HEIF files; convert it to TIFF or PNG"
        )


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    wanted = oiio.ImageSpec()
    wanted.attribute("oiio:UnassociatedAlpha", 1)  # else colour would come multiplied by alpha
    with _silent_codecs():
        source = oiio.ImageInput.open(str(path), wanted)
    if source is None:
        raise ImageError(f"{path} cannot be read: {_first_line(oiio.geterror())}")
    try:
        yield source
    finally:
        source.close()


def _write(
    path: Path, pixels: npt.NDArray[Any], depth: str, attributes: dict[str, Any], metadata: Metadata | None
) -> None:
    spec = oiio.ImageSpec(pixels.shape[1], pixels.shape[0], pixels.shape[2], depth)
    for name, kind, value in metadata or ():
        if isinstance(value, int):  # as int, for OpenImageIO sets no others
            spec.attribute(name, value)
        else:
            spec.attribute(name, kind, value)
    spec.attribute("Software", "safnet" if metadata is None else RESULT)
    for name, value in attributes.items():
        if isinstance(value, bytes):
            spec.attribute(name, oiio.TypeDesc(f"uint8[{len(value)}]"), np.frombuffer(value, np.uint8))
        elif isinstance(value, tuple):
            spec.attribute(name, oiio.TypeDesc(f"float[{len(value)}]"), value)
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


# ---- what files say of their colours ---------------------------------------------------------------------------------


def _colour(path: Path, spec: Any, curve: Curve | None) -> Colour:
    profile = _profile(spec)
    cicp = spec.getattribute("CICP")
    chromaticities = spec.getattribute("chromaticities")
    if cicp is not None:  # comes first, by the specification of PNG
        return cicp_colour(path, cicp[0], cicp[1], curve)
    if profile is not None:
        found = profile_colour(path, profile, curve)
        if found.profile is not None and _format(path, spec) != "uint8":
            raise ImageError(
                f"{path}: its colour profile is a table, by which only 8-bit values are converted: convert it to one of "
                "sRGB, Adobe RGB, Display P3 or ProPhoto first"
            )
        return found
    if chromaticities is not None:
        found = Colour(Space("EXR chromaticities", tuple(chromaticities)), LINEAR)
    elif _format(path, spec) in FLOAT_TYPES:
        found = Colour(LINEAR_SPACES.get(spec.get_string_attribute("colorInteropID"), REC709), LINEAR)
    else:
        found = _tagged_colour(path, spec)
    return found.with_curve(curve)


def profile_colour(path: Path, profile: bytes, curve: Curve | None) -> Colour:
    try:
        return icc.read_profile(profile).with_curve(curve)
    except icc.ProfileError as error:
        if curve is not None:
            return Colour(curve=curve)
        raise ImageError(f"{path}: {error}; give --curve srgb to read it without") from error


def cicp_colour(path: Path, primaries: int, transfer: int, curve: Curve | None) -> Colour:
    """By the numbers of ITU-T H.273; 2 is unspecified."""
    if primaries not in CICP_SPACES:
        raise ImageError(
            f"{path}: its primaries, number {primaries} of ITU-T H.273, are not known here; convert it to sRGB"
        )
    if curve is None and transfer != 2:
        if transfer not in CICP_CURVES:
            kinds = {16: "PQ", 18: "HLG"}
            raise ImageError(
                f"{path}: its values are {kinds.get(transfer, f'of transfer {transfer} of ITU-T H.273')}; frames must be "
                "plain exposures, of sRGB for example"
            )
        curve = CICP_CURVES[transfer]
    return Colour(CICP_SPACES[primaries], curve)


def _tagged_colour(path: Path, spec: Any) -> Colour:
    """Of PNG's sRGB, gAMA and cHRM, and of EXIF's ColorSpace."""
    kind = path.suffix.lower()
    if kind == ".png":
        with open_by_pillow(path) as picture:
            tags = dict(picture.info)
        if "srgb" in tags:
            return Colour(REC709, SRGB)
        space = REC709
        if "chromaticity" in tags:
            white, primaries = tags["chromaticity"][:2], tags["chromaticity"][2:]
            space = Space("PNG chromaticities", (*primaries, *white))
        if tags.get("gamma"):
            gamma = 1 / tags["gamma"]
            return Colour(space, LINEAR if abs(gamma - 1) < 0.01 else gamma_curve(gamma))
        if space is not REC709:
            return Colour(space)
    if spec.get_int_attribute("Exif:ColorSpace") == 1:
        return Colour(REC709, SRGB)
    if kind in JPEG_EXTENSIONS and _interoperability(path) == "R03":  # DCF's name of Adobe RGB
        return Colour(ADOBE_RGB, gamma_curve(563 / 256))
    return UNKNOWN


def _interoperability(path: Path) -> str:
    try:
        with open_by_pillow(path) as picture:
            return str(picture.getexif().get_ifd(0xA005).get(1, "")).strip("\0")
    except (OSError, ValueError, SyntaxError, KeyError):
        return ""


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
    kind = _format(path, spec)
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


def _number(spec: Any, name: str) -> float | None:
    """A metadata number, None where it is missing or none."""
    value = spec.getattribute(name)
    if isinstance(value, tuple):
        value = value[0] if value else None
    return float(value) if isinstance(value, int | float) and abs(value) < float("inf") else None


def _positive(spec: Any, name: str) -> float | None:
    """A metadata number, None where it is missing or 0 (what cameras write for "unknown")."""
    value = _number(spec, name)
    return value if value is not None and value > 0 else None


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
