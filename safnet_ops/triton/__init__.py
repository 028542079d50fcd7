"""Triton kernels of the operators, for CUDA tensors where nothing was compiled, or by choice (backend="triton").

Importing this package imports Triton; `safnet_ops.backends` does so only where Triton is installed, and registers KERNELS.
"""

import importlib

from safnet_ops.operators import OPERATORS

KERNELS = {
    name: getattr(importlib.import_module(f"safnet_ops.triton.{operator.name}"), name)
    for operator in OPERATORS.values()
    for name in operator.registered
}
