"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from safnet import choices

Dataset = Annotated[choices.DatasetName, typer.Option(help="Layout of the scenes.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one.")]
Ghosts = Annotated[
    choices.Ghosts,
    typer.Option(help="Distrust of the outer frames: off where nothing moves, strong to trust them only where sure."),
]
FusionOnly = Annotated[
    bool,
    typer.Option(
        "--fusion-only", help="Every pixel a weighted mean of photographed ones, not refined: nothing is invented."
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option(
        help="A painted picture: where it is white the reference alone serves, as it was exposed; greys blend."
    ),
]
Model = Annotated[str, typer.Option(help="safnet, safnet-s, or a .safetensors or .pth file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
Precision = Annotated[choices.Precision, typer.Option(help="Arithmetic of the convolutions.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")]
Tile = Annotated[
    int | None,
    typer.Option(
        min=0, help="Size of tiles, the root of their pixels; 0 for none.", show_default="576 on a CPU, else 2048"
    ),
]
