import csv
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from safnet import load_model
from safnet.data.datasets import DatasetError
from safnet.data.scenes import write_scene
from safnet.model import SAFNet
from safnet.weights import WeightsError
from tests.support.scenes import make_scene

pytest.importorskip("lightning", reason="training needs the extra `train`")

import safnet.training.run
from safnet.training.callbacks import CHECKPOINT, METRICS, PICTURES, WEIGHTS, Keeper
from safnet.training.crops import Crops
from safnet.training.perceptual import VGG16
from safnet.training.run import Training, fresh_model, train
from safnet.training.settings import TrainingError, TrainSettings


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for split, seeds in (("Training", range(3)), ("Test", range(3, 5))):
        for seed in seeds:
            write_scene(make_scene(seed), folder / split / f"{seed:04d}")
    return folder


@pytest.fixture
def settings(scenes, tmp_path):
    return TrainSettings(
        tmp_path / "run",
        scenes,
        model="small",
        crop=32,
        window=16,
        windows=1,
        perceptual_weight=0.0,
        steps=4,
        batch=2,
        warm_up=1,
        validate_every=2,
        device="cpu",
        threads=1,
        workers=0,
    )


def same_state(one: Path, other: Path) -> bool:
    first, second = (load_model(folder / WEIGHTS).state_dict() for folder in (one, other))
    return all(torch.equal(first[key], second[key]) for key in first)


def read_metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / METRICS).open(newline="") as file:
        return list(csv.DictReader(file))


def global_step(folder: Path) -> int:
    return torch.load(folder / CHECKPOINT, weights_only=False)["global_step"]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_crashed_ends_as_one_that_did_not(settings, tmp_path, monkeypatch, workers):
    """Saved after step 2, dead in step 4, begun again: the same weights and the same recorded steps."""
    settings = replace(settings, workers=workers)
    train(settings, quiet=True)

    resumed = replace(settings, out=tmp_path / "stopped")
    original = Training.training_step

    def die_in_the_fourth_step(self, crop, index):
        if self.trainer.global_step == 3:
            raise RuntimeError("power cut")
        return original(self, crop, index)

    monkeypatch.setattr(Training, "training_step", die_in_the_fourth_step)
    with pytest.raises(RuntimeError, match="power cut"):
        train(resumed, quiet=True)
    monkeypatch.undo()
    assert global_step(resumed.out) == 2
    assert train(resumed, quiet=True) == (4, 0)
    assert same_state(settings.out, resumed.out)
    assert global_step(resumed.out) == 4
    assert not list(resumed.out.glob("*.partial"))
    for one, other in zip(read_metrics(settings.out), read_metrics(resumed.out), strict=True):
        assert {**one, "samples_per_second": ""} == {**other, "samples_per_second": ""}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_after_the_step_at_hand(settings, tmp_path, monkeypatch, number):
    settings = replace(settings, validate_every=100)
    train(settings, quiet=True)
    resumed = replace(settings, out=tmp_path / "stopped")
    before, original = signal.getsignal(number), Training.training_step

    def receive_in_the_third_step(self, crop, index):
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), number)
        return original(self, crop, index)

    monkeypatch.setattr(Training, "training_step", receive_in_the_third_step)
    assert train(resumed, quiet=True) == (3, number)
    monkeypatch.undo()
    assert signal.getsignal(number) == before
    assert global_step(resumed.out) == 3
    assert train(resumed, quiet=True) == (4, 0)
    assert same_state(settings.out, resumed.out)


def test_a_run_is_saved_when_its_minutes_are_over(settings, monkeypatch):
    saved = []
    monkeypatch.setattr(Keeper, "_save", lambda self, trainer, module: saved.append(trainer.global_step))
    train(replace(settings, validate_every=100), quiet=True)
    assert saved == [4]  # five minutes never are
    saved.clear()
    train(replace(settings, validate_every=100, checkpoint_minutes=0.0), quiet=True)
    assert saved == [1, 2, 3, 4]


def test_training_lowers_the_loss(settings):
    """A few dozen steps on three scenes learn their exposures' masks at the least."""
    train(replace(settings, steps=20, census_weight=0.0, learning_rate=1e-3), quiet=True)
    losses = [float(row["loss/fused"]) for row in read_metrics(settings.out) if row["loss/fused"]]
    assert losses[-1] < 0.9 * losses[0]
    assert load_model(settings.out / WEIGHTS).variant == "small"


def test_validation_scores_and_pictures_are_recorded(settings, scenes):
    train(replace(settings, validation=scenes, steps=3), quiet=True)
    scores = [row for row in read_metrics(settings.out) if row["validation/refined_psnr_mu"]]
    assert [row["step"] for row in scores] == ["2", "3"]
    for name in ("fused_psnr_mu", "fused_psnr_l", "refined_psnr_mu", "refined_psnr_l"):
        assert 10 < float(scores[0][f"validation/{name}"]) < 60
    from PIL import Image

    strip = Image.open(settings.out / PICTURES)
    assert strip.size == (6 * 192, 2 * 192)
    columns = np.asarray(strip).astype(int).reshape(2, 192, 6, 192, 3)
    assert abs(columns[:, :, 3] - columns[:, :, 5]).mean() < 40  # fused beside truth
    assert columns[:, :, 5].std() > 10


def test_tensorboard_has_scalars_and_pictures(settings, scenes):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(replace(settings, validation=scenes), quiet=True)
    events = accumulator.EventAccumulator(str(settings.out / "tensorboard"))
    events.Reload()
    assert {"loss", "loss/refined", "loss/fused", "samples_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("validation")] == [2, 4]


def test_two_processes_train_as_one_does(settings, scenes):
    """Each takes its share of every batch; up to rounding the gradients, and so the weights, are those of one process."""
    train(replace(settings, validation=scenes), quiet=True)
    out = settings.out.with_name("two")
    options = f"--scenes {scenes} --validation {scenes} --out {out} --model small --crop 32 --window 16 --windows 1"
    options += " --perceptual-weight 0 --steps 4 --batch 2 --warm-up 1 --validate-every 2 --workers 0 --threads 1"
    options += " --device cpu --devices 2 --strategy ddp"
    # Lightning chooses a free port where none is set.
    environment = {k: v for k, v in os.environ.items() if k not in ("MASTER_PORT", "MASTER_ADDR", "WORLD_SIZE", "RANK")}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "safnet.cli", "train", *options.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_model(folder / WEIGHTS).state_dict() for folder in (settings.out, out))
    for name in one:
        assert (one[name] - two[name]).abs().mean() < 2e-6, name
    # Adam takes whole steps of 2e-4 even for the few gradients that are nothing but rounding.
    close = torch.cat([torch.isclose(one[name], two[name], rtol=1e-3, atol=2e-5).flatten() for name in one])
    assert close.float().mean() > 0.999
    rows = [[row for row in read_metrics(folder) if row["validation/fused_psnr_mu"]] for folder in (settings.out, out)]
    for first, second in zip(*rows, strict=True):
        assert float(first["validation/fused_psnr_mu"]) == pytest.approx(
            float(second["validation/fused_psnr_mu"]), abs=1e-2
        )


# ---- what is trained -------------------------------------------------------------------------------------------------


def test_the_full_model_starts_from_a_small_ones_encoder_and_decoder(settings):
    small = SAFNet("small")
    module = Training(replace(settings, model="full"), None, start=small)
    for name, value in small.state_dict().items():
        if name.startswith(("encoder.", "decoder.")):
            assert torch.equal(module.model.state_dict()[name], value)


@pytest.mark.parametrize("initialisation", ["matching", "kaiming", "torch"])
@pytest.mark.parametrize("variant", ["small", "full"])
def test_training_starts_at_the_unaligned_merge(settings, variant, initialisation):
    exposures = torch.rand(3, 1, 6, 32, 32)
    model = fresh_model(replace(settings, model=variant, initialisation=initialisation))
    alignment = model.estimate(*exposures)
    assert all(part.abs().max() == 0 for part in alignment)
    fused, refined = model(*exposures)
    assert torch.equal(fused.clamp(0, 1), refined)


def test_kaiming_initialisation_keeps_the_signal(settings):
    """What varies over space varies in the last level's features as much as in the picture; torch's default loses it."""
    torch.manual_seed(0)
    exposure = torch.rand(1, 6, 128, 128, generator=torch.Generator().manual_seed(0))
    spread = {}
    for initialisation in ("kaiming", "torch"):
        features = fresh_model(replace(settings, initialisation=initialisation)).encoder(exposure)[-1]
        spread[initialisation] = features.std((2, 3)).mean().item()
    assert spread["kaiming"] > 0.05
    assert spread["kaiming"] > 10 * spread["torch"]


def test_encoder_and_last_layer_have_rates_of_their_own(settings):
    module = Training(replace(settings, weight_decay=0.1, warm_up=0, encoder_rate=0.5), None)
    groups = module.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(module.model.parameters()))
    for name, parameter in module.model.named_parameters():
        part = 0.03 if name.startswith("refinenet.conv7.") else 0.5 if name.startswith("encoder.") else 1
        assert rates[id(parameter)] == pytest.approx(2e-4 * part)
        assert decays[id(parameter)] == (0.1 if parameter.dim() > 1 else 0)


@pytest.mark.parametrize(("without", "still"), [("mask,refine", "mask_short"), ("flow,refine", "flow_short")])
def test_a_model_trained_without_a_part_has_none_of_it(settings, without, still):
    train(replace(settings, without=without, learning_rate=1e-2, ema_decay=0.0), quiet=True)
    model = load_model(settings.out / WEIGHTS)
    exposures = torch.rand(3, 1, 6, 64, 64)
    with torch.no_grad():
        fusion = model.fuse(*exposures, model.estimate(*exposures))
        assert torch.equal(model.refine(*exposures, fusion), fusion.fused.clamp(0, 1))
    constant = {"mask_short": 1.0, "flow_short": 0.0}
    for name, value in constant.items():
        assert bool((getattr(fusion.alignment, name) == value).all()) == (name == still)
    assert not any(row["loss/refined"] for row in read_metrics(settings.out))


def test_the_moving_average_is_what_is_kept(settings):
    train(settings, quiet=True)
    state = torch.load(settings.out / CHECKPOINT, weights_only=False)["state_dict"]
    kept = load_model(settings.out / WEIGHTS).state_dict()
    name = "decoder.conv6.weight"
    assert torch.equal(kept[name], state[f"averaged.module.{name}"])
    assert not torch.equal(kept[name], state[f"model.{name}"])
    last = replace(settings, ema_decay=0.0, out=settings.out / "last")
    train(last, quiet=True)
    assert torch.equal(load_model(last.out / WEIGHTS).state_dict()[name], state[f"model.{name}"])


def test_gradients_are_clipped(settings):
    module = Training(replace(settings, gradient_clip=0.5), None)
    optimizer = module.configure_optimizers()["optimizer"]
    for clip, expected in ((0.5, 0.5), (0.0, 100.0)):
        module.settings = replace(settings, gradient_clip=clip)
        for parameter in module.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        weight = module.model.decoder.conv6.weight
        weight.grad[0, 0, 0, 0] = 100.0
        module.configure_gradient_clipping(optimizer)
        assert weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)
    weight.grad[0, 0, 0, 0] = float("nan")
    module.configure_gradient_clipping(optimizer)
    assert weight.grad is None  # the step does nothing then


def test_mixed_precision_trains_nearly_as_float32(settings):
    train(settings, quiet=True)
    half = replace(settings, precision="bfloat16", out=settings.out / "half")
    train(half, quiet=True)
    for one, other in zip(read_metrics(settings.out), read_metrics(half.out), strict=True):
        if one["loss"]:
            assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=0.02)
    assert all(value.dtype == torch.float32 for value in load_model(half.out / WEIGHTS).state_dict().values())


@pytest.mark.parametrize("warp", ["crop", "window"])
@pytest.mark.parametrize("variant", ["small", "full"])
def test_a_single_window_is_one_of_all_windows(settings, scenes, variant, warp):
    """Refining some windows gives what these have where all are refined."""
    from safnet.training.crops import FileScenes, find_scenes

    settings = replace(settings, model=variant, warp=warp)
    crops = Crops(FileScenes(find_scenes("kalantari17", scenes, "Training")), settings)
    batch = torch.utils.data.default_collate([crops[0], crops[1]])
    module = Training(settings, None)
    torch.nn.init.normal_(
        module.model.refinenet.conv7.weight if variant == "small" else module.model.refinenet.conv3.weight, std=0.01
    )
    torch.nn.init.normal_(module.model.decoder.conv6.weight, std=0.05)
    short, reference, long = batch.exposures.unbind(1)
    fusion = module.model.fuse(short, reference, long, module.model.estimate(short, reference, long))
    refined, truth = module._refine_windows(batch, fusion)
    module.settings = replace(settings, windows=0)
    whole, whole_truth = module._refine_windows(batch, fusion)
    assert refined.shape == (2, 3, 16, 16)
    assert whole.shape == (2, 3, 32, 32)
    for number in range(2):
        row, column = divmod(int(batch.windows[number, 0]), 2)
        area = (number, slice(None), slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
        assert torch.equal(truth[number], whole_truth[area])
        assert torch.allclose(refined[number], whole[area], atol=1e-6)


def test_the_perceptual_loss_takes_part(settings, tmp_path):
    torch.manual_seed(0)
    torch.save(VGG16().state_dict(), tmp_path / "vgg16.pth")
    train(replace(settings, steps=2, perceptual_weight=0.01, vgg16=tmp_path / "vgg16.pth"), quiet=True)
    assert float(read_metrics(settings.out)[0]["loss/perceptual"]) > 0
    state = torch.load(settings.out / CHECKPOINT, weights_only=False)["state_dict"]
    assert not any("vgg16" in name for name in state)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"batch": -1}, "--batch must be at least 1, got -1"),
        ({"crop": 40}, "--crop must be a multiple of 32, got 40"),
        ({"crop": 128}, "--crop must fit the scenes, which are 64x64, got 128"),
        ({"window": 12}, "--window must divide --crop 32, got 12"),
        ({"windows": 5}, "--windows must be at most the 4 of a crop, got 5"),
        ({"learning_rate": 0.0}, "--learning-rate must be between 0 and 1, got 0"),
        ({"last_learning_rate": 1e-2}, "--last-learning-rate must be at most --learning-rate 0.0002, got 0.01"),
        ({"flow_weight": -1.0}, "--flow-weight must be at least 0, got -1"),
        ({"census_weight": float("nan")}, "--census-weight must be at least 0, got nan"),
        ({"warm_up": -1}, "--warm-up must be at least 0, got -1"),
        ({"ema_decay": 1.0}, "--ema-decay must be below 1, got 1.0"),
        ({"without": "mask,hat"}, "--without must name parts of mask, flow, fused, refine, got 'hat'"),
        ({"devices": 3}, "--batch must be a multiple of 3 devices x 1 nodes, got 2"),
        ({"strategy": "magic"}, "--strategy must be one of auto, .*ddp.* got 'magic'"),
        ({"precision": "float16"}, "--precision float16 needs a GPU, got --device cpu"),
        ({"panoramas": Path("sky")}, "either --scenes or --panoramas must be given, got both"),
        ({"scenes": None}, "either --scenes or --panoramas must be given, got neither"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_written(settings, change, message):
    with pytest.raises(TrainingError, match=message):
        train(replace(settings, **change), quiet=True)
    assert not settings.out.exists()


def test_files_that_cannot_be(settings, tmp_path, scenes):
    with pytest.raises(DatasetError, match="does not exist"):
        train(replace(settings, scenes=tmp_path / "nowhere"), quiet=True)
    with pytest.raises(WeightsError, match="does not exist"):
        train(replace(settings, start=tmp_path / "none.safetensors"), quiet=True)
    with pytest.raises(WeightsError, match=r"--vgg16 .*none.pth does not exist; .* --perceptual-weight 0"):
        train(replace(settings, perceptual_weight=0.01, vgg16=tmp_path / "none.pth"), quiet=True)
    broken = tmp_path / "broken"
    for number in range(2):
        write_scene(make_scene(number), broken / "Training" / f"{number}")
    (broken / "Training/1/exposure.txt").unlink()
    with pytest.raises(DatasetError, match=r"scene 1: .*1/exposure.txt does not exist"):
        train(replace(settings, scenes=broken), quiet=True)
    assert not settings.out.exists()


def test_a_run_is_gone_on_with_as_it_was_begun(settings):
    train(settings, quiet=True)
    with pytest.raises(TrainingError, match="--batch must stay 2 to go on"):
        train(replace(settings, batch=1), quiet=True)
    with pytest.raises(TrainingError, match="--steps must be at least the 4 done"):
        train(replace(settings, steps=2), quiet=True)


def test_weights_that_match_frames_are_fitted_to_the_scenes_before_the_first_step(settings, monkeypatch):
    """Scenes that move by whole pixels: the flow is nearer to the true one than none is, before anything was learned."""
    from safnet.training.crops import FileScenes, find_scenes

    torch.set_num_threads(1)
    module = Training(replace(settings, initialisation="matching", crop=64), None)
    module.scenes = FileScenes(find_scenes("kalantari17", settings.scenes, "Training"))
    monkeypatch.setattr(safnet.training.run, "FIT_PIXELS", 16 * 64**2)
    safnet.training.run.fit_to_scenes(module)
    crop = torch.utils.data.default_collate([Crops(module.scenes, module.settings)[n] for n in range(1000, 1008)])
    fusion = module.model.fuse(*crop.exposures.unbind(1), module.model.estimate(*crop.exposures.unbind(1)))
    inner = (..., slice(16, -16), slice(16, -16))
    error = (fusion.alignment.flow_short - crop.flow[:, 0]).norm(dim=1)[inner].mean()
    assert error < 0.8 * crop.flow[:, 0].norm(dim=1).mean()
