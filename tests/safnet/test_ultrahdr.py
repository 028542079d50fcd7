"""Ultra HDR files: what plain readers show, and what those of gain maps get back, by libultrahdr and decoded by hand."""

import re
from io import BytesIO

import imagecodecs
import numpy as np
import OpenImageIO as oiio
import pytest
from PIL import Image

from safnet.images import is_result, read_frame, read_header, write_picture
from safnet.pictures import display_curve
from safnet.radiance import ldr_values
from safnet.ultrahdr import write_ultra_hdr
from tests.support.frames import save_tagged
from tests.support.scenes import smooth_radiance

HEIGHT, WIDTH, EXPOSURE = 120, 160, 4.0


@pytest.fixture
def light():
    """Smooth colours from 6 stops below the reference's clipping point to 2 above it."""
    return smooth_radiance(HEIGHT, WIDTH, (-6, 2), (-0.7, 0.7)) / np.float32(EXPOSURE)


@pytest.fixture
def path(tmp_path, light):
    shown = display_curve(light, "photo", exposure=EXPOSURE)(light)
    make = ("Make", oiio.TypeDesc("string"), "Maker")
    write_ultra_hdr(tmp_path / "a.jpg", light, EXPOSURE, shown, (make,))
    assert [file.name for file in tmp_path.iterdir()] == ["a.jpg"]
    return tmp_path / "a.jpg"


def pictures(data):
    """The JPEG files in one, by the index of the multi-picture format."""
    place = data.index(b"MPF\0MM\0*") + 4
    count, *_ = (int.from_bytes(data[place + 8 : place + 10], "big"),)
    assert count == 3
    entries = place + int.from_bytes(data[place + 10 + 24 + 8 : place + 10 + 24 + 12], "big")
    found = []
    for entry in (entries, entries + 16):
        size, offset = (int.from_bytes(data[entry + at : entry + at + 4], "big") for at in (4, 8))
        start = place + offset if offset else 0
        found.append(data[start : start + size])
    return found


def by_hand(data):
    """Linear light by the specification, from both pictures and what XMP says."""
    primary, gain_map = pictures(data)
    number = {name: float(value) for name, value in re.findall(r'hdrgm:(\w+)="([-\d.]+)"', gain_map.decode("latin-1"))}
    shown, gains = (np.asarray(Image.open(BytesIO(part)).convert("RGB")) / 255 for part in (primary, gain_map))
    linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    stops = number["GainMapMin"] + gains ** (1 / number["Gamma"]) * (number["GainMapMax"] - number["GainMapMin"])
    return (linear + number["OffsetSDR"]) * 2**stops - number["OffsetHDR"]


@pytest.mark.parametrize("reader", ["libultrahdr", "by hand", "OpenImageIO"])
def test_light_comes_back(path, light, reader):
    if reader == "libultrahdr":
        found = imagecodecs.ultrahdr_decode(path.read_bytes())[..., :3]
    elif reader == "by hand":
        found = by_hand(path.read_bytes())
    else:
        found = oiio.ImageInput.open(str(path)).read_image("float")[..., :3]
    wanted = light * EXPOSURE
    error = np.abs(found.astype(np.float64) - wanted) / (wanted + 1 / 64)
    assert np.median(error) < 0.02
    assert np.percentile(error, 99) < 0.1
    assert found.max() == pytest.approx(wanted.max(), rel=0.1)
    assert found.max() > 2, "there is light above the shown white"


def test_plain_readers_show_the_preview(path, light, tmp_path):
    expected = display_curve(light, "photo", exposure=EXPOSURE)(light)
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        assert picture.info["icc_profile"]
        assert np.abs(np.asarray(picture).astype(int) - expected).mean() < 2
    spec = oiio.ImageInput.open(str(path)).spec()
    assert spec.get_string_attribute("Make") == "Maker"
    assert is_result(path)
    write_picture(tmp_path / "b.jpg", expected)
    assert path.read_bytes()[:2] == b"\xff\xd8"


def test_lengths_and_places_are_true(path):
    data = path.read_bytes()
    primary, gain_map = pictures(data)
    assert primary + gain_map == data
    assert primary[:2] == gain_map[:2] == b"\xff\xd8"
    assert primary[-2:] == gain_map[-2:] == b"\xff\xd9"
    assert f'Item:Length="{len(gain_map)}"'.encode() in primary


def test_phones_frames_are_what_they_show(path, light):
    """As a frame, an Ultra HDR file is an exposure like any other: floats above white are no part of it."""
    header = read_header(path)
    assert (header.width, header.height) == (WIDTH, HEIGHT)
    assert not header.colour.is_linear
    frame = read_frame(header)
    with Image.open(path) as picture:
        shown = np.asarray(picture).astype(np.float64) / 255
    linear = np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)
    assert ldr_values(frame)[0].permute(1, 2, 0).numpy() ** 2.2 == pytest.approx(linear, abs=1e-3)


def test_pictures_without_headroom(tmp_path):
    dark = np.full((16, 16, 3), 0.01, np.float32)
    write_ultra_hdr(tmp_path / "a.jpg", dark, 1.0, np.full((16, 16, 3), 200, np.uint8))
    found = imagecodecs.ultrahdr_decode((tmp_path / "a.jpg").read_bytes())[..., :3]
    assert found.max() < 0.9
    plain = save_tagged(tmp_path / "b.jpg", np.zeros((16, 16, 3), np.uint8), "uint8")
    assert str(read_frame(read_header(plain)).dtype) == "torch.uint8"
