"""backward_warp: the C++ kernels against the reference, and the reference against grid_sample."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import safnet_ops
from operator_inputs import warp_inputs
from safnet_ops import reference
from safnet_ops.operators import needed_bits
from tests.support.operators import DTYPES, KINDS, LAYOUTS, SIZES, assert_close, check_operator

cpp = torch.ops.safnet_ops


def make(size=(5, 7), n=2, channels=3, kind=(torch.float32, torch.float32), spread=4.0):
    return warp_inputs(size, n=n, channels=channels, dtype=kind[0], flow_dtype=kind[1], pixels=spread)


def grid_sample(image, flow):
    """The warp as users write it today, in float64: an absolute grid, normalised to [-1, 1]."""
    height, width = image.shape[2:]
    x = (flow[:, 0] + torch.arange(width)) * 2 / max(width - 1, 1) - 1
    y = (flow[:, 1] + torch.arange(height)[:, None]) * 2 / max(height - 1, 1) - 1
    return F.grid_sample(image, torch.stack([x, y], -1), padding_mode="border", align_corners=True)


def test_reference_equals_grid_sample():
    image, flow = make((13, 17), kind=(torch.float64, torch.float64))
    check_operator(reference.backward_warp, grid_sample, (image, flow), (True, True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(kind, layout, size, poisoned):
    image, flow = make(size, kind=kind)
    out = check_operator(
        safnet_ops.backward_warp,
        reference.backward_warp,
        (layout(image), layout(flow)),
        (True, True),
    )
    assert out.dtype == kind[0]


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("channels", [1, 3, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_needed_gradients(needed, channels, layout):
    image, flow = make((9, 70), channels=channels)
    check_operator(safnet_ops.backward_warp, reference.backward_warp, (layout(image), layout(flow)), needed)


def test_channels_last_stays_channels_last():
    image, flow = make((6, 8), channels=40)
    image = image.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = safnet_ops.backward_warp(image, flow)
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.sum().backward()  # a gradient of stride 0
    assert image.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flow_of_none_returns_the_image(dtype):
    image, flow = make((11, 70), kind=(dtype, dtype))
    assert torch.equal(safnet_ops.backward_warp(image, torch.zeros_like(flow)), image)


def test_half_precision_flow_is_exact_in_wide_pictures():
    """A normalised grid in half precision is off by up to 1.9 pixels here."""
    ramp = torch.arange(1920, dtype=torch.float32).expand(1, 1, 4, 1920)
    flow = torch.full((1, 2, 4, 1920), 2.5, dtype=torch.float16)
    warped = safnet_ops.backward_warp(ramp, flow.float())
    assert torch.equal(warped[..., :1917], ramp[..., :1917] + 2.5)
    assert torch.equal(warped, safnet_ops.backward_warp(ramp, flow))


def test_border_and_special_flows():
    image = torch.arange(12.0).view(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[0, 0, 0] = torch.tensor([-1e30, torch.inf, -torch.inf, torch.nan])
    flow[0, 1, 1] = torch.tensor([3e9, -torch.inf, torch.inf, torch.nan])
    out = safnet_ops.backward_warp(image, flow)[0, 0]
    assert torch.equal(out[0, :3], torch.tensor([0.0, 3.0, 0.0]))
    assert torch.equal(out[1, :3], torch.tensor([8.0, 1.0, 10.0]))
    assert out[0, 3].isnan()
    assert out[1, 3].isnan()
    assert torch.equal(out[2], image[0, 0, 2])


def test_gradient_at_clamped_border_is_zero():
    image, _ = make((4, 5), n=1, kind=(torch.float64, torch.float64))
    flow = torch.full((1, 2, 4, 5), 100.0, dtype=torch.float64, requires_grad=True)
    safnet_ops.backward_warp(image, flow).sum().backward()
    assert torch.equal(flow.grad, torch.zeros_like(flow))


SPECIAL = [0.0, -0.0, 0.5, -1.0, 1.0, 1e9, -1e9, 1e38, float("inf"), float("-inf"), float("nan")]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_flow(data):
    n, c, h, w = (data.draw(st.integers(low, high)) for low, high in ((0, 2), (1, 4), (1, 9), (1, 70)))
    # Multiples of 1/64 add to a pixel's index without rounding, so float32 and float64 see the same cell.
    values = st.one_of(st.sampled_from(SPECIAL), st.integers(-768, 768).map(lambda steps: steps / 64))
    # A short list of drawn values, repeated: drawing every pixel would be slow and find no more.
    drawn = torch.tensor(data.draw(st.lists(values, min_size=1, max_size=20)))
    flow = drawn.repeat(n * 2 * h * w // len(drawn) + 1)[: n * 2 * h * w].view(n, 2, h, w)
    image = torch.randn(n, c, h, w)
    check_operator(safnet_ops.backward_warp, reference.backward_warp, (image, flow), (True, True), terms=1)


@pytest.mark.parametrize("channels_inside", [False, True])
def test_gradcheck(channels_inside):
    image, flow = make((4, 5), n=1, kind=(torch.float64, torch.float64), spread=2.0)
    if channels_inside:
        image = image.contiguous(memory_format=torch.channels_last)
    inputs = (image.requires_grad_(), flow.requires_grad_())
    assert torch.autograd.gradcheck(safnet_ops.backward_warp, inputs)
    assert torch.autograd.gradgradcheck(safnet_ops.backward_warp, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    image, flow = (layout(x) for x in make((5, 7)))
    torch.library.opcheck(cpp.backward_warp.default, (image, flow))
    grad = torch.randn_like(image)
    for needed in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(cpp.backward_warp_backward.default, (grad, image, flow, needed_bits(needed), False))


def test_compile_and_export():
    image, flow = make((12, 16))

    def loss(image, flow):
        return safnet_ops.backward_warp(image * 2, flow).square().sum()

    leaves = [x.clone().requires_grad_() for x in (image, flow)]
    compiled = [x.clone().requires_grad_() for x in (image, flow)]
    loss(*leaves).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for leaf, other in zip(leaves, compiled, strict=True):
        assert_close("the compiled gradient", other.grad, leaf.grad)

    class Warp(torch.nn.Module):
        def forward(self, image, flow):
            return safnet_ops.backward_warp(image, flow)

    program = torch.export.export(Warp(), (image, flow))
    assert any("safnet_ops.backward_warp" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(image, flow), safnet_ops.backward_warp(image, flow))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic_over_runs_and_threads(layout):
    image, flow = (layout(x) for x in make((150, 160), channels=2, spread=30.0))
    grads = []
    threads = torch.get_num_threads()
    for count in (1, 2, 2, 4, 3):
        torch.set_num_threads(count)
        leaves = image.detach().requires_grad_(), flow.detach().requires_grad_()
        safnet_ops.backward_warp(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    torch.set_num_threads(threads)
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_64bit_offsets_give_the_same_bits(layout, request):
    image, flow = (layout(x) for x in make((20, 70)))
    grad = torch.randn_like(image)
    narrow = cpp.backward_warp(image, flow), *cpp.backward_warp_backward(grad, image, flow, 0b11, False)
    request.getfixturevalue("forced_64bit")
    wide = cpp.backward_warp(image, flow), *cpp.backward_warp_backward(grad, image, flow, 0b11, False)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    """4.4 GB of bfloat16: batch and channel offsets beyond 32 bits."""
    n, c, h, w = 2, 130, 2048, 4200
    assert n * c * h * w > 2**31
    image = torch.zeros(n, c, h, w, dtype=torch.bfloat16)
    image[-1, -1] = torch.randn(h, w)
    flow = torch.full((n, 2, h, w), 1.0, dtype=torch.bfloat16)
    warped = safnet_ops.backward_warp(image, flow)
    assert torch.equal(warped[-1, -1, :-1, :-1], image[-1, -1, 1:, 1:])
    assert not warped[0].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, torch.zeros(1, 2, 4, 5)), TypeError, "backward_warp: image must be a torch.Tensor, got int"),
        (
            (torch.zeros(3, 4, 5), torch.zeros(1, 2, 4, 5)),
            ValueError,
            r"image must have 4 dimensions .* got shape \(3, 4, 5\)",
        ),
        (
            (torch.zeros(1, 3, 4, 5).int(), torch.zeros(1, 2, 4, 5)),
            TypeError,
            "image must be float32.* got torch.int32",
        ),
        (
            (torch.zeros(1, 3, 4, 5), torch.zeros(1, 4, 5, 2)),
            ValueError,
            r"backward_warp: flow must be \(N, 2, h, w\) or \(1, 2, h, w\) = \(1, 2, 5, 2\), got \(1, 4, 5, 2\)",
        ),
        (
            (torch.zeros(1, 3, 4, 5), torch.zeros(1, 2, 4, 5).double()),
            TypeError,
            "flow must be float64 if and only if the image is: torch.float32, got torch.float64",
        ),
        (
            (torch.zeros(1, 3, 4, 5), torch.zeros(1, 2, 4, 5, device="meta")),
            ValueError,
            "flow must be on cpu like the image, got meta",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        safnet_ops.backward_warp(*arguments)
