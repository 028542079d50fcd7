"""What the operators' autograd.Functions share: gradients of gradients, and the form in which gradients are returned."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def reference_gradients(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grads: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again (create_graph=True), by autograd through the reference."""
    wanted = [value for value, need in zip(inputs, needed, strict=True) if need and value is not None]
    found = iter(torch.autograd.grad(function(*inputs), wanted, grads, create_graph=True))
    return tuple(next(found) if need else None for need in needed)


def return_gradients(found: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """A backward operator returns a tensor of no elements where a gradient was not needed; autograd wants None there."""
    return tuple(grad if need else None for grad, need in zip(found, needed, strict=True))
