"""Pictures for eyes: each must show what its legend says."""

import colorsys

import numpy as np
import pytest
import torch

from safnet import pictures
from safnet.fuse import Result
from safnet.model import Alignment, Fusion


@pytest.fixture
def radiance():
    return np.random.default_rng(3).random((20, 30, 3), np.float32) ** 4


def test_mu_law_is_the_literature_s(radiance):
    shown = pictures.display_curve(radiance, "mu-law")(radiance)
    expected = np.log(1 + 5000 * radiance.astype(np.float64)) / np.log(5001)
    assert shown.dtype == np.uint8
    assert np.abs(shown - 255 * expected).max() <= 0.501


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_reinhard_fits_the_picture(radiance, scale):
    picture = radiance * np.float32(scale)
    shown = pictures.display_curve(picture, "reinhard")(picture)
    assert 70 < np.median(shown) < 170, "middle grey must be near the middle at any exposure"
    assert shown.max() == 255
    ramp = np.repeat(np.linspace(0, scale, 200, dtype=np.float32)[None, :, None], 3, 2)
    grey = pictures.display_curve(picture, "reinhard")(ramp)[0]
    assert (np.diff(grey[:, 0].astype(int)) >= 0).all()
    assert (grey == grey[:, :1]).all(), "grey must stay grey"


def test_black_pictures_stay_finite():
    black = np.zeros((4, 5, 3), np.float32)
    for kind in ("mu-law", "reinhard"):
        assert (pictures.display_curve(black, kind)(black) == 0).all()


@pytest.mark.parametrize("angle", range(0, 360, 30))
def test_flow_hue_is_its_direction(angle):
    flow = np.float32([np.cos(np.radians(angle)), np.sin(np.radians(angle))])[:, None, None]
    expected = 255 * np.array(colorsys.hsv_to_rgb(angle / 360, 1, 1))
    assert np.abs(pictures.flow_picture(flow * 8, 8.0)[0, 0] - expected).max() <= 1
    half = 255 * np.array(colorsys.hsv_to_rgb(angle / 360, 0.5, 1))
    assert np.abs(pictures.flow_picture(flow * 4, 8.0)[0, 0] - half).max() <= 1
    assert (pictures.flow_picture(flow * 80, 8.0) == pictures.flow_picture(flow * 8, 8.0)).all()


def test_flow_legend_agrees_with_the_flow():
    picture = np.zeros((100, 150, 3), np.uint8)
    pictures.draw_flow_wheel(picture)
    right, below = picture[9, 148], picture[17, 139]
    assert pictures.flow_picture(np.float32([9, 0])[:, None, None], 9.0)[0, 0] == pytest.approx(
        picture[10, 147], abs=45
    )
    assert right.argmax() == 0, "red is to the right"
    assert below.argmin() == 2, "yellow-green is below"
    assert (picture[50:] == 0).all()


def test_flow_reach():
    still = np.zeros((2, 10, 10), np.float32)
    assert pictures.flow_reach([still, still]) == 1
    assert pictures.flow_reach([still + np.float32([[[3]], [[4]]])]) == pytest.approx(5)


def test_mask_is_white_where_used():
    assert pictures.mask_picture(np.float32([[0, 0.5, 1]])).tolist() == [[[0] * 3, [128] * 3, [255] * 3]]


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (2, 300)])
def test_inspection(size):
    torch.manual_seed(1)
    frames = [torch.full((1, 3, *size), value) for value in (0.2, 0.5, 0.8)]
    alignment = Alignment(
        torch.zeros(1, 2, *size), torch.ones(1, 2, *size), torch.zeros(1, 1, *size), torch.ones(1, 1, *size)
    )
    result = Result(
        torch.full((1, 3, *size), 0.3), Fusion(torch.full((1, 3, *size), 0.1), alignment), (-2, 0, 2), None, (-2, 0, 2)
    )
    radiance = pictures.to_picture(result.radiance)
    shown = pictures.inspection(frames, ["a", "b", "c"], result, radiance, pictures.display_curve(radiance, "mu-law"))
    assert tuple(shown) == pictures.INSPECTION_FILES
    sheet = shown.pop("sheet.png")
    assert {picture.shape for picture in shown.values()} == {(*size, 3)}
    assert (shown["flow_short.png"] == 255).all(), "no motion is white; the legend belongs on the sheet only"
    assert shown["refined.png"].min() > shown["fused.png"].max()
    assert exposures_in(sheet) == [[51] * 3, [128] * 3, [204] * 3]


def exposures_in(sheet):
    """Colours in the middle of the three cells of the first row."""
    cell_height, cell_width = ((side - pictures.GAP) // 3 for side in sheet.shape[:2])
    row = pictures.GAP + pictures.TITLE_HEIGHT + (cell_height - pictures.GAP - pictures.TITLE_HEIGHT) // 2
    return [sheet[row, pictures.GAP + column * cell_width + cell_width // 3].tolist() for column in range(3)]
