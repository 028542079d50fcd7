"""Reading frames by the input protocol, writing results whole or not at all."""

import imagecodecs
import numpy as np
import OpenImageIO as oiio
import pytest
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import IFDRational

from safnet.colour import SRGB
from safnet.images import (
    DEPTHS,
    ImageError,
    check_destination,
    find_frames,
    is_result,
    read_frame,
    read_header,
    read_ldr,
    write_picture,
    write_radiance,
)
from safnet.radiance import ldr_values
from tests.support.frames import save_frame, save_tagged

HEIGHT, WIDTH = 24, 36


@pytest.fixture
def codes():
    """Random 8-bit RGB that is smooth enough for JPEG."""
    coarse = np.random.default_rng(7).integers(0, 256, (6, 9, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("name", ["frame.png", "frame.tif"])
def test_8_bit_values_are_divided_by_255(tmp_path, codes, name):
    assert np.allclose(read_ldr(save_tagged(tmp_path / name, codes, "uint8")), codes / 255, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["frame.png", "frame.tif"])
def test_16_bit_values_are_divided_by_65536(tmp_path, name):
    values = np.random.default_rng(7).integers(0, 65536, (HEIGHT, WIDTH, 3), np.uint16)
    values[0, 0] = 65535
    picture = read_ldr(save_tagged(tmp_path / name, values, "uint16"))
    assert picture.dtype == np.float32
    assert picture.flags.c_contiguous
    assert np.array_equal(picture, (values / 65536).astype(np.float32))


@pytest.mark.parametrize(("name", "kind"), [("frame.exr", "half"), ("frame.exr", "float"), ("frame.tif", "float")])
def test_float_values_are_linear(tmp_path, codes, name, kind):
    linear = ((codes / 255) ** 2.2).astype(np.float32)
    linear[0, 0] = (-0.5, 7.0, np.nan)
    picture = read_ldr(save_tagged(tmp_path / name, linear, kind))
    assert picture[0, 0].tolist() == [0, 1, 0]
    # Half floats keep 11 significant bits, and fewer below 6e-5.
    assert np.allclose(picture[1:], codes[1:] / 255, rtol=1e-3, atol=2e-3)


def test_jpeg(tmp_path, codes):
    Image.fromarray(codes).save(tmp_path / "frame.JPG", quality=98, subsampling=0)
    assert np.abs(read_ldr(tmp_path / "frame.JPG") - codes / 255).mean() < 0.01


def test_grey_alpha_and_palette_become_rgb(tmp_path, codes):
    alpha = np.full((HEIGHT, WIDTH, 1), 40, np.uint8)
    grey = codes[:, :, :1]
    coded_grey = np.repeat(grey, 3, 2) / 255
    assert np.allclose(read_ldr(save_tagged(tmp_path / "grey.png", grey, "uint8")), coded_grey)
    Image.fromarray(np.concatenate([grey, alpha], 2), "LA").save(tmp_path / "grey_alpha.png")
    assert np.allclose(read_ldr(tmp_path / "grey_alpha.png"), coded_grey)
    Image.fromarray(np.concatenate([codes, alpha], 2)).save(tmp_path / "alpha.png")
    assert np.allclose(read_ldr(tmp_path / "alpha.png"), codes / 255), "colour must not be multiplied by alpha"
    palette = Image.fromarray(codes).quantize(16)
    palette.save(tmp_path / "palette.png")
    assert np.allclose(read_ldr(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")) / 255)


def test_cmyk_becomes_rgb(tmp_path, codes):
    Image.fromarray(codes).convert("CMYK").save(tmp_path / "cmyk.tif")
    assert np.abs(read_ldr(tmp_path / "cmyk.tif") - codes / 255).max() < 0.02


def test_further_exr_channels_are_ignored(tmp_path):
    pixels = np.random.default_rng(7).random((HEIGHT, WIDTH, 5), np.float32)
    spec = oiio.ImageSpec(WIDTH, HEIGHT, 5, "float")
    spec.channelnames = ("Z", "B", "G", "R", "depth.V")
    out = oiio.ImageOutput.create("frame.exr")
    assert out.open(str(tmp_path / "frame.exr"), spec)
    assert out.write_image(pixels)
    out.close()
    assert np.allclose(read_ldr(tmp_path / "frame.exr"), pixels[:, :, [3, 2, 1]] ** (1 / 2.2), atol=1e-6)


def test_channels_that_are_no_colours_are_refused(tmp_path):
    path = save_tagged(tmp_path / "frame.exr", np.zeros((HEIGHT, WIDTH, 2), np.float32), "half")
    with pytest.raises(ImageError, match=r"frame\.exr: channels must be RGB or grey, got R, G"):
        read_header(path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, codes, orientation):
    path = save_tagged(tmp_path / "frame.tif", codes, "uint8", Orientation=orientation)
    with Image.open(path) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored)) / 255
    picture, header = read_ldr(path), read_header(path)
    assert np.allclose(picture, upright)
    assert (header.height, header.width) == picture.shape[:2]


def test_header_carries_exposure(tmp_path, codes):
    plain = read_header(save_frame(tmp_path / "plain.jpg", codes))
    assert (plain.exposure_time, plain.f_number, plain.iso, plain.bias) == (None, None, None, None)
    exif = {
        "ExposureTime": 0.0125,
        "FNumber": 5.6,
        "Exif__PhotographicSensitivity": 400,
        "Exif__ExposureBiasValue": -2.0,
    }
    header = read_header(save_tagged(tmp_path / "frame.jpg", codes, "uint8", **exif))
    assert header.exposure_time == pytest.approx(0.0125)
    assert (header.f_number, header.iso, header.bias) == (pytest.approx(5.6), 400, -2)


@pytest.mark.parametrize("kept", [0.5, 0.97])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.jpg", "uint8"), ("a.png", "uint8"), ("a.tif", "uint16"), ("a.exr", "half"), ("b.tif", "float")],
)
def test_truncated_files_are_refused(tmp_path, capfd, name, kind, kept):
    noise = np.random.default_rng(7).random((64, 64, 3), np.float32)
    pixels = noise if kind in ("half", "float") else (noise * np.iinfo(kind).max).astype(kind)
    path = save_tagged(tmp_path / name, pixels, kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ImageError, match=rf"{name} cannot be read") as caught:
        read_ldr(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == "", "codecs must not print by themselves"


@pytest.mark.parametrize("content", [b"", b"hello" * 50])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.exr"])
def test_files_that_are_no_pictures_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=rf"{name} cannot be read"):
        read_header(tmp_path / name)


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png does not exist"):
        read_header(tmp_path / "gone.png")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ImageError, match=r"notes\.txt: frames must be \.jpg"):
        read_header(tmp_path / "notes.txt")


def read_raw(path):
    source = oiio.ImageInput.open(str(path))
    spec = source.spec()
    return str(spec.format), source.read_image(0, 0, 0, 3, spec.format)


@pytest.mark.parametrize(
    ("suffix", "depth"), [(suffix, depth) for suffix, depths in DEPTHS.items() for depth in depths]
)
def test_radiance_survives_writing(tmp_path, suffix, depth):
    radiance = np.random.default_rng(7).random((HEIGHT, WIDTH, 3), np.float32) ** 4
    radiance[0, 0] = (0, 1, 0.25)
    path = tmp_path / f"result{suffix}"
    write_radiance(path, radiance, depth)
    kind, stored = read_raw(path)
    assert kind == depth
    if depth == "uint16":
        assert np.abs(stored / 65535 - radiance).max() <= 0.51 / 65535
    elif suffix == ".hdr":  # 8 bits for the brightest channel, shared by the others
        assert (np.abs(stored - radiance) <= radiance.max(2, keepdims=True) / 128 + 1e-6).all()
    else:
        assert np.allclose(stored, radiance, rtol=5e-4 if depth == "half" else 0, atol=1e-7)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_default_depth(tmp_path):
    radiance = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for suffix, kind in ((".exr", "half"), (".tif", "float"), (".hdr", "float")):
        write_radiance(tmp_path / f"result{suffix}", radiance)
        assert read_raw(tmp_path / f"result{suffix}")[0] == kind


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "result.exr"
    path.write_text("old")
    with pytest.raises(ImageError, match=r"result\.exr cannot be written"):
        write_radiance(path, np.zeros((0, 0, 3), np.float32))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def camera_exif(orientation):
    """What cameras write of a picture."""
    exif = Image.Exif()
    exif.update(
        {0x010E: "a view", 0x010F: "Maker", 0x0110: "Camera 1", 0x0112: orientation, 0x0132: "2026:01:02 03:04:05"}
    )
    exif.update({0x013B: "Somebody", 0x8298: "(c) Somebody", 0x0131: "Firmware 1.0"})
    photo = exif.get_ifd(0x8769)
    photo.update({0x829A: IFDRational(1, 50), 0x829D: IFDRational(28, 10), 0x8827: 400, 0xA434: "24-70 mm"})
    photo.update({0x9003: "2026:01:02 03:04:05", 0x920A: IFDRational(50, 1), 0xA001: 1, 0x927C: b"maker's own" * 9})
    place = exif.get_ifd(0x8825)
    place.update({1: "N", 2: tuple(IFDRational(value, 1) for value in (48, 8, 12)), 3: "W"})
    place.update({4: tuple(IFDRational(value, 1) for value in (11, 30, 6)), 5: b"\1", 6: IFDRational(7, 1)})
    return exif


@pytest.mark.parametrize("name", ["result.exr", "result.tif", "preview.png", "preview.jpg"])
def test_metadata_of_the_reference_goes_into_results(tmp_path, codes, name):
    Image.fromarray(codes).save(tmp_path / "frame.jpg", exif=camera_exif(6))
    header = read_header(tmp_path / "frame.jpg")
    assert (header.width, header.height) == (HEIGHT, WIDTH)
    upright = np.zeros((WIDTH, HEIGHT, 3))
    if name.startswith("result"):
        write_radiance(tmp_path / name, upright.astype(np.float32), metadata=header.metadata)
    else:
        write_picture(tmp_path / name, upright.astype(np.uint8), header.metadata)
    spec = oiio.ImageInput.open(str(tmp_path / name)).spec()
    found = {item.name: item.value for item in spec.extra_attribs}
    expected = {
        "Make": "Maker", "Model": "Camera 1", "Artist": "Somebody", "Copyright": "(c) Somebody", "ImageDescription": "a view",
        "DateTime": "2026:01:02 03:04:05", "Exif:DateTimeOriginal": "2026:01:02 03:04:05", "Exif:LensModel": "24-70 mm",
        "Exif:PhotographicSensitivity": 400, "GPS:LatitudeRef": "N", "GPS:Latitude": (48, 8, 12), "GPS:LongitudeRef": "W",
        "GPS:Longitude": (11, 30, 6), "GPS:Altitude": 7, "Software": "safnet fuse",
    }  # fmt: skip
    if name == "result.tif":  # OpenImageIO writes none into TIFF
        del expected["Exif:PhotographicSensitivity"]
    assert {key: found.get(key) for key in expected} == expected
    assert found["ExposureTime"] == pytest.approx(0.02, rel=1e-3)
    assert found.get("Orientation", 1) == 1
    assert (spec.width, spec.height) == (HEIGHT, WIDTH)
    assert is_result(tmp_path / name)


def test_exposures_of_apex_values(tmp_path, codes):
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0x9201: IFDRational(6, 1), 0x9202: IFDRational(4, 1), 0x9204: IFDRational(-2, 1)})
    Image.fromarray(codes).save(tmp_path / "a.jpg", exif=exif)
    header = read_header(tmp_path / "a.jpg")
    assert (header.exposure_time, header.f_number, header.bias) == (pytest.approx(1 / 64), pytest.approx(4), -2)


@pytest.mark.parametrize("name", ["a.jfif", "a.webp", "a.jxl"])
def test_further_formats(tmp_path, codes, name):
    if name == "a.jxl":
        (tmp_path / name).write_bytes(imagecodecs.jpegxl_encode(codes, lossless=True))
    else:
        options = {"lossless": True} if name == "a.webp" else {"quality": 98, "subsampling": 0}
        Image.fromarray(codes).save(tmp_path / name, "JPEG" if name == "a.jfif" else None, **options)
    header = read_header(tmp_path / name)
    assert (header.width, header.height) == (WIDTH, HEIGHT)
    found = ldr_values(read_frame(header))[0].permute(1, 2, 0).numpy()
    expected = SRGB.decode(codes / 255) ** (1 / 2.2) if name == "a.jxl" else codes / 255  # JPEG XL says that it is sRGB
    assert np.abs(found - expected).mean() < (0.01 if name == "a.jfif" else 1e-3)


def test_frames_of_a_folder(tmp_path):
    for name in ("b.PNG", "a.jpg", "c.tiff", ".hidden.png", "notes.txt", "HDRImg.hdr", "result.exr"):
        (tmp_path / name).touch()
    for name in ("fused.tif", "preview.jpg"):  # of an earlier run, under another name
        write_picture(tmp_path / name, np.zeros((4, 4, 3), np.uint8), metadata=())
    assert [path.name for path in find_frames(tmp_path, [tmp_path / "result.exr"])] == ["a.jpg", "b.PNG", "c.tiff"]


def test_destinations(tmp_path):
    old = tmp_path / "old.exr"
    old.touch()
    check_destination("--output", tmp_path / "new.EXR", DEPTHS, overwrite=False)
    check_destination("--output", old, DEPTHS, overwrite=True)
    (tmp_path / "folder.exr").mkdir()
    for path, message in (
        (old, r"--output .*old\.exr exists already; give --overwrite"),
        (tmp_path / "gone" / "a.exr", r"--output .*a\.exr: the folder .*gone does not exist"),
        (tmp_path / "a.jxl", r"--output .*a\.jxl: the name must end in \.exr, \.hdr, \.tif, \.tiff"),
        (tmp_path / "folder.exr", r"--output .*folder\.exr is a folder"),
    ):
        with pytest.raises(ImageError, match=message):
            check_destination("--output", path, DEPTHS, overwrite=False)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_pictures_of_large_cameras_are_no_attack(tmp_path, name, monkeypatch, recwarn):
    """Pillow warns of pictures beyond its limit and refuses those beyond twice that."""
    path = save_frame(tmp_path / name, np.full((20, 30, 3), 90, np.uint8))
    for limit in (400, 200):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert read_header(path).width == 30
        assert read_frame(read_header(path)).shape == (1, 3, 20, 30)
        assert limit == Image.MAX_IMAGE_PIXELS
    assert not [str(warning.message) for warning in recwarn]
