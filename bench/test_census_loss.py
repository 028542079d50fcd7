"""Speed of census_loss as training uses it: patches of 7 pixels on crops and on whole pictures."""

import pytest
import torch

import safnet_ops
from safnet_ops import reference


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(256, 256), (512, 512)], ids=str)
def test_backend(compare, backend, size, dtype, direction):
    prediction, target = (torch.rand(1, 3, *size, dtype=dtype) for _ in range(2))
    if direction == "both":
        prediction.requires_grad_()
    group = f"census_loss 3x{size[0]}x{size[1]} {str(dtype)[6:]} {direction}"
    compare(group, safnet_ops.census_loss, (prediction, target), reference.census_loss, direction == "both")
