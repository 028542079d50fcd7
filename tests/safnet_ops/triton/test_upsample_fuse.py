"""upsample_fuse in Triton: the library's own launches, executed from PTX by the simulator, against the float64
reference."""

import pytest
import torch

import safnet_ops
from safnet_ops import reference
from tests.support.operators import KINDS, LAYOUTS, TOLERANCE, assert_close, off_grid

pytestmark = pytest.mark.usefixtures("simulated")


def make(size=(10, 14), low=(5, 7), n=2, kind=(torch.float32, torch.float32)):
    images = [torch.rand(n, 3, *size).to(kind[0]) for _ in range(4)]
    flows = [off_grid(torch.randn(n, 2, *low) * 2).to(kind[1]) for _ in range(2)]
    masks = [torch.randn(n, 1, *low).to(kind[1]) for _ in range(2)]
    return [*images[:3], *flows, *masks, images[3]]


def check(inputs, tolerance):
    found = safnet_ops.upsample_fuse(*inputs, backend="triton")
    expected = reference.upsample_fuse(*(x.double() for x in inputs))
    names = ("fused", "flow_short", "flow_long", "mask_short", "mask_long")
    for name, actual, exact in zip(names, found, expected, strict=True):
        # Flows and masks are float32 whatever the images are, and never rounded further.
        assert_close(name, actual, exact, tolerance if name == "fused" else max(TOLERANCE[actual.dtype], 1e-13))
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_matches_reference(kind):
    found = check(make(kind=kind), TOLERANCE[kind[0]])
    assert found[0].dtype == kind[0]
    full = torch.float64 if kind[0] == torch.float64 else torch.float32
    assert all(x.dtype == full and x.is_contiguous() for x in found[1:])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [((1, 1), (1, 1)), ((13, 9), (4, 6)), ((3, 70), (8, 1)), ((7, 5), (7, 5))], ids=str)
def test_layouts_and_odd_sizes(layout, sizes):
    check([layout(x) for x in make(*sizes)], 1e-5)


def test_64bit_offsets_give_the_same_bits(wide):
    inputs = make()
    narrow = check(inputs, 1e-5)
    wide()
    assert all(torch.equal(a, b) for a, b in zip(check(inputs, 1e-5), narrow, strict=True))


def test_empty_batch():
    assert [x.shape[0] for x in safnet_ops.upsample_fuse(*make(n=0), backend="triton")] == [0] * 5
