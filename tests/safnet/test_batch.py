"""Whole shoots: which pictures are brackets, and that each is fused once, whatever is stopped."""

import csv
import re
import shlex
import sys
import threading
import time

import numpy as np
import OpenImageIO as oiio
import psutil
import pytest
from typer.testing import CliRunner

from safnet.batch import TABLE, Job, find_series, fuse_job, fuse_jobs
from safnet.cli import app
from safnet.exposures import ExposureError
from safnet.images import read_header, read_ldr
from safnet.weights import save_model
from tests.support.frames import save_frame, save_tagged
from tests.support.models import plain_model
from tests.support.scenes import make_radiance

HEIGHT, WIDTH = 40, 56


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "plain.safetensors"
    save_model(plain_model(), path)
    return str(path)


def shoot(folder, number, seconds, time_, scene=0, size=(HEIGHT, WIDTH)):
    """One picture of a camera, some seconds after twelve."""
    light = 0.2 * make_radiance(seed=scene, height=size[0], width=size[1]) * 4 * time_ * 50
    codes = np.round(light.clip(0, 1) ** (1 / 2.2) * 255).astype(np.uint8)
    taken = f"2026:06:01 12:{seconds // 60:02d}:{seconds % 60:02d}"
    attributes = {"ExposureTime": time_, "FNumber": 8.0, "Exif__DateTimeOriginal": taken, "compression": "jpeg:98"}
    return save_tagged(folder / f"IMG_{number:04d}.jpg", codes, "uint8", **attributes)


BRACKET = (1 / 50, 1 / 200, 1 / 12.5)  # as cameras take them: the middle first


def shoot_bracket(folder, number, seconds, scene=0):
    for frame, time_ in enumerate(BRACKET):
        shoot(folder, number + frame, seconds + frame, time_, scene)


@pytest.fixture
def card(tmp_path):
    """Two brackets in a row, a picture alone, a bracket, three hardly different pictures, five exposures, and a text."""
    folder = tmp_path / "card"
    folder.mkdir()
    shoot_bracket(folder, 1, 0)
    shoot_bracket(folder, 4, 3, 1)
    shoot(folder, 7, 60, 1 / 100)
    shoot_bracket(folder, 8, 120, 2)
    for number, time_ in enumerate((1 / 100, 1 / 125, 1 / 80)):
        shoot(folder, 11 + number, 200 + number, time_)
    for number, stops in enumerate((0, -2, 2, -4, 4)):
        shoot(folder, 14 + number, 300 + number, 2.0**stops / 50, 3)
    (folder / "notes.txt").write_text("sunny")
    return folder


def numbers(paths):
    return [int(re.search(r"\d+", path.stem)[0]) for path in paths]


def test_brackets_are_found_by_exposure_and_time(card):
    series = find_series(card)
    assert [numbers(one.chosen) for one in series] == [[2, 1, 3], [5, 4, 6], [], [9, 8, 10], [], [17, 15, 14, 16, 18]]
    assert [numbers(one.frames) for one in series if not one.chosen] == [[7], [11, 12, 13]]
    assert [one.reason for one in series if not one.chosen] == [
        "1 frame",
        "exposures less than 0.6 EV apart: -0.322 0 +0.322",
    ]
    assert [one.name for one in series if one.chosen] == ["IMG_0001", "IMG_0004", "IMG_0008", "IMG_0014"]


def test_other_sizes_and_a_rest_begin_another_bracket(tmp_path):
    shoot(tmp_path, 1, 0, 1 / 50)
    shoot(tmp_path, 2, 1, 1 / 200)
    shoot(tmp_path, 3, 9, 1 / 12.5)
    assert [numbers(one.frames) for one in find_series(tmp_path)] == [[1, 2], [3]]
    shoot(tmp_path, 3, 2, 1 / 12.5, size=(WIDTH, HEIGHT))
    assert [numbers(one.frames) for one in find_series(tmp_path)] == [[1, 2], [3]]
    shoot(tmp_path, 3, 2, 1 / 12.5)
    assert [numbers(one.chosen) for one in find_series(tmp_path)] == [[2, 1, 3]]


def test_long_exposures_are_no_rest(tmp_path):
    for number, (seconds, time_) in enumerate(((0, 8.0), (9, 2.0), (12, 30.0))):
        shoot(tmp_path, number, seconds, time_)
    assert [numbers(one.chosen) for one in find_series(tmp_path)] == [[1, 0, 2]]


def test_of_small_steps_the_ends_and_the_middle_are_taken(tmp_path):
    for number in range(5):
        shoot(tmp_path, number, number, 2.0 ** (number / 2 - 6))
    assert [numbers(one.chosen) for one in find_series(tmp_path)] == [[0, 2, 4]]


def test_without_exif(tmp_path):
    for name in "abcdef":
        save_frame(tmp_path / f"{name}.png", np.zeros((8, 8, 3), np.uint8))
    assert all("no exposure time" in one.reason for one in find_series(tmp_path))
    assert [[path.stem for path in one.chosen] for one in find_series(tmp_path, 3)] == [list("abc"), list("def")]
    with pytest.raises(ExposureError, match=r"--every 4 does not fit the 6 frames in"):
        find_series(tmp_path, 4)
    (tmp_path / "exposure.txt").write_text("0 -2 2 0 -2 2")
    assert [[path.stem for path in one.chosen] for one in find_series(tmp_path)] == [list("bac"), list("edf")]


def run(*arguments):
    return CliRunner().invoke(app, ["batch", *map(str, arguments)])


def table(folder):
    with (folder / TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_card_is_fused_once(card, tmp_path, weights):
    out = tmp_path / "out"
    outcome = run(card, "-o", out, "--yes", "--model", weights)
    assert outcome.exit_code == 0, outcome.output
    assert "left out: IMG_0007.jpg (1 frame)" in outcome.stdout
    assert "IMG_0001.exr: IMG_0002.jpg IMG_0001.jpg IMG_0003.jpg" in outcome.stdout
    assert "4 fused, 0 done before, 0 failed" in outcome.stdout
    names = {f"IMG_{number:04d}{suffix}" for number in (1, 4, 8, 14) for suffix in (".exr", ".jpg")}
    assert {path.name for path in out.iterdir()} == names | {TABLE}
    rows = table(out)
    assert [row["result"] for row in rows] == ["IMG_0001.exr", "IMG_0004.exr", "IMG_0008.exr", "IMG_0014.exr"]
    assert [row["evs"] for row in rows] == ["-2 0 +2"] * 3 + ["-4 -2 0 +2 +4"]
    before = {path: path.read_bytes() for path in out.iterdir()}
    again = run(card, "-o", out, "--yes", "--model", weights)
    assert "0 fused, 4 done before, 0 failed" in again.stdout
    assert {path: path.read_bytes() for path in out.iterdir()} == before, "the table keeps what it knows"


def test_a_stopped_run_goes_on(card, tmp_path, weights):
    out = tmp_path / "out"
    run(card, "-o", out, "--yes", "--model", weights)
    (out / "IMG_0004.exr").unlink()
    (out / "IMG_0008.jpg").unlink()  # stopped between result and preview
    outcome = run(card, "-o", out, "--yes", "--model", weights)
    assert "2 fused, 2 done before, 0 failed" in outcome.stdout
    assert len(table(out)) == 4
    assert (out / "IMG_0008.jpg").is_file()


@pytest.mark.parametrize("form", ["tif", "dng", "avif"])
def test_results_in_the_folder_are_no_frames(card, weights, form):
    arguments = card, "-o", card, "--format", form, "--preview", "png", "--yes", "--model", weights
    assert "4 fused, 0 done before, 0 failed" in run(*arguments).stdout
    outcome = run(*arguments)
    assert "0 fused, 4 done before, 0 failed" in outcome.stdout
    assert f"IMG_0001.{form}: IMG_0002.jpg IMG_0001.jpg IMG_0003.jpg" in outcome.stdout


def test_a_frame_of_a_results_name_is_no_result(card, weights):
    before = {path: path.read_bytes() for path in card.iterdir()}
    outcome = run(card, "-o", card, "--format", "jpg", "--preview", "none", "--yes", "--model", weights)
    assert "0 fused, 0 done before, 4 failed" in outcome.stdout
    assert "IMG_0001.jpg exists already" in outcome.stderr
    assert {path: path.read_bytes() for path in card.iterdir() if path.name != TABLE} == before


def test_one_bad_bracket_stops_no_other(card, tmp_path, weights):
    data = (card / "IMG_0004.jpg").read_bytes()
    (card / "IMG_0004.jpg").write_bytes(data[: len(data) * 2 // 3])
    outcome = run(card, "-o", tmp_path / "out", "--yes", "--model", weights)
    assert outcome.exit_code == 0, outcome.output
    assert "3 fused, 0 done before, 1 failed" in outcome.stdout
    assert re.search(r"failed: IMG_0004\.exr: .*IMG_0004\.jpg cannot be read, it may be truncated", outcome.stderr)
    row = next(row for row in table(tmp_path / "out") if row["state"] == "failed")
    assert "truncated" in row["error"]
    strict = run(card, "-o", tmp_path / "out", "--yes", "--model", weights, "--strict")
    assert strict.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "-o", "out"], r"gone is no folder"),
        (["empty", "-o", "out"], r"empty holds no frames"),
        (
            ["card", "-o", "out", "--ev", "-2", "0", "2"],
            r"--ev is for brackets of 3 frames by name: give --every 3 too",
        ),
        (["card", "-o", "out", "--every", "5"], r"--every 5 does not fit the 18 frames"),
        (["card", "-o", "out", "--curve", "magic", "--yes"], r"--curve must be auto"),
        (
            ["card", "-o", "out", "--look", "flat", "--tonemap", "mu-law", "--yes"],
            r"--look flat is one of --tonemap photo",
        ),
        (["card", "-o", "out", "--model", "safnet-x", "--yes"], r"model 'safnet-x' is neither"),
        (["card", "-o", "out", "--cluster", "nonsense", "--yes"], r"--cluster nonsense does not answer"),
    ],
)
def test_bad_input_is_refused_in_one_line(card, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    outcome = run(*arguments)
    assert outcome.exit_code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", outcome.stderr), outcome.stderr
    assert not (tmp_path / "out").exists()


def without_exposures(folder):
    for number, level in enumerate((90, 20, 200) * 2):
        save_tagged(folder / f"{number}.png", np.full((HEIGHT, WIDTH, 3), level, np.uint8), "uint8")


def of_small_steps(folder):
    for number, time_ in enumerate((1 / 100, 1 / 125, 1 / 80)):
        shoot(folder, number, number, time_)


def of_another_count(folder):
    without_exposures(folder)
    (folder / "5.png").unlink()


# Each case: a folder without brackets, the options that its message ends with, and how many these fuse.
ADVICE = {
    "no exposures": (without_exposures, "batch {card} -o {out} --every 3 --ev 0 -2 2", 2),
    "small steps": (of_small_steps, "batch {card} -o {out} --every 3", 1),
    "another count": (
        of_another_count,
        "fuse {card}/1.png {card}/4.png {card}/0.png {card}/3.png {card}/2.png --ev ",
        None,
    ),
}


@pytest.mark.parametrize("case", ADVICE)
def test_what_is_advised_is_taken(tmp_path, case, monkeypatch):
    make, advised, count = ADVICE[case]
    monkeypatch.chdir(tmp_path)
    card, out = tmp_path / "a card", tmp_path / "out"
    card.mkdir()
    make(card)
    outcome = run("a card", "-o", "out")
    assert outcome.exit_code == 2, outcome.output
    line = outcome.stderr.rstrip("\n").partition("for example: ")[2]
    words = shlex.split(line)
    assert " ".join(words).startswith(f"safnet {advised.format(card=card, out=out)}")
    done = CliRunner().invoke(app, words[1:], input="y\n")
    assert done.exit_code == 0, done.output
    assert count is None or f"{count} fused, 0 done before, 0 failed" in done.stdout


def test_a_mask_serves_all_brackets(tmp_path, weights):
    card, out = tmp_path / "card", tmp_path / "out"
    card.mkdir()
    shoot_bracket(card, 1, 0)
    shoot_bracket(card, 4, 30, 1)
    (card / "exposure.txt").write_text("0 -2 2 0 -2 2")
    mask = save_frame(card / "mask.png", np.full((HEIGHT // 2, WIDTH // 2, 3), 255, np.uint8))
    more = ("--ghosts", "off", "--fusion-only", "--trust", "--yes", "--model", weights)
    outcome = run(card, "-o", out, "--mask", mask, *more)
    assert "2 fused, 0 done before, 0 failed" in outcome.stdout, outcome.output
    for number in (1, 4):
        frame = read_ldr(card / f"IMG_{number:04d}.jpg")
        found = oiio.ImageInput.open(str(out / f"IMG_{number:04d}.exr")).read_image("float")
        assert np.allclose(found, frame**2.2 / 4, rtol=2e-3, atol=1e-6)
    assert "--mask gone.png is no file" in run(card, "-o", out, "--mask", "gone.png", *more).stderr


def test_it_asks_unless_told_not_to(card, tmp_path, weights):
    no = CliRunner().invoke(app, ["batch", str(card), "-o", str(tmp_path / "out")], input="n\n")
    assert no.exit_code == 1
    assert "Fuse 4 brackets into" in no.stdout
    assert not (tmp_path / "out").exists()


def test_without_dask_the_extra_is_named(card, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    outcome = run(card, "-o", tmp_path / "out", "--yes", "--workers", 2)
    assert outcome.exit_code == 2
    assert re.fullmatch(r"error: .*pip install 'safnet-ops\[cluster\]'\n", outcome.stderr)


def test_a_process_that_is_killed_loses_nothing(tmp_path, weights):
    """Two processes; one is killed as soon as there is a first result."""
    card, out = tmp_path / "card", tmp_path / "out"
    card.mkdir()
    out.mkdir()
    count = 10
    for number in range(count):
        shoot_bracket(card, 10 * number, 20 * number, number)
    series = find_series(card)
    jobs = [Job(one.chosen, out / f"{one.name}.exr", None, {}, weights, "cpu", 1) for one in series]
    assert len(jobs) == count
    killed = []

    def kill_one():
        while not list(out.glob("*.exr")):
            time.sleep(0.01)
        workers = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
        workers[-1].kill()
        killed.append(workers[-1].pid)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    outcomes = fuse_jobs(jobs, out, workers=2)
    killer.join(timeout=5)
    assert killed
    assert len(outcomes) == count
    assert {outcome.state for outcome in outcomes} <= {"fused", "done"}
    rows = table(out)
    assert [row["result"] for row in rows] == sorted(job.output.name for job in jobs)
    shown = {
        path.name for path in out.iterdir() if not path.name.startswith(".")
    }  # what was killed leaves hidden files
    assert shown == {job.output.name for job in jobs} | {TABLE}
    for job in jobs:
        assert read_header(job.output).width == WIDTH


def test_the_same_job_twice_is_done_once(card, tmp_path, weights):
    one = find_series(card)[0]
    job = Job(one.chosen, tmp_path / "a.exr", tmp_path / "a.png", {}, weights, "cpu")
    assert [fuse_job(job).state, fuse_job(job).state] == ["fused", "done"]
    (tmp_path / "b.png").write_text("somebody else's")
    other = Job(one.chosen, tmp_path / "b.exr", tmp_path / "b.png", {}, weights, "cpu")
    assert fuse_job(other).state == "failed"
    assert (tmp_path / "b.png").read_text() == "somebody else's"
