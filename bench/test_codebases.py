"""Speed of one call of ours beside the code it replaces in projects of optical flow, forward and with gradients.

Results and gradients of both are compared before they are timed; a group is one operator as one project's kind of code has it.
"""

from typing import Any

import pytest

from bench.replacements import REPLACEMENTS, Replacement, Work


@pytest.mark.parametrize("way", ["ours", "stock"])
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("case", REPLACEMENTS, ids=str)
def test_speed(benchmark: Any, case: Replacement, direction: str, way: str) -> None:
    work = Work(case, direction)
    benchmark.group = f"{case} {direction}"
    benchmark.pedantic(work.run, (way,), rounds=7, warmup_rounds=1)
