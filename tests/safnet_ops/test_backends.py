"""The choice of backends, and the report."""

import os
import subprocess
import sys

import pytest
import torch

import safnet_ops
from operator_inputs import positional_inputs
from safnet_ops import backends, info
from safnet_ops.operators import OPERATORS

IMAGE, FLOW = torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 4, 5)


def test_cpu_tensors_get_the_cpp_kernels():
    for name in OPERATORS:
        assert backends.choose(name, torch.device("cpu"), None) == "cpp"


def test_use_backend_nests_and_an_argument_wins():
    device = torch.device("cpu")
    with safnet_ops.use_backend("reference"):
        assert backends.choose("backward_warp", device, None) == "reference"
        with safnet_ops.use_backend("cpp"):
            assert backends.choose("backward_warp", device, None) == "cpp"
        assert backends.choose("backward_warp", device, "cpp") == "cpp"
    assert backends.choose("backward_warp", device, None) == "cpp"


def test_an_unknown_backend_is_refused():
    message = "backend must be one of reference, cpp, cuda, triton, got 'metal'"
    with pytest.raises(ValueError, match=message):
        safnet_ops.backward_warp(IMAGE, FLOW, backend="metal")
    with pytest.raises(ValueError, match=message), safnet_ops.use_backend("metal"):
        pass


def test_a_missing_backend_says_why(monkeypatch):
    monkeypatch.setitem(backends._served, "cuda", frozenset())
    monkeypatch.setitem(backends._missing, "cuda", "the moon is in the wrong house")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: the moon is in the wrong house"):
        safnet_ops.backward_warp(IMAGE, FLOW, backend="cuda")


def test_info_names_every_operator_and_every_missing_backend():
    text = info.report()
    for name in OPERATORS:
        assert name in text
    assert torch.__version__ in text
    assert f"safnet-ops {safnet_ops.__version__}" in text
    assert "instruction sets" in text
    for backend in backends.BACKENDS:
        if not any(backends.serves(name, backend) for name in OPERATORS):
            assert f"{backend} is missing" in text


INSTRUCTION_SETS = ["baseline", "avx2", "avx512", "amx"]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_instruction_sets_agree(name):
    """The kernels of a lesser instruction set, asked for by the environment, compute the same within rounding."""
    from safnet_ops import _C

    if INSTRUCTION_SETS.index(_C.instruction_set()) < INSTRUCTION_SETS.index(name):
        pytest.skip(f"this processor does not run {name}")
    program = (
        "import torch, safnet_ops; from safnet_ops import _C; torch.manual_seed(0);"
        "x, f = torch.randn(1, 5, 33, 70), torch.randn(1, 2, 33, 70) * 3;"
        "error = (safnet_ops.backward_warp(x, f).double()"
        " - safnet_ops.reference.backward_warp(x.double(), f.double())).abs().max().item();"
        "x, w = torch.randn(1, 40, 33, 70).bfloat16(), (torch.randn(20, 40, 3, 3) / 19).bfloat16();"
        "coarse = (safnet_ops.group_conv_shuffle(x, w).double()"
        " - safnet_ops.reference.group_conv_shuffle(x.double(), w.double())).abs().max().item();"
        "print(_C.instruction_set(), error < 1e-4 and coarse < 0.02)"
    )
    environment = {**os.environ, "SAFNET_OPS_ISA": name}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [name, "True"], done.stderr


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "census_loss"])
def test_the_reference_keeps_the_layout_as_kernels_do(operator):
    image, *others = positional_inputs(operator, (4, 5))
    for layout in (torch.channels_last, torch.contiguous_format):
        inputs = [image.contiguous(memory_format=layout), *others]
        for name in ("reference", "cpp"):
            found = getattr(safnet_ops, operator)(*inputs, backend=name)
            out = found if isinstance(found, torch.Tensor) else found[0]
            assert out.is_contiguous(memory_format=layout)
