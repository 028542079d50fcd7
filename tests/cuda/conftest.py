"""Fixtures of the CUDA tests: they run the kernels on the CPU and are skipped, with the reason, where nvcc is missing.

SAFNET_OPS_TEST_GPU=cuda runs the same tests with the installed CUDA kernels on a GPU, =triton with the Triton kernels.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [path for path in (str(Path(__file__).parent), str(Path(__file__).parents[1])) if path not in sys.path]
import ptxsim  # noqa: E402
import simulated  # noqa: E402


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> simulated.Device | simulated.RealDevice:
    """The public functions run the CUDA kernels: simulated, in checking mode, or on a GPU."""
    backend = os.environ.get("SAFNET_OPS_TEST_GPU")
    if backend is None and ptxsim.find_nvcc() is None:
        pytest.skip("nvcc not found: the CUDA kernels cannot be compiled here")
    device = simulated.RealDevice(backend) if backend else simulated.device()

    def patch(name: str, value: object) -> None:
        module, _, attribute = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), attribute, value)

    simulated.run_operators_on(device, patch)
    return device


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(2407)
