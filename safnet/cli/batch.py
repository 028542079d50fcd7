"""`safnet batch`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from safnet import choices
from safnet.cli.options import Device, FusionOnly, Ghosts, Mask, Model, Overwrite, Precision, Threads, Tile
from safnet.cli.terminal import one_line_errors, progress_bar

INCOMPLETE = 1  # exit code of --strict

Format = Literal["exr", "tif", "hdr", "dng", "jpg", "avif"]
PreviewFormat = Literal["jpg", "png", "none"]


def batch(
    folder: Annotated[Path, typer.Argument(help="Folder of the pictures, as from a card.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made if missing.")],
    form: Annotated[
        Format, typer.Option("--format", help="Of the results; jpg is Ultra HDR, dng linear DNG, avif for HDR screens.")
    ] = "exr",
    preview: Annotated[PreviewFormat, typer.Option(help="Write a picture to look at beside each.")] = "jpg",
    every: Annotated[
        int | None, typer.Option(min=3, help="So many pictures make a bracket.", show_default="told by EXIF")
    ] = None,
    ev: Annotated[
        str | None,
        typer.Option(metavar="EV EV EV", help="Exposures of the frames of every bracket by name, with --every 3."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask for nothing.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="End with 1 where a bracket failed or has notes.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes on this machine; 0 for this one alone.")] = 0,
    cluster: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Dask scheduler whose machines do it.")] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--trust", help="Measure exposures and camera curve, or trust EVs and gamma 2.2.")
    ] = True,
    ghosts: Ghosts = "normal",
    fusion_only: FusionOnly = False,
    mask: Mask = None,
    curve: Annotated[str, typer.Option(metavar="CURVE", help="Curve of the frames: as of safnet fuse.")] = "auto",
    space: Annotated[choices.ColourSpace, typer.Option(help="Primaries of the results.")] = "rec709",
    tonemap: Annotated[choices.ToneMap, typer.Option(help="Tone map of previews.")] = "photo",
    look: Annotated[choices.Look, typer.Option(help="Look of a photo: how much contrast.")] = "natural",
    brightness: Annotated[
        float, typer.Option(min=-6.0, max=6.0, metavar="STOPS", help="Make previews lighter, or darker.")
    ] = 0.0,
    model: Model = "safnet-s",
    precision: Precision = "float32",
    device: Device = "auto",
    threads: Threads = None,
    tile: Tile = None,
    overwrite: Overwrite = False,
) -> None:
    """Find the brackets among the pictures of a folder and fuse them all. What is done is not done again."""
    with one_line_errors():
        import torch

        from safnet.avif import check_avif
        from safnet.batch import TABLE, Job, find_series, fuse_jobs
        from safnet.colour import parse_curve
        from safnet.exposures import FRAMES, advised_batch, parse_evs
        from safnet.pipeline import check_look
        from safnet.weights import load_model

        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
        if ev is not None and every != FRAMES:
            raise ValueError(f"--ev is for brackets of {FRAMES} frames by name: give --every {FRAMES} too")
        evs = None if ev is None else parse_evs(ev)
        parse_curve(curve)
        check_look(tonemap, look)
        if form == "avif":
            check_avif("--format", Path(form))
        if mask is not None and not mask.is_file():
            raise ValueError(f"--mask {mask} is no file")
        folder, output, mask = folder.resolve(), output.resolve(), None if mask is None else mask.resolve()
        series = find_series(folder, every, [] if mask is None else [mask])
        brackets = [one for one in series if one.chosen]
        for one in series:
            names = " ".join(frame.name for frame in one.chosen or one.frames)
            typer.echo(f"{one.name}.{form}: {names}" if one.chosen else f"left out: {names} ({one.reason})")
        if not brackets:
            advice = advised_batch([frame for one in series for frame in one.frames], folder, output)
            raise ValueError(f"no brackets in {folder}{'; ' if advice else ''}{advice}")
        if cluster is None:
            load_model(model, device)  # whose errors are those of all brackets
        if not yes:
            typer.confirm(f"Fuse {len(brackets)} brackets into {output}?", default=True, abort=True)
        options = {
            "evs": evs,
            "measure": measure,
            "ghosts": ghosts,
            "fusion_only": fusion_only,
            "mask": mask,
            "curve": curve,
            "space": space,
            "tonemap": tonemap,
            "look": look,
            "brightness": brightness,
            "precision": getattr(torch, precision),
            "tile": tile,
            "overwrite": overwrite,
        }
        jobs = [
            Job(
                one.chosen,
                output / f"{one.name}.{form}",
                None if preview == "none" else output / f"{one.name}{'.preview' if form == 'jpg' else ''}.{preview}",
                options,
                model,
                device,
                threads,
            )
            for one in brackets
        ]
        with progress_bar() as progress:
            outcomes = fuse_jobs(jobs, output, workers=workers, cluster=cluster, progress=progress)
    states = [outcome.state for outcome in outcomes]
    for outcome in outcomes:
        for kind in ("notes", "error"):
            if outcome.row[kind]:
                typer.echo(
                    f"{'note' if kind == 'notes' else 'failed'}: {outcome.row['result']}: {outcome.row[kind]}", err=True
                )
    typer.echo(
        f"{states.count('fused')} fused, {states.count('done')} done before, {states.count('failed')} failed: {output / TABLE}"
    )
    if strict and ("failed" in states or any(outcome.row["notes"] for outcome in outcomes)):
        raise typer.Exit(INCOMPLETE)
