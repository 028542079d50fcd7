"""`python -m safnet_ops.info`: versions, what was built, which backend serves each operator, why others are missing."""

import importlib
import json
import platform
from pathlib import Path

import torch

from safnet_ops import backends
from safnet_ops.operators import OPERATORS
from safnet_ops.version import __version__

BUILD_REPORT = Path(__file__).with_name("build_report.json")


def report() -> str:
    """The whole report as text, for people and for bug reports."""
    return "\n\n".join([_versions(), _build(), _table(), _reasons()])


def _versions() -> str:
    lines = [
        f"safnet-ops {__version__}, python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    ]
    lines.append(
        f"{torch.get_num_threads()} CPU threads" + (f", {_gpus()}" if torch.cuda.is_available() else ", no GPU")
    )
    return "\n".join(lines)


def _gpus() -> str:
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _build() -> str:
    lines = ["build:"]
    if BUILD_REPORT.is_file():
        lines += [f"  {decision}" for decision in json.loads(BUILD_REPORT.read_text())["decisions"]]
    else:
        lines.append("  no build report: the kernels were never built (pip install builds them)")
    if backends.serves("backward_warp", "cpp"):
        _C = importlib.import_module("safnet_ops._C")

        lines += [f"  _C {name}: {value}" for name, value in _C.build_info().items()]
        lines.append(f"  _C runs the {_C.instruction_set()} kernels on this processor")
    return "\n".join(lines)


def _table() -> str:
    """One row an operator: the backend that CPU and GPU tensors get, and all that are there."""
    rows: list[tuple[str, ...]] = [("operator", "on CPU", "on GPU", "available")]
    for name in OPERATORS:
        available = [backend for backend in backends.BACKENDS if backends.serves(name, backend)]
        chosen = [backends.choose(name, torch.device(kind), None) for kind in ("cpu", "cuda")]
        rows.append((name, *chosen, ", ".join(available)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _reasons() -> str:
    lines = []
    for backend in backends.BACKENDS:
        reasons = {name: backends.why_missing(name, backend) for name in OPERATORS}
        if len(set(reasons.values())) == 1:
            if reasons[next(iter(OPERATORS))]:
                lines.append(f"{backend} is missing: {reasons[next(iter(OPERATORS))]}")
        else:
            lines += [f"{backend} is missing for {name}: {reason}" for name, reason in reasons.items() if reason]
    return "\n".join(lines) or "nothing is missing"


if __name__ == "__main__":
    print(report())
