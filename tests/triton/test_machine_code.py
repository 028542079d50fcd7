"""Every kernel becomes machine code for the GPUs that people have, with nothing spilled to memory."""

import re

import pytest

pytest.importorskip("triton")

from tools import triton_costs

SIMPLE = [name for name in triton_costs.CASES if re.search(" (float32|TF32)$", name)]


@pytest.mark.parametrize("name", SIMPLE)
def test_compiles_without_spills(name):
    with triton_costs.recording(all_configurations=False) as kernels:
        triton_costs.CASES[name]((16, 16))
    assert kernels
    for kernel in kernels.values():
        for architecture in triton_costs.ARCHITECTURES:
            found = triton_costs.compile_for(kernel, architecture)
            assert found.registers > 0
            assert found.stack == 0, f"{kernel.name} ({kernel.label}) spills {found.stack} bytes on sm_{architecture}"
