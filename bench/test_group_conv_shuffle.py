"""Speed of group_conv_shuffle: the decoder's grouped convolutions, and the ordinary ones that it can serve (groups=1)."""

from functools import partial

import pytest
import torch

import safnet_ops
from safnet_ops import reference

# (input channels, output channels, groups, stride, dilation, height, width): the model's convolutions on a 500x752 picture.
CASES = [
    (120, 120, 3, 1, 1, 250, 376),
    (120, 120, 1, 1, 1, 250, 376),
    (80, 80, 1, 1, 1, 500, 752),
    (80, 80, 1, 1, 4, 500, 752),
    (27, 32, 1, 1, 1, 500, 752),
    (32, 3, 1, 1, 1, 500, 752),
    (6, 40, 1, 2, 1, 500, 752),
    (120, 120, 3, 1, 1, 31, 47),
]


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backend(compare, backend, case, dtype, layout, direction):
    channels_in, channels_out, groups, stride, dilation, height, width = case
    input = torch.randn(1, channels_in, height, width, dtype=dtype)
    if layout == "channels_last":
        input = input.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels_out, channels_in // groups, 3, 3) * (9 * channels_in / groups) ** -0.5
    inputs = [input, weight.to(dtype), torch.randn(channels_out).to(dtype), torch.rand(channels_out).to(dtype)]
    backward = direction == "both"
    if backward:
        inputs = [value.requires_grad_() for value in inputs]
    options = {"groups": groups, "stride": stride, "dilation": dilation}
    operator, exact = (partial(f, **options) for f in (safnet_ops.group_conv_shuffle, reference.group_conv_shuffle))
    group = f"group_conv_shuffle {case} {str(dtype)[6:]} {layout} {direction}"
    compare(group, operator, inputs, exact, backward, tolerance=1e-3 if dtype == torch.float32 else 2e-2)
