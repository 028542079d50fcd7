"""backward_warp in Triton: the library's own launches, executed from PTX by the simulator, against the float64
reference."""

import pytest
import torch

import safnet_ops
from operator_inputs import warp_inputs
from safnet_ops import reference
from tests.support.operators import (
    KINDS,
    LAYOUTS,
    assert_close,
    channels_last,
    check_operator,
    contiguous,
)

pytestmark = pytest.mark.usefixtures("simulated")


def triton_warp(image, flow):
    return safnet_ops.backward_warp(image, flow, backend="triton")


def make(size=(5, 7), n=2, channels=3, kind=(torch.float32, torch.float32), spread=4.0):
    return warp_inputs(size, n=n, channels=channels, dtype=kind[0], flow_dtype=kind[1], pixels=spread)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_matches_reference(kind):
    image, flow = make(kind=kind, channels=5)
    out = check_operator(triton_warp, reference.backward_warp, (image, flow), (True, True))
    assert out.dtype == kind[0]
    assert out.stride() == image.stride()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (19, 130)], ids=str)
def test_layouts_and_odd_sizes(layout, size):
    image, flow = make(size, channels=5)
    check_operator(triton_warp, reference.backward_warp, (layout(image), layout(flow)), (True, True))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[3]], ids=str)
def test_dense_channels(kind):
    """Eight of them allow 16-byte accesses, for which there is another tile."""
    image, flow = make((6, 9), channels=8, kind=kind)
    image = channels_last(image)
    out = check_operator(triton_warp, reference.backward_warp, (image, flow), (True, True))
    assert out.stride() == image.stride()


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=str)
def test_only_needed_gradients(needed):
    import ptxsim

    image, flow = make(channels=6)
    with ptxsim.options(stats=True) as launches:
        check_operator(triton_warp, reference.backward_warp, (image, flow), needed)
    atomics = sum(launch.stats.memory("atomic global")["requests"] for launch in launches)
    assert (atomics > 0) == needed[0]


def test_special_flows():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[0, 0, 0] = torch.tensor([-1e30, torch.inf, -torch.inf, torch.nan])
    flow[0, 1, 1] = torch.tensor([3e38, -3e38, torch.nan, 0.25])
    assert_close("warp", triton_warp(image, flow), reference.backward_warp(image.double(), flow.double()))


def test_gradient_stops_at_the_border():
    image, flow = torch.randn(1, 2, 4, 5), torch.full((1, 2, 4, 5), 100.0, requires_grad=True)
    triton_warp(image, flow).sum().backward()
    assert not flow.grad.any()


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_deterministic_backward_repeats_to_the_bit(layout, deterministic):
    """All pixels of a row meet in one: the order of float additions would show."""
    import ptxsim

    image, flow = make((6, 70), n=1, channels=4)
    flow[:, 0] = 3.3 - torch.arange(70.0)
    found = []
    for seed in (1, 2):
        leaf = layout(image).requires_grad_()
        with ptxsim.options(seed=seed):
            triton_warp(leaf, flow).backward(torch.linspace(-1, 1, image.numel()).view_as(image) ** 3)
        found.append(leaf.grad)
    assert torch.equal(found[0], found[1])
    check_operator(triton_warp, reference.backward_warp, (layout(image), flow), (True, True))


def test_deterministic_backward_carries_infinity_and_nan(deterministic):
    image = torch.randn(1, 4, 3, 40, requires_grad=True)
    grad = torch.randn(1, 4, 3, 40)
    grad[0, 0, 1, 3], grad[0, 1, 1, 3] = torch.inf, torch.nan
    triton_warp(image, torch.full((1, 2, 3, 40), 0.5)).backward(grad)
    exact = image.detach().double().requires_grad_()
    reference.backward_warp(exact, torch.full((1, 2, 3, 40), 0.5, dtype=torch.float64)).backward(grad.double())
    assert torch.equal(image.grad.isnan(), exact.grad.isnan())
    assert torch.equal(image.grad.isinf(), exact.grad.isinf())
    finite = exact.grad.isfinite()
    assert_close("gradient", image.grad[finite], exact.grad[finite])


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_64bit_offsets_give_the_same_bits(layout, wide):
    image, flow = make((9, 40), channels=8)
    narrow = check_operator(triton_warp, reference.backward_warp, (layout(image), flow), (True, True))
    wide()
    found = check_operator(triton_warp, reference.backward_warp, (layout(image), flow), (True, True))
    assert torch.equal(found, narrow)


def test_offsets_beyond_31_bits_are_noticed(monkeypatch):
    """Rows that lie 2^28 elements apart: 5 GB of addresses, of which only the pages that are touched exist."""
    import ptxsim
    from safnet_ops.triton import launching

    image, flow = make((10, 5), n=1, channels=2, kind=(torch.float16, torch.float32))
    storage = torch.UntypedStorage(10 << 29)
    far = torch.empty(0, dtype=torch.float16).set_(storage, 0, image.shape, (0, 8, 1 << 28, 1)).copy_(image)
    out = triton_warp(far, flow)
    assert torch.equal(out, triton_warp(image, flow))
    monkeypatch.setattr(launching, "WIDE_FROM", 1 << 60)
    with pytest.raises(ptxsim.errors.OutOfBounds):
        triton_warp(far, flow)


def test_empty_batch():
    image, flow = torch.empty(0, 3, 4, 5, requires_grad=True), torch.empty(0, 2, 4, 5)
    out = triton_warp(image, flow)
    assert out.shape == (0, 3, 4, 5)
    out.sum().backward()
    assert image.grad.shape == image.shape


def test_second_derivative():
    image, flow = (x.double().requires_grad_() for x in make((3, 4), n=1, channels=2))
    (slope,) = torch.autograd.grad(triton_warp(image, flow).square().sum(), flow, create_graph=True)
    (found,) = torch.autograd.grad(slope.square().sum(), image)
    (slope,) = torch.autograd.grad(reference.backward_warp(image, flow).square().sum(), flow, create_graph=True)
    (expected,) = torch.autograd.grad(slope.square().sum(), image)
    assert_close("second derivative", found, expected)


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_options(padding):
    torch.manual_seed(0)
    image, flow = torch.rand(1, 3, 6, 7), 3 * torch.randn(2, 2, 5, 9)
    check_operator(
        lambda image, flow: safnet_ops.backward_warp(image, flow, padding=padding, backend="triton"),
        lambda image, flow: safnet_ops.backward_warp(image, flow, padding=padding, backend="reference"),
        (image, flow),
        (True, True),
    )
