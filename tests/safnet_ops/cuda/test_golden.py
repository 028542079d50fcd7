"""The CUDA kernels against the table of golden cases that all backends share."""

import pytest
import torch

from tests.support import golden

DTYPES = [torch.float64, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case.name)
def test_matches_the_table(case, dtype, cuda):
    golden.check(case, "cuda", dtype)
