"""Pictures at unusual places of memory, on the CPU."""

import pytest
import torch

import safnet_ops  # noqa: F401  # registers the operators
from tests.support import placement


def call(operator, *arguments):
    return getattr(torch.ops.safnet_ops, operator)(*arguments)


@pytest.mark.parametrize("channels_last", [False, True])
def test_odd_offsets_in_storage(channels_last):
    for operator, arguments in placement.calls(torch.float32, channels_last):
        placement.check(call, placement.at_odd_offset, operator, arguments)


def test_offsets_beyond_31_bits():
    for operator, arguments in placement.calls(torch.float16):
        placement.check(call, placement.with_far_rows, operator, arguments)
