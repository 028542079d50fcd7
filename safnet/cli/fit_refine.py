"""`safnet fit-refine`."""

from pathlib import Path
from typing import Annotated

import typer

from safnet import choices
from safnet.cli.options import Dataset, Device, Model, Overwrite, Threads
from safnet.cli.terminal import one_line_errors, progress_bar, use_threads


def fit_refine(
    scenes: Annotated[
        list[Path], typer.Argument(help="Folders of scenes with truth, or of data sets: their training scenes.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Weights file to write: .safetensors.")],
    model: Model = "safnet-s",
    variant: Annotated[
        choices.Variant | None, typer.Option(help="Kind of model to write.", show_default="the model's")
    ] = None,
    dataset: Dataset = "kalantari17",
    device: Device = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a model's refine module a second merge that fits scenes best, by least squares: no training needed.

    The flows and masks of --model are kept.
    """
    with one_line_errors():
        from safnet.training.second_merge import fit_files

        use_threads(threads)
        with progress_bar() as progress:
            count = fit_files(
                scenes,
                output,
                model=model,
                variant=variant,
                dataset=dataset,
                device=device,
                overwrite=overwrite,
                progress=progress,
            )
    typer.echo(f"{output}: refine module fitted to {count} scenes")
