"""The reference and the C++ kernels against the table of golden cases; tests of other backends use the same table."""

import pytest
import torch

from safnet_ops import backends
from safnet_ops.operators import OPERATORS
from tests.support import golden

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case.name)
def test_matches_the_table(case, backend, dtype):
    reason = backends.why_missing(case.operator, backend)
    if reason is not None:
        pytest.skip(reason)
    golden.check(case, backend, dtype)


def test_table_covers_every_operator():
    assert {case.operator for case in golden.CASES} == set(OPERATORS)
    assert all(case.gradients for case in golden.CASES if case.operator != "upsample_fuse")
