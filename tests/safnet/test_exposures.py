"""Exposure values: where they come from, which wins, and what is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

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


def test_biases_are_offered_where_there_are_no_exposures():
    frames = [replace(frame(name), bias=bias) for name, bias in (("a", 0.0), ("b", -2.0), ("c", 2 / 3))]
    with pytest.raises(
        ExposureError, match=r"no exposure time .* biases are 0 -2 \+0\.667: .* give --ev 0 -2 \+0\.667$"
    ):
        exif_evs(frames)
    with pytest.raises(ExposureError, match=r"with --ev, for example"):
        exif_evs([replace(one, bias=0.0) for one in frames])


def test_exif_must_be_complete():
    with pytest.raises(ExposureError, match=r"no exposure time in the EXIF data of b\.jpg, c\.jpg; .*--ev -2 0 2"):
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
        ([320, 80, 20], "are they exposure times"),
        ([0, 2], "--ev must give 3 values, got 2: 0 2"),
    ],
)
def test_impossible_evs(evs, message):
    with pytest.raises(ExposureError, match=message):
        find_evs([frame("a.png"), frame("b.png"), frame("c.png")], evs)


def test_equal_exif_exposures_are_refused():
    with pytest.raises(ExposureError, match=r"EVs from EXIF must differ, got a\.png -4\.32.*give them with --ev"):
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
            ExposureError, match=r"must hold 2 to 9 frames, got 10 \(.*choose some, for example: .*a\.png .*j\.png"
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

    def test_of_several_brackets_one_is_advised(self, tmp_path):
        """As cameras number them: the middle exposure first, of two brackets in a row."""
        for number, time in enumerate((1 / 50, 1 / 200, 1 / 12, 1 / 50, 1 / 200, 1 / 12)):
            save_tagged(tmp_path / f"{number}.jpg", np.zeros((8, 8, 3), np.uint8), "uint8", ExposureTime=time)
        with pytest.raises(ExposureError, match=r"example: \S*1\.jpg \S*0\.jpg \S*2\.jpg$") as caught:
            open_bracket([tmp_path])
        advised = [Path(name) for name in str(caught.value).rsplit(": ", 1)[1].split()]
        assert [frame.path for frame in open_bracket(advised).frames] == advised, "what is advised is taken"

    def test_of_too_long_a_bracket_the_ends_are_advised(self, tmp_path):
        for number, time in enumerate((1, 16, 4, 0.25, 1 / 16, 2, 8, 0.5, 1 / 8, 1 / 32)):
            save_tagged(tmp_path / f"{number}.jpg", np.zeros((8, 8, 3), np.uint8), "uint8", ExposureTime=float(time))
        with pytest.raises(ExposureError, match=r"example: \S*9\.jpg \S*0\.jpg \S*1\.jpg$"):
            open_bracket([tmp_path])

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
