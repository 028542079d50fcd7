"""The pipeline on tensors: tiles that leave no seam, and no step of precision lost on radiance and flow."""

from copy import deepcopy

import pytest
import torch

import safnet
from safnet.fuse import fuse_exposures
from safnet.model import Alignment, Fusion, SAFNet
from safnet.radiance import exposure_input, exposure_ratios, linearize, tone_map
from tests.support.scenes import handheld, passers_by

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
    net(tuple(warped), reference, fusion)[0, :, middle, middle].sum().backward()
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
    assert steps[2:] == [("refining", number, 6) for number in range(1, 7)]


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


def error(radiance, truth, part):
    """Of the mu-law values, in dB, in a part (H, W) of the picture."""
    difference = tone_map(radiance.clamp(0, 1)) - tone_map(truth)
    return -10 * float(difference.square().mean(1)[0][part].mean().log10())


@pytest.fixture(scope="module")
def small():
    return safnet.load_model("safnet-s")


SIZE = {"height": 192, "width": 256, "noise": 0.01}


def test_ghosts_off_is_for_what_rests_and_strong_for_what_moves(small):
    evs = (-2.0, 0.0, 2.0)

    def quality(step, **options):
        frames, truth, people = passers_by(step, noise=0.01)
        exposed = (frames[1] < 0.97).all(1)[0]
        moved = people & exposed if step else exposed
        return error(fuse_exposures(small, frames, evs, **options).radiance, truth, moved)

    assert quality(0, ghosts="off") > quality(0) + 1
    assert quality(10) > quality(10, ghosts="off") + 10
    still, moving = ([quality(step, ghosts=ghosts) for ghosts in ("normal", "strong")] for step in (0, 10))
    assert still[1] < still[0]
    assert moving[1] > moving[0] - 0.2


def test_strong_lowers_masks_and_off_fills_them_where_frames_reach(small):
    evs = (-2.0, 0.0, 2.0)
    frames, _, _ = handheld((30.0, 0.0), height=192, width=256)
    masks = {
        ghosts: torch.cat(fuse_exposures(small, frames, evs, ghosts=ghosts).fusion.alignment[2:])
        for ghosts in ("off", "normal", "strong")
    }
    assert (masks["strong"] <= masks["normal"] + 1e-6).all()
    assert masks["strong"].mean() < masks["normal"].mean() - 0.08
    assert masks["off"][:, :, 30:-30, 60:-60].min() > 0.99
    assert masks["off"][0, 0, :, -10:].max() < 0.01, "beyond the short frame's edge there is nothing to trust"


@pytest.mark.parametrize("evs", [(-2.0, 0.0), (-2.0, 0.0, 2.0), (-2.0, -1.0, 0.0, 1.0, 2.0)])
def test_fusion_only_stays_within_what_was_photographed(small, evs):
    frames, _, _ = passers_by(0, evs=evs, **SIZE)
    light = torch.stack([linearize(frame, ratio) for frame, ratio in zip(frames, exposure_ratios(evs), strict=True)])
    options = {"reference": evs.index(0.0), "tile": 100, "alignment": "paper"}
    bold = deepcopy(small)
    with torch.no_grad():
        bold.refinenet.conv7.weight *= 10

    def beyond(**more):
        radiance = fuse_exposures(bold, frames, evs, **options, **more).radiance
        around = [torch.nn.functional.max_pool2d(values, 9, 1, 4) for values in (light.amax(0), -light.amin(0))]
        return float(torch.maximum(radiance - around[0], -around[1] - radiance).max())

    assert beyond(fusion_only=True) < 1e-5
    assert beyond() > 1e-3, "the refine module must reach beyond it for this test to mean something"


@pytest.mark.parametrize("evs", [(0.0, 2.0), (-2.0, 0.0, 2.0), (-2.0, -1.0, 0.0, 1.0, 2.0)])
@pytest.mark.parametrize("more", [{}, {"ghosts": "off"}, {"fusion_only": True}])
def test_a_painted_mask_forces_the_reference(small, evs, more):
    number = evs.index(0.0)
    frames, _, _ = passers_by(10, evs=evs, **SIZE)
    reference = linearize(frames[number], 2.0 ** -evs[0])
    mask = torch.zeros(1, 1, 192, 256)
    mask[..., :96, :] = 1
    mask[..., 96:130, :] = 0.5
    options = {"reference": number, "tile": 100, **more}
    plain = fuse_exposures(small, frames, evs, **options).radiance
    masked = fuse_exposures(small, frames, evs, mask=mask, **options).radiance
    torch.testing.assert_close(masked[:, :, :96], reference[:, :, :96], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masked[:, :, 150:], plain[:, :, 150:], rtol=1e-5, atol=1e-6)
    unlike = (masked[:, :, 100:126] - plain[:, :, 100:126]).abs().mean()
    assert 0 < unlike < (reference - plain)[:, :, 100:126].abs().mean()
    stored = fuse_exposures(small, frames, evs, mask=(mask * 255).to(torch.uint8), **options).radiance
    assert (stored - masked).abs().max() < 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ghosts": "weak"}, "ghosts must be off, normal, strong, got 'weak'"),
        ({"mask": torch.zeros(1, 1, 8, 9)}, r"mask must be \(1, 1, 60, 90\), got \(1, 1, 8, 9\)"),
        ({"mask": torch.zeros(1, 1, 60, 90).double()}, "mask must be float32 or uint8, got torch.float64"),
        ({"mask": torch.full((1, 1, 60, 90), 255.0)}, r"mask must have values in \[0, 1\], got 255 to 255"),
        ({"mask": torch.full((1, 1, 60, 90), torch.nan)}, r"mask must have values in \[0, 1\]"),
    ],
)
def test_merging_that_cannot_be_is_refused(small, frames, options, message):
    with pytest.raises(ValueError, match=f"fuse_exposures: {message}"):
        fuse_exposures(small, frames, EVS, **options)
