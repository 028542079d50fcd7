"""Derivatives of other kinds than backward's, and vmap, by the Triton kernels on the simulator, against the reference."""

import pytest
import torch

from tests.support import transforms
from tests.support.operators import assert_close
from tests.support.transforms import CALLS, name_of

CHOSEN = (transforms.jvp, transforms.double_backward, transforms.forward_over_reverse, transforms.vmap_of_gradient)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
@pytest.mark.parametrize("transform", CHOSEN, ids=name_of)
def test_transforms(simulated, float32_products, transform, call):
    transforms.check(transform, call, call.on("triton"))


def test_gradients_of_the_registered_operator(simulated):
    """Called as torch.ops, as in an exported program."""
    call = CALLS[0]
    leaves = [value.requires_grad_() for value in call.inputs()]
    found = torch.autograd.grad(torch.ops.safnet_ops_triton.backward_warp(*leaves).sin().sum(), leaves)
    expected = torch.autograd.grad(call.on("reference")(*leaves).sin().sum(), leaves)
    for value, exact in zip(found, expected, strict=True):
        assert_close("the gradient", value, exact, slack=10)
