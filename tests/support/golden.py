"""The golden cases: one table of small inputs with results and gradients that every backend must reproduce.

The numbers stand in golden.json, so that a change of the reference itself shows as a difference. They are the float64
reference's; after an intended change, `python -m tests.support.golden` writes them again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import safnet_ops
from operator_inputs import FUSION, census_inputs, conv_inputs, fusion_inputs, upsample_inputs, warp_inputs
from tests.support.operators import assert_close

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
        """Results and gradients of `backend` for inputs of `dtype`, on the CPU."""
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
    gradients: dict[str, Tensor] = {}
    if results[0].requires_grad:
        weight = torch.ones_like(results[0]) if cotangent is None else cotangent.to(results[0])
        (results[0] * weight).sum().backward()
        for name, value in leaves.items():
            parts = {f"{name}{i}": part for i, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
            gradients |= {key: part.grad.cpu() for key, part in parts.items() if part.grad is not None}
    return [result.detach().cpu() for result in results], gradients


def _five_digits(value: Tensor) -> Tensor:
    return (value * 1e5).round() / 1e5


def _drawn(
    seed: int, names: tuple[str, ...], make: Callable[..., list[Tensor]], *args: Any, **options: Any
) -> dict[str, Any]:
    torch.manual_seed(seed)
    values = make(*args, dtype=torch.float64, **options)
    return dict(zip(names, map(_five_digits, values), strict=False))


def _calls() -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name -> (operator, inputs, options) of every case, from which golden.json is written."""
    warp = ("image", "flow")
    special = _drawn(3, warp, warp_inputs, (2, 3))
    special["flow"][0, 0, 0] = torch.tensor([torch.inf, -torch.inf, 1e30])
    weighted = _drawn(30, (*FUSION[:7], "0", "1", "2"), fusion_inputs, (3, 4), logits=True, weights=(3, 1, 3))
    weighted["weights"] = tuple(weighted.pop(name) for name in "012")
    conv = _drawn(40, ("input", "weight", "bias", "prelu_weight"), conv_inputs, (4, 5), (6, 6), 3)
    strided = _drawn(44, (*conv, "residual"), conv_inputs, (4, 5), (6, 6), 3, stride=2)
    plain = {name: conv[name] for name in ("input", "weight")}
    census = ("prediction", "target")
    return {
        "warp": ("backward_warp", _drawn(1, warp, warp_inputs, (3, 5), n=2), {}),
        "warp of one pixel": ("backward_warp", _drawn(2, warp, warp_inputs, (1, 1)), {}),
        "warp by infinite flow": ("backward_warp", special, {}),
        "fuse by exposure": ("fused_fuse", _drawn(10, FUSION, fusion_inputs, (3, 4)), {}),
        "fuse by weights": ("fused_fuse", weighted, {"mask_logits": True}),
        "upsample": ("upsample_fuse", _drawn(50, FUSION, upsample_inputs, (3, 4), (2, 3)), {}),
        "census 7": ("census_loss", _drawn(60, census, census_inputs, (9, 8)), {}),
        "census 3": ("census_loss", _drawn(62, census, census_inputs, (4, 5), n=2, channels=1), {"patch_size": 3}),
        "convolution": ("group_conv_shuffle", conv, {"groups": 3}),
        "convolution with stride": ("group_conv_shuffle", strided, {"groups": 3, "stride": 2, "dilation": 2}),
        "convolution alone": ("group_conv_shuffle", plain, {"groups": 3}),
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
        torch.manual_seed(100 + number)
        cotangent = _five_digits(torch.randn(shape, dtype=torch.float64))
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


def check(case: Case, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Compare a backend's results and gradients with the table."""
    results, gradients = case.run(backend, dtype, device)
    assert len(results) == len(case.results)
    for number, (result, expected) in enumerate(zip(results, case.results, strict=True)):
        assert_close(f"{case.name}: result {number}", result, expected)
    assert gradients.keys() == case.gradients.keys()
    for name, expected in case.gradients.items():
        assert_close(f"{case.name}: gradient of {name}", gradients[name], expected)


if __name__ == "__main__":
    write()
