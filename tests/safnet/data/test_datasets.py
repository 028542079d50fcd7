"""The layouts of the public data sets, written small, and what is said of broken ones."""

import numpy as np
import pytest
import torch

from safnet.data.datasets import DatasetError, find_scenes, load_scene, ntire_encode, read_radiance
from tests.support.scenes import (
    EVS,
    HEIGHT,
    WIDTH,
    expose,
    make_radiance,
    write,
    write_challenge123,
    write_frames,
    write_kalantari17,
    write_ntire21,
    write_tel23,
)

HDR_STEP = 2.0**-7  # of values in [0, 1]: .hdr files share one exponent among the channels of a pixel


def planes(picture):
    return torch.from_numpy(np.moveaxis(picture, -1, 0).copy())


def only_scene(dataset, root):
    (files,) = find_scenes(dataset, root)
    return files.name, load_scene(files)


def check(sample, truth, tolerance=HDR_STEP):
    assert sample.frames.shape == (3, 3, HEIGHT, WIDTH)
    assert sample.frames.dtype == sample.truth.dtype == torch.float32
    torch.testing.assert_close(sample.truth, planes(truth), rtol=0, atol=tolerance)
    # Linear values of the reference are the truth where nothing clips: units and exposures agree.
    ratio = 2.0 ** (sample.evs[1] - sample.evs[0])
    linear = sample.frames[1].pow(2.2) / ratio
    inside = sample.frames[1] < 0.98
    torch.testing.assert_close(linear[inside], sample.truth[inside], rtol=0.04, atol=tolerance)


def test_kalantari17(tmp_path):
    truth = write_kalantari17(tmp_path, ["001"])["001"]
    name, sample = only_scene("kalantari17", tmp_path)
    assert (name, sample.evs, sample.flow) == ("001", EVS, None)
    check(sample, truth)


def test_kalantari17_of_one_split_or_the_scenes_themselves(tmp_path):
    write_kalantari17(tmp_path, ["001", "002"])
    (tmp_path / "Test").rename(tmp_path / "Training")
    assert [files.name for files in find_scenes("kalantari17", tmp_path, "Training")] == ["001", "002"]
    assert [files.name for files in find_scenes("kalantari17", tmp_path / "Training")] == ["001", "002"]
    with pytest.raises(DatasetError, match="no scene of the kalantari17 layout, which is SCENE/"):
        find_scenes("kalantari17", tmp_path)


def test_challenge123_takes_each_frame_from_its_own_folder(tmp_path):
    truth = write_challenge123(tmp_path, "007")
    name, sample = only_scene("challenge123", tmp_path)
    assert (name, sample.evs) == ("007", EVS)
    check(sample, truth)
    for k, ev in enumerate(EVS):
        expected = expose(truth, 2.0 ** (ev - EVS[0])) / np.float32(2**16)
        assert torch.equal(sample.frames[k], planes(expected))


def test_tel23(tmp_path):
    truth = write_tel23(tmp_path, "scene_0001_1")
    name, sample = only_scene("tel23", tmp_path)
    assert (name, sample.evs) == ("scene_0001_1", (0, 2, 4))
    check(sample, truth)


def test_ntire21_is_brought_to_the_protocols_gamma_and_units(tmp_path):
    truth = write_ntire21(tmp_path, "0001")
    name, sample = only_scene("ntire21", tmp_path)
    assert (name, sample.evs) == ("0001", EVS)
    check(sample, truth, tolerance=1e-3)
    encoded = ntire_encode(sample.truth, 2.0)
    stored = read_radiance(tmp_path / "0001" / "gt.png", integers=True) / np.load(tmp_path / "0001" / "alignratio.npy")
    torch.testing.assert_close(encoded, planes(stored.astype(np.float32)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("truth_name", ["truth.exr", "gt.hdr", "HDRImg.tif"])
def test_folder_of_ones_own(tmp_path, truth_name):
    folder = tmp_path / "garden"
    truth = write_frames([folder / f"{k}.png" for k in "abc"], seed=3)
    write(folder / truth_name, truth)
    (folder / "exposure.txt").write_text("0 2 4")
    name, sample = only_scene("folder", tmp_path)
    assert (name, sample.evs) == ("garden", (0, 2, 4))
    check(sample, truth)


def test_sixteen_bits_are_divided_by_two_to_the_sixteen_and_stay_in_rgb_order(tmp_path):
    write_kalantari17(tmp_path, ["001"])
    red = np.zeros((HEIGHT, WIDTH, 3), np.uint16)
    red[..., 0] = 65535
    write(tmp_path / "Test" / "001" / "262A1.tif", red)
    _, sample = only_scene("kalantari17", tmp_path)
    assert torch.equal(sample.frames[1, 0], torch.full((HEIGHT, WIDTH), 65535 / 65536))
    assert not sample.frames[1, 1:].any()


def test_frames_come_by_exposure_whatever_their_names(tmp_path):
    truth = write_kalantari17(tmp_path, ["001"], evs=(2.0, 0.0, -2.0))["001"]
    _, sample = only_scene("kalantari17", tmp_path)
    assert sample.evs == EVS
    check(sample, truth)


def test_true_flow_is_read_where_there_is_one(tmp_path):
    write_kalantari17(tmp_path, ["001"])
    flow = np.random.default_rng(0).normal(0, 3, (2, 2, HEIGHT, WIDTH)).astype(np.float16)
    np.save(tmp_path / "Test" / "001" / "flow.npy", flow)
    _, sample = only_scene("kalantari17", tmp_path)
    assert torch.equal(sample.flow, torch.from_numpy(flow).float())
    np.save(tmp_path / "Test" / "001" / "flow.npy", flow[:, :, 1:])
    with pytest.raises(DatasetError, match=r"flow.npy must be \(2, 2, 64, 96\), got \(2, 2, 63, 96\)"):
        only_scene("kalantari17", tmp_path)


BREAKAGES = {
    "missing truth": (lambda folder: (folder / "HDRImg.hdr").unlink(), "HDRImg.hdr does not exist"),
    "missing exposures": (lambda folder: (folder / "exposure.txt").unlink(), "exposure.txt does not exist"),
    "missing frame": (lambda folder: (folder / "262A2.tif").unlink(), "must have three frames, got 2"),
    "other size": (
        lambda folder: write(folder / "262A2.tif", np.zeros((HEIGHT, WIDTH + 1, 3), np.uint16)),
        "262A2.tif is 97x64, but its truth HDRImg.hdr is 96x64",
    ),
    "no picture": (lambda folder: (folder / "262A2.tif").write_text("nothing"), "262A2.tif cannot be read"),
    "cut off": (
        lambda folder: (folder / "HDRImg.hdr").write_bytes((folder / "HDRImg.hdr").read_bytes()[:900]),
        "HDRImg.hdr cannot be read",
    ),
    "words for EVs": (lambda folder: (folder / "exposure.txt").write_text("dark\n"), "could not convert string"),
    "two EVs": (
        lambda folder: (folder / "exposure.txt").write_text("0\n2\n"),
        "must hold three different EVs, got 0.0, 2.0",
    ),
    "equal EVs": (lambda folder: (folder / "exposure.txt").write_text("0\n0\n2\n"), "must hold three different EVs"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_scene_is_listed_and_says_what_is_wrong(tmp_path, breakage):
    write_kalantari17(tmp_path, ["001", "002"])
    spoil, message = BREAKAGES[breakage]
    spoil(tmp_path / "Test" / "001")
    broken, good = find_scenes("kalantari17", tmp_path)
    with pytest.raises(DatasetError, match=message) as caught:
        load_scene(broken)
    assert str(caught.value).startswith("scene 001: ") or str(caught.value).startswith("scene 001 must")
    assert load_scene(good).evs == EVS


def test_a_truth_that_is_not_finite(tmp_path):
    folder = tmp_path / "garden"
    truth = write_frames([folder / f"{k}.png" for k in "abc"], seed=3)
    truth[3, 4] = np.nan
    write(folder / "truth.exr", truth)
    (folder / "exposure.txt").write_text("0 2 4")
    with pytest.raises(DatasetError, match=r"truth.exr must hold finite numbers, but 3 are not"):
        only_scene("folder", tmp_path)


def test_refusals(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        find_scenes("kalantari17", tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"data set must be one of .*, got 'sintel'"):
        find_scenes("sintel", tmp_path)
    write(tmp_path / "integers.tif", expose(make_radiance(), 1.0))
    with pytest.raises(ValueError, match="must hold floating-point radiance, got uint16"):
        read_radiance(tmp_path / "integers.tif")
