"""Tensors at unusual places of memory, and one small call of every registered operator to try them on."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

HEIGHT, WIDTH = 10, 8  # rows 2^28 apart reach beyond 2^31; whole accesses of four pixels
FAR = 1 << 28


def at_odd_offset(value: Tensor) -> Tensor:
    """The same values and strides, one element after a multiple of every access size."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    moved = torch.empty(count + 1, dtype=value.dtype)[1:].as_strided(value.shape, value.stride())
    return moved.copy_(value)


def with_far_rows(value: Tensor) -> Tensor:
    """The same values in rows that lie 2^28 elements apart: gigabytes of addresses, of which few pages exist."""
    _, channels, height, width = value.shape
    storage = torch.UntypedStorage(height * FAR * value.element_size())
    strides = (channels * width, width, FAR, 1)
    return torch.empty(0, dtype=value.dtype).set_(storage, 0, value.shape, strides).copy_(value)


def calls(dtype: torch.dtype, channels_last: bool = False) -> Iterator[tuple[str, list[Any]]]:
    """(operator, arguments) for every registered operator that has kernels for sizes as small as these."""

    def image(channels: int = 8) -> Tensor:
        value = torch.rand(1, channels, HEIGHT, WIDTH, dtype=dtype)
        return value.contiguous(memory_format=torch.channels_last) if channels_last else value

    flows, masks = [2 * torch.randn_like(image(2)) for _ in range(2)], [image(1) for _ in range(2)]
    yield "backward_warp", [image(), flows[0]]
    yield "backward_warp_backward", [image(), image(), flows[0], 0b11, True]
    exposures, weights = [image() for _ in range(3)], [image() for _ in range(3)]
    for base in ([image(), None, None, None], [None, *weights]):
        fusion = [*exposures, *flows, *masks, *base, True]
        yield "fused_fuse", fusion
        yield "fused_fuse_backward", [image(), *fusion, 0b11111111111, True]
    yield "upsample_fuse", [*exposures, *flows, *masks, image()]
    convolution = [image(), torch.rand(8, 8, 3, 3, dtype=dtype), *(torch.rand(8, dtype=dtype) for _ in range(2))]
    yield "group_conv_shuffle", [*convolution, image(), 1, 1, 1, True]
    yield (
        "group_conv_shuffle_backward",
        [image(), image() - 0.5, *convolution[:2], convolution[3], 1, 1, 1, 0b11111, True],
    )
    scalar = torch.ones((), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    yield "census_loss", [image(), image(), 3, True]
    yield "census_loss_backward", [scalar, image(), image(), 3, True]


def check(
    call: Callable[..., Tensor | Sequence[Tensor]],
    move: Callable[[Tensor], Tensor],
    operator: str,
    arguments: list[Any],
) -> None:
    """The operator gives the same when any one of its pictures is moved."""

    def results(values: list[Any]) -> list[Tensor]:
        found = call(operator, *values)
        return [found] if isinstance(found, Tensor) else list(found)

    expected = results(arguments)
    for position, value in enumerate(arguments):
        if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[2] != HEIGHT:
            continue
        found = results([*arguments[:position], move(value), *arguments[position + 1 :]])
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(
                one,
                other,
                msg=partial("{}: argument {} moved, result {}: {}".format, operator, position, number),
            )
