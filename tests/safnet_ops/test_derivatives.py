"""Derivatives of every kind and order, and vmap: the C++ kernels' against the reference's, and against finite differences."""

import pytest
import torch
from torch.utils import _pytree as pytree

import safnet_ops
from tests.support import transforms
from tests.support.operators import assert_close
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


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_nodes_of_the_graph_have_names(call):
    """As visualisers and anomaly detection ask for; an attribute of the context must not hide one of the node's."""
    inputs = call.inputs()
    inputs[0].requires_grad_()
    (out, *_) = pytree.tree_leaves(call.on("cpp")(*inputs))
    with torch.autograd.detect_anomaly(check_nan=True):
        assert isinstance(out.grad_fn.name(), str)
        out.sum().backward()


def test_functional_call():
    """Gradients of a module's parameters, one a sample, as in torch.func's tutorials."""

    class Layer(torch.nn.Conv2d):
        def forward(self, x):
            return safnet_ops.group_conv_shuffle(x, self.weight, self.bias, None, self.groups)

    layer = Layer(4, 6, 3, padding=1, groups=2, dtype=torch.float64)
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    samples = torch.randn(5, 4, 6, 7, dtype=torch.float64)

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, samples)
    for place, sample in enumerate(samples):
        layer.zero_grad()
        with safnet_ops.use_backend("reference"):
            layer(sample[None]).square().sum().backward()
        for name, value in layer.named_parameters():
            assert_close(f"the gradient of {name}", found[name][place], value.grad, slack=10)
