"""Alignment of frames of any size: shifts and rolls by a share of the frame, at one quality whatever the number of pixels."""

import re

import pytest
import torch

import safnet
from safnet.align import full_size, network_sizes, reduce_frames
from safnet.calibrate import Calibration
from safnet.fuse import _source_of
from safnet.metrics import psnr_mu
from safnet.model import Alignment
from safnet.motion import Motion, estimate_motion, motion_flow
from tests.support.scenes import handheld

EVS = (-2.0, 0.0, 2.0)


@pytest.fixture(scope="module")
def model():
    return safnet.load_model("safnet-s")


def fused_score(model, truth, frames, **options):
    result = safnet.fuse_exposures(model, frames, EVS, keep_fusion=False, **options)
    return float(psnr_mu(result.radiance[0], truth[0]))


def test_global_motion_is_found():
    frames, _, flow = handheld(shift=(72.0, 10.0), roll=5.0)
    motion = reduce_frames(frames, EVS).motions[0]
    assert motion.roll == pytest.approx(5, abs=0.2)
    found = motion_flow(motion.matrix, *flow.shape[1:])[0]
    assert (found - flow).norm(dim=0).mean() < 1.0
    assert flow.norm(dim=0).mean() > 60


def test_a_still_camera_is_left_still():
    frames, _, _ = handheld()
    assert all(motion.is_still for motion in reduce_frames(frames, EVS).motions)


@pytest.mark.parametrize("other", ["noise", "grey", "tiny"])
def test_thin_evidence_is_not_believed(other):
    reference = handheld()[0][1][0]
    torch.manual_seed(3)
    frames = {"noise": torch.rand_like(reference), "grey": torch.full_like(reference, 0.5), "tiny": reference}
    if other == "tiny":
        reference, frames["tiny"] = reference[:, :40, :40], reference[:, 5:45, 5:45]
    assert estimate_motion(reference, frames[other], 1.0, 1.0).is_still


def test_a_frame_upside_down_is_noticed_and_not_followed():
    reference = handheld()[0][1][0]
    motion = estimate_motion(reference, reference.flip(1, 2), 1.0, 1.0)
    assert motion.is_still
    assert abs(motion.roll) == pytest.approx(180, abs=1)


def test_handheld_frames_are_fused_as_well_as_still_ones(model):
    """Where the outer frames show the reference's view: shifts of 15 % of the width and a roll of 5 degrees."""
    frames, truth, _ = handheld(shift=(72.0, 10.0), roll=5.0)
    middle = (..., slice(60, -60), slice(110, -110))
    result = safnet.fuse_exposures(model, frames, EVS)
    assert psnr_mu(result.radiance[middle][0], truth[middle][0]) > 40
    blind = safnet.fuse_exposures(model, frames, EVS, global_motion=False)
    assert psnr_mu(blind.radiance[middle][0], truth[middle][0]) < 36
    assert 0.75 < min(result.covered) < 0.9


def test_the_number_of_pixels_does_not_matter(model):
    once, twice = (
        fused_score(model, truth, frames)
        for frames, truth, _ in (handheld((10.0, 2.0), scale=scale) for scale in (1, 2))
    )
    assert once > 48
    assert twice > once - 2.5


def test_files_bits_are_taken_as_they_are(model):
    frames, _, _ = handheld((10.0, 2.0), height=96, width=128, levels=255)
    bits = [(frame * 256).round().clamp(max=255).to(torch.uint8) for frame in frames]
    floats = [frame.float() / 255 for frame in bits]
    first, second = (safnet.fuse_exposures(model, given, EVS).radiance for given in (bits, floats))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_tiles_and_whole_agree(model):
    frames, _, _ = handheld((30.0, 5.0), roll=3.0, noise=0.01)
    whole, tiled = (safnet.fuse_exposures(model, frames, EVS, tile=tile) for tile in (0, 100))
    assert whole.fusion.alignment.flow_short.abs().max() > 30
    assert (whole.radiance - tiled.radiance).abs().max() < 1e-4


def test_part_of_the_full_size_is_that_of_the_whole():
    torch.manual_seed(0)
    alignment = Alignment(*(torch.randn(1, channels, 7, 9) for channels in (2, 2, 1, 1)))
    whole = full_size(alignment, 50, 41, slice(0, 50), slice(0, 41))
    part = full_size(alignment, 50, 41, slice(13, 30), slice(5, 41))
    for one, other in zip(whole, part, strict=True):
        torch.testing.assert_close(one[..., 13:30, 5:41], other)
    expected = torch.nn.functional.interpolate(alignment.flow_short, (50, 41), mode="bilinear", align_corners=False)
    torch.testing.assert_close(whole.flow_short, expected * torch.tensor([41 / 9, 50 / 7]).view(1, 2, 1, 1))


def test_source_holds_all_that_a_tile_needs():
    torch.manual_seed(0)
    flow = 60 * torch.randn(1, 2, 20, 30)
    tile, size = (slice(40, 60), slice(0, 30)), (100, 120)
    (rows, columns), moved = _source_of(flow, tile, size, 2)
    assert moved.shape[2:] == (rows.stop - rows.start, columns.stop - columns.start)
    y = (torch.arange(40, 60.0)[:, None] + flow[0, 1]).clamp(0, 99)
    x = (torch.arange(30.0) + flow[0, 0]).clamp(0, 119)
    assert rows.start <= max(y.min() - 2, 0)
    assert rows.stop >= min(y.max() + 2, 100)
    assert columns.start <= max(x.min() - 2, 0)
    assert columns.stop >= min(x.max() + 2, 120)


def test_sizes_double_up_to_the_frame():
    assert network_sizes(1000, 1500) == [(160, 240), (320, 480), (640, 960)]
    assert network_sizes(20, 300) == [(16, 304)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda f: [f[1], f[1], f[1]], "three frames are one and the same picture"),
        (lambda f: [f[0].flip(2, 3), f[1], f[2]], "short frame is turned by .*180 degrees"),
        (lambda f: [f[0], f[1], f[2].flip(3).flip(1)], "long frame matches the reference in"),
        (lambda f: [f[0].pow(1.0) * 2 ** (-1 / 2.2), f[1], f[2]], "short frame is 1.0 stops darker than its EV says"),
        (
            lambda f: [f[0] * torch.tensor([0.85, 1.0, 1.0]).view(1, 3, 1, 1), f[1], f[2]],
            "short frame has other colours",
        ),
    ],
)
def test_frames_that_do_not_fit_are_named(model, change, sentence):
    frames = change(handheld((6.0, 2.0))[0])
    result = safnet.fuse_exposures(model, frames, EVS, measure=True, keep_fusion=False)
    assert any(re.search(sentence, said) for said in result.advice), result.advice


def test_frames_that_fit_are_not_complained_of(model):
    assert safnet.fuse_exposures(model, handheld((6.0, 2.0))[0], EVS, measure=True, keep_fusion=False).advice == ()


def test_no_motion_is_no_motion():
    assert Motion.none().is_still
    assert Calibration(EVS).measured == (None, None)
