"""Autocast: mixed dtypes of every operator, called by name, as torch.ops and in exported programs; on CUDA by fake tensors."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from safnet_ops.operators import OPERATORS
from tests.support.operators import assert_close
from tests.support.transforms import ARGUMENTS, CALLS, name_of

BACKENDS = ("reference", "cpp")
MIXES = list(itertools.permutations((torch.float32, torch.bfloat16, torch.float16), 2))
PROMOTED = [call for call in CALLS if call.operator != "group_conv_shuffle"]
CONVOLUTIONS = [call for call in CALLS if call.operator == "group_conv_shuffle"]


def mixed(call, first, second):
    """The call's inputs, every second of another dtype."""
    return [value.to(second if place % 2 else first) for place, value in enumerate(call.inputs())]


def forms(call, backend):
    """The operator as a function, and as the registered operator where that is of the backend."""
    functions = [call.on(backend)]
    if backend == "cpp":
        registered = getattr(torch.ops.safnet_ops, call.operator)
        functions.append(lambda *inputs: registered(*ARGUMENTS[call.name](*inputs)))
    return functions


def leaves_of(found, call):
    return pytree.tree_leaves(found)[:1] if call.operator == "group_conv_shuffle" else pytree.tree_leaves(found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", MIXES, ids=str)
@pytest.mark.parametrize("call", PROMOTED, ids=name_of)
def test_mixed_inputs_are_promoted(call, kinds, backend):
    inputs = mixed(call, *kinds)
    expected = leaves_of(call.on("reference")(*(value.float() for value in inputs)), call)
    for function in forms(call, backend):
        with torch.autocast("cpu", torch.bfloat16):
            found = leaves_of(function(*inputs), call)
        for value, exact in zip(found, expected, strict=True):
            # The warp takes a flow of float32 beside an image of less: nothing is mixed that it had to promote.
            assert value.dtype == (kinds[0] if call.operator == "backward_warp" else torch.float32)
            assert_close("the result", value, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_float64_makes_all_float64(call, backend):
    """Except in convolutions, which leave it alone, as PyTorch's own do."""
    inputs = call.inputs()
    if call in PROMOTED:
        inputs = [value.float() if place else value for place, value in enumerate(inputs)]
    expected = leaves_of(call.on("reference")(*(value.double() for value in inputs)), call)
    for function in forms(call, backend):
        with torch.autocast("cpu", torch.bfloat16):
            found = leaves_of(function(*inputs), call)
        for value, exact in zip(found, expected, strict=True):
            assert value.dtype == torch.float64
            assert_close("the result", value, exact, slack=10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CONVOLUTIONS, ids=name_of)
def test_convolutions_compute_in_the_dtype_of_autocast(call, backend):
    inputs = mixed(call, torch.float32, torch.bfloat16)
    expected = call.on("reference")(*(value.double() for value in inputs))
    for function in forms(call, backend):
        with torch.autocast("cpu", torch.bfloat16):
            (found,) = leaves_of(function(*inputs), call)
        assert found.dtype == torch.bfloat16
        assert_close("the result", found, expected, slack=2)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("call", PROMOTED, ids=name_of)
def test_what_is_not_mixed_stays_as_it_is(call, kind):
    inputs = [value.to(kind) for value in call.inputs()]
    expected = pytree.tree_leaves(call.on("cpp")(*inputs))
    with torch.autocast("cpu", torch.bfloat16):
        found = pytree.tree_leaves(call.on("cpp")(*inputs))
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == exact.dtype
        assert torch.equal(value, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_gradients_have_the_dtype_of_their_inputs(call, backend):
    for function in forms(call, backend):
        inputs = mixed(call, torch.float32, torch.bfloat16)
        for value in inputs[: call.differentiable]:
            value.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            found = leaves_of(function(*inputs), call)
            sum(value.float().sum() for value in found).backward()
        exact = [value.detach().double().requires_grad_() for value in inputs]
        sum(value.sum() for value in leaves_of(call.on("reference")(*exact), call)).backward()
        for value, other in zip(inputs[: call.differentiable], exact, strict=False):
            assert value.grad.dtype == value.dtype
            # As precise as the coarsest dtype that is in it.
            assert_close("the gradient", value.grad.bfloat16(), other.grad, slack=2, terms=1)


@pytest.mark.parametrize("call", PROMOTED, ids=name_of)
def test_mixed_inputs_without_autocast_name_what_to_change(call):
    inputs = [value.float() for value in call.inputs()]
    inputs[1] = inputs[1].double()
    with pytest.raises(TypeError, match=f"{call.operator}: .* (must be torch.float32 like|float64 if and only if)"):
        call.on("cpp")(*inputs)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_compiled_under_autocast(call):
    inputs = mixed(call, torch.float32, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = pytree.tree_leaves(call.on("cpp")(*inputs))
        compiled = torch.compile(call.on("cpp"), fullgraph=True, backend="aot_eager")
        for value, exact in zip(pytree.tree_leaves(compiled(*inputs)), expected, strict=True):
            assert value.dtype == exact.dtype
            assert_close("the result", value, exact.double())


@pytest.mark.parametrize("namespace", ["safnet_ops", "safnet_ops_triton"])
@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_cuda(call, namespace):
    """Dtypes of what the registered operators return for fake tensors of a GPU; nothing is computed."""
    registered = getattr(getattr(torch.ops, namespace), call.operator)
    inputs = mixed(call, torch.float32, torch.float16)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    try:
        with FakeTensorMode():
            fake = [torch.empty(value.shape, dtype=value.dtype, device="cuda") for value in inputs]
            found = leaves_of(registered(*ARGUMENTS[call.name](*fake)), call)
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    expected = torch.float16 if call.operator == "group_conv_shuffle" else torch.float32
    assert all(value.dtype == expected and value.device.type == "cuda" for value in found)


def test_every_operator_has_a_rule():
    for namespace in ("safnet_ops", "safnet_ops_triton"):
        for name in OPERATORS:
            for key in ("AutocastCPU", "AutocastCUDA"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)
