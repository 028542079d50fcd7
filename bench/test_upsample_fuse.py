"""Speed of upsample_fuse, from the network's size to the picture's; it is for inference and has no backward kernel."""

from bench.baselines import grid_sample_upsample_fuse
from bench.case import Case, over
from operator_inputs import upsample_inputs
from safnet.model import network_size


def upsample_case(height, width):
    def inputs():
        return upsample_inputs((height, width), network_size(height, width, 1.0), pixels=1, exposures=True)

    return Case("upsample_fuse", f"{height}x{width}", inputs, stock=grid_sample_upsample_fuse)


CASES = [upsample_case(1000, 1500), upsample_case(500, 752)]


@over(CASES)
def test_speed(speed, case, direction, implementation):
    speed(case, direction, implementation)
