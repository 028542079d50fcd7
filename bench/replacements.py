"""One call of ours beside the code it replaces in projects of optical flow, forward and with gradients.

`python -m bench.replacements` checks and times all of them by turns and prints a table; `pytest bench/test_codebases.py` puts
them side by side one by one. docs/operators/recipes.md and docs/operators/census_loss.md have the calls.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import safnet_ops
from bench import codebases
from bench.case import GRADIENTS_BESIDE
from bench.inputs import smooth_flow
from bench.measure import in_turns, machine, set_threads
from operator_inputs import census_inputs, warp_inputs

HEIGHT, WIDTH = 256, 448  # Vimeo-90K's


def warp_pair(channels: int, scale: int = 1) -> list[Tensor]:
    size = HEIGHT // scale, WIDTH // scale
    return warp_inputs(size, channels=channels, flow=smooth_flow(*size, pixels=20 / scale))


def pictures() -> list[Tensor]:
    return census_inputs((HEIGHT, WIDTH))


def pictures_and_visible() -> list[Tensor]:
    return [*pictures(), (torch.rand(1, 1, HEIGHT, WIDTH) > 0.2).float()]


def masked(image: Tensor, flow: Tensor) -> Tensor:
    out, valid = safnet_ops.backward_warp(image, flow, padding="zeros", return_valid=True)
    return out * valid


def census_of_visible(first: Tensor, second: Tensor, visible: Tensor) -> Tensor:
    return (
        safnet_ops.census_loss(255 * first, 255 * second, 3, reduction="sum", grey="rec601", mask=visible)
        / visible.sum()
    )


@dataclass(frozen=True)
class Replacement:
    """`tolerance`: the largest difference of results and gradients, as a share of the largest value."""

    operator: str
    kind: str
    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    inputs: Callable[[], list[Tensor]]
    tolerance: float
    differentiated: int = 2

    def __str__(self) -> str:
        return f"{self.operator}, {self.kind}"


# A grid over the whole picture rounds positions by 1e-4 of a pixel, which random pictures turn into as much of their values.
REPLACEMENTS = [
    Replacement(
        "backward_warp",
        "of RIFE's and IFRNet's kind, pictures",
        safnet_ops.backward_warp,
        codebases.interpolation_warp,
        lambda: warp_pair(3),
        1e-3,
    ),
    Replacement(
        "backward_warp",
        "of IFRNet's kind, 32 features at half size",
        safnet_ops.backward_warp,
        codebases.interpolation_warp,
        lambda: warp_pair(32, 2),
        1e-3,
    ),
    Replacement(
        "backward_warp",
        "of PWC-Net's kind, masked, 32 features at a quarter",
        masked,
        codebases.masked_warp,
        lambda: warp_pair(32, 4),
        1e-3,
    ),
    Replacement("census_loss", "of IFRNet's Ternary", safnet_ops.census_loss, codebases.ternary_loss, pictures, 1e-4),
    Replacement(
        "census_loss",
        "of RIFE's Ternary, distances of pixels",
        lambda first, second: safnet_ops.census_loss(first, second, reduction="none", grey="rec601", border=1),
        codebases.ternary_map,
        pictures,
        1e-4,
    ),
    Replacement(
        "census_loss",
        "of UnFlow's and ARFlow's kind, with occlusion",
        census_of_visible,
        codebases.occlusion_census,
        pictures_and_visible,
        1e-3,
    ),
]


def run(function: Callable[..., Tensor], inputs: list[Tensor], leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    if not leaves:
        with torch.no_grad():
            return [function(*inputs)]
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def check(case: Replacement, found: list[Tensor], expected: list[Tensor]) -> None:
    """Gradients jump, and validity does, where a position crosses a pixel: a few values may be off by any amount."""
    for actual, exact in zip(found, expected, strict=True):
        wrong = ~((actual - exact).abs() <= case.tolerance * exact.abs().max())  # NaN is wrong, too
        assert wrong.double().mean() <= GRADIENTS_BESIDE, f"{case}: {wrong.double().mean():.2%} of a tensor is off"


class Work:
    """Both ways of a case in one direction, on the same inputs: checked, then ready to be timed."""

    def __init__(self, case: Replacement, direction: str) -> None:
        torch.manual_seed(0)
        self.case, self.inputs = case, case.inputs()
        leaves = self.inputs[: case.differentiated] if direction == "both" else []
        self.leaves = [value.requires_grad_() for value in leaves]
        with torch.no_grad():
            self.grad = torch.rand_like(case.ours(*self.inputs))
        check(case, self.run("ours"), self.run("stock"))

    def run(self, way: str) -> list[Tensor]:
        function = self.case.ours if way == "ours" else self.case.stock
        return run(function, self.inputs, self.leaves, self.grad)


def main() -> None:
    set_threads()
    print(", ".join(f"{name} {fact}" for name, fact in machine().items()))
    print("\n| operator | in the place of code | forward: ours | stock | | with gradients: ours | stock | |")
    print("|---|---|---|---|---|---|---|---|")
    for case in REPLACEMENTS:
        cells = []
        for direction in ("forward", "both"):
            work = Work(case, direction)
            ways = {way: lambda way=way, work=work: lambda: work.run(way) for way in ("ours", "stock")}
            times = in_turns(ways, budget=8.0, least=25, most=200)
            ours, stock = (1e3 * min(times[way].seconds) for way in ("ours", "stock"))
            cells += [f"{ours:.2f}", f"{stock:.2f}", f"{stock / ours:.1f}x"]
        print(f"| `{case.operator}` | {case.kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
