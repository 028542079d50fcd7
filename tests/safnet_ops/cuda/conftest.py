"""Fixtures of the CUDA tests: they run the kernels on the CPU and are skipped, with the reason, where nvcc is missing.

SAFNET_OPS_TEST_GPU=cuda runs the same tests with the installed CUDA kernels on a GPU, =triton with the Triton kernels.
"""

import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

import ptxsim
from simulated_gpu import device as simulated

_tests_of_kernel: Counter[str] = Counter()


@pytest.fixture
def cuda(
    monkeypatch: pytest.MonkeyPatch, float32_products: Callable[[str], None]
) -> Iterator[simulated.Device | simulated.RealDevice]:
    """The public functions run the CUDA kernels: simulated, in checking mode, or on a GPU."""
    backend = os.environ.get("SAFNET_OPS_TEST_GPU")
    if backend is None and ptxsim.find_nvcc() is None:
        pytest.skip("nvcc not found: the CUDA kernels cannot be compiled here")
    device = simulated.RealDevice(backend) if backend else simulated.device()

    def patch(name: str, value: object) -> None:
        module, _, attribute = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(module), attribute, value)

    simulated.run_operators_on(device, patch)
    before = Counter(device.launches)
    yield device
    _tests_of_kernel.update({simulated.kernel_name(name) for name in device.launches - before})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With -v, how many tests executed each kernel."""
    if _tests_of_kernel and config.get_verbosity() > 0:
        terminalreporter.section("tests that executed a kernel on the simulator")
        for name, count in sorted(_tests_of_kernel.items()):
            terminalreporter.write_line(f"{count:5} {name}")
