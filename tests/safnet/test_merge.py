"""Weights of aligned exposures: less noise where they agree, and nothing taken where they do not."""

import pytest
import torch

import safnet_ops
from safnet import merge
from safnet.merge import measure_noise, trust_in_refining, weigh_by_noise
from safnet.radiance import exposure_input

RATIOS = (1.0, 4.0, 16.0)
SHOT, READ = 2e-4, 1e-3


def shoot(radiance):
    """Three exposures of a still scene with photon and reading noise, as of `exposure_input`."""
    torch.manual_seed(4)
    seen = []
    for ratio in RATIOS:
        light = (radiance * ratio).clamp(0, 1)
        noisy = light + torch.randn_like(light) * (SHOT * light + READ**2).sqrt()
        seen.append(exposure_input(noisy.clamp(0, 1).pow(1 / 2.2), ratio))
    return seen


def fuse(short, reference, long, mask_long, noise):
    weights, mask = weigh_by_noise(short, reference, long, mask_long, RATIOS, noise)
    still = torch.zeros(1, 2, *short.shape[2:])
    images = short[:, 0:3], reference[:, 0:3], long[:, 0:3], still, still
    return safnet_ops.fused_fuse(*images, torch.zeros_like(mask), mask, weights=weights), mask


def dark_scene():
    ramp = torch.linspace(0.002, 0.01, 120).expand(1, 3, 100, 120)
    undecided = torch.full((1, 1, 100, 120), 0.4)
    return ramp, undecided


@pytest.mark.parametrize("band", [7, 64])
def test_bands_leave_no_seam(monkeypatch, band):
    radiance, undecided = dark_scene()
    exposures = shoot(radiance)
    noise = measure_noise(exposures[2], exposures[1], RATIOS)
    monkeypatch.setattr(merge, "BAND", 1000)
    whole_weights, whole_mask = weigh_by_noise(*exposures, undecided, RATIOS, noise)
    monkeypatch.setattr(merge, "BAND", band)
    weights, mask = weigh_by_noise(*exposures, undecided, RATIOS, noise)
    assert mask.gt(undecided).any(), "where nothing depends on noise no band would show"
    for part, whole in zip((*weights, mask), (*whole_weights, whole_mask), strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-6)


def test_darks_are_no_noisier_than_the_long_exposure():
    radiance, undecided = dark_scene()
    short, reference, long = shoot(radiance)
    noise = measure_noise(long, reference, RATIOS)
    fused, mask = fuse(short, reference, long, undecided, noise)
    error, of_long, of_reference = (((x - radiance) / radiance).std() for x in (fused, long[:, 0:3], reference[:, 0:3]))
    assert of_reference > 2 * of_long
    assert error < 1.1 * of_long
    assert mask.mean() > 0.95
    plain, _ = fuse(short, reference, long, undecided, torch.zeros_like(noise))
    assert ((plain - radiance) / radiance).std() > 1.5 * of_long


def test_what_moved_is_not_trusted_for_its_noise():
    radiance, undecided = dark_scene()
    short, reference, long = shoot(radiance)
    noise = measure_noise(long, reference, RATIOS)
    long[..., 30:60, 40:80] *= 2.0**0.5
    _, mask = fuse(short, reference, long, undecided, noise)
    torch.testing.assert_close(mask[..., 35:55, 45:75], undecided[..., 35:55, 45:75])
    assert mask[..., :25, :].mean() > 0.95


def test_without_noise_weights_and_mask_are_those_of_the_paper():
    radiance, undecided = dark_scene()
    short, reference, long = shoot(radiance)
    weights, mask = weigh_by_noise(short, reference, long, undecided, RATIOS, torch.zeros(24))
    for found, expected in zip(weights, safnet_ops.reference.triangle_weights(reference[:, 3:6]), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(mask, undecided)


def test_the_short_exposure_serves_what_clips_in_it():
    """Brighter than everything: the reference, clipped, tells less than the short exposure does."""
    clipped, undecided = torch.ones(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    short, reference, long = (
        exposure_input(ldr, ratio) for ldr, ratio in zip((0.999 * clipped, clipped, clipped), RATIOS, strict=True)
    )
    weights, _ = weigh_by_noise(short, reference, long, undecided, RATIOS, torch.full((24,), 0.02))
    assert (weights[0] > 0.99).all()


def test_colours_of_narrow_band_light_are_not_refined_by_noise():
    ldr = torch.tensor([[1.0, 0.02, 0.8], [1.0, 0.6, 1.0], [1.0, 1.0, 1.0], [0.3, 0.02, 0.4]]).T.reshape(1, 3, 1, 4)
    assert trust_in_refining(ldr).flatten().tolist() == [0, 1, 1, 1]
