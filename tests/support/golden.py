"""The golden cases: one table of small inputs with results and gradients that every backend must reproduce.

The numbers stand in golden.json, so that a change of the reference itself shows as a difference. They are the float64
reference's; after an intended change, `python -m golden` (in tests/, with the package on the path) writes them again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import safnet_ops

FILE = Path(__file__).with_name("golden.json")


@dataclass(frozen=True)
class Case:
    """A call of an operator: float64 inputs by name (`weights` is a tuple of three), options, and what must come out.

    `gradients` are those of sum(first result * cotangent) for the inputs of that name; upsample_fuse has none.
    """

    name: str
    operator: str
    inputs: dict[str, Any]
    options: dict[str, Any]
    cotangent: Tensor
    results: list[Tensor]
    gradients: dict[str, Tensor]

    def run(
        self, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu"
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Results and gradients of `backend` for inputs of `dtype`, as float64 on the CPU."""
        return _run(self.operator, self.inputs, self.options, self.cotangent, backend, dtype, device)


def _run(
    operator: str,
    inputs: dict[str, Any],
    options: dict[str, Any],
    cotangent: Tensor | None,
    backend: str,
    dtype: torch.dtype,
    device: str,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    def leaf(value: Any, name: str) -> Any:
        if isinstance(value, tuple):
            return tuple(leaf(part, name) for part in value)
        differentiable = operator != "upsample_fuse" and name != "target"
        return value.detach().to(device, dtype).requires_grad_(differentiable)

    leaves = {name: leaf(value, name) for name, value in inputs.items()}
    found = getattr(safnet_ops, operator)(**leaves, **options, backend=backend)
    results = list(found) if isinstance(found, tuple) else [found]
    gradients = {}
    if results[0].requires_grad:
        weight = torch.ones_like(results[0]) if cotangent is None else cotangent.to(results[0])
        (results[0] * weight).sum().backward()
        for name, value in leaves.items():
            parts = {f"{name}{i}": part for i, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
            gradients |= {key: part.grad.double().cpu() for key, part in parts.items() if part.grad is not None}
    return [result.detach().double().cpu() for result in results], gradients


def _pattern(*shape: int, seed: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Numbers in [low, high] without a regularity that could hide a mistake, each with five digits."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
    return (values * 1e5).round() / 1e5


def _off_grid(flow: Tensor) -> Tensor:
    """Keep a tenth of a pixel away from whole pixels, where results of lower precision see another cell."""
    return flow.floor() + (flow - flow.floor()).clamp(0.1, 0.9)


def _fusion_inputs(seed: int, low: tuple[int, int] | None = None) -> dict[str, Tensor]:
    size = (3, 4)
    flow_size = low or size
    flow = 1.5 if low else 2.5
    spread = (-2.0, 2.0) if low else (0.05, 0.95)
    return {
        **{name: _pattern(1, 3, *size, seed=seed + i) for i, name in enumerate(("short", "reference", "long"))},
        **{
            name: _off_grid(_pattern(1, 2, *flow_size, seed=seed + 3 + i, low=-flow, high=flow))
            for i, name in enumerate(("flow_short", "flow_long"))
        },
        **{
            name: _pattern(1, 1, *flow_size, seed=seed + 5 + i, low=spread[0], high=spread[1])
            for i, name in enumerate(("mask_short", "mask_long"))
        },
    }


def _calls() -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name -> (operator, inputs, options) of every case, from which golden.json is written."""
    image, flow = _pattern(2, 3, 3, 5, seed=1), _off_grid(_pattern(2, 2, 3, 5, seed=2, low=-4, high=4))
    special = _off_grid(_pattern(1, 2, 2, 3, seed=3))
    special[0, 0, 0] = torch.tensor([torch.inf, -torch.inf, 1e30])
    weights = tuple(_pattern(1, channels, 3, 4, seed=20 + channels + i) for i, channels in enumerate((3, 1, 3)))
    conv = {
        "input": _pattern(1, 6, 4, 5, seed=40, low=-1),
        "weight": _pattern(6, 2, 3, 3, seed=41, low=-1),
        "bias": _pattern(6, seed=42, low=-1),
        "prelu_weight": _pattern(6, seed=43),
    }
    dilated = conv | {"residual": _pattern(1, 6, 2, 3, seed=44, low=-1)}
    return {
        "warp": ("backward_warp", {"image": image, "flow": flow}, {}),
        "warp of one pixel": ("backward_warp", {"image": image[:1, :, :1, :1], "flow": flow[:1, :, :1, :1]}, {}),
        "warp by infinite flow": ("backward_warp", {"image": image[:1, :, :2, :3], "flow": special}, {}),
        "fuse by exposure": ("fused_fuse", _fusion_inputs(10) | {"reference_ldr": _pattern(1, 3, 3, 4, seed=17)}, {}),
        "fuse by weights": ("fused_fuse", _fusion_inputs(30) | {"weights": weights}, {"mask_logits": True}),
        "upsample": (
            "upsample_fuse",
            _fusion_inputs(50, (2, 3)) | {"reference_ldr": _pattern(1, 3, 3, 4, seed=57)},
            {},
        ),
        "census 7": (
            "census_loss",
            {k: _pattern(1, 3, 9, 8, seed=60 + i) for i, k in enumerate(("prediction", "target"))},
            {},
        ),
        "census 3": (
            "census_loss",
            {k: _pattern(2, 1, 4, 5, seed=62 + i) for i, k in enumerate(("prediction", "target"))},
            {"patch_size": 3},
        ),
        "convolution": ("group_conv_shuffle", conv, {"groups": 3}),
        "convolution with stride": ("group_conv_shuffle", dilated, {"groups": 3, "stride": 2, "dilation": 2}),
        "convolution alone": ("group_conv_shuffle", {"input": conv["input"], "weight": conv["weight"]}, {"groups": 3}),
    }


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(part) for part in value]
    return {"shape": list(value.shape), "values": value.flatten().tolist()}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(part) for part in value)
    return torch.tensor(value["values"], dtype=torch.float64).view(value["shape"])


def write() -> None:
    """Write golden.json from the float64 reference."""
    table = []
    for number, (name, (operator, inputs, options)) in enumerate(_calls().items()):
        shape = _run(operator, inputs, options, None, "reference", torch.float64, "cpu")[0][0].shape
        cotangent = _pattern(*shape, seed=100 + number, low=-1)
        results, gradients = _run(operator, inputs, options, cotangent, "reference", torch.float64, "cpu")
        table.append(
            {
                "name": name,
                "operator": operator,
                "options": options,
                "inputs": {key: _encode(value) for key, value in inputs.items()},
                "cotangent": _encode(cotangent),
                "results": [_encode(result) for result in results],
                "gradients": {key: _encode(value) for key, value in gradients.items()},
            }
        )
    FILE.write_text("[\n" + ",\n".join(json.dumps(row) for row in table) + "\n]\n")


def load() -> list[Case]:
    return [
        Case(
            row["name"],
            row["operator"],
            {key: _decode(value) for key, value in row["inputs"].items()},
            row["options"],
            _decode(row["cotangent"]),
            [_decode(result) for result in row["results"]],
            {key: _decode(value) for key, value in row["gradients"].items()},
        )
        for row in json.loads(FILE.read_text())
    ]


CASES: list[Case] = load() if FILE.is_file() else []


def check(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    tolerance: float,
    assert_close: Callable[..., None],
    device: str = "cpu",
) -> None:
    """Compare a backend's results and gradients with the table, by an `assert_close(name, actual, expected,
    tolerance)`."""
    results, gradients = case.run(backend, dtype, device)
    assert len(results) == len(case.results)
    for number, (result, expected) in enumerate(zip(results, case.results, strict=True)):
        assert_close(f"{case.name}: result {number}", result, expected, tolerance)
    assert gradients.keys() == case.gradients.keys()
    for name, expected in case.gradients.items():
        assert_close(f"{case.name}: gradient of {name}", gradients[name], expected, tolerance)


if __name__ == "__main__":
    write()
