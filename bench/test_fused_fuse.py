"""Speed of fused_fuse: forward on a whole picture, forward and backward on a training crop (gradients of flows and masks)."""

import safnet_ops
from bench.baselines import grid_sample_fuse
from bench.inputs import fusion_inputs
from safnet_ops import reference

FORWARD = "fused_fuse 1000x1500 forward"
BOTH = "fused_fuse 512x512 both"


def training_inputs():
    inputs = fusion_inputs(512, 512)
    for value in inputs[3:7]:
        value.requires_grad_()
    return inputs


def test_forward(compare, backend):
    compare(FORWARD, safnet_ops.fused_fuse, fusion_inputs(1000, 1500), reference.fused_fuse)


def test_forward_grid_sample(compare):
    compare(FORWARD, grid_sample_fuse, fusion_inputs(1000, 1500), reference.fused_fuse)


def test_both(compare, backend):
    compare(BOTH, safnet_ops.fused_fuse, training_inputs(), reference.fused_fuse, backward=True)


def test_both_grid_sample(compare):
    compare(BOTH, grid_sample_fuse, training_inputs(), reference.fused_fuse, backward=True)
