"""Flows that vary as those of moving scenes do; the operators' inputs themselves come from operator_inputs."""

import torch
import torch.nn.functional as F
from torch import Tensor


def smooth_flow(height: int, width: int, pixels: float = 20.0) -> Tensor:
    """A flow of the given standard deviation whose features are 100 pixels wide."""
    coarse = torch.randn(1, 2, max(2, height // 100), max(2, width // 100)) * pixels
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
