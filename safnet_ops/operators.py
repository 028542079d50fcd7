"""The one list of operators, from which backends, Triton's registration, simulated launches, benchmarks and tools derive.

An operator is called NAME everywhere: `safnet_ops/NAME.py` (schema, checks, autograd), `csrc/cpu/NAME.cpp`,
`csrc/cuda/NAME.cu`, `safnet_ops/triton/NAME.py`, and its tests and benchmarks.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operator:
    """An operator's name and the inputs that receive gradients, in the order of its schema.

    Its backward operator, NAME_backward, takes `needs`, an integer of one bit for each of these inputs, the first in bit 0,
    set where that gradient is wanted; csrc/math/gradients.h has the same bits for C++ and CUDA.
    """

    name: str
    differentiable: tuple[str, ...] = ()

    @property
    def registered(self) -> tuple[str, ...]:
        """Names of the registered operators: the forward and, where there are gradients, the backward."""
        return (self.name, f"{self.name}_backward") if self.differentiable else (self.name,)

    def bit(self, name: str) -> int:
        """The bit of `needs` that asks for the gradient of the input `name`."""
        return 1 << self.differentiable.index(name)


_ALL = (
    Operator("backward_warp", ("image", "flow")),
    Operator(
        "fused_fuse",
        (
            *("short", "reference", "long", "flow_short", "flow_long", "mask_short", "mask_long"),
            *("reference_ldr", "weight_short", "weight_reference", "weight_long"),
        ),
    ),
    Operator("upsample_fuse"),
    Operator("group_conv_shuffle", ("input", "weight", "bias", "prelu_weight", "residual")),
    Operator("census_loss", ("prediction",)),  # and the target, by the same backward operator of exchanged pictures
)
OPERATORS = {operator.name: operator for operator in _ALL}


def needed_bits(needed: Sequence[bool]) -> int:
    """The bits of `needs` for what autograd says is needed, in the order of an operator's differentiable inputs."""
    return sum(1 << position for position, need in enumerate(needed) if need)


def is_needed(bits: int, position: int) -> bool:
    """Whether `needs` asks for the gradient of the differentiable input at `position`."""
    return bool(bits >> position & 1)
