"""upsample_fuse's CUDA kernels, executed on the CPU, against the reference."""

import pytest
import torch

import safnet_ops
from operator_inputs import upsample_inputs
from safnet_ops import reference
from tests.support.operators import DTYPES, LAYOUTS, assert_close


def inputs(shape=(2, 3, 6, 12), low=(4, 5), dtype=torch.float32, geometry=None):
    n, channels, *size = shape
    return upsample_inputs(size, low, n=n, channels=channels, dtype=dtype, geometry=geometry)


def compare(values):
    dtype = values[0].dtype
    found = safnet_ops.upsample_fuse(*values)
    expected = reference.upsample_fuse(*(value.double() for value in values))
    for name, one, other in zip(("fused", "flow", "flow", "mask", "mask"), found, expected, strict=True):
        assert_close(name, one, other)
    assert found[0].dtype == dtype
    assert all(
        value.is_contiguous() and value.dtype == torch.promote_types(dtype, torch.float32) for value in found[1:]
    )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(cuda, dtype, layout):
    compare([layout(value) for value in inputs(dtype=dtype)])


@pytest.mark.parametrize(
    ("shape", "low"),
    [
        ((1, 3, 1, 1), (1, 1)),
        ((1, 3, 7, 9), (1, 1)),
        ((1, 1, 5, 4), (11, 3)),
        ((3, 3, 10, 16), (5, 8)),
        ((1, 2, 4, 7), (4, 7)),
    ],
    ids=str,
)
def test_sizes(cuda, shape, low):
    compare(inputs(shape, low))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_images_with_float32_maps(cuda, dtype):
    compare(inputs(dtype=dtype, geometry=torch.float32))


@pytest.mark.parametrize("width", [8, 9])
def test_64bit_offsets_give_the_same_bits(cuda, monkeypatch, width):
    values = inputs((2, 3, 5, width))
    narrow = safnet_ops.upsample_fuse(*values)
    monkeypatch.setenv("SAFNET_OPS_FORCE_64BIT_OFFSETS", "1")
    assert all(torch.equal(one, other) for one, other in zip(narrow, safnet_ops.upsample_fuse(*values), strict=True))


def test_nan_stays_where_the_resizing_puts_it(cuda):
    values = inputs((1, 3, 8, 8), (4, 4))
    values[3][0, 0, 1, 1] = float("nan")
    values[6][0, 0, 3, 0] = float("inf")
    for one, other in zip(safnet_ops.upsample_fuse(*values), reference.upsample_fuse(*values), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, atol=1e-5, rtol=1e-4)


def test_empty(cuda):
    assert [tuple(value.shape) for value in safnet_ops.upsample_fuse(*inputs((0, 3, 6, 12)))] == [
        (0, 3, 6, 12), (0, 2, 6, 12), (0, 2, 6, 12), (0, 1, 6, 12), (0, 1, 6, 12),
    ]  # fmt: skip
