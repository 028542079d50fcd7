"""Exposure values of the frames: from the user, from exposure.txt, or from EXIF.

An EV here counts stops of light: the frame that gathered twice the light (longer time, higher ISO, wider aperture) has
one EV more. Only differences matter. (Light meters count the other way: their EV grows as the exposure gets shorter.)
"""

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from safnet.choices import FEWEST_FRAMES, MOST_FRAMES
from safnet.colour import Curve, Space, conversion
from safnet.images import (
    FOREIGN_EXTENSIONS,
    RAW_EXTENSIONS,
    RESULT_EXTENSIONS,
    Header,
    ImageError,
    find_frames,
    read_frame,
    read_header,
)
from safnet.radiance import ldr_values

FRAMES = 3  # that the network takes at once
EXPOSURE_FILE = "exposure.txt"
SMALLEST_STEP = 0.05  # EV; frames closer than this count as equally exposed
LARGEST_SPAN = 30.0  # EV; more than any bracket, so a sign of exposure times in place of EVs
TRUTH_NAMES = ("HDRImg", "hdr_img", "truth", "gt", "ground_truth")  # of scenes to evaluate with, without extension
OUTPUT = Path("fused.exr")  # of an advised command, where none was asked for
SAMPLE_STEP = 8  # pixels between those by which brightness is compared
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
    output = next((path for path in besides[:1] if path.suffix.lower() in RESULT_EXTENSIONS), OUTPUT)
    if len(paths) == 1 and paths[0].is_dir():
        for path in besides:
            if path.resolve() in [frame.resolve() for frame in find_frames(paths[0])]:
                raise ImageError(
                    f"{path} is a picture of the folder whose frames are to be fused; write to another name"
                )
        files = folder_frames(paths[0], masks, None if given is None else len(given))
        _check_count(files, f"folder {paths[0]} must hold {FEWEST_FRAMES} to {MOST_FRAMES} frames", output, paths[0])
    else:
        files = list(paths)
        _check_count(files, f"frames must be {FEWEST_FRAMES} to {MOST_FRAMES} files or one folder", output)
    frames = [read_header(file, curve) for file in files]
    try:
        _check_alike(frames)
        evs = find_evs(frames, given, [*besides, *masks])
    except ExposureError as error:
        advice = _advice(frames, output) if given is None or any(is_truth(file) for file in files) else ""
        raise ExposureError(f"{error}{'; ' if advice else ''}{advice}") from error
    pairs = sorted(zip(evs, frames, strict=True), key=lambda pair: pair[0])
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
    values = _values(file)
    for paths in (
        [frame.path for frame in frames],
        folder_frames(file.parent, besides),
        find_frames(file.parent, besides),
    ):
        if len(values) == len(paths):
            by_name = dict(zip(sorted(path.name for path in paths), values, strict=True))
            if all(frame.path.name in by_name for frame in frames):
                return [by_name[frame.path.name] for frame in frames]
    raise ExposureError(f"{file} must hold {len(frames)} EVs, one a frame, got {len(values)}")


def _values(file: Path) -> list[float]:
    try:
        return [float(word) for word in re.split(r"[\s,;]+", file.read_text("utf-8-sig")) if word]
    except (ValueError, OSError) as error:
        raise ExposureError(f"{file} must hold one EV a line: {error}") from error


def exif_evs(frames: Sequence[Header]) -> list[float]:
    """EV = log2(time * ISO / 100 / f-number^2) from EXIF. ISO or aperture may be missing, but only on all frames."""
    for name in ("exposure_time", "iso", "f_number"):
        lacking = [str(frame.path) for frame in frames if getattr(frame, name) is None]
        if lacking and (name == "exposure_time" or len(lacking) < len(frames)):
            kind = {"exposure_time": "exposure time", "iso": "ISO", "f_number": "aperture"}[name]
            raise ExposureError(f"no {kind} in the EXIF data of {', '.join(lacking)}")
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


# ---- the frames of a folder ------------------------------------------------------------------------------------------


def folder_frames(folder: Path, besides: Sequence[Path] = (), count: int | None = None) -> list[Path]:
    """The frames of a folder by file name: see `find_frames`, and without the JPEGs that cameras write beside raw files.

    The truth of a scene to evaluate with is left out where the exposures are as many as the other pictures, which nothing but
    its name would not do to a photograph.

    Args:
        besides: pictures that are no frames.
        count: of exposures that were given; None for those of exposure.txt.
    """
    files = without_twins(find_frames(folder, besides))
    others = [file for file in files if not is_truth(file)]
    if count is None and (table := folder / EXPOSURE_FILE).is_file():
        try:
            count = len(_values(table))
        except ExposureError:  # which whoever needs it will say
            return files
    return others if len(others) == count else files


def is_truth(path: Path) -> bool:
    """Whether a picture is named as the truth of a scene to evaluate with, not as a photograph."""
    return path.stem.lower() in [name.lower() for name in TRUTH_NAMES]


def without_twins(files: Sequence[Path]) -> list[Path]:
    """Without the JPEGs that cameras write beside raw files."""
    raw = {file.with_suffix("") for file in files if file.suffix.lower() in RAW_EXTENSIONS}
    return [file for file in files if file.suffix.lower() in RAW_EXTENSIONS or file.with_suffix("") not in raw]


# ---- refusals --------------------------------------------------------------------------------------------------------


def _check_count(files: Sequence[Path], demand: str, output: Path, folder: Path | None = None) -> None:
    if FEWEST_FRAMES <= len(files) <= MOST_FRAMES:
        return
    names = f" ({', '.join(file.name for file in files)})" if files else ""
    advice = ""
    if len(files) > MOST_FRAMES:
        example = _example(_readable(files), output)
        advice = f"; choose some{', ' if example else ''}{example}"
    elif folder is not None:
        foreign = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in FOREIGN_EXTENSIONS)
        if foreign:
            advice = f"; {', '.join(foreign)} cannot be read: convert to TIFF or PNG"
    raise ExposureError(f"{demand}, got {len(files)}{names}{advice}")


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
        raise ExposureError(f"EVs from {source} must differ, got {pairs}")
    if ordered[-1] - ordered[0] > LARGEST_SPAN:
        raise ExposureError(
            f"EVs from {source} span more than {LARGEST_SPAN:g} stops, as exposure times would ({pairs})"
        )


# ---- advice ----------------------------------------------------------------------------------------------------------


def _advice(frames: Sequence[Header], output: Path) -> str:
    """What to do with frames that make no bracket: a command that will fuse some of them; empty if none will."""
    truths = ", ".join(frame.path.name for frame in frames if is_truth(frame.path))
    said = f"{truths} is named as the truth of a scene to evaluate with, not as a frame: leave it out" if truths else ""
    return ", ".join(part for part in (said, _example(frames, output)) if part)


def _example(frames: Sequence[Header], output: Path) -> str:
    """A command line that fuses some of these pictures and is not refused, with what to know of it; empty if there is none.

    Where exposure.txt or EXIF tells, these are the darkest, middle and brightest of the first series in which no exposure comes
    twice. Else all, or of more than can be fused the first three by name, with --ev: their exposure biases if they differ,
    else steps from the darkest picture to the brightest.
    """
    alike = _alike_frames(frames)
    chosen, evs, source = _first_series(alike), "", ""
    if not chosen:
        chosen = alike if len(alike) <= MOST_FRAMES else alike[:FRAMES]
        if len(chosen) < FEWEST_FRAMES:
            return ""
        if biases := _biases(chosen):
            numbers, source = (
                [f"{bias:+.3g}" if bias else "0" for bias in biases],
                "with their exposure biases for EVs, ",
            )
        else:
            chosen = sorted(chosen, key=_brightness)
            step, middle = 2 if len(chosen) <= FRAMES else 1, (len(chosen) - 1) // 2
            numbers = [str(step * (number - middle)) for number in range(len(chosen))]
            source = "with EVs guessed by brightness, "
        evs = f" --ev {' '.join(numbers)}"
    names = " ".join(_as_argument(frame.path) for frame in chosen)
    replacing = " --overwrite" if output.exists() else ""
    return f"{source}for example: safnet fuse {names}{evs} -o {_as_argument(output)}{replacing}"


def advised_batch(files: Sequence[Path], folder: Path, output: Path) -> str:
    """A command line, with what to know of it, for pictures by name in which exposures tell no brackets; empty if none would
    fuse any of them."""
    frames = _readable(sorted(files))
    if len(files) % FRAMES or len(_alike_frames(frames)) < len(files):
        return _example(frames, OUTPUT)
    lead, evs = f"if each {FRAMES} of its pictures by name are one, ", ""
    if not all(_has_evs(frames[start : start + FRAMES]) for start in range(0, len(frames), FRAMES)):
        ordered = sorted(frames[:FRAMES], key=_brightness)
        numbers = [str(2 * (ordered.index(frame) - FRAMES // 2)) for frame in frames[:FRAMES]]
        lead, evs = f"{lead}with EVs guessed by brightness, ", f" --ev {' '.join(numbers)}"
    names = f"{_as_argument(folder)} -o {_as_argument(output)}"
    return f"{lead}for example: safnet batch {names} --every {FRAMES}{evs}"


def _as_argument(path: Path) -> str:
    """A path as a shell takes it, and no command for an option."""
    return shlex.quote(f"./{path}" if str(path).startswith("-") else str(path))


def _readable(files: Sequence[Path]) -> list[Header]:
    found = []
    for file in files:
        try:
            found.append(read_header(file))
        except ImageError:
            continue
    return found


def _alike_frames(frames: Sequence[Header]) -> list[Header]:
    """Those of the commonest size and colour space, each once, without truths."""
    unique = {frame.path.resolve(): frame for frame in frames if not is_truth(frame.path)}
    kinds = Counter((frame.width, frame.height, frame.colour.space) for frame in unique.values())
    if not kinds:
        return []
    common = kinds.most_common(1)[0][0]
    return [frame for frame in unique.values() if (frame.width, frame.height, frame.colour.space) == common]


def _first_series(frames: Sequence[Header]) -> list[Header]:
    """The darkest, middle and brightest of the first series of pictures, by EXIF or exposure.txt, in which no exposure comes
    twice; two if no series has more, and none where exposures tell none."""
    if not frames:
        return []
    file = exposure_file(frames)
    if file is None:
        frames = [frame for frame in frames if frame.exposure_time is not None]
    try:
        evs = exif_evs(frames) if file is None else read_exposure_file(file, frames)
    except ExposureError:
        return []
    series: list[list[tuple[float, Header]]] = [[]]
    for ev, frame in zip(evs, frames, strict=True):
        if any(abs(ev - other) < SMALLEST_STEP for other, _ in series[-1]):
            series.append([])
        series[-1].append((ev, frame))
    for fewest in (FRAMES, FEWEST_FRAMES):
        for found in series:
            found.sort(key=lambda pair: pair[0])
            numbers = (0, -1) if len(found) == FEWEST_FRAMES else (0, len(found) // 2, -1)
            chosen = [found[number][1] for number in numbers] if len(found) >= fewest else []
            if chosen and _has_evs(chosen):
                return chosen
    return []


def _has_evs(frames: Sequence[Header]) -> bool:
    """Whether these frames alone would be taken without --ev: exposure.txt may count others then."""
    try:
        find_evs(frames)
    except ExposureError:
        return False
    return True


def _biases(frames: Sequence[Header]) -> list[float]:
    """The frames' exposure biases, which are likely what was bracketed by, if they make a bracket; else none."""
    biases = [frame.bias for frame in frames if frame.bias is not None]
    if len(biases) != len(frames):
        return []
    try:
        _check_evs(biases, frames, "EXIF")
    except ExposureError:
        return []
    return biases


def _brightness(frame: Header) -> float:
    try:
        picture = read_frame(frame)[:, :, ::SAMPLE_STEP, ::SAMPLE_STEP]
    except ImageError:  # which will be said when it is fused
        return 0.0
    return float(ldr_values(picture).mean())


def format_evs(evs: Sequence[float]) -> str:
    """EVs relative to the middle one, as a photographer writes them: "-2 0 +2"."""
    middle = sorted(evs)[len(evs) // 2]
    return " ".join("0" if ev == middle else f"{ev - middle:+.3g}" for ev in evs)


def _number(ev: float) -> str:
    return f"{ev:.4g}"


def _list(evs: Sequence[float]) -> str:
    return " ".join(_number(ev) for ev in evs)
