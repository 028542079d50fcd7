"""Training on scenes in Kalantari17's layout, as `safnet synthesize` writes them.

What a step sees depends on its number and the seed alone, and checkpoints lie between blocks of steps: a run that is
killed and started again goes on as if nothing had happened. The weights to keep are the moving average of the trained
ones.
"""

import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

import safnet_ops
from safnet.datasets import DatasetError, SceneFiles, find_scenes, load_scene
from safnet.losses import census_loss, flow_loss, picture_loss
from safnet.metrics import psnr_l, psnr_mu
from safnet.model import Alignment, Fusion, SAFNet, Variant
from safnet.radiance import exposure_input, exposure_ratios
from safnet.weights import load_model, save_model

SCALE = 0.5  # of the sides at which flow and mask are estimated
CROP_MULTIPLE = 32  # so that the halved crop has whole cells at every level
CHECKPOINT = "last.ckpt"
CHANGEABLE = ("steps", "threads", "workers", "out", "scenes", "validation")  # options that a resumed run may change


class TrainingError(ValueError):
    """An option, or a folder, with which no training can start."""


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained.

    Attributes:
        scenes: folder in Kalantari17's layout.
        out: folder of the run: last.ckpt, model.safetensors (moving average), metrics.csv.
        validation: folder of held-out scenes that are scored after every block; None for none.
        model: "small" or "full".
        start: weights to start from; tensors that fit by name and shape are taken. None for a fresh model.
        steps: in all; the learning rate falls on a cosine to FLOOR of itself at the last one.
        block: steps between checkpoints.
        batch: crops a step.
        crop: side of the crops, a multiple of 32.
        window: side of the part of each crop that is refined; smaller is faster.
        learning_rate: of Adam, after `warm_up` steps.
        census, flow: weights of the explicit fusion's census loss, and of the true flow where the scenes have it.
        seed: of weights, crops and augmentation.
        threads: CPU threads, 0 for torch's choice. workers: processes that read scenes, 0 for none.
    """

    scenes: Path
    out: Path
    validation: Path | None = None
    model: Variant = "small"
    start: Path | None = None
    steps: int = 20000
    block: int = 100
    batch: int = 4
    crop: int = 256
    window: int = 128
    learning_rate: float = 5e-4
    warm_up: int = 100
    census: float = 1.0
    flow: float = 0.01
    seed: int = 0
    threads: int = 0
    workers: int = 0


FLOOR = 0.02  # last learning rate over the first
FUSED_WEIGHT = 0.1  # of the explicit fusion's loss beside the refined result's
GRADIENT_NORM = 0.5
AVERAGE_DECAY = 0.998


def train(settings: TrainSettings, *, progress_bar: bool = True) -> Path:
    """Train, or go on with the run that `settings.out` holds; returns the path of the model's weights.

    Raises:
        TrainingError, DatasetError: a setting or a scene folder is not usable; nothing was written then.
    """
    scenes, held_out = check(settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    lightning.seed_everything(settings.seed, verbose=False)
    settings.out.mkdir(parents=True, exist_ok=True)
    module = Training(settings, scenes, held_out)
    checkpoint = settings.out / CHECKPOINT
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    callbacks: list[Callback] = [Keeper(settings)]
    if progress_bar:
        callbacks.append(RichProgressBar(leave=True))
    trainer = lightning.Trainer(
        max_epochs=settings.steps // settings.block,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if held_out else 0,
        log_every_n_steps=min(10, settings.block),
        logger=CSVLogger(settings.out, name="", version=""),
        callbacks=callbacks,
        enable_progress_bar=progress_bar,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=settings.out,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|experiment logs directory).*")
        trainer.fit(module, ckpt_path=checkpoint if checkpoint.exists() else None, weights_only=False)
    return settings.out / "model.safetensors"


def check(settings: TrainSettings) -> tuple[list[SceneFiles], list[SceneFiles]]:
    """Training and validation scenes, or an error that names the option at fault."""
    for name in ("steps", "block", "batch"):
        if getattr(settings, name) < 1:
            raise TrainingError(f"--{name} must be at least 1, got {getattr(settings, name)}")
    if settings.steps % settings.block:
        raise TrainingError(f"--steps must be a multiple of --block {settings.block}, got {settings.steps}")
    if settings.crop < CROP_MULTIPLE or settings.crop % CROP_MULTIPLE:
        raise TrainingError(f"--crop must be a multiple of {CROP_MULTIPLE}, got {settings.crop}")
    if not 1 <= settings.window <= settings.crop:
        raise TrainingError(f"--window must be from 1 to --crop {settings.crop}, got {settings.window}")
    if not 0 < settings.learning_rate < 1:
        raise TrainingError(f"--learning-rate must be between 0 and 1, got {settings.learning_rate}")
    for name in ("census", "flow", "warm_up", "threads", "workers"):
        if getattr(settings, name) < 0:
            raise TrainingError(f"--{name.replace('_', '-')} must not be negative, got {getattr(settings, name)}")
    if settings.out.exists() and not settings.out.is_dir():
        raise TrainingError(f"--out {settings.out} is not a folder")
    if settings.start is not None:
        load_model(settings.start)
    checkpoint = settings.out / CHECKPOINT
    if checkpoint.exists():
        _check_resumable(settings, torch.load(checkpoint, weights_only=False, map_location="cpu", mmap=True))
    scenes = find_scenes("kalantari17", settings.scenes, "Training")
    first = load_scene(scenes[0]).truth
    if min(first.shape[1:]) < settings.crop:
        raise TrainingError(
            f"--crop must fit the scenes, which are {first.shape[2]}x{first.shape[1]}, got {settings.crop}"
        )
    held_out = find_scenes("kalantari17", settings.validation, "Test") if settings.validation else []
    return scenes, held_out


def _check_resumable(settings: TrainSettings, checkpoint: dict[str, Any]) -> None:
    before = checkpoint["settings"]
    for name, value in vars(settings).items():
        if name not in CHANGEABLE and name in before and before[name] != value:
            option = f"--{name.replace('_', '-')}"
            raise TrainingError(
                f"{option} must stay {before[name]} to go on with {settings.out}, got {value}; "
                "use another --out for a new run"
            )
    if checkpoint["global_step"] > settings.steps:
        done = f"the {checkpoint['global_step']} done in {settings.out}"
        raise TrainingError(f"--steps must be at least {done}, got {settings.steps}")


# ---- data ------------------------------------------------------------------------------------------------------------


class Crop(NamedTuple):
    """A training example, batched by the loader.

    exposures: (3, 6, h, w) network input; truth: (3, h, w); flow: (2, 2, h, w); visible: (2, h, w), nowhere true when
    the scene has no true flow; window: (2,) top left corner of the refined part.
    """

    exposures: Tensor
    truth: Tensor
    flow: Tensor
    visible: Tensor
    window: Tensor


class Crops(Dataset[Crop]):
    """Augmented crops; crop number k of a run is the same whenever and wherever it is drawn."""

    def __init__(self, scenes: Sequence[SceneFiles], settings: TrainSettings, first: int, count: int) -> None:
        self.scenes, self.settings, self.first, self.count = scenes, settings, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Crop:
        settings = self.settings
        random = np.random.default_rng([settings.seed, self.first + index])
        files = self.scenes[int(random.integers(len(self.scenes)))]
        sample = load_scene(files)
        height, width = sample.truth.shape[1:]
        if min(height, width) < settings.crop:
            raise DatasetError(f"scene {files.name} must hold a crop of {settings.crop}, it is {width}x{height}")
        top, left = (int(random.integers(side - settings.crop + 1)) for side in (height, width))
        area = (..., slice(top, top + settings.crop), slice(left, left + settings.crop))
        flow, visible = _true_flow(files, sample.flow, (height, width))
        parts = augment(random, sample.frames[area], sample.truth[area], flow[area], visible[area])
        frames, truth, flow, visible = (part.contiguous() for part in parts)
        ratios = exposure_ratios(sample.evs)
        exposures = [exposure_input(frame[None], ratio)[0] for frame, ratio in zip(frames, ratios, strict=True)]
        window = torch.from_numpy(random.integers(0, settings.crop - settings.window + 1, 2))
        return Crop(torch.stack(exposures), truth.clamp(0, 1), flow, visible, window)


def _true_flow(files: SceneFiles, flow: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if flow is None or files.flow is None:
        return torch.zeros(2, 2, *size), torch.zeros(2, *size, dtype=torch.bool)
    mask = files.flow.with_name("visible.npy")
    visible = torch.from_numpy(np.load(mask)) if mask.is_file() else torch.ones(2, *size, dtype=torch.bool)
    return flow, visible


def augment(random: np.random.Generator, frames: Tensor, truth: Tensor, flow: Tensor, visible: Tensor) -> list[Tensor]:
    """Flips, transposition and permuted colours, at random; the flow's components follow."""
    colours = torch.from_numpy(random.permutation(3))
    parts = [frames[:, colours], truth[colours], flow, visible]
    for axis in (-1, -2):
        if random.random() < 0.5:
            sign = torch.tensor([-1.0, 1.0] if axis == -1 else [1.0, -1.0]).view(1, 2, 1, 1)
            parts = [part.flip(axis) for part in parts]
            parts[2] = parts[2] * sign
    if random.random() < 0.5:
        parts = [part.transpose(-1, -2) for part in parts]
        parts[2] = parts[2].flip(1)
    return parts


class Whole(Dataset[tuple[Tensor, Tensor]]):
    """Validation scenes whole: network input (3, 6, H, W) and truth (3, H, W)."""

    def __init__(self, scenes: Sequence[SceneFiles]) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = load_scene(self.scenes[index])
        pairs = zip(sample.frames, exposure_ratios(sample.evs), strict=True)
        return torch.stack([exposure_input(frame[None], ratio)[0] for frame, ratio in pairs]), sample.truth.clamp(0, 1)


# ---- the run ---------------------------------------------------------------------------------------------------------


def fresh_model(variant: Variant) -> SAFNet:
    """A model whose flows and residual are 0 and masks one half, so that training starts at the unaligned merge."""
    model = SAFNet(variant)
    for name in ("decoder.conv6", "refinenet.conv7" if variant == "small" else "refinenet.conv3"):
        layer: Any = model.get_submodule(name)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def _take_fitting(model: SAFNet, start: Path) -> None:
    state = model.state_dict()
    given = load_model(start).state_dict()
    model.load_state_dict({**state, **{k: v for k, v in given.items() if k in state and v.shape == state[k].shape}})


def _average(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor) -> None:
    """Exponential moving average that forgets the first steps faster."""
    decay = min(AVERAGE_DECAY, float(count) / (float(count) + 20))
    torch._foreach_lerp_(list(averaged), list(current), 1 - decay)


class Training(lightning.LightningModule):
    """SAFNet, its moving average, and what a step does."""

    def __init__(self, settings: TrainSettings, scenes: Sequence[SceneFiles], held_out: Sequence[SceneFiles]) -> None:
        super().__init__()
        self.settings, self.scenes, self.held_out = settings, scenes, held_out
        model = fresh_model(settings.model)
        if settings.start is not None:
            _take_fitting(model, settings.start)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = AveragedModel(self.model, multi_avg_fn=_average)  # type: ignore[arg-type]

    def training_step(self, crop: Crop, index: int) -> Tensor:
        short, reference, long = crop.exposures.unbind(1)
        levels = self.model.estimate_levels(short, reference, long, SCALE)
        fusion = self.model.fuse(short, reference, long, levels[-1])
        refined, truth = self._refine_window(crop, fusion)
        losses = {
            "refined": picture_loss(refined, truth),
            "fused": picture_loss(fusion.fused, crop.truth),
            "flow": flow_loss(levels, crop.flow, crop.visible),
        }
        total = losses["refined"] + FUSED_WEIGHT * losses["fused"] + self.settings.flow * losses["flow"]
        if self.settings.census:
            losses["census"] = census_loss(fusion.fused, crop.truth)
            total = total + FUSED_WEIGHT * self.settings.census * losses["census"]
        self.log_dict({f"loss/{name}": value for name, value in losses.items()})
        self.log("loss", total, prog_bar=True)
        return total

    def _refine_window(self, crop: Crop, fusion: Fusion) -> tuple[Tensor, Tensor]:
        """Refine one window of every crop: refining costs as much as all before it and needs fewer examples."""
        short, reference, long = crop.exposures.unbind(1)
        refine, alignment = self.model.refinenet, fusion.alignment
        warped = (
            safnet_ops.backward_warp(refine.short_features(short), alignment.flow_short),
            safnet_ops.backward_warp(refine.long_features(long), alignment.flow_long),
        )
        side = self.settings.window

        def cut(picture: Tensor) -> Tensor:
            corners = crop.window.tolist()
            return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(picture, corners, strict=True)])

        part = Fusion(cut(fusion.fused), Alignment(*map(cut, alignment)))
        residual = refine.body((cut(warped[0]), cut(warped[1])), cut(reference), part)
        return (part.fused + residual).clamp(0, 1), cut(crop.truth)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        exposures, truth = batch
        fused, refined = self.averaged(*exposures.unbind(1), SCALE)
        for name, picture in (("fused", fused), ("refined", refined)):
            self.log(
                f"validation/{name}_psnr_mu", psnr_mu(picture[0], truth[0]), prog_bar=name == "refined", batch_size=1
            )
            self.log(f"validation/{name}_psnr_l", psnr_l(picture[0], truth[0]), batch_size=1)

    def on_train_batch_end(self, *_: Any) -> None:
        self.averaged.update_parameters(self.model)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        if not norm.isfinite():
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.model.parameters(), self.settings.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        rise = min(1.0, (step + 1) / (self.settings.warm_up + 1))
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.settings.steps)))
        return rise * (FLOOR + (1 - FLOOR) * fall)

    def train_dataloader(self) -> DataLoader[Crop]:
        count = self.settings.block * self.settings.batch
        crops = Crops(self.scenes, self.settings, self.trainer.current_epoch * count, count)
        return DataLoader(crops, self.settings.batch, num_workers=self.settings.workers)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(Whole(self.held_out), 1)


class Keeper(Callback):
    """Writes the checkpoint and the averaged weights after every block, each whole or not at all."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = dict(vars(self.settings))

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: Any) -> None:
        trainer.strategy.barrier()
        partial = self.settings.out / f"{CHECKPOINT}.partial"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self.settings.out / CHECKPOINT)
            notes = {"steps": str(trainer.global_step), "seed": str(self.settings.seed)}
            save_model(module.averaged.module, self.settings.out / "model.safetensors", notes)
