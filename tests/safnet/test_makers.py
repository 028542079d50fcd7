"""Brackets by the makers' own tags, from notes built byte by byte, which exifread parses."""

import struct
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image
from PIL.TiffImagePlugin import IFDRational

from safnet.batch import find_series
from safnet.makers import Bracketing, read_bracketing

SHORT, UNDEFINED = 3, 7
MAKER, MODEL, EXIF_IFD, MAKER_NOTE = 0x010F, 0x0110, 0x8769, 0x927C


def directory(entries, start=0, byte_order=">"):
    """A TIFF directory of SHORT tags; longer values follow it, at offsets from `start`."""
    table, data = struct.pack(byte_order + "H", len(entries)), b""
    behind = start + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        coded = struct.pack(f"{byte_order}{len(values)}H", *values)
        place = coded.ljust(4, b"\0")
        if len(coded) > 4:
            place, data = struct.pack(byte_order + "I", behind + len(data)), data + coded
        table += struct.pack(byte_order + "HHI", tag, SHORT, len(values)) + place
    return table + bytes(4) + data


def canon(mode, shot, start):
    info = [0] * 10
    info[3], info[5] = mode, shot
    return directory({0x0093: info}, start)


def nikon(mode, start):
    return b"Nikon\0\x02\x10\0\0" + b"MM\0*\0\0\0\x08" + directory({0x0089: [mode]}, 8)


def sony(mode, shot, start):
    return directory({0xB049: [mode], 0xB04A: [shot]}, start)


def fujifilm(mode, shot, start):
    return b"FUJIFILM" + struct.pack("<I", 12) + directory({0x1100: [mode], 0x1101: [shot]}, 12, "<")


def shoot(path, maker, make_note, time=1 / 50, seconds=0):
    """A JPEG whose maker note knows where it begins in the EXIF data, from which Canon and Sony count offsets."""
    exif = Image.Exif()
    exif[MAKER], exif[MODEL] = maker, "Model"
    note = make_note(0)
    details = {
        0x829A: IFDRational(time),
        0x9003: f"2026:06:01 12:{seconds // 60:02d}:{seconds % 60:02d}",
        MAKER_NOTE: note,
    }
    exif.get_ifd(EXIF_IFD).update(details)
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(note) - (data.index(b"Exif\0\0") + 6)
    path.write_bytes(data.replace(note, make_note(start)))
    return path


@pytest.mark.parametrize(
    ("maker", "note", "expected"),
    [
        ("Canon", lambda start: canon(1, 2, start), Bracketing(True, 2)),
        ("Canon", lambda start: canon(1, 0, start), Bracketing(True)),
        ("Canon", lambda start: canon(0, 0, start), Bracketing(False)),
        ("Canon", lambda start: canon(4, 2, start), Bracketing(False)),  # of white balance
        ("Canon", lambda start: directory({0x0004: [0] * 16 + [2, 0]}, start), Bracketing(True)),
        ("NIKON CORPORATION", lambda start: nikon(0x11, start), Bracketing(True)),
        ("NIKON CORPORATION", lambda start: nikon(0x41, start), Bracketing(False)),
        ("SONY", lambda start: sony(5, 3, start), Bracketing(True, 3)),
        ("SONY", lambda start: sony(2, 3, start), Bracketing(False)),
        ("SONY", lambda start: sony(0xFFFF, 0, start), None),
        ("FUJIFILM", lambda start: fujifilm(1, 2, start), Bracketing(True, 2)),
        ("FUJIFILM", lambda start: fujifilm(0, 0, start), Bracketing(False)),
        ("PENTAX", lambda start: directory({0x0018: [1, 2]}, start), None),
        ("Canon", lambda start: b"\xff" * 40, None),
    ],
)
def test_what_a_camera_notes(tmp_path, maker, note, expected):
    assert read_bracketing(shoot(tmp_path / "a.jpg", maker, note)) == expected


def names(series):
    return [[path.stem for path in one.frames] for one in series]


@pytest.fixture
def card(tmp_path):
    """Two brackets of single shots, ten seconds apart, the second with an exposure twice; then pictures without bracketing."""
    times = (1 / 50, 1 / 200, 1 / 12.5, 1 / 50, 1 / 200, 1 / 201, 1 / 50, 1 / 200)
    for number, (time, shot) in enumerate(zip(times, (1, 2, 3, 1, 2, 3, 0, 0), strict=True)):
        seconds = 10 * number if number < 6 else 54 + number
        shoot(tmp_path / f"{number}.jpg", "Canon", partial(canon, min(shot, 1), shot), time, seconds)
    return tmp_path


def test_brackets_by_the_number_of_the_shot(card):
    assert names(find_series(card)) == [["0", "1", "2"], ["3", "4", "5"], ["6", "7"]]


def test_without_exifread_times_and_exposures_count(card, monkeypatch):
    monkeypatch.setitem(sys.modules, "exifread", None)
    assert names(find_series(card)) == [[str(number)] for number in range(5)] + [["5"], ["6", "7"]]


def test_bracketing_that_is_turned_off_ends_a_bracket(tmp_path):
    for number, (time, mode) in enumerate(
        ((1 / 50, 0x11), (1 / 200, 0x11), (1 / 12.5, 0x11), (1 / 100, 0), (1 / 30, 0))
    ):
        shoot(tmp_path / f"{number}.jpg", "NIKON CORPORATION", partial(nikon, mode), time, number)
    assert names(find_series(tmp_path)) == [["0", "1", "2"], ["3", "4"]]


def test_a_shot_that_was_deleted_leaves_it_to_time_and_exposure(tmp_path):
    for number, (shot, seconds) in enumerate(((1, 0), (3, 1), (4, 2), (1, 3))):
        shoot(tmp_path / f"{number}.jpg", "FUJIFILM", partial(fujifilm, 1, shot), 2.0**-number, seconds)
    assert names(find_series(tmp_path)) == [["0", "1", "2"], ["3"]]
