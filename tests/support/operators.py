"""What the operators' tests share: dtypes, layouts and sizes, the one table of tolerances, and the comparison with float64."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Largest error allowed beside the float64 reference, as a share of the largest value: a few units in the last place of the
# dtype that results are rounded to. Sums and coordinates are float32 for the three narrower types. A test that needs more says
# how many times as much, and why, as `slack`.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = list(TOLERANCE)

# (dtype of images, dtype of flows and masks)
KINDS = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
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


def expanded(x: Tensor) -> Tensor:
    """The first picture for the whole batch, at a stride of zero: other values, where a batch has several."""
    return x[:1].expand(x.shape)


def transposed(x: Tensor) -> Tensor:
    """Dense, but with rows innermost."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = [contiguous, channels_last, sliced, padded, expanded, transposed]


def assert_close(name: str, actual: Tensor | None, expected: Tensor, *, slack: float = 1.0, terms: float = 0.0) -> None:
    """Compare with a reference by the tolerance of the dtype that `actual` has.

    A missing tensor, a wrong shape, and NaN or infinity on one side only are failures too. `terms`: the size of what values
    are sums of, for drawn inputs so few that all their sums may cancel; errors are relative to it where it is larger.
    """
    assert actual is not None, f"{name} is missing"
    assert actual.shape == expected.shape, f"{name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    allowed = slack * TOLERANCE[actual.dtype]
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert torch.where(finite, actual.isfinite(), same).all(), f"{name} has NaN or infinity in other places"
    if not finite.any():
        return
    scale = max(expected[finite].abs().max().item(), terms, torch.finfo(torch.float64).tiny)
    error = (actual - expected)[finite].abs().max().item() / scale
    assert error <= allowed, f"{name} is off by {error:.2e} of its largest value, allowed {allowed:.1e}"


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """Result of `function(*inputs)`, and the gradients of the inputs marked in `needed`."""
    leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=True)]
    result = function(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(result, wanted, grad.to(result.dtype)) if wanted else ())
    return result.detach(), [next(found) if need else None for need in needed]


def check_operator(
    operator: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    *,
    slack: float = 1.0,
    terms: float = 0.0,
) -> Tensor:
    """Run operator and float64 reference forward and backward; compare the result and exactly the gradients needed."""
    exact = [x.double() for x in inputs]
    with torch.no_grad():
        shape = reference(*exact).shape
    # As the operator's dtype has it, or rounding the incoming gradient would count as the operator's error.
    grad = torch.randn(shape, dtype=torch.float64).to(inputs[0].dtype)
    result, found = gradients(operator, inputs, needed, grad)
    expected, wanted = gradients(reference, exact, needed, grad.double())
    assert_close("the result", result, expected, slack=slack, terms=terms)
    for position, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if other is not None:
            assert_close(f"gradient {position}", one, other, slack=slack, terms=terms)
            assert one is not None
            assert one.dtype == inputs[position].dtype
    return result
