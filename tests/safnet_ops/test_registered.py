"""The registered operators called as torch.ops, exported programs and compiled functions: gradients, opcheck, errors."""

import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from safnet_ops.operators import OPERATORS
from tests.support import transforms
from tests.support.operators import assert_close
from tests.support.transforms import ARGUMENTS, CALLS, name_of

cpp = torch.ops.safnet_ops


@pytest.fixture(autouse=True)
def no_compiled_functions():
    """Every test compiles the same lines for another operator, which torch.compile would give up at some time."""
    torch.compiler.reset()


def leaves_of(call):
    inputs = call.inputs()
    return [value.requires_grad_(place < call.differentiable) for place, value in enumerate(inputs)]


def results(found, call):
    """Of a registered operator, as of its function."""
    return found[0] if call.operator == "group_conv_shuffle" else found


def backward_arguments(call):
    """Of the registered backward operator, with a gradient asked of every input that can have one."""
    inputs, operator = ARGUMENTS[call.name](*call.inputs()), OPERATORS[call.operator]
    needs = sum(
        operator.bit(name)
        for name, value in zip(operator.differentiable, inputs, strict=False)
        if isinstance(value, torch.Tensor)
    )
    if call.operator == "census_loss":
        arguments = (torch.rand((), dtype=torch.float64), *inputs)
    elif call.operator == "group_conv_shuffle":
        input, weight, _, slopes, _, *geometry, _ = inputs
        out, preactivation = cpp.group_conv_shuffle(*inputs[:-1], slopes is not None)
        arguments = (torch.rand_like(out), preactivation, input, weight, slopes, *geometry, needs, False)
    else:
        arguments = (torch.rand_like(inputs[0]), *inputs, needs, False)
    return [
        value.detach().clone().requires_grad_() if isinstance(value, torch.Tensor) else value for value in arguments
    ]


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_gradients(call):
    leaves, expected = leaves_of(call), leaves_of(call)
    registered = getattr(cpp, call.operator)
    transforms.loss_of(lambda *inputs: results(registered(*ARGUMENTS[call.name](*inputs)), call))(*leaves).backward()
    transforms.loss_of(call.on("reference"))(*expected).backward()
    for leaf, exact in zip(leaves[: call.differentiable], expected, strict=False):
        assert_close("the gradient", leaf.grad, exact.grad, slack=10)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_opcheck_with_gradients(call):
    torch.library.opcheck(getattr(cpp, call.operator).default, ARGUMENTS[call.name](*leaves_of(call)))


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="PyTorch 2.11 fails to trace torch.func.vjp inside a backward")
@pytest.mark.parametrize("call", [call for call in CALLS if OPERATORS[call.operator].differentiable], ids=name_of)
def test_opcheck_of_backward_operators_with_gradients(call):
    torch.library.opcheck(getattr(cpp, f"{call.operator}_backward").default, backward_arguments(call))


@pytest.mark.parametrize("call", [call for call in CALLS if OPERATORS[call.operator].differentiable], ids=name_of)
def test_finite_differences_of_backward_operators(call):
    arguments = backward_arguments(call)
    backward = getattr(cpp, f"{call.operator}_backward")

    def needed(*tensors):
        values = iter(tensors)
        found = backward(*(next(values) if isinstance(value, torch.Tensor) else value for value in arguments))
        return tuple(value for value in found if value.numel()) if isinstance(found, tuple) else found

    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    if call.operator == "census_loss":
        tensors[-1].requires_grad_(False)  # the target
    assert torch.autograd.gradcheck(needed, tensors, check_forward_ad=True, fast_mode=True)


def test_gradient_of_the_preactivation():
    """An output of the registered convolution, too: not only what the backward operator reads."""
    call = next(call for call in CALLS if call.name == "convolution")
    leaves, exact = leaves_of(call), leaves_of(call)
    *arguments, _ = ARGUMENTS[call.name](*leaves)
    out, preactivation = cpp.group_conv_shuffle(*arguments, True)
    input, weight, bias, _slopes, residual = exact
    sums = F.conv2d(input, weight, bias, 2, 1, 1, 2) + residual
    assert_close("the preactivation", preactivation, sums.detach(), slack=10)
    (out.sum() + preactivation.square().sum()).backward()
    (call.on("reference")(*exact).sum() + sums.square().sum()).backward()
    for leaf, other in zip(leaves, exact, strict=True):
        assert_close("the gradient", leaf.grad, other.grad, slack=10)
    (gradient,) = torch.autograd.grad(cpp.group_conv_shuffle(*arguments, True)[1].square().sum(), leaves[2])
    assert_close("the gradient of the preactivation alone", gradient, 2 * sums.sum((0, 2, 3)), slack=10)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_no_gradient_is_recorded_where_none_is_asked_for(call):
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = getattr(cpp, call.operator)(*ARGUMENTS[call.name](*leaves_of(call)))
        found = found if isinstance(found, tuple) else (found,)
        assert not any(value.requires_grad for value in found)


class Module(torch.nn.Module):
    """An operator whose differentiable inputs are parameters."""

    def __init__(self, call):
        super().__init__()
        self.call, inputs = call, call.inputs()
        self.parts = torch.nn.ParameterList(inputs[: call.differentiable])
        self.rest = inputs[call.differentiable :]

    def forward(self, scale):
        inputs = [part * scale for part in self.parts] + self.rest
        return transforms.loss_of(self.call.on("cpp"))(*inputs)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_exported_programs_have_gradients(call, strict):
    module, scale = Module(call), torch.tensor(0.9, dtype=torch.float64)
    with torch.no_grad():
        module(scale)
    program = torch.export.export(module, (scale,), strict=strict)
    assert any(f"safnet_ops.{call.operator}." in str(node.target) for node in program.graph.nodes)
    exported = program.module()
    module(scale).backward()
    exported(scale).backward()
    for (name, part), (other, leaf) in zip(module.named_parameters(), exported.named_parameters(), strict=True):
        assert name == other
        assert_close(f"the gradient of {name}", leaf.grad, part.grad, slack=10)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_compiled_functions_have_gradients(call):
    leaves, expected = leaves_of(call), leaves_of(call)
    loss = transforms.loss_of(call.on("cpp"))
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves).backward()
    loss(*expected).backward()
    for leaf, exact in zip(leaves[: call.differentiable], expected, strict=False):
        assert_close("the gradient", leaf.grad, exact.grad, slack=10)


COMPILED = {
    "gradient": lambda function, *inputs: torch.func.grad(transforms.loss_of(function))(*inputs),
    "vmap": lambda function, *inputs: torch.func.vmap(function)(
        *(torch.stack([value, 0.9 * value]) for value in inputs)
    ),
    "jvp": lambda function, *inputs: torch.func.jvp(
        lambda first: function(first, *inputs[1:]), inputs[:1], (inputs[0].cos(),)
    ),
}


@pytest.mark.parametrize("call", CALLS, ids=name_of)
@pytest.mark.parametrize("transform", COMPILED)
def test_compiled_transforms(transform, call):
    def compiled(call, function):
        function = partial(COMPILED[transform], function)
        return torch.compile(function, fullgraph=True, backend="aot_eager")(*call.inputs())

    transforms.check(compiled, call, call.on("cpp"))


def test_gradient_of_a_compiled_gradient_is_refused():
    call = CALLS[0]
    leaves = leaves_of(call)
    out = torch.compile(transforms.loss_of(call.on("cpp")), fullgraph=True, backend="aot_eager")(*leaves)
    with pytest.raises(RuntimeError, match=r"does not currently support double backward|requires create_graph=False"):
        torch.autograd.grad(out, leaves, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_forward_mode_inside_a_compiled_function(call):
    """Its level is opened in the graph, where Python does not see it."""
    inputs, tangents = call.inputs(), call.inputs(1)

    def tangent(function, *inputs):
        with forward_ad.dual_level():
            out = function(forward_ad.make_dual(inputs[0], tangents[0]), *inputs[1:])
            return forward_ad.unpack_dual(pytree.tree_leaves(out)[0]).tangent

    compiled = torch.compile(partial(tangent, call.on("cpp")), fullgraph=True, backend="aot_eager")(*inputs)
    assert_close("the tangent", compiled, tangent(call.on("reference"), *inputs), slack=10)


@pytest.mark.parametrize("call", CALLS, ids=name_of)
def test_traced_programs_can_be_saved(call):
    """In grad mode, of parameters: a trace holds the registered operator, not the Python around it."""
    module, scale = Module(call), torch.tensor(0.9, dtype=torch.float64)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, (scale,)), file)
    file.seek(0)
    assert_close("the loaded program's result", torch.jit.load(file)(scale), module(scale), slack=10)


@pytest.mark.parametrize("call", [call for call in CALLS if call.operator != "upsample_fuse"], ids=name_of)
def test_compiled_autograd(call):
    """Of a graph that eager code recorded: its backward is traced. PyTorch cannot trace that of its own interpolate."""
    leaves, expected = leaves_of(call), leaves_of(call)
    loss = transforms.loss_of(call.on("cpp"))
    out = loss(*leaves)
    with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        out.backward()
    loss(*expected).backward()
    for leaf, exact in zip(leaves[: call.differentiable], expected, strict=False):
        assert_close("the gradient", leaf.grad, exact.grad, slack=10)
