"""Every kernel becomes machine code for the GPUs that people have, with nothing spilled to memory."""

import pytest

pytest.importorskip("triton")

import torch

from safnet_ops.operators import OPERATORS
from simulated_gpu import triton_costs


def _is_fast(call):
    return call.is_usual and call.dtype == torch.float16 and not call.channels_last


FAST = [call for call in triton_costs.CALLS if _is_fast(call)]


def test_every_operator_is_compiled():
    assert {call.operator for call in FAST} == {call.operator for call in triton_costs.CALLS} == set(OPERATORS)


@pytest.mark.parametrize("call", FAST, ids=lambda call: call.name)
def test_compiles_without_spills(call):
    check(call, all_configurations=False)


@pytest.mark.slow
@pytest.mark.parametrize("call", triton_costs.CALLS, ids=lambda call: call.name)
def test_every_configuration_compiles_without_spills(call):
    check(call, all_configurations=True)


def check(call, all_configurations):
    with triton_costs.recording(all_configurations) as kernels:
        call()
    assert kernels
    for kernel in kernels.values():
        for architecture in triton_costs.ARCHITECTURES:
            found = triton_costs.compile_for(kernel, architecture)
            assert found.registers > 0
            assert found.stack == 0, f"{kernel.name}, {kernel.configuration}, on sm_{architecture}: {found}"
