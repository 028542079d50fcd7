"""Speed of upsample_fuse, from the decoder's size to the picture's."""

import torch

import safnet_ops
from bench.inputs import fusion_inputs
from safnet_ops import reference


def test_forward(compare, backend):
    inputs = fusion_inputs(1000, 1500)
    inputs[3:7] = [torch.randn(1, channels, 512, 752) for channels in (2, 2, 1, 1)]

    def fused(*inputs):
        return safnet_ops.upsample_fuse(*inputs)[0]

    compare("upsample_fuse 1000x1500 forward", fused, inputs, lambda *inputs: reference.upsample_fuse(*inputs)[0])
