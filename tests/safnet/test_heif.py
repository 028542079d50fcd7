"""HEIC and AVIF files, made here, against what was put in."""

import numpy as np
import pillow_heif
import pytest
from PIL import Image, features
from PIL.TiffImagePlugin import IFDRational

from safnet import icc
from safnet.colour import P3, SRGB, conversion
from safnet.images import ImageError, read_frame, read_header
from safnet.radiance import GAMMA, ldr_values

HEIGHT, WIDTH = 64, 96


@pytest.fixture
def codes():
    """Smooth 10-bit RGB."""
    coarse = np.random.default_rng(7).integers(100, 900, (4, 6, 3)).astype(np.float32)
    channels = [Image.fromarray(c).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for c in coarse.transpose(2, 0, 1)]
    return np.stack(channels, 2).clip(0, 1023).round().astype(np.uint16)


def save_heic(path, codes, orientation=1, **info):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif[0x0112] = orientation
    exif.get_ifd(0x8769)[0x829A] = IFDRational(1, 50)
    exif.get_ifd(0x8769)[0x829D] = IFDRational(18, 10)
    picture = pillow_heif.from_bytes("RGB;16", codes.shape[1::-1], (codes << 6).tobytes())
    picture.info.update(info)
    picture.save(path, quality=-1, chroma="444", exif=exif.tobytes())
    return path


def test_heic_has_all_its_bits_colour_and_exposure(tmp_path, codes):
    path = save_heic(tmp_path / "a.heic", codes, icc_profile=icc.make_profile(P3, "srgb"))
    header = read_header(path)
    assert (header.width, header.height) == (WIDTH, HEIGHT)
    assert (header.exposure_time, header.f_number) == (pytest.approx(0.02), pytest.approx(1.8))
    assert ("Make", "Maker") in [(name, value) for name, _, value in header.metadata]
    assert conversion(header.colour.space, P3) is None
    frame = read_frame(header)
    assert str(frame.dtype) == "torch.uint16"
    light = ldr_values(frame)[0].permute(1, 2, 0).numpy() ** GAMMA
    assert np.abs(light - SRGB.decode(codes / 1023)).mean() < 2e-3


def test_heic_is_upright_once(tmp_path, codes):
    header = read_header(save_heic(tmp_path / "a.heic", codes, orientation=6))
    assert (header.width, header.height) == (HEIGHT, WIDTH)
    shown = read_frame(header).codes if not hasattr(read_frame(header), "dim") else read_frame(header)
    turned = np.rot90(codes.astype(int) << 6, -1)
    assert np.abs(shown[0].permute(1, 2, 0).numpy().astype(int) - turned).mean() < 400


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow decodes no AVIF")
def test_avif(tmp_path, codes):
    Image.fromarray((codes >> 2).astype(np.uint8)).save(tmp_path / "a.avif", quality=98)
    header = read_header(tmp_path / "a.avif")
    assert header.colour.curve is SRGB
    light = ldr_values(read_frame(header))[0].permute(1, 2, 0).numpy() ** GAMMA
    assert np.abs(light - SRGB.decode(codes / 1023)).mean() < 0.01


@pytest.mark.parametrize("content", [b"", b"hello" * 100])
def test_files_that_are_no_pictures_are_refused(tmp_path, content):
    (tmp_path / "a.heic").write_bytes(content)
    with pytest.raises(ImageError, match=r"a\.heic cannot be read by libheif: [^\n]*$"):
        read_header(tmp_path / "a.heic")
