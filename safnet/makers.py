"""What cameras note in the makers' own tags about their bracketing, through exifread, where that is installed."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

NIKON_BRACKETING = 0x10  # bit of Nikon's shooting mode
SONY_BRACKETING = 5
AEB = 1  # of Canon's bracket modes
UNKNOWN = (0, 0xFFFF)  # numbers of shots that are none


class Bracketing(NamedTuple):
    """Whether a camera took a picture as one of a bracket of exposures, and as which, from 1; None where it does not say."""

    on: bool
    number: int | None = None


def read_bracketing(path: Path) -> Bracketing | None:
    """What Canon, Nikon, Sony and Fujifilm note; None for other cameras, and without exifread."""
    try:
        import exifread
    except ImportError:
        return None
    logging.getLogger("exifread").setLevel(logging.CRITICAL)
    try:
        with path.open("rb") as file:
            tags = exifread.process_file(file, extract_thumbnail=False)
    except Exception:  # whatever a damaged note makes exifread raise, the picture may still be good
        return None
    note = {name.removeprefix("MakerNote "): tag for name, tag in tags.items() if name.startswith("MakerNote ")}
    maker = str(tags.get("Image Make", "")).strip().lower()
    found = next((read for name, read in _MAKERS.items() if maker.startswith(name)), None)
    return None if found is None else found(note)


def _canon(note: dict[str, Any]) -> Bracketing | None:
    if "BracketMode" in note:
        on = str(note["BracketMode"]) in ("AEB", str(AEB))
        return Bracketing(on, _shot(_number(note, "BracketShotNumber")) if on else None)
    if "AutoExposureBracketing" in note:
        return Bracketing(str(note["AutoExposureBracketing"]).startswith("On"))
    return None


def _nikon(note: dict[str, Any]) -> Bracketing | None:
    mode = _number(note, "BracketingMode")
    return None if mode is None else Bracketing(bool(mode & NIKON_BRACKETING))


def _sony(note: dict[str, Any]) -> Bracketing | None:
    mode = _number(note, "ReleaseMode")
    if mode is None or mode == 0xFFFF:
        return None
    on = mode == SONY_BRACKETING
    return Bracketing(on, _shot(_number(note, "SequenceNumber")) if on else None)


def _fujifilm(note: dict[str, Any]) -> Bracketing | None:
    mode = _number(note, "MotorOrBracket")
    if mode is None:
        return None
    return Bracketing(mode == 1, _shot(_number(note, "Tag 0x1101")) if mode == 1 else None)


def _number(note: dict[str, Any], name: str) -> int | None:
    """The value of a tag; of Canon's, which exifread has as text, that."""
    tag = note.get(name)
    if tag is None:
        return None
    try:
        return int(tag.values[0]) if isinstance(tag.values, list) else int(str(tag.printable))
    except (ValueError, TypeError, IndexError):
        return None


def _shot(number: int | None) -> int | None:
    return None if number in UNKNOWN else number


_MAKERS = {"canon": _canon, "nikon": _nikon, "sony": _sony, "fujifilm": _fujifilm}
