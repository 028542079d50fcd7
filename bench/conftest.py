"""`pytest bench/` compares the speed of all backends with the reference, operator by operator, behind a correctness gate.

Each test is one backend at one size and direction; pytest-benchmark puts those of one group side by side, with the ratio to the
fastest in brackets. SAFNET_BENCH_THREADS sets the number of CPU threads (default: all cores).
"""

import os
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import safnet_ops


@pytest.fixture(autouse=True)
def prepared():
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("SAFNET_BENCH_THREADS", os.cpu_count() or 1)))


@pytest.fixture
def compare(benchmark):
    """compare(name, implementation, inputs, exact, backward): time it after its results were found right."""

    def run(
        group: str,
        implementation: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        exact: Callable[..., Tensor],
        backward: bool = False,
        tolerance: float = 1e-3,
    ) -> None:
        with torch.no_grad():
            result, expected = implementation(*inputs), exact(*inputs)
        error = (result - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error < tolerance, f"wrong by {error:.1e}: its speed does not matter"

        def forward_and_backward() -> None:
            result = implementation(*inputs)
            result.backward(torch.ones_like(result))
            for value in inputs:
                value.grad = None

        def forward() -> None:
            with torch.no_grad():
                implementation(*inputs)

        benchmark.group = group
        benchmark.pedantic(forward_and_backward if backward else forward, rounds=15, warmup_rounds=3)

    return run


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    with safnet_ops.use_backend(request.param):
        yield request.param
