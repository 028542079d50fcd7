"""Fixtures of all tests. Hypothesis runs without time limits, as machines differ; where CI is set, with the same examples."""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned(deterministic: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory becomes NaN, so that an output element that a kernel forgets shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


@pytest.fixture
def forced_64bit() -> Iterator[None]:
    """The C++ kernels use 64-bit offsets inside this fixture."""
    from safnet_ops import _C  # type: ignore[attr-defined]

    _C.force_64bit_offsets(True)
    yield
    _C.force_64bit_offsets(False)


@pytest.fixture
def float32_products() -> Iterator[Callable[[str], None]]:
    """Call it with "ieee" or "tf32" to say how float32 convolutions may multiply; "ieee" until then."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision

    def choose(precision: str) -> None:
        convolutions.fp32_precision = precision

    choose("ieee")
    yield choose
    choose(before)
