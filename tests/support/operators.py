"""What the operators' tests share: the matrix of dtypes and layouts, the one table of tolerances, and checked comparisons."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Largest error allowed against the float64 reference, relative to the largest value of the expected tensor: a few units in the
# last place of the dtype that results are rounded to. Sums and coordinates are float32 for the three narrower types.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

# (dtype of images, dtype of flows and masks)
KINDS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SIZES = [(1, 1), (1, 9), (7, 1), (5, 7), (33, 65), (19, 130)]


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def sliced(x: Tensor) -> Tensor:
    """Every second picture and the middle channels of a larger tensor, as callers slice x[:, 0:3]."""
    n, c, h, w = x.shape
    larger = torch.full((2 * n, c + 3, h, w), torch.nan, dtype=x.dtype)
    larger[::2, 1 : c + 1] = x
    return larger[::2, 1 : c + 1]


def padded(x: Tensor) -> Tensor:
    """A window of a larger picture: rows are not adjacent."""
    n, c, h, w = x.shape
    larger = torch.full((n, c, h + 2, w + 5), torch.nan, dtype=x.dtype)
    larger[:, :, 1 : h + 1, 3 : w + 3] = x
    return larger[:, :, 1 : h + 1, 3 : w + 3]


def transposed(x: Tensor) -> Tensor:
    """Dense, but with rows innermost."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = [contiguous, channels_last, sliced, padded, transposed]


def assert_close(name: str, actual: Tensor | None, expected: Tensor, tolerance: float) -> None:
    """Compare with a float64 reference; a missing tensor, a wrong shape, and NaN on one side only are failures too."""
    assert actual is not None, f"{name} is missing"
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual = actual.detach().double()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{name} has NaN in other places"
    if expected.numel() == 0:
        return
    scale = max(expected.nan_to_num().abs().max().item(), 1.0)
    error = (actual - expected).nan_to_num().abs().max().item() / scale
    assert error <= tolerance, f"{name} is off by {error:.2e} of its largest value, allowed {tolerance:.1e}"


def check_operator(
    operator: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    tolerance: float,
) -> Tensor:
    """Run operator and float64 reference forward and backward; compare the result and exactly the gradients needed."""
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    exact = [x.detach().double().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    result, expected = operator(*leaves), reference(*exact)
    assert_close("the result", result, expected.detach(), tolerance)
    if any(needed):
        grad = torch.randn(expected.shape, dtype=torch.float64).to(result.dtype)
        result.backward(grad)
        expected.backward(grad.double())
        for position, (leaf, exact_leaf, need) in enumerate(zip(leaves, exact, needed, strict=True)):
            if need:
                assert exact_leaf.grad is not None
                assert_close(f"gradient {position}", leaf.grad, exact_leaf.grad, tolerance)
            else:
                assert leaf.grad is None, f"gradient {position} was not asked for"
    return result.detach()


def off_grid(flow: Tensor, margin: float = 0.1) -> Tensor:
    """Move flows away from whole pixels, where the derivative jumps and finite differences or other dtypes see another cell."""
    fraction = flow - flow.floor()
    return flow.floor() + fraction.clamp(margin, 1 - margin)
