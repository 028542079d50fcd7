"""Pixels whose flow or mask is NaN: the result there is NaN, a constant, so nothing may receive a gradient from them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import safnet_ops
from operator_inputs import fusion_inputs, warp_inputs
from tests.support.operators import assert_close, gradients

SIZE = (4, 40)  # more than a warp or a vector of pixels in a row

Call = tuple[Tensor, list[Tensor | None]]


def _lose(values: Tensor, pixels: Sequence[tuple[int, int]], channel: int) -> None:
    for y, x in pixels:
        values[:, channel, y, x] = torch.nan


def _check(found: Call, inputs: list[Tensor], function: Callable[..., Tensor], grad: Tensor) -> None:
    """Against the reference, in float64, of inputs whose NaN are made good, and of no incoming gradient there."""
    lost = torch.stack([value.isnan().any(1, keepdim=True) for value in inputs if value.shape[1] < 3]).any(0)
    whole = [value.double().nan_to_num(0.25) for value in inputs]
    result, expected = gradients(function, whole, [True] * len(whole), grad.double().masked_fill(lost, 0))
    assert_close("the result", found[0], result.masked_fill(lost, torch.nan))
    for place, (one, other) in enumerate(zip(found[1], expected, strict=True)):
        assert other is not None
        assert_close(f"gradient {place}", one, other, slack=2)


def check_warp(
    backend: str, dtype: torch.dtype = torch.float32, channels: int = 3, channels_last: bool = False
) -> None:
    image, flow = warp_inputs(SIZE, n=2, channels=channels, dtype=dtype)
    if channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    _lose(flow, [(0, 0), (1, 5), (1, 6), (3, 39)], 0)
    _lose(flow, [(0, 0), (2, 31), (2, 32)], 1)
    grad = torch.randn(image.shape, dtype=torch.float64).to(dtype)
    grad[..., 0, 0] = torch.nan  # as of a loss that does not mask the pixel out
    found = gradients(lambda *x: safnet_ops.backward_warp(*x, backend=backend), [image, flow], [True, True], grad)
    _check(found, [image, flow], safnet_ops.reference.backward_warp, grad)


def check_fuse(backend: str, dtype: torch.dtype = torch.float32, logits: bool = False) -> None:
    inputs = fusion_inputs(SIZE, n=2, dtype=dtype, logits=logits)
    for place, channel, pixel in (
        (3, 0, (0, 0)),
        (3, 1, (1, 30)),
        (4, 0, (1, 31)),
        (4, 1, (3, 39)),
        (5, 0, (2, 7)),
        (6, 0, (2, 9)),
    ):
        _lose(inputs[place], [pixel], channel)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64).to(dtype)
    grad[..., 0, 0] = torch.nan
    needed = [True] * len(inputs)
    found = gradients(lambda *x: safnet_ops.fused_fuse(*x, mask_logits=logits, backend=backend), inputs, needed, grad)
    _check(found, inputs, lambda *x: safnet_ops.reference.fused_fuse(*x, mask_logits=logits), grad)
