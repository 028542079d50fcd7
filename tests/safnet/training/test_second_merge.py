"""The refine module as a second merge: nothing until fitted, then an improvement, each colour alone."""

import pytest
import torch
from typer.testing import CliRunner

from safnet.cli import app
from safnet.model import Alignment, Fusion, SAFNet
from safnet.radiance import exposure_input, tone_map
from safnet.training import second_merge
from safnet.training.second_merge import fit_second_merge, write_second_merge
from safnet.weights import load_model, save_model
from tests.support.scenes import make_radiance, write_kalantari17

RATIOS = (1.0, 4.0, 16.0)


def make_frames(seed=0):
    """Exposures (3, 6, H, W) of a still scene, where short and long frame are noisy, and its radiance (3, H, W)."""
    radiance = torch.from_numpy(make_radiance(seed)).permute(2, 0, 1).clamp(0, 1)
    noise = torch.Generator().manual_seed(seed)
    frames = [(radiance * ratio).clamp(0, 1) ** (1 / 2.2) for ratio in RATIOS]
    frames[0] = (frames[0] + 0.02 * torch.randn(frames[0].shape, generator=noise)).clamp(0, 1)
    pairs = zip(frames, RATIOS, strict=True)
    return torch.stack([exposure_input(frame[None], ratio)[0] for frame, ratio in pairs]), radiance


VARIANTS = pytest.mark.parametrize("variant", ["small", "full"])


def make_model(variant="small", mask=0.0):
    """A model without flow, whose masks are sigmoid(4 mask) everywhere."""
    torch.manual_seed(3)
    model = SAFNet(variant).eval()
    torch.nn.init.zeros_(model.decoder.conv6.weight)
    with torch.no_grad():
        model.decoder.conv6.bias.copy_(torch.tensor([0, 0, 0, 0, mask, mask]))
    return model


def results(model, exposures):
    with torch.no_grad():
        return [result[0] for result in model(*exposures.unsqueeze(1).unbind(0))]


@VARIANTS
def test_adds_nothing_until_it_is_fitted(variant):
    model, (exposures, _) = make_model(variant), make_frames()
    write_second_merge(model.refinenet)
    fused, refined = results(model, exposures)
    torch.testing.assert_close(refined, fused.clamp(0, 1), rtol=0, atol=0)


@VARIANTS
def test_mends_masks_that_are_half_open_where_the_reference_is_clipped(variant):
    model = make_model(variant)
    assert fit_second_merge(model, [make_frames(seed) for seed in range(3)]) == 3
    exposures, truth = make_frames(seed=7)
    fused, refined = results(model, exposures)
    errors = [(tone_map(result.clamp(0, 1)) - tone_map(truth)).square().mean() for result in (fused, refined)]
    assert errors[1] < 0.5 * errors[0]


def test_the_full_model_merges_as_the_small_one_does_where_it_has_the_same_parts(monkeypatch):
    models = [make_model(variant) for variant in ("small", "full")]
    models[1].decoder.load_state_dict(models[0].decoder.state_dict())
    models[1].encoder.load_state_dict(models[0].encoder.state_dict())
    monkeypatch.setattr(second_merge, "FULL_PARTS", second_merge.PARTS)
    for model in models:
        fit_second_merge(model, [make_frames(seed) for seed in range(3)])
    small, full = (results(model, make_frames(seed=7)[0])[1] for model in models)
    torch.testing.assert_close(full, small, rtol=0, atol=1e-3)


@pytest.mark.parametrize("disagreeing", [None, 1, 2])
@VARIANTS
def test_highlights_are_mended_where_the_other_colours_agree(variant, disagreeing):
    """Red is clipped and the short frame brighter there; another colour tells whether it shows the same surface."""
    refine = SAFNet(variant).refinenet
    write_second_merge(refine)
    linear, ldr = torch.tensor([0.25, 0.1, 0.05]), torch.tensor([1.0, 0.66, 0.48])

    def spread(*values):
        return torch.cat(values).view(1, -1, 1, 1).expand(1, -1, 40, 40)

    brighter = linear + torch.tensor([0.3, 0.004, 0.002])  # the others within the noise
    if disagreeing is not None:
        brighter[disagreeing] += 0.3
    rest = torch.zeros(3 if variant == "small" else 17)
    flow, mask = torch.zeros(1, 2, 40, 40), torch.full((1, 1, 40, 40), 0.5)
    fusion = Fusion(spread(linear), Alignment(flow, flow, mask, mask))
    warped = spread(brighter, rest), spread(linear, rest)
    with torch.no_grad():
        features = refine.features(warped, spread(linear, ldr), fusion)[0, :, 20, 20]
    parts = dict(zip(second_merge._parts(refine), features[second_merge._channels(refine, 0)].tolist(), strict=True))
    mended = second_merge.Part(second_merge.TO_SHORT, 1.0, (second_merge.CLIPPED,))
    assert parts[mended._replace(agreeing=True)] == pytest.approx(0.3 if disagreeing is None else 0.0, abs=1e-5)
    assert parts.get(mended, 0.3) == pytest.approx(0.3, abs=1e-5)


@VARIANTS
def test_no_colour_adds_to_another(variant):
    """Where nothing disagrees: another colour's highlights change nothing."""
    model = make_model(variant)
    fit_second_merge(model, [make_frames()])
    exposures, _ = make_frames(seed=5)
    exposures[0] = exposures[1]  # as if the short frame had the reference's noise and range
    exposures[0, :3], exposures[1, :3] = exposures[2, :3], exposures[2, :3]
    changed = exposures.clone()
    changed[:, [0, 3]] = changed[:, [0, 3]].flip(-1)
    (fused, refined), (fused_changed, refined_changed) = results(model, exposures), results(model, changed)
    torch.testing.assert_close(fused_changed[1:], fused[1:])
    torch.testing.assert_close(refined_changed[1:], refined[1:])
    assert not torch.allclose(refined, fused)
    assert not torch.allclose(refined_changed[0], refined[0])


def test_the_residual_of_dark_pictures_is_as_small_as_they_are():
    """All gates but the dark one are shut: what is added scales with the differences of the frames."""
    model = make_model()
    fit_second_merge(model, [make_frames()])
    generator = torch.Generator().manual_seed(2)
    short, reference, long, fused = (0.001 * torch.rand(1, 3, 32, 32, generator=generator) for _ in range(4))
    flow, mask = torch.zeros(1, 2, 32, 32), torch.full((1, 1, 32, 32), 0.5)

    def residual(scale):
        frames = [torch.cat([scale * part, torch.full_like(part, 0.1)], 1) for part in (short, reference, long)]
        part = Fusion(scale * fused, Alignment(flow, flow, mask, mask))
        with torch.no_grad():
            return model.refinenet((frames[0], frames[2]), frames[1], part)

    whole = residual(1.0)
    assert whole.abs().max() > 0
    torch.testing.assert_close(residual(0.01), 0.01 * whole, rtol=1e-3, atol=1e-9)


def test_no_scenes_are_refused():
    with pytest.raises(ValueError, match="scenes must not be empty"):
        fit_second_merge(make_model(), [])


def test_scenes_of_another_shape_or_with_nan_are_refused():
    exposures, truth = make_frames()
    wrong = truth.clone()
    wrong[0, 0, :2] = float("nan")
    with pytest.raises(ValueError, match="scene 1: truth must be finite, 2 values are not"):
        fit_second_merge(make_model(), [(exposures, truth), (exposures, wrong)])
    with pytest.raises(ValueError, match=r"exposures must be \(3, 6, 64, 95\), got \(3, 6, 64, 96\)"):
        fit_second_merge(make_model(), [(exposures, truth[..., 1:])])
    with pytest.raises(ValueError, match=r"truth must be \(3, H, W\), got \(64, 96\)"):
        fit_second_merge(make_model(), [(exposures, truth[0])])


@VARIANTS
def test_command_writes_weights_that_differ_in_the_refine_module_alone(tmp_path, variant):
    folders = [tmp_path / "some", tmp_path / "others"]
    for folder, names in zip(folders, (["1", "2"], ["1"]), strict=True):
        write_kalantari17(folder, names)
        (folder / "Test").rename(folder / "Training")
    start = make_model()
    save_model(start, tmp_path / "start.safetensors")
    command = ["fit-refine", *map(str, folders), "--model", str(tmp_path / "start.safetensors"), "--variant", variant]
    output = ["-o", str(tmp_path / "fitted.safetensors")]
    result = CliRunner().invoke(app, [*command, *output])
    assert result.exit_code == 0, result.output
    assert "fitted to 3 scenes" in result.output
    fitted = load_model(tmp_path / "fitted.safetensors")
    assert fitted.variant == variant
    for name, after in fitted.state_dict().items():
        before = start.state_dict().get(name)
        same = before is not None and torch.equal(after, before)
        assert same != name.startswith("refinenet."), name
    again = CliRunner().invoke(app, [*command, *output])
    assert again.exit_code == 2
    assert "exists; --overwrite replaces it" in again.output
    wrong = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "fitted.pth")])
    assert wrong.exit_code == 2
    assert "must end in .safetensors" in wrong.output
    nowhere = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "nowhere" / "fitted.safetensors")])
    assert nowhere.exit_code == 2
    assert "does not exist" in nowhere.output
