"""upsample_fuse in Triton: the library's own launches, executed from PTX by the simulator, against the float64
reference."""

import pytest
import torch

import safnet_ops
from operator_inputs import upsample_inputs
from safnet_ops import reference
from tests.support.operators import KINDS, LAYOUTS, assert_close

pytestmark = pytest.mark.usefixtures("simulated")


def make(size=(10, 14), low=(5, 7), n=2, kind=(torch.float32, torch.float32)):
    return upsample_inputs(size, low, n=n, dtype=kind[0], geometry=kind[1])


def check(inputs):
    found = safnet_ops.upsample_fuse(*inputs, backend="triton")
    expected = reference.upsample_fuse(*(x.double() for x in inputs))
    names = ("fused", "flow_short", "flow_long", "mask_short", "mask_long")
    for name, actual, exact in zip(names, found, expected, strict=True):
        assert_close(name, actual, exact)
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_matches_reference(kind):
    found = check(make(kind=kind))
    assert found[0].dtype == kind[0]
    full = torch.float64 if kind[0] == torch.float64 else torch.float32
    assert all(x.dtype == full and x.is_contiguous() for x in found[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [((1, 1), (1, 1)), ((13, 9), (4, 6)), ((3, 70), (8, 1)), ((7, 5), (7, 5))], ids=str)
def test_layouts_and_odd_sizes(layout, sizes):
    check([layout(x) for x in make(*sizes)])


def test_64bit_offsets_give_the_same_bits(wide):
    inputs = make()
    narrow = check(inputs)
    wide()
    assert all(torch.equal(a, b) for a, b in zip(check(inputs), narrow, strict=True))


def test_empty_batch():
    assert [x.shape[0] for x in safnet_ops.upsample_fuse(*make(n=0), backend="triton")] == [0] * 5
