"""The command `safnet fuse`, from files to files, and its refusals: one line, exit code 2, nothing written."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import OpenImageIO as oiio
import pytest
import torch
import typer.main
from PIL import Image
from typer.testing import CliRunner

import safnet
import safnet_ops
from safnet.cli import app
from safnet.cli.fuse import join_exposures
from safnet.pictures import INSPECTION_FILES
from safnet.weights import save_model
from tests.support.frames import save_frame
from tests.support.models import plain_model
from tests.support.scenes import make_radiance

HEIGHT, WIDTH = 40, 56
EVS = (-2, 0, 2)
SUMMARY = r"56 x 40, EV -2 0 \+2, \d+\.\d s, peak memory \d+\.\d GiB: .*{}\n"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model that estimates no motion and refines nothing: what it makes of a still scene is known."""
    path = tmp_path_factory.mktemp("weights") / "plain.safetensors"
    save_model(plain_model(), path)
    return str(path)


@pytest.fixture
def radiance():
    """A still scene that the reference exposure (4 times the short one's light) does not clip."""
    ramp = np.linspace(0.002, 0.24, WIDTH, dtype=np.float32)
    return np.stack([np.tile(ramp * gain, (HEIGHT, 1)) for gain in (1.0, 0.8, 0.6)], 2)


def expose(radiance, ev):
    ldr = (radiance * 2.0 ** (ev - EVS[0])).clip(0, 1) ** (1 / 2.2)
    return np.round(ldr * 255).astype(np.uint8)


@pytest.fixture
def folder(tmp_path, radiance):
    """Three PNG frames whose order by name is not that of their exposures."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for name, ev in (("a.png", 2), ("b.png", -2), ("c.png", 0)):
        save_frame(folder / name, expose(radiance, ev))
    return folder


@pytest.fixture
def frames(folder):
    return [folder / name for name in ("a.png", "b.png", "c.png")]


def fuse(*arguments):
    return CliRunner().invoke(app, ["fuse", *map(str, arguments)])


def read(path):
    source = oiio.ImageInput.open(str(path))
    return source.read_image(0, 0, 0, 3, "float")


def assert_radiance(path, radiance):
    """Equal up to the frames' 8 bits."""
    assert np.allclose(read(path), radiance, rtol=0.08, atol=4e-4)
    assert np.abs(read(path) - radiance).mean() < 1e-3


@pytest.mark.parametrize("name", ["result.exr", "result.hdr", "result.tif", "result.jpg"])
def test_fuses_in_any_order(tmp_path, frames, radiance, weights, name):
    output = tmp_path / name
    outcome = fuse(frames[2], frames[0], frames[1], "--ev", 0, 2, -2, "--trust", "-o", output, "--model", weights)
    assert outcome.exit_code == 0, outcome.output
    assert re.fullmatch(SUMMARY.format(re.escape(name)), outcome.stdout)
    if name == "result.jpg":  # of which 1 is where the reference exposure clips
        assert np.median(np.abs(read(output) / (4 * radiance) - 1)) < 0.04
    else:
        assert_radiance(output, radiance)


def test_negative_evs_are_taken_as_written(tmp_path, frames, radiance, weights):
    output = tmp_path / "result.exr"
    assert (
        fuse("--ev", "-2", "0", "2", frames[1], frames[2], frames[0], "-o", output, "--model", weights).exit_code == 0
    )
    assert_radiance(output, radiance)


@pytest.mark.parametrize(
    "given",
    [
        ["-2,0,2"],
        ["-2,", "0,", "2"],
        ["\N{MINUS SIGN}2", "0", "+2"],
        ["-1.5", ".5", "2.5"],
        ["-1,5", "0,5", "2,5"],
        ["-1,5; 0,5; 2,5"],
        ["1/80", "1/20", "1/5"],
        ["1/80,1/20,1/5"],
        ["1/2", "2", "8"],
        ["0.25s", "1s", "4s"],
    ],
)
@pytest.mark.parametrize("form", [("--ev", "{}"), ("--ev={}",)])
def test_evs_as_people_write_them(tmp_path, frames, radiance, weights, given, form):
    output = tmp_path / "result.exr"
    words = [*(part.format(given[0]) for part in form), *given[1:]]
    outcome = fuse("-o", output, *words, frames[1], frames[2], frames[0], "--trust", "--model", weights)
    assert outcome.exit_code == 0, outcome.output
    assert "EV -2 0 +2, " in outcome.stdout
    assert_radiance(output, radiance)


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        (["--ev", "-2", "0", "2", "4"], ["--ev=-2 0 2 4"]),
        (["--ev", "-2", "0", "2", "1"], ["--ev=-2 0 2", "1"]),  # a folder
        (["--ev", *"123456789", "10"], ["--ev=1 2 3 4 5 6 7 8 9", "10"]),
        (["--ev", "-2,0,2", "4"], ["--ev=-2,0,2", "4"]),
        (["--ev", "-2", "0", "a.jpg", "2"], ["--ev=-2 0", "a.jpg", "2"]),
        (["--ev=-2,0,2", "-o", "x"], ["--ev=-2,0,2", "-o", "x"]),
        (["a", "--", "--ev", "1", "2"], ["a", "--", "--ev", "1", "2"]),
        (["--ev"], ["--ev"]),
    ],
)
def test_words_that_belong_to_ev(given, joined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if joined[-1] == "1":
        (tmp_path / "1").mkdir()
    assert join_exposures(given) == joined


def test_exposures_and_camera_curve_are_measured_unless_they_are_trusted(tmp_path, weights):
    radiance = make_radiance(height=128, width=192)
    ldr = [np.clip(radiance * 2.0 ** (ev - EVS[0]), 0, 1) ** (1 / 2.2) for ev in EVS]
    cameras = {"straight": ldr, "contrast": [x**1.6 / (x**1.6 + (1 - x) ** 1.6) for x in ldr]}
    for name, pictures in cameras.items():
        (tmp_path / name).mkdir()
        for number, picture in enumerate(pictures):
            save_frame(tmp_path / name / f"{number}.png", np.round(picture * 255).astype(np.uint8))

    def summary(name, evs, *options):
        output = tmp_path / f"{name}{len(options)}.exr"
        outcome = fuse(tmp_path / name, "--ev", *evs, "-o", output, "--model", weights, *options)
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout

    measured = re.search(r"EV -2 0 \+1\.8 \(measured: EV (\S+) 0 \+(\S+)\), ", summary("straight", (-2, 0, 1.8)))
    assert [float(ev) for ev in measured.groups()] == pytest.approx([-2, 2], abs=0.02)
    assert "EV -2 0 +1.8, " in summary("straight", (-2, 0, 1.8), "--trust")
    assert "camera curve measured" in summary("contrast", EVS)
    assert "measured" not in summary("contrast", EVS, "--trust")


def test_folder_with_exposure_file(tmp_path, folder, radiance, weights):
    (folder / "exposure.txt").write_text("2\n-2\n0\n")
    output = folder / "result.exr"
    for _ in range(2):  # the second time, the first result lies among the frames
        outcome = fuse(folder, "-o", output, "--model", weights, "--overwrite", "--preview", folder / "preview.png")
        assert outcome.exit_code == 0, outcome.output
    assert_radiance(output, radiance)


def test_exif_exposures(tmp_path, radiance, weights):
    for name, ev, time in (("a.jpg", 0, 1 / 50), ("b.jpg", 2, 1 / 12.5), ("c.jpg", -2, 1 / 200)):
        spec = oiio.ImageSpec(WIDTH, HEIGHT, 3, "uint8")
        for key, value in (("ExposureTime", time), ("FNumber", 8.0), ("compression", "jpeg:100")):
            spec.attribute(key, value)
        out = oiio.ImageOutput.create("a.jpg")
        assert out.open(str(tmp_path / name), spec)
        assert out.write_image(expose(radiance, ev))
        out.close()
    outcome = fuse(tmp_path, "-o", tmp_path / "result.exr", "--model", weights)
    assert outcome.exit_code == 0, outcome.output
    assert np.abs(read(tmp_path / "result.exr") - radiance).mean() < 3e-3


def test_pictures_beside_the_result(tmp_path, folder, weights):
    arguments = [folder, "--ev", 2, -2, 0, "-o", tmp_path / "result.exr", "--model", weights]
    arguments += ["--preview", tmp_path / "preview.jpg", "--tonemap", "reinhard", "--inspect", tmp_path / "steps"]
    outcome = fuse(*arguments, "--depth", "float", "--tile", 24, "--threads", torch.get_num_threads())
    assert outcome.exit_code == 0, outcome.output
    assert {path.name for path in tmp_path.iterdir()} == {"frames", "result.exr", "preview.jpg", "steps"}
    assert {path.name for path in (tmp_path / "steps").iterdir()} == set(INSPECTION_FILES)
    assert read(tmp_path / "preview.jpg").shape == (HEIGHT, WIDTH, 3)
    assert (read(tmp_path / "steps" / "flow_long.png") == 1).all()
    assert str(oiio.ImageInput.open(str(tmp_path / "result.exr")).spec().format) == "float"
    again = fuse(*arguments)
    assert again.exit_code == 2
    assert "--output" in again.stderr
    assert fuse(*arguments, "--overwrite").exit_code == 0


def test_reduced_precision(tmp_path, frames, radiance, weights):
    output = tmp_path / "result.exr"
    outcome = fuse(*frames, "--ev", 2, -2, 0, "-o", output, "--model", weights, "--precision", "bfloat16")
    assert outcome.exit_code == 0, outcome.output
    assert_radiance(output, radiance)


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def replaced(path, new):
    save_frame(path, new)
    return path


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])
    return path


def make(path, folder=False):
    path.mkdir() if folder else path.write_text("old")
    return path


# Each case: arguments from (frames, tmp_path), and what the one line on stderr must say.
OK = ("--ev", 2, -2, 0)
REFUSALS = {
    "one frame": (lambda f, t: [f[0], "-o", t / "r.exr"], r"2 to 9 files or one folder, got 1 \(a\.png\)"),
    "ten frames": (
        lambda f, t: [*f, *f, *f, f[0], "-o", t / "r.exr"],
        r"2 to 9 files or one folder, got 10 .*choose some",
    ),
    "empty folder": (lambda f, t: [make(t / "none", True), "-o", t / "r.exr"], r"none must hold 2 to 9 frames, got 0"),
    "other reference": (
        lambda f, t: [*f, *OK, "-o", t / "r.exr", "--reference", t / "z.png"],
        r"--reference must be one of the frames b\.png, c\.png, a\.png, got .*z\.png",
    ),
    "same frame": (lambda f, t: [f[0], f[1], f[1], *OK, "-o", t / "r.exr"], r"got .*b\.png twice"),
    "other size": (
        lambda f, t: [*f[:2], replaced(f[2], np.zeros((9, 9, 3), np.uint8)), *OK, "-o", t / "r.exr"],
        r"one size, got .*a\.png with 56 x 40 and .*c\.png with 9 x 9",
    ),
    "no exposures": (lambda f, t: [*f, "-o", t / "r.exr"], r"no exposure time in .*a\.png.*--ev -2 0 2"),
    "equal exposures": (lambda f, t: [*f, "--ev", 0, 2, 2, "-o", t / "r.exr"], r"must differ, got a\.png 0, b\.png 2"),
    "two exposures": (
        lambda f, t: [*f, "-o", t / "r.exr", "--ev", -2, 0],
        r"--ev must give 3 values, got 2: -2 0",
    ),
    "one exposure": (
        lambda f, t: [*f, "-o", t / "r.exr", "--ev", "1"],
        r"--ev must be 2 to 9 exposures in stops, for example --ev -2 0 2, .*, got '1'",
    ),
    "four exposures": (lambda f, t: [*f, "-o", t / "r.exr", "--ev", "1,2,3,4"], r"must give 3 values, got 4: 1 2 3 4"),
    "words": (lambda f, t: [*f, "-o", t / "r.exr", "--ev", "dark", 0, 2], r"for example .*, got 'dark'"),
    "frames after ev": (lambda f, t: ["-o", t / "r.exr", "--ev", *f], r"for example .*, got '.*a\.png'"),
    "infinite": (lambda f, t: [*f, "-o", t / "r.exr", "--ev", 0, 2, "inf"], r"inf does not exist"),
    "odd fraction": (lambda f, t: [*f, "-o", t / "r.exr", "--ev", "0 1/80 1/20"], r"1/80 is neither .*-1/3 0 1/3"),
    "no time": (lambda f, t: [*f, "-o", t / "r.exr", "--ev", "0s 1s 4s"], r"times must be above 0, .*, got '0s 1s 4s'"),
    "exposure times": (lambda f, t: [*f, "--ev", 320, 80, 20, "-o", t / "r.exr"], r"as exposure times would"),
    "missing frame": (lambda f, t: [*f[:2], t / "gone.png", *OK, "-o", t / "r.exr"], r"gone\.png does not exist"),
    "no picture": (lambda f, t: [*f[:2], make(t / "x.png"), *OK, "-o", t / "r.exr"], r"x\.png cannot be read"),
    "foreign frame": (
        lambda f, t: [*f[:2], make(t / "x.bmp"), *OK, "-o", t / "r.exr"],
        r"x\.bmp: frames must be \.jpg.* convert it to TIFF or PNG",
    ),
    "truncated": (lambda f, t: [*f[:2], truncated(f[2]), *OK, "-o", t / "r.exr"], r"c\.png cannot be read"),
    "no folder": (
        lambda f, t: [*f, *OK, "-o", t / "gone" / "r.exr"],
        r"--output .*gone/r\.exr: the folder .*gone does not",
    ),
    "existing": (
        lambda f, t: [*f, *OK, "-o", make(t / "r.exr")],
        r"--output .*r\.exr exists already; give --overwrite",
    ),
    "format": (lambda f, t: [*f, *OK, "-o", t / "r.gif"], r"--output .*r\.gif: the name must end in \.exr, \.hdr"),
    "depth": (lambda f, t: [*f, *OK, "-o", t / "r.tif", "--depth", "half"], r"--depth half does not fit .*r\.tif"),
    "depth of a JPEG": (
        lambda f, t: [*f, *OK, "-o", t / "r.jpg", "--depth", "half"],
        r"--depth half does not fit .*r\.jpg: \.jpg holds 8 bits and a gain map",
    ),
    "space of a JPEG": (
        lambda f, t: [*f, *OK, "-o", t / "r.jpg", "--space", "p3"],
        r"--space p3 does not fit .*r\.jpg: \.jpg files are of Rec\.709",
    ),
    "curve": (lambda f, t: [*f, *OK, "-o", t / "r.exr", "--curve", "magic"], r"--curve must be auto, .* got 'magic'"),
    "look": (
        lambda f, t: [*f, *OK, "-o", t / "r.exr", "--look", "flat", "--tonemap", "mu-law"],
        r"--look flat is one of --tonemap photo, got --tonemap mu-law",
    ),
    "over a frame of the folder": (
        lambda f, t: [
            f[0].parent,
            *OK,
            "-o",
            replaced(f[0].with_name("d.tif"), np.zeros((9, 9, 3), np.uint8)),
            "--overwrite",
        ],
        r"d\.tif is a picture of the folder whose frames are to be fused",
    ),
    "preview format": (
        lambda f, t: [*f, *OK, "-o", t / "r.exr", "--preview", t / "p.gif"],
        r"--preview .*p\.gif: the name",
    ),
    "preview exists": (
        lambda f, t: [*f, *OK, "-o", t / "r.exr", "--preview", make(t / "p.png")],
        r"--preview .*p\.png exists already",
    ),
    "inspect folder": (
        lambda f, t: [*f, *OK, "-o", t / "r.exr", "--inspect", t / "no" / "steps"],
        r"--inspect .*steps: the folder .*no does not exist",
    ),
    "inspect file": (
        lambda f, t: [*f, *OK, "-o", t / "r.exr", "--inspect", make(t / "i")],
        r"--inspect .*i is not a folder",
    ),
    "over a frame": (
        lambda f, t: [*f, *OK, "-o", t / "r.exr", "--preview", f[0], "--overwrite"],
        r"--preview .*a\.png is a frame too",
    ),
    "model": (lambda f, t: [*f, *OK, "-o", t / "r.exr", "--model", "safnet-x"], r"model 'safnet-x' is neither shipped"),
    "weights": (lambda f, t: [*f, *OK, "-o", t / "r.exr", "--model", t / "w.pth"], r"w\.pth' does not exist"),
    "device": (lambda f, t: [*f, *OK, "-o", t / "r.exr", "--device", "abacus"], r"--device abacus cannot be used"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused(tmp_path, frames, weights, case):
    arguments, message = REFUSALS[case]
    arguments = arguments(frames, tmp_path)
    if "--model" not in arguments:
        arguments += ["--model", weights]
    before = snapshot(tmp_path)
    outcome = fuse(*arguments)
    assert outcome.exit_code == 2, outcome.output
    assert re.fullmatch(rf"error: .*{message}.*\n", outcome.stderr), outcome.stderr
    assert outcome.stdout == ""
    assert snapshot(tmp_path) == before


# ---- all commands ----------------------------------------------------------------------------------------------------

COMMANDS = typer.main.get_command(app).commands
NOT_A_VALUE = "no-such-value"


def options(command):
    return [parameter for parameter in COMMANDS[command].params if parameter.param_type_name == "option"]


def takes_anything(command, option):
    """Paths and names are judged by the functions that get them, which have tests of their own."""
    function = next(
        info.callback for info in app.registered_commands if command == (info.name or info.callback.__name__)
    )
    kind = get_type_hints(function)[option.name]
    return {kind, *get_args(kind)} & {bool, str, Path, list[str], list[Path]}


@pytest.mark.parametrize(
    ("command", "option"),
    [(name, option.opts[0]) for name in COMMANDS for option in options(name) if not takes_anything(name, option)],
)
def test_bad_values_are_refused_in_one_line(command, option):
    words = next(o.nargs for o in options(command) if option in o.opts)
    outcome = CliRunner().invoke(app, [command, option, *[NOT_A_VALUE] * words])
    assert outcome.exit_code == 2
    assert re.fullmatch(rf"error: .*{option}\b.*{NOT_A_VALUE}.*\n", outcome.stderr), outcome.stderr
    assert outcome.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fuse", "a.jpg", "-o", "r.exr", "--threads", "0"], r"--threads.*\b0\b"),
        (["fuse", "a.jpg", "-o", "r.exr", "--tile", "-1"], r"--tile.*-1"),
        (["fuse", "-o", "r.exr", "--tone-map", "magic"], r"--tone-map"),
        (["fuse", "-o", "r.exr"], r"FRAMES|frames"),
        (["fuse", "a.jpg"], r"--output"),
        (["fuse", "a.jpg", "--ev"], r"--ev"),
        (["fuse", "a.jpg", "--ev=-2,0,2", "-o"], r"-o"),
        (["evaluate", "--root", "x"], r"--dataset.*kalantari17"),
        (["evaluate", "--peak-luminance", "0"], r"--peak-luminance.*\b0"),
        (["fuse", "a.jpg", "-o", "r.exr", "--brightness", "9"], r"--brightness.*9"),
        (["fuse", "a.jpg", "-o", "r.exr", "--space", "srgb"], r"--space.*srgb"),
        (["synthesize", "a", "b", "--size", "3"], r"--size"),
        (["synthesize", "a", "b", "c"], r"\bc\b"),
        (["train"], r"--out"),
        (["fuze"], r"fuze"),
        (["--versions"], r"--versions"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message):
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 2
    assert re.fullmatch(rf"error: .*({message}).*\n", outcome.stderr), outcome.stderr
    assert outcome.stdout == ""


def run_python(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_no_heavy_library(arguments):
    program = f"""
import sys
from safnet.cli import app
app({arguments}, standalone_mode=False)
print(sorted(name for name in ("torch", "numpy", "OpenImageIO", "safnet_ops", "yaml") if name in sys.modules))
"""
    output = run_python(program)
    assert len(output.splitlines()) > 1
    assert ast.literal_eval(output.splitlines()[-1]) == []


def test_the_package_imports_what_is_used():
    program = """
import sys, safnet
assert "torch" not in sys.modules
assert safnet.load_model.__name__ == "load_model"
assert "torch" in sys.modules
"""
    run_python(program)
    for name in safnet.__all__:
        assert getattr(safnet, name) is not None
    assert set(safnet.__all__) <= set(dir(safnet))
    with pytest.raises(AttributeError, match="'safnet' has no attribute 'fuze'"):
        safnet.fuze  # noqa: B018


def test_version():
    outcome = CliRunner().invoke(app, ["--version"])
    assert outcome.exit_code == 0
    assert outcome.stdout == f"safnet {safnet_ops.__version__}\n"


def test_info(monkeypatch):
    outcome = CliRunner().invoke(app, ["info"])
    assert outcome.exit_code == 0
    assert f"torch {torch.__version__}" in outcome.stdout
    assert "fused_fuse" in outcome.stdout
    assert "its other 3x3 convolutions on CPU only" in outcome.stdout
    monkeypatch.setattr(safnet.model, "BEATS_LIBRARY", ("cpu", "cuda"))
    assert "its other 3x3 convolutions on CPU, CUDA only" in CliRunner().invoke(app, ["info"]).stdout


def test_without_a_command_there_is_help():
    outcome = CliRunner().invoke(app, [])
    assert outcome.exit_code == 2
    assert "fit-refine" in outcome.stdout


def test_want_of_memory_is_one_line(tmp_path, frames, weights, monkeypatch):
    def greedy(*arguments, **options):
        return torch.empty(2**50)

    monkeypatch.setattr("safnet.pipeline.fuse_exposures", greedy)
    outcome = fuse(*frames, *OK, "-o", tmp_path / "r.exr", "--model", weights)
    assert outcome.exit_code == 1
    assert re.fullmatch(r"error: out of memory: frames of \d+ x \d+ need about .* GiB\n", outcome.stderr)


def test_slow_arithmetic_is_noted(tmp_path, frames, weights, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    outcome = fuse(*frames, *OK, "-o", tmp_path / "r.exr", "--model", weights, "--precision", "bfloat16")
    assert outcome.exit_code == 0
    assert re.fullmatch(r"note: this CPU has no bfloat16 arithmetic; .*\n", outcome.stderr)


def test_help_names_every_option():
    outcome = CliRunner().invoke(app, ["fuse", "--help"], env={"COLUMNS": "200"})
    assert outcome.exit_code == 0
    for option in ("--output", "--ev", "--preview", "--tonemap", "--inspect", "--model", "--precision", "--device"):
        assert option in outcome.stdout


def save_mask(path, pixels):
    Image.fromarray(pixels).save(path)
    return path


def test_a_painted_mask_of_any_kind_and_size(tmp_path, frames, weights):
    """The left half of the frame; once as large as it, once half as large, in 16 bits, as transparency, and turned by EXIF."""
    half = np.zeros((HEIGHT, WIDTH), np.uint8)
    half[:, : WIDTH // 2] = 255
    clear = np.dstack([np.full((HEIGHT, WIDTH, 3), 255, np.uint8), half])
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(half))).save(tmp_path / "turned.png", exif=turned)
    masks = [
        save_mask(tmp_path / "plain.png", half),
        save_mask(tmp_path / "small.png", half[::2, ::2]),
        save_mask(tmp_path / "large.png", half.repeat(3, 0).repeat(3, 1)),
        save_mask(tmp_path / "deep.png", half.astype(np.uint16) * 257),
        save_mask(tmp_path / "clear.png", clear),
        tmp_path / "turned.png",
    ]
    shown = []
    for mask in masks:
        steps = tmp_path / f"steps_{mask.stem}"
        outcome = fuse(
            *frames, "--ev", 2, -2, 0, "--trust", "--model", weights, "--mask", mask, "--ghosts", "off",
            "-o", tmp_path / f"{mask.stem}.exr", "--inspect", steps,
        )  # fmt: skip
        assert outcome.exit_code == 0, outcome.output
        shown.append(np.asarray(Image.open(steps / "mask_short.png"))[..., 0].astype(int))
    assert (shown[0][:, : WIDTH // 2] == 0).all()
    assert (shown[0][:, WIDTH // 2 :] == 255).all()
    for other in shown[1:]:
        away = np.abs(np.arange(WIDTH) - WIDTH // 2 + 0.5) > 2
        assert np.array_equal(other[:, away], shown[0][:, away])


def test_a_mask_in_the_folder_is_no_frame(tmp_path, folder, weights, radiance):
    mask = save_mask(folder / "aaa.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    (folder / "exposure.txt").write_text("2 -2 0")
    output = tmp_path / "result.exr"
    outcome = fuse(folder, "--trust", "--model", weights, "--mask", mask, "--fusion-only", "-o", output)
    assert outcome.exit_code == 0, outcome.output
    assert_radiance(output, radiance)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.png", r"--mask \S+gone\.png is no file"),
        ("text.png", r"--mask \S+text\.png cannot be read"),
        ("", r"--mask \S+ is no file"),
        ("cut.png", r"--mask \S+cut\.png cannot be read, it may be truncated"),
        ("square.png", r"--mask \S+square\.png must be \d+ x \d+ pixels like the frames, or .* got 30 x 30"),
        ("frames/a.png", r"--mask \S+a\.png is a frame too"),
        ("result.exr", r"--output \S+result\.exr is --mask too"),
    ],
)
def test_masks_that_cannot_be_are_refused(tmp_path, frames, weights, name, message):
    (tmp_path / "text.png").write_text("white")
    save_mask(tmp_path / "square.png", np.zeros((30, 30), np.uint8))
    save_mask(tmp_path / "cut.png", np.random.default_rng(0).integers(0, 255, (40, 56)).astype(np.uint8))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    (tmp_path / "result.exr").write_bytes(b"")
    outcome = fuse(
        *frames, "--ev", 2, -2, 0, "--model", weights, "--mask", tmp_path / name, "-o", tmp_path / "result.exr",
        "--overwrite",
    )  # fmt: skip
    assert outcome.exit_code == 2
    assert re.fullmatch(rf"error: .*{message}.*\n", outcome.stderr), outcome.stderr
    assert (tmp_path / "result.exr").read_bytes() == b""
