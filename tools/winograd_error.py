"""Rounding errors of Winograd's methods F(m x m, 3x3) by their points: `python -m tools.winograd_error` writes a table.

All sums are float32's, in one order, without fused multiply-adds, of 80 channels of random numbers; weights are transformed in
float64. Errors are beside float64, as a share of the results' standard deviation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS, SQUARES, OUTPUTS = 80, 3000, 8
METHODS: dict[str, tuple[float, ...]] = {
    "F(2x2), 0, ±1": (0, 1, -1),
    "0, ±1, ±2": (0, 1, -1, 2, -2),
    "0, ±1/2, ±3/2": (0, 1 / 2, -1 / 2, 3 / 2, -3 / 2),
    "0, ±√2/2, ±√2": (0, 2**-0.5, -(2**-0.5), 2**0.5, -(2**0.5)),
    "0, ±5/8, ±3/2": (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2),
    "0, ±5/8, ±11/8": (0, 5 / 8, -5 / 8, 11 / 8, -11 / 8),
}


def matrices(points: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """A', G and B' of the points and infinity."""

    def product(of: Sequence[float]) -> list[float]:
        """Coefficients of the product of all (x - point), the constant first."""
        found = [1.0]
        for point in of:
            found = [a - point * b for a, b in zip([0.0, *found], [*found, 0.0], strict=True)]
        return found

    rows, outputs = [], len(points) - 1
    weights = []
    for place, point in enumerate(points):
        others = [*points[:place], *points[place + 1 :]]
        scale = 1.0
        for other in others:
            scale *= point - other
        rows.append([*product(others), 0.0])
        weights.append([point**power / scale for power in range(3)])
    rows.append(product(points))
    weights.append([0.0, 0.0, 1.0])
    back = [[*(point**power for point in points), float(power == outputs - 1)] for power in range(outputs)]
    return torch.tensor(back).double(), torch.tensor(weights).double(), torch.tensor(rows).double()


def transform(matrix: Tensor, values: Tensor) -> Tensor:
    """matrix @ values @ matrix', each sum in float32 from the first term to the last."""
    for _ in range(2):
        rows = []
        for row in matrix.float():
            terms = [factor * values[..., k, :] for k, factor in enumerate(row) if factor]
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            rows.append(total)
        values = torch.stack(rows, -2).transpose(-1, -2)
    return values


def by_winograd(points: Sequence[float], inputs: Tensor, weights: Tensor) -> Tensor:
    back, of_weights, of_inputs = matrices(points)
    factors = (of_weights @ weights.double() @ of_weights.T).float()
    values = transform(of_inputs, inputs)
    total = torch.zeros(SQUARES, OUTPUTS, *values.shape[2:])
    for channel in range(CHANNELS):
        total = total + values[:, None, channel] * factors[None, :, channel]
    return transform(back, total)


def by_definition(inputs: Tensor, weights: Tensor) -> Tensor:
    side = inputs.shape[2] - 2
    total = torch.zeros(SQUARES, OUTPUTS, side, side, dtype=inputs.dtype)
    for channel in range(CHANNELS):
        for y in range(3):
            for x in range(3):
                part = inputs[:, None, channel, y : y + side, x : x + side]
                total = total + part * weights[None, :, channel, y, x, None, None]
    return total


def main() -> None:
    torch.manual_seed(0)
    inputs, weights = torch.randn(SQUARES, CHANNELS, 6, 6), torch.randn(OUTPUTS, CHANNELS, 3, 3)
    exact = by_definition(inputs.double(), weights.double())
    print("| | root mean square | largest |\n|---|---|---|")

    def show(name: str, found: Tensor) -> None:
        side = found.shape[-1]
        error = (found - exact[..., :side, :side]) / exact.std()
        print(f"| {name} | {error.square().mean().sqrt():.1e} | {error.abs().max():.1e} |")

    show("by definition", by_definition(inputs, weights))
    for name, points in METHODS.items():
        side = len(points) + 1
        show(name, by_winograd(points, inputs[..., :side, :side], weights))


if __name__ == "__main__":
    main()
