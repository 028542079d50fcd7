from dataclasses import replace

import numpy as np
import pytest
import torch

from safnet import load_model
from safnet.datasets import DatasetError, find_scenes
from safnet.model import SAFNet
from safnet.scenes import Scene, write_scene
from safnet.weights import WeightsError, save_model
from safnet_ops.reference import backward_warp

pytest.importorskip("lightning", reason="training needs the extra `train`")

from safnet.train import CHECKPOINT, Crops, TrainingError, TrainSettings, Whole, augment, fresh_model, train

SIZE = 64


def make_scene(seed: int) -> Scene:
    """A texture that shifts by whole pixels between the frames, exposed 0, 2 and 4 EV."""
    random = np.random.default_rng(seed)
    texture = torch.from_numpy(random.uniform(0.05, 1.0, (3, SIZE // 4 + 8, SIZE // 4 + 8)).astype(np.float32))
    texture = torch.nn.functional.interpolate(texture[None], scale_factor=4, mode="bicubic")[0].clamp(0, 1)
    dx, dy = (int(v) for v in random.integers(-6, 7, 2))
    views = [texture[:, 12 - k * dy : 12 - k * dy + SIZE, 12 - k * dx : 12 - k * dx + SIZE] for k in (-1, 0, 1)]
    frames = [(view * 2**ev / 4).clamp(0, 1) ** (1 / 2.2) for view, ev in zip(views, (0, 2, 4), strict=True)]
    flow = torch.tensor([[-dx, -dy], [dx, dy]], dtype=torch.float32).view(2, 2, 1, 1).expand(2, 2, SIZE, SIZE)
    truth = views[1] / 4
    return Scene(
        torch.stack(frames).mul(65535).floor() / 65536, (0, 2, 4), truth, flow, torch.ones(2, SIZE, SIZE).bool()
    )


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for split, seeds in (("Training", range(3)), ("Test", range(3, 5))):
        for seed in seeds:
            write_scene(make_scene(seed), folder / split / f"{seed:04d}")
    return folder


@pytest.fixture
def settings(scenes, tmp_path):
    return TrainSettings(scenes, tmp_path / "run", steps=4, block=2, batch=2, crop=32, window=16, warm_up=1, threads=1)


def same_state(one, other) -> bool:
    first, second = (load_model(path).state_dict() for path in (one, other))
    return all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(settings, tmp_path, monkeypatch):
    whole = train(settings, progress_bar=False)

    resumed = replace(settings, out=tmp_path / "stopped")
    calls = []

    class Stop(Exception):
        pass

    def stop_at_third(self, index):
        calls.append(index)
        if len(calls) > 5:
            raise Stop
        return original(self, index)

    original = Crops.__getitem__
    monkeypatch.setattr(Crops, "__getitem__", stop_at_third)
    with pytest.raises(Stop):
        train(resumed, progress_bar=False)
    monkeypatch.undo()
    half = torch.load(resumed.out / CHECKPOINT, weights_only=False)
    assert half["global_step"] == 2
    assert same_state(train(resumed, progress_bar=False), whole)
    assert torch.load(resumed.out / CHECKPOINT, weights_only=False)["global_step"] == 4
    assert not list(resumed.out.glob("*.partial"))


def test_training_lowers_the_loss(settings):
    """A few dozen steps on three scenes learn their exposures' masks at the least."""
    path = train(replace(settings, steps=30, block=30, census=0.0, learning_rate=1e-3), progress_bar=False)
    rows = np.genfromtxt(settings.out / "metrics.csv", delimiter=",", names=True)
    fused = rows["lossfused"][~np.isnan(rows["lossfused"])]
    assert fused[-1] < 0.9 * fused[0]
    assert load_model(path).variant == "small"


def test_validation_scores_are_recorded(settings, scenes):
    train(replace(settings, validation=scenes, steps=2), progress_bar=False)
    header = (settings.out / "metrics.csv").read_text().splitlines()[0]
    for name in ("fused_psnr_mu", "fused_psnr_l", "refined_psnr_mu", "refined_psnr_l"):
        assert f"validation/{name}" in header


def test_the_full_model_starts_from_a_small_ones_encoder_and_decoder(settings, tmp_path):
    small = SAFNet("small")
    save_model(small, tmp_path / "small.safetensors")
    from safnet.train import Training

    module = Training(replace(settings, model="full", start=tmp_path / "small.safetensors"), [], [])
    for name, value in small.state_dict().items():
        if name.startswith(("encoder.", "decoder.")):
            assert torch.equal(module.model.state_dict()[name], value)


def test_training_starts_at_the_unaligned_merge():
    exposures = torch.rand(3, 1, 6, 32, 32)
    for variant in ("small", "full"):
        model = fresh_model(variant)
        alignment = model.estimate(*exposures)
        assert all(part.abs().max() == 0 for part in alignment)
        fused, refined = model(*exposures)
        assert torch.equal(fused.clamp(0, 1), refined)


def test_crops_repeat_and_flow_follows_the_augmentation(scenes, settings):
    files = find_scenes("kalantari17", scenes, "Training")
    for number in range(8):
        crop = Crops(files, settings, 0, 8)[number]
        again = Crops(files, settings, number, 1)[0]
        assert all(torch.equal(one, other) for one, other in zip(crop, again, strict=True))
        # The scenes move by whole pixels, so a frame warped by the true flow is the reference, up to its exposure.
        inner = (..., slice(8, -8), slice(8, -8))
        warped = backward_warp(crop.exposures[:1, :3], crop.flow[:1])
        assert torch.allclose(warped[inner], crop.exposures[1:2, :3][inner], atol=1e-3)
        assert crop.window.min() >= 0
        assert crop.window.max() <= settings.crop - settings.window


def test_augmentation_permutes_frames_and_truth_alike():
    frames = torch.arange(27.0).view(3, 3, 1, 3).expand(3, 3, 3, 3)
    parts = augment(np.random.default_rng(1), frames, frames[1], torch.zeros(2, 2, 3, 3), torch.ones(2, 3, 3).bool())
    assert torch.equal(parts[0][1], parts[1])


def test_validation_scenes_come_whole(scenes):
    exposures, truth = Whole(find_scenes("kalantari17", scenes, "Test"))[0]
    assert exposures.shape == (3, 6, SIZE, SIZE)
    assert truth.shape == (3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"steps": 5}, "--steps must be a multiple of --block 2, got 5"),
        ({"batch": -1}, "--batch must be at least 1, got -1"),
        ({"crop": 40}, "--crop must be a multiple of 32, got 40"),
        ({"crop": 128}, "--crop must fit the scenes, which are 64x64, got 128"),
        ({"window": 64}, "--window must be from 1 to --crop 32, got 64"),
        ({"learning_rate": 0.0}, "--learning-rate must be between 0 and 1, got 0"),
        ({"flow": -1.0}, "--flow must not be negative, got -1"),
        ({"warm_up": -1}, "--warm-up must not be negative, got -1"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(settings, change, message):
    with pytest.raises(TrainingError, match=message):
        train(replace(settings, **change), progress_bar=False)
    assert not settings.out.exists()


def test_folders_that_cannot_be(settings, tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        train(replace(settings, scenes=tmp_path / "nowhere"), progress_bar=False)
    with pytest.raises(WeightsError, match="does not exist"):
        train(replace(settings, start=tmp_path / "none.safetensors"), progress_bar=False)
    assert not settings.out.exists()


def test_a_run_is_gone_on_with_as_it_was_begun(settings):
    train(settings, progress_bar=False)
    with pytest.raises(TrainingError, match="--batch must stay 2 to go on"):
        train(replace(settings, batch=1), progress_bar=False)
    with pytest.raises(TrainingError, match="--steps must be at least the 4 done"):
        train(replace(settings, steps=2), progress_bar=False)
