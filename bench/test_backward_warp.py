"""Speed of backward_warp: features of the model and colour pictures."""

import torch

from bench.baselines import grid_sample_warp
from bench.case import Case, over
from bench.inputs import smooth_flow
from operator_inputs import warp_inputs


def warp_case(channels, height, width, layout=torch.contiguous_format, targets=None):
    def inputs():
        image, flow = warp_inputs((height, width), channels=channels, flow=smooth_flow(height, width))
        return [image.contiguous(memory_format=layout), flow]

    setting = f"{channels}x{height}x{width}" + (" channels_last" if layout == torch.channels_last else "")
    return Case("backward_warp", setting, inputs, (0, 1), grid_sample_warp, targets=targets or {})


CASES = [
    warp_case(40, 500, 752, targets={"forward": (2, 4)}),
    warp_case(40, 500, 752, torch.channels_last),
    warp_case(3, 1000, 1500),
]


@over(CASES)
def test_speed(speed, case, direction, implementation):
    speed(case, direction, implementation)
