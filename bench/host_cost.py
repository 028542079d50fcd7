"""What a call takes besides arithmetic: pictures of 8x8 pixels, by name and as torch.ops, beside the stock expression.

`python -m bench.host_cost` times all by turns and prints a table; `pytest bench/test_host_cost.py` puts them side by side.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import safnet_ops
from bench.baselines import conv_census, grid_sample_fuse, grid_sample_upsample_fuse, grid_sample_warp
from bench.measure import in_turns, machine, set_threads
from operator_inputs import census_inputs, conv_inputs, fusion_inputs, upsample_inputs, warp_inputs

SIZE = (8, 8)
CALLS = 20  # a round: so short that some meet nothing that disturbs them


def convolve(input: Tensor, weight: Tensor, bias: Tensor, slopes: Tensor) -> Tensor:
    out = F.prelu(F.conv2d(input, weight, bias, padding=1, groups=3), slopes)
    return F.channel_shuffle(out, 3)


def registered(operator: str, *options: Any) -> Callable[..., Any]:
    call = getattr(torch.ops.safnet_ops, operator)
    return lambda *inputs: call(*inputs, *options)


# Operator -> inputs, and the ways to compute it.
OPERATORS: dict[str, tuple[Callable[[], list[Tensor]], dict[str, Callable[..., Any]]]] = {
    "backward_warp": (
        partial(warp_inputs, SIZE),
        {"by name": safnet_ops.backward_warp, "torch.ops": registered("backward_warp"), "stock": grid_sample_warp},
    ),
    "fused_fuse": (
        partial(fusion_inputs, SIZE),
        {
            "by name": safnet_ops.fused_fuse,
            "torch.ops": registered("fused_fuse", None, None, None, False),
            "stock": grid_sample_fuse,
        },
    ),
    "upsample_fuse": (
        partial(upsample_inputs, SIZE),
        {
            "by name": safnet_ops.upsample_fuse,
            "torch.ops": registered("upsample_fuse"),
            "stock": grid_sample_upsample_fuse,
        },
    ),
    "census_loss": (
        partial(census_inputs, SIZE),
        {
            "by name": safnet_ops.census_loss,
            "torch.ops": registered("census_loss", 7, False),
            "stock": conv_census,
        },
    ),
    "group_conv_shuffle": (
        lambda: conv_inputs(SIZE, (6, 6), 3)[:4],
        {
            "by name": partial(safnet_ops.group_conv_shuffle, groups=3),
            "torch.ops": lambda *inputs: torch.ops.safnet_ops.group_conv_shuffle(*inputs, None, 3, 1, 1, False),
            "stock": convolve,
        },
    ),
}
KINDS = ("without gradients", "recording", "forward and backward")


def first(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def prepare(function: Callable[..., Any], inputs: list[Tensor], kind: str) -> Callable[[], Any]:
    if kind == "recording":
        return lambda: function(*inputs)
    if kind == "forward and backward":
        grad = torch.ones_like(first(function(*inputs)))
        return lambda: torch.autograd.grad(first(function(*inputs)), inputs, grad)

    def infer() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return infer


def prepared(operator: str, kind: str) -> dict[str, Callable[[], Any]]:
    """The calls to be timed, by way, whose results and gradients are equal."""
    torch.manual_seed(0)
    make, ways = OPERATORS[operator]
    inputs = [value.requires_grad_(kind != "without gradients") for value in make()]
    calls = {way: prepare(function, inputs, kind) for way, function in ways.items()}
    both = kind == "forward and backward"
    expected, *others = (call() if both else first(call()) for call in calls.values())
    for found in others:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    return calls


def main() -> None:
    set_threads()
    print(", ".join(f"{name} {fact}" for name, fact in machine().items()))
    print("\n| operator | | by name | `torch.ops` | stock |\n|---|---|---|---|---|")
    for operator in OPERATORS:
        for kind in KINDS:
            works = {
                way: lambda call=call: lambda: [call() for _ in range(CALLS)]
                for way, call in prepared(operator, kind).items()
            }
            times = in_turns(works, budget=6.0, least=100, most=1000)
            cells = [f"{1e6 * min(found.seconds) / CALLS:.1f}" for found in times.values()]
            print(f"| `{operator}` | {kind} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
