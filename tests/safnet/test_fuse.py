"""The pipeline on tensors: tiles that leave no seam, and no step of precision lost on radiance and flow."""

import pytest
import torch

from safnet.fuse import fuse_exposures
from safnet.model import Alignment, Fusion, SAFNet
from safnet.radiance import exposure_input, exposure_ratios, linearize

EVS = (-2.0, 0.0, 2.5)


@pytest.fixture(params=["small", "full"])
def model(request):
    """A random model whose flows reach far beyond a tile and whose refine module changes the picture visibly."""
    torch.manual_seed(5)
    model = SAFNet(request.param).eval()
    last = model.refinenet.conv7 if request.param == "small" else model.refinenet.conv3
    with torch.no_grad():
        model.decoder.conv6.bias[:4] = torch.tensor([2.0, -1.0, -2.0, 1.5])
        last.weight *= 3
    return model


@pytest.fixture
def frames():
    generator = torch.Generator().manual_seed(6)
    return [torch.rand(1, 3, 60, 90, generator=generator) for _ in range(3)]


def inputs_of(frames):
    return [exposure_input(frame, ratio) for frame, ratio in zip(frames, exposure_ratios(EVS), strict=True)]


@pytest.mark.parametrize("tile", [0, 40])
def test_tiles_agree_with_the_model(model, frames, tile):
    with torch.inference_mode():
        fused, refined = model(*inputs_of(frames))
    result = fuse_exposures(model, frames, EVS, alignment="paper", tile=tile)
    assert result.fusion.alignment.flow_short.abs().max() > 20, "flows must cross tiles for this test to mean something"
    assert (refined - fused).abs().max() > 0.05, "the refine module must matter for this test to mean something"
    assert (result.fusion.fused - fused).abs().max() < 1e-5
    assert (result.radiance - refined).abs().max() < 1e-5
    assert result.radiance.shape == (1, 3, 60, 90)
    assert result.radiance.dtype == torch.float32


def test_radius_is_what_the_refine_module_sees(model):
    net = model.refinenet.double()
    side, middle = 2 * net.RADIUS + 9, net.RADIUS + 4
    channels = {"small": 6, "full": 20}[model.variant]
    warped = [torch.rand(1, channels, side, side, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    reference = torch.rand(1, 6, side, side, dtype=torch.float64, requires_grad=True)
    alignment = Alignment(*(torch.rand(1, count, side, side, dtype=torch.float64) for count in (2, 2, 1, 1)))
    fusion = Fusion(torch.rand(1, 3, side, side, dtype=torch.float64), alignment)
    net.body(tuple(warped), reference, fusion)[0, :, middle, middle].sum().backward()
    for tensor in (*warped, reference):
        touched = tensor.grad.abs().sum((0, 1)).nonzero()
        assert (touched - middle).abs().max() <= net.RADIUS
    assert (touched - middle).abs().max() == net.RADIUS, "a larger margin than needed wastes work"


def test_frame_on_the_default_tiles_is_whole_when_small(model, frames):
    steps = []
    fuse_exposures(model, frames, EVS, progress=lambda *step: steps.append(step))
    assert steps == [("aligning", 0, 1), ("aligning", 1, 1), ("refining", 1, 1)]


def test_progress_counts_tiles(model, frames):
    steps = []
    fuse_exposures(model, frames, EVS, tile=50, progress=lambda *step: steps.append(step))
    assert steps[2:] == [("refining", number, 4) for number in range(1, 5)]


def test_a_still_scene_keeps_its_brightness():
    """With zero flow and any mask, frames of one still scene must fuse to that scene's radiance."""
    model = SAFNet("small").eval()
    with torch.no_grad():
        for conv in (model.decoder.conv6, model.refinenet.conv7):
            conv.weight.zero_()
            conv.bias.zero_()
    # Bright enough for the reference exposure, which sees 4 times the light of the short one, but not clipped in it.
    radiance = torch.linspace(1e-4, 0.24, 3 * 40 * 50).view(1, 3, 40, 50)
    evs = (-2.0, 0.0, 2.0)
    frames = [(radiance * ratio).clamp(0, 1) ** (1 / 2.2) for ratio in exposure_ratios(evs)]
    result = fuse_exposures(model, frames, evs)
    assert torch.allclose(linearize(frames[0], 1), radiance, rtol=1e-4)
    assert torch.allclose(result.radiance, radiance, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
def test_reduced_precision_spares_radiance_and_flow(frames, precision, tolerance):
    torch.manual_seed(5)
    model = SAFNet("small").eval()
    frames = [frame[:, :, :33, :40] for frame in frames]
    exact = fuse_exposures(model, frames, EVS, alignment="paper")
    result = fuse_exposures(model, frames, EVS, alignment="paper", precision=precision)
    assert {part.dtype for part in (result.radiance, result.fusion.fused, *result.fusion.alignment)} == {torch.float32}
    difference = (result.radiance - exact.radiance).abs().max()
    assert 0 < difference < tolerance


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (17, 16)])
def test_tiny_frames(model, size):
    frames = [torch.full((1, 3, *size), value) for value in (0.2, 0.5, 0.9)]
    assert fuse_exposures(model, frames, EVS, tile=8).radiance.isfinite().all()
