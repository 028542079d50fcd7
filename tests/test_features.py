"""The tool that tries every feature with every operator: its cells, and that planted faults end it with status 1."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

REPLACE_KERNEL = """
import torch, safnet_ops
def kernel(image, flow): {}
library = torch.library.Library("safnet_ops", "IMPL")
library.impl("backward_warp", kernel, "CPU")
"""
ZERO_TANGENTS = """
import torch
from safnet_ops.autograd import Rule
Rule.jvp = classmethod(lambda cls, ctx, *tangents: torch.zeros_like(tangents[0]))
"""


def try_features(feature: str, operator: str, before: str = "", backend: str = "cpp") -> tuple[int, list[str]]:
    """Exit status, and the rows of the printed tables, after statements that plant a fault."""
    arguments = ["--backend", backend, "--feature", feature, "--operator", operator]
    script = f"{before}\nimport sys\nfrom tools import features\nsys.exit(features.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    tables = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    return done.returncode, [row for row in tables if not row.startswith(("| --", "|  |", "| operator |"))]


@pytest.mark.parametrize(
    ("backend", "feature"), [("reference", "torch.func.vmap"), ("cpp", "float32"), ("cpp", "dual tensors")]
)
def test_a_feature_of_all_operators_works(backend, feature):
    status, (row,) = try_features(feature, "", backend=backend)
    assert status == 0
    assert row.endswith(" |" + " works |" * 6)


def test_an_option_works():
    assert try_features("padding=", "backward_warp") == (0, ['| backward_warp | `padding="zeros"` | works |'])


@pytest.mark.parametrize(
    ("feature", "fault"),
    [
        ("float32", REPLACE_KERNEL.format("return image.clone()")),
        ("float32", REPLACE_KERNEL.format("return safnet_ops.backward_warp(image, flow, backend='reference') + 1e-4")),
        ("float32", REPLACE_KERNEL.format("raise RuntimeError('no')")),
        ("dual tensors", ZERO_TANGENTS),
    ],
    ids=["wrong values", "slightly wrong values", "an unclear error", "zero tangents"],
)
def test_a_planted_fault_fails(feature, fault):
    status, rows = try_features(feature, "backward_warp", fault)
    assert status == 1
    assert "| fails (1) |" in rows[0]


def test_a_clear_error_is_a_refusal():
    fault = REPLACE_KERNEL.format("raise TypeError('backward_warp: flow must be float64')")
    status, rows = try_features("float32", "backward_warp", fault)
    assert status == 0
    assert "| refused (1) |" in rows[0]


def test_a_name_that_is_nowhere_is_an_error():
    status, rows = try_features("teleportation", "")
    assert status == 2
    assert not rows
