import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory becomes NaN, so that an output element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def forced_64bit():
    """Kernels use 64-bit offsets inside this fixture."""
    from safnet_ops import _C

    _C.force_64bit_offsets(True)
    yield
    _C.force_64bit_offsets(False)
