"""The gradients that C++ and CUDA name are those of the list of operators, in its order."""

import re
from pathlib import Path

import torch

import safnet_ops  # noqa: F401  # defines the schemas
from safnet_ops.operators import OPERATORS

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "math" / "gradients.h"
ENUMS = {"backward_warp": "WarpInput", "fused_fuse": "FuseInput", "group_conv_shuffle": "ConvInput"}


def _snake_case(enumerator: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", enumerator.removeprefix("k")).lower()


def test_enumerators_are_the_differentiable_inputs_in_order():
    bodies = dict(re.findall(r"enum class (\w+) \{([^}]*)\}", HEADER.read_text()))
    found = {name: tuple(map(_snake_case, re.findall(r"k\w+", body))) for name, body in bodies.items()}
    assert found == {enum: OPERATORS[operator].differentiable for operator, enum in ENUMS.items()}


def test_every_backward_that_takes_needs_has_an_enum():
    takes_needs = {
        name
        for name, operator in OPERATORS.items()
        if operator.differentiable
        and "int needs" in str(getattr(torch.ops.safnet_ops, f"{name}_backward").default._schema)
    }
    assert takes_needs == set(ENUMS)
