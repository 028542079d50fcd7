"""`safnet synthesize`."""

from pathlib import Path
from typing import Annotated

import typer

from safnet import choices
from safnet.cli.options import Threads
from safnet.cli.terminal import one_line_errors, progress_bar, use_threads


def synthesize(
    panoramas: Annotated[Path, typer.Argument(help="Folder of equirectangular HDR panoramas: .hdr, .exr.")],
    output: Annotated[Path, typer.Argument(help="Scenes go to its subfolder Training, or Test for validation.")],
    count: Annotated[int, typer.Option(help="Scenes to write.")] = 1000,
    size: Annotated[tuple[int, int], typer.Option(help="Width and height in pixels.")] = (320, 320),
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same scenes.")] = 0,
    split: Annotated[
        choices.PanoramaSplit, typer.Option(help="Every seventh panorama by name is for validation.")
    ] = "all",
    ev_step: Annotated[tuple[float, float], typer.Option(help="Least and most stops between frames.")] = (1.0, 3.0),
    clipped: Annotated[tuple[float, float], typer.Option(help="Clipped part of the reference frame.")] = (0.0, 0.35),
    motion: Annotated[tuple[float, float], typer.Option(help="Pixels that objects move.")] = (0.0, 130.0),
    exact: Annotated[
        bool,
        typer.Option("--exact", help="A camera as the protocol assumes: exact EVs, gamma 2.2, low noise."),
    ] = False,
    threads: Threads = None,
) -> None:
    """Write training or validation scenes with known truth, made from HDR panoramas, in Kalantari17's layout."""
    with one_line_errors():
        from safnet.data.scenes import SceneSettings
        from safnet.data.scenes import synthesize as write_scenes

        use_threads(threads)
        ranges = SceneSettings(size[1], size[0], ev_step=ev_step, clipped=clipped, motion=motion)
        with progress_bar() as progress:
            folder = write_scenes(
                panoramas,
                output,
                count,
                ranges.exact() if exact else ranges,
                split=split,
                seed=seed,
                progress=lambda done, total: progress("scenes", done, total),
            )
    typer.echo(f"{count} scenes of {size[0]} x {size[1]}: {folder}")
