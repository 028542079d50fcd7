"""census_loss: the C++ kernels against the reference, and the reference against a loop over pixels."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

import safnet_ops
from operator_inputs import census_inputs
from safnet_ops import reference
from tests.support.operators import DTYPES, LAYOUTS, channels_last, check_operator

cpp = torch.ops.safnet_ops
SIZES = [(1, 1), (1, 9), (7, 1), (5, 7), (7, 7), (8, 9), (33, 65), (70, 40)]  # blocks of rows, broken and whole


def make(size=(12, 15), n=2, channels=3, dtype=torch.float32):
    return census_inputs(size, n=n, channels=channels, dtype=dtype)


def bound(function, patch_size):
    def call(prediction, target):
        return function(prediction, target, patch_size)

    return call


def check(prediction, target, patch_size=7, slack=1.0):
    operator, expected = (bound(f, patch_size) for f in (safnet_ops.census_loss, reference.census_loss))
    return check_operator(operator, expected, (prediction, target), (True, False), slack=slack)


def loss_of_loops(prediction, target, patch_size):
    """The definition, pixel by pixel."""
    radius = patch_size // 2
    grey = [picture.mean(0).tolist() for picture in (prediction, target)]
    height, width = prediction.shape[1:]
    total = 0.0
    for y in range(radius, height - radius):
        for x in range(radius, width - radius):
            for dy in range(-radius, radius + 1):
                for dx in range(-radius, radius + 1):
                    n = [
                        (g[y + dy][x + dx] - g[y][x]) / math.sqrt(0.81 + (g[y + dy][x + dx] - g[y][x]) ** 2)
                        for g in grey
                    ]
                    squared = (n[0] - n[1]) ** 2
                    total += squared / (0.1 + squared)
    return total / (height * width * patch_size**2)


@pytest.mark.parametrize("patch_size", [3, 5])
def test_reference_equals_loops(patch_size):
    prediction, target = make((9, 11), n=1, dtype=torch.float64)
    expected = loss_of_loops(prediction[0], target[0], patch_size)
    assert reference.census_loss(prediction, target, patch_size).item() == pytest.approx(expected, rel=1e-12)
    assert safnet_ops.census_loss(prediction, target, patch_size).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matches_reference(dtype, layout, size, poisoned):
    prediction, target = (layout(picture) for picture in make(size, dtype=dtype))
    check(prediction, target)


@pytest.mark.parametrize("patch_size", [3, 5, 9, 15])
@pytest.mark.parametrize("channels", [1, 2, 11])
def test_any_patch_and_channels(patch_size, channels):
    prediction, target = make((40, 37), channels=channels)
    check(prediction, target, patch_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_is_a_scalar_of_the_computing_type(dtype):
    loss = safnet_ops.census_loss(*make(dtype=dtype))
    assert loss.shape == ()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_equal_pictures_and_brightness():
    prediction, _ = make((20, 20))
    assert safnet_ops.census_loss(prediction, prediction) < 1e-12
    assert safnet_ops.census_loss(prediction, prediction + 5) < 1e-9
    assert safnet_ops.census_loss(prediction, 5 * prediction) > 0.01


def test_high_contrast():
    """Linear radiance may span many decades. Grey is rounded at its own size, the loss looks at differences near one."""
    prediction, target = (torch.exp(20 * picture) for picture in make((20, 30)))
    check(prediction, target, slack=10)


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_expanded(dimension):
    prediction, target = (x.narrow(dimension, 0, 1).expand(2, 3, 12, 15) for x in make())
    check(prediction, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", [(True, True), (False, True)])
def test_both_pictures_get_gradients(dtype, needed):
    pictures = make(dtype=dtype)
    operator, expected = (bound(f, 5) for f in (safnet_ops.census_loss, reference.census_loss))
    check_operator(operator, expected, pictures, needed)


def test_no_gradient_of_what_is_detached():
    prediction, target = (picture.requires_grad_() for picture in make())
    safnet_ops.census_loss(prediction, target.detach()).backward()
    assert prediction.grad.abs().sum() > 0
    assert target.grad is None


def test_derivatives_of_both_pictures():
    pictures = tuple(picture.requires_grad_() for picture in make((6, 7), n=2, channels=2, dtype=torch.float64))
    loss = bound(safnet_ops.census_loss, 3)
    assert torch.autograd.gradcheck(loss, pictures, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, pictures)


def test_channels_last_gradient():
    prediction, target = make()
    prediction = channels_last(prediction).requires_grad_()
    safnet_ops.census_loss(prediction, target).backward()
    assert prediction.grad.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch_is_nan():
    prediction, target = make(n=0)
    prediction.requires_grad_()
    loss = safnet_ops.census_loss(prediction, target)
    assert loss.isnan()
    loss.backward()
    assert prediction.grad.shape == prediction.shape


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("position", [(0, 0), (39, 29), (20, 15)])
def test_nan_is_not_hidden(which, position):
    """Every pixel lies in the window of some centre: one NaN makes the loss NaN, and the gradients around it."""
    pictures = make((40, 30), n=1)
    pictures[which][0, 1, position[0], position[1]] = torch.nan
    prediction, target = pictures
    prediction.requires_grad_()
    loss = safnet_ops.census_loss(prediction, target)
    assert loss.isnan()
    loss.backward()
    spoiled = prediction.grad[0, 0].isnan()
    assert spoiled[position]
    y, x = torch.meshgrid(torch.arange(40), torch.arange(30), indexing="ij")
    reach = torch.maximum((y - position[0]).abs(), (x - position[1]).abs())
    assert not spoiled[reach > 3].any()


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_shape(data):
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    prediction, target = make((draw(1, 40), draw(1, 40)), draw(1, 2), draw(1, 4))
    layout = data.draw(st.sampled_from(LAYOUTS))
    contrast = data.draw(st.sampled_from([1e-3, 1.0, 20.0]))
    check(layout(prediction * contrast), target, 2 * draw(1, 7) + 1, slack=3)  # greys of 20 differ by less than one


@pytest.mark.parametrize("patch_size", [3, 7])
def test_gradcheck(patch_size):
    prediction, target = make((9, 8), n=1, channels=2, dtype=torch.float64)
    inputs = (prediction.requires_grad_(),)

    def loss(prediction):
        return safnet_ops.census_loss(prediction, target, patch_size)

    assert torch.autograd.gradcheck(loss, inputs, atol=1e-8)
    assert torch.autograd.gradgradcheck(loss, inputs, atol=1e-8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    prediction, target = (layout(picture) for picture in make())
    torch.library.opcheck(cpp.census_loss.default, (prediction, target, 7, False))
    torch.library.opcheck(cpp.census_loss_backward.default, (torch.tensor(2.0), prediction, target, 7, True))


def test_compile_and_export():
    prediction, target = make((20, 16))

    def loss(prediction, target):
        return safnet_ops.census_loss(prediction * 2, target) * 100

    leaf, compiled = (prediction.clone().requires_grad_() for _ in range(2))
    loss(leaf, target).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled, target).backward()
    assert leaf.grad.abs().max() > 1e-3
    assert torch.equal(compiled.grad, leaf.grad)

    class Loss(torch.nn.Module):
        def forward(self, prediction, target):
            return safnet_ops.census_loss(prediction, target)

    program = torch.export.export(Loss(), (prediction, target))
    assert any("safnet_ops.census_loss" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(prediction, target), safnet_ops.census_loss(prediction, target))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deterministic_over_runs_and_threads(layout):
    prediction, target = (layout(picture) for picture in make((150, 160)))
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 2, 4, 3):
        torch.set_num_threads(count)
        leaf = prediction.detach().requires_grad_()
        loss = safnet_ops.census_loss(leaf, target)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
        leaf.grad = None
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, torch.zeros(1, 3, 9, 9)), TypeError, "census_loss: prediction must be a torch.Tensor, got int"),
        ((torch.zeros(1, 3, 9, 9), None), TypeError, "census_loss: target must be a torch.Tensor, got NoneType"),
        (
            (torch.zeros(3, 9, 9), torch.zeros(3, 9, 9)),
            ValueError,
            r"prediction must have 4 dimensions .* got shape \(3, 9, 9\)",
        ),
        (
            (torch.zeros(1, 3, 9, 9).int(), torch.zeros(1, 3, 9, 9)),
            TypeError,
            "prediction must be float32.* got torch.int32",
        ),
        (
            (torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 9).half()),
            TypeError,
            "target must be torch.float32 like prediction, got torch.float16",
        ),
        (
            (torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 8)),
            ValueError,
            r"target must be \(N, C, H, W\) like prediction = \(1, 3, 9, 9\), got \(1, 3, 9, 8\)",
        ),
        (
            (torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 9, device="meta")),
            ValueError,
            "target must be on cpu like prediction, got meta",
        ),
        ((torch.zeros(1, 0, 9, 9), torch.zeros(1, 0, 9, 9)), ValueError, r"at least one channel, got \(1, 0, 9, 9\)"),
        (
            (torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 9), 4),
            ValueError,
            "patch_size must be odd, from 3 to 15, got 4",
        ),
        (
            (torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 9), 17),
            ValueError,
            "patch_size must be odd, from 3 to 15, got 17",
        ),
        (
            (torch.zeros(1, 3, 9, 9), torch.zeros(1, 3, 9, 9), 7.0),
            ValueError,
            "patch_size must be odd, from 3 to 15, got 7.0",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        safnet_ops.census_loss(*arguments)


# ---- options ---------------------------------------------------------------------------------------------------------


def ternary(grey, radius):
    """As other code has it: a convolution that copies the window's pixels into channels."""
    side = 2 * radius + 1
    copies = torch.eye(side**2, dtype=grey.dtype).view(side**2, 1, side, side)
    difference = F.conv2d(grey, copies, padding=radius) - grey
    return difference / torch.sqrt(0.81 + difference**2)


def ternary_distance(first, second, radius, border):
    dist = (ternary(first, radius) - ternary(second, radius)) ** 2
    dist = torch.mean(dist / (0.1 + dist), 1, keepdim=True)
    inner = torch.ones_like(dist[:, :, border : dist.shape[2] - border, border : dist.shape[3] - border])
    return dist * F.pad(inner, [border] * 4)


def luma(rgb):
    return 0.2989 * rgb[:, 0:1] + 0.5870 * rgb[:, 1:2] + 0.1140 * rgb[:, 2:3]


# The losses of other code, and the one call that stands for each.
OTHERS = {
    "RIFE": (
        lambda a, b: ternary_distance(luma(a), luma(b), 3, 1),
        lambda a, b: safnet_ops.census_loss(a, b, 7, reduction="none", grey="rec601", border=1),
    ),
    "IFRNet": (
        lambda a, b: ternary_distance(a.mean(1, keepdim=True), b.mean(1, keepdim=True), 3, 3).mean(),
        safnet_ops.census_loss,
    ),
    "ARFlow": (
        lambda a, b: ternary_distance(255 * luma(a), 255 * luma(b), 1, 1),
        lambda a, b: safnet_ops.census_loss(255 * a, 255 * b, 3, reduction="none", grey="rec601"),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_losses_of_others(name, dtype, backend):
    stock, call = OTHERS[name]
    pictures = [picture.requires_grad_() for picture in make((20, 17), dtype=dtype)]
    exact = [picture.detach().double().requires_grad_() for picture in pictures]
    with safnet_ops.use_backend(backend):
        found = call(*pictures)
    expected = stock(*exact)
    assert found.shape == expected.shape
    # In float32 the greys of ARFlow, up to 255, are rounded at their own size.
    scale = 100 if name == "ARFlow" and dtype == torch.float32 else 1
    assert (found - expected).abs().max() < 1e-6 * scale
    grad = torch.rand_like(expected)
    gradients = torch.autograd.grad(found, pictures, grad.to(found.dtype)), torch.autograd.grad(expected, exact, grad)
    for value, right in zip(*gradients, strict=True):
        assert (value - right).abs().max() < (1e-10 if dtype == torch.float64 else 1e-4) * right.abs().max()


@pytest.mark.parametrize("grey", ["mean", "rec601"])
@pytest.mark.parametrize("border", [None, 0, 4, 30])
@pytest.mark.parametrize("masked", [None, torch.float64, torch.bool], ids=str)
def test_reductions(grey, border, masked):
    prediction, target = make((20, 17), dtype=torch.float64)
    mask = None if masked is None else (torch.rand(2, 1, 20, 17) > 0.4).to(masked)
    options = {"grey": grey, "border": border, "mask": mask}
    found = {
        name: safnet_ops.census_loss(prediction, target, 5, reduction=name, **options)
        for name in ("none", "sum", "mean")
    }
    frame = 2 if border is None else min(border, 10)
    grey_of = luma if grey == "rec601" else lambda picture: picture.mean(1, keepdim=True)
    expected = (
        ternary_distance(grey_of(prediction), grey_of(target), 2, frame) if frame < 8 else torch.zeros(2, 1, 20, 17)
    )
    expected = expected if mask is None else expected * mask
    assert (found["none"] - expected).abs().max() < 1e-12
    assert found["sum"].item() == pytest.approx(expected.sum().item(), rel=1e-9)
    assert found["mean"].item() == pytest.approx(expected.mean().item(), rel=1e-9)


def test_mask_gets_a_gradient():
    prediction, target = make((20, 17))
    mask = torch.rand(2, 1, 20, 17, requires_grad=True)
    safnet_ops.census_loss(prediction, target, mask=mask, reduction="sum").backward()
    assert torch.allclose(mask.grad, safnet_ops.census_loss(prediction, target, reduction="none"))


def test_sum_and_grey_run_by_the_kernel():
    prediction, target = make((20, 17))
    for reduction in ("mean", "sum"):
        options = {"reduction": reduction, "grey": "rec601"}
        found = safnet_ops.census_loss(prediction, target, backend="cpp", **options)
        assert found.item() == pytest.approx(
            safnet_ops.census_loss(prediction, target, backend="reference", **options).item(), rel=1e-5
        )


def test_empty_batch_sums_to_nothing():
    prediction, target = make(n=0)
    assert safnet_ops.census_loss(prediction, target, reduction="sum") == 0
    assert safnet_ops.census_loss(prediction, target, reduction="none").shape == (0, 1, 12, 15)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "max"}, ValueError, "census_loss: reduction must be one of mean, sum, none, got 'max'"),
        ({"grey": "rec709"}, ValueError, "grey must be one of mean, rec601, got 'rec709'"),
        ({"border": -1}, ValueError, "border must be an integer of at least 0, got -1"),
        (
            {"mask": torch.ones(2, 3, 12, 15)},
            ValueError,
            r"mask must be \(N, 1, H, W\) = \(2, 1, 12, 15\), got \(2, 3, 12, 15\)",
        ),
        (
            {"mask": torch.ones(2, 1, 12, 15).int()},
            TypeError,
            "mask must be a floating-point or bool tensor, got torch.int32",
        ),
        ({"mask": 1}, TypeError, "mask must be a floating-point or bool tensor, got int"),
        (
            {"mask": torch.ones(2, 1, 12, 15, device="meta")},
            ValueError,
            "mask must be on cpu like prediction, got meta",
        ),
        ({"reduction": "none", "backend": "cpp"}, ValueError, "backend must be 'reference' or None for .* got 'cpp'"),
    ],
    ids=str,
)
def test_errors_of_options(options, error, message):
    with pytest.raises(error, match=message):
        safnet_ops.census_loss(*make(), **options)


def test_errors_of_grey():
    with pytest.raises(ValueError, match=r"prediction must have 3 channels for grey='rec601', got \(2, 4, 12, 15\)"):
        safnet_ops.census_loss(*make(channels=4), grey="rec601")
