"""Training a SAFNet: what a step does, and a run from its settings to its weights.

What a step sees depends on its number and the seed alone, so that a run that is killed and started again goes on from its
last checkpoint as if nothing had happened. The weights to keep are the moving average of the trained ones.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, default_collate

from safnet.data.datasets import SceneFiles, find_scenes
from safnet.metrics import psnr_l, psnr_mu
from safnet.model import Alignment, Fusion, SAFNet
from safnet.radiance import tone_map
from safnet.training.ablation import ablate
from safnet.training.callbacks import CHECKPOINT, METRICS, Keeper, MetricsFile, ProgressLine, Strip
from safnet.training.crops import Crop, Crops, Scenes, Whole, load_crops, open_scenes
from safnet.training.initialisation import fit_flow, kaiming, match_frames
from safnet.training.losses import census_loss, flow_loss, picture_loss, psnr_loss
from safnet.training.perceptual import VGG16, load_vgg16, perceptual_loss
from safnet.training.settings import (
    CHANGEABLE,
    CONFIGURATION,
    TrainingError,
    TrainSettings,
    check_values,
    option,
    write_configuration,
)
from safnet.training.windows import cut_windows, unpartition
from safnet.weights import load_model, take_fitting

SCALE = 0.5  # of the sides at which flow and mask are estimated
PRECISIONS: dict[str, Any] = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
LOSSES = ("refined", "perceptual", "fused", "census", "psnr", "flow")
SCORES = ("fused_psnr_mu", "fused_psnr_l", "refined_psnr_mu", "refined_psnr_l")
FIT_PIXELS = 160 * 128**2  # of crops from which the flow's first weights are fitted


class Finished(NamedTuple):
    """How a run ended: after all its steps, or before by a signal, whose number that is, else 0."""

    steps: int
    signal: int


def train(settings: TrainSettings, *, quiet: bool = False) -> Finished:
    """Train, or go on with the run that `settings.out` holds.

    Its folder then has last.ckpt, model.safetensors (the moving average), config.yaml, metrics.csv, and with validation
    scenes validation.png. With `quiet` nothing is printed.

    Raises:
        TrainingError, DatasetError, SceneError, WeightsError: a setting or a folder is not usable; nothing was written.
    """
    check_values(settings)
    machine = _check_machine(settings)
    vgg16 = load_vgg16(settings.vgg16) if settings.perceptual_weight else None
    start = load_model(settings.start) if settings.start is not None else None
    step = _check_resumable(settings)
    scenes = open_scenes(settings)
    held_out = find_scenes(settings.dataset, settings.validation, "Test") if settings.validation else []
    for files in held_out:
        files.check()

    if settings.threads:
        torch.set_num_threads(settings.threads)
    lightning.seed_everything(settings.seed, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    module = Training(settings, scenes, held_out, vgg16, start)
    if settings.initialisation == "matching" and not step and start is None and "flow" not in settings.left_out:
        fit_to_scenes(module)
    keeper = Keeper(settings)
    callbacks: list[Callback] = [keeper, ProgressLine(settings, quiet)]
    if held_out:
        callbacks.append(Strip(settings.out))
    settings.out.mkdir(parents=True, exist_ok=True)
    trainer = lightning.Trainer(
        **machine,
        max_steps=settings.steps,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        val_check_interval=settings.validate_every,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if held_out else 0,
        log_every_n_steps=min(10, settings.validate_every),
        logger=_loggers(settings, step),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=settings.out,
        use_distributed_sampler=False,
    )
    if trainer.is_global_zero:
        write_configuration(settings, settings.out / CONFIGURATION)
    with keeper, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(does not have many workers|LeafSpec)")
        trainer.fit(module, ckpt_path=settings.out / CHECKPOINT if step else None, weights_only=False)
        if held_out and not keeper.stopped and settings.steps % settings.validate_every:
            trainer.validate(module, verbose=False)
    return Finished(trainer.global_step, keeper.stopped)


def _check_machine(settings: TrainSettings) -> dict[str, Any]:
    """What Lightning's Trainer needs to know of the machine, after a check of what it has."""
    gpus = torch.cuda.device_count()
    device = settings.device if settings.device != "auto" else ("cuda" if gpus else "cpu")
    if device == "cuda" and settings.devices > gpus:
        raise TrainingError(f"--devices must be at most the {gpus} GPUs of this machine, got {settings.devices}")
    if device == "cpu" and settings.precision == "float16":
        raise TrainingError("--precision float16 needs a GPU, got --device cpu; bfloat16 works on both")
    strategies = ("auto", *StrategyRegistry.available_strategies())
    if settings.strategy not in strategies:
        raise TrainingError(f"--strategy must be one of {', '.join(strategies)}, got {settings.strategy!r}")
    return {
        "accelerator": device,
        "devices": settings.devices,
        "num_nodes": settings.nodes,
        "strategy": settings.strategy,
        "precision": PRECISIONS[settings.precision],
    }


def _check_resumable(settings: TrainSettings) -> int:
    """The step that the run in `settings.out` has reached, 0 for a new one."""
    path = settings.out / CHECKPOINT
    if not path.exists():
        return 0
    checkpoint = torch.load(path, weights_only=False, map_location="cpu", mmap=True)
    for name, before in checkpoint["settings"].items():
        value = getattr(settings, name, before)
        if name not in CHANGEABLE and before != value:
            raise TrainingError(
                f"{option(name)} must stay {before} to go on with {settings.out}, got {value}; "
                "use another --out for a new run"
            )
    step = int(checkpoint["global_step"])
    if step > settings.steps:
        raise TrainingError(f"--steps must be at least the {step} done in {settings.out}, got {settings.steps}")
    return step


def _loggers(settings: TrainSettings, step: int) -> list[Logger]:
    columns = ("loss", *(f"loss/{name}" for name in LOSSES), *(f"validation/{name}" for name in SCORES))
    loggers: list[Logger] = [MetricsFile(settings.out / METRICS, step, (*columns, "samples_per_second"))]
    try:
        loggers.append(TensorBoardLogger(settings.out, name="", version="tensorboard"))
    except ModuleNotFoundError:  # it is as good as all of what TensorBoard shows lies in files, too
        logging.getLogger(__name__).info("tensorboard is not installed")
    return loggers


# ---- the weights at the start ----------------------------------------------------------------------------------------


def fresh_model(settings: TrainSettings) -> SAFNet:
    """A model whose flows and residual are 0 and masks one half, so that training starts at the unaligned merge."""
    model = SAFNet(settings.model)
    if settings.initialisation == "kaiming":
        kaiming(model)
    elif settings.initialisation == "matching":
        match_frames(model)
    layers: tuple[Any, Any] = model.decoder.conv6, model.refinenet.residual_layer
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def fit_to_scenes(module: "Training") -> None:
    """Let a fresh model that compares the frames read the flow off that, where scenes have a known flow."""
    settings = module.settings
    assert module.scenes is not None
    crops = Crops(module.scenes, settings)
    count = min(96, max(4, FIT_PIXELS // settings.crop**2))
    batches = [default_collate([crops[number]]) for number in range(count)]
    if all(batch.visible.any((0, 2, 3)).all() for batch in batches):
        fit_flow(module.model, ((batch.exposures, batch.flow, batch.visible) for batch in batches), SCALE)


# ---- steps -----------------------------------------------------------------------------------------------------------


class Training(lightning.LightningModule):
    """SAFNet, its moving average, and what a step does."""

    def __init__(
        self,
        settings: TrainSettings,
        scenes: Scenes | None,
        held_out: Sequence[SceneFiles] = (),
        vgg16: VGG16 | None = None,
        start: SAFNet | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.scenes, self.held_out = settings, scenes, held_out
        model = fresh_model(settings)
        if start is not None:
            take_fitting(model, start)
        ablate(model, settings.left_out)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = AveragedModel(self.model, multi_avg_fn=self._average)  # type: ignore[arg-type]
        self.averaged.requires_grad_(False)
        self.vgg16 = [vgg16]  # in a list, it is no module of this one: checkpoints need not hold it

    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor) -> None:
        """Exponential moving average that forgets the first steps faster."""
        decay = min(self.settings.ema_decay, float(count) / (float(count) + 20))
        torch._foreach_lerp_(list(averaged), list(current), 1 - decay)

    def setup(self, stage: str) -> None:
        if self.vgg16[0] is not None:
            self.vgg16[0].to(self.device)

    def training_step(self, crop: Crop, index: int) -> Tensor:
        losses = self.losses(crop)
        total = self.total(losses)
        self.log_dict({f"loss/{name}": value for name, value in losses.items()})
        self.log("loss", total)
        self.log("step", float(self.global_step + 1))  # of the loggers, which else count from 0
        return total

    def losses(self, crop: Crop) -> dict[str, Tensor]:
        """The parts of the loss, those with a weight."""
        short, reference, long = crop.exposures.unbind(1)
        levels = self.model.estimate_levels(short, reference, long, SCALE)
        fusion = self.model.fuse(short, reference, long, levels[-1])
        losses = {"fused": picture_loss(fusion.fused, crop.truth)}
        result, truth = fusion.fused, crop.truth
        if "refine" not in self.settings.left_out:
            result, truth = self._refine_windows(crop, fusion)
            losses["refined"] = picture_loss(result, truth)
            if self.vgg16[0] is not None:
                losses["perceptual"] = perceptual_loss(self.vgg16[0], tone_map(result), tone_map(truth))
        if self.settings.census_weight:
            losses["census"] = census_loss(fusion.fused, crop.truth)
        if self.settings.psnr_weight:
            losses["psnr"] = psnr_loss(result, truth)
        if self.settings.flow_weight:
            losses["flow"] = flow_loss(levels, crop.flow, crop.visible)
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The loss from its parts."""
        settings = self.settings
        weights = {
            "refined": 1.0,
            "perceptual": settings.perceptual_weight,
            "fused": settings.fused_weight,
            "census": settings.fused_weight * settings.census_weight,
            "psnr": settings.psnr_weight,
            "flow": settings.flow_weight,
        }
        return torch.stack([weights[name] * value for name, value in losses.items()]).sum()

    def _refine_windows(self, crop: Crop, fusion: Fusion) -> tuple[Tensor, Tensor]:
        """Refined windows and their truth; put together to whole crops where all windows are refined."""
        whole = self.settings.windows == 0
        exposures, side = crop.exposures.unbind(1), self.settings.window

        def cut(pictures: Tensor) -> Tensor:
            return cut_windows(pictures, side, None if whole else crop.windows)

        part = Fusion(cut(fusion.fused), Alignment(*map(cut, fusion.alignment)))
        if self.settings.warp == "window":
            refined = self.model.refine(*map(cut, exposures), part)
        else:
            warped_short, warped_long = self.model.warp_features(exposures[0], exposures[2], fusion.alignment)
            residual = self.model.refinenet((cut(warped_short), cut(warped_long)), cut(exposures[1]), part)
            refined = (part.fused + residual).clamp(0, 1)
        if whole:
            return unpartition(refined, *crop.truth.shape[2:]), crop.truth
        return refined, cut(crop.truth)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> dict[str, Any]:
        exposures, truth = batch
        model: Any = self.averaged.module
        frames = exposures.unbind(1)
        fusion = model.fuse(*frames, model.estimate(*frames, SCALE))
        refined = model.refine(*frames, fusion)
        self.log("step", float(self.global_step), batch_size=1, sync_dist=True)
        for name, picture in (("fused", fusion.fused), ("refined", refined)):
            for metric, value in (("psnr_mu", psnr_mu), ("psnr_l", psnr_l)):
                score = value(picture[0].float(), truth[0])
                self.log(f"validation/{name}_{metric}", score, batch_size=1, sync_dist=True)
        return {"fusion": fusion, "refined": refined}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.averaged.update_parameters(self.model)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip or math.inf)
        if not norm.isfinite():
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        settings = self.settings
        optimizer = torch.optim.AdamW(self._parameter_groups(), settings.learning_rate, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters by learning rate; weights decay, but not biases and slopes.

        The residual is added to linear radiance, where an error of 0.001 is large in the dark: at the others' rate the
        refine module's last layer disturbs more than it mends.
        """
        settings = self.settings
        last = {id(parameter) for parameter in self.model.refinenet.residual_layer.parameters()}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            rate = 1.0
            if name.startswith("encoder."):
                rate = settings.encoder_rate
            elif id(parameter) in last:
                rate = settings.refine_last_rate
            decay = settings.weight_decay if parameter.dim() > 1 else 0.0
            if parameter.requires_grad:
                groups.setdefault((rate, decay), []).append(parameter)
        return [
            {"params": parameters, "lr": settings.learning_rate * rate, "weight_decay": decay}
            for (rate, decay), parameters in groups.items()
        ]

    def _rate(self, step: int) -> float:
        """Learning rate over the one at the warm-up's end."""
        settings = self.settings
        last = settings.last_learning_rate / settings.learning_rate
        rise = min(1.0, (step + 1) / (settings.warm_up + 1))
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / settings.steps)))
        return rise * (last + (1 - last) * fall)

    def train_dataloader(self) -> DataLoader[Crop]:
        assert self.scenes is not None
        trainer = self.trainer
        return load_crops(self.scenes, self.settings, trainer.global_step, trainer.global_rank, trainer.world_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        # Each process scores its share; with fewer scenes than processes all score all, as all must score the same names.
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        share = self.held_out[rank::processes] if len(self.held_out) >= processes else self.held_out
        return DataLoader(Whole(share), 1)
