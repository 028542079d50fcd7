"""Pictures at unusual places of memory: what asks for vectors and for 32-bit offsets must look at the tensors."""

import pytest
import torch

from simulated_gpu.device import RealDevice
from tests.support import placement


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_odd_offsets_in_storage(cuda, dtype, channels_last):
    for operator, arguments in placement.calls(dtype, channels_last):
        placement.check(cuda.call, placement.at_odd_offset, operator, arguments)


def test_offsets_beyond_31_bits(cuda):
    if isinstance(cuda, RealDevice):
        pytest.skip("every copy to the GPU would take all 5 GB of addresses")
    for operator, arguments in placement.calls(torch.float16):
        placement.check(cuda.call, placement.with_far_rows, operator, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_copy_to_a_gpu_keeps_strides_and_misalignment(dtype, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    value = torch.rand(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=layout)
    for original in (value, placement.at_odd_offset(value), value[:, 1:, 1:, 3:]):
        copy = RealDevice._copy(original, "cpu")
        assert copy.data_ptr() != original.data_ptr()
        assert copy.data_ptr() % 64 == original.data_ptr() % 64
        assert copy.stride() == original.stride()
        assert torch.equal(copy, original)
