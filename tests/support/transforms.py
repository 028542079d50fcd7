"""What torch.func and forward mode must give for every operator: small calls, and transforms of functions of their inputs.

A backend is right if a transform gives the same numbers as of the reference backend, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import safnet_ops
from operator_inputs import census_inputs, conv_inputs, fusion_inputs, upsample_inputs, warp_inputs
from tests.support.operators import assert_close

Function = Callable[..., Any]


@dataclass(frozen=True)
class Call:
    """An operator as a function of `differentiable` inputs and of others, which come last."""

    name: str
    operator: str
    function: Callable[..., Any]  # of a backend's name and the inputs
    make: Callable[..., list[Tensor]]  # the inputs, in a dtype
    differentiable: int

    def inputs(self, seed: int = 0) -> list[Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make(dtype=torch.float64)

    def on(self, backend: str | None) -> Function:
        return partial(self.function, backend)


def _fuse_by_weights(backend: str | None, *inputs: Tensor) -> Tensor:
    return safnet_ops.fused_fuse(*inputs[:7], weights=inputs[7:], mask_logits=True, backend=backend)  # type: ignore[arg-type]


def _convolve(backend: str | None, *inputs: Tensor) -> Tensor:
    input, weight, bias, slopes, residual = inputs
    return safnet_ops.group_conv_shuffle(input, weight, bias, slopes, 2, stride=2, residual=residual, backend=backend)


def _convolve_alone(backend: str | None, *inputs: Tensor) -> Tensor:
    input, weight = inputs
    return safnet_ops.group_conv_shuffle(input, weight, backend=backend)


def _census(backend: str | None, *inputs: Tensor) -> Tensor:
    prediction, target = inputs
    return safnet_ops.census_loss(prediction, target, 3, backend=backend)


SIZE = (2, 3)
SLACK = 100  # derivatives of second order, of functions with slopes of up to that
CALLS = [
    Call(
        "warp",
        "backward_warp",
        lambda b, *x: safnet_ops.backward_warp(*x, backend=b),
        partial(warp_inputs, SIZE, pixels=1),
        2,
    ),
    Call(
        "fuse by exposure",
        "fused_fuse",
        lambda b, *x: safnet_ops.fused_fuse(*x, backend=b),
        partial(fusion_inputs, SIZE, channels=2, pixels=1),
        8,
    ),
    Call(
        "fuse by weights",
        "fused_fuse",
        _fuse_by_weights,
        partial(fusion_inputs, SIZE, channels=2, pixels=1, logits=True, weights=(2, 1, 2)),
        10,
    ),
    Call(
        "upsample",
        "upsample_fuse",
        lambda b, *x: safnet_ops.upsample_fuse(*x, backend=b),
        partial(upsample_inputs, SIZE, (1, 2), channels=2, pixels=0.5),
        8,
    ),
    Call("convolution", "group_conv_shuffle", _convolve, partial(conv_inputs, SIZE, (2, 4), 2, stride=2), 5),
    Call(
        "convolution alone",
        "group_conv_shuffle",
        _convolve_alone,
        lambda dtype: conv_inputs((2, 2), (1, 2), n=2, dtype=dtype)[:2],
        2,
    ),
    Call(
        "census",
        "census_loss",
        _census,
        partial(census_inputs, (3, 4), n=2, channels=2),
        1,
    ),
]


# What a call's inputs become as arguments of the registered operator.
ARGUMENTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "warp": lambda image, flow: (image, flow),
    "fuse by exposure": lambda *inputs: (*inputs, None, None, None, False),
    "fuse by weights": lambda *inputs: (*inputs[:7], None, *(w.expand(inputs[0].shape) for w in inputs[7:]), True),
    "upsample": lambda *inputs: inputs,
    "convolution": lambda *inputs: (*inputs, 2, 2, 1, False),
    "convolution alone": lambda input, weight: (input, weight, None, None, None, 1, 1, 1, False),
    "census": lambda prediction, target: (prediction, target, 3, False),
}


def name_of(value: Any) -> str:
    """Of a call or a transform, for the names of tests."""
    return getattr(value, "name", None) or value.__name__


def loss_of(function: Function) -> Function:
    """A scalar whose derivatives with respect to the function's results all differ."""

    def loss(*inputs: Tensor) -> Tensor:
        leaves = pytree.tree_leaves(function(*inputs))
        return sum((leaf.sin() * (1 + torch.arange(leaf.numel()).view(leaf.shape))).sum() for leaf in leaves)

    return loss


def _all(call: Call) -> tuple[int, ...]:
    return tuple(range(call.differentiable))


def _fixed(call: Call, function: Function, inputs: list[Tensor]) -> tuple[Function, list[Tensor]]:
    """The function of the differentiable inputs alone, and these."""
    count = call.differentiable
    return (lambda *values: function(*values, *inputs[count:])), inputs[:count]


def jvp(call: Call, function: Function) -> Any:
    function, inputs = _fixed(call, function, call.inputs())
    return torch.func.jvp(function, tuple(inputs), tuple(call.inputs(1)[: len(inputs)]))


def jvp_of_each(call: Call, function: Function) -> Any:
    """Every differentiable input alone."""
    inputs, tangents = call.inputs(), call.inputs(1)

    def of(place: int) -> Any:
        return torch.func.jvp(
            lambda value: function(*inputs[:place], value, *inputs[place + 1 :]), (inputs[place],), (tangents[place],)
        )

    return [of(place) for place in _all(call)]


def dual_tensors(call: Call, function: Function) -> Any:
    """Forward mode without torch.func, each differentiable input alone and then all of them."""
    inputs, tangents = call.inputs(), call.inputs(1)
    found = []
    for chosen in (*((place,) for place in _all(call)), _all(call)):
        with forward_ad.dual_level():
            values = [
                forward_ad.make_dual(value, tangent) if place in chosen else value
                for place, (value, tangent) in enumerate(zip(inputs, tangents, strict=True))
            ]
            leaves = pytree.tree_leaves(function(*values))
            unpacked = [forward_ad.unpack_dual(leaf) for leaf in leaves]
            found.append([torch.zeros_like(p) if t is None else t.clone() for p, t in unpacked])
    return found


def jacfwd(call: Call, function: Function) -> Any:
    return torch.func.jacfwd(function, _all(call))(*call.inputs())


def jacrev(call: Call, function: Function) -> Any:
    return torch.func.jacrev(function, _all(call))(*call.inputs())


def gradient(call: Call, function: Function) -> Any:
    return torch.func.grad(loss_of(function), _all(call))(*call.inputs())


def gradient_of_gradient(call: Call, function: Function) -> Any:
    first = torch.func.grad(loss_of(function), _all(call))
    return torch.func.grad(loss_of(first), _all(call))(*call.inputs())


def forward_over_reverse(call: Call, function: Function) -> Any:
    function, inputs = _fixed(call, torch.func.grad(loss_of(function), _all(call)), call.inputs())
    return torch.func.jvp(function, tuple(inputs), tuple(call.inputs(1)[: len(inputs)]))


def reverse_over_forward(call: Call, function: Function) -> Any:
    tangents = call.inputs(1)[: call.differentiable]

    def tangent(*inputs: Tensor) -> Any:
        fixed, values = _fixed(call, function, list(inputs))
        return torch.func.jvp(fixed, tuple(values), tuple(tangents))[1]

    return torch.func.grad(loss_of(tangent), _all(call))(*call.inputs())


def hessian_of_last(call: Call, function: Function) -> Any:
    return torch.func.hessian(loss_of(function), call.differentiable - 1)(*call.inputs())


def double_backward(call: Call, function: Function) -> Any:
    """As gradient penalties have it: torch.autograd with create_graph."""
    inputs = call.inputs()
    leaves = [value.requires_grad_() for value in inputs[: call.differentiable]]
    first = torch.autograd.grad(loss_of(function)(*inputs), leaves, create_graph=True)
    return first, torch.autograd.grad(loss_of(lambda: first)(), leaves)


def _batches(call: Call) -> list[Tensor]:
    return [torch.stack(values) for values in zip(*(call.inputs(seed) for seed in range(3)), strict=True)]


def vmap(call: Call, function: Function) -> Any:
    return torch.func.vmap(function)(*_batches(call))


def vmap_of_each(call: Call, function: Function) -> Any:
    """One input has a batch, in its last dimension, the others have none."""
    inputs, batches = call.inputs(), _batches(call)
    found = []
    for place, batch in enumerate(batches):
        dims = tuple(-1 if place == other else None for other in range(len(inputs)))
        values = [*inputs[:place], batch.movedim(0, -1), *inputs[place + 1 :]]
        found.append(torch.func.vmap(function, dims)(*values))
    return found


def vmap_of_vmap(call: Call, function: Function) -> Any:
    return torch.func.vmap(torch.func.vmap(function))(*(torch.stack([b, b.flip(0)]) for b in _batches(call)))


def vmap_of_gradient(call: Call, function: Function) -> Any:
    """Gradients of every sample."""
    return torch.func.vmap(torch.func.grad(loss_of(function), _all(call)))(*_batches(call))


def vmap_of_gradient_of_each(call: Call, function: Function) -> Any:
    """Of every sample, with respect to inputs that the samples share."""
    batches = [call.inputs()[0], *_batches(call)[1:]]
    dims = (None, *(0 for _ in batches[1:]))
    return [
        torch.func.vmap(torch.func.grad(loss_of(function), place), dims)(*batches)
        for place in range(call.differentiable)
    ]


def gradient_of_vmap(call: Call, function: Function) -> Any:
    return torch.func.grad(loss_of(torch.func.vmap(function)), _all(call))(*_batches(call))


def vmap_of_jvp(call: Call, function: Function) -> Any:
    def tangents(inputs: list[Tensor], directions: list[Tensor]) -> Any:
        fixed, values = _fixed(call, function, inputs)
        return torch.func.jvp(fixed, tuple(values), tuple(directions[: len(values)]))

    return torch.func.vmap(tangents)(_batches(call), [batch.flip(0) for batch in _batches(call)])


def jvp_of_vmap(call: Call, function: Function) -> Any:
    batches = _batches(call)
    fixed, values = _fixed(call, torch.func.vmap(function), batches)
    return torch.func.jvp(fixed, tuple(values), tuple(batch.flip(0) for batch in values))


def autograd_around_vmap(call: Call, function: Function) -> Any:
    batches = _batches(call)
    leaves = [value.requires_grad_() for value in batches[: call.differentiable]]
    return torch.autograd.grad(loss_of(torch.func.vmap(function))(*batches), leaves)


def functionalize(call: Call, function: Function) -> Any:
    return torch.func.functionalize(function)(*call.inputs())


def gradient_of_functionalize(call: Call, function: Function) -> Any:
    return torch.func.grad(loss_of(torch.func.functionalize(function)), _all(call))(*call.inputs())


TRANSFORMS = [
    jvp,
    jvp_of_each,
    dual_tensors,
    jacfwd,
    jacrev,
    gradient,
    gradient_of_gradient,
    forward_over_reverse,
    reverse_over_forward,
    hessian_of_last,
    double_backward,
    vmap,
    vmap_of_each,
    vmap_of_vmap,
    vmap_of_gradient,
    vmap_of_gradient_of_each,
    gradient_of_vmap,
    vmap_of_jvp,
    jvp_of_vmap,
    autograd_around_vmap,
    functionalize,
    gradient_of_functionalize,
]


def check(transform: Callable[[Call, Function], Any], call: Call, function: Function) -> None:
    """The transform of `function`, which runs some backend, against that of the reference backend."""
    found = pytree.tree_leaves(transform(call, function))
    expected = pytree.tree_leaves(transform(call, call.on("reference")))
    assert any(value.any() for value in expected), "a transform that gives zeros finds no fault"
    assert len(found) == len(expected)
    for value, exact in zip(found, expected, strict=True):
        assert_close(name_of(transform), value, exact, slack=SLACK, terms=1.0)
