"""A benchmark case: one operator at one size, whose implementations are compared forward, backward and both."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from torch import Tensor

import safnet_ops
from safnet_ops import backends

Direction = Literal["forward", "backward", "both"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward", "both")
STOCK = "stock"  # PyTorch's own operators, see baselines.py
GRADIENTS_BESIDE = 1e-3  # share of a gradient's values that may differ


class WrongResult(Exception):
    """An implementation does not compute what the reference does, so that its speed does not matter."""


@dataclass(frozen=True, eq=False)
class Case:
    """One operator at one size.

    Attributes:
        operator: its name; `safnet_ops.<operator>` is measured on every backend that runs on this machine's CPU.
        setting: size, and what else tells it from the operator's other cases.
        inputs: makes the tensors, seeded before each call.
        differentiated: positions of the inputs whose gradients a backward computes; empty for inference alone.
        stock: the same with PyTorch's own operators, or None where the reference is just that.
        options: keyword arguments of operator and reference.
        tolerance: largest error allowed beside the reference, relative to the largest value.
        multiply_adds: of the forward, where it is arithmetic that bounds it; every gradient of a convolution takes as many.
        targets: (must, aim) as ratios of the reference's time to the kernel's.
        reported: the directions that `python -m bench.report` shows.
    """

    operator: str
    setting: str
    inputs: Callable[[], list[Tensor]]
    differentiated: tuple[int, ...] = ()
    stock: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    tolerance: float = 1e-3
    multiply_adds: int = 0
    targets: Mapping[Direction, tuple[float, float]] = field(default_factory=dict)
    reported: tuple[Direction, ...] = DIRECTIONS

    def __str__(self) -> str:
        return f"{self.operator} {self.setting}"

    @property
    def directions(self) -> tuple[Direction, ...]:
        return DIRECTIONS if self.differentiated else ("forward",)

    @property
    def implementations(self) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
        """By name, each returning all results: the backends that run here, then the stock one."""
        operator = functools.partial(getattr(safnet_ops, self.operator), **self.options)
        found = {
            name: functools.partial(operator, backend=name)
            for name in ("cpp", "reference")
            if backends.serves(self.operator, name)
        }
        if self.stock is not None:
            found[STOCK] = functools.partial(self.stock, **self.options)
        return {name: _as_tuple(function) for name, function in found.items()}

    def make_inputs(self, gradients: bool) -> list[Tensor]:
        torch.manual_seed(0)
        inputs = [value.detach() for value in self.inputs()]
        if gradients:
            for position in self.differentiated:
                inputs[position].requires_grad_()
        return inputs


class Work:
    """One implementation of a case in one direction, on inputs of its own: what is timed, and whether it is right."""

    def __init__(self, case: Case, implementation: str, direction: Direction) -> None:
        self.case, self.name, self.direction = case, implementation, direction
        self.implementation = case.implementations[implementation]
        self.inputs = case.make_inputs(gradients=direction != "forward")
        self.leaves = [value for value in self.inputs if value.requires_grad]
        results = self._forward()
        self.result_bytes = sum(value.nbytes for value in results)
        torch.manual_seed(1)
        values = torch.randn(results[0].shape, dtype=results[0].dtype)
        # In the result's layout; the order of randn_like's numbers would follow it.
        self.grad = torch.empty_like(results[0]).copy_(values)

    def prepare(self) -> Callable[[], tuple[Tensor, ...]]:
        """The work to be timed: the inference, the backward of a forward that is done now, or both."""
        if self.direction == "forward":
            return self._forward
        if self.direction == "both":
            return self._both
        result = self.implementation(*self.inputs)[0]
        return lambda: torch.autograd.grad(result, self.leaves, self.grad)

    def prepare_for_memory(self) -> Callable[[], int]:
        """The same, returning the bytes of its results."""
        timed = self.prepare()
        kept: list[Tensor] = []  # results stay until memory is read

        def run() -> int:
            kept.extend(timed())
            return sum(value.nbytes for value in kept)

        return run

    def _forward(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.implementation(*self.inputs)

    def _both(self) -> tuple[Tensor, ...]:
        results = self.implementation(*self.inputs)
        gradients = torch.autograd.grad(results[0], self.leaves, self.grad) if self.leaves else ()
        return *results, *gradients

    def compulsory_bytes(self) -> int:
        """Every input read once, every result written once; a backward reads the result's gradient, too."""
        forward = sum(value.nbytes for value in self.inputs) + self.result_bytes
        backward = forward + sum(value.nbytes for value in self.leaves)
        return {"forward": forward, "backward": backward, "both": forward + backward}[self.direction]

    def multiply_adds(self) -> int:
        """A convolution's backward takes as many as its forward for the input's gradient, and again for the weights'."""
        forward = self.case.multiply_adds
        return {"forward": forward, "backward": 2 * forward, "both": 3 * forward}[self.direction]

    def check(self) -> None:
        """Compare results and gradients with the reference's.

        A sampling gradient jumps where a position crosses into the next cell, and grid_sample rounds positions differently: a
        few values of gradients may be off by any amount.

        Raises:
            WrongResult: they differ.
        """
        found = self._forward() if self.direction == "forward" else self._both()
        gradients = 0 if self.direction == "forward" else len(self.leaves)
        for position, (actual, exact) in enumerate(zip(found, _expected(self.case, self.direction), strict=True)):
            largest = exact.abs().max().clamp(min=1e-3)
            wrong = ~((actual.detach() - exact).abs() <= self.case.tolerance * largest)  # NaN is wrong, too
            share = wrong.double().mean().item()
            if share > (GRADIENTS_BESIDE if position >= len(found) - gradients else 0):
                raise WrongResult(
                    f"{self.case} {self.direction}, {self.name}: {share:.2%} of value {position} is off by more than"
                    f" {self.case.tolerance:g} of its largest: its speed does not matter"
                )


@functools.lru_cache(maxsize=2)
def _expected(case: Case, direction: Direction) -> tuple[Tensor, ...]:
    work = Work(case, "reference", direction)
    found = work._forward() if direction == "forward" else work._both()
    return tuple(value.detach() for value in found)


def _as_tuple(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        found = function(*inputs)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return call


def over(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Runs a test for each case in each direction on each implementation."""
    values = [
        (case, direction, implementation)
        for case in cases
        for direction in case.directions
        for implementation in case.implementations
    ]
    return pytest.mark.parametrize(("case", "direction", "implementation"), values, ids=str)
