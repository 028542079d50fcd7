"""From folders to files: what `safnet evaluate` does, as a function."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from safnet.choices import Precision, Split
from safnet.data.datasets import find_scenes
from safnet.evaluation.matlab import MatlabExport
from safnet.evaluation.methods import ModelMethod, methods_for
from safnet.evaluation.report import Run, describe_environment, now, write_report
from safnet.evaluation.run import Evaluation, Scene, Settings, evaluate
from safnet.evaluation.timing import Timing, time_model

Progress = Callable[[str, int, int], None]  # what is done, steps done, steps in all

MANY_SCENES = 40  # beyond, the report's pictures are small
SMALL_PICTURES = 480  # pixels wide


class Report(NamedTuple):
    """Scores, and how they were made; `files` that were written, report.html first."""

    evaluation: Evaluation
    run: Run
    files: list[Path]


def evaluate_files(
    root: Path,
    settings: Settings,
    *,
    split: Split = "Test",
    models: Sequence[str | Path] = (),
    baselines: Sequence[str] = (),
    predictions: Sequence[Path] = (),
    device: str = "auto",
    precision: Precision = "float32",
    tile: int | None = None,
    timing_runs: int = 5,
    save: Path | None = None,
    export_matlab: Path | None = None,
    fresh: bool = False,
    strict: bool = False,
    command: str = "safnet.evaluation.pipeline.evaluate_files",
    progress: Progress = lambda stage, done, total: None,
) -> Report:
    """Score methods on a data set's folder, time the models at its first scene's size, and write a report.

    Args:
        root: the data set's folder, or that of its scenes; settings.dataset is its layout.
        split: subfolder of the data set, if it has them.
        models, baselines, predictions, device, precision, tile: see `methods_for`.
        timing_runs: timed runs of each model, 0 for none.
        save: folder for report.html, scores.csv, scores.json, and results from which the same call goes on; None to write none.
        export_matlab: folder for results and truths as .hdr files, and a MATLAB script that scores them.
        fresh: compute anew what `save` holds.
        strict: raise EvaluationError at a scene that cannot be scored, instead of leaving it out.
        command: what the report says that it was made with.
        progress: called before each step.

    Raises:
        DatasetError, EvaluationError, WeightsError, ValueError: a folder, name, file or device that cannot be used.
    """
    started = now()
    scenes = find_scenes(settings.dataset, root, split)
    methods = methods_for(scenes, models, baselines, predictions, device=device, precision=precision, tile=tile)
    if len(scenes) > MANY_SCENES:
        settings = replace(settings, picture_width=min(settings.picture_width, SMALL_PICTURES))
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
    evaluation = evaluate(
        scenes,
        methods,
        settings,
        cache=save / "cache" if save else None,
        fresh=fresh,
        strict=strict,
        export=MatlabExport(export_matlab) if export_matlab else None,
        progress=progress,
    )
    networks = [method for method in methods if isinstance(method, ModelMethod)]
    timings = _time(networks, evaluation.scenes, timing_runs, progress)
    where = next(networks[0].model.parameters()).device if networks else torch.device("cpu")
    seconds = (now() - started).total_seconds()
    run = Run(command, str(root), split, started, seconds, timings, describe_environment(where))
    return Report(evaluation, run, write_report(save, evaluation, run) if save is not None else [])


def _time(models: Sequence[ModelMethod], scenes: Sequence[Scene], runs: int, progress: Progress) -> dict[str, Timing]:
    """By model's name: what it costs at the size of the first scene that could be read, if there is one."""
    size = next(((scene.height, scene.width) for scene in scenes if not scene.error), None)
    timings: dict[str, Timing] = {}
    if size is None or not runs:
        return timings
    for number, method in enumerate(models):
        progress(f"timing {method.name}", number, len(models))
        precision = getattr(torch, method.precision)
        timings[method.name] = time_model(method.model, *size, runs=runs, tile=method.tile, precision=precision)
    return timings
