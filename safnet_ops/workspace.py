"""Memory that results hand on to each other, instead of each getting fresh memory."""

import importlib
import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from safnet_ops import backends


class Workspace:
    """Memory for what the C++ kernels compute in a block: that of results that are no longer used.

    Results of a megabyte and more otherwise lie in fresh memory, which the system clears page by page as it is first written. A
    call of SAFNet has a workspace of its own. One that lives longer saves more (`python -m bench.report --only models`):

        memory = safnet_ops.Workspace()
        for exposures in pictures:
            with memory:
                fused, refined = model(*exposures)

    It keeps memory until it is gone, but never more than results needed at one time; a result that lives on keeps its own. Of
    nested blocks the outermost one counts. A block is the thread's that enters it; several threads may use one workspace. Where
    nothing was compiled, under torch.compile and on other devices it does nothing. Tensors in such memory are like others,
    but `Tensor.resize_` cannot make them larger.
    """

    def __init__(self) -> None:
        usable = not torch.compiler.is_compiling() and backends.serves("group_conv_shuffle", "cpp")
        self._module: Any = importlib.import_module("safnet_ops._C") if usable else None
        self._memory = None if self._module is None else self._module.Workspace()

    def __enter__(self) -> "Workspace":
        if self._memory is not None:
            self._memory.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._module is not None:
            self._module.leave_workspace()

    @property
    def bytes(self) -> int:
        """Of the memory that it has: of results that live, and of those that are gone."""
        return 0 if self._memory is None else self._memory.bytes()


def concatenate(
    parts: Sequence[Tensor], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """The channels of pictures (N, C_k, H, W) of one device, in a dtype and layout: torch.cat(parts, 1).

    In the memory of the calling thread's workspace, where it has one and nothing but the values is asked for.
    """
    if not _are_plain(parts):
        return torch.cat([part.to(dtype) for part in parts], 1).contiguous(memory_format=memory_format)
    n, _, height, width = parts[0].shape
    out = _empty((n, sum(part.shape[1] for part in parts), height, width), dtype, memory_format)
    if memory_format == torch.contiguous_format:
        return torch.cat([part.to(dtype) for part in parts], 1, out=out)
    for part, place in zip(parts, out.split([part.shape[1] for part in parts], 1), strict=True):
        place.copy_(part)
    return out


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these are values on the CPU, which no derivative, transformation or compiler follows."""
    return (
        not torch.compiler.is_compiling()
        and all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


def _empty(size: tuple[int, int, int, int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """Uninitialised, in the memory of the calling thread's workspace if it has one."""
    numbers = math.prod(size)
    memory = _take_memory(numbers * dtype.itemsize)
    if memory is None:
        return torch.empty(size, dtype=dtype, memory_format=memory_format)
    n, channels, height, width = size
    out = torch.frombuffer(memory, dtype=dtype, count=numbers)
    if memory_format == torch.channels_last:
        return out.view(n, height, width, channels).permute(0, 3, 1, 2)
    return out.view(size)


def _take_memory(count: int) -> Any:
    if not backends.serves("group_conv_shuffle", "cpp"):
        return None
    return importlib.import_module("safnet_ops._C").take_memory(count)
