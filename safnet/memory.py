"""Memory that a fusion needs, before it is asked for; and memory that is used again instead of being given back."""

import ctypes
import re
import sys

from safnet.choices import Variant

GIB = 2**30
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30}

MARGINS = 46  # pixels beside a tile that the full model sees

# Measured as peaks of resident memory, by the last line of `safnet fuse`, and rounded up.
PROCESS = 0.45 * GIB  # Python, PyTorch and the weights
ALIGNMENT = 1.25 * GIB  # at the size where frames are aligned, whatever their own size
RESULT_BYTES = 24  # a pixel: radiance, its copy in the numbers of the file, the preview
RADIANCE_BYTES = 12
WRITING_BYTES = {".avif": 60, ".jpg": 18, ".jpeg": 18}  # a pixel beside the radiance, in formats that take much
MASK_BYTES = 1  # a pixel of the result, while it is fused
MASK_READING_BYTES = 20, 4  # a pixel of the mask while it is read, and more for each of its channels
INSPECTION_BYTES = 84  # a pixel: explicit fusion, flows and masks, and their pictures
TILE_BYTES = {"small": 700, "full": 1800}  # a pixel of a tile

# Numbers of mallopt(3) in glibc.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


def parse_size(text: str) -> int:
    """Bytes of "4GB", "800 MiB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"--memory must be a size like 4GB or 800MB, got {text!r}")
    return int(float(match[1]) * UNITS.get((match[2] or "").upper(), 1))


def needed_memory(
    height: int,
    width: int,
    frames: int,
    frame_bytes: int,
    variant: Variant,
    tile: int,
    inspect: bool = False,
    mask: tuple[int, int] | None = None,
    suffix: str = "",
) -> int:
    """About as many bytes as `fuse_files` has at its peak on a CPU.

    Args:
        height, width: of the frames.
        frames: their number.
        frame_bytes: of a number in the frames as they are read.
        variant: of the model.
        tile: root of the tiles' pixels, 0 for the whole frame.
        inspect: with the pictures of all steps.
        mask: pixels and channels of a mask's file, if there is one.
        suffix: of the result's file.
    """
    pixels = height * width
    tile_pixels = pixels if tile == 0 else min(pixels, (tile + MARGINS) ** 2)
    work = max(ALIGNMENT, TILE_BYTES[variant] * tile_pixels)
    results = RESULT_BYTES + (12 if frames != 3 else 0) + (INSPECTION_BYTES if inspect else 0)
    stored = 3 * frames * frame_bytes * pixels
    fusing = work + results * pixels
    writing = (RADIANCE_BYTES + WRITING_BYTES.get(suffix, 0)) * pixels
    painted, reading = 0, 0
    if mask is not None:
        painted, reading = MASK_BYTES * pixels, mask[0] * (MASK_READING_BYTES[0] + MASK_READING_BYTES[1] * mask[1])
    return int(PROCESS + stored + painted + max(reading, fusing, writing))


def gibibytes(count: float) -> str:
    """A number of bytes, for people."""
    return f"{count / GIB:.2f} GiB"


def is_out_of_memory(error: BaseException) -> bool:
    """For want of memory on a CPU torch raises a plain RuntimeError."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def reuse_freed_memory() -> None:
    """Let this process keep memory that is freed for its next buffer, where its C library is glibc.

    Otherwise every buffer of more than a few megabytes is a new mapping, whose pages the kernel clears when they are first
    touched: a fifth of the time of a fusion. For commands, not for libraries: what was once needed stays with the process.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    mallopt(MMAP_THRESHOLD, GIB)
    mallopt(TRIM_THRESHOLD, 2**31 - 1)
