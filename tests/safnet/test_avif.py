"""AVIF for HDR screens: what its boxes say, and the light that others read from it, against the truth."""

import struct
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import OpenImageIO as oiio
import pillow_heif
import pytest
from PIL import Image
from typer.testing import CliRunner

import safnet
from safnet.avif import BRIGHTEST, DIFFUSE_WHITE, write_avif
from safnet.cli import app
from safnet.colour import P3, REC709, REC2020, conversion
from safnet.images import ImageError, is_result, read_header
from safnet.pipeline import FusionWarning
from tests.support.frames import save_frame
from tests.support.models import plain_model
from tests.support.scenes import smooth_radiance

HEIGHT, WIDTH, EXPOSURE = 90, 130, 8.0
METADATA = (
    ("Make", oiio.TypeDesc("string"), "Maker"),
    ("Copyright", oiio.TypeDesc("string"), "\N{COPYRIGHT SIGN} Somebody"),
    ("ExposureTime", oiio.TypeDesc("float"), 0.25),
    ("Exif:LensModel", oiio.TypeDesc("string"), "50 mm"),
    ("Exif:DateTimeOriginal", oiio.TypeDesc("string"), "2024:05:06 07:08:09"),
    ("GPS:LatitudeRef", oiio.TypeDesc("string"), "N"),
    ("GPS:Latitude", oiio.TypeDesc("float[3]"), (47.0, 30.0, 0.0)),
)


def smooth_light():
    """Colours of BT.2020 from 12 stops below diffuse white to 3 above it."""
    return smooth_radiance(HEIGHT, WIDTH, (-12, 3), (-0.7, 0)) / np.float32(EXPOSURE)


def candelas(codes):
    """cd/m2 of PQ codes in [0, 1], by ITU-R BT.2100, table 4."""
    m1, m2, c1, c2, c3 = 1305 / 8192, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
    raised = codes ** (1 / m2)
    return 10000 * (np.maximum(raised - c1, 0) / (c2 - c3 * raised)) ** (1 / m1)


def read(path):
    """cd/m2 in BT.2020, by OpenCV's build of libavif."""
    codes = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert codes.dtype == np.uint16
    return candelas(codes[..., ::-1] / 1023)


def box(data, *names):
    """The content of a box in boxes."""
    for name in names:
        place = 4 if name in ("hdlr", "pitm", "iloc", "iinf", "iprp") else 0
        while data[place + 4 : place + 8] != name.encode():
            place += struct.unpack_from(">I", data, place)[0]
            assert place < len(data), name
        data = data[place + 8 : place + struct.unpack_from(">I", data, place)[0]]
    return data


def steps(light):
    """What one of PQ's 1023 steps is worth, as a share of the light."""
    codes = np.linspace(0, 1, 1024)
    table = candelas(codes)
    place = np.searchsorted(table, light).clip(1, 1023)
    return (table[place] - table[place - 1]) / light


@pytest.mark.parametrize("space", [REC2020, REC709, P3])
def test_light_comes_back_within_a_step_of_pq(tmp_path, space):
    wanted = smooth_light()
    light = (wanted @ conversion(REC2020, space).T).astype(np.float32) if space is not REC2020 else wanted
    assert write_avif(tmp_path / "a.avif", light, EXPOSURE, space, METADATA) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.avif"]
    wanted = wanted * EXPOSURE * DIFFUSE_WHITE
    error = np.abs(read(tmp_path / "a.avif") / wanted - 1)
    assert (error / steps(wanted)).max() < 2, "half a step, and one for YCbCr"
    bright = wanted > 1
    assert np.median(error[bright]) < 0.005
    assert error[bright].max() < 0.03
    assert wanted.max() > 1000


def test_other_decoders_agree(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    write_avif(tmp_path / "a.avif", smooth_light(), EXPOSURE, REC2020, METADATA)
    codes = imagecodecs.avif_decode((tmp_path / "a.avif").read_bytes())
    assert np.abs(candelas(codes / 1023) - read(tmp_path / "a.avif")).max() == 0
    with Image.open(tmp_path / "a.avif") as picture:  # which shows 8 bits
        shown = np.asarray(picture.convert("RGB")).astype(int)
    assert np.abs(shown - codes * (255 / 1023)).max() <= 3


def test_primaries_curve_and_bits_are_signalled(tmp_path):
    write_avif(tmp_path / "a.avif", smooth_light(), EXPOSURE, REC2020, METADATA)
    properties = box((tmp_path / "a.avif").read_bytes(), "meta", "iprp")
    container = box((tmp_path / "a.avif").read_bytes()[0:], "meta")
    assert box(container, "iprp") == properties
    ipco = properties[8 : struct.unpack_from(">I", properties)[0]]
    assert box(ipco, "colr") == b"nclx" + struct.pack(">HHHB", 9, 16, 9, 0x80)
    assert box(ipco, "pixi") == bytes([0, 0, 0, 0, 3, 10, 10, 10])
    found = pillow_heif.open_heif(tmp_path / "a.avif")
    profile = found.info["nclx_profile"]
    names = "color_primaries", "transfer_characteristics", "matrix_coefficients", "full_range_flag"
    assert [int(profile[name]) for name in names] == [9, 16, 9, 1]
    assert found.info["bit_depth"] == 10


def test_metadata_and_that_it_is_a_result(tmp_path):
    path = tmp_path / "a.avif"
    write_avif(path, smooth_light(), EXPOSURE, REC2020, METADATA)
    with Image.open(path) as picture:
        exif = picture.getexif()
        assert exif[0x010F] == "Maker"
        assert exif[0x8298].encode("latin-1").decode() == "\N{COPYRIGHT SIGN} Somebody"
        inner, place = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    assert inner[0x829A] == pytest.approx(0.25, rel=1e-3)
    assert inner[0x9003] == "2024:05:06 07:08:09"
    assert place[2] == (47, 30, 0)
    assert is_result(path)
    write_avif(path, smooth_light(), EXPOSURE)
    assert not is_result(path), "no result of a fusion"
    with pytest.raises(ImageError, match=r"a\.avif: its values are PQ; frames must be plain exposures"):
        read_header(path)


def test_what_is_no_light_of_pq_is_clipped_and_counted(tmp_path):
    light = np.full((20, 10, 3), 0.5, np.float32)
    light[:2] = 1.01 * BRIGHTEST / DIFFUSE_WHITE
    light[2] = -1
    assert write_avif(tmp_path / "a.avif", light, 1.0, REC2020) == pytest.approx(0.1)
    found = read(tmp_path / "a.avif")
    assert (found[:2] == BRIGHTEST).all()
    assert (found[2] == 0).all()


@pytest.fixture
def frames(tmp_path):
    """Three exposures, the reference seven stops above the shortest, of light that clips in none but the longest."""
    random = np.random.default_rng(0)
    light = random.uniform(0.01, 0.9, (4, 5, 3))
    light[1] = 0.95
    light = np.kron(light, np.ones((10, 10, 1)))
    paths = []
    for number, gain in enumerate((1, 2.0**7, 2.0**13)):
        codes = np.round(255 * (light * gain).clip(0, 1) ** (1 / 2.2)).astype(np.uint8)
        paths.append(save_frame(tmp_path / f"{number}.png", codes))
    return paths


def test_a_fusion_is_written_with_its_reference_as_white(tmp_path, frames):
    with pytest.warns(
        FusionWarning, match=r"^\d+ % of the pixels are brighter than 10000 cd/m2, .*; \.exr holds them$"
    ):
        result = safnet.fuse_files(frames, tmp_path / "r.avif", evs=(0, 7, 13), model=plain_model(), measure=False)
    light = result.radiance[0].permute(1, 2, 0).numpy() @ conversion(REC709, REC2020).T * 2**7 * DIFFUSE_WHITE
    found = read(tmp_path / "r.avif")
    assert (DIFFUSE_WHITE, BRIGHTEST) == (203, 10000), "of ITU-R BT.2408 and of PQ"
    held = (light < BRIGHTEST) & (light > 1)
    assert held.any()
    assert np.abs(found / light - 1)[held].max() < 0.04
    assert (found[light > 1.02 * BRIGHTEST] == BRIGHTEST).all()


def test_without_the_library_the_extra_is_named_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    for arguments in (
        ["fuse", *[str(tmp_path / f"{number}.png") for number in range(3)], "-o", str(tmp_path / "r.avif")],
        ["batch", str(tmp_path), "--format", "avif", "-o", str(tmp_path / "out")],
    ):
        outcome = CliRunner().invoke(app, arguments)
        assert outcome.exit_code == 2
        assert "avif: AVIF files need imagecodecs: pip install 'safnet-ops[avif]'\n" in outcome.stderr
        assert len(outcome.stderr.splitlines()) == 1


def test_too_old_a_library_is_named(tmp_path, monkeypatch):
    old = SimpleNamespace(__version__="2025.3.30", avif_encode=lambda data, level=None, bitspersample=None: b"")
    monkeypatch.setitem(sys.modules, "imagecodecs", old)
    with pytest.raises(ImageError, match=r"need imagecodecs 2025\.11\.11 or newer, .*, got 2025\.3\.30: pip install"):
        write_avif(tmp_path / "a.avif", smooth_light(), EXPOSURE)


def test_failures_are_one_line(tmp_path):
    with pytest.raises(ImageError, match=r"a\.avif cannot be written: [^\n]+$"):
        write_avif(tmp_path / "gone" / "a.avif", smooth_light(), EXPOSURE)
    with pytest.raises(ImageError, match=r"a\.avif cannot be written: [^\n]+$"):
        write_avif(tmp_path / "a.avif", np.zeros((1, 70000, 3), np.float32), EXPOSURE)
    assert list(tmp_path.iterdir()) == []
