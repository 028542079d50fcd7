"""Speed of fused_fuse: on a whole picture and on a training crop, with gradients of flows and masks, as training needs them."""

from bench.baselines import grid_sample_fuse
from bench.case import Case, over
from bench.inputs import smooth_flow
from operator_inputs import fusion_inputs

FLOWS_AND_MASKS = (3, 4, 5, 6)


def fuse_case(height, width, targets):
    def inputs():
        flows = [smooth_flow(height, width) for _ in range(2)]
        return fusion_inputs((height, width), flows=flows, exposures=True)

    return Case("fused_fuse", f"{height}x{width}", inputs, FLOWS_AND_MASKS, grid_sample_fuse, targets=targets)


CASES = [
    fuse_case(1000, 1500, {"forward": (15, 30)}),
    fuse_case(512, 512, {"both": (8, 15)}),
]


@over(CASES)
def test_speed(speed, case, direction, implementation):
    speed(case, direction, implementation)
