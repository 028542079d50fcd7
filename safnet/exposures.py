"""Exposure values of the three frames: from the user, from exposure.txt, or from EXIF.

An EV here counts stops of light: the frame that gathered twice the light (longer time, higher ISO, wider aperture) has one EV
more. Only differences matter. (Light meters count the other way: their EV grows as the exposure gets shorter.)
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from safnet.images import Header, find_frames

EXPOSURE_FILE = "exposure.txt"
SMALLEST_STEP = 0.05  # EV; frames closer than this count as equally exposed
LARGEST_SPAN = 30.0  # EV; more than any bracket, so a sign of exposure times in place of EVs
HINT = "give them with --ev, for example --ev -2 0 2"


class ExposureError(ValueError):
    """Exposures that are missing, equal or impossible."""


def find_evs(frames: Sequence[Header], given: Sequence[float] | None = None, besides: Sequence[Path] = ()) -> list[float]:
    """EVs in the order of `frames`: `given` if any, else exposure.txt in the frames' folder, else EXIF.

    Args:
        besides: pictures of the folder that are no frames (see read_exposure_file).

    Raises:
        ExposureError: no source gives all of them, or two frames are equally exposed.
    """
    if given is not None:
        evs, source = list(given), "--ev"
        if len(evs) != len(frames):
            raise ExposureError(f"--ev must give {len(frames)} values, got {len(evs)}: {_list(evs)}")
    elif (file := exposure_file(frames)) is not None:
        evs, source = read_exposure_file(file, frames, besides), str(file)
    else:
        evs, source = exif_evs(frames), "EXIF"
    _check(evs, frames, source)
    return evs


def exposure_file(frames: Sequence[Header]) -> Path | None:
    """The exposure.txt beside the frames, if they share a folder and it has one."""
    folders = {frame.path.resolve().parent for frame in frames}
    file = frames[0].path.parent / EXPOSURE_FILE
    return file if len(folders) == 1 and file.is_file() else None


def read_exposure_file(file: Path, frames: Sequence[Header], besides: Sequence[Path] = ()) -> list[float]:
    """Read EVs, one a line (or separated by blanks or commas), for the frames by file name.

    As many values as frames belong to these; as many as the folder has pictures belong to all of the folder.
    """
    try:
        values = [float(word) for word in re.split(r"[\s,;]+", file.read_text("utf-8-sig")) if word]
    except (ValueError, OSError) as error:
        raise ExposureError(f"{file} must hold one EV a line: {error}; {HINT}") from error
    names = sorted(frame.path.name for frame in frames)
    if len(values) != len(names):
        names = [path.name for path in find_frames(file.parent, besides)]
    if len(values) != len(names):
        raise ExposureError(f"{file} must hold {len(frames)} EVs, one a frame, got {len(values)}; {HINT}")
    by_name = dict(zip(names, values, strict=True))
    return [by_name[frame.path.name] for frame in frames]


def exif_evs(frames: Sequence[Header]) -> list[float]:
    """EV = log2(time * ISO / 100 / f-number^2) from EXIF. ISO or aperture may be missing, but only on all frames."""
    for name in ("exposure_time", "iso", "f_number"):
        lacking = [str(frame.path) for frame in frames if getattr(frame, name) is None]
        if lacking and (name == "exposure_time" or len(lacking) < len(frames)):
            kind = {"exposure_time": "exposure time", "iso": "ISO", "f_number": "aperture"}[name]
            raise ExposureError(f"no {kind} in the EXIF data of {', '.join(lacking)}; {HINT}, in the order of the frames")
    return [
        math.log2((frame.exposure_time or 1) * (frame.iso or 100) / 100 / (frame.f_number or 1) ** 2) for frame in frames
    ]


def _check(evs: list[float], frames: Sequence[Header], source: str) -> None:
    pairs = ", ".join(f"{frame.path.name} {_number(ev)}" for frame, ev in zip(frames, evs, strict=True))
    if not all(math.isfinite(ev) for ev in evs):
        raise ExposureError(f"EVs from {source} must be finite numbers, got {pairs}")
    ordered = sorted(evs)
    if any(high - low < SMALLEST_STEP for low, high in zip(ordered, ordered[1:], strict=False)):
        raise ExposureError(f"EVs from {source} must differ, got {pairs}; {HINT}, in the order of the frames")
    if ordered[-1] - ordered[0] > LARGEST_SPAN:
        raise ExposureError(f"EVs from {source} span more than {LARGEST_SPAN:g} stops ({pairs}): are they exposure times?")


def format_evs(evs: Sequence[float]) -> str:
    """EVs relative to the middle one, as a photographer writes them: "-2 0 +2"."""
    middle = sorted(evs)[len(evs) // 2]
    return " ".join("0" if ev == middle else f"{ev - middle:+.2g}" for ev in evs)


def _number(ev: float) -> str:
    return f"{ev:.4g}"


def _list(evs: Sequence[float]) -> str:
    return " ".join(_number(ev) for ev in evs)
