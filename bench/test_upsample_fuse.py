"""Speed of upsample_fuse, from the network's size to the picture's; it is for inference and has no backward kernel."""

import torch

from bench.baselines import grid_sample_upsample_fuse
from bench.case import Case, over
from bench.inputs import fusion_inputs
from safnet.model import network_size


def upsample_case(height, width):
    def inputs():
        found = fusion_inputs(height, width)
        low = network_size(height, width, 1.0)
        found[3:7] = [torch.randn(1, channels, *low) for channels in (2, 2, 1, 1)]
        return found

    return Case("upsample_fuse", f"{height}x{width}", inputs, stock=grid_sample_upsample_fuse)


CASES = [upsample_case(1000, 1500), upsample_case(500, 752)]


@over(CASES)
def test_speed(speed, case, direction, implementation):
    speed(case, direction, implementation)
