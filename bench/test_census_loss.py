"""Speed of census_loss as training uses it: patches of 7 pixels on crops and on whole pictures."""

import torch

from bench.baselines import conv_census
from bench.case import DIRECTIONS, Case, over
from operator_inputs import census_inputs


def census_case(side, dtype=torch.float32, targets=None):
    def inputs():
        return census_inputs((side, side), dtype=dtype)

    setting = f"3x{side}x{side}" + ("" if dtype == torch.float32 else f" {str(dtype).removeprefix('torch.')}")
    half = dtype != torch.float32
    return Case(
        "census_loss",
        setting,
        inputs,
        (0,),
        None if half else conv_census,
        tolerance=2e-2 if half else 1e-3,
        targets=targets or {},
        reported=() if half else DIRECTIONS,
    )


CASES = [
    census_case(512, targets={"both": (40, 100)}),
    census_case(256),
    census_case(512, torch.bfloat16),
]


@over(CASES)
def test_speed(speed, case, direction, implementation):
    speed(case, direction, implementation)
