"""Brackets of two to nine frames."""

import pytest
import torch

import safnet
from safnet.metrics import psnr_mu
from safnet.radiance import StoredFrame, ldr_values
from safnet.series import STAND_IN, best_exposed, merge_, threes
from tests.support.scenes import handheld

SIZE = {"height": 192, "width": 256}


@pytest.fixture(scope="module")
def model():
    return safnet.load_model("safnet-s")


def fused(model, frames, evs, numbers=None, **options):
    """The result of some frames, in units of the darkest of all."""
    numbers = range(len(frames)) if numbers is None else numbers
    chosen = [evs[number] for number in numbers]
    result = safnet.fuse_exposures(model, [frames[number] for number in numbers], chosen, **options)
    return result.radiance * 2.0 ** (evs[0] - chosen[0])


def score(radiance, truth):
    return float(psnr_mu(radiance[0].clamp(0, 1), truth[0]))


def blank(count):
    return [torch.full((1, 3, 8, 8), 0.1 * number) for number in range(count)]


def test_every_frame_has_a_part():
    def numbers(count, reference):
        return [three.numbers for three in threes(blank(count), range(count), reference)]

    assert numbers(3, 1) == [(0, 1, 2)]
    assert numbers(5, 2) == [(0, 2, 4), (1, 2, 3)]
    assert numbers(4, 1) == [(0, 1, 3), (0, 1, 2)]
    assert numbers(2, 0) == [(None, 0, 1)]
    assert numbers(2, 1) == [(0, 1, None)]
    assert numbers(3, 0) == [(None, 0, 2), (None, 0, 1)]
    for count in range(2, 10):
        for reference in range(count):
            used = {number for three in numbers(count, reference) for number in three}
            assert used - {None} == set(range(count))


@pytest.mark.parametrize("kind", ["float", "uint8", "stored"])
def test_a_stand_in_is_the_reference_exposed_a_little_otherwise(kind):
    codes = torch.arange(192, dtype=torch.uint8).view(1, 3, 8, 8)
    frame = {
        "float": codes / 255,
        "uint8": codes,
        "stored": StoredFrame(codes, torch.linspace(0, 1, 256) ** 2),
    }[kind]
    (three,) = threes([frame, frame], [0.0, 2.0], 0)
    assert three.evs == (-STAND_IN, 0.0, 2.0)
    expected = ldr_values(frame) * 2 ** (-STAND_IN / 2.2)
    torch.testing.assert_close(ldr_values(three.frames[0]), expected, rtol=1e-5, atol=1e-6)


def test_of_three_the_middle_one_is_the_reference_and_else_the_best_exposed():
    frames = [torch.full((1, 3, 8, 8), value) for value in (0.0, 0.01, 0.4, 1.0)]
    assert best_exposed(frames) == 2
    assert best_exposed(frames[1:]) == 1
    assert best_exposed(frames[:3]) == 1


def test_five_frames_are_worth_more_than_the_best_three(model):
    evs = (-2.0, -1.0, 0.0, 1.0, 2.0)
    frames, truth, _ = handheld((5.0, 1.0), roll=0.3, noise=0.004, evs=evs, **SIZE)
    three = max(
        score(fused(model, frames, evs, numbers), truth) for numbers in ((0, 2, 4), (1, 2, 3), (0, 2, 3), (1, 2, 4))
    )
    five = score(fused(model, frames, evs, reference=2), truth)
    assert five > three + 0.2
    measured = score(fused(model, frames, evs, reference=2, measure=True), truth)
    assert measured > five - 0.2


@pytest.mark.parametrize(("evs", "reference"), [((-2.0, 0.0), 1), ((0.0, 2.0), 0)])
def test_two_frames_are_worth_more_than_one(model, evs, reference):
    frames, truth, _ = handheld((5.0, 1.0), noise=0.01, evs=evs, **SIZE)
    alone = frames[reference] ** 2.2 / 2 ** (evs[reference] - evs[0])
    result = safnet.fuse_exposures(model, frames, evs, reference=reference, measure=True)
    assert score(result.radiance, truth) > score(alone, truth) + 2
    assert result.advice == ()
    assert result.reference == reference
    assert result.evs == pytest.approx(evs, abs=0.05)


def test_another_reference_shows_its_own_moment(model):
    frames, _, _ = handheld((0.0, 0.0), evs=(-2.0, 0.0, 2.0), **SIZE)
    moved, _, _ = handheld((9.0, 2.0), evs=(-2.0, 0.0, 2.0), **SIZE)
    first = safnet.fuse_exposures(model, [frames[1] * 2 ** (-2 / 2.2), moved[1], moved[2]], (-2, 0, 2), reference=0)
    assert first.reference == 0
    assert first.evs == (-2, 0, 2)
    assert score(first.radiance, frames[1] ** 2.2 / 4) > 30


def test_what_is_merged_is_weighed_by_what_is_not_clipped():
    """A result in other units, whose short exposure clips at half the radiance."""
    radiance = torch.tensor([0.01, 0.2, 0.49, 0.9]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    whole, other = radiance.clone(), (radiance * 2).clamp(max=1)
    merge_(whole, (0.0, 2.0, 4.0), other, (1.0, 2.0, 3.0))
    torch.testing.assert_close(whole, radiance, rtol=1e-5, atol=1e-6)
    less = (radiance * 2 * 0.8).clamp(max=1)
    merge_(whole, (0.0, 2.0, 4.0), less, (1.0, 2.0, 3.0))
    change = whole[0, 0, 0] / radiance[0, 0, 0]
    assert 0.8 < change[0] < 0.99
    # At .49 the other is of .39 and would pass for unclipped by itself.
    assert change[2:] == pytest.approx(torch.ones(2), abs=1e-3)
