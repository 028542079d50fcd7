"""Baselines on scenes whose motion is known."""

import pytest
import torch

from safnet.evaluation.baselines import BASELINES, dis_flow, fuse_baseline, ghost_mask, homography_flow
from safnet.metrics import psnr_mu
from safnet.radiance import exposure_ratios, linearize
from tests.support.scenes import expose, make_radiance

EVS = (-2.0, 0.0, 2.0)
RATIOS = exposure_ratios(EVS)
SIZE = {"height": 128, "width": 192}
SHIFT = 9
WITH_OPENCV = [name for name in BASELINES if name.startswith(("homography", "dis"))]


def scene(shift):
    """Frames (3, 3, H, W) whose outer ones show everything `shift` pixels to the left and right, and the truth."""
    pictures = [make_radiance(5, moved, **SIZE) for moved in (-shift, 0, shift)]
    frames = [expose(picture, ratio) / 2.0**16 for picture, ratio in zip(pictures, RATIOS, strict=True)]
    stacked = torch.stack([torch.from_numpy(frame).float().permute(2, 0, 1) for frame in frames])
    return stacked, torch.from_numpy(pictures[1]).permute(2, 0, 1)


def quality(name, frames, truth):
    if name in WITH_OPENCV:
        pytest.importorskip("cv2")
    return psnr_mu(fuse_baseline(name, frames, EVS).radiance[0], truth)


def test_reference_is_the_reference_alone():
    frames, _ = scene(SHIFT)
    result = fuse_baseline("reference", frames, EVS)
    torch.testing.assert_close(result.radiance[0], linearize(frames[1], RATIOS[1]))
    assert not any(part.any() for part in result.fusion.alignment)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "reference"])
def test_every_baseline_restores_what_the_reference_of_a_still_scene_has_clipped(name):
    frames, truth = scene(0)
    assert (frames[1] > 0.99).float().mean() > 0.02
    assert quality(name, frames, truth) > quality("reference", frames, truth) + 6


@pytest.mark.parametrize("name", WITH_OPENCV)
def test_alignment_restores_a_moved_scene(name):
    frames, truth = scene(SHIFT)
    assert quality(name, frames, truth) > quality("unaligned", frames, truth) + 6


@pytest.mark.parametrize("align", [dis_flow, homography_flow])
def test_flows_lead_from_the_reference_to_the_other_frame(align):
    pytest.importorskip("cv2")
    frames, _ = scene(SHIFT)
    for k, expected in ((0, -SHIFT), (2, SHIFT)):
        flow = align(frames[1], frames[k], RATIOS[1], RATIOS[k])[0, :, 20:-20, 20:-20]
        assert flow.flatten(1).median(1).values.tolist() == pytest.approx([expected, 0], abs=0.3)


def test_homography_of_nothing_to_see_is_no_motion():
    pytest.importorskip("cv2")
    grey = torch.full((3, 64, 64), 0.4)
    assert not homography_flow(grey, grey, 1.0, 4.0).any()


def test_a_mask_removes_ghosts():
    frames, truth = scene(SHIFT)
    assert quality("unaligned+mask", frames, truth) > quality("unaligned", frames, truth) + 3


def test_ghost_mask_compares_at_the_references_exposure():
    reference = torch.tensor([0.5, 0.5, 0.5, 1.0, 1.0]).expand(1, 3, 1, 5)
    linear = linearize(reference, 4.0).clone()
    linear[..., 1] = linearize(torch.tensor(0.55), 4.0)  # less than the threshold away
    linear[:, 1, :, 2] = linearize(torch.tensor(0.57), 4.0)  # more, in one channel
    linear[..., 3] = 0.9  # would clip as the reference does
    linear[..., 4] = 0.2  # would not
    assert ghost_mask(linear, reference, 4.0).flatten().tolist() == [1, 1, 0, 1, 0]


def test_refusals():
    frames, _ = scene(0)
    with pytest.raises(ValueError, match=r"--baseline must be one of reference, unaligned, .*, got 'magic'"):
        fuse_baseline("magic", frames, EVS)
