"""The operators' derivatives: one autograd.Function behind every registered operator, forward and backward.

Whoever calls a registered operator gets there: by the dispatcher's Autograd key where a derivative is asked for, by functorch's
where torch.func transforms the call. The Function runs the kernel. Its derivative in reverse mode is the backward operator;
derivatives in forward mode, and those of the backward operators, come from the operator's definition in PyTorch. A batch of
vmap is folded into N where the operator allows, else it is a loop.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import FunctionalizeInterpreter, retrieve_current_functorch_interpreter
from torch._subclasses.functional_tensor import FunctorchFunctionalizeAPI
from torch.autograd import forward_ad

from safnet_ops.backends import COMPILED, TRITON
from safnet_ops.operators import OPERATORS, Operator, is_needed, needed_bits

Result = Tensor | tuple[Tensor, ...]
Operation = Callable[..., Any]  # returns a Result
Find = Callable[[str], Operation]  # from the name of a registered operator


class Rule(torch.autograd.Function):
    """How a registered operator is differentiated: by its definition, and batched by folding, unless a subclass says otherwise.

    `bind` makes a subclass for each backend and fills in the class attributes.
    """

    definition: ClassVar[Operation]  # the operator in PyTorch; its arguments are tensors first, then options
    name: ClassVar[str]
    tensors: ClassVar[int]  # how many of the arguments are tensors
    parameters: ClassVar[tuple[int, ...]] = ()  # the places of those whose first dimension is not N
    kernel: ClassVar[Operation]  # for tensors that nothing wraps
    operators: ClassVar[Find]  # those of this backend, which can be differentiated

    @classmethod
    def call(cls, *arguments: Any) -> Result:
        """The operator, through `apply` only where autograd or functorch has to know."""
        if torch._C._are_functorch_transforms_active():
            interpreter = retrieve_current_functorch_interpreter()
            if isinstance(interpreter, FunctionalizeInterpreter):  # for which autograd.Functions have no rule
                return cls.functionalize(FunctorchFunctionalizeAPI(interpreter), arguments)
            return cls.derive(cls.apply, *arguments)
        if (torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)) or _has_tangents(arguments):
            # Past Function.apply, which inspects the signature for three times the cost of the whole call.
            return cls.derive(super(torch.autograd.Function, cls).apply, *arguments)  # type: ignore[misc]
        with torch._C._AutoDispatchBelowAutograd():
            return cls.kernel(*arguments)

    @classmethod
    def derive(cls, apply: Operation, *arguments: Any) -> Result:
        return apply(*arguments)

    @classmethod
    def functionalize(cls, api: FunctorchFunctionalizeAPI, arguments: Sequence[Any]) -> Result:
        """No operator writes to its arguments, so there is nothing to replace."""
        inner = api.unwrap_tensors(tuple(arguments))
        with api.redispatch_to_next():
            return api.wrap_tensors(cls.operators(cls.name)(*inner))

    @classmethod
    def forward(cls, *arguments: Any) -> Result:
        with torch._C._AutoDispatchBelowAutograd():
            return cls.kernel(*arguments)

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
        ctx.save_for_backward(*inputs[: cls.tensors])
        ctx.save_for_forward(*inputs[: cls.tensors])
        ctx.options = inputs[cls.tensors :]
        # For backward, which has to be a plain function where compiled autograd traces it.
        ctx.rule, ctx.operator = cls, cls.name  # not `name`, which is a method of the graph's node

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return pull_back(ctx.rule.definition, (*ctx.saved_tensors, *ctx.options), ctx.needs_input_grad, grads)

    @classmethod
    def jvp(cls, ctx: Any, *_tangents: Tensor | None) -> Result:
        with forward_ad._set_fwd_grad_enabled(True):  # the saved inputs carry the tangents
            return _each(_tangent, cls.definition(*ctx.saved_tensors, *ctx.options))

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Result, Any]:
        operator, size = cls.operators(cls.name), info.batch_size
        if not cls.folds([dim is not None for dim in in_dims], arguments):
            found = [operator(*_select(arguments, in_dims, index)) for index in range(size)]
            return (torch.stack(found), 0) if isinstance(found[0], Tensor) else (_stack(found), (0,) * len(found[0]))
        folded = [
            _fold(value, dim, size) if isinstance(value, Tensor) and place not in cls.parameters else value
            for place, (value, dim) in enumerate(zip(arguments, in_dims, strict=True))
        ]
        out = operator(*folded)
        return _each(lambda value: _unfold(value, size), out), _each(lambda value: 0 if value.dim() > 1 else None, out)

    @classmethod
    def folds(cls, batched: Sequence[bool], arguments: Sequence[Any]) -> bool:
        """Whether the operator may see a batch as so many more pictures; `batched` marks the arguments that have one."""
        return not any(batched[place] for place in cls.parameters)


class Forward(Rule):
    """An operator whose gradients, of all tensors, come from NAME_backward(grad, *arguments, needs, deterministic)."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[: len(inputs)]
        deterministic = torch.are_deterministic_algorithms_enabled()
        arguments = (*inputs, *ctx.options, needed_bits(needed), deterministic)
        found = ctx.rule.operators(f"{ctx.operator}_backward")(*grads, *arguments)
        return *return_gradients(found, needed), *(None for _ in ctx.options)


def _has_tangents(arguments: Sequence[Any]) -> bool:
    """Whether forward mode may be on. Graphs that torch.compile traces open a level of it without telling forward_ad."""
    return forward_ad._current_level >= 0 or (
        torch._C._len_torch_dispatch_stack() > 0
        and any(
            forward_ad.unpack_dual(value, level=0).tangent is not None
            for value in arguments
            if isinstance(value, Tensor)
        )
    )


def return_gradients(found: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """A backward operator returns a tensor of no elements where a gradient is not needed; autograd wants None there."""
    return tuple(grad if need else None for grad, need in zip(found, needed, strict=True))


def pull_back(
    definition: Operation, arguments: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Gradients of a function of `arguments` where `needed`, else None; they can be differentiated again in any mode."""
    places = [place for place, need in enumerate(needed) if need]

    def function(*values: Tensor) -> Result:
        filled = list(arguments)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        return definition(*filled)

    found: dict[int, Tensor] = {}
    if places:
        out, transposed = torch.func.vjp(function, *(arguments[place] for place in places))  # type: ignore[misc]
        found = dict(zip(places, transposed(tuple(grads) if isinstance(out, tuple) else grads[0]), strict=True))
    return tuple(found.get(place) for place in range(len(arguments)))


def gradient_definition(definition: Operation, operator: Operator) -> Operation:
    """NAME_backward in PyTorch, made of NAME's definition."""

    def backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *inputs, needs, _deterministic = arguments
        count = len(operator.differentiable)
        needed = [inputs[place] is not None and is_needed(needs, place) for place in range(count)]
        found = pull_back(definition, inputs, needed, (grad,))[:count]
        return tuple(grad.new_empty(0) if value is None else value for value in found)

    return backward


def _each(function: Callable[[Tensor], Any], out: Result) -> Any:
    return tuple(function(value) for value in out) if isinstance(out, tuple) else function(out)


def _tangent(value: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(value, level=0).tangent
    return torch.zeros_like(value) if tangent is None else tangent


def _select(arguments: Sequence[Any], dims: Sequence[int | None], index: int) -> list[Any]:
    return [value if dim is None else value.select(dim, index) for value, dim in zip(arguments, dims, strict=True)]


def _stack(found: Sequence[Any]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(values) for values in zip(*found, strict=True))


def _fold(value: Tensor, dim: int | None, size: int) -> Tensor:
    return (value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)).flatten(0, 1)


def _unfold(value: Tensor, size: int) -> Tensor:
    """The batch apart from N again; what was not asked for has one dimension and no elements."""
    return value.unflatten(0, (size, len(value) // size)) if value.dim() > 1 else value


_rules: dict[str, type[Rule]] = {}  # of every registered operator, without kernels
_bound: dict[tuple[str, str], type[Rule]] = {}  # (namespace, registered operator) -> its rule with its kernel


def differentiate(
    name: str,
    rule: type[Rule],
    definition: Operation,
    backward_rule: type[Rule] = Rule,
    backward_definition: Operation | None = None,
) -> None:
    """Say how an operator and its backward operator are differentiated, and register that for the kernels of all backends."""
    operator = OPERATORS[name]
    rules = (rule, definition), (backward_rule, backward_definition or gradient_definition(definition, operator))
    for registered, (parent, meaning) in zip(operator.registered, rules, strict=False):
        tensors = sum("Tensor" in str(value.type) for value in _overload(COMPILED, registered)._schema.arguments)
        members = {"name": registered, "definition": staticmethod(meaning), "tensors": tensors}
        _rules[registered] = type(registered.title().replace("_", ""), (parent,), members)
        for library, find in ((COMPILED, _compiled), (TRITON, _triton)):
            _bound[library.ns, registered] = bound = bind(registered, _overload(library, registered), find)
            library.impl(registered, bound.call, "Autograd")
            library.impl(registered, bound.call, "FuncTorchDynamicLayerFrontMode")


def bind(name: str, kernel: Operation, operators: Find) -> type[Rule]:
    """The rule of an operator that `kernel` runs and whose relatives are found by `operators`."""
    rule = _rules[name]
    return type(rule.__name__, (rule,), {"kernel": staticmethod(kernel), "operators": staticmethod(operators)})


def kernel(backend: str, name: str) -> Operation:
    """The registered operator `name` (an operator or its `_backward`) of a backend other than the reference."""
    return (_triton if backend == "triton" else _compiled)(name)


def _finder(library: torch.library.Library) -> Find:
    def find(name: str) -> Operation:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return _overload(library, name)  # what graphs are made of
        return _bound[library.ns, name].call  # where the overload leads to, without the dispatcher's way there

    return find


_compiled, _triton = _finder(COMPILED), _finder(TRITON)


def _overload(library: torch.library.Library, name: str) -> Any:
    return getattr(getattr(torch.ops, library.ns), name).default
