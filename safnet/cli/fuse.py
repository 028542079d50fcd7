"""`safnet fuse`."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from safnet import choices
from safnet.cli.options import Device, FusionOnly, Ghosts, Mask, Model, Overwrite, Precision, Threads, Tile
from safnet.cli.terminal import notes, one_line_errors, peak_memory, progress_bar, use_threads


class FuseCommand(TyperCommand):
    """A command whose --ev takes its values as one word or as several."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_exposures(args))


def fuse(
    frames: Annotated[
        list[Path],
        typer.Argument(
            help="Two to nine frames in any order (JPEG, PNG, TIFF, EXR, camera raw, HEIC), or their folder."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="HDR result: linear .exr, .hdr, .tif or .dng, Ultra HDR .jpg, or .avif for HDR screens.",
        ),
    ],
    ev: Annotated[
        str | None,
        typer.Option(
            metavar="EV EV EV",
            help="Exposures in the order of the frames (of a folder: by name) in stops, more light = higher: -2 0 2; or as "
            "times: 1/80 1/20 1/5.",
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="The frame to align to.", show_default="of three the middle one, else the best exposed"),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure/--trust", help="Measure exposures and camera curve, or trust EVs and gamma 2.2."),
    ] = True,
    global_motion: Annotated[
        bool, typer.Option("--global/--no-global", help="Look for the motion of the whole camera first.")
    ] = True,
    ghosts: Ghosts = "normal",
    fusion_only: FusionOnly = False,
    mask: Mask = None,
    curve: Annotated[
        str,
        typer.Option(
            metavar="CURVE", help="Curve of the frames: auto (as the files say, else 2.2), srgb, linear, or a gamma."
        ),
    ] = "auto",
    space: Annotated[
        choices.ColourSpace, typer.Option(help="Primaries of the result; input: the frames' own.")
    ] = "rec709",
    depth: Annotated[
        choices.Depth | None,
        typer.Option(
            help="Numbers in the result: .exr half or float, .tif float or uint16, .dng uint16 or half.",
            show_default="the first",
        ),
    ] = None,
    preview: Annotated[Path | None, typer.Option(help="Also write a tone-mapped picture: .png or .jpg.")] = None,
    tonemap: Annotated[choices.ToneMap, typer.Option(help="Tone map of preview and inspection.")] = "photo",
    look: Annotated[choices.Look, typer.Option(help="Look of a photo: how much contrast.")] = "natural",
    brightness: Annotated[
        float, typer.Option(min=-6.0, max=6.0, metavar="STOPS", help="Make preview and inspection lighter, or darker.")
    ] = 0.0,
    inspect: Annotated[
        Path | None,
        typer.Option(help="Also write flows, masks, explicit fusion and a sheet of all steps to this folder."),
    ] = None,
    model: Model = "safnet-s",
    precision: Precision = "float32",
    device: Device = "auto",
    threads: Threads = None,
    tile: Tile = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Refuse what needs more memory: 4GB.", show_default="no limit")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Fuse two to nine exposures of a moving scene into one linear HDR picture, aligned to one of them.

    Exposures come from --ev, else from exposure.txt beside the frames (one EV a line, by file name), else from EXIF.
    """
    started = time.perf_counter()
    with one_line_errors():
        import torch

        from safnet.exposures import format_evs, parse_evs
        from safnet.memory import parse_size
        from safnet.pipeline import FusionWarning, fuse_files

        use_threads(threads)
        with progress_bar() as progress, notes(FusionWarning):
            result = fuse_files(
                frames,
                output,
                evs=None if ev is None else parse_evs(ev),
                reference=reference,
                measure=measure,
                global_motion=global_motion,
                ghosts=ghosts,
                fusion_only=fusion_only,
                mask=mask,
                model=model,
                device=device,
                precision=getattr(torch, precision),
                tile=tile,
                memory=None if memory is None else parse_size(memory),
                curve=curve,
                space=space,
                depth=depth,
                preview=preview,
                tonemap=tonemap,
                look=look,
                brightness=brightness,
                inspect=inspect,
                overwrite=overwrite,
                progress=progress,
            )
    height, width = result.radiance.shape[2:]
    exposures, measured = (f"EV {format_evs(evs)}" for evs in (result.given_evs, result.evs))
    if measured != exposures:
        exposures += f" (measured: {measured})"
    if result.curve is not None:
        exposures += ", camera curve measured"
    missing = 100 * (1 - min(result.covered))
    if missing >= 1:
        exposures += f", {missing:.0f} % of the frame in the reference alone"
    seconds = time.perf_counter() - started
    typer.echo(f"{width} x {height}, {exposures}, {seconds:.1f} s, peak memory {peak_memory()}: {output}")


def join_exposures(arguments: list[str]) -> list[str]:
    """Make one argument of --ev and the words after it that are its values: `--ev -2 0 2` has three, `--ev -2,0,2` one."""
    joined, rest = [], list(arguments)
    while rest and rest[0] != "--":
        name, given, value = rest.pop(0).partition("=")
        if name != "--ev" or not (given or rest):
            joined.append(name + given + value)
            continue
        from safnet.choices import MOST_FRAMES
        from safnet.exposures import FRAMES, is_exposure, split_exposures

        text = value if given else rest.pop(0)
        # Values in one word are all there are. A file or folder may have a number for its name.
        several = is_exposure(text.rstrip(","))
        while several and rest and len(split_exposures(text)) < MOST_FRAMES and is_exposure(rest[0].rstrip(",")):
            if len(split_exposures(text)) >= FRAMES and Path(rest[0]).exists():
                break
            text += f" {rest.pop(0)}"
        joined.append(f"--ev={text}")
    return joined + rest
