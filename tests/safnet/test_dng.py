"""Linear DNG: the light that LibRaw, tifffile and safnet itself read from it, against the truth."""

import numpy as np
import OpenImageIO as oiio
import pytest
import rawpy
import tifffile
import torch

import safnet
from safnet.colour import P3, REC709, REC2020, conversion
from safnet.images import ImageError, find_frames, is_result, read_frame, read_header, write_radiance
from safnet.radiance import GAMMA, ldr_values
from tests.support.frames import save_frame
from tests.support.models import plain_model

HEIGHT, WIDTH, EXPOSURE = 90, 130, 4.0
MAKERS = {"Canon": "Canon EOS R5", "NIKON CORPORATION": "NIKON Z 6", "SONY": "ILCE-7M3", "FUJIFILM": "X-T4"}


def metadata(make="Maker", model="Camera 1"):
    return (
        ("Make", oiio.TypeDesc("string"), make),
        ("Model", oiio.TypeDesc("string"), model),
        ("Copyright", oiio.TypeDesc("string"), "\N{COPYRIGHT SIGN} Somebody"),
        ("ExposureTime", oiio.TypeDesc("float"), 0.25),
        ("FNumber", oiio.TypeDesc("float"), 8.0),
        ("Exif:PhotographicSensitivity", oiio.TypeDesc("int"), 200),
        ("Exif:DateTimeOriginal", oiio.TypeDesc("string"), "2024:05:06 07:08:09"),
        ("GPS:LatitudeRef", oiio.TypeDesc("string"), "N"),
        ("GPS:Latitude", oiio.TypeDesc("float[3]"), (47.0, 30.0, 0.0)),
    )


@pytest.fixture
def light():
    """Colours from the short exposure's clipping point to 12 stops below it; some pixels reach it."""
    random = np.random.default_rng(2)
    stops = np.linspace(-12, 0, WIDTH)[None, :, None] + random.uniform(-0.5, 0, (HEIGHT, WIDTH, 3))
    return (2.0**stops).clip(0, 1).astype(np.float32)


def developed(path, space=rawpy.ColorSpace.sRGB):
    """Linear light by LibRaw, as a converter develops it without brightening."""
    with rawpy.imread(str(path)) as raw:
        developed = raw.postprocess(
            use_camera_wb=True,
            output_color=space,
            output_bps=16,
            gamma=(1, 1),
            no_auto_bright=True,
            adjust_maximum_thr=0.0,
        )
    return developed / 65535


# Half a step of 16 bits, and what the matrix makes of it; LibRaw takes floats to 14 bits.
@pytest.mark.parametrize(("depth", "exact"), [("uint16", 0.5 / 65535), ("half", 4e-4)])
def test_libraw_gives_the_light_back(tmp_path, light, depth, exact):
    write_radiance(tmp_path / "a.dng", light, depth, metadata=metadata(), exposure=EXPOSURE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.dng"]
    assert np.abs(developed(tmp_path / "a.dng", rawpy.ColorSpace.raw) - light).max() < exact * 1.05
    assert np.abs(developed(tmp_path / "a.dng") - light).max() < exact + 2e-5
    assert np.abs(developed(tmp_path / "a.dng") / light - 1)[light > 2**-6].max() < 0.02


@pytest.mark.parametrize("space", [P3, REC2020])
def test_primaries_are_told_by_the_matrix(tmp_path, light, space):
    within = (light * 0.5 + light.mean(2, keepdims=True) * 0.5) @ conversion(REC709, space).T
    write_radiance(tmp_path / "a.dng", within.astype(np.float32), space=space, exposure=EXPOSURE)
    expected = within @ conversion(space, REC709).T
    assert np.abs(developed(tmp_path / "a.dng") - expected).max() < 2e-4


@pytest.mark.parametrize("make", MAKERS)
def test_no_camera_changes_it(tmp_path, light, make):
    """LibRaw knows cameras' margins, levels and colours by their names."""
    write_radiance(tmp_path / "a.dng", light, metadata=metadata(make, MAKERS[make]), exposure=EXPOSURE)
    assert developed(tmp_path / "a.dng").shape == light.shape
    assert np.abs(developed(tmp_path / "a.dng") - light).max() < 3e-5


def test_safnet_reads_it_as_a_frame(tmp_path, light):
    write_radiance(tmp_path / "a.dng", light, metadata=metadata(), exposure=EXPOSURE)
    header = read_header(tmp_path / "a.dng")
    assert (header.width, header.height) == (WIDTH, HEIGHT)
    assert header.colour.is_linear
    assert conversion(header.colour.space, REC709) is None
    assert (header.exposure_time, header.f_number, header.iso) == pytest.approx((0.25, 8, 200), rel=1e-3)
    kept = {name: value for name, _, value in header.metadata}
    assert kept["Copyright"] == "\N{COPYRIGHT SIGN} Somebody"
    assert kept["Exif:DateTimeOriginal"] == "2024:05:06 07:08:09"
    assert kept["GPS:Latitude"] == (47, 30, 0)
    found = ldr_values(read_frame(header))[0].permute(1, 2, 0).numpy().astype(np.float64) ** GAMMA
    assert np.abs(found - light).max() < 1e-5


@pytest.mark.parametrize(("depth", "stored"), [("uint16", np.uint16), ("half", np.float16)])
def test_tags(tmp_path, light, depth, stored):
    write_radiance(tmp_path / "a.dng", light, depth, metadata=metadata(), exposure=EXPOSURE)
    with tifffile.TiffFile(tmp_path / "a.dng") as file:
        tags = {tag.name: tag.value for tag in file.pages[0].tags.values()}
        pixels = file.pages[0].asarray()
    assert pixels.dtype == stored
    scale = 65535 if depth == "uint16" else 1
    assert pixels.astype(np.float64) / scale == pytest.approx(light, rel=6e-4, abs=0.5001 / 65535)
    assert tags["PhotometricInterpretation"] == 34892, "LinearRaw"
    assert tags["DNGVersion"] == bytes([1, 4, 0, 0])
    assert tags["DNGBackwardVersion"] == bytes([1, 1 if depth == "uint16" else 4, 0, 0])
    assert (tags["BlackLevel"], tags["WhiteLevel"]) == ((0, 0, 0), (scale,) * 3)
    assert tags["AsShotNeutral"] == (1, 1) * 3
    assert tags["BaselineExposure"] == (2, 1), "stops to the reference exposure"
    assert tags["Orientation"] == 1
    assert tags["UniqueCameraModel"] == "safnet Rec.709"
    numbers = np.array(tags["ColorMatrix1"], np.float64).reshape(9, 2)
    assert (numbers[:, 0] / numbers[:, 1]).reshape(3, 3) @ REC709.to_xyz() == pytest.approx(np.eye(3), abs=1e-5)


def test_what_lies_outside_is_clipped(tmp_path):
    light = np.full((40, 40, 3), 0.5, np.float32)
    light[0], light[1] = 1.5, -0.5
    for depth in ("uint16", "half"):
        write_radiance(tmp_path / "a.dng", light, depth)
        found = developed(tmp_path / "a.dng", rawpy.ColorSpace.raw)
        assert (found[0] == 1).all()
        assert (found[1] == 0).all()
        assert found[2] == pytest.approx(0.5, abs=1e-4)


def test_a_fusion_is_written_and_is_no_frame(tmp_path):
    light = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8) * 0.2 + 0.01, (48, 64), mode="bicubic")[0]
    for number, gain in enumerate((1, 4, 16)):
        codes = np.round(255 * (light * gain).clip(0, 1).permute(1, 2, 0).numpy() ** (1 / 2.2)).astype(np.uint8)
        save_frame(tmp_path / f"{number}.png", codes)
    output = tmp_path / "r.dng"
    result = safnet.fuse_files(tmp_path, output, evs=(-2, 0, 2), model=plain_model(), measure=False)
    radiance = result.radiance[0].permute(1, 2, 0).numpy()
    assert np.abs(developed(output) - radiance).max() < 3e-5
    assert is_result(output)
    assert [path.name for path in find_frames(tmp_path)] == ["0.png", "1.png", "2.png"]
    again = safnet.fuse_files(tmp_path, output, evs=(-2, 0, 2), model=plain_model(), measure=False, overwrite=True)
    assert torch.equal(again.radiance, result.radiance)
    with pytest.raises(ImageError, match=r"--depth float does not fit .*r\.dng: \.dng holds uint16 or half"):
        safnet.fuse_files(tmp_path, output, evs=(-2, 0, 2), depth="float", overwrite=True)


def test_failures_are_one_line(tmp_path, light):
    with pytest.raises(ImageError, match=r"a\.dng cannot be written: [^\n]+$"):
        write_radiance(tmp_path / "gone" / "a.dng", light)
    assert list(tmp_path.iterdir()) == []
