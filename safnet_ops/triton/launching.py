"""How the Triton kernels are compiled, tuned and launched, and how large their tiles are.

A kernel is compiled once for each combination of dtypes and constexpr switches, never for a size: sizes and strides are
not specialised.
"""

import collections
import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from safnet_ops.checks import is_channels_last

# Offsets from here on are computed in 64 bits. 2^30, not 2^31: `_encode_strides` doubles strides.
WIDE_FROM = 1 << 30
FILL = 1024  # programs that keep a large GPU busy (about 8 for each multiprocessor)


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit without specialisation on argument values, so that a new image size or alignment compiles nothing."""
    parameters = inspect.signature(function).parameters.values()
    return triton.jit(function, do_not_specialize=[p.name for p in parameters if p.annotation is not tl.constexpr])


def autotune(kernel: Any, configs: Sequence[triton.Config], key: Sequence[str], sums: Sequence[str] = ()) -> Any:
    """The kernel, tuned among `configs` once for each combination of dtypes and values of `key`.

    Tuning runs a kernel many times. What it adds to, the arguments named in `sums`, is zeroed before each run and
    before the one that counts; Triton's own `reset_to_zero` does not allow for absent ones before 3.8.
    """

    def zero(given: dict[str, Any], reset_only: bool = False) -> None:
        for name in sums:
            if given[name] is not None:
                given[name].zero_()

    return triton.autotune(list(configs), list(key), pre_hook=zero if sums else None)(kernel)


def launch(operator: str, device: torch.device, kernel: Any, grid: Any, **values: Any) -> None:
    """Run `kernel` on `device`; `grid` is a tuple or a function of the constexprs, `values` are arguments by name.

    Raises:
        RuntimeError: Triton cannot launch on that device.
    """
    if device.type != "cuda" and not _launches_on(device):
        raise RuntimeError(f"{operator}: backend 'triton' runs CUDA tensors, got device {str(device)!r}")
    if isinstance(kernel, triton.runtime.Autotuner) and torch.are_deterministic_algorithms_enabled():
        # Tuning may choose otherwise when the program runs again, and another tile sums in another order.
        kernel, values = kernel.fn, values | kernel.configs[0].all_kwargs()
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Fusing a * b + c is what nvcc does too; Triton's own default is about to change.
        kernel[grid](**values, enable_fp_fusion=True)


def _launches_on(device: torch.device) -> bool:
    try:
        return triton.runtime.driver.active.get_active_torch_device().type == device.type
    except RuntimeError:  # "0 active drivers"
        return False


def arguments(**tensors: Tensor | None) -> dict[str, Any]:
    """Arguments of a kernel: the tensors by name, and `strides`, which has the strides of each by the same name.

    A pointer is an argument of its own: in one tuple with its strides it would be specialised on its alignment, which
    cannot be turned off in a tuple, and a slice of a picture would compile another kernel.
    """
    return {**tensors, "strides": _by_name(tuple(tensors))(*map(_encode_strides, tensors.values()))}


@functools.cache
def _by_name(names: tuple[str, ...]) -> Any:
    return collections.namedtuple("Strides", names)


def _encode_strides(tensor: Tensor | None) -> tuple[int, ...]:
    """Odd numbers of at least 3, which `tiles.stride` decodes, since Triton specialises 1 and multiples of 16 in tuples.

    Nothing reads the strides of a tensor that is absent.
    """
    if tensor is None:
        return (3, 3, 3, 3)
    return tuple(
        2 * (stride if size > 1 else 0) + 3 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def needs_wide(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of the tensors, or a count of pixels, asks for 64 bits."""
    return any(t is not None and _largest_offset(t) >= WIDE_FROM for t in tensors)


def _largest_offset(tensor: Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return max(reach, tensor.numel())


def accumulator(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def compute_type(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def size_class(pixels: int) -> int:
    """What autotuning distinguishes of a size: whether it leaves a large GPU mostly idle."""
    return int(pixels >= 1 << 17)


def channel_block(channels: int, channels_last: bool) -> int:
    """Channels in a tile. Four planes are enough loads in flight; dense channels come in blocks that waste at most
    an eighth."""
    if channels < 4 or not channels_last:
        return min(triton.next_power_of_2(channels), 4)
    return next(
        block for block in (32, 16, 8, 4) if block == 4 or 8 * triton.cdiv(channels, block) * block <= 9 * channels
    )


def channel_splits(tiles: int, channels: int, block: int) -> tuple[int, int]:
    """(programs that share the channels of a tile of pixels, blocks of channels for each): more where there are
    few tiles."""
    blocks = triton.cdiv(channels, block)
    each = triton.cdiv(blocks, min(blocks, triton.cdiv(FILL, max(tiles, 1))))
    return triton.cdiv(blocks, each), each


def vector_length(tensors: Sequence[Tensor]) -> int:
    """Elements of a 16-byte access along the channels of channels_last tensors; 1 where one of them does not allow
    it."""
    length = 16 // min(t.element_size() for t in tensors)
    for t in tensors:
        aligned = t.shape[1] % length == 0 and t.data_ptr() % 16 == 0
        if not (
            is_channels_last(t) and aligned and all(t.stride(d) % length == 0 for d in (0, 2, 3) if t.shape[d] > 1)
        ):
            return 1
    return length
