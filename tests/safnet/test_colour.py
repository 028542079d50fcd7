"""Curves and primaries of files, against LittleCMS; and radiance from frames of all of them, against the truth."""

import io
import re
import struct
import zlib

import imagecodecs
import numpy as np
import OpenImageIO as oiio
import pillow_heif
import pytest
import torch
from PIL import Image, ImageCms

import safnet
from safnet import colour, icc
from safnet.colour import ADOBE_RGB, LINEAR, P3, REC709, REC2020, SRGB, CurveError, conversion, parse_curve
from safnet.images import ImageError, read_frame, read_header, read_ldr, write_picture, write_radiance
from safnet.metrics import psnr_mu
from safnet.radiance import GAMMA, StoredFrame, ldr_values
from tests.support.frames import save_frame, save_tagged
from tests.support.models import plain_model
from tests.support.scenes import make_radiance, skyline

EVS = (-2.0, 0.0, 2.0)
D65, D50 = (0.3127, 0.3290), (0.3457, 0.3585)
PRIMARIES = {
    "Rec.709": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65),
    "Display P3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06), D65),
    "ProPhoto": ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), D50),
}
RED = (1.0, 0.18, 0.30)  # linear Rec.709


def cms_profile(name, gamma=1.0):
    """A profile by LittleCMS itself."""
    *primaries, white = PRIMARIES[name]
    return imagecodecs.cms_profile(
        "rgb", whitepoint=(*white, 1.0), primaries=[value for xy in primaries for value in (*xy, 1.0)], gamma=gamma
    )


def cms_convert(values, source, target):
    """Float values (H, W, 3) from one profile to another, by LittleCMS; beyond 1 and below 0 too where both are linear."""
    return imagecodecs.cms_transform(
        np.ascontiguousarray(values, np.float32), source, target, colorspace="rgb", outcolorspace="rgb", outdtype="float32",
        intent=1,
    )  # fmt: skip


def srgb_encode(light):
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


# What files hold of light in their primaries: name -> (primaries, code, profile).
CODINGS = {
    "sRGB": ("Rec.709", srgb_encode, icc.make_profile(REC709, "srgb")),
    "Pillow's sRGB": ("Rec.709", srgb_encode, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "Adobe RGB": ("Adobe RGB", lambda x: x ** (256 / 563), cms_profile("Adobe RGB", 563 / 256)),
    "Display P3": ("Display P3", srgb_encode, icc.make_profile(P3, "srgb")),
    "ProPhoto": ("ProPhoto", lambda x: x ** (1 / 1.8), cms_profile("ProPhoto", 1.8)),
    "linear": ("Rec.709", lambda x: x, cms_profile("Rec.709")),
    "linear ProPhoto": ("ProPhoto", lambda x: x, cms_profile("ProPhoto")),
}


@pytest.mark.parametrize("name", CODINGS)
def test_profiles_are_read_as_littlecms_reads_them(name):
    primaries, encode, profile = CODINGS[name]
    found = icc.read_profile(profile)
    light = np.geomspace(1e-4, 1, 200)
    assert found.curve.decode(encode(light)) == pytest.approx(light, rel=0.01, abs=2e-5)
    assert found.curve.decode(np.zeros(1)) == [0]
    assert found.is_linear == name.startswith("linear")
    assert found.space.chromaticities == pytest.approx([v for xy in PRIMARIES[primaries] for v in xy], abs=5e-4)
    matrix = conversion(found.space, REC709)
    expected = cms_convert(np.eye(3)[None], cms_profile(primaries), cms_profile("Rec.709"))[0].T
    assert (np.eye(3) if matrix is None else matrix) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("space", [REC709, P3, REC2020, ADOBE_RGB, colour.ACES_CG], ids=lambda space: space.name)
@pytest.mark.parametrize("curve", ["linear", "srgb"])
def test_profiles_that_are_made_are_understood(space, curve):
    profile = icc.make_profile(space, curve)
    found = icc.read_profile(profile)
    assert found.space.chromaticities == pytest.approx(space.chromaticities, abs=1e-4)
    codes = np.linspace(0, 1, 100)
    assert found.curve.decode(codes) == pytest.approx((LINEAR if curve == "linear" else SRGB).decode(codes), abs=1e-4)
    description = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile)))
    assert space.name in description


def png(path, *chunks):
    """A PNG file of one grey code, 128, with further chunks."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes([128] * 12) for _ in range(4))
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)),
        *chunks,
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


P3_CHRM = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
HALF = 128 / 255


@pytest.mark.parametrize(
    ("chunks", "light", "space"),
    [
        ([], HALF**2.2, REC709),
        ([(b"sRGB", b"\0")], float(SRGB.decode(np.array(HALF))), REC709),
        ([(b"gAMA", struct.pack(">I", 45455))], HALF**2.2, REC709),
        ([(b"gAMA", struct.pack(">I", 55556))], HALF**1.8, REC709),
        ([(b"gAMA", struct.pack(">I", 100000))], HALF, REC709),
        ([(b"gAMA", struct.pack(">I", 100000)), (b"cHRM", P3_CHRM)], HALF, P3),
        ([(b"cICP", bytes([12, 13, 0, 1]))], float(SRGB.decode(np.array(HALF))), P3),
        ([(b"cICP", bytes([9, 8, 0, 1])), (b"sRGB", b"\0")], HALF, REC2020),
        ([(b"cICP", bytes([1, 1, 0, 1]))], ((HALF + 0.099) / 1.099) ** (1 / 0.45), REC709),
    ],
)
def test_colours_of_png(tmp_path, chunks, light, space):
    header = read_header(png(tmp_path / "a.png", *chunks))
    assert conversion(header.colour.space, space) is None
    assert ldr_values(read_frame(header)).numpy() ** GAMMA == pytest.approx(light, rel=1e-3)
    assert header.colour.is_linear == (light == HALF)


def test_exif_says_that_a_png_is_of_srgb(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Maker"  # Pillow takes data without it for none
    exif.get_ifd(0x8769)[0xA001] = 1
    Image.fromarray(np.full((4, 4, 3), 128, np.uint8)).save(tmp_path / "a.png", exif=exif)
    assert read_header(tmp_path / "a.png").colour.curve is SRGB


def test_of_frames_without_a_word_the_curve_is_measured(tmp_path):
    """sRGB's is found where gamma 2.2 is assumed; of gamma 2.2 taken for sRGB the error stays, so that 2.2 is assumed."""
    y, x = np.mgrid[0:320, 0:480]
    light = skyline(x, y)
    truth = torch.from_numpy(light).permute(2, 0, 1)
    model = safnet.load_model("safnet-s")

    def quality(code, curve):
        codes = [np.round(code(np.clip(light * 2.0 ** (ev - EVS[0]), 0, 1)) * 255).astype(np.uint8) for ev in EVS]
        paths = [save_frame(tmp_path / f"{number}.png", values) for number, values in enumerate(codes)]
        return psnr_mu(safnet.fuse_files(paths, model=model, evs=EVS, curve=curve).radiance[0].clamp(0, 1), truth)

    def power(light):
        return light ** (1 / GAMMA)

    assert quality(srgb_encode, "auto") > quality(srgb_encode, "srgb") - 3
    assert quality(power, "auto") > quality(power, "srgb") + 10


def test_hdr_video_curves_are_refused(tmp_path):
    for transfer, name in ((16, "PQ"), (18, "HLG")):
        path = png(tmp_path / "a.png", (b"cICP", bytes([9, transfer, 0, 1])))
        with pytest.raises(ImageError, match=rf"a\.png: its values are {name}; frames must be plain exposures"):
            read_header(path)
        assert read_header(path, LINEAR).colour.is_linear, "--curve wins"


def test_colours_of_exr(tmp_path):
    pixels = np.full((4, 5, 3), 0.5, np.float32)
    plain = read_header(save_tagged(tmp_path / "plain.exr", pixels, "half")).colour
    assert (plain.space, plain.is_linear) == (REC709, True)
    named = read_header(save_tagged(tmp_path / "named.exr", pixels, "half", oiio__ColorSpace="lin_p3d65_scene")).colour
    assert named.space == P3
    path = save_tagged(tmp_path / "a.exr", pixels, "half", chromaticities=REC2020.chromaticities)
    assert conversion(read_header(path).colour.space, REC2020) is None


def test_colours_of_jpeg(tmp_path):
    codes = np.full((8, 8, 3), 128, np.uint8)
    exif = Image.Exif()
    exif[0x010F] = "Maker"  # Pillow takes data without it for none
    exif.get_ifd(0x8769)[0xA001] = 1
    Image.fromarray(codes).save(tmp_path / "camera.jpg", exif=exif, quality=100)
    assert read_header(tmp_path / "camera.jpg").colour.curve is SRGB
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 65535
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    Image.fromarray(codes).save(tmp_path / "_adobe.jpg", exif=exif, quality=100)
    assert read_header(tmp_path / "_adobe.jpg").colour.space == ADOBE_RGB
    assert read_header(save_frame(tmp_path / "plain.jpg", codes)).colour.curve is None


def test_given_curves_win_and_published_data_is_of_gamma_2_2(tmp_path):
    codes = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    path = save_tagged(tmp_path / "a.png", codes, "uint8", ICCProfile=icc.make_profile(P3, "linear"))
    assert np.allclose(read_ldr(path), codes / 255)
    for text, light in (
        ("auto", codes / 255),
        ("linear", codes / 255),
        ("srgb", SRGB.decode(codes / 255)),
        ("1,8", (codes / 255) ** 1.8),
    ):
        header = read_header(path, parse_curve(text))
        assert conversion(header.colour.space, P3) is None
        assert np.allclose(
            ldr_values(read_frame(header))[0].permute(1, 2, 0).numpy() ** GAMMA, light, rtol=1e-3, atol=1e-7
        )


@pytest.mark.parametrize("suffix", [".jpg", ".jfif", ".png", ".tif", ".webp", ".jxl", ".avif", ".heic"])
def test_profiles_of_all_formats(tmp_path, suffix):
    """A grey frame of 8 bits whose profile is that of linear Display P3."""
    path, profile = tmp_path / f"a{suffix}", icc.make_profile(P3, "linear")
    codes = np.full((32, 32, 3), 128, np.uint8)
    if suffix == ".jxl":
        save_tagged(path, codes, "uint8", ICCProfile=profile)
    elif suffix == ".heic":
        pillow_heif.from_pillow(Image.fromarray(codes)).save(path, quality=-1, icc_profile=profile)
    else:
        form = {".jpg": "JPEG", ".jfif": "JPEG", ".tif": "TIFF"}.get(suffix, suffix[1:].upper())
        Image.fromarray(codes).save(path, form, icc_profile=profile)
    header = read_header(path)
    assert conversion(header.colour.space, P3) is None
    assert ldr_values(read_frame(header)).numpy() ** GAMMA == pytest.approx(128 / 255, abs=0.01)


@pytest.mark.parametrize("text", ["magic", "0", "-2", "nan", "inf", "22", ""])
def test_curves_that_are_none(text):
    with pytest.raises(CurveError, match=rf"--curve must be auto, srgb, linear or a gamma .*, got {text!r}"):
        parse_curve(text)


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_codes_are_looked_up_where_they_are_needed(tmp_path, kind):
    top = np.iinfo(kind).max
    codes = np.random.default_rng(1).integers(0, top, (150, 20, 3), kind, endpoint=True)
    frame = read_frame(read_header(save_tagged(tmp_path / "a.tif", codes, kind, ICCProfile=cms_profile("Rec.709"))))
    assert isinstance(frame, StoredFrame)
    assert (frame.shape, frame.dtype) == ((1, 3, 150, 20), getattr(torch, kind))
    expected = (codes / top) ** (1 / 2.2)
    assert np.allclose(ldr_values(frame)[0].permute(1, 2, 0), expected, atol=2e-5)
    assert np.allclose(ldr_values(frame[:, :, 70:90, 3:])[0].permute(1, 2, 0), expected[70:90, 3:], atol=2e-5)


def grey_profile(gamma):
    return icc._assemble(
        b"GRAY",
        {
            b"desc": icc._text("grey"),
            b"cprt": icc._text("none"),
            b"wtpt": icc._xyz(icc.D50),
            b"kTRC": icc._parametric(0, gamma),
        },
    )


def test_grey_and_cmyk_are_converted(tmp_path):
    codes = np.full((8, 8, 1), 128, np.uint8)
    path = save_tagged(tmp_path / "grey.tif", codes, "uint8", ICCProfile=grey_profile(1.8))
    values = ldr_values(read_frame(read_header(path))).numpy() ** GAMMA
    assert values.shape == (1, 3, 8, 8)
    assert values == pytest.approx((128 / 255) ** 1.8, rel=0.01)


def table_profile(space, channels):
    """A profile whose only tag of colour is a table: codes to Lab, a plain one, by which 0 is black and 255 is white."""
    grid = 2
    corners = np.stack(np.meshgrid(*[np.linspace(0, 1, grid)] * channels, indexing="ij"), -1)
    lightness = 1 - corners[..., 3] if channels == 4 else corners.mean(-1)
    lab = np.stack([lightness * 255, np.full_like(lightness, 128), np.full_like(lightness, 128)], -1)
    table = b"mft1" + bytes(4) + bytes([channels, 3, grid, 0]) + icc._fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += bytes(range(256)) * channels + lab.round().astype(np.uint8).tobytes() + bytes(range(256)) * 3
    tags = {b"desc": icc._text("table"), b"cprt": icc._text("none"), b"wtpt": icc._xyz(icc.D50), b"A2B0": table}
    profile = bytearray(icc._assemble(space, tags))
    profile[12:16] = b"prtr" if channels == 4 else b"scnr"
    profile[20:24] = b"Lab "
    profile[8] = 2  # a table of 8 bits is of version 2
    return bytes(profile)


@pytest.mark.parametrize(("mode", "space"), [("CMYK", b"CMYK"), ("RGB", b"RGB ")])
def test_colours_by_tables_are_converted_by_littlecms(tmp_path, mode, space):
    profile = table_profile(space, len(mode))
    codes = (0, 0, 0, 128) if mode == "CMYK" else (127, 127, 127)
    Image.new(mode, (8, 6), codes).save(tmp_path / "a.tif", icc_profile=profile)
    header = read_header(tmp_path / "a.tif")
    light = ldr_values(read_frame(header)).numpy() ** GAMMA
    assert light.shape == (1, 3, 6, 8)
    lightness = 100 * 127 / 255
    assert light == pytest.approx(((lightness + 16) / 116) ** 3, rel=0.05), "L* is what the table says"
    wide = save_tagged(
        tmp_path / "b.tif", np.zeros((4, 4, 3), np.uint16), "uint16", ICCProfile=table_profile(b"RGB ", 3)
    )
    with pytest.raises(ImageError, match=r"b\.tif: its colour profile is a table, .* only 8-bit"):
        read_header(wide)


def test_damaged_profiles_are_refused_in_one_line(tmp_path):
    path = save_tagged(tmp_path / "a.tif", np.zeros((4, 4, 3), np.uint8), "uint8", ICCProfile=b"no profile" * 20)
    with pytest.raises(ImageError, match=r"a\.tif: its colour profile cannot be read.*; give --curve srgb"):
        read_header(path)
    assert read_header(path, SRGB).colour.curve is SRGB


# ---- from files to files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """One that estimates no motion and refines nothing."""
    return plain_model()


@pytest.fixture(scope="module")
def scene():
    """Linear Rec.709, with a saturated red in it; the reference exposure (4 times the short one's light) clips nowhere."""
    radiance = 0.2 * make_radiance(seed=5, height=96, width=128)
    radiance[:48, :64] = radiance[:48, :64].mean(2, keepdims=True) * np.array(RED, np.float32)
    return radiance


def bracket(folder, scene, name, kind):
    """Files of three exposures in a coding, and the light in its primaries."""
    primaries, encode, profile = CODINGS[name]
    light = cms_convert(scene, cms_profile("Rec.709"), cms_profile(primaries))
    assert light.min() > -1e-4
    top = np.iinfo(kind).max
    for number, ev in enumerate(EVS):
        codes = np.round(encode((light * 2 ** (ev - EVS[0])).clip(0, 1)) * top).astype(kind)
        save_tagged(folder / f"{number}.tif", codes, kind, ICCProfile=profile)
    return [folder / f"{number}.tif" for number in range(3)]


def slope(radiance, truth):
    """Of log radiance against log truth."""
    seen = (truth > 0.001) & (radiance > 0)
    return np.polyfit(np.log(truth[seen]), np.log(radiance[seen]), 1)[0]


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
@pytest.mark.parametrize("name", CODINGS)
def test_radiance_is_linear_in_light_and_of_rec_709(tmp_path, scene, model, name, kind):
    frames = bracket(tmp_path, scene, name, kind)
    result = safnet.fuse_files(frames, tmp_path / "r.exr", evs=EVS, model=model, depth="float", global_motion=False)
    assert result.curve is None, "what is known is not measured"
    assert result.evs == pytest.approx(EVS, abs=0.03)
    written = oiio.ImageInput.open(str(tmp_path / "r.exr"))
    radiance = written.read_image("float")
    assert slope(radiance, scene) == pytest.approx(1, abs=0.02)
    assert np.median(np.abs(radiance / scene - 1)) < (0.03 if kind == "uint8" else 0.005)
    red = radiance[10:40, 10:50].mean((0, 1))
    assert red / red[0] == pytest.approx(RED, abs=0.01)
    assert written.spec().getattribute("chromaticities") == pytest.approx(REC709.chromaticities)
    assert written.spec().get_string_attribute("colorInteropID") == "lin_rec709_scene"


@pytest.mark.parametrize("space", ["rec709", "p3", "rec2020", "input"])
def test_radiance_is_written_in_the_space_that_is_asked_for(tmp_path, scene, model, space):
    frames = bracket(tmp_path, scene, "ProPhoto", "uint16")
    target = {"input": "ProPhoto", "p3": "Display P3", "rec709": "Rec.709"}.get(space)
    for suffix in (".exr", ".tif"):
        safnet.fuse_files(
            frames, tmp_path / f"r{suffix}", evs=EVS, model=model, depth="float", space=space, measure=False,
            preview=tmp_path / f"r{suffix}.png",
        )  # fmt: skip
        source = oiio.ImageInput.open(str(tmp_path / f"r{suffix}"))
        pixels, spec = source.read_image("float"), source.spec()
        if suffix == ".tif":
            profile = bytes(bytearray(spec.getattribute("ICCProfile")))
            stated = icc.read_profile(profile)
            assert stated.is_linear
            assert np.median(np.abs(cms_convert(pixels, profile, cms_profile("Rec.709")) / scene - 1)) < 0.005
            chromaticities = stated.space.chromaticities
        else:
            chromaticities = spec.getattribute("chromaticities")
        if target is not None:
            assert chromaticities == pytest.approx([v for xy in PRIMARIES[target] for v in xy], abs=5e-4)
            expected = cms_convert(scene, cms_profile("Rec.709"), cms_profile(target))
            assert np.median(np.abs(pixels / expected - 1)) < 0.005
        else:
            assert chromaticities == pytest.approx(REC2020.chromaticities, abs=5e-4)
    assert (tmp_path / "r.exr.png").read_bytes() == (tmp_path / "r.tif.png").read_bytes()
    assert spec.get_string_attribute("colorInteropID") == ""


def test_previews_say_that_they_are_srgb_and_are(tmp_path, scene, model):
    shown = {}
    for name in ("sRGB", "ProPhoto"):
        (tmp_path / name).mkdir()
        frames = bracket(tmp_path / name, scene, name, "uint16")
        safnet.fuse_files(frames, evs=EVS, model=model, preview=tmp_path / f"{name}.png", measure=False)
        found = read_header(tmp_path / f"{name}.png").colour
        assert (conversion(found.space, REC709), found.curve.decode(np.array(0.5))) == (
            None,
            pytest.approx(0.2140, abs=1e-3),
        )
        shown[name] = np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int)
    assert np.abs(shown["sRGB"] - shown["ProPhoto"]).mean() < 1, "one scene is one picture, whatever its frames were in"


def test_hdr_files_hold_rec_709_alone(tmp_path, scene, model):
    frames = bracket(tmp_path, scene, "ProPhoto", "uint8")
    with pytest.raises(ImageError, match=r"--space p3 does not fit .*r\.hdr: \.hdr files are of Rec\.709"):
        safnet.fuse_files(frames, tmp_path / "r.hdr", evs=EVS, model=model, space="p3")
    with pytest.raises(ImageError, match=r"--space input does not fit .*r\.hdr"):
        safnet.fuse_files(frames, tmp_path / "r.hdr", evs=EVS, model=model, space="input")
    assert not (tmp_path / "r.hdr").exists()
    safnet.fuse_files(frames, tmp_path / "r.hdr", evs=EVS, model=model, measure=False)
    radiance = oiio.ImageInput.open(str(tmp_path / "r.hdr")).read_image("float")
    assert slope(radiance, scene) == pytest.approx(1, abs=0.02)


def test_frames_of_different_spaces_are_refused(tmp_path, scene, model):
    frames = bracket(tmp_path, scene, "sRGB", "uint8")
    (tmp_path / "other").mkdir()
    frames[1] = bracket(tmp_path / "other", scene, "ProPhoto", "uint8")[1]
    with pytest.raises(
        safnet.ExposureError, match=r"frames must be of one colour space, got .*0\.tif of .* and .*1\.tif of"
    ):
        safnet.fuse_files(frames, evs=EVS, model=model)


@pytest.mark.parametrize(("tag", "measured"), [({}, True), ({"ICCProfile": cms_profile("Rec.709")}, False)])
def test_a_curve_is_measured_where_none_is_known(tmp_path, model, tag, measured):
    """Frames whose levels contradict each other, as those of a camera's S-shaped curve do."""
    radiance = make_radiance(height=128, width=192)
    for number, ev in enumerate(EVS):
        ldr = np.clip(radiance * 2.0 ** (ev - EVS[0]), 0, 1) ** (1 / 2.2)
        bent = ldr**1.6 / (ldr**1.6 + (1 - ldr) ** 1.6)
        codes = np.round(bent * 255 if measured else bent**2.2 * 255).astype(np.uint8)
        save_tagged(tmp_path / f"{number}.png", codes, "uint8", **tag)
    result = safnet.fuse_files(sorted(tmp_path.glob("*.png")), evs=EVS, model=model)
    assert (result.curve is not None) == measured


def test_linear_frames_without_a_word_are_noticed(tmp_path, scene, model):
    for number, ev in enumerate(EVS):
        codes = np.round((scene * 2 ** (ev - EVS[0])).clip(0, 1) * 65535).astype(np.uint16)
        save_tagged(tmp_path / f"{number}.tif", codes, "uint16")
    frames = sorted(tmp_path.glob("*.tif"))
    with pytest.warns(safnet.FusionWarning, match=r"--curve linear"):
        safnet.fuse_files(frames, evs=EVS, model=model)
    result = safnet.fuse_files(frames, evs=EVS, model=model, curve="linear")
    assert slope(result.radiance[0].permute(1, 2, 0).numpy(), scene) == pytest.approx(1, abs=0.02)


def test_written_files_are_read_again_as_they_were(tmp_path, scene):
    write_radiance(tmp_path / "a.exr", scene, "float", P3)
    write_radiance(tmp_path / "a.tif", scene, "float", P3)
    for name in ("a.exr", "a.tif"):
        header = read_header(tmp_path / name)
        assert conversion(header.colour.space, P3) is None
        assert np.allclose(ldr_values(read_frame(header))[0].permute(1, 2, 0) ** GAMMA, scene, rtol=1e-2, atol=1e-4)
    write_picture(tmp_path / "a.jpg", np.zeros((8, 8, 3), np.uint8))
    assert re.search("Rec.709, sRGB curve", read_header(tmp_path / "a.jpg").colour.curve.name)
