"""Exposures and camera curves that are read off frames, of which the truth is known."""

import pytest
import torch

from safnet.calibrate import KNOTS, calibrate, develop, measure_curve, measure_evs
from safnet.evaluation.baselines import fuse_baseline
from safnet.metrics import psnr_mu
from safnet.radiance import GAMMA, exposure_ratios
from tests.support.scenes import expose, make_radiance

EVS = (-2.0, 0.0, 2.0)
STILL = [torch.zeros(1, 2, 128, 192)] * 2


def contrast(ldr):
    """The S-curve of a camera that darkens shadows and lightens highlights, up to 1.3 stops."""
    return ldr**1.6 / (ldr**1.6 + (1 - ldr) ** 1.6)


def shoot(seed=0, camera=lambda ldr: ldr, levels=255, moved=0):
    """Frames (1, 3, H, W) with EVS of what stands still but for the lower rows, and the radiance."""
    radiance = make_radiance(seed, height=128, width=192)
    frames = []
    for ratio in exposure_ratios(EVS):
        frame = expose(radiance, ratio, 2**16 - 1) / 2.0**16
        if moved:
            frame[-moved:] = frame[-moved:][:, ::-1] if ratio != 4 else frame[-moved:]
        frames.append((torch.from_numpy(camera(frame) * levels).round() / levels).float().permute(2, 0, 1)[None])
    return frames, torch.from_numpy(radiance).permute(2, 0, 1)[None]


@pytest.mark.parametrize("error", [(0.0, 0.0), (-0.1, 0.1), (0.15, 0.15), (0.4, -0.3)])
@pytest.mark.parametrize("moved", [0, 40])
def test_wrong_evs_are_measured_though_things_have_moved(error, moved):
    frames, _ = shoot(moved=moved)
    given = EVS[0] + error[0], EVS[1], EVS[2] + error[1]
    measured = measure_evs(frames, STILL, given)
    assert measured[1] == EVS[1]
    assert measured == pytest.approx(EVS, abs=0.02)
    assert measure_curve(frames, STILL, given) is None, "one error at all levels is no curve"


def test_frames_are_compared_where_they_show_the_same():
    shift = 7
    frames, _ = shoot(levels=2**16 - 1)
    frames[0] = frames[0].roll(shift, 3)
    flow = torch.zeros(1, 2, 128, 192)
    flow[:, 0] = shift
    assert measure_evs(frames, [flow, STILL[1]], (-1.8, 0.0, 2.0))[0] == pytest.approx(-2.0, abs=0.01)


@pytest.mark.parametrize("moved", [0, 40])
def test_a_cameras_curve_is_undone(moved):
    frames, _ = shoot(camera=contrast, moved=moved)
    straight, _ = shoot(levels=2**16 - 1, moved=moved)
    result = calibrate(frames, EVS, lambda frames, evs: STILL)
    assert result.evs == pytest.approx(EVS, abs=0.1)
    assert result.curve is not None

    def errors(pictures):
        """In stops, of all frames together, but for the one factor that frames cannot tell: what their white is."""
        inside = [(wanted > 0.1) & (wanted < 0.9) for wanted in straight]
        stops = torch.cat([GAMMA * (p / w).log2()[i] for p, w, i in zip(pictures, straight, inside, strict=True)])
        return (stops - stops.median()).abs().mean()

    assert errors(frames) > 0.5
    assert errors([result.straighten(frame) for frame in frames]) < 0.2 * errors(frames)


@pytest.mark.parametrize("seed", range(4))
def test_gamma_2_2_with_noise_is_left_alone(seed):
    noise = torch.Generator().manual_seed(seed)
    frames, _ = shoot(seed)
    frames = [(frame + 0.02 * torch.randn(frame.shape, generator=noise)).clamp(0, 1) for frame in frames]
    result = calibrate(frames, EVS, lambda frames, evs: STILL)
    assert result.curve is None
    assert result.evs == pytest.approx(EVS, abs=0.03)
    assert result.straighten(frames[0]) is frames[0]


def test_large_frames_are_compared_at_a_smaller_size():
    frames, _ = shoot(camera=contrast)
    large = [torch.nn.functional.interpolate(frame, scale_factor=8, mode="bilinear") for frame in frames]
    sizes = []

    def align(frames, evs):
        sizes.append(frames[0].shape[2:])
        return [torch.zeros(1, 2, *sizes[0])] * 2

    result = calibrate(large, EVS, align)
    assert sizes == [(836, 1254)]  # of 1024 x 1536
    torch.testing.assert_close(result.curve, calibrate(frames, EVS, lambda *_: STILL).curve, rtol=0, atol=0.1)


def test_what_does_not_show_stays_as_given():
    generator = torch.Generator().manual_seed(0)
    unrelated = [torch.rand(1, 3, 128, 192, generator=generator) for _ in range(3)]
    black, white = torch.zeros(1, 3, 128, 192), torch.ones(1, 3, 128, 192)
    for frames in (unrelated, [black, black, black], [black, white, white], [black, black, white]):
        result = calibrate(frames, EVS, lambda frames, evs: STILL)
        assert result.evs == EVS
        assert result.curve is None
    pixel = [torch.full((1, 3, 1, 1), 0.5)] * 3
    assert calibrate(pixel, EVS, lambda frames, evs: [torch.zeros(1, 2, 1, 1)] * 2).curve is None


def test_nan_hides_no_exposure():
    frames, _ = shoot()
    for frame in frames:
        frame[..., 10:20, 30:60] = torch.nan
    assert measure_evs(frames, STILL, (-1.8, 0.0, 2.1)) == pytest.approx(EVS, abs=0.02)
    assert measure_curve(frames, STILL, EVS) is None


def test_exposures_that_would_not_ascend_stay_as_given():
    frames, _ = shoot()
    assert measure_evs([frames[1], frames[1], frames[2]], STILL, EVS) == EVS


@pytest.mark.parametrize("evs", [(0.0, 2.0), (2.0, 0.0, -2.0), (-2.0, 0.0, float("nan"))])
def test_evs_that_do_not_ascend_are_refused(evs):
    frames, _ = shoot()
    with pytest.raises(ValueError, match=r"evs must be three finite numbers that ascend, got \("):
        calibrate(frames, evs, lambda *_: STILL)


def test_frames_of_another_shape_are_refused():
    frames, _ = shoot()
    for wrong in (frames[:2], [frame[0] for frame in frames], [*frames[:2], frames[2][..., 1:]]):
        with pytest.raises(ValueError, match=r"frames must be three of \(1, 3, H, W\), got \["):
            calibrate(wrong, EVS, lambda *_: STILL)


def test_develop_keeps_black_white_and_order():
    curve = torch.linspace(3, 0, KNOTS)
    ldr = torch.linspace(0, 1, 256).view(1, 1, 1, 256)
    developed = develop(ldr, curve)[0, 0, 0]
    assert developed[0] == 0
    assert developed[-1] == 1
    assert (developed.diff() > 0).all()
    torch.testing.assert_close(developed[64], ldr[0, 0, 0, 64] * 2 ** (3 * (1 - (64 / 255) ** 0.5) / GAMMA))


def test_a_fusion_gains_what_its_frames_gain():
    frames, truth = shoot(camera=contrast)
    plain, measured = (fuse_baseline("unaligned", torch.cat(frames), EVS, measure) for measure in (False, True))
    assert plain.curve is None
    assert measured.curve is not None
    scores = []
    for result in (plain, measured):
        white = (truth / result.radiance).median()  # which frames cannot tell
        scores.append(psnr_mu((white * result.radiance)[0].clamp(0, 1), truth[0]))
    assert scores[1] > scores[0] + 8
