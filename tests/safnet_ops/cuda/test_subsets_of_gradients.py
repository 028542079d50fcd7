"""Backward operators on CUDA, asked for every subset of their gradients: what is not needed has no buffers to touch."""

import pytest

from safnet_ops.operators import OPERATORS
from tests.support import subsets


def of_fused_fuse(exist):
    """Every subset of {short, long} with none, each one and all of the other gradients."""
    scattered = [0, *(OPERATORS["fused_fuse"].bit(name) for name in ("short", "long"))]
    scattered.append(sum(scattered))
    everything = (1 << len(exist)) - 1
    rest = [1 << position for position in range(len(exist)) if not scattered[-1] >> position & 1]
    return [ends | others for ends in scattered for others in (0, *rest, everything & ~scattered[-1])]


def test_some_subsets_of_gradients(cuda):
    for what, backward, exist in subsets.backwards(cuda.call):
        wanted = of_fused_fuse(exist) if what.startswith("fused_fuse") else range(1 << len(exist))
        subsets.check(what, backward, exist, wanted)


@pytest.mark.slow
def test_every_subset_of_gradients(cuda):
    for what, backward, exist in subsets.backwards(cuda.call):
        subsets.check(what, backward, exist, range(1 << len(exist)))
