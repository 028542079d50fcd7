"""The model as a program for other runtimes: ONNX, OpenVINO, or PyTorch's own exported program."""

import copy
import importlib.util
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from safnet.choices import Precision
from safnet.files import written_whole
from safnet.model import SAFNet

# Format -> the extra that installs what is needed to write it, and that.
PACKAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    ".onnx": ("export", ("onnx", "onnxscript")),
    ".xml": ("openvino", ("onnx", "onnxscript", "openvino")),
    ".pt2": ("", ()),
}
INPUTS, OUTPUTS = ("short", "reference", "long"), ("fused", "refined")
LEAST_SIDE = 33  # in pixels: for smaller ones PyTorch traces another program
TRACED = (2, 6, 70, 90)  # any will do


class ExportError(ValueError):
    """A file or precision that there is no program for, or a package that is missing."""


class ExportWarning(UserWarning):
    """What to mind when the program is run."""


def export_model(
    model: SAFNet, path: str | os.PathLike[str], *, precision: Precision = "float32", overwrite: bool = False
) -> None:
    """Write the model's forward as a program of its own, for any number of brackets and any size from 33 x 33 pixels.

    The program takes `short`, `reference` and `long`, each (N, 6, H, W) as `safnet.radiance.exposure_input` makes them, and
    returns `fused` and `refined`, (N, 3, H, W), as `SAFNet.forward` does.

    Args:
        model: in whatever mode and dtype; it is left as it is.
        path: .onnx; .xml for OpenVINO, which has its .bin beside it; .pt2 for torch.export.load, with this library's operators
            and on the model's device.
        precision: of weights, exposures and results; bfloat16 for .pt2 alone.
        overwrite: replace a file.

    Raises:
        ExportError: the file's name or the precision does not fit, the file is there, or a package is missing.
    """
    path = Path(path)
    check_target(path, precision, overwrite)
    write_program(trace(model, precision, "cpu" if path.suffix != ".pt2" else None), path)


def check_target(path: Path, precision: Precision = "float32", overwrite: bool = False) -> None:
    """What can be known before any work. Raises ExportError."""
    if path.suffix not in PACKAGES:
        raise ExportError(f"{path}: the name must end in one of {', '.join(PACKAGES)}, got {path.suffix or 'none'!r}")
    if precision == "bfloat16" and path.suffix != ".pt2":
        raise ExportError(f"{path}: convolutions of ONNX's opset 18 take no bfloat16: use float32 or float16")
    if not path.parent.is_dir():
        raise ExportError(f"{path}: folder {str(path.parent)!r} does not exist")
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists; --overwrite replaces it")
    extra, packages = PACKAGES[path.suffix]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{path.suffix} files need {' and '.join(missing)}: pip install 'safnet-ops[{extra}]'")


def trace(model: SAFNet, precision: Precision = "float32", device: str | None = None) -> ExportedProgram:
    """The model's inference as a program of dynamic sizes. `model` stays as it is; `device` is its own unless given."""
    dtype = getattr(torch, precision)
    model = copy.deepcopy(model).to(device=device, dtype=dtype).eval()
    device = next(model.parameters()).device.type
    exposures = tuple(torch.rand(TRACED, dtype=torch.float32, device=device).to(dtype) for _ in INPUTS)
    dynamic = {0: Dim("batch", min=1), 2: Dim("height", min=LEAST_SIDE), 3: Dim("width", min=LEAST_SIDE)}
    with torch.no_grad():
        return torch.export.export(model, exposures, dynamic_shapes=dict.fromkeys(INPUTS, dynamic))


def write_program(program: ExportedProgram, path: Path) -> None:
    """Write what `trace` made, in the format that the file's name says."""
    if path.suffix == ".pt2":
        with written_whole(path) as partial, partial.open("wb") as file:
            torch.export.save(program, file)
    elif path.suffix == ".onnx":
        content = to_onnx(program)
        with written_whole(path) as partial:
            partial.write_bytes(content)
    else:
        _write_openvino(to_onnx(program), path)


def to_onnx(program: ExportedProgram) -> bytes:
    """The program as an ONNX file's content."""
    from safnet_ops.onnx import OPSET, translation_table

    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=translation_table(),
            opset_version=OPSET,
            input_names=INPUTS,
            output_names=OUTPUTS,
            verbose=False,
        )
    assert exported is not None
    return exported.model_proto.SerializeToString()


def _write_openvino(content: bytes, path: Path) -> None:
    import openvino

    network: Any = openvino.Core().read_model(io.BytesIO(content))
    # In a folder of their own first: OpenVINO chooses the weights' name by that of the description, and its ending.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        made = Path(folder) / path.name
        openvino.save_model(network, made, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):  # the description last: it is nothing without the weights
            os.replace(made.with_suffix(suffix), path.with_suffix(suffix))
    warnings.warn(
        "OpenVINO computes in bfloat16 by itself on CPUs that have it, and flows go astray: "
        'compile with {"INFERENCE_PRECISION_HINT": "f32"}',
        ExportWarning,
        stacklevel=3,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter logs of packages that this model does not need, and warns of itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
