"""Memory that results hand on to each other, instead of each getting fresh memory."""

import importlib
from types import TracebackType
from typing import Any

import torch

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
