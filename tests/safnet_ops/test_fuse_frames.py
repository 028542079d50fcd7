"""fuse_frames against its definition, written out in float64, and against fused_fuse for three frames."""

import pytest
import torch

import safnet_ops
from safnet_ops import fuse_frames, reference
from tests.support.operators import KINDS, assert_close, channels_last, contiguous

EPSILON = 1e6  # times the tolerance of float64: passes add 1e-9 to sums of weights
BACKENDS = ("reference", "cpp")
TABLES = {
    "triangle": lambda z: torch.where(z < 0.5, 2 * z, 2 - 2 * z),
    "hat": lambda z: 1 - (2 * z - 1) ** 12,
    "gaussian": lambda z: torch.exp(-((z - 0.5) ** 2) / 0.08),
}


def make(count, size=(9, 13), n=2, channels=3, masked=1, kind=(torch.float64, torch.float64)):
    """The reference, and `count` frames, flows and masks."""
    torch.manual_seed(0)
    own, *frames = (torch.rand(n, channels, *size).to(kind[0]) for _ in range(count + 1))
    flows = [(3 * torch.randn(n, 2, *size)).to(kind[1]) for _ in range(count)]
    return own, frames, flows, [torch.rand(n, masked, *size).to(kind[1]) for _ in range(count)]


def mean(own, frames, flows, masks, weights):
    """The formula of the docstring, as it stands there."""
    base, *outer = weights
    weight = base + sum(value * (1 - mask) for value, mask in zip(outer, masks, strict=True))
    parts = [value * mask for value, mask in zip(outer, masks, strict=True)]
    warped = [reference.backward_warp(frame, flow) for frame, flow in zip(frames, flows, strict=True)]
    total = weight * own + sum(part * frame for part, frame in zip(parts, warped, strict=True))
    return total / (weight + sum(parts))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [1, 3])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_explicit_weights(count, kind, masked, backend):
    inputs = make(count, masked=masked, kind=kind)
    weights = [(0.1 + torch.rand(2, 1 + 2 * (place % 2), 9, 13)).to(kind[0]) for place in range(count + 1)]
    found = fuse_frames(*inputs, weights=weights, backend=backend)
    exact = inputs[0].double(), *([value.double() for value in values] for values in inputs[1:])
    expected = mean(*exact, [weight.double() for weight in weights])
    assert found.dtype == kind[0]
    assert_close(
        "result", found, expected, slack=EPSILON if kind[0] == torch.float64 else (count + 1) // 2
    )  # a rounding a pass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("table", TABLES)
def test_tables(table, aligned, backend):
    own, frames, flows, masks = make(4)
    ldr = [torch.rand_like(own) for _ in range(5)]
    found = fuse_frames(own, frames, flows, masks, ldr=ldr, table=table, weigh_aligned=aligned, backend=backend)
    looked_up = ldr[:1] + [
        reference.backward_warp(value, flow) if aligned else value for value, flow in zip(ldr[1:], flows, strict=True)
    ]
    weights = [TABLES[table](value) for value in looked_up]
    assert_close("result", found, mean(own, frames, flows, masks, weights), slack=1e10)  # the reference's least weight
    other = fuse_frames(own, frames, flows, masks, ldr=ldr, table=table, weigh_aligned=not aligned)
    assert (found - other).abs().max() > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_frames_are_fused_fuse(backend):
    own, frames, flows, masks = make(2)
    weights = [torch.rand_like(own) for _ in range(3)]
    found = fuse_frames(own, frames, flows, masks, weights=weights, backend=backend)
    three = safnet_ops.fused_fuse(
        frames[0], own, frames[1], *flows, *masks, weights=(weights[1], weights[0], weights[2]), backend=backend
    )
    assert_close("result", found, three, slack=EPSILON)


def test_order_of_frames_is_free():
    own, frames, flows, masks = make(5)
    weights = [torch.rand_like(own) for _ in range(6)]
    found = fuse_frames(own, frames, flows, masks, weights=weights)
    turned = fuse_frames(own, frames[::-1], flows[::-1], masks[::-1], weights=[weights[0], *weights[:0:-1]])
    assert_close("result", found, turned, slack=EPSILON)


def test_logits_and_no_masks():
    own, frames, flows, masks = make(3, masked=3)
    weights = [torch.rand_like(own) for _ in range(4)]
    logits = [mask.logit() for mask in masks]
    found = fuse_frames(own, frames, flows, logits, weights=weights, mask_logits=True)
    assert_close("result", found, fuse_frames(own, frames, flows, masks, weights=weights), slack=10)
    whole = [torch.ones_like(mask) for mask in masks]
    assert torch.equal(
        fuse_frames(own, frames, flows, weights=weights), fuse_frames(own, frames, flows, whole, weights=weights)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_gradients(count, backend):
    """Of every input, by a table and by explicit weights; forward mode too."""
    own, frames, flows, masks = make(count, size=(3, 4), n=1)
    ldr = [torch.rand_like(own) for _ in range(count + 1)]
    leaves = [value.requires_grad_() for value in (own, *frames, *flows, *masks, *ldr)]

    def fused(name):
        def call(*values):
            own, rest = values[0], values[1:]
            lists = [list(rest[start * count : (start + 1) * count]) for start in range(3)]
            return fuse_frames(own, *lists, **{name: list(rest[3 * count :])}, backend=backend)

        return call

    for name in ("ldr", "weights"):
        assert torch.autograd.gradcheck(fused(name), leaves, check_forward_ad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("lost", ["flow", "mask"])
def test_what_is_nan_is_lost_alone(lost, place, backend):
    """Wherever the NaN stands: the result is NaN there, and nothing gets a gradient from that pixel."""
    own, frames, flows, masks = make(3, n=1)
    (flows if lost == "flow" else masks)[place][0, 0, 4, 5] = torch.nan
    ldr = [torch.rand_like(own) for _ in range(4)]
    leaves = [value.requires_grad_() for value in (own, *frames, *flows, *masks, *ldr)]
    found = fuse_frames(own, frames, flows, masks, ldr=ldr, backend=backend)
    gone = found.isnan()
    assert gone[0, :, 4, 5].all()
    assert gone.sum() == 3
    torch.where(gone, 0, found).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not own.grad[0, :, 4, 5].any()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_clipped_in_all_exposures_is_the_reference(table, value):
    own, frames, flows, masks = make(2)
    ldr = [torch.full_like(own, value)] * 3
    found = fuse_frames(own, frames, flows, masks, ldr=ldr, table=table)
    if table != "gaussian":  # whose weight is never zero
        assert (found - own).abs().max() < 1e-4


@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_layout(layout):
    own, frames, flows, masks = make(3, kind=(torch.float32, torch.float32))
    weights = [torch.rand_like(own) for _ in range(4)]
    found = fuse_frames(layout(own), [layout(frame) for frame in frames], flows, masks, weights=weights)
    assert found.stride() == layout(own).stride()


def test_autocast_mixes_dtypes():
    own, frames, flows, masks = make(3, kind=(torch.float32, torch.float32))
    weights = [torch.rand_like(own) for _ in range(4)]
    expected = fuse_frames(own, frames, flows, masks, weights=weights)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [mask.bfloat16() for mask in masks]
        found = fuse_frames(own, [frames[0].bfloat16(), *frames[1:]], flows, mixed, weights=weights)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 2e-2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile():
    own, frames, flows, masks = make(3, kind=(torch.float32, torch.float32))
    ldr = [torch.rand_like(own) for _ in range(4)]
    compiled = torch.compile(fuse_frames, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(own, frames, flows, masks, ldr=ldr), fuse_frames(own, frames, flows, masks, ldr=ldr))


def arguments(**changed):
    own, frames, flows, masks = make(2, kind=(torch.float32, torch.float32))
    given = {"reference": own, "frames": frames, "flows": flows, "masks": masks, "weights": [torch.ones_like(own)] * 3}
    return given | changed


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"frames": torch.rand(2, 3, 9, 13)}, TypeError, "frames must be a list of tensors, got Tensor"),
        ({"frames": []}, ValueError, "frames must hold 1 to 8 tensors, got 0"),
        ({"frames": [torch.rand(2, 3, 9, 13)] * 9}, ValueError, "frames must hold 1 to 8 tensors, got 9"),
        ({"flows": [torch.rand(2, 2, 9, 13)]}, ValueError, "flows must hold 2 tensors, one a frame, got 1"),
        ({"masks": [torch.rand(2, 1, 9, 13)] * 3}, ValueError, "masks must hold 2 tensors, one a frame, got 3"),
        ({"weights": [torch.rand(2, 1, 9, 13)] * 2}, ValueError, "weights must hold 3 tensors, one of the reference"),
        ({"weights": None}, ValueError, "give either ldr or weights, got neither"),
        ({"ldr": [torch.rand(2, 3, 9, 13)] * 3}, ValueError, "give either ldr or weights, got both"),
        ({"table": "tent"}, ValueError, "table must be one of triangle, hat, gaussian, got 'tent'"),
        (
            {"frames": [torch.rand(2, 3, 9, 13), torch.rand(2, 3, 9, 12)]},
            ValueError,
            r"frames\[1\] must be .* = \(2, 3, 9, 13\), got \(2, 3, 9, 12\)",
        ),
        (
            {"frames": [torch.rand(2, 3, 9, 13).half()] * 2},
            TypeError,
            r"frames\[0\] must be torch.float32 like reference, got torch.float16",
        ),
        ({"flows": [torch.rand(2, 1, 9, 13)] * 2}, ValueError, r"flows\[0\] must be \(N, 2, H, W\) = \(2, 2, 9, 13\)"),
        ({"flows": [torch.rand(2, 2, 9, 13).half()] * 2}, TypeError, r"flows\[0\] must be torch.float32, got"),
        ({"masks": [torch.rand(2, 2, 9, 13)] * 2}, ValueError, r"masks\[0\] must be \(N, 1 or C, H, W\)"),
        ({"masks": [torch.rand(2, 1, 9, 13).int()] * 2}, TypeError, r"masks\[0\] must be float32"),
        ({"weights": [torch.rand(2, 2, 9, 13)] * 3}, ValueError, r"weights\[0\] must be"),
        ({"weights": [1, 2, 3]}, TypeError, r"weights\[0\] must be a torch.Tensor, got int"),
        ({"backend": "numpy"}, ValueError, "backend must be one of .* got 'numpy'"),
    ],
    ids=str,
)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        fuse_frames(**arguments(**changed))
