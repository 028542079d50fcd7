"""Speed of group_conv_shuffle: the decoder's grouped convolutions, and the ordinary ones that it can serve (groups=1).

Its reference is the library's convolution with activation and shuffle as operators of their own.
"""

import torch

from bench.case import DIRECTIONS, Case, over
from operator_inputs import conv_inputs


def conv_case(
    channels_in,
    channels_out,
    size,
    *,
    groups=1,
    stride=1,
    dilation=1,
    layout=torch.contiguous_format,
    dtype=torch.float32,
    targets=None,
    reported=DIRECTIONS,
):
    height, width = size

    def inputs():
        image, *others, _ = conv_inputs(
            size, (channels_in, channels_out), groups, stride=stride, dtype=dtype, exact=True
        )
        return [image.contiguous(memory_format=layout), *others]

    parts = [
        f"{channels_in}->{channels_out} {height}x{width}",
        f"groups {groups}" if groups > 1 else "",
        f"stride {stride}" if stride > 1 else "",
        f"dilation {dilation}" if dilation > 1 else "",
        "" if dtype == torch.float32 else str(dtype).removeprefix("torch."),
        "channels_last" if layout == torch.channels_last else "",
    ]
    return Case(
        "group_conv_shuffle",
        ", ".join(filter(None, parts)),
        inputs,
        (0, 1, 2, 3),
        options={"groups": groups, "stride": stride, "dilation": dilation},
        tolerance=1e-3 if dtype == torch.float32 else 3e-2,
        multiply_adds=channels_in // groups * 9 * channels_out * -(-height // stride) * -(-width // stride),
        targets=targets or {},
        reported=reported,
    )


LAST = torch.channels_last
DECODER, PICTURE = (250, 376), (500, 752)  # of a picture twice and once as large

CASES = [
    conv_case(120, 120, DECODER, groups=3, targets={"forward": (2, 2.7)}),
    conv_case(120, 120, DECODER, groups=3, layout=LAST),
    conv_case(120, 120, DECODER, groups=3, dtype=torch.bfloat16, reported=("forward",)),
    conv_case(120, 120, DECODER, groups=3, dtype=torch.bfloat16, layout=LAST, reported=()),
    conv_case(120, 120, DECODER),
    conv_case(120, 120, DECODER, layout=LAST),
    conv_case(80, 80, PICTURE),
    conv_case(80, 80, PICTURE, layout=LAST),
    conv_case(80, 80, PICTURE, dtype=torch.bfloat16, reported=("forward",)),
    conv_case(80, 80, PICTURE, dtype=torch.bfloat16, layout=LAST, reported=("forward",)),
    conv_case(80, 80, PICTURE, dilation=4, reported=()),
    conv_case(27, 32, PICTURE),
    conv_case(27, 32, PICTURE, layout=LAST),
    conv_case(32, 3, PICTURE, reported=()),
    conv_case(6, 40, PICTURE, stride=2),
    conv_case(120, 120, (31, 47), groups=3),
]


@over(CASES)
def test_speed(speed, case, direction, implementation):
    speed(case, direction, implementation)
