"""`fuse_files` for those who program; what it does with files is tested with the command."""

import re
import threading

import numpy as np
import OpenImageIO as oiio
import pytest
import torch

import safnet
from safnet.images import write_radiance
from safnet.model import SAFNet
from tests.support.frames import save_frame
from tests.support.scenes import make_radiance

EVS = (-2.0, 0.0, 2.0)


@pytest.fixture
def model():
    torch.manual_seed(3)
    return SAFNet("small").eval()


@pytest.fixture
def frames(tmp_path):
    radiance = make_radiance(height=40, width=56)
    paths = [tmp_path / name for name in ("short.png", "reference.png", "long.png")]
    for path, ev in zip(paths, EVS, strict=True):
        ldr = np.clip(radiance * 2.0 ** (ev - EVS[0]), 0, 1) ** (1 / 2.2)
        save_frame(path, np.round(ldr * 255).astype(np.uint8))
    return paths


def test_files_are_fused_as_their_pictures_are(frames, model, tmp_path):
    before = sorted(tmp_path.iterdir())
    result = safnet.fuse_files([frames[2], str(frames[0]), frames[1]], evs=(2, -2, 0), model=model, measure=False)
    assert sorted(tmp_path.iterdir()) == before
    tensors = [torch.from_numpy(oiio.ImageInput.open(str(p)).read_image("uint8")) / 255 for p in frames]
    expected = safnet.fuse_exposures(model, [picture.permute(2, 0, 1)[None] for picture in tensors], EVS)
    torch.testing.assert_close(result.radiance, expected.radiance, rtol=1e-5, atol=1e-6)
    assert (result.evs, result.given_evs, result.curve) == (EVS, EVS, None)


def test_a_folder_and_all_results(frames, model, tmp_path):
    (tmp_path / "exposure.txt").write_text("2\n0\n-2\n")
    output, preview, steps = tmp_path / "out.exr", tmp_path / "out.png", tmp_path / "steps"
    stages = []
    result = safnet.fuse_files(
        str(tmp_path),
        str(output),
        model=model,
        depth="float",
        preview=str(preview),
        inspect=str(steps),
        progress=lambda stage, done, total: stages.append(stage),
    )
    written = oiio.ImageInput.open(str(output)).read_image("float")
    assert np.array_equal(written, result.radiance[0].permute(1, 2, 0).numpy())
    assert preview.is_file()
    assert (steps / "sheet.png").is_file()
    assert list(dict.fromkeys(stages)) == ["reading", "aligning", "refining", "writing"]
    with pytest.raises(safnet.ImageError, match=r"out\.exr exists already"):
        safnet.fuse_files(tmp_path, output, model=model)


def test_errors_are_those_of_the_package(frames, model, tmp_path):
    with pytest.raises(safnet.ExposureError, match="must give 3 values, got 2"):
        safnet.fuse_files(frames, evs=(0, 2), model=model)
    with pytest.raises(safnet.WeightsError, match="'nothing' is neither"):
        safnet.fuse_files(frames, evs=EVS, model="nothing")
    with pytest.raises(ValueError, match="--device abacus cannot be used"):
        safnet.fuse_files(frames, evs=EVS, device="abacus")


def test_slow_arithmetic_is_warned_of(frames, model, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.warns(safnet.FusionWarning, match="no float16 arithmetic") as caught:
        safnet.fuse_files(frames, evs=EVS, model=model, precision=torch.float16)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, e: (f[:1], e[:1]), "frames must be 2 to 9"),
        (lambda f, e: (f[:2], e), "evs must be 2 finite numbers that ascend"),
        (lambda f, e: ([f[0], f[1], f[2][..., 1:]], e), "frames must be 2 to 9"),
        (lambda f, e: (f, e[::-1]), "evs must be three finite numbers that ascend"),
        (
            lambda f, e: ([f[0], f[1].double(), f[2]], e),
            "reference frame must be float32, uint8 or uint16, got torch.float64",
        ),
        (lambda f, e: ([f[0], f[1], 255 * f[2]], e), r"long frame must have values in \[0, 1\], got .* to 2"),
        (lambda f, e: ([f[0] - 1, f[1], f[2]], e), r"short frame must have values in \[0, 1\], got -"),
        (lambda f, e: ([f[0] / 0, f[1], f[2]], e), r"short frame must have values in \[0, 1\]"),
    ],
)
def test_tensors_that_cannot_be_fused(model, change, message):
    frames = [torch.linspace(0, 1, 3 * 20 * 24).view(1, 3, 20, 24) for _ in EVS]
    frames, evs = change(frames, EVS)
    with pytest.raises(ValueError, match=f"fuse_exposures: .*{message}"):
        safnet.fuse_exposures(model, frames, evs)


def test_writers_of_one_result_do_not_meet(tmp_path):
    """Each writes another value; whoever is last, the file is whole, and nothing else is left."""
    path, errors = tmp_path / "out.exr", []

    def write(value):
        try:
            for _ in range(5):
                write_radiance(path, np.full((200, 300, 3), value, np.float32), "float")
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(value,)) for value in (0.25, 0.5, 0.75)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(np.unique(oiio.ImageInput.open(str(path)).read_image("float"))) == 1
    assert [re.sub(r"\d", "", file.name) for file in tmp_path.iterdir()] == ["out.exr"]
