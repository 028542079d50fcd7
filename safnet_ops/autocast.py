"""Autocast: in which dtype the operators compute, called by name or as registered operators, as in exported programs.

A convolution computes in autocast's dtype, like PyTorch's own. The others, like grid_sample, take what they get and bring what
is mixed to the widest dtype of it. float64 is left alone.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from safnet_ops.backends import COMPILED, TRITON

Cast = Callable[[Sequence[Any]], tuple[Any, ...]]  # of an operator's arguments, whatever the caller has given


def is_autocast(argument: Any) -> bool:
    """Whether autocast is on for the device of an argument, if that is a tensor."""
    if not torch._C._is_any_autocast_enabled() or not isinstance(argument, Tensor):
        return False
    device = argument.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # meta has no autocast


def lower(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Tensors in autocast's dtype, except those of float64."""
    kind = torch.get_autocast_dtype(arguments[0].device.type)
    return tuple(
        value.to(kind) if _is_floating(value) and value.dtype != torch.float64 else value for value in arguments
    )


def promote(arguments: Sequence[Any], geometry: range = range(0)) -> tuple[Any, ...]:
    """Pictures in the widest dtype of them; flows and masks, at the places `geometry`, in the same or float32.

    One tensor of float64 makes all of them float64.
    """
    floating = [place for place, value in enumerate(arguments) if _is_floating(value)]
    kinds = {place: arguments[place].dtype for place in floating}
    kind = reduce(torch.promote_types, (kinds[place] for place in floating if place not in geometry))
    if torch.float64 in kinds.values():
        kind = torch.float64
    same = kind == torch.float64 or all(kinds[place] == kind for place in floating if place in geometry)
    found = list(arguments)
    for place in floating:
        found[place] = found[place].to(kind if same or place not in geometry else torch.float32)
    return tuple(found)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def register_autocast(name: str, cast: Cast) -> None:
    """Let the registered operators of a name cast their arguments, on the devices on which they have kernels."""
    for library in (COMPILED, TRITON):
        operator = getattr(getattr(torch.ops, library.ns), name).default

        def call(*arguments: Any, operator: Any = operator) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
                return operator(*cast(arguments))

        for device in ("CPU", "CUDA"):
            library.impl(name, call, f"Autocast{device}")


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)
