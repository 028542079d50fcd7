"""census_loss: the C++ kernels against the reference, and the reference against a loop over pixels."""

import math

import hypothesis.strategies as st
import pytest
import torch
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


def test_target_gets_no_gradient():
    prediction, target = (picture.requires_grad_() for picture in make())
    safnet_ops.census_loss(prediction, target).backward()
    assert prediction.grad.abs().sum() > 0
    assert target.grad is None


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
