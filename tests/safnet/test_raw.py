"""Camera raw files, made here: a Bayer pattern of known light, white balance and black level, against the truth."""

import sys
from fractions import Fraction

import numpy as np
import pytest
import tifffile
import torch
from typer.testing import CliRunner

import safnet
from safnet.cli import app
from safnet.colour import LINEAR, REC709, SRGB, conversion
from safnet.images import ImageError, read_frame, read_frames, read_header
from safnet.radiance import GAMMA, ldr_values
from tests.support.models import plain_model

BLACK, WHITE = 512, 15000
BALANCE = (2.0, 1.0, 1.5)  # multipliers that make white of the camera's R, G, B
TO_CAMERA = np.array([[0.9, -0.2, -0.05], [-0.4, 1.2, 0.25], [-0.08, 0.2, 0.6]])  # from XYZ
HEIGHT, WIDTH = 96, 128
EVS = (-2, 0, 2)


def rational(value):
    found = Fraction(float(value)).limit_denominator(10000)
    return found.numerator, found.denominator


def camera_matrix():
    """Linear Rec.709 -> the balanced camera, of which white is (1, 1, 1)."""
    matrix = TO_CAMERA @ REC709.to_xyz()
    return matrix / matrix.sum(1, keepdims=True)


def save_dng(path, light, time=1 / 50, balance=BALANCE, turned=1):
    """Write what a sensor of RGGB sees of linear Rec.709 (H, W, 3) in which 1 is white that just clips, as the camera
    balanced by BALANCE has it; `balance` is what the file says."""
    seen = light @ camera_matrix().T / np.array(BALANCE) * min(BALANCE)
    bayer = np.empty(light.shape[:2])
    for row, column, channel in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        bayer[row::2, column::2] = seen[row::2, column::2, channel]
    codes = np.round(BLACK + bayer * (WHITE - BLACK)).clip(0, WHITE).astype(np.uint16)
    tags = [
        (50706, "B", 4, (1, 4, 0, 0)),  # DNGVersion
        (50708, "s", 0, "Test camera"),
        (271, "s", 0, "Maker"),
        (272, "s", 0, "Camera 1"),
        (274, "H", 1, turned),
        (33421, "H", 2, (2, 2)),  # CFARepeatPatternDim
        (33422, "B", 4, (0, 1, 1, 2)),
        (50714, "H", 1, BLACK),
        (50717, "H", 1, WHITE),
        (50728, "2I", 3, [number for value in balance for number in rational(1 / value)]),  # AsShotNeutral
        (50721, "2i", 9, [number for value in TO_CAMERA.ravel() for number in rational(value)]),
        (50778, "H", 1, 21),  # CalibrationIlluminant1: D65
        (33434, "2I", 1, rational(time)),
        (33437, "2I", 1, (8, 1)),
        (34855, "H", 1, 100),
        (33432, "s", 0, "Somebody"),
    ]
    tifffile.imwrite(path, codes, photometric=32803, extratags=tags, metadata=None, software=False)
    return path


def smooth_light(seed=3):
    """Colours that change so slowly that any demosaicing gets them right."""
    coarse = np.random.default_rng(seed).uniform(0.02, 0.22, (4, 5, 3))
    light = torch.nn.functional.interpolate(
        torch.from_numpy(coarse).permute(2, 0, 1)[None], (HEIGHT, WIDTH), mode="bicubic", align_corners=True
    )
    return light[0].permute(1, 2, 0).numpy().clip(0.01)


def in_rec709(frame, header):
    light = ldr_values(frame)[0].permute(1, 2, 0).numpy().astype(np.float64) ** GAMMA
    return light @ conversion(header.colour.space, REC709).T


def test_light_is_that_of_the_scene(tmp_path):
    light = smooth_light()
    header = read_header(save_dng(tmp_path / "a.dng", light))
    assert (header.width, header.height) == (WIDTH, HEIGHT)
    assert (header.exposure_time, header.f_number, header.iso) == pytest.approx((1 / 50, 8, 100))
    assert header.colour.is_linear
    kept = {name: value for name, _, value in header.metadata}
    assert (kept["Make"], kept["Model"], kept["Copyright"]) == ("Maker", "Camera 1", "Somebody")
    found = in_rec709(read_frame(header), header)
    inner = (slice(4, -4), slice(4, -4))
    assert np.abs(found - light)[inner].max() < 0.006
    assert np.median(np.abs(found / light - 1)[inner]) < 0.004


def test_each_channel_clips_at_1_and_nothing_is_brightened(tmp_path):
    light = np.ones((HEIGHT, WIDTH, 3)) * np.linspace(0.1, 1.6, WIDTH)[None, :, None]
    header = read_header(save_dng(tmp_path / "a.dng", light))
    found = ldr_values(read_frame(header)).numpy()[0] ** GAMMA
    expected = light[HEIGHT // 2, :, 0].clip(max=1)
    assert np.abs(found[:, HEIGHT // 2, 4:-4] - expected[4:-4]).max() < 0.02
    assert (found[:, :, -30:] == 1).all()
    bright = read_header(
        save_dng(tmp_path / "bright.dng", light * 0.55)
    )  # of which LibRaw would make the brightest white
    assert ldr_values(read_frame(bright)).max() ** GAMMA == pytest.approx(0.88, abs=0.01)
    dark = read_header(save_dng(tmp_path / "dark.dng", light / 100))
    assert ldr_values(read_frame(dark)).max() ** GAMMA == pytest.approx(0.016, rel=0.05)


def test_the_middle_frame_balances_all(tmp_path):
    light = smooth_light()
    balances = ((1.2, 1.0, 2.5), BALANCE, (3.0, 1.0, 1.1))
    headers = [read_header(save_dng(tmp_path / f"{n}.dng", light, balance=b)) for n, b in enumerate(balances)]
    first, second, third = (ldr_values(frame) for frame in read_frames(headers))
    assert torch.equal(first, second)
    assert torch.equal(third, second)
    assert not torch.allclose(ldr_values(read_frame(headers[0])), second, atol=0.05), "alone, each as it says"


def test_frames_are_upright(tmp_path):
    light = smooth_light()
    header = read_header(save_dng(tmp_path / "a.dng", light, turned=6))
    assert (header.width, header.height) == (HEIGHT, WIDTH)
    found = in_rec709(read_frame(header), header)
    assert np.abs(found - np.rot90(light, -1))[4:-4, 4:-4].max() < 0.006


@pytest.fixture
def model():
    return plain_model()


def test_a_bracket_of_raw_files_is_fused_to_rec_709(tmp_path, model):
    light = smooth_light()  # the reference, of 4 times the short one's light, does not clip
    for number, ev in enumerate(EVS):
        save_dng(tmp_path / f"{number}.dng", light * 2.0**ev, time=2.0**ev / 50)
    result = safnet.fuse_files(tmp_path, model=model, global_motion=False)
    assert result.curve is None, "the sensor's curve is known"
    assert result.given_evs[2] - result.given_evs[0] == pytest.approx(4, abs=0.01)
    found = result.radiance[0].permute(1, 2, 0).numpy() * 4
    inner = (slice(4, -4), slice(4, -4))
    assert np.median(np.abs(found / light - 1)[inner]) < 0.01
    slope = np.polyfit(np.log(light[inner].ravel()), np.log(found[inner].ravel()), 1)[0]
    assert slope == pytest.approx(1, abs=0.02)


def test_a_curve_cannot_be_given(tmp_path):
    path = save_dng(tmp_path / "a.dng", smooth_light())
    with pytest.raises(ImageError, match=r"a\.dng: camera raw files are linear: --curve sRGB cannot be theirs"):
        read_header(path, SRGB)
    assert read_header(path, LINEAR).colour.is_linear


def test_damaged_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "a.nef").write_bytes(b"no picture" * 100)
    with pytest.raises(ImageError, match=r"a\.nef cannot be read by LibRaw: "):
        read_header(tmp_path / "a.nef")
    path = save_dng(tmp_path / "b.dng", smooth_light())
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ImageError, match=r"b\.dng cannot be read by LibRaw: [^\n]*$"):
        read_frame(read_header(path))


@pytest.mark.parametrize(
    ("name", "module", "message"), [("a.cr3", "rawpy", r"\[raw\]"), ("a.heic", "pillow_heif", r"\[heif\]")]
)
def test_without_the_library_the_extra_is_named(tmp_path, monkeypatch, name, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"data")
    outcome = CliRunner().invoke(app, ["fuse", *[str(tmp_path / name)] * 3, "-o", str(tmp_path / "r.exr")])
    assert outcome.exit_code == 2
    assert len(outcome.stderr.splitlines()) == 1
    with pytest.raises(ImageError, match=rf"need .*pip install 'safnet-ops{message}'"):
        read_header(tmp_path / name)
