"""`safnet export`."""

from pathlib import Path
from typing import Annotated

import typer

from safnet.cli.options import Overwrite, Precision
from safnet.cli.terminal import notes, one_line_errors


def export(
    model: Annotated[str, typer.Argument(help="safnet, safnet-s, or a .safetensors or .pth file.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write: .onnx, .xml (OpenVINO) or .pt2 (torch.export).")
    ],
    precision: Precision = "float32",
    overwrite: Overwrite = False,
) -> None:
    """Write a model as a program for ONNX Runtime, TensorRT, OpenVINO or PyTorch, for pictures of any size.

    It holds the network, from three exposures to radiance: reading, aligning and developing pictures is not in it.
    """
    with one_line_errors():
        from safnet.export import ExportWarning, check_target, export_model
        from safnet.weights import load_model

        check_target(output, precision, overwrite)
        with notes(ExportWarning):
            export_model(load_model(model), output, precision=precision, overwrite=overwrite)
    typer.echo(f"{output}: {model} in {precision}")
