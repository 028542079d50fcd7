import math

import pytest
import torch

from safnet.model import Alignment
from safnet.radiance import tone_map
from safnet.training.losses import census_loss, flow_loss, picture_loss, psnr_loss


def alignment(flow_short, flow_long, cell):
    """What a level whose cells are `cell` pixels wide says when it is right about these flows (N, 2, H, W)."""
    flows = [torch.nn.functional.avg_pool2d(flow, cell) / cell for flow in (flow_short, flow_long)]
    return Alignment(*flows, *(torch.zeros_like(flow[:, :1]) for flow in flows))


@pytest.fixture
def flow():
    """Smooth flow (2, 2, 2, 32, 64): one vector for each picture and frame."""
    return torch.randn(2, 2, 2, 1, 1, generator=torch.Generator().manual_seed(0)).mul(9).expand(-1, -1, -1, 32, 64)


def test_right_flow_costs_no_more_than_the_rounding_of_the_norm(flow):
    levels = [alignment(flow[:, 0], flow[:, 1], cell) for cell in (8, 4, 2)]
    visible = torch.ones(2, 2, 32, 64, dtype=torch.bool)
    assert flow_loss(levels, flow, visible) < 0.37  # terms of 0.1 pixels: four that count 0.4, two whole


def test_a_wrong_flow_costs_the_logarithm_of_its_length_in_pixels_of_the_picture(flow):
    visible = torch.ones(2, 2, 32, 64, dtype=torch.bool)
    off = flow.clone()
    off[:, 1, 0] += 30.0
    loss = flow_loss([alignment(flow[:, 0], off[:, 1], 4)], flow, visible)
    assert loss.item() == pytest.approx(4 * math.log1p(30 / 4), abs=0.2)


def test_x_and_y_are_scaled_by_their_own_sides():
    flow = torch.zeros(1, 2, 2, 32, 64)
    flow[:, :, 0], flow[:, :, 1] = 8.0, 4.0
    level = torch.zeros(1, 2, 8, 8)
    level[:, 0], level[:, 1] = 1.0, 1.0  # cells of 8 x 4 pixels
    mask = torch.zeros(1, 1, 8, 8)
    visible = torch.ones(1, 2, 32, 64, dtype=torch.bool)
    assert flow_loss([Alignment(level, level, mask, mask)], flow, visible).item() == pytest.approx(
        2 * 4 * math.log1p(0.1 / 4)
    )


def test_hidden_surfaces_teach_no_flow(flow):
    estimate = torch.zeros(2, 2, 16, 32, requires_grad=True)
    mask = torch.zeros(2, 1, 16, 32)
    visible = torch.zeros(2, 2, 32, 64, dtype=torch.bool)
    visible[0, 0, :8] = True
    flow_loss([Alignment(estimate, estimate, mask, mask)], flow, visible).backward()
    assert estimate.grad[0, :, :4].abs().min() > 0
    assert estimate.grad[0, :, 4:].abs().max() == 0
    assert estimate.grad[1].abs().max() == 0


def test_what_is_hidden_elsewhere_does_not_dilute_the_flow(flow):
    estimate, mask = torch.zeros(2, 2, 16, 32), torch.zeros(2, 1, 16, 32)
    levels = [Alignment(estimate, estimate, mask, mask)]
    visible = torch.ones(2, 2, 32, 64, dtype=torch.bool)
    half = visible.clone()
    half[..., 32:] = False
    torch.testing.assert_close(flow_loss(levels, flow, half), flow_loss(levels, flow, visible))
    assert flow_loss(levels, flow, torch.zeros_like(visible)) == 0


def test_psnr_loss_falls_alike_for_bright_and_for_dark_pictures():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 3, 16, 16, generator=generator)
    for level in (0.1, 0.5):
        truth = torch.full((1, 3, 16, 16), level)
        worse, better = (psnr_loss(truth + size * level * noise, truth) for size in (0.2, 0.1))
        assert (worse - better).item() == pytest.approx(1.4 * math.log(4), rel=0.1)


def test_pictures_are_compared_as_displayed():
    truth = torch.full((1, 3, 8, 8), 0.01)
    prediction = torch.full((1, 3, 8, 8), 0.02)
    expected = tone_map(torch.tensor(0.02)) - tone_map(torch.tensor(0.01))
    assert picture_loss(prediction, truth).item() == pytest.approx(expected.item(), rel=1e-4)


def test_census_sees_structure_and_not_brightness():
    random = torch.Generator().manual_seed(0)
    truth = torch.rand(1, 3, 24, 24, generator=random)
    brighter = (torch.expm1(tone_map(truth).mul(0.9).add(0.05) * 8.5174) / 5000).clamp(0, 1)
    shuffled = truth[:, :, torch.randperm(24, generator=random)]
    assert (
        census_loss(truth, truth) < 1e-12
    )  # not exactly 0: compilers may fuse operations of the two pictures differently
    assert census_loss(brighter, truth) < 0.1 * census_loss(shuffled, truth)
