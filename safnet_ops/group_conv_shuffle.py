"""group_conv_shuffle: grouped convolution + bias + residual + PReLU + channel shuffle, written once."""

import importlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from safnet_ops import reference
from safnet_ops.autocast import is_autocast, lower, register_autocast
from safnet_ops.autograd import Forward, Operation, Result, Rule, differentiate, kernel, pull_back, return_gradients
from safnet_ops.backends import choose, define, forced_backend, serves
from safnet_ops.checks import (
    check_same_kind,
    check_shape,
    check_tensor,
    empty_gradient,
    empty_image,
    in_layout,
    is_channels_last,
)
from safnet_ops.operators import is_needed, needed_bits

KERNEL_SIDES = (1, 3, 5)  # 3 by our kernels, the others by PyTorch's
ACTIVATIONS = (None, "relu")
# Up to so many input values, depthwise convolutions are faster by the library (float32 on a CPU; docs/operators has the times).
LIBRARY_DEPTHWISE = 2**20


def prefers_channels_last(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether channels_last pictures are convolved faster than others: bfloat16 by the matrix unit of a CPU (AMX)."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and not torch.compiler.is_compiling()
        and serves("group_conv_shuffle", "cpp")
        and importlib.import_module("safnet_ops._C").instruction_set() == "amx"
    )


def group_conv_shuffle(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    prelu_weight: Tensor | None = None,
    groups: int = 1,
    *,
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    residual: Tensor | None = None,
    activation: str | None = None,
    shuffle: bool = True,
    backend: str | None = None,
) -> Tensor:
    """channel_shuffle(prelu(conv(input) + residual), groups): what SAFNet's decoder does three times a level.

    The convolution pads with zeros to the input's size, by `dilation` for 3x3 weights, and adds `bias`. PReLU has one slope a
    channel; without `prelu_weight` and `activation` there is no activation. The shuffle (ShuffleNet, section 3.1) moves channel
    i * C / groups + j to j * groups + i; bias, residual and slopes are in the convolution's own order, before it. groups=1
    leaves the order as it is. Sums are float32 (float64 for float64). Under autocast all arguments but those of float64 are
    cast to its dtype, as for any convolution.

    The kernels are of 3x3 weights, PReLU and shuffle. 1x1 and 5x5 weights, and small depthwise convolutions on the CPU, take
    PyTorch's convolution; activation="relu" and shuffle=False are a pass of their own.

    Args:
        input: (N, C_in, H, W), float32, float64, float16 or bfloat16, any strides.
        weight: (C_out, C_in / groups, K, K), K 1, 3 or 5.
        bias: (C_out,) or None.
        prelu_weight: (C_out,), or (1,) for one slope of all channels, or None.
        groups: divides C_in and C_out.
        stride, dilation: at least 1, an integer or a pair of two equal ones.
        residual: of the convolution's output shape, or None; added before the activation.
        activation: "relu" instead of `prelu_weight`, or None.
        shuffle: False leaves the channels in the convolution's order.
        backend: "reference", "cpp", "cuda" or "triton" instead of the one that the device suggests; 1x1 and 5x5 weights have no
            kernel and take "reference" alone. Within `use_backend` they run by PyTorch's convolution.

    Returns:
        (N, C_out, ceil(H / stride), ceil(W / stride)) of the input's dtype, channels_last if the input is.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, value or device than stated.
        RuntimeError: the backend asked for is not available.
    """
    if is_autocast(input):
        input, weight, bias, prelu_weight, residual = lower((input, weight, bias, prelu_weight, residual))
    groups, stride, dilation = _integer("groups", groups), _side("stride", stride), _side("dilation", dilation)
    _check(input, weight, bias, prelu_weight, residual, groups, stride, dilation)
    if activation not in ACTIVATIONS:
        raise ValueError(f"group_conv_shuffle: activation must be 'relu' or None, got {activation!r}")
    if activation is not None and prelu_weight is not None:
        raise ValueError(
            f"group_conv_shuffle: prelu_weight must be None beside activation={activation!r}, got a tensor"
        )
    if prelu_weight is not None:
        prelu_weight = prelu_weight.expand(weight.shape[0])
    chosen = choose("group_conv_shuffle", input.device, backend)
    if weight.shape[2] != 3 and backend not in (None, "reference"):
        raise ValueError(
            f"group_conv_shuffle: backend must be 'reference' or None for weights other than 3x3, got {backend!r}"
        )
    small = chosen == "cpp" and backend is None and _is_faster_by_library(input, weight)
    if chosen == "reference" or weight.shape[2] != 3 or small:
        options: dict[str, Any] = {"residual": residual, "activation": activation, "shuffle": shuffle}
        out = reference.group_conv_shuffle(
            input, weight, bias, prelu_weight, groups, stride=stride, dilation=dilation, **options
        )
        return in_layout(out, input)
    operands = (input, weight, bias, prelu_weight, residual)
    out = kernel(chosen, "group_conv_shuffle")(*operands, groups, stride, dilation, False)[0]
    if activation == "relu":
        out = out.relu()
    if shuffle or groups in (1, weight.shape[0]):
        return out
    ordered = reference.channel_shuffle(out, weight.shape[0] // groups)  # which undoes the shuffle of `groups`
    return in_layout(ordered, input)


def _integer(name: str, number: Any) -> int:
    if not isinstance(number, int | Integral) or number < 1:
        raise ValueError(f"group_conv_shuffle: {name} must be an integer of at least 1, got {number!r}")
    return int(number)


def _side(name: str, value: Any) -> int:
    """What is the same for both directions, as one number."""
    if not isinstance(value, tuple | list):
        return _integer(name, value)
    sides = [_integer(name, number) for number in value]
    if len(sides) not in (1, 2) or sides[0] != sides[-1]:
        raise ValueError(f"group_conv_shuffle: {name} must be the same for both directions, got {value!r}")
    return sides[0]


def _is_faster_by_library(input: Tensor, weight: Tensor) -> bool:
    depthwise = weight.shape[1] == 1 and input.shape[1] > 1
    if not depthwise or input.dtype != torch.float32 or forced_backend() is not None:
        return False
    # A program for any size must not choose by the size it is traced with.
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and input.numel() <= LIBRARY_DEPTHWISE


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prelu_weight: Tensor | None,
    residual: Tensor | None,
    groups: int,
    stride: int,
    dilation: int,
) -> None:
    operator = "group_conv_shuffle"
    check_tensor(operator, "input", input)
    check_tensor(operator, "weight", weight)
    check_same_kind(operator, "weight", weight, "input", input)
    n, channels_in, height, width = input.shape
    channels_out = weight.shape[0]
    if channels_in % groups or channels_out % groups:
        raise ValueError(
            f"{operator}: groups must divide the {channels_in} input and {channels_out} output channels, got {groups}"
        )
    side = weight.shape[2] if weight.shape[2] in KERNEL_SIDES else 3
    expected = (channels_out, channels_in // groups, side, side)
    check_shape(operator, "weight", weight, "(C_out, C_in / groups, K, K) with K 1, 3 or 5", expected)
    for name, value in (("bias", bias), ("prelu_weight", prelu_weight)):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{operator}: {name} must be a torch.Tensor or None, got {type(value).__name__}")
        check_same_kind(operator, name, value, "input", input)
        if value.dim() != 1 or value.shape[0] not in ((1, channels_out) if name == "prelu_weight" else (channels_out,)):
            raise ValueError(f"{operator}: {name} must be (C_out,) = ({channels_out},), got {tuple(value.shape)}")
    if residual is not None:
        check_tensor(operator, "residual", residual)
        check_same_kind(operator, "residual", residual, "input", input)
        out_shape = (n, channels_out, _out_side(height, stride), _out_side(width, stride))
        check_shape(operator, "residual", residual, "the output's shape", out_shape)


def _out_side(side: int, stride: int) -> int:
    return (side + stride - 1) // stride


def _definition(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prelu_weight: Tensor | None,
    residual: Tensor | None,
    groups: int,
    stride: int,
    dilation: int,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    sums = reference.group_conv(input, weight, bias, residual, groups, stride, dilation)
    out = reference.activate_and_shuffle(sums, prelu_weight, groups)
    return out, sums if save_preactivation else sums.new_empty(0)


def _backward_definition(
    grad: Tensor,
    preactivation: Tensor,
    input: Tensor,
    weight: Tensor,
    prelu_weight: Tensor | None,
    groups: int,
    stride: int,
    dilation: int,
    needs: int,
    deterministic: bool,
) -> tuple[Tensor, ...]:
    wanted = [is_needed(needs, position) for position in range(5)]
    sums: Tensor | None
    if prelu_weight is None:
        sums, slopes = reference.channel_shuffle(grad, weight.shape[0] // groups), None
    else:
        activation = (preactivation, prelu_weight, groups)
        sums, slopes, _ = pull_back(reference.activate_and_shuffle, activation, (True, wanted[3], False), (grad,))
    assert sums is not None
    convolution = (input, weight, None, None, groups, stride, dilation)
    found = pull_back(reference.group_conv, convolution, (*wanted[:2], *[False] * 5), (sums,))
    gradients = *found[:2], sums.sum((0, 2, 3)), slopes, sums
    return tuple(
        grad.new_empty(0) if value is None or not want else value for value, want in zip(gradients, wanted, strict=True)
    )


class _Forward(Forward):
    """The preactivation, an output of the operator, is saved for the backward operator and has a gradient of its own."""

    parameters = (1, 2, 3)

    @classmethod
    def derive(cls, apply: Operation, *arguments: Any) -> Result:
        *others, save_preactivation = arguments
        prelu_weight = arguments[3]
        out, preactivation = apply(*others, save_preactivation or prelu_weight is not None)
        return out, preactivation if save_preactivation else out.new_empty(0)

    @classmethod
    def setup_context(cls, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        super().setup_context(ctx, inputs, output)
        ctx.save_for_backward(*inputs[: cls.tensors], output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        *operands, preactivation = ctx.saved_tensors
        input, weight, _bias, prelu_weight, _residual = operands
        grad, preactivation_grad = grads
        needed, (*geometry, has_preactivation) = ctx.needs_input_grad, ctx.options
        if has_preactivation and preactivation_grad is not None:  # somebody used it
            grads = torch.zeros_like(preactivation) if grad is None else grad, preactivation_grad
            return pull_back(ctx.rule.definition, (*operands, *ctx.options), needed, grads)
        if grad is None:
            return (None,) * len(needed)
        deterministic = torch.are_deterministic_algorithms_enabled()
        found = ctx.rule.operators("group_conv_shuffle_backward")(
            grad, preactivation, input, weight, prelu_weight, *geometry, needed_bits(needed[:5]), deterministic
        )
        return *return_gradients(found, needed[:5]), None, None, None, None


class _Backward(Rule):
    parameters = (3, 4)

    @classmethod
    def folds(cls, batched: Sequence[bool], arguments: Sequence[Any]) -> bool:
        """Gradients of parameters are sums over the pictures of one batch."""
        *_, needs, _deterministic = arguments
        return super().folds(batched, arguments) and not any(is_needed(needs, place) for place in (1, 2, 3))


def _fake_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prelu_weight: Tensor | None,
    residual: Tensor | None,
    groups: int,
    stride: int,
    dilation: int,
    save_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    shape = (input.shape[0], weight.shape[0], _out_side(input.shape[2], stride), _out_side(input.shape[3], stride))
    out = empty_image(input, shape)
    return out, torch.empty_like(out) if save_preactivation else input.new_empty(0)


def _fake_backward(
    grad: Tensor,
    preactivation: Tensor,
    input: Tensor,
    weight: Tensor,
    prelu_weight: Tensor | None,
    groups: int,
    stride: int,
    dilation: int,
    needs: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wanted = [is_needed(needs, position) for position in range(5)]
    channels_out = weight.shape[0]
    residual = torch.channels_last if is_channels_last(input) else torch.contiguous_format
    return (
        empty_gradient(input, wanted[0]),
        weight.new_empty(weight.shape if wanted[1] else 0),
        weight.new_empty(channels_out if wanted[2] else 0),
        weight.new_empty(channels_out if wanted[3] else 0),
        torch.empty_like(grad, memory_format=residual) if wanted[4] else grad.new_empty(0),
    )


# The second result, `preactivation` (before PReLU and shuffle), is empty where there is no PReLU.
define("group_conv_shuffle", _fake_forward)
# The weight's gradient is contiguous.
define("group_conv_shuffle_backward", _fake_backward)
differentiate("group_conv_shuffle", _Forward, _definition, _Backward, _backward_definition)
register_autocast("group_conv_shuffle", lower)
