"""What makes a preview a photograph: hue, highlights, contrast and brightness, in numbers."""

import numpy as np
import pytest

from safnet.looks import LOOKS, photograph
from safnet.pictures import display_curve

SKY = np.array([197, 223, 250], np.float32)  # as a camera shows it
SKY_LIGHT = (SKY / 255) ** np.float32(2.2)
GREY = 130  # sRGB of 22 % of white


def field(*colours):
    """A picture of columns of colours, 40 pixels wide each."""
    return np.tile(np.repeat(np.array(colours, np.float32), 40, 0)[None], (60, 1, 1))


def shown(radiance, **options):
    return display_curve(radiance, "photo", **options)(radiance)


def light_of(codes):
    """Linear light of 8-bit sRGB."""
    codes = np.asarray(codes, np.float64) / 255
    return np.where(codes <= 0.04045, codes / 12.92, ((codes + 0.055) / 1.055) ** 2.4)


def hue(colour):
    """Where the middle colour lies between the least and the most."""
    low, middle, high = np.sort(colour)
    return (middle - low) / (high - low)


def columns(picture):
    return picture[30, 20::40].astype(int)


@pytest.mark.parametrize("look", LOOKS)
def test_highlights_keep_their_hue_and_go_to_white(look):
    lights = 2.0 ** np.arange(-2, 7)
    radiance = field(*(SKY_LIGHT * light for light in lights))
    colours = columns(shown(radiance, look=look))
    spread = light_of(colours).max(1) - light_of(colours).min(1)
    assert (spread[:3] > 0.1).all()
    for colour in colours[spread > 0.1]:  # of what is nearly white, 8 bits hold no hue
        assert hue(light_of(colour)) == pytest.approx(hue(SKY_LIGHT), abs=0.06)
    relative = spread / light_of(colours).max(1)
    assert (np.diff(relative) <= 0.01).all(), "brighter is whiter"
    assert relative[-1] < 0.15 < relative[0]
    assert (np.diff(colours.sum(1)) >= 0).all()


def test_bright_sky_does_not_turn_cyan():
    """One channel at 255 and others not is what a clipped colour looks like."""
    random = np.random.default_rng(3)
    radiance = SKY_LIGHT * random.uniform(0.2, 4, (80, 120, 1)).astype(np.float32)
    picture = shown(radiance)
    bright = picture[picture.max(2) > 200]
    assert len(bright) > 1000
    assert ((bright == 255).any(1) & (bright.min(1) < 250)).mean() < 0.05


@pytest.mark.parametrize("exposure", [1.0, 4.0])
@pytest.mark.parametrize("look", LOOKS)
def test_middle_grey_stays_where_the_reference_has_it(look, exposure):
    ramp = np.repeat((0.18 * 2.0 ** np.linspace(-3, 2, 120, dtype=np.float32))[None, :, None], 3, 2) / np.float32(
        exposure
    )
    radiance = np.tile(ramp, (60, 1, 1))
    grey = shown(radiance, look=look, exposure=exposure)[30]
    assert (grey == grey[:, :1]).all(), "grey stays grey"
    assert (np.diff(grey[:, 0].astype(int)) >= 0).all()
    middle = np.abs(ramp[0, :, 0] * exposure - 0.18).argmin()
    assert grey[middle, 0] == pytest.approx(GREY, abs=4)


def test_looks_differ_in_contrast_as_they_say():
    """In stops shown per stop around middle grey, where nothing is compressed."""
    radiance = field((0.15,) * 3, (0.18,) * 3, (0.22,) * 3)
    contrast = {}
    for look in LOOKS:
        show = photograph(radiance, 1.0, look)
        low, _, high = show(radiance, 0)[30, 20::40, 0]
        contrast[look] = np.log2(high / low) / np.log2(0.22 / 0.15)
    assert contrast["flat"] < contrast["neutral"] < contrast["natural"]
    assert contrast["natural"] > 1.2, "as much as cameras have"


def test_shade_is_opened_and_edges_are_clean():
    """Sunlight beside shade six stops darker, both with texture."""
    random = np.random.default_rng(1)
    texture = (1 + 0.2 * random.standard_normal((240, 320, 1))).clip(0.5, 1.5).astype(np.float32)
    radiance = np.repeat(texture, 3, 2) * np.float32(0.6)
    radiance[:, :160] /= 64
    pictures = {look: shown(radiance, look=look).astype(int)[..., 0] for look in LOOKS}
    shade = {look: np.median(picture[:, :140]) for look, picture in pictures.items()}
    assert shade["natural"] > shade["neutral"] + 5
    assert shade["flat"] > shade["natural"]
    for picture in pictures.values():
        near, far = np.median(picture[:, 162:170]), np.median(picture[:, 250:310])
        assert abs(near - far) < 25, "no bright fringe beside the shade"
        assert np.median(picture[:, 150:158]) < np.median(picture[:, 162:170])


def test_brightness_is_in_stops():
    radiance = field((0.05, 0.04, 0.03), (0.2, 0.3, 0.1), (0.5, 0.5, 0.6))
    assert (shown(radiance, look="neutral", brightness=1.0) == shown(radiance, look="neutral", exposure=2.0)).all()
    for kind in ("photo", "reinhard", "mu-law"):
        darker, plain, lighter = (
            display_curve(radiance, kind, brightness=stops)(radiance).mean() for stops in (-1.5, 0.0, 1.5)
        )
        assert darker < plain < lighter


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (64, 64), (65, 200), (700, 900)])
def test_any_size_and_what_lies_outside_of_the_space(size):
    radiance = np.random.default_rng(5).normal(0.1, 0.3, (*size, 3)).astype(np.float32)
    picture = shown(radiance)
    assert picture.shape == radiance.shape
    black = np.zeros((*size, 3), np.float32)
    assert (shown(black) == 0).all()


def test_rows_at_a_time_are_the_whole():
    radiance = np.random.default_rng(5).uniform(0, 2, (150, 90, 3)).astype(np.float32) ** 4
    show = photograph(radiance, 1.0, "natural")
    parts = np.concatenate([show(radiance[first : first + 37], first) for first in range(0, 150, 37)])
    assert np.abs(parts - show(radiance, 0)).max() < 2e-3
