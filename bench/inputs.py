"""Inputs as the model has them: views of six-channel exposures, and flows that vary as those of moving scenes do."""

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_flow(height: int, width: int, pixels: float = 20.0) -> Tensor:
    """A flow of the given standard deviation whose features are 100 pixels wide."""
    coarse = torch.randn(1, 2, max(2, height // 100), max(2, width // 100)) * pixels
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)


def fusion_inputs(height: int, width: int) -> list[Tensor]:
    exposures = [torch.rand(1, 6, height, width) for _ in range(3)]
    flows = [smooth_flow(height, width) for _ in range(2)]
    masks = [torch.rand(1, 1, height, width) for _ in range(2)]
    return [*(x[:, :3] for x in exposures), *flows, *masks, exposures[1][:, 3:]]
