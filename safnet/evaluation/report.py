"""What an evaluation leaves behind: tables on the terminal, scores as CSV and JSON, and a report in one HTML file."""

import csv
import io
import json
import math
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from safnet.choices import DatasetName
from safnet.evaluation.run import Evaluation, Mean
from safnet.evaluation.thumbnails import ERROR_WHITE
from safnet.evaluation.timing import Timing, device_name
from safnet.files import write_text
from safnet.metrics import SCORES

MAIN_SCORES = ("psnr_mu", "psnr_l", "ssim_mu", "ssim_l")
TERMINAL_SCORES = (*MAIN_SCORES, "fused_psnr_mu", "cvvdp", "ntire_psnr_mu", "ntire_psnr")  # the rest is in the files
PACKAGES = ("safnet-ops", "torch", "numpy", "OpenImageIO", "opencv-python-headless", "pillow", "cvvdp")
TEMPLATES = Path(__file__).parent / "templates"


class Published(NamedTuple):
    """A published row: scores by name, seconds at 1500x1000 on one A30, millions of parameters."""

    method: str
    scores: dict[str, float]
    seconds: float | None = None
    parameters: float | None = None


def _published(method: str, *values: float, seconds: float | None = None, parameters: float | None = None) -> Published:
    return Published(method, dict(zip(MAIN_SCORES, values, strict=False)), seconds, parameters)


# From the tables of SAFNet (Kong et al., ECCV 2024); AFUNet's from its own paper (2025).
PUBLISHED: dict[str, list[Published]] = {
    "kalantari17": [
        _published("AHDRNet", 43.63, 41.14, 0.9900, 0.9702, seconds=0.345, parameters=1.52),
        _published("HDR-Transformer", 44.32, 42.18, 0.9916, 0.9884, seconds=2.673, parameters=1.22),
        _published("SCTNet", 44.49, 42.29, 0.9924, 0.9887, seconds=3.466, parameters=0.99),
        _published("FlexHDR", 44.35, 42.60, 0.9931, 0.9902, seconds=1.550, parameters=2.12),
        _published("SAFNet-S", 44.12, 42.50, 0.9928, 0.9907, seconds=0.049, parameters=0.57),
        _published("SAFNet", 44.66, 43.18, 0.9932, 0.9917, seconds=0.151, parameters=1.12),
        _published("AFUNet", 44.91, 42.59, 0.9923, 0.9906),
    ],
    "challenge123": [_published("SAFNet", 41.88, 29.73), _published("AHDRNet", 40.61, 28.33)],
}
PUBLISHED_TITLES = {"kalantari17": "Kalantari 2017, 15 test scenes", "challenge123": "Challenge123, 27 test scenes"}


@dataclass(frozen=True)
class Run:
    """How an evaluation was made: what is needed to repeat it, and what the models cost."""

    command: str
    root: str
    split: str
    started: datetime
    seconds: float
    timings: dict[str, Timing]
    environment: dict[str, Any]


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads of this process."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }


def now() -> datetime:
    return datetime.now(timezone.utc)


def published_for(dataset: DatasetName) -> tuple[str, list[Published], str]:
    """Title, rows and note of the published numbers to show beside a data set's."""
    source = dataset if dataset in PUBLISHED else "kalantari17"
    if source == dataset:
        note = (
            "Comparable only if this folder holds that set's test scenes as published, and the model was trained "
            "without them. SAFNet's authors score results stored as .hdr files, which round; --rgbe does the same, and "
            "can change PSNR-μ by tenths of a decibel. Published seconds are those of one A30 GPU at 1500x1000."
        )
    else:
        note = (
            f"For orientation only: the published scores are of another data set than {dataset}, and decibels of "
            "different sets cannot be compared. Published seconds are those of one A30 GPU at 1500x1000."
        )
    return PUBLISHED_TITLES[source], PUBLISHED[source], note


def score_names(evaluation: Evaluation) -> list[str]:
    """The scores that any method has, in the order of SCORES."""
    present = {name for results in evaluation.scores.values() for result in results.values() for name in result.scores}
    return [name for name in SCORES if name in present]


def format_score(name: str, value: float | None) -> str:
    return "" if value is None else f"{value:.{SCORES[name].decimals}f}"


# ---- terminal --------------------------------------------------------------------------------------------------------


def print_tables(evaluation: Evaluation, run: Run, console: Console) -> None:
    """Means beside the published numbers, groups, timings, and what was left out; scenes too if there is one method."""
    names = [name for name in score_names(evaluation) if name in TERMINAL_SCORES]
    if len(evaluation.methods) == 1:
        console.print(_scene_table(evaluation, names))
    console.print(_mean_table(evaluation, names))
    _, _, note = published_for(evaluation.settings.dataset)
    console.print(note, style="dim", soft_wrap=True)
    if evaluation.groups():
        console.print(_group_table(evaluation))
    for name, timing in run.timings.items():
        console.print(f"{name}: {describe_timing(timing)}", highlight=False, soft_wrap=True)
    for _, method, error in evaluation.errors():
        text = f"left out: {method}: {error}" if method else f"left out: {error}"
        console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if evaluation.errors():
        text = f"{left_out(evaluation)}; the means are over the others"
        console.print(text, style="bold yellow", highlight=False, soft_wrap=True)


def describe_timing(timing: Timing) -> str:
    span = f"{min(timing.seconds):.3f} to {max(timing.seconds):.3f}, {len(timing.seconds)} runs after a warm-up"
    memory = "" if timing.peak_memory is None else f", peak memory {timing.peak_memory / 2**20:.0f} MiB"
    return (
        f"median {timing.median:.3f} s ({span}) at {timing.width}x{timing.height}, {timing.precision}, "
        f"{timing.threads} threads, {timing.device}{memory}; {timing.parameters / 1e6:.3f} M parameters, "
        f"{timing.multiply_adds / 1e12:.4f} T multiply-adds"
    )


def left_out(evaluation: Evaluation) -> str:
    """A sentence on how many results the means lack."""
    counts = {method.name: evaluation.mean(method.name).left_out for method in evaluation.methods}
    listed = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    return f"Left out of {len(evaluation.scenes)} scenes: {listed or 'none'}"


def _mean_table(evaluation: Evaluation, names: list[str]) -> Table:
    title, rows, _ = published_for(evaluation.settings.dataset)
    table = Table(title=f"Means on {evaluation.settings.dataset}", title_justify="left")
    table.add_column("method")
    table.add_column("scenes", justify="right")
    for name in names:
        table.add_column(SCORES[name].label, justify="right")
    for method in evaluation.methods:
        mean = evaluation.mean(method.name)
        table.add_row(method.name, _count(mean), *(format_score(name, mean.scores.get(name)) for name in names))
    table.add_section()
    table.add_row(f"published: {title}", style="dim italic")
    for row in rows:
        table.add_row(row.method, "", *(_plain(row.scores.get(name)) for name in names), style="dim")
    return table


def _group_table(evaluation: Evaluation) -> Table:
    table = Table(title="PSNR-μ / PSNR-l by motion and clipping", title_justify="left")
    table.add_column("scenes with")
    table.add_column("scenes", justify="right")
    for method in evaluation.methods:
        table.add_column(method.name, justify="right")
    for group in evaluation.groups():
        means = [evaluation.mean(method.name, group) for method in evaluation.methods]
        table.add_row(group, _count(means[0]), *(_pair(mean) for mean in means))
    return table


def _scene_table(evaluation: Evaluation, names: list[str]) -> Table:
    method = evaluation.methods[0].name
    table = Table(title=f"Scenes, {method}", title_justify="left")
    table.add_column("scene")
    table.add_column("motion", justify="right")
    table.add_column("clipped", justify="right")
    for name in names:
        table.add_column(SCORES[name].label, justify="right")
    for scene in evaluation.scenes:
        result = evaluation.scores[method][scene.name]
        if result.error:
            table.add_row(scene.name, "", "", "left out", style="yellow")
            continue
        motion = "" if scene.motion is None else f"{scene.motion:.1f} px"
        values = (format_score(name, result.scores.get(name)) for name in names)
        table.add_row(scene.name, motion, f"{100 * scene.clipped:.1f} %", *values)
    return table


def _pair(mean: Mean) -> str:
    return " / ".join(format_score(name, mean.scores.get(name)) for name in ("psnr_mu", "psnr_l"))


def _count(mean: Mean) -> str:
    return f"{mean.used}" if not mean.left_out else f"{mean.used} of {mean.used + mean.left_out}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value > 1 else f"{value:.4f}"


# ---- files -----------------------------------------------------------------------------------------------------------


def write_report(folder: Path, evaluation: Evaluation, run: Run) -> list[Path]:
    """Write scores.csv, scores.json and report.html into a folder, each whole or not at all; the first is the report.

    Raises:
        ValueError: Jinja2 is missing.
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("report.html", "scores.csv", "scores.json")]
    html, table, data = files
    write_csv(table, evaluation)
    write_json(data, evaluation, run)
    write_html(html, evaluation, run)
    return files


def write_csv(path: Path, evaluation: Evaluation) -> None:
    """One row a scene and method; scores in full precision, empty where there is none."""
    names = score_names(evaluation)
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow(
        ["scene", "method", "width", "height", "evs", "motion_px", "clipped_part", "seconds", *names, "error"]
    )
    for scene in evaluation.scenes:
        facts = [scene.width, scene.height, " ".join(f"{ev:g}" for ev in scene.evs), scene.motion, scene.clipped]
        for method in evaluation.methods:
            result = evaluation.scores[method.name][scene.name]
            values = [result.scores.get(name) for name in names]
            writer.writerow([scene.name, method.name, *facts, result.seconds, *values, result.error])
    write_text(path, stream.getvalue())


def write_json(path: Path, evaluation: Evaluation, run: Run) -> None:
    """Everything but the pictures: scores, means, groups, costs, and what is needed to repeat the run."""
    data = {
        "command": run.command,
        "started": run.started.isoformat(timespec="seconds"),
        "seconds": round(run.seconds, 1),
        "root": run.root,
        "split": run.split,
        "settings": asdict(evaluation.settings),
        "environment": run.environment,
        "methods": [_method_data(evaluation, run, index) for index in range(len(evaluation.methods))],
        "scenes": [_without_pictures(asdict(scene)) for scene in evaluation.scenes],
        "scores": {
            method: {scene: _without_pictures(asdict(result)) for scene, result in results.items()}
            for method, results in evaluation.scores.items()
        },
    }
    write_text(path, json.dumps(_finite(data), indent=1, ensure_ascii=False) + "\n")


def write_html(path: Path, evaluation: Evaluation, run: Run) -> None:
    """The report: one file with everything in it, that needs no network."""
    try:
        from jinja2 import Environment, FileSystemLoader
    except ImportError as error:
        raise ValueError(f"the HTML report needs Jinja2 ({error}); pip install 'safnet-ops[eval]'") from error
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["score"] = lambda value, name: format_score(name, value)
    environment.filters["plain"] = _plain
    names = score_names(evaluation)
    methods = [method.name for method in evaluation.methods]
    title, published, note = published_for(evaluation.settings.dataset)
    text = environment.get_template("report.html").render(
        dataset=evaluation.settings.dataset,
        run=run,
        names=names,
        kinds=SCORES,
        means=[(method, evaluation.mean(method)) for method in methods],
        best=_best(evaluation, names),
        published_title=title,
        published=published,
        note=note,
        groups=[(group, [evaluation.mean(method, group) for method in methods]) for group in evaluation.groups()],
        errors=evaluation.errors(),
        left_out=left_out(evaluation),
        timings=run.timings,
        methods=[_method_data(evaluation, run, index) for index in range(len(evaluation.methods))],
        settings=asdict(evaluation.settings),
        error_white=ERROR_WHITE,
        index=_finite(_index(evaluation, names)),
        pictures=list(_pictures(evaluation)),
    )
    write_text(path, text)


def _index(evaluation: Evaluation, names: list[str]) -> dict[str, Any]:
    """What the report's script needs at once: everything but the pictures."""
    return {
        "columns": [{"name": name, "label": SCORES[name].label, "decimals": SCORES[name].decimals} for name in names],
        "methods": [method.name for method in evaluation.methods],
        "scenes": [
            {
                **_without_pictures(asdict(scene)),
                "scores": {
                    method.name: _without_pictures(asdict(evaluation.scores[method.name][scene.name]))
                    for method in evaluation.methods
                },
            }
            for scene in evaluation.scenes
        ],
    }


def _pictures(evaluation: Evaluation) -> Iterable[dict[str, Any]]:
    """For each scene, in order: its pictures, and those of each method by number."""
    for scene in evaluation.scenes:
        results = [evaluation.scores[method.name][scene.name] for method in evaluation.methods]
        yield {"scene": scene.pictures, "methods": [result.pictures for result in results]}


def _best(evaluation: Evaluation, names: list[str]) -> dict[str, str]:
    """The method with the best mean of each score, if there are several."""
    means = {method.name: evaluation.mean(method.name).scores for method in evaluation.methods}
    if len(means) < 2:
        return {}
    return {name: max(means, key=lambda method: means[method].get(name, -math.inf)) for name in names}


def _method_data(evaluation: Evaluation, run: Run, index: int) -> dict[str, Any]:
    method = evaluation.methods[index]
    timing = run.timings.get(method.name)
    identity = {key: value for key, value in method.identity.items() if key != "predictions"}
    if folder := getattr(method, "folder", None):
        identity["folder"] = str(folder)
        identity["matched"] = "in order" if getattr(method, "in_order", False) else "by name"
    return {
        "name": method.name,
        "kind": method.kind,
        **identity,
        "mean": asdict(evaluation.mean(method.name)),
        "groups": {group: asdict(evaluation.mean(method.name, group)) for group in evaluation.groups()},
        "timing": None if timing is None else {**asdict(timing), "median": timing.median},
    }


def _without_pictures(data: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != "pictures"}


def _finite(data: Any) -> Any:
    """JSON has no infinity: a perfect result's PSNR becomes the text "Infinity", which float() and Number() read."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return "Infinity" if isinstance(data, float) and math.isinf(data) else data
