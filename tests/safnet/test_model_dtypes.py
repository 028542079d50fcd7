"""Mixes of dtypes: exposures, weights, autocast. All of them work; values against the model in float64."""

import itertools

import pytest
import torch

from safnet.model import SAFNet
from safnet.radiance import exposure_input, exposure_ratios

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Of results in [0, 1], by the coarsest dtype that has a part in it. Weights are random: their sums are as large as they get.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
AUTOCAST = (None, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=["full", "small"])
def model(request):
    torch.manual_seed(1)
    model = SAFNet(request.param).eval()
    with torch.no_grad():
        for parameter in model.decoder.conv6.parameters():
            parameter.mul_(8)  # flows of some pixels
    return model


@pytest.fixture(scope="module")
def exposures():
    torch.manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 6), (40, 50), mode="bicubic").clamp(0, 1)
    return [exposure_input(smooth.roll(move, 3), ratio) for move, ratio in enumerate(exposure_ratios([-2, 0, 2]))]


def error(found, expected):
    return (found.double() - expected).abs().max().item()


@pytest.mark.parametrize("autocast", AUTOCAST, ids=str)
@pytest.mark.parametrize(("weights", "inputs"), itertools.product(DTYPES, DTYPES), ids=str)
@torch.no_grad()
def test_every_mix_works(model, exposures, weights, inputs, autocast):
    given = [exposure.to(inputs) for exposure in exposures]
    exact = [exposure.double() for exposure in given]
    expected = model.double()(*exact)
    alignment = model.estimate(*exact)
    model.to(weights)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        fused, refined = model(*given)
        found = model.estimate(*given)
    coarsest = max((weights, inputs, *([autocast] if autocast else [])), key=lambda dtype: torch.finfo(dtype).eps)
    for result, exact_result in ((fused, expected[0]), (refined, expected[1])):
        assert result.dtype == inputs
        assert error(result, exact_result) < TOLERANCE[coarsest]
    assert found.flow_short.dtype == (torch.float64 if weights == torch.float64 else torch.float32)
    assert error(found.flow_short, alignment.flow_short) < 10 * TOLERANCE[coarsest]


@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_trains_in_its_dtype(exposures, weights):
    model = SAFNet("small").to(weights)
    fused, refined = model(*(exposure.to(weights) for exposure in exposures))
    (fused.sum() + refined.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == weights
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("weights", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_tiles_are_refined_in_its_dtype(model, exposures, weights):
    """What `safnet.fuse` calls: features of exposures that keep their own dtype, and the body on tiles."""
    short, reference, long = exposures
    model.to(weights)
    fusion = model.fuse(*exposures, model.estimate(*exposures))
    features = model.refinenet.short_features(short), model.refinenet.long_features(long)
    residual = model.refinenet(features, reference, fusion)
    assert residual.dtype == weights
    model.float()
    exact = model.refinenet.short_features(short), model.refinenet.long_features(long)
    assert error(residual, model.refinenet(exact, reference, fusion).double()) < TOLERANCE[weights]
