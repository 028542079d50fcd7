"""What the CUDA tests share: tolerances, layouts of test tensors, and the comparison with the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Largest error, as a share of the largest value; references are computed from the same inputs in float64.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = tuple(TOLERANCE)
LAYOUTS = ("contiguous", "sliced", "channels_last", "expanded", "permuted")


def arrange(value: Tensor, layout: str) -> Tensor:
    """The same values laid out otherwise: a slice of a larger tensor, channels_last, an expanded batch, transposed."""
    n, channels, height, width = value.shape
    if layout == "sliced":
        larger = torch.full((n, channels + 2, height, width + 3), float("nan"), dtype=value.dtype)
        larger[:, 1:-1, :, 1:-2] = value
        return larger[:, 1:-1, :, 1:-2]
    if layout == "channels_last":
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "expanded":
        return value[:1].expand(value.shape)
    if layout == "permuted":
        return value.transpose(2, 3).contiguous().transpose(2, 3)
    assert layout == "contiguous"
    return value


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str, slack: float = 1.0) -> None:
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    torch.testing.assert_close(actual.isnan(), expected.isnan(), msg=f"{name}: NaN in other places")
    scale = max(1e-30, expected.nan_to_num(0.0).abs().max().item()) if expected.numel() else 1.0
    error = (actual - expected).nan_to_num(0.0).abs().max().item() / scale if expected.numel() else 0.0
    assert error <= slack * TOLERANCE[dtype], f"{name}: relative error {error:.3g} in {dtype}"


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Result and gradients of `function(*inputs)` for the inputs marked in `needed`."""
    leaves = [value.detach().requires_grad_(need) for value, need in zip(inputs, needed, strict=True)]
    out = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype)))
    return out.detach(), [next(found) if need else None for need in needed]


def check_gradients(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    *,
    slack: float = 1.0,
) -> list[Tensor | None]:
    """Result and gradients of the kernels against the reference in float64; returns the kernels' gradients."""
    dtype = inputs[0].dtype
    expected_out = reference(*(value.double() for value in inputs))
    grad = torch.randn(expected_out.shape, dtype=torch.float64).to(dtype)
    out, found = gradients(function, inputs, needed, grad)
    assert_close(out, expected_out, dtype, "result", slack)
    _, expected = gradients(reference, [value.double() for value in inputs], needed, grad.double())
    for position, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == inputs[position].dtype
            assert_close(one, other, dtype, f"gradient of input {position}", slack)
    return found


def away_from_cell_borders(flow: Tensor) -> Tensor:
    """Flow whose targets are not near whole pixels, where rounding may choose the other cell, and slopes jump."""
    return flow.floor() + 0.1 + 0.8 * (flow - flow.floor())
