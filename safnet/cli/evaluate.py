"""`safnet evaluate`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from safnet import choices
from safnet.cli.options import Dataset, Device, Precision, Threads, Tile
from safnet.cli.terminal import one_line_errors, progress_bar, use_threads

PIPE_WIDTH = 160  # of tables that are not on a terminal: columns in which they need no line breaks


def evaluate(
    dataset: Dataset,
    root: Annotated[Path, typer.Option(help="Folder of the data set, or of its scenes.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="safnet, safnet-s, or a weights file; repeatable.", show_default="safnet-s if no method is given"
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="reference, unaligned, homography or dis, the last three also with +mask; or all; repeatable."
        ),
    ] = None,
    predictions: Annotated[
        list[Path] | None, typer.Option(help="Folder of another method's SCENE.hdr, .exr or float .tif; repeatable.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder for report.html, scores.csv, scores.json, and results to resume from.")
    ] = None,
    split: Annotated[choices.Split, typer.Option(help="Subfolder of the data set, if it has them.")] = "Test",
    export_matlab: Annotated[
        Path | None,
        typer.Option(help="Folder for results and truths as .hdr files, and a MATLAB script that scores them."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a scene that cannot be scored.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute anew what an earlier run left in --save.")] = False,
    rgbe: Annotated[bool, typer.Option("--rgbe", help="Score results as .hdr files would hold them.")] = False,
    cvvdp: Annotated[bool, typer.Option("--cvvdp", help="Score with ColorVideoVDP too.")] = False,
    peak_luminance: Annotated[
        float, typer.Option(min=1.0, max=10000.0, help="cd/m2 of the value 1, for PU21 and ColorVideoVDP.")
    ] = 1000.0,
    ev_error: Annotated[
        float, typer.Option(min=-2.0, max=2.0, help="Give the methods EVs of the outer frames that are wrong by this.")
    ] = 0.0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Let models and baselines measure exposures and camera curve.")
    ] = False,
    timing_runs: Annotated[int, typer.Option(min=0, help="Timed runs of each model, 0 for none.")] = 5,
    precision: Precision = "float32",
    device: Device = "auto",
    threads: Threads = None,
    tile: Tile = None,
) -> None:
    """Score models, baselines and other methods' results on a data set, and write a report."""
    with one_line_errors():
        from rich.console import Console

        from safnet.evaluation.pipeline import evaluate_files
        from safnet.evaluation.report import print_tables
        from safnet.evaluation.run import Settings

        use_threads(threads)
        with progress_bar() as progress:
            evaluation, run, files = evaluate_files(
                root,
                Settings(dataset, ev_error, measure, rgbe, cvvdp, peak_luminance),
                split=split,
                models=model or (),
                baselines=baseline or (),
                predictions=predictions or (),
                device=device,
                precision=precision,
                tile=tile,
                timing_runs=timing_runs,
                save=save,
                export_matlab=export_matlab,
                fresh=fresh,
                strict=strict,
                command=shlex.join(["safnet", *sys.argv[1:]]),
                progress=progress,
            )
        print_tables(evaluation, run, Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
        if not evaluation.any_scored():
            raise ValueError(f"none of the {len(evaluation.scenes)} scenes in {root} could be scored")
    if files:
        typer.echo(", ".join([str(files[0]), *(file.name for file in files[1:])]))
