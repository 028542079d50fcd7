"""Stage lamps and high ISO: where two colours clip and the third is noise, nothing is made worse by guessing."""

import pytest
import torch

import safnet
from safnet.metrics import psnr_mu
from tests.support.scenes import handheld

EVS = (-2.0, 0.0, 2.0)
LIGHTS = {
    "white": (1.0, 1.0, 1.0),
    "magenta": (1.0, 0.02, 1.0),
    "blue": (0.02, 0.05, 1.0),
    "red": (1.0, 0.03, 0.01),
    "green": (0.03, 1.0, 0.05),
    "lamps": (1.0, 1e-4, 1.0),
}
HARM = 0.2  # dB


@pytest.fixture(scope="module")
def model():
    return safnet.load_model("safnet-s")


@pytest.mark.parametrize("noise", [0.001, 0.02])
@pytest.mark.parametrize("light", LIGHTS)
def test_neither_refining_nor_measuring_does_harm(model, light, noise):
    frames, truth, _ = handheld((7.0, 2.0), height=192, width=256, noise=noise, light=LIGHTS[light])
    frames = [(255 * frame).round().to(torch.uint8) for frame in frames]
    trusted = safnet.fuse_exposures(model, frames, EVS)
    measured = safnet.fuse_exposures(model, frames, EVS, measure=True, keep_fusion=False)
    refined, fused, as_measured = (
        float(psnr_mu(picture[0], truth[0])) for picture in (trusted.radiance, trusted.fusion.fused, measured.radiance)
    )
    assert refined > fused - HARM
    assert as_measured > refined - HARM
