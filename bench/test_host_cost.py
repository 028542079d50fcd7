"""Time of a call on pictures of 8x8 pixels, by name and as torch.ops, beside the stock expression."""

from typing import Any

import pytest

from bench.host_cost import CALLS, KINDS, OPERATORS, prepared


@pytest.mark.parametrize("way", ["by name", "torch.ops", "stock"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_call(benchmark: Any, operator: str, kind: str, way: str) -> None:
    benchmark.group = f"{operator} {kind}"
    benchmark.pedantic(prepared(operator, kind)[way], iterations=CALLS, rounds=50, warmup_rounds=1)
