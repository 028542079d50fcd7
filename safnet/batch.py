"""Whole shoots: which pictures of a folder are brackets, and all of them fused, one after another or by several processes.

Pictures that follow each other make a bracket until the camera notes the first shot of another, or where it notes nothing an
exposure comes again or the camera rests, or another kind of picture begins. What was fused is not fused again, so a run that
was stopped goes on where it was.
"""

import csv
import io
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from safnet.choices import MOST_FRAMES
from safnet.colour import conversion
from safnet.exposures import (
    FRAMES,
    ExposureError,
    exif_evs,
    exposure_file,
    folder_frames,
    format_evs,
    read_exposure_file,
)
from safnet.files import write_text
from safnet.images import Header, ImageError, is_result, read_header
from safnet.makers import Bracketing, read_bracketing
from safnet.model import SAFNet
from safnet.pipeline import FusionWarning, fuse_files
from safnet.weights import load_model

LONGEST_PAUSE = 4.0  # seconds between the frames of a bracket, beside their exposure times and EXIF's full seconds
SAME_EXPOSURE = 0.05  # EV
SMALLEST_STEP = 0.6  # EV between the frames of a bracket; metering alone makes less
TABLE = "batch.csv"
CONNECTING = 20  # seconds, in which a scheduler must answer
RETRIES = 3  # of a bracket whose process ended
COLUMNS = ("result", "state", "frames", "evs", "measured_evs", "seconds", "notes", "error")

State = Literal["fused", "done", "failed"]
Row = dict[str, str]
Progress = Callable[[str, int, int], None]


class Series(NamedTuple):
    """Pictures that belong together.

    Attributes:
        frames: in the order in which they were taken.
        chosen: those that are fused, from dark to bright, or in the order of `frames` where exposures are not known; none
            if this is no bracket.
        reason: why not.
    """

    frames: tuple[Path, ...]
    chosen: tuple[Path, ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        """Of the result: that of the middle exposure."""
        return self.chosen[len(self.chosen) // 2].stem


@dataclass(frozen=True)
class Job:
    """One bracket to be fused, which another process or machine can do too.

    Attributes:
        options: of `fuse_files`, but for the model.
        model, device: of `load_model`.
        threads: CPU threads; None for all cores.
    """

    frames: tuple[Path, ...]
    output: Path
    preview: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    model: str = "safnet-s"
    device: str = "auto"
    threads: int | None = None


class Outcome(NamedTuple):
    """What became of a job; `row` is its line of the table."""

    job: Job
    state: State
    row: Row


# ---- the plan --------------------------------------------------------------------------------------------------------


def find_series(folder: Path, every: int | None = None, besides: Sequence[Path] = ()) -> list[Series]:
    """All pictures of a folder in series, by file name.

    Args:
        every: so many make a bracket, whatever their exposures; None to tell brackets by exposures and times.
        besides: pictures that are no frames though they may lie in the folder.

    Raises:
        ExposureError: the folder has no frames, or `every` does not divide their number.
    """
    files = folder_frames(folder, besides)
    if not files:
        raise ExposureError(f"folder {folder} holds no frames")
    if every is not None:
        if len(files) % every:
            raise ExposureError(f"--every {every} does not fit the {len(files)} frames in {folder}")
        parts = [tuple(files[start : start + every]) for start in range(0, len(files), every)]
        return [Series(part, part) if every == FRAMES else _by_exposures(part, besides) for part in parts]
    exposed, unreadable = _exposed(files, besides)
    parts = [tuple(frame.path for frame, _ in part) for part in _split(exposed)]
    return [*(_by_exposures(part, besides) for part in parts), *unreadable]


def _exposed(files: Sequence[Path], besides: Sequence[Path]) -> tuple[list[tuple[Header, float]], list[Series]]:
    """Headers with EVs, and what has none."""
    headers, rest = [], []
    for file in files:
        try:
            headers.append(read_header(file))
        except ImageError as error:
            rest.append(Series((file,), reason=str(error)))
    table = exposure_file(headers) if headers else None
    given = read_exposure_file(table, headers, besides) if table is not None else None
    exposed = []
    for number, header in enumerate(headers):
        try:
            exposed.append((header, given[number] if given is not None else exif_evs([header])[0]))
        except ExposureError as error:
            rest.append(Series((header.path,), reason=str(error)))
    return exposed, rest


def _split(exposed: Sequence[tuple[Header, float]]) -> Iterator[list[tuple[Header, float]]]:
    """Cut a sequence of frames where another bracket begins."""
    part: list[tuple[Header, float]] = []
    noted: Bracketing | None = None
    for header, ev in exposed:
        before, noted = noted, read_bracketing(header.path)
        if part and _begins(part, header, ev, before, noted):
            yield part
            part = []
        part.append((header, ev))
    if part:
        yield part


def _begins(
    part: Sequence[tuple[Header, float]], header: Header, ev: float, before: Bracketing | None, noted: Bracketing | None
) -> bool:
    """Whether a frame begins another bracket than a part's: by what the camera noted of both, else by time and exposure."""
    last = part[-1][0]
    if not _alike(last, header):
        return True
    if before is not None and noted is not None:
        if before.on != noted.on:
            return True
        if before.number is not None and noted.number is not None:
            if noted.number <= before.number:
                return True
            if noted.number == before.number + 1:
                return False
    return _rested(last, header) or any(abs(ev - other) < SAME_EXPOSURE for _, other in part)


def _alike(first: Header, second: Header) -> bool:
    same = (first.width, first.height, first.path.suffix.lower()) == (
        second.width,
        second.height,
        second.path.suffix.lower(),
    )
    return same and conversion(first.colour.space, second.colour.space) is None


def _rested(first: Header, second: Header) -> bool:
    """Whether the camera rested between two pictures, or there are no times that tell."""
    before, after = _taken(first), _taken(second)
    if before is None or after is None:
        return False
    exposures = (first.exposure_time or 0) + (second.exposure_time or 0)
    return not -1 <= (after - before).total_seconds() <= LONGEST_PAUSE + exposures


def _taken(header: Header) -> datetime | None:
    times = {name: value for name, _, value in header.metadata}
    try:
        return datetime.strptime(str(times.get("Exif:DateTimeOriginal")), "%Y:%m:%d %H:%M:%S")
    except ValueError:
        return None


def _by_exposures(files: tuple[Path, ...], besides: Sequence[Path]) -> Series:
    """A series with the frames to fuse: all, or where these are too many or too close the darkest, middle and brightest."""
    if len(files) < FRAMES:
        return Series(files, reason=f"{len(files)} {'frame' if len(files) == 1 else 'frames'}")
    exposed, unreadable = _exposed(files, besides)
    if unreadable:
        return Series(files, reason=unreadable[0].reason)
    exposed.sort(key=lambda pair: pair[1])
    chosen = exposed
    if len(exposed) > MOST_FRAMES or _smallest_step(exposed) < SMALLEST_STEP:
        chosen = [exposed[0], exposed[len(exposed) // 2], exposed[-1]]
    if _smallest_step(chosen) < SMALLEST_STEP:
        return Series(
            files, reason=f"exposures less than {SMALLEST_STEP} EV apart: {format_evs([ev for _, ev in chosen])}"
        )
    return Series(files, tuple(header.path for header, _ in chosen))


def _smallest_step(exposed: Sequence[tuple[Header, float]]) -> float:
    return min(high[1] - low[1] for low, high in pairwise(exposed))


# ---- the work --------------------------------------------------------------------------------------------------------


def fuse_job(job: Job) -> Outcome:
    """Fuse one bracket, unless its result is there. Whatever goes wrong with it stands in its row."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    wanted = [path for path in (job.output, job.preview) if path is not None]
    there = [path for path in wanted if path.exists()]
    options = dict(job.options)
    if there and not options.get("overwrite"):
        own = all(path.suffix == ".hdr" or is_result(path) for path in there)
        if own and there == wanted:
            return Outcome(job, "done", _row(job, "done"))
        # One of the two: a run was stopped between them. Files of others stay, frames too, which is an error.
        options["overwrite"] = own
    started = time.perf_counter()
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FusionWarning)
            result = fuse_files(
                job.frames, job.output, preview=job.preview, model=_model(job.model, job.device), **options
            )
    except (ValueError, OSError) as error:
        return Outcome(job, "failed", _row(job, "failed", error=" ".join(str(error).split())))
    notes = "; ".join(str(warning.message) for warning in caught if issubclass(warning.category, FusionWarning))
    row = _row(
        job,
        "fused",
        evs=format_evs(result.given_evs),
        measured_evs=format_evs(result.evs),
        seconds=f"{time.perf_counter() - started:.1f}",
        notes=notes,
    )
    return Outcome(job, "fused", row)


@lru_cache(maxsize=1)
def _model(name: str, device: str) -> SAFNet:
    return load_model(name, device)


def _row(job: Job, state: State, **values: str) -> Row:
    frames = " ".join(frame.name for frame in job.frames)
    return {**dict.fromkeys(COLUMNS, ""), "result": job.output.name, "state": state, "frames": frames, **values}


def fuse_jobs(
    jobs: Sequence[Job], folder: Path, *, workers: int = 0, cluster: str | None = None, progress: Progress | None = None
) -> list[Outcome]:
    """Fuse many brackets, and keep a table of them in the folder, whole at any time.

    Args:
        folder: of the results and the table.
        workers: processes on this machine; 0 for this one.
        cluster: address of a Dask scheduler whose machines do it instead; they must see the same files.
        progress: called after each bracket.

    Raises:
        ValueError: Dask is not installed, or the scheduler does not answer.
    """
    rows = _read_table(folder / TABLE)
    outcomes = []
    run = map(fuse_job, jobs) if not workers and cluster is None else _distributed(jobs, workers, cluster)
    for outcome in run:
        outcomes.append(outcome)
        name = outcome.row["result"]
        if outcome.state != "done" or name not in rows:
            rows[name] = outcome.row
        _write_table(folder / TABLE, rows.values())
        if progress is not None:
            progress("fusing", len(outcomes), len(jobs))
    return outcomes


def _distributed(jobs: Sequence[Job], workers: int, cluster: str | None) -> Iterator[Outcome]:
    """By Dask, which gives the brackets of a process that ended to another one."""
    try:
        from distributed import Client, LocalCluster, as_completed
    except ImportError as error:
        raise ValueError("--workers and --cluster need Dask: pip install 'safnet-ops[cluster]'") from error
    local = None
    if cluster is None:
        local = LocalCluster(n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None)
    try:
        with Client(local if local is not None else cluster, timeout=CONNECTING) as client:
            pending = {client.submit(fuse_job, job, pure=False, retries=RETRIES): job for job in jobs}
            for future in as_completed(pending):
                job = pending[future]
                if future.status == "finished":
                    yield future.result()
                else:
                    yield Outcome(job, "failed", _row(job, "failed", error=f"its process ended: {future.exception()}"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--cluster {cluster} does not answer: {error}") from error
    finally:
        if local is not None:
            local.close()


def _read_table(path: Path) -> dict[str, Row]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["result"]: row for row in csv.DictReader(file) if row.get("result")}


def _write_table(path: Path, rows: Iterable[Row]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(rows, key=lambda row: row["result"]))
    write_text(path, text.getvalue())
