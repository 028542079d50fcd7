"""Triton kernels of the operators, for CUDA tensors where nothing was compiled, or by choice (backend="triton").

Importing this package imports Triton; `safnet_ops.backends` does so only where Triton is installed.
"""

from safnet_ops.backends import implement_triton
from safnet_ops.triton import backward_warp as _backward_warp
from safnet_ops.triton import census_loss as _census_loss
from safnet_ops.triton import fused_fuse as _fused_fuse
from safnet_ops.triton import group_conv_shuffle as _group_conv_shuffle
from safnet_ops.triton import upsample_fuse as _upsample_fuse

OPERATORS = ("backward_warp", "fused_fuse", "upsample_fuse", "census_loss", "group_conv_shuffle")

implement_triton("backward_warp", _backward_warp.backward_warp)
implement_triton("backward_warp_backward", _backward_warp.backward_warp_backward)
implement_triton("fused_fuse", _fused_fuse.fused_fuse)
implement_triton("fused_fuse_backward", _fused_fuse.fused_fuse_backward)
implement_triton("upsample_fuse", _upsample_fuse.upsample_fuse)
implement_triton("census_loss", _census_loss.census_loss)
implement_triton("census_loss_backward", _census_loss.census_loss_backward)
implement_triton("group_conv_shuffle", _group_conv_shuffle.group_conv_shuffle)
implement_triton("group_conv_shuffle_backward", _group_conv_shuffle.group_conv_shuffle_backward)
