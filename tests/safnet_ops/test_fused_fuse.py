"""fused_fuse: the C++ kernels against the reference, and the reference against the formula written out."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import safnet_ops
from operator_inputs import fusion_inputs
from safnet_ops import reference
from tests.support.operators import KINDS, LAYOUTS, SIZES, assert_close, check_operator

cpp = torch.ops.safnet_ops


def make(size=(5, 7), n=2, channels=3, kind=(torch.float32, torch.float32), explicit=False, spread=4.0):
    """The seven common arguments, then reference_ldr or three explicit weights."""
    weights = (channels,) * 3 if explicit else ()
    return fusion_inputs(size, n=n, channels=channels, dtype=kind[0], geometry=kind[1], pixels=spread, weights=weights)


def caller(function, **options):
    """`function` with the arguments of `make` in a row."""

    def call(*inputs):
        if len(inputs) == 8:
            return function(*inputs, **options)
        return function(*inputs[:7], weights=tuple(inputs[7:]), **options)

    return call


def registered(inputs):
    """The same arguments as the registered operator takes them."""
    return (*inputs, None, None, None) if len(inputs) == 8 else (*inputs[:7], None, *inputs[7:])


def test_reference_equals_the_formula():
    """Equations 3 to 5 for one pixel without motion, worked out by hand."""
    z, m1, m3 = 0.75, 0.25, 0.5
    values = [torch.full((1, 1, 1, 1), v, dtype=torch.float64) for v in (0.2, 0.4, 0.8)]
    flow = torch.zeros(1, 2, 1, 1, dtype=torch.float64)
    masks = [torch.full((1, 1, 1, 1), m, dtype=torch.float64) for m in (m1, m3)]
    fused = reference.fused_fuse(*values, flow, flow, *masks, torch.full_like(values[0], z))
    weight_short, weight_long = 0.5 * m1, 0.0
    weight_reference = 0.5 + 0.5 * (1 - m1)
    assert fused.item() == pytest.approx(weight_short * 0.2 + weight_reference * 0.4 + weight_long * 0.8, abs=1e-8)


def test_triangle_weights_sum_to_one():
    weights = reference.triangle_weights(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert torch.allclose(sum(weights), torch.ones(101, dtype=torch.float64), atol=1e-15)
    assert all(weight.min() >= 0 for weight in weights)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("mask_logits", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_reference(kind, layout, mask_logits, explicit, poisoned):
    inputs = [layout(x) for x in make((17, 70), kind=kind, explicit=explicit)]
    operator = caller(safnet_ops.fused_fuse, mask_logits=mask_logits)
    expected = caller(reference.fused_fuse, mask_logits=mask_logits)
    check_operator(operator, expected, inputs, [True] * len(inputs))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sizes(size, channels, poisoned):
    inputs = make(size, channels=channels)
    check_operator(caller(safnet_ops.fused_fuse), caller(reference.fused_fuse), inputs, [True] * 8)


@pytest.mark.parametrize("explicit", [False, True])
def test_every_gradient_alone(explicit):
    inputs = make((9, 13), explicit=explicit)
    for position in range(len(inputs)):
        needed = [position == other for other in range(len(inputs))]
        check_operator(caller(safnet_ops.fused_fuse), caller(reference.fused_fuse), inputs, needed)
    check_operator(caller(safnet_ops.fused_fuse), caller(reference.fused_fuse), inputs, [False] * len(inputs))


def test_one_channel_weights_are_shared_by_the_channels():
    inputs = make(explicit=True)
    weights = [weight[:, :1].clone().requires_grad_() for weight in inputs[7:]]
    fused = safnet_ops.fused_fuse(*inputs[:7], weights=tuple(weights))
    assert torch.equal(fused, safnet_ops.fused_fuse(*inputs[:7], weights=tuple(w.expand(2, 3, 5, 7) for w in weights)))
    fused.sum().backward()
    assert all(weight.grad.shape == (2, 1, 5, 7) for weight in weights)


def test_sliced_exposures_are_not_copied():
    """x[:, 0:3] and x[:, 3:6] of six-channel exposures, as the model calls it."""
    inputs = fusion_inputs((9, 70), n=2, exposures=True)
    check_operator(caller(safnet_ops.fused_fuse), caller(reference.fused_fuse), inputs, [False] * 8)


def test_kinks_of_the_triangle_weights():
    """At z = 0.5, 0 and 1 the derivative is the one-sided one that autograd takes."""
    inputs = make((3, 5), n=1, kind=(torch.float64, torch.float64))
    inputs[7] = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).repeat(15).view(1, 3, 3, 5)
    check_operator(caller(safnet_ops.fused_fuse), caller(reference.fused_fuse), inputs, [True] * 8)


def test_weights_of_zero_stay_finite():
    inputs = make(explicit=True)
    inputs[7:] = [torch.zeros_like(weight) for weight in inputs[7:]]
    assert torch.equal(caller(safnet_ops.fused_fuse)(*inputs), torch.zeros(2, 3, 5, 7))


def test_extreme_logits():
    inputs = make((2, 4), n=1)
    inputs[5] = torch.tensor([-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4, 1.0]).view(1, 1, 2, 4)
    operator, expected = (caller(f, mask_logits=True) for f in (safnet_ops.fused_fuse, reference.fused_fuse))
    check_operator(operator, expected, inputs, [True] * 8)


def test_nan_flow_marks_only_its_pixel():
    inputs = make((4, 6), n=1)
    inputs[3][0, 0, 1, 2] = torch.nan
    fused = safnet_ops.fused_fuse(*inputs)
    expected = torch.zeros(1, 3, 4, 6, dtype=torch.bool)
    expected[0, :, 1, 2] = True
    assert torch.equal(fused.isnan(), expected)


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 2),
    size=st.tuples(st.integers(1, 9), st.integers(1, 70)),
    channels=st.integers(1, 4),
    flow=st.sampled_from([0.0, 0.5, -3.25, 1e9, -1e30, float("inf"), float("nan")]),
    explicit=st.booleans(),
    logits=st.booleans(),
)
def test_any_shape_and_flow(n, size, channels, flow, explicit, logits):
    inputs = make(size, n=n, channels=channels, explicit=explicit)
    inputs[3][:, :, ::2] = flow
    operator, expected = (caller(f, mask_logits=logits) for f in (safnet_ops.fused_fuse, reference.fused_fuse))
    # Where a pixel is sampled is rounded at the size of its index, up to 70, and these pictures jump from pixel to pixel.
    check_operator(operator, expected, inputs, [True] * len(inputs), slack=10, terms=1)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("mask_logits", [False, True])
def test_gradcheck(explicit, mask_logits):
    inputs = make((3, 4), n=1, channels=2, kind=(torch.float64, torch.float64), explicit=explicit, spread=1.5)
    inputs[7] = inputs[7] * 0.4 + 0.05  # away from the kink at 0.5
    for value in inputs:
        value.requires_grad_()
    operator = caller(safnet_ops.fused_fuse, mask_logits=mask_logits)
    assert torch.autograd.gradcheck(operator, inputs)
    assert torch.autograd.gradgradcheck(operator, inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("explicit", [False, True])
def test_opcheck(layout, explicit):
    inputs = registered([layout(x) for x in make(explicit=explicit)])
    torch.library.opcheck(cpp.fused_fuse.default, (*inputs, False))
    for needs in (0, 0b00001111000, 0b11111111111):
        grad = torch.randn(2, 3, 5, 7)
        torch.library.opcheck(cpp.fused_fuse_backward.default, (grad, *inputs, True, needs, False))


@pytest.mark.parametrize("explicit", [False, True])
def test_compile(explicit):
    inputs = make((12, 16), explicit=explicit)
    leaves, compiled = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
    operator = caller(safnet_ops.fused_fuse, mask_logits=True)

    def loss(*inputs):
        return operator(*(x * 1.5 for x in inputs)).square().sum()

    loss(*leaves).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled).backward()
    for position, (leaf, other) in enumerate(zip(leaves, compiled, strict=True)):
        assert_close(f"compiled gradient {position}", other.grad, leaf.grad)


def test_export():
    class Fuse(torch.nn.Module):
        def forward(self, *inputs):
            return safnet_ops.fused_fuse(*inputs)

    inputs = tuple(make())
    program = torch.export.export(Fuse(), inputs)
    assert any("safnet_ops.fused_fuse" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(*inputs), safnet_ops.fused_fuse(*inputs))


def test_autocast_takes_half_precision_masks_beside_float32_images():
    inputs = make()
    inputs[3:7] = [x.bfloat16() for x in inputs[3:7]]
    with torch.autocast("cpu", torch.bfloat16):
        fused = safnet_ops.fused_fuse(*inputs)
    inputs[3:7] = [x.float() for x in inputs[3:7]]
    assert torch.equal(fused, safnet_ops.fused_fuse(*inputs))


def test_deterministic_over_runs_and_threads():
    inputs = make((150, 160), spread=30.0)
    grads = []
    threads = torch.get_num_threads()
    for count in (1, 2, 2, 4, 3):
        torch.set_num_threads(count)
        leaves = [x.clone().requires_grad_() for x in inputs]
        safnet_ops.fused_fuse(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.set_num_threads(threads)
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_64bit_offsets_give_the_same_bits(layout, request):
    inputs = registered([layout(x) for x in make((20, 70))])
    grad = torch.randn(2, 3, 20, 70)
    everything = (grad, *inputs, False, 0b11111111111, False)
    narrow = cpp.fused_fuse(*inputs, False), *cpp.fused_fuse_backward(*everything)
    request.getfixturevalue("forced_64bit")
    wide = cpp.fused_fuse(*inputs, False), *cpp.fused_fuse_backward(*everything)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_no_extra_memory():
    """Nothing is allocated beside the result, nor beside the gradients of flows and masks."""
    inputs = make((64, 64), n=1)
    for leaf in inputs[3:7]:
        leaf.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        fused = safnet_ops.fused_fuse(*inputs)
        torch.autograd.backward(fused, torch.ones_like(fused))
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    results = fused.nbytes * 2 + sum(leaf.grad.nbytes for leaf in inputs[3:7])
    assert allocated <= results + 4096


def replaced(position, value):
    inputs = make()
    inputs[position] = value
    return inputs


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (replaced(2, None), {}, TypeError, "fused_fuse: long must be a torch.Tensor, got NoneType"),
        (
            replaced(1, torch.zeros(2, 3, 5, 7).half()),
            {},
            TypeError,
            "reference must be torch.float32 like short, got torch.float16",
        ),
        (
            replaced(1, torch.zeros(2, 3, 5, 8)),
            {},
            ValueError,
            r"reference must be .* = \(2, 3, 5, 7\), got \(2, 3, 5, 8\)",
        ),
        (
            replaced(3, torch.zeros(2, 5, 7, 2)),
            {},
            ValueError,
            r"flow_short must be \(N, 2, H, W\) = \(2, 2, 5, 7\), got \(2, 5, 7, 2\)",
        ),
        (
            replaced(6, torch.zeros(2, 3, 5, 7)),
            {},
            ValueError,
            r"mask_long must be \(N, 1, H, W\) = \(2, 1, 5, 7\), got",
        ),
        (
            replaced(5, torch.zeros(2, 1, 5, 7).double()),
            {},
            TypeError,
            "mask_short must be float64 if and only if the image is",
        ),
        (
            replaced(7, torch.zeros(2, 1, 5, 7)),
            {},
            ValueError,
            r"reference_ldr must be \(N, C, H, W\) like short = \(2, 3, 5, 7\)",
        ),
        (make()[:7], {}, ValueError, "give either reference_ldr or weights, got neither"),
        (make(), {"weights": make()[:3]}, ValueError, "give either reference_ldr or weights, got both"),
        (make()[:7], {"weights": make()[:2]}, ValueError, "weights must be three tensors .* got 2 of them"),
        (
            make()[:7],
            {"weights": [torch.zeros(2, 2, 5, 7)] * 3},
            ValueError,
            r"weights\[0\] must be \(N, C or 1, H, W\)",
        ),
        (
            make(),
            {"backend": "opencl"},
            ValueError,
            "backend must be one of reference, cpp, cuda, triton, got 'opencl'",
        ),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        safnet_ops.fused_fuse(*arguments, **options)
