"""Operators of explicit HDR fusion for PyTorch: C++, CUDA C++ and Triton kernels behind one differentiable function each.

`python -m safnet_ops.info` tells which kernels this installation has; `safnet_ops.reference` holds their definitions.
"""

from safnet_ops import backends, flops, nn, reference
from safnet_ops.backends import libraries, use_backend
from safnet_ops.backward_warp import backward_warp
from safnet_ops.census_loss import census_loss
from safnet_ops.fuse_frames import fuse_frames
from safnet_ops.fused_fuse import fused_fuse
from safnet_ops.group_conv_shuffle import group_conv_shuffle
from safnet_ops.upsample_fuse import upsample_fuse
from safnet_ops.version import __version__
from safnet_ops.workspace import Workspace

__all__ = [
    "Workspace",
    "__version__",
    "backward_warp",
    "census_loss",
    "fuse_frames",
    "fused_fuse",
    "group_conv_shuffle",
    "libraries",
    "nn",
    "reference",
    "upsample_fuse",
    "use_backend",
]

backends.load()
flops.register()
