"""census_loss's CUDA kernels, executed on the CPU, against the reference."""

import pytest
import torch

import ptxsim
import safnet_ops
from operator_inputs import census_inputs
from safnet_ops import reference
from tests.support.operators import DTYPES, LAYOUTS, check_operator


def inputs(shape=(2, 3, 11, 37), dtype=torch.float32):
    n, channels, *size = shape
    return census_inputs(size, n=n, channels=channels, dtype=dtype)


def compare(prediction, target, patch_size=7):
    def with_patch(function):
        return lambda prediction, target: function(prediction, target, patch_size)

    functions = map(with_patch, (safnet_ops.census_loss, reference.census_loss))
    loss = check_operator(*functions, (prediction, target), (True, False))
    assert loss.dtype == torch.promote_types(prediction.dtype, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(cuda, dtype, layout):
    compare(*(layout(value) for value in inputs(dtype=dtype)))


@pytest.mark.parametrize("patch_size", [3, 5, 9, 15])
def test_patch_sizes(cuda, patch_size):
    compare(*inputs((1, 2, 17, 33)), patch_size)
    compare(*inputs((1, 1, 15, 15), torch.float64), patch_size)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 6, 9), (1, 1, 7, 7), (1, 2, 35, 34), (1, 1, 67, 8)], ids=str)
def test_sizes(cuda, shape):
    compare(*inputs(shape))


def test_64bit_offsets_give_the_same_bits(cuda, monkeypatch):
    prediction, target = inputs((1, 3, 12, 35))
    grad = torch.tensor(1.0)

    def run():
        return (
            cuda.call("census_loss", prediction, target, 7, False),
            cuda.call("census_loss_backward", grad, prediction, target, 7, False),
        )

    narrow = run()
    monkeypatch.setenv("SAFNET_OPS_FORCE_64BIT_OFFSETS", "1")
    assert all(torch.equal(one, other) for one, other in zip(narrow, run(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_same_bits_under_any_order(cuda, dtype):
    prediction, target = inputs((2, 1, 40, 70), dtype)
    found = []
    for seed in (None, 5, 6):
        with ptxsim.options(seed=seed):
            found.append(cuda.call("census_loss", prediction, target, 7, True))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nan_reaches_the_loss(cuda):
    prediction, target = inputs((1, 1, 9, 9))
    prediction[0, 0, 4, 4] = float("nan")
    assert safnet_ops.census_loss(prediction, target).isnan()


def test_empty_batch_gives_nan(cuda):
    prediction = torch.rand(0, 3, 8, 8, requires_grad=True)
    loss = safnet_ops.census_loss(prediction, torch.rand(0, 3, 8, 8))
    assert loss.isnan()
    assert torch.autograd.grad(loss, prediction)[0].shape == prediction.shape


def test_options(cuda):
    torch.manual_seed(0)

    def loss(backend):
        return lambda *pictures: safnet_ops.census_loss(*pictures, 3, reduction="sum", grey="rec601", backend=backend)

    check_operator(loss(None), loss("reference"), [torch.rand(1, 3, 7, 9), torch.rand(1, 3, 7, 9)], (True, True))
