"""Memory that results hand on to each other, instead of each getting fresh memory."""

import contextlib
import importlib
from collections.abc import Iterator

import torch

from safnet_ops import backends


@contextlib.contextmanager
def workspace() -> Iterator[None]:
    """Let what the C++ kernels compute in this block lie in the memory of results that are no longer used.

    Results of a megabyte and more otherwise lie in fresh memory, which the system clears page by page as it is first written: a
    tenth of the time of SAFNet's forward, which is such a block by itself. A block around a loop over pictures of one size
    saves more. The memory is never more than results needed at one time. It goes back to the system when the block ends, that
    of a result that lives on with that result.

    It holds for the thread that enters the block; of nested blocks the outermost one counts. Where nothing was compiled, under
    torch.compile and on other devices it does nothing. Tensors in such memory are like others, but `Tensor.resize_` cannot make
    them larger.
    """
    opened = None
    if not torch.compiler.is_compiling() and backends.serves("group_conv_shuffle", "cpp"):
        opened = importlib.import_module("safnet_ops._C").open_workspace()
    try:
        yield
    finally:
        if opened is not None:
            opened.close()
