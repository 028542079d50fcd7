"""The shared library of C++ kernels: what programs without Python load, and how the package finds and checks it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import safnet_ops

PACKAGE = Path(safnet_ops.__file__).parent
LIBRARY = safnet_ops.libraries()[0]


def run(program, home=None):
    environment = dict(os.environ) if home is None else {**os.environ, "PYTHONPATH": str(home)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=home)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def copy(tmp_path):
    """A folder with a copy of the package."""
    products = shutil.ignore_patterns("__pycache__", "build_report.json", "*.so", "*.dylib")
    shutil.copytree(PACKAGE, tmp_path / "safnet_ops", ignore=products)
    return tmp_path


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_it_needs_nothing_of_python():
    listing = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_library_def") for symbol in symbols)  # the stable ABI's
    assert not [symbol for symbol in symbols if symbol.startswith(("Py", "_Py")) or "pybind11" in symbol]


ALONE = f"""
import torch
torch.ops.load_library({str(LIBRARY)!r})
image, flow = torch.arange(12.0).view(1, 1, 3, 4), torch.zeros(1, 2, 3, 4)
flow[:, 0] = 1
moved = torch.ops.safnet_ops.backward_warp(image, flow)
assert torch.equal(moved[..., :-1], image[..., 1:]), moved
"""
TOGETHER = """
import safnet_ops
image.requires_grad_()
safnet_ops.backward_warp(image, flow, backend="cpp").sum().backward()
assert torch.equal(image.grad[0, 0], torch.tensor([0.0, 1, 1, 2]).expand(3, 4)), image.grad
"""


@pytest.mark.parametrize("program", [ALONE, ALONE + TOGETHER, "import safnet_ops" + ALONE + TOGETHER])
def test_it_defines_the_operators_in_any_order_of_loading(program):
    code, _, errors = run(program)
    assert code == 0, errors


def test_a_library_of_other_sources_is_refused(copy):
    shutil.copy(LIBRARY, copy / "safnet_ops")
    schemas = copy / "safnet_ops" / "schemas.txt"
    text = schemas.read_text()
    assert "int patch_size" in text
    schemas.write_text(text.replace("int patch_size", "int size", 1))
    code, _, errors = run("import safnet_ops", copy)
    assert code != 0
    assert "was built from other sources, with another census_loss: run pip install again" in errors


def test_a_library_that_does_not_load_is_named(copy):
    (copy / "safnet_ops" / LIBRARY.name).write_bytes(b"no library")
    code, report, errors = run("from safnet_ops import info; print(info.report())", copy)
    assert code == 0, errors
    assert f"cpp is missing: {LIBRARY.name} failed to load: " in report


WITHOUT = f"""
import sys
sys.modules["triton"] = None
import torch, safnet_ops
from safnet_ops import info
image, flow = torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 4, 5)
assert torch.equal(safnet_ops.backward_warp(image, flow), image)
assert torch.compile(safnet_ops.backward_warp, backend="aot_eager")(image, flow).shape == image.shape
try:
    safnet_ops.backward_warp(image, flow, backend="cpp")
except RuntimeError as error:
    assert "backend 'cpp' is not available: {LIBRARY.name} was not built" in str(error), error
else:
    raise AssertionError("no error")
assert safnet_ops.libraries() == ()
print(info.report())
"""


def test_without_it_the_reference_serves(copy):
    code, report, errors = run(WITHOUT, copy)
    assert code == 0, errors
    assert "cpp is missing" in report


def test_the_signatures_are_those_of_the_operators():
    for line in (PACKAGE / "schemas.txt").read_text().splitlines()[1:]:
        operator = getattr(torch.ops.safnet_ops, line.partition("(")[0]).default
        assert str(operator._schema) == f"safnet_ops::{line}"
