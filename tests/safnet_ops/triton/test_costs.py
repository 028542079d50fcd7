"""The tool that writes the Triton kernels' tables still finds its calls and computes a row of each table."""

import dataclasses

import pytest

pytest.importorskip("triton")

from safnet_ops.operators import OPERATORS
from simulated_gpu import cuda_costs, triton_costs


def test_models_the_calls_of_the_cuda_kernels():
    cases = triton_costs.cost_cases("")
    assert [case.name for case in cases] == [case.name for case in cuda_costs.CASES]
    assert {case.name.split(",")[0].split()[0] for case in cases} == set(OPERATORS)
    assert {call.operator for call in triton_costs.CALLS} == set(OPERATORS)


def test_models_a_call():
    case = triton_costs.cost_cases("^fused_fuse, float32$")[0]
    case = dataclasses.replace(case, simulated=((4, 32), (8, 32)), sizes=((16, 32),))
    header, _, row = triton_costs.cost_table([case]).splitlines()
    found = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (header, row)), strict=True))
    assert found["operator"] == case.name
    assert found["size"] == "32 x 16"
    assert found["launches"] == "1"
    assert 0.8 < float(found["bytes / compulsory"]) < 1.1
    assert 400 < float(found["instructions a pixel"]) < 1000


def test_lists_registers():
    rows = triton_costs.register_rows("^upsample_fuse, float16, contiguous$")
    assert len(rows) == 2  # configurations
    table = triton_costs.register_table(rows)
    assert "6 compilations. None has a stack frame, none spills." in table
    assert "| upsample_fuse: forward | float16 | contiguous | BLOCK_C 4, BLOCK 128, 4 warps |" in table
