"""Speed of the whole model, on the C++ kernels and on the reference operators."""

import pytest
import torch

import safnet

SIZE = (500, 752)


@pytest.mark.parametrize("variant", ["small", "full"])
def test_forward(benchmark, backend, variant):
    torch.manual_seed(0)
    model = safnet.SAFNet(variant).eval()
    exposures = [torch.rand(1, 6, *SIZE) for _ in range(3)]
    benchmark.group = f"SAFNet {variant} {SIZE[0]}x{SIZE[1]}"
    with torch.no_grad():
        benchmark.pedantic(lambda: model(*exposures), rounds=5, warmup_rounds=1)
