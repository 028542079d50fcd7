"""The CUDA kernels against the table of golden cases that all backends share."""

import pytest
import torch

from tests.support import golden
from tests.support.operators import assert_close

PRECISIONS = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case.name)
def test_matches_the_table(case, dtype, cuda):
    golden.check(case, "cuda", dtype, PRECISIONS[dtype], assert_close)
