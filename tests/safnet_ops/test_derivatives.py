"""Derivatives of every kind and order, and vmap: the C++ kernels' against the reference's, and against finite differences."""

import pytest
import torch

import safnet_ops
from tests.support import transforms
from tests.support.transforms import CALLS, TRANSFORMS, name_of


@pytest.mark.parametrize("call", CALLS, ids=name_of)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=name_of)
def test_transforms(transform, call):
    transforms.check(transform, call, call.on("cpp"))


@pytest.mark.parametrize("call", CALLS, ids=name_of)
@pytest.mark.parametrize(
    "transform", [transforms.jvp, transforms.dual_tensors, transforms.vmap_of_gradient], ids=name_of
)
def test_transforms_of_the_backend_chosen_around_them(transform, call):
    with safnet_ops.use_backend("cpp"):
        transforms.check(transform, call, call.on(None))


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_finite_differences(call):
    inputs = call.inputs()
    for value in inputs[: call.differentiable]:
        value.requires_grad_()
    assert torch.autograd.gradcheck(
        call.on("cpp"), inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@pytest.mark.parametrize("call", [call for call in CALLS if call.operator != "upsample_fuse"], ids=name_of)
def test_finite_differences_of_gradients(call):
    inputs = call.inputs()
    for value in inputs[: call.differentiable]:
        value.requires_grad_()
    assert torch.autograd.gradgradcheck(call.on("cpp"), inputs, check_fwd_over_rev=True, fast_mode=True)
