"""Options that several commands have."""

from typing import Annotated

import typer

from safnet import choices

Dataset = Annotated[choices.DatasetName, typer.Option(help="Layout of the scenes.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one.")]
Model = Annotated[str, typer.Option(help="safnet, safnet-s, or a .safetensors or .pth file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")]
Precision = Annotated[choices.Precision, typer.Option(help="Arithmetic of the convolutions.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")]
Tile = Annotated[
    int | None, typer.Option(min=0, help="Tile side in pixels, 0 for none.", show_default="448 on a CPU, else 2048")
]
