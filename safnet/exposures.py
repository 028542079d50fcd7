"""Exposure values of the frames: from the user, from exposure.txt, or from EXIF.

An EV here counts stops of light: the frame that gathered twice the light (longer time, higher ISO, wider aperture) has
one EV more. Only differences matter. (Light meters count the other way: their EV grows as the exposure gets shorter.)
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from safnet.choices import FEWEST_FRAMES, MOST_FRAMES
from safnet.colour import Curve, Space, conversion
from safnet.images import FOREIGN_EXTENSIONS, RAW_EXTENSIONS, Header, ImageError, find_frames, read_header

FRAMES = 3  # that the network takes at once
EXPOSURE_FILE = "exposure.txt"
SMALLEST_STEP = 0.05  # EV; frames closer than this count as equally exposed
LARGEST_SPAN = 30.0  # EV; more than any bracket, so a sign of exposure times in place of EVs
HINT = "give them with --ev, for example --ev -2 0 2"
NUMBER = re.compile(r"[+-]?(\d+([.,]\d+)?|\.\d+)")
FRACTION = re.compile(r"([+-]?)(\d+)/0*([1-9]\d*)")
EV_PARTS = (1, 2, 3, 4, 6)  # of a stop, in which EVs are written as fractions


class ExposureError(ValueError):
    """Exposures that are missing, equal or impossible, or frames that make no bracket."""


class Bracket(NamedTuple):
    """Two to nine frames of one size, in ascending order of exposure, and their EVs.

    Attributes:
        reference: number of the frame to align to, if one was chosen.
    """

    frames: tuple[Header, ...]
    evs: tuple[float, ...]
    reference: int | None = None

    @property
    def space(self) -> Space:
        """Primaries of all frames."""
        return self.frames[0].colour.space

    @property
    def has_known_curve(self) -> bool:
        """Whether the frames' values are light itself, of which no camera made a picture."""
        return all(frame.colour.is_linear for frame in self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.frames[0].width, self.frames[0].height


def open_bracket(
    paths: Sequence[Path],
    given: Sequence[float] | None = None,
    besides: Sequence[Path] = (),
    curve: Curve | None = None,
    reference: Path | None = None,
    mask: Path | None = None,
) -> Bracket:
    """Look at two to nine frames, or at those in a folder, without reading their pixels, and sort them by exposure.

    Args:
        paths: files in any order, or one folder (its pictures count by file name).
        given: EVs of the frames in that order, which win over exposure.txt and EXIF.
        besides: files that are to be written: they are no frames though they may lie in the folder.
        curve: of the frames, if not that which they state themselves.
        reference: the frame to align to.
        mask: a picture that is no frame though it may lie in the folder.

    Raises:
        ExposureError, ImageError: not two to nine frames, of different sizes, unreadable, or without usable exposures; a
            reference that is none of them.
    """
    masks = [] if mask is None else [mask]
    if len(paths) == 1 and paths[0].is_dir():
        for path in besides:
            if path.resolve() in [frame.resolve() for frame in find_frames(paths[0])]:
                raise ImageError(
                    f"{path} is a picture of the folder whose frames are to be fused; write to another name"
                )
        files = without_twins(find_frames(paths[0], masks))
        _check_count(files, f"folder {paths[0]} must hold {FEWEST_FRAMES} to {MOST_FRAMES} frames", paths[0])
    else:
        files = list(paths)
        _check_count(files, f"frames must be {FEWEST_FRAMES} to {MOST_FRAMES} files or one folder")
    frames = [read_header(file, curve) for file in files]
    _check_alike(frames)
    pairs = sorted(zip(find_evs(frames, given, [*besides, *masks]), frames, strict=True), key=lambda pair: pair[0])
    return Bracket(
        tuple(frame for _, frame in pairs), tuple(ev for ev, _ in pairs), _number_of(reference, [f for _, f in pairs])
    )


def _number_of(reference: Path | None, frames: Sequence[Header]) -> int | None:
    if reference is None:
        return None
    for number, frame in enumerate(frames):
        if frame.path.resolve() == reference.resolve():
            return number
    names = ", ".join(frame.path.name for frame in frames)
    raise ExposureError(f"--reference must be one of the frames {names}, got {reference}")


def find_evs(
    frames: Sequence[Header], given: Sequence[float] | None = None, besides: Sequence[Path] = ()
) -> list[float]:
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
    _check_evs(evs, frames, source)
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
            raise ExposureError(f"no {kind} in the EXIF data of {', '.join(lacking)}; {_offer(frames)}")
    return [
        math.log2((frame.exposure_time or 1) * (frame.iso or 100) / 100 / (frame.f_number or 1) ** 2)
        for frame in frames
    ]


# ---- as people write them --------------------------------------------------------------------------------------------


def parse_evs(text: str) -> list[float]:
    """EVs as written on a command line: "-2 0 2", "-2,0,2", or with decimal commas "-1,5 0 1,5" and "-1,5; 0; 1,5".

    Exposure times in seconds are taken too, and become EVs: where a value has an s as "0.5s", or where none has a sign and
    fractions are of the form 1/N: "1/80 1/20 1/5", "1/2 2 8". Other fractions are parts of a stop: "-1/3 0 1/3".

    Raises:
        ExposureError: not two to nine numbers.
    """
    words = split_exposures(text)
    if not FEWEST_FRAMES <= len(words) <= MOST_FRAMES or not all(map(is_exposure, words)):
        raise ExposureError(
            f"--ev must be {FEWEST_FRAMES} to {MOST_FRAMES} exposures in stops, for example --ev -2 0 2, or times such as "
            f"--ev 1/80 1/20 1/5, got {text!r}"
        )
    if _are_times(words):
        seconds = [_value(word) for word in words]
        if min(seconds) <= 0:
            raise ExposureError(f"--ev: exposure times must be above 0, for example --ev 1/80 1/20 1/5, got {text!r}")
        return [math.log2(time) for time in seconds]
    for word in words:
        if (fraction := FRACTION.fullmatch(word)) and int(fraction[3]) not in EV_PARTS:
            raise ExposureError(
                f"--ev: {word} is neither a part of a stop, as in --ev -1/3 0 1/3, nor all of them exposure times, as in "
                f"--ev 1/80 1/20 1/5, got {text!r}"
            )
    return [_value(word) for word in words]


def split_exposures(text: str) -> list[str]:
    """The values of a text, be they divided by blanks, semicolons or commas; a comma in one of several is a decimal one."""
    words = [word for part in re.split(r"[\s;]+", text.replace("\N{MINUS SIGN}", "-")) if (word := part.rstrip(","))]
    return words[0].split(",") if len(words) == 1 else words


def is_exposure(word: str) -> bool:
    """Whether a word is one value as `parse_evs` takes it."""
    word = word.replace("\N{MINUS SIGN}", "-").removesuffix("s")
    return bool(NUMBER.fullmatch(word) or FRACTION.fullmatch(word))


def _are_times(words: Sequence[str]) -> bool:
    if any(word.endswith("s") for word in words):
        return True
    fractions = [fraction for word in words if (fraction := FRACTION.fullmatch(word))]
    unsigned = all(word[0] not in "+-" and _value(word) > 0 for word in words)
    return bool(fractions) and unsigned and all(fraction[2] == "1" for fraction in fractions)


def _value(word: str) -> float:
    word = word.removesuffix("s")
    if fraction := FRACTION.fullmatch(word):
        return float(f"{fraction[1]}1") * int(fraction[2]) / int(fraction[3])
    return float(word.replace(",", "."))


def _offer(frames: Sequence[Header]) -> str:
    """What to do without exposures: the frames' biases, if they differ, which are likely what was bracketed by."""
    biases = [frame.bias for frame in frames if frame.bias is not None]
    if len(biases) == len(frames) and len(set(biases)) == len(frames):
        stops = " ".join(f"{bias:+.3g}" if bias else "0" for bias in biases)
        return f"their exposure biases are {stops}: if these are the bracket, give --ev {stops}"
    return f"{HINT}, in the order of the frames"


def without_twins(files: Sequence[Path]) -> list[Path]:
    """Without the JPEGs that cameras write beside raw files."""
    raw = {file.with_suffix("") for file in files if file.suffix.lower() in RAW_EXTENSIONS}
    return [file for file in files if file.suffix.lower() in RAW_EXTENSIONS or file.with_suffix("") not in raw]


# ---- refusals --------------------------------------------------------------------------------------------------------


def _check_count(files: Sequence[Path], demand: str, folder: Path | None = None) -> None:
    if FEWEST_FRAMES <= len(files) <= MOST_FRAMES:
        return
    names = f" ({', '.join(file.name for file in files)})" if files else ""
    advice = ""
    if len(files) > MOST_FRAMES:
        advice = f"; choose some, for example: {' '.join(map(str, choose_three(files)))}"
    elif folder is not None:
        foreign = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in FOREIGN_EXTENSIONS)
        if foreign:
            advice = f"; {', '.join(foreign)} cannot be read: convert to TIFF or PNG"
    raise ExposureError(f"{demand}, got {len(files)}{names}{advice}")


def choose_three(files: Sequence[Path]) -> list[Path]:
    """Three of more frames that make a bracket: the darkest, middle and brightest of the first series, by EXIF or exposure.txt,
    in which no exposure comes twice; where exposures are missing, the first, middle and last by name."""
    ends = [files[0], files[len(files) // 2], files[-1]]
    try:
        frames = [read_header(file) for file in files]
        file = exposure_file(frames)
        evs = exif_evs(frames) if file is None else read_exposure_file(file, frames)
    except (ExposureError, ImageError):
        return ends
    series: list[list[tuple[float, Path]]] = [[]]
    for ev, frame in zip(evs, frames, strict=True):
        if any(abs(ev - other) < SMALLEST_STEP for other, _ in series[-1]):
            series.append([])
        series[-1].append((ev, frame.path))
    for found in series:
        if len(found) >= FRAMES:
            found.sort()
            return [found[0][1], found[len(found) // 2][1], found[-1][1]]
    return ends


def _check_alike(frames: Sequence[Header]) -> None:
    first = frames[0]
    for number, frame in enumerate(frames[1:], 1):
        if (frame.width, frame.height) != (first.width, first.height):
            raise ExposureError(
                f"frames must have one size, got {first.path} with {first.width} x {first.height} and "
                f"{frame.path} with {frame.width} x {frame.height} pixels"
            )
        if frame.path.resolve() in [other.path.resolve() for other in frames[:number]]:
            raise ExposureError(f"frames must be different files, got {frame.path} twice")
        if conversion(frame.colour.space, first.colour.space) is not None:
            raise ExposureError(
                f"frames must be of one colour space, got {first.path} of {first.colour.space.name} and {frame.path} of "
                f"{frame.colour.space.name}"
            )


def _check_evs(evs: list[float], frames: Sequence[Header], source: str) -> None:
    pairs = ", ".join(f"{frame.path.name} {_number(ev)}" for frame, ev in zip(frames, evs, strict=True))
    if not all(math.isfinite(ev) for ev in evs):
        raise ExposureError(f"EVs from {source} must be finite numbers, got {pairs}")
    ordered = sorted(evs)
    if any(high - low < SMALLEST_STEP for low, high in pairwise(ordered)):
        way = f"{HINT}, in the order of the frames"
        if len(frames) > FRAMES:
            way = f"fuse one bracket, for example: {' '.join(map(str, choose_three([frame.path for frame in frames])))}"
        raise ExposureError(f"EVs from {source} must differ, got {pairs}; {way}")
    if ordered[-1] - ordered[0] > LARGEST_SPAN:
        raise ExposureError(
            f"EVs from {source} span more than {LARGEST_SPAN:g} stops ({pairs}): are they exposure times?"
        )


def format_evs(evs: Sequence[float]) -> str:
    """EVs relative to the middle one, as a photographer writes them: "-2 0 +2"."""
    middle = sorted(evs)[len(evs) // 2]
    return " ".join("0" if ev == middle else f"{ev - middle:+.3g}" for ev in evs)


def _number(ev: float) -> str:
    return f"{ev:.4g}"


def _list(evs: Sequence[float]) -> str:
    return " ".join(_number(ev) for ev in evs)
