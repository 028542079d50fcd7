"""census_loss in Triton: the library's own launches, executed from PTX by the simulator, against the float64
reference."""

import pytest
import torch

import safnet_ops
from operator_inputs import census_inputs
from safnet_ops import reference
from tests.support.operators import DTYPES, LAYOUTS, check_operator

pytestmark = pytest.mark.usefixtures("simulated")


def make(size=(13, 19), n=2, channels=3, dtype=torch.float32):
    return census_inputs(size, n=n, channels=channels, dtype=dtype)


def check(inputs, patch_size=7):
    def loss(function, **options):
        return lambda prediction, target: function(prediction, target, patch_size, **options)

    return check_operator(
        loss(safnet_ops.census_loss, backend="triton"), loss(reference.census_loss), inputs, (True, False)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype):
    out = check(make(dtype=dtype))
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (6, 30), (7, 7), (9, 300)], ids=str)
def test_layouts_and_odd_sizes(layout, size):
    inputs = [layout(x) for x in make(size)]
    check(inputs)


@pytest.mark.parametrize("patch_size", [3, 15])
def test_other_patches(patch_size):
    check(make((17, 20)), patch_size)


@pytest.mark.parametrize("channels", [1, 5])
def test_other_numbers_of_channels(channels):
    check(make(channels=channels))


def test_gradient_keeps_the_layout():
    prediction, target = make()
    prediction = prediction.contiguous(memory_format=torch.channels_last).requires_grad_()
    safnet_ops.census_loss(prediction, target, backend="triton").backward()
    assert prediction.grad.is_contiguous(memory_format=torch.channels_last)


def test_repeats_to_the_bit_in_any_order():
    import ptxsim

    inputs = make((20, 40))
    found = []
    for seed in (1, 2):
        prediction = inputs[0].clone().requires_grad_()
        with ptxsim.options(seed=seed):
            loss = safnet_ops.census_loss(prediction, inputs[1], backend="triton")
            loss.backward()
        found.append((loss.detach(), prediction.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_64bit_offsets_give_the_same_bits(wide):
    inputs = make()
    narrow = check(inputs)
    wide()
    assert torch.equal(check(inputs), narrow)


def test_empty_batch_is_nan_as_a_mean():
    prediction = torch.empty(0, 3, 8, 8, requires_grad=True)
    loss = safnet_ops.census_loss(prediction, torch.empty(0, 3, 8, 8), backend="triton")
    assert loss.isnan()
    loss.backward()
    assert prediction.grad.shape == prediction.shape


def test_options():
    torch.manual_seed(0)

    def loss(backend):
        return lambda *pictures: safnet_ops.census_loss(*pictures, 3, reduction="sum", grey="rec601", backend=backend)

    check_operator(loss("triton"), loss("reference"), [torch.rand(1, 3, 7, 9), torch.rand(1, 3, 7, 9)], (True, True))
