"""What a CUDA graph can capture never asks the device for a number, nor brings one from the host."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import safnet_ops
from operator_inputs import positional_inputs
from safnet_ops.operators import OPERATORS


class OffDevice(TorchDispatchMode):
    """Notes each operation that touches a tensor which is not on the device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.found = device, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type != self.device for tensor in tensors):
            self.found.append(str(function))
        return result


def on_meta(value):
    if not isinstance(value, torch.Tensor):
        return value
    # A device without numbers: who asks for one gets an error.
    return value.detach().to("meta").requires_grad_(value.is_floating_point())


@pytest.mark.parametrize("operator", OPERATORS)
def test_neither_forward_nor_backward_touches_the_host(operator):
    inputs = [on_meta(value) for value in positional_inputs(operator, (24, 32))]
    # The one pass of upsample_fuse has a rule of its own for what needs a gradient.
    call = torch.ops.safnet_ops.upsample_fuse if operator == "upsample_fuse" else getattr(safnet_ops, operator)
    with OffDevice("meta") as watch:
        results = call(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        torch.stack([result.sum() for result in results]).sum().backward()
    assert watch.found == []
    assert any(value.grad is not None for value in inputs if isinstance(value, torch.Tensor))


def test_a_number_from_the_host_would_be_noticed():
    with OffDevice("meta") as watch:
        flow = torch.zeros(1, 2, 4, 4, device="meta")
        flow * torch.tensor([2.0, 3.0]).to("meta").view(1, 2, 1, 1)
    assert watch.found != []
