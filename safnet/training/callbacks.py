"""What happens around the steps of a training run: checkpoints, progress, recorded metrics, pictures."""

import csv
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from safnet.files import written_whole
from safnet.model import Fusion
from safnet.pictures import flow_picture, flow_reach, mask_picture
from safnet.radiance import tone_map
from safnet.training.settings import TrainSettings
from safnet.weights import save_model

CHECKPOINT = "last.ckpt"
WEIGHTS = "model.safetensors"
METRICS = "metrics.csv"
PICTURES = "validation.png"
SHOWN_SCENES = 4
SHOWN_HEIGHT = 192  # pixels of a scene in the strip of pictures
SMOOTHING = 0.95  # of the shown samples a second
LINE_SECONDS = 60.0  # between lines of progress where there is no terminal


class Keeper(Callback):
    """Saves the run after some minutes, before each validation, when it is told to stop, and at the end.

    SIGTERM and SIGINT (Ctrl-C) end the run after the step at hand; `stopped` then holds the signal's number. Processes
    agree on both, as they must save together.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.saved = time.monotonic()
        self.stopped = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Keeper":
        self.before = {number: signal.getsignal(number) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        self._handle(self.before)

    @staticmethod
    def _handle(handlers: dict[int, Any]) -> None:
        if threading.current_thread() is threading.main_thread():  # no other may
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def on_save_checkpoint(self, trainer: lightning.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = dict(vars(self.settings))

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.saved = time.monotonic()
        # Only now: Lightning has set its own at the start of the fit, which would end the run in the middle of things.
        self._handle(dict.fromkeys(self.SIGNALS, self._note))

    def _note(self, number: int, frame: Any) -> None:
        self.stopped = number

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        settings, step = self.settings, trainer.global_step
        due = time.monotonic() - self.saved >= 60 * settings.checkpoint_minutes
        due, stop = self._agree(trainer, due), self._agree(trainer, bool(self.stopped))
        if due or stop or step == settings.steps or step % settings.validate_every == 0:
            self._save(trainer, module)
        if stop:
            self.stopped = self.stopped or signal.SIGTERM  # where another process was told
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # Lightning would validate once more

    @staticmethod
    def _agree(trainer: lightning.Trainer, wish: bool) -> bool:
        return trainer.strategy.reduce_boolean_decision(wish, all=False) if trainer.world_size > 1 else wish

    def _save(self, trainer: lightning.Trainer, module: Any) -> None:
        partial = self.settings.out / f"{CHECKPOINT}.partial"  # one name, as all processes of a run may write to it
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, self.settings.out / CHECKPOINT)
            notes = {"steps": str(trainer.global_step), "seed": str(self.settings.seed)}
            if self.settings.left_out:
                notes["without"] = ",".join(self.settings.left_out)
            save_model(module.averaged.module, self.settings.out / WEIGHTS, notes)
        self.saved = time.monotonic()


class ProgressLine(Callback):
    """A bar with loss parts, samples a second and time left; without a terminal a line of it every minute."""

    def __init__(self, settings: TrainSettings, quiet: bool) -> None:
        self.settings, self.quiet = settings, quiet
        self.speed = self.stepped = self.printed = 0.0
        self.bar: Progress | None = None

    def on_train_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.stepped = self.printed = time.monotonic()
        if self.quiet or not trainer.is_global_zero:
            return
        columns = (MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True))
        console = Console(stderr=True)
        if console.is_terminal:
            self.bar = Progress(*columns, TextColumn("{task.description}"), console=console, speed_estimate_period=300)
            self.bar.start()
            self.bar.add_task("", total=self.settings.steps, completed=trainer.global_step)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        now = time.monotonic()
        speed = self.settings.batch / max(now - self.stepped, 1e-6)
        self.speed = SMOOTHING * self.speed + (1 - SMOOTHING) * speed if self.speed else speed
        self.stepped = now
        module.log("samples_per_second", self.speed, rank_zero_only=True)
        if self.quiet or not trainer.is_global_zero:
            return
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=trainer.global_step, description=self._text(trainer))
        elif now - self.printed >= LINE_SECONDS or trainer.global_step == self.settings.steps:
            self.printed = now
            left = (self.settings.steps - trainer.global_step) * self.settings.batch / self.speed
            step = f"step {trainer.global_step}/{self.settings.steps}"
            print(f"{step}  {left / 3600:.2f} h left  {self._text(trainer)}", file=sys.stderr, flush=True)

    def _text(self, trainer: lightning.Trainer) -> str:
        parts = {
            name.removeprefix("loss/"): value for name, value in trainer.callback_metrics.items() if "loss" in name
        }
        losses = " ".join(f"{name} {float(parts[name]):.4f}" for name in sorted(parts, key=lambda name: name != "loss"))
        score = trainer.callback_metrics.get("validation/refined_psnr_mu")
        validation = "" if score is None else f"  validation {float(score):.2f} dB"
        return f"{losses}{validation}  {self.speed:.3g} samples/s"

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        self.stepped = time.monotonic()

    def teardown(self, trainer: lightning.Trainer, module: Any, stage: str) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class Strip(Callback):
    """Draws the first validation scenes: reference, flow and mask to the short frame, both results, truth."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.rows: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: lightning.Trainer, module: Any) -> None:
        self.rows = []

    def on_validation_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, *_: Any
    ) -> None:
        if trainer.is_global_zero and len(self.rows) < SHOWN_SCENES:
            exposures, truth = batch
            self.rows.append(draw_strip(exposures[0, 1, 3:], outputs["fusion"], outputs["refined"], truth))

    def on_validation_end(self, trainer: lightning.Trainer, module: Any) -> None:
        if not self.rows:
            return
        width = min(row.shape[1] for row in self.rows)
        page = np.concatenate([row[:, :width] for row in self.rows])
        with written_whole(self.out / PICTURES) as partial:
            Image.fromarray(page).save(partial, "PNG")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("validation", page, trainer.global_step, dataformats="HWC")


def draw_strip(reference: Tensor, fusion: Fusion, refined: Tensor, truth: Tensor) -> Any:
    """One scene's pictures beside each other as bytes (h, w, 3): reference LDR (3, H, W), the others (1, ...)."""
    alignment = fusion.alignment
    flow = alignment.flow_short[0].float().cpu().numpy()
    parts = [
        _bytes(reference),
        flow_picture(flow, flow_reach([flow])),
        mask_picture(alignment.mask_short[0, 0].float().cpu().numpy()),
        *(_bytes(tone_map(radiance[0].clamp(0, 1))) for radiance in (fusion.fused, refined, truth)),
    ]
    height, width = parts[0].shape[:2]
    size = max(1, round(width * SHOWN_HEIGHT / height)), SHOWN_HEIGHT
    return np.concatenate([np.asarray(Image.fromarray(part).resize(size)) for part in parts], 1)


def _bytes(values: Tensor) -> Any:
    return (values.float() * 255 + 0.5).clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()


class MetricsFile(Logger):
    """A CSV file of metrics by step; a resumed run goes on in it from its checkpoint's step."""

    def __init__(self, path: Path, step: int, columns: Sequence[str]) -> None:
        super().__init__()
        self.path, self.columns = path, ("step", *columns)
        self.kept: list[dict[str, str]] | None = []
        if path.is_file():
            with path.open(newline="") as file:
                self.kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run's configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if self.kept is not None:
            with written_whole(self.path) as partial, partial.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(self.kept)
            self.kept = None
        row = {name: f"{value:.7g}" for name, value in metrics.items() if name in self.columns}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow({"step": step, **row})
