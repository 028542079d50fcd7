"""Inputs of every operator, made here alone: tests, benchmarks, cost models and tools all import this (development only).

It stands at the top because each of those may import it and none of them another. All values come from torch's generator,
which the caller seeds.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

Size = tuple[int, int]  # height, width

FUSION = (
    *("short", "reference", "long", "flow_short", "flow_long", "mask_short", "mask_long"),
    "reference_ldr",
)


# Drawn in float64: a kernel that reads only part of a number then shows.
_rand = partial(torch.rand, dtype=torch.float64)
_randn = partial(torch.randn, dtype=torch.float64)


def off_grid(flow: Tensor, margin: float = 0.1) -> Tensor:
    """Move flows away from whole pixels, where the derivative jumps and finite differences or other dtypes see another cell."""
    fraction = flow - flow.floor()
    return flow.floor() + fraction.clamp(margin, 1 - margin)


def random_flow(n: int, size: Size, pixels: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Another flow at every pixel, of this standard deviation and off the grid."""
    return off_grid(_randn(n, 2, *size) * pixels).to(dtype)


def warp_inputs(
    size: Size,
    *,
    n: int = 1,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
    flow_dtype: torch.dtype | None = None,
    pixels: float = 4.0,
    flow: Tensor | None = None,
) -> list[Tensor]:
    """Image and flow of backward_warp; the flow is random, or the one given."""
    image = _randn(n, channels, *size).to(dtype)
    return [image, random_flow(n, size, pixels, flow_dtype or dtype) if flow is None else flow]


def fusion_inputs(
    size: Size,
    *,
    n: int = 1,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
    geometry: torch.dtype | None = None,
    low: Size | None = None,
    pixels: float = 4.0,
    flows: Sequence[Tensor] | None = None,
    logits: bool = False,
    weights: Sequence[int] = (),
    exposures: bool = False,
) -> list[Tensor]:
    """What fused_fuse takes, in the order of FUSION; with `low`, the size of flows and masks, what upsample_fuse takes.

    Args:
        geometry: dtype of flows and masks, that of the pictures unless given.
        pixels: how far random flows reach; `flows` gives both instead.
        logits: masks before the sigmoid, from -2 to 2 mostly.
        weights: channels of three explicit weights, which take the place of reference_ldr.
        exposures: the pictures are views, as a model has them, of tensors that hold linear values and then LDR values.
    """
    if exposures:
        brackets = [_rand(n, 2 * channels, *size).to(dtype) for _ in range(3)]
        pictures = [bracket[:, :channels] for bracket in brackets]
        base = [brackets[1][:, channels:]]
    else:
        pictures = [_rand(n, channels, *size).to(dtype) for _ in range(3)]
        # Explicit weights are divided by their sum: kept away from zero, where any error grows.
        base = [0.1 + _rand(n, count, *size) for count in weights] or [_rand(n, channels, *size)]
    geometry, low = geometry or dtype, low or size
    flows = flows or [random_flow(n, low, pixels, geometry) for _ in range(2)]
    masks = [(_randn if logits else _rand)(n, 1, *low).to(geometry) for _ in range(2)]
    return [*pictures, *flows, *masks, *(value.to(dtype) for value in base)]


def upsample_inputs(
    size: Size,
    low: Size | None = None,
    *,
    n: int = 1,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
    geometry: torch.dtype | None = None,
    pixels: float = 2.0,
    exposures: bool = False,
) -> list[Tensor]:
    """What upsample_fuse takes: pictures of one size, flows and logits of another, by default half as large."""
    low = low or (-(-size[0] // 2), -(-size[1] // 2))
    return fusion_inputs(
        size,
        n=n,
        channels=channels,
        dtype=dtype,
        geometry=geometry,
        low=low,
        pixels=pixels,
        logits=True,
        exposures=exposures,
    )


def conv_inputs(
    size: Size,
    channels: Size = (6, 9),
    groups: int = 1,
    *,
    n: int = 1,
    stride: int = 1,
    dtype: torch.dtype = torch.float32,
    exact: bool = False,
) -> list[Tensor]:
    """What group_conv_shuffle differentiates: input, weight, bias, prelu_weight, residual, for channels (in, out).

    `exact`: multiples of powers of two, few enough that sums round in no dtype and, with the bias, are never zero. A sum that
    rounding carried across the PReLU's kink would change gradients by the whole step of its slope.
    """

    def values(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape) / 8 if exact else _randn(shape)

    channels_in, channels_out = channels
    fan_in = 9 * channels_in // groups
    weight = values(channels_out, channels_in // groups, 3, 3) / (16 if exact else fan_in**0.5)
    bias = (2 * torch.randint(-8, 9, (channels_out,)) + 1) / 2048 if exact else _randn(channels_out)
    out = (n, channels_out, -(-size[0] // stride), -(-size[1] // stride))
    found = (values(n, channels_in, *size), weight, bias, _rand(channels_out), values(*out))
    return [value.to(dtype) for value in found]


def census_inputs(size: Size, *, n: int = 1, channels: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Prediction and target of census_loss."""
    return [_rand(n, channels, *size).to(dtype) for _ in range(2)]


MAKERS: dict[str, Callable[[Size], list[Tensor]]] = {
    "backward_warp": warp_inputs,
    "fused_fuse": fusion_inputs,
    "upsample_fuse": upsample_inputs,
    "group_conv_shuffle": conv_inputs,
    "census_loss": census_inputs,
}


def positional_inputs(operator: str, size: Size) -> list[Tensor]:
    """Tensors that `safnet_ops.<operator>` takes by position; a convolution's residual comes by name."""
    found = MAKERS[operator](size)
    return found[:4] if operator == "group_conv_shuffle" else found
