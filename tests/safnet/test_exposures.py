"""Exposure values: where they come from, which wins, and what is refused."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from safnet.batch import find_series
from safnet.cli import app
from safnet.exposures import ExposureError, exif_evs, find_evs, format_evs, open_bracket
from safnet.images import Header, ImageError, write_radiance
from tests.support.frames import save_frame, save_tagged


def frame(path, exposure_time=None, f_number=None, iso=None):
    return Header(Path(path), 8, 8, exposure_time, f_number, iso)


def test_more_light_is_a_higher_ev():
    longer = exif_evs([frame("a", 1 / 100), frame("b", 1 / 50), frame("c", 1 / 25)])
    assert [ev - longer[0] for ev in longer] == pytest.approx([0, 1, 2])
    wider = exif_evs([frame("a", 1, 8.0), frame("b", 1, 4.0), frame("c", 1, 2.0)])
    assert [ev - wider[0] for ev in wider] == pytest.approx([0, 2, 4])
    faster = exif_evs([frame("a", 1, 8.0, 100), frame("b", 1, 8.0, 200), frame("c", 1, 8.0, 800)])
    assert [ev - faster[0] for ev in faster] == pytest.approx([0, 1, 3])


def test_exif_must_be_complete():
    with pytest.raises(ExposureError, match=r"no exposure time in the EXIF data of b\.jpg, c\.jpg$"):
        exif_evs([frame("a.jpg", 1), frame("b.jpg"), frame("c.jpg")])
    with pytest.raises(ExposureError, match=r"no ISO in the EXIF data of c\.jpg"):
        exif_evs([frame("a.jpg", 1, 2, 100), frame("b.jpg", 2, 2, 100), frame("c.jpg", 4, 2)])


@pytest.mark.parametrize("text", ["-2\n0.0\n+2.0\n", "-2 0 2", "-2,0,2", "\ufeff-2\r\n0\r\n2\r\n\r\n"])
def test_exposure_file_counts_by_file_name(tmp_path, text):
    (tmp_path / "exposure.txt").write_text(text, "utf-8")
    frames = [frame(tmp_path / name, 1) for name in ("c.png", "a.png", "b.png")]
    assert find_evs(frames) == [2, -2, 0], "exposure.txt must win over EXIF"
    assert find_evs(frames, [5, 6, 7]) == [5, 6, 7], "given EVs must win over exposure.txt"


def test_exposure_file_of_a_larger_bracket(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.png", "e.png"):
        (tmp_path / name).touch()
    (tmp_path / "exposure.txt").write_text("-2\n-1\n0\n1\n2\n")
    assert find_evs([frame(tmp_path / name) for name in ("e.png", "a.png", "c.png")]) == [2, -2, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-2\n0\n", "must hold 3 EVs, one a frame, got 2"),
        ("a b c", "must hold one EV a line"),
        ("0 0 2", "must differ"),
    ],
)
def test_bad_exposure_files(tmp_path, text, message):
    (tmp_path / "exposure.txt").write_text(text)
    with pytest.raises(ExposureError, match=rf"exposure\.txt.*{message}"):
        find_evs([frame(tmp_path / name) for name in ("a.png", "b.png", "c.png")])


def test_exposure_file_needs_a_common_folder(tmp_path):
    (tmp_path / "exposure.txt").write_text("-2 0 2")
    (tmp_path / "other").mkdir()
    frames = [frame(tmp_path / "a.png", 1), frame(tmp_path / "b.png", 2), frame(tmp_path / "other" / "c.png", 4)]
    assert find_evs(frames) == pytest.approx(exif_evs(frames))


@pytest.mark.parametrize(
    ("evs", "message"),
    [
        ([0, 0, 2], r"EVs from --ev must differ, got a\.png 0, b\.png 0, c\.png 2"),
        ([0, 0.01, 2], "must differ"),
        ([0, float("nan"), 2], "must be finite"),
        ([320, 80, 20], "span more than 30 stops, as exposure times would"),
        ([0, 2], "--ev must give 3 values, got 2: 0 2"),
    ],
)
def test_impossible_evs(evs, message):
    with pytest.raises(ExposureError, match=message):
        find_evs([frame("a.png"), frame("b.png"), frame("c.png")], evs)


def test_equal_exif_exposures_are_refused():
    with pytest.raises(ExposureError, match=r"EVs from EXIF must differ, got a\.png -4\.322, .*c\.png -4\.322$"):
        find_evs([frame("a.png", 1 / 20), frame("b.png", 1 / 20), frame("c.png", 1 / 20)])


def test_format():
    assert format_evs([-10.3, -8.3, -6.05]) == "-2 0 +2.25"


class TestBracket:
    @pytest.fixture
    def pictures(self, tmp_path):

        for number, name in enumerate(("a.png", "b.png", "c.png")):
            save_frame(tmp_path / name, np.full((4, 6, 3), number, np.uint8))
        return [tmp_path / name for name in ("a.png", "b.png", "c.png")]

    def test_sorted_by_exposure(self, pictures):
        bracket = open_bracket(pictures, [2, -2, 0])
        assert [frame.path.name for frame in bracket.frames] == ["b.png", "c.png", "a.png"]
        assert bracket.evs == (-2, 0, 2)
        assert bracket.size == (6, 4)

    def test_folder(self, pictures):
        assert [frame.path.name for frame in open_bracket([pictures[0].parent], [1, 2, 0]).frames] == [
            "c.png",
            "a.png",
            "b.png",
        ]

    def test_one_frame(self, pictures):
        with pytest.raises(ExposureError, match=r"frames must be 2 to 9 files or one folder, got 1 \(a\.png\)"):
            open_bracket(pictures[:1])

    def test_two_frames(self, pictures):
        bracket = open_bracket(pictures[:2], [1, 0])
        assert [frame.path for frame in bracket.frames] == [pictures[1], pictures[0]]

    def test_larger_and_empty_folders(self, pictures):
        folder = pictures[0].parent
        for name in "defghij":
            save_frame(folder / f"{name}.png", np.zeros((4, 6, 3), np.uint8))
        with pytest.raises(
            ExposureError,
            match=r"must hold 2 to 9 frames, got 10 \(.*choose some, with EVs guessed by brightness, for example: "
            r"safnet fuse \S*a\.png \S*b\.png \S*c\.png --ev -2 0 2 -o fused\.exr$",
        ):
            open_bracket([folder])
        (folder / "empty").mkdir()
        with pytest.raises(ExposureError, match=r"folder .*empty must hold 2 to 9 frames, got 0$"):
            open_bracket([folder / "empty"])

    def test_the_reference_may_be_chosen(self, pictures):
        assert open_bracket(pictures, [2, 0, 1]).reference is None
        assert open_bracket(pictures, [2, 0, 1], reference=pictures[0]).reference == 2
        with pytest.raises(ExposureError, match=r"--reference must be one of the frames .*, got other\.png"):
            open_bracket(pictures, [2, 0, 1], reference=Path("other.png"))

    def test_jpegs_beside_raw_files_are_no_frames(self, tmp_path):
        for name in "abc":
            (tmp_path / f"{name}.cr3").touch()
            save_frame(tmp_path / f"{name}.jpg", np.zeros((8, 8, 3), np.uint8))
        with pytest.raises(ImageError, match=r"a\.cr3 cannot be read"):
            open_bracket([tmp_path])

    def test_frames_that_cannot_be_read_are_named(self, tmp_path):
        for name in ("a.bmp", "b.gif", "notes.txt"):
            (tmp_path / name).touch()
        with pytest.raises(ExposureError, match=r"got 0; a\.bmp, b\.gif cannot be read: convert to TIFF or PNG$"):
            open_bracket([tmp_path])

    def test_results_are_no_frames_and_frames_no_results(self, pictures):
        folder = pictures[0].parent
        write_radiance(folder / "earlier.tif", np.zeros((4, 6, 3), np.float32), metadata=())
        assert len(open_bracket([folder], [0, 1, 2], [folder / "earlier.tif"]).frames) == 3
        save_frame(folder / "d.png", np.zeros((4, 6, 3), np.uint8))
        with pytest.raises(
            ImageError, match=r"a\.png is a picture of the folder whose frames are to be fused; .* another"
        ):
            open_bracket([folder], [0, 1, 2], [pictures[0]])

    def test_different_sizes(self, pictures):
        save_frame(pictures[2], np.zeros((6, 4, 3), np.uint8))
        with pytest.raises(ExposureError, match=r"one size, got .*a\.png with 6 x 4 and .*c\.png with 4 x 6 pixels"):
            open_bracket(pictures, [0, 1, 2])

    def test_one_frame_twice(self, pictures):
        with pytest.raises(ExposureError, match=r"different files, got .*a\.png twice"):
            open_bracket([pictures[0], pictures[1], pictures[0]], [0, 1, 2])

    def test_missing_frame(self, pictures):
        with pytest.raises(ImageError, match=r"gone\.png does not exist"):
            open_bracket([pictures[0], pictures[1], pictures[0].with_name("gone.png")])


def grey(folder, name, level=0, size=(8, 8), **tags):
    return save_tagged(folder / name, np.full((*size, 3), level, np.uint8), "uint8", **tags)


def exposed(folder, *times):
    for number, time in enumerate(times):
        grey(folder, f"{number:02}.jpg", 40 * (number % 3), ExposureTime=float(time))


def evaluation_scene(folder, exposures="-2 0 2 4"):
    """As the data sets have them; four values say that the truth is a frame."""
    for number, name in enumerate(("a.png", "b.png", "c.png")):
        grey(folder, name, 60 * number)
    write_radiance(folder / "truth.exr", np.zeros((8, 8, 3), np.float32))
    if exposures:
        (folder / "exposure.txt").write_text(exposures)


def of_two_sizes(folder):
    for number, time in enumerate((1 / 50, 1 / 200, 1 / 12)):
        grey(folder, f"{number}.jpg", ExposureTime=time)
        grey(folder, f"{number}-small.jpg", size=(4, 4), ExposureTime=time)
    grey(folder, "3.jpg", ExposureTime=2.0)


def with_odd_names(folder):
    for name in ("a b.jpg", "c'd.jpg", "$e.jpg"):
        grey(folder, name, ord(name[-5]), ExposureTime=0.02)


def with_biases(folder):
    for name, bias in (("a.jpg", 0.0), ("b.jpg", -2.0), ("c.jpg", 2 / 3)):
        grey(folder, name, ExposureTime=0.02, Exif__ExposureBiasValue=bias)


def numbered(folder, table):
    for number in range(12):
        grey(folder, f"{number:02}.png", 20 * (number % 3))
    (folder / "exposure.txt").write_text(table)


# Each case: a folder that is refused, and the frames and EVs of the line that its message ends with.
ADVICE = {
    "two brackets, the middle first": (
        lambda f: exposed(f, 1 / 50, 1 / 200, 1 / 12, 1 / 50, 1 / 200, 1 / 12),
        "must differ.*; for $",
        "01.jpg 00.jpg 02.jpg",
    ),
    "too long": (
        lambda f: exposed(f, 1, 16, 4, 0.25, 1 / 16, 2, 8, 0.5, 1 / 8, 1 / 32),
        "got 10 .*choose some",
        "09.jpg 00.jpg 01.jpg",
    ),
    "three brackets": (lambda f: exposed(f, *(1, 4, 16) * 4), "got 12 .*choose some", "00.jpg 01.jpg 02.jpg"),
    "equal exposures": (
        lambda f: exposed(f, 1, 1, 1),
        "EVs from EXIF must differ, .*; with EVs guessed by brightness, for $",
        "00.jpg 01.jpg 02.jpg --ev -2 0 2",
    ),
    "two equal exposures": (lambda f: exposed(f, 1, 1), "must differ", "00.jpg 01.jpg --ev 0 2"),
    "one exposure twice": (lambda f: exposed(f, 1, 1, 4), "must differ", "01.jpg 02.jpg"),
    "five equal exposures": (
        lambda f: [grey(f, f"{n}.jpg", 200 - 30 * n, ExposureTime=1.0) for n in range(5)],
        "must differ",
        "4.jpg 3.jpg 2.jpg 1.jpg 0.jpg --ev -2 -1 0 1 2",
    ),
    "twelve equal exposures": (lambda f: exposed(f, *[1] * 12), "got 12", "00.jpg 01.jpg 02.jpg --ev -2 0 2"),
    "no exposures": (
        lambda f: [grey(f, name, level) for name, level in (("a.png", 90), ("b.png", 10), ("c.png", 200))],
        "no exposure time",
        "b.png a.png c.png --ev -2 0 2",
    ),
    "biases": (
        with_biases,
        "must differ, .*; with their exposure biases for EVs, for $",
        "a.jpg b.jpg c.jpg --ev 0 -2 +0.667",
    ),
    "odd names": (with_odd_names, "must differ", "'a b.jpg' 'c'\"'\"'d.jpg' '$e.jpg' --ev -2 0 2"),
    "two sizes": (of_two_sizes, "frames must have one size", "1.jpg 2.jpg 3.jpg"),
    "the truth of a scene": (
        lambda f: evaluation_scene(f, ""),
        r"c\.png, .*truth\.exr; truth\.exr is named as the truth of a scene to evaluate with",
        "a.png b.png c.png --ev -2 0 2",
    ),
    "exposures of another count": (
        lambda f: evaluation_scene(f, "0 2"),
        r"exposure\.txt must hold 4 EVs, one a frame, got 2; truth\.exr is named as",
        "a.png b.png c.png --ev -2 0 2",
    ),
    "times in exposure.txt": (
        lambda f: evaluation_scene(f, "320 80 20"),
        "span more than 30 stops, as exposure times would",
        "a.png b.png c.png --ev -2 0 2",
    ),
    "words in exposure.txt": (lambda f: numbered(f, "dark"), "got 12", "00.png 01.png 02.png --ev -2 0 2"),
    "exposure.txt of all": (lambda f: numbered(f, "0 -2 2 " * 4), "got 12", "01.png 00.png 02.png"),
    "exposure.txt of some": (lambda f: numbered(f, "0 0 2"), "got 12", "00.png 01.png 02.png --ev -2 0 2"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_what_is_advised_is_taken(tmp_path, case, monkeypatch):
    make, message, advised = ADVICE[case]
    folder = tmp_path / "a folder"
    folder.mkdir()
    make(folder)
    monkeypatch.chdir(folder)
    outcome = CliRunner().invoke(app, ["fuse", ".", "-o", "r.exr"])
    assert outcome.exit_code == 2, outcome.output
    said, _, line = outcome.stderr.rstrip("\n").partition("example: ")
    assert re.search(message, said), said
    assert line == f"safnet fuse {advised} -o r.exr"
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    assert (folder / "r.exr").is_file()


def test_what_is_advised_replaces_what_may_be_replaced(tmp_path):
    exposed(tmp_path, 1, 1, 1)
    (tmp_path / "r.exr").touch()
    with pytest.raises(ExposureError, match=r"-o \S*r\.exr --overwrite$"):
        open_bracket(sorted(tmp_path.glob("*.jpg")), besides=[tmp_path / "r.exr"])


def test_nothing_is_advised_where_nothing_would_work(tmp_path):
    grey(tmp_path, "a.png")
    grey(tmp_path, "b.png", size=(4, 4))
    with pytest.raises(ExposureError, match=r"one size, got .* with 4 x 4 pixels$"):
        open_bracket([tmp_path])


@pytest.mark.parametrize("given", [None, [-2, 0, 2]])
def test_a_truth_is_no_frame_where_the_exposures_count_the_others(tmp_path, given):
    evaluation_scene(tmp_path, "-2 0 2" if given is None else "")
    assert [frame.path.name for frame in open_bracket([tmp_path], given).frames] == ["a.png", "b.png", "c.png"]
    assert [path.name for path in find_series(tmp_path)[0].chosen] == ([] if given else ["a.png", "b.png", "c.png"])


def test_a_photograph_named_as_a_truth_stays_a_frame(tmp_path):
    for name, time in (("a.jpg", 1.0), ("gt.jpg", 4.0), ("z.jpg", 16.0)):
        grey(tmp_path, name, ExposureTime=time)
    assert len(open_bracket([tmp_path]).frames) == 3
    (tmp_path / "exposure.txt").write_text("-2 0 2")
    assert len(open_bracket([tmp_path]).frames) == 3
    with pytest.raises(ExposureError, match=r"must give 3 values, got 4: .*; gt\.jpg is named as the truth"):
        open_bracket([tmp_path], [0, 1, 2, 3])
