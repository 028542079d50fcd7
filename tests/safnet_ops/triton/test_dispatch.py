"""How Triton kernels are reached: imports, errors, fakes, and the golden cases that all backends share."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import safnet_ops
from safnet_ops.operators import OPERATORS
from tests.support import golden

DTYPES = [torch.float64, torch.float32]
ROOT = Path(__file__).resolve().parents[3]  # its packages come before installed ones


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)


def test_import_without_triton_is_clean_and_says_so():
    """As on macOS and Windows, for which the package does not exist; the kernels for the CPU go on working."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, safnet_ops\n"
        "from safnet_ops import info\n"
        "from safnet_ops.operators import OPERATORS\n"
        "assert 'safnet_ops.triton' not in sys.modules\n"
        "from operator_inputs import positional_inputs\n"
        "for name in OPERATORS:\n"
        "    arguments = positional_inputs(name, (4, 5))\n"
        "    getattr(safnet_ops, name)(*arguments)\n"
        "    try: getattr(safnet_ops, name)(*arguments, backend='triton')\n"
        "    except RuntimeError as error: print(error)\n"
        "print(info.report())\n"
    )
    lines = run_python(code).stdout.splitlines()
    why = "the package triton is not installed (it exists for Linux: pip install triton)"
    for name in OPERATORS:
        assert f"{name}: backend 'triton' is not available: {why}" in lines
    assert any("triton is missing" in line and why in line for line in lines)


def test_broken_triton_is_reported_and_not_raised():
    code = (
        "import sys, importlib.abc\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('triton.'): raise ImportError('libtriton.so: wrong ELF class')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "import torch, safnet_ops\n"
        "print(safnet_ops.backends.why_missing('backward_warp', 'triton'))\n"
    )
    pytest.importorskip("triton")
    assert "triton failed to load: libtriton.so: wrong ELF class" in run_python(code).stdout


def test_package_of_the_same_name_is_not_mistaken_for_triton():
    triton = pytest.importorskip("triton")
    from safnet_ops.triton import launching

    assert launching.triton is triton
    assert triton.__name__ == "triton"
    assert hasattr(triton, "jit")


def test_cpu_tensors_without_a_simulator_are_refused():
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="backward_warp: backend 'triton' runs CUDA tensors, got device 'cpu'"):
        safnet_ops.backward_warp(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case.name)
def test_golden_cases(case, dtype, simulated, float32_products):
    golden.check(case, "triton", dtype)


def test_operators_agree_with_their_fakes():
    pytest.importorskip("triton")
    import ptxsim

    ops = torch.ops.safnet_ops_triton
    image, flow = torch.randn(2, 3, 4, 5), torch.randn(2, 2, 4, 5)
    dense = image.contiguous(memory_format=torch.channels_last)
    mask, weight = torch.rand(2, 1, 4, 5), torch.randn(6, 3, 3, 3)
    fusion = (dense, image, image, flow, flow, mask, mask)
    calls = [
        (ops.backward_warp, (dense, flow)),
        (ops.backward_warp_backward, (image, dense, flow, 0b01, False)),
        (ops.fused_fuse, (*fusion, image, None, None, None, False)),
        (ops.fused_fuse_backward, (image, *fusion, image, None, None, None, False, 0b10001011, False)),
        (ops.upsample_fuse, (*fusion, image)),
        (ops.census_loss, (image, dense, 3, False)),
        (ops.census_loss_backward, (torch.ones(()), dense, image, 3, False)),
        (ops.group_conv_shuffle, (dense, weight, None, weight[:, 0, 0, 0].contiguous(), None, 1, 2, 1, True)),
        (
            ops.group_conv_shuffle_backward,
            (
                torch.randn(2, 6, 4, 5),
                torch.randn(2, 6, 4, 5),
                dense,
                weight,
                weight[:, 0, 0, 0].contiguous(),
                1,
                1,
                1,
                0b11011,
                False,
            ),
        ),
    ]
    registered = {name for operator in OPERATORS.values() for name in operator.registered}
    assert {op.__name__ for op, _ in calls} == registered
    with ptxsim.triton_on_cpu():
        for op, arguments in calls:
            torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_every_operator_has_kernels():
    kernels = pytest.importorskip("safnet_ops.triton").KERNELS
    assert set(kernels) == {name for operator in OPERATORS.values() for name in operator.registered}
