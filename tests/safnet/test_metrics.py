"""Scores against independent implementations: SciPy, scikit-image, OpenCV, numpy.

MATLAB's `ssim(A, ref)` takes an RGB array for a volume: an 11x11x11 Gaussian of sigma 1.5, borders replicated, a mean
over all voxels. SciPy's gaussian_filter with mode "nearest" and radius 5 does so in code that shares nothing with ours.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safnet import metrics
from safnet.radiance import tone_map
from tests.support.scenes import make_radiance

MATLAB_TOLERANCE = 1e-5  # ten times tighter than what published tables show


def photograph(name):
    data = pytest.importorskip("skimage.data")
    return getattr(data, name)().astype(np.float64)[:300, :400] / 255


def distort(picture):
    random = np.random.default_rng(1)
    blurred = (picture + np.roll(picture, 1, 0) + np.roll(picture, 1, 1)) / 3
    return np.clip(blurred + random.normal(0, 0.02, picture.shape), 0, 1)


def planes(picture):
    return torch.from_numpy(np.moveaxis(picture, -1, 0).copy())


def scipy_ssim(x, y, data_range, volume):
    ndimage = pytest.importorskip("scipy.ndimage")

    def blur(values):
        axes = (0, 1, 2) if volume else (0, 1)
        return ndimage.gaussian_filter(values, 1.5, mode="nearest", radius=5, axes=axes)

    mean_x, mean_y = blur(x), blur(y)
    variance_x, variance_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (numerator / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))).mean()


@pytest.mark.parametrize("name", ["coffee", "chelsea", "astronaut"])
@pytest.mark.parametrize("linear", [False, True], ids=["display values", "linear radiance"])
@pytest.mark.parametrize("volume", [True, False], ids=["volume", "channels"])
def test_ssim_is_matlabs(name, linear, volume):
    truth = photograph(name)
    result = distort(truth)
    if linear:
        truth, result = truth**2.2 / 4, result**2.2 / 4
    expected = scipy_ssim(result, truth, 1.0, volume)
    assert metrics.ssim(planes(result), planes(truth), volume=volume) == pytest.approx(expected, abs=MATLAB_TOLERANCE)


def test_ssim_of_channels_is_scikit_images():
    similarity = pytest.importorskip("skimage.metrics").structural_similarity
    truth = photograph("coffee")
    result = distort(truth)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    expected = similarity(result, truth, channel_axis=2, **options)
    # scikit-image leaves out the border that its window overlaps.
    inside = metrics.ssim_map(planes(result), planes(truth), volume=False)[:, 5:-5, 5:-5]
    assert float(inside.mean()) == pytest.approx(expected, abs=MATLAB_TOLERANCE)


def test_a_volume_is_not_its_channels():
    """The reason for all this: on colour pictures the two differ in the first decimal."""
    truth = photograph("coffee")
    pair = planes(distort(truth)), planes(truth)
    assert metrics.ssim(*pair, volume=True) > metrics.ssim(*pair, volume=False) + 0.1


def test_psnr_is_opencvs_and_scikit_images():
    cv2 = pytest.importorskip("cv2")
    ratio = pytest.importorskip("skimage.metrics").peak_signal_noise_ratio
    truth = photograph("chelsea")
    result = distort(truth)
    ours = metrics.psnr(planes(result), planes(truth))
    assert ours == pytest.approx(cv2.PSNR(result, truth, 1.0), abs=1e-9)
    assert ours == pytest.approx(ratio(truth, result, data_range=1.0), abs=1e-9)


def test_scores_of_a_known_error():
    truth = torch.full((3, 20, 24), 0.25)
    assert metrics.psnr_l(truth + 0.01, truth) == pytest.approx(40, abs=1e-3)
    mapped = math.log1p(5000 * 0.26) / math.log1p(5000) - math.log1p(5000 * 0.25) / math.log1p(5000)
    assert metrics.psnr_mu(truth + 0.01, truth) == pytest.approx(-20 * math.log10(mapped), abs=1e-3)


def test_equal_pictures():
    picture = planes(make_radiance())
    scores = metrics.score(picture, picture, {"clipped": torch.ones(64, 96, dtype=torch.bool)})
    assert scores.pop("pu21_psnr") == scores.pop("psnr_mu_clipped") == math.inf
    assert scores.pop("psnr_mu") == scores.pop("psnr_l") == math.inf
    assert scores == pytest.approx({"ssim_mu": 1.0, "ssim_l": 1.0, "pu21_ssim": 1.0}, abs=1e-6)


def test_score_agrees_with_its_parts():
    truth, result = planes(make_radiance()), planes(make_radiance(shift=1))
    region = torch.zeros(64, 96, dtype=torch.bool)
    region[10:20, 30:50] = True
    scores = metrics.score(result, truth, {"moving": region, "clipped": torch.zeros_like(region)})
    assert scores["psnr_l"] == metrics.psnr_l(result, truth)
    assert scores["psnr_mu"] == metrics.psnr_mu(result, truth)
    assert scores["ssim_mu"] == pytest.approx(metrics.ssim(tone_map(result), tone_map(truth)), abs=1e-6)
    assert scores["psnr_mu_moving"] == metrics.psnr_mu(result[:, 10:20, 30:50], truth[:, 10:20, 30:50])
    assert "psnr_mu_clipped" not in scores


def test_negative_values_count_as_zero():
    truth, result = planes(make_radiance()), planes(make_radiance(shift=1))
    result[:, :5] = 0
    negative = result.clone()
    negative[:, :5] = -0.3
    assert metrics.score(negative, truth) == metrics.score(result, truth)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_score_refuses_what_is_not_finite(value):
    truth = planes(make_radiance())
    result = truth.clone()
    result[0, 0, :2] = value
    with pytest.raises(ValueError, match="prediction must hold finite numbers, but 2 of 18432 are not"):
        metrics.score(result, truth)
    with pytest.raises(ValueError, match="truth must hold finite numbers"):
        metrics.score(truth, result)


def test_score_refuses_another_shape():
    truth = planes(make_radiance())
    with pytest.raises(ValueError, match=r"must have the truth's shape \(3, 64, 96\), got \(3, 64, 95\)"):
        metrics.score(truth[:, :, 1:], truth)


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 30), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ssim_is_symmetric_and_bounded(seed, height, width, volume):
    random = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(3, height, width, generator=random) for _ in range(2))
    forward, backward = metrics.ssim(x, y, volume=volume), metrics.ssim(y, x, volume=volume)
    assert forward == pytest.approx(backward, abs=1e-6)
    assert -1 <= forward <= 1 + 1e-6


def test_pu21_at_the_ends_of_its_range():
    encoded = metrics.pu21_encode(torch.tensor([0.0, 0.005, 100.0, 10000.0, 1e6]))
    # 595.3939 at 10000 cd/m^2 is what its authors list as the encoding's maximum, 256 at 100 cd/m^2 what they aim at.
    assert encoded.tolist() == pytest.approx([0, 0, 256, 595.3939, 595.3939], abs=0.5)
    ramp = metrics.pu21_encode(torch.logspace(-2, 4, 500, dtype=torch.float64))
    assert (ramp.diff() > 0).all()


def test_pu21_scores_see_darks_that_linear_ones_do_not():
    truth = torch.full((3, 16, 16), 0.002)
    linear = metrics.psnr_l(truth * 2, truth)
    encoded, _ = metrics.pu21_scores(truth * 2, truth)
    assert linear > 50 > 30 > encoded


def test_ntire_scores_by_the_book():
    random = np.random.default_rng(2)
    truth = random.uniform(0, 1.8, (3, 30, 40))
    result = np.clip(truth + random.normal(0, 0.03, truth.shape), 0, None)

    def mapped(encoded):
        bounded = np.tanh(encoded**2.24 / np.percentile(truth**2.24, 99))
        return np.log(1 + 5000 * bounded) / np.log(1 + 5000)

    def psnr(x, y):
        return -10 * np.log10(np.mean((x - y) ** 2))

    expected = psnr(mapped(result), mapped(truth)), psnr(result / truth.max(), truth / truth.max())
    assert metrics.ntire_scores(torch.from_numpy(result), torch.from_numpy(truth), 2.24) == pytest.approx(expected)


def test_through_rgbe_is_what_an_hdr_file_returns(tmp_path):
    cv2 = pytest.importorskip("cv2")
    random = np.random.default_rng(3)
    radiance = (random.random((40, 50, 3)) ** 4).astype(np.float32)
    radiance[:2] = 0
    radiance[2, :5] = [1.0, 0.5, 2.0**-12]
    path = str(tmp_path / "picture.hdr")
    cv2.imwrite(path, radiance[:, :, ::-1])
    stored = cv2.imread(path, cv2.IMREAD_UNCHANGED)[:, :, ::-1]
    assert torch.equal(metrics.through_rgbe(planes(radiance)), planes(stored))


def test_color_video_vdp():
    pytest.importorskip("pycvvdp", reason="the package cvvdp is not installed")
    judge = metrics.ColorVideoVDP()
    truth = planes(make_radiance())
    noisy = truth + 0.05 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    assert judge(truth, truth) == pytest.approx(10)
    assert judge(noisy.clamp(0, 1), truth) < 9.9


def test_color_video_vdp_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycvvdp", None)
    with pytest.raises(ValueError, match=r"--cvvdp needs the package cvvdp .*pip install"):
        metrics.ColorVideoVDP()


def test_mean():
    assert metrics.mean([1.0, 2.0, 6.0]) == 3
    assert metrics.mean([]) is None
