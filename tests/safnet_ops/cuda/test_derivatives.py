"""Derivatives of other kinds than backward's, and vmap, by the CUDA kernels executed on the CPU, against the reference."""

import pytest

from tests.support import transforms
from tests.support.transforms import CALLS, name_of

CHOSEN = (transforms.jvp, transforms.double_backward, transforms.forward_over_reverse, transforms.vmap_of_gradient)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
@pytest.mark.parametrize("transform", CHOSEN, ids=name_of)
def test_transforms(cuda, transform, call):
    transforms.check(transform, call, call.on("cuda"))
