"""fused_fuse's CUDA kernels, executed on the CPU, against the reference."""

import itertools

import pytest
import torch

import ptxsim
import safnet_ops
from operator_inputs import fusion_inputs
from safnet_ops import reference
from tests.support.operators import DTYPES, LAYOUTS, assert_close, channels_last, check_operator, contiguous, gradients


def inputs(shape=(2, 3, 5, 12), dtype=torch.float32, geometry=None, explicit=False):
    n, channels, *size = shape
    weights = (channels,) * 3 if explicit else ()
    return fusion_inputs(size, n=n, channels=channels, dtype=dtype, geometry=geometry, weights=weights)


def call(function, logits=False):
    """`function` with the explicit weights as plain arguments behind the masks."""

    def wrapped(*values):
        if len(values) == 10:
            return function(*values[:7], weights=values[7:], mask_logits=logits)
        return function(*values, mask_logits=logits)

    return wrapped


def compare(values, needed=None, logits=False, **more):
    needed = needed or [True] * len(values)
    return check_operator(
        call(safnet_ops.fused_fuse, logits), call(reference.fused_fuse, logits), values, needed, **more
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(cuda, dtype, layout):
    compare([layout(value) for value in inputs(dtype=dtype)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", [False, True])
def test_explicit_weights_and_logits(cuda, dtype, logits):
    compare(inputs(dtype=dtype, explicit=True), logits=logits)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 7), (2, 1, 6, 1), (1, 5, 9, 11)], ids=str)
def test_sizes(cuda, shape):
    compare(inputs(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_images_with_float32_flows(cuda, dtype):
    compare(inputs((1, 3, 4, 8), dtype, torch.float32))


@pytest.mark.parametrize("explicit", [False, True])
def test_every_gradient_alone(cuda, explicit):
    values = inputs((1, 2, 4, 6), explicit=explicit)
    for position in range(len(values)):
        compare(values, [i == position for i in range(len(values))])


def test_pairs_of_gradients_compute_nothing_else(cuda):
    values = inputs((1, 2, 3, 4))
    grad = torch.ones_like(values[0])
    for pair in itertools.combinations(range(8), 2):
        found = cuda.call(
            "fused_fuse_backward", grad, *values, None, None, None, False, sum(1 << i for i in pair), False
        )
        assert [i for i, value in enumerate(found) if value.numel()] == list(pair)


def test_images_are_slices_of_six_channels(cuda):
    """As callers have them: linear and LDR picture in one tensor."""
    compare(fusion_inputs((5, 8), n=2, exposures=True))


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("width", [8, 9])
def test_64bit_offsets_give_the_same_bits(cuda, monkeypatch, layout, width):
    values = [layout(value) for value in inputs((2, 3, 4, width))] + [None] * 3
    grad = torch.randn(2, 3, 4, width)

    def run():
        return cuda.call("fused_fuse", *values, False), *cuda.call(
            "fused_fuse_backward", grad, *values, False, 0xFF, True
        )

    narrow = run()
    monkeypatch.setenv("SAFNET_OPS_FORCE_64BIT_OFFSETS", "1")
    assert all(torch.equal(one, other) for one, other in zip(narrow, run(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_gradient_under_any_order(cuda, dtype):
    values = inputs((1, 3, 20, 31), dtype)
    for flow in values[3:5]:
        flow *= 0.3
        flow[:, 0] -= torch.arange(31).to(dtype) * 0.5  # two pixels meet in one
    grad = torch.randn_like(values[0])
    found = []
    for seed in (None, 3, 4):
        with ptxsim.options(seed=seed):
            found.append(cuda.call("fused_fuse_backward", grad, *values, None, None, None, False, 0xFF, True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    _, expected = gradients(call(reference.fused_fuse), [v.double() for v in values], [True] * 8, grad.double())
    for position in (0, 1, 2, 5, 6):  # flows may lie on cell borders now
        assert_close(f"gradient {position}", found[0][position], expected[position])


def test_nan_flow_and_mask_stay_at_their_pixel(cuda):
    values = inputs((1, 3, 4, 8))
    values[3][0, 0, 1, 2] = float("nan")
    values[6][0, 0, 2, 5] = float("nan")
    values[4][0, 1, 3, 3] = float("inf")
    out = safnet_ops.fused_fuse(*values)
    assert out.isnan().any(1).nonzero().tolist() == [[0, 1, 2], [0, 2, 5]]
    torch.testing.assert_close(out, reference.fused_fuse(*values), equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (1, 0, 4, 5), (1, 3, 4, 0)], ids=str)
def test_empty(cuda, shape):
    values = [value.requires_grad_() for value in inputs(shape)]
    out = safnet_ops.fused_fuse(*values)
    assert out.shape == shape
    for value, grad in zip(values, torch.autograd.grad(out.sum(), values), strict=True):
        assert grad.shape == value.shape
        assert grad.eq(0).all()


def test_five_exposures(cuda):
    torch.manual_seed(0)
    shapes = [(1, 3, 3, 5)] * 10 + [(1, 2, 3, 5)] * 4 + [(1, 1, 3, 5)] * 4

    def fused(backend):
        def call(*values):
            images, flows, masks = values[:5], values[10:14], values[14:]
            return safnet_ops.fuse_frames(images[0], images[1:], flows, masks, ldr=values[5:10], backend=backend)

        return call

    check_operator(fused(None), fused("reference"), [torch.rand(shape) for shape in shapes], [True] * 18)
