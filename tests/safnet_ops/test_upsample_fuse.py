"""upsample_fuse: the C++ kernel against the reference, and the reference against interpolate + fused_fuse."""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import safnet_ops
from operator_inputs import upsample_inputs
from safnet_ops import reference
from tests.support.operators import KINDS, LAYOUTS, assert_close

cpp = torch.ops.safnet_ops
RESULTS = ("fused", "flow_short", "flow_long", "mask_short", "mask_long")


def make(size=(21, 70), low=(16, 48), n=2, kind=(torch.float32, torch.float32)):
    return upsample_inputs(size, low, n=n, dtype=kind[0], geometry=kind[1])


def check(inputs):
    results = safnet_ops.upsample_fuse(*inputs)
    expected = reference.upsample_fuse(*(x.double() for x in inputs))
    for name, result, exact in zip(RESULTS, results, expected, strict=True):
        # Where a pixel is sampled is rounded at the size of its index, and these pictures jump from pixel to pixel.
        assert_close(name, result, exact, slack=4 if name == "fused" else 1)
    return results


def test_reference_is_interpolate_sigmoid_and_fuse():
    inputs = make(size=(24, 60), low=(16, 48), kind=(torch.float64, torch.float64))
    fused, flow_short, _, mask_short, _ = reference.upsample_fuse(*inputs)
    resized = F.interpolate(inputs[3], (24, 60), mode="bilinear", align_corners=False)
    assert torch.allclose(flow_short[:, 0], resized[:, 0] * 60 / 48)
    assert torch.allclose(flow_short[:, 1], resized[:, 1] * 24 / 16)
    logits = F.interpolate(inputs[5], (24, 60), mode="bilinear", align_corners=False)
    assert torch.allclose(mask_short, logits.sigmoid())
    assert fused.shape == (2, 3, 24, 60)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference(kind, layout, poisoned):
    results = check([layout(x) for x in make(kind=kind)])
    assert results[0].dtype == kind[0]
    assert all(result.dtype == (torch.float64 if kind[0] == torch.float64 else torch.float32) for result in results[1:])


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 2),
    size=st.tuples(st.integers(1, 40), st.integers(1, 140)),
    low=st.tuples(st.integers(1, 20), st.integers(1, 70)),
)
def test_any_size(n, size, low):
    check(make(size, low, n, (torch.float64, torch.float64)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    torch.library.opcheck(cpp.upsample_fuse.default, tuple(layout(x) for x in make()))


def test_gradients():
    """Of every input, through every result, those of the reference."""
    found, expected = ([x.requires_grad_() for x in make(size=(5, 6), low=(3, 4), n=1)] for _ in range(2))
    for value, other in zip(found, expected, strict=True):
        other.data.copy_(value.data)
    for operator, inputs in ((safnet_ops.upsample_fuse, found), (reference.upsample_fuse, expected)):
        sum((index * result).square().sum() for index, result in enumerate(operator(*inputs), 1)).backward()
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_compile_and_export():
    inputs = tuple(make())
    compiled = torch.compile(safnet_ops.upsample_fuse, fullgraph=True, backend="aot_eager")
    for result, expected in zip(compiled(*inputs), safnet_ops.upsample_fuse(*inputs), strict=True):
        assert torch.equal(result, expected)


def test_64bit_offsets_give_the_same_bits(request):
    inputs = make()
    narrow = cpp.upsample_fuse(*inputs)
    request.getfixturevalue("forced_64bit")
    assert all(torch.equal(a, b) for a, b in zip(narrow, cpp.upsample_fuse(*inputs), strict=True))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 3, 21), r"upsample_fuse: short must have 4 dimensions .* got shape \(2, 3, 21\)"),
        (4, torch.zeros(2, 2, 16, 40), r"flow_long must be \(N, 2, h, w\) = \(2, 2, 16, 48\), got \(2, 2, 16, 40\)"),
        (5, torch.zeros(2, 2, 16, 48), r"mask_short must be \(N, 1, h, w\) = \(2, 1, 16, 48\), got"),
        (7, torch.zeros(2, 3, 21, 71), r"reference_ldr must be \(N, C, H, W\) like short"),
    ],
)
def test_errors(position, value, message):
    inputs = make()
    inputs[position] = value
    with pytest.raises(ValueError, match=message):
        safnet_ops.upsample_fuse(*inputs)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_explicit_weights(kind, channels, backend):
    *inputs, _ = make(kind=kind)
    weights = tuple(torch.rand(2, channels, 21, 70).to(kind[0]) for _ in range(3))
    results = safnet_ops.upsample_fuse(*inputs, weights=weights, backend=backend)
    exact = [x.double() for x in inputs]
    full = reference.upsample_alignment(exact[3:], exact[0])
    fused = reference.fused_fuse(*exact[:3], *full, weights=[x.double().expand(2, 3, 21, 70) for x in weights])
    for name, result, expected in zip(RESULTS, results, (fused, *full), strict=True):
        assert_close(name, result, expected, slack=4 if name == "fused" else 1)


def test_explicit_weights_get_gradients():
    *inputs, _ = make(size=(5, 6), low=(3, 4), n=1)
    weights = tuple(torch.rand(1, 3, 5, 6, requires_grad=True) for _ in range(3))
    safnet_ops.upsample_fuse(*inputs, weights=weights)[0].sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in weights)


def test_either_ldr_or_weights():
    *inputs, ldr = make()
    with pytest.raises(ValueError, match="upsample_fuse: give either reference_ldr or weights, got neither"):
        safnet_ops.upsample_fuse(*inputs)
    with pytest.raises(ValueError, match="upsample_fuse: give either reference_ldr or weights, got both"):
        safnet_ops.upsample_fuse(*inputs, ldr, weights=(ldr, ldr, ldr))
