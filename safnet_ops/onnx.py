"""The operators as ONNX: a translation table for torch.onnx.export(..., dynamo=True). Needs the package onnxscript.

Warps become GridSample, convolutions Conv, PRelu and a shuffle of Reshape and Transpose, the rest arithmetic: programs that
hold nothing of this library. As in the references, images of half precision are sampled and summed in float32 and rounded once,
and NaN in flows or masks gives NaN. A translation has the arguments of the registered operator, as values of a graph under
construction: their types are known, their sides need not be.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

try:
    from onnxscript import opset18
except ImportError as error:
    raise ImportError("safnet_ops.onnx needs onnx and onnxscript: pip install 'safnet-ops[export]'") from error

from safnet_ops.reference import FUSION_EPSILON

op: Any = opset18  # whose types know neither lists nor values of unknown type
OPSET = 18  # that of PyTorch's own translations
FLOAT, BOOL, DOUBLE = 1, 9, 11  # ONNX's numbers of element types

Value = Any


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For `custom_translation_table` of torch.onnx.export, with `opset_version=safnet_ops.onnx.OPSET` or newer.

    It has the operators of inference, those of the Triton kernels too: all but census_loss.
    """
    translations = (backward_warp, fused_fuse, upsample_fuse, group_conv_shuffle)
    return {
        getattr(namespace, translation.__name__).default: translation
        for namespace in (torch.ops.safnet_ops, torch.ops.safnet_ops_triton)
        for translation in translations
    }


def backward_warp(image: Value, flow: Value) -> Value:
    kind = _compute_type(image)
    (flow,), lost = _without_nan([op.Cast(flow, to=kind)])
    return op.CastLike(_mark(_warp(op.Cast(image, to=kind), flow), lost), image)


def fused_fuse(
    short: Value,
    reference: Value,
    long: Value,
    flow_short: Value,
    flow_long: Value,
    mask_short: Value,
    mask_long: Value,
    reference_ldr: Value = None,
    weight_short: Value = None,
    weight_reference: Value = None,
    weight_long: Value = None,
    mask_logits: bool = False,
) -> Value:
    kind = _compute_type(short)
    masks = [op.Cast(mask, to=kind) for mask in (mask_short, mask_long)]
    if mask_logits:
        masks = [op.Sigmoid(mask) for mask in masks]
    alignment = [op.Cast(flow_short, to=kind), op.Cast(flow_long, to=kind), *masks]
    if reference_ldr is not None:
        weights = _triangle_weights(op.Cast(reference_ldr, to=kind))
    else:
        weights = [op.Cast(weight, to=kind) for weight in (weight_short, weight_reference, weight_long)]
    return _fuse((short, reference, long), alignment, weights)


def upsample_fuse(
    short: Value,
    reference: Value,
    long: Value,
    flow_short: Value,
    flow_long: Value,
    mask_short: Value,
    mask_long: Value,
    reference_ldr: Value,
) -> tuple[Value, ...]:
    kind = _compute_type(short)
    low = op.Concat(*(op.Cast(part, to=kind) for part in (flow_short, flow_long, mask_short, mask_long)), axis=1)
    size = op.Shape(short, start=2)
    sizes = op.Concat(op.Shape(low, end=2), size, axis=0)
    full = op.Resize(low, None, None, sizes, mode="linear", coordinate_transformation_mode="half_pixel")
    ratios = op.Div(op.Cast(size, to=kind), op.Cast(op.Shape(low, start=2), to=kind))  # of heights, of widths
    to_full_pixels = op.Reshape(op.Gather(ratios, [1, 0]), [1, 2, 1, 1])
    flows = [op.Mul(op.Gather(full, channels, axis=1), to_full_pixels) for channels in ([0, 1], [2, 3])]
    masks = [op.Sigmoid(op.Gather(full, channel, axis=1)) for channel in ([4], [5])]
    alignment = [*flows, *masks]
    weights = _triangle_weights(op.Cast(reference_ldr, to=kind))
    return _fuse((short, reference, long), alignment, weights), *alignment


def group_conv_shuffle(
    input: Value,
    weight: Value,
    bias: Value = None,
    prelu_weight: Value = None,
    residual: Value = None,
    groups: int = 1,
    stride: int = 1,
    dilation: int = 1,
    save_preactivation: bool = False,
) -> tuple[Value, Value]:
    geometry = {"strides": [stride] * 2, "dilations": [dilation] * 2, "pads": [dilation] * 4}
    sums = op.Conv(input, weight, bias, group=groups, **geometry)
    if residual is not None:
        sums = op.Add(sums, residual)
    out = sums if prelu_weight is None else op.PRelu(sums, op.Unsqueeze(prelu_weight, [1, 2]))
    if groups > 1:
        # Not a Gather of channels: OpenVINO 2026.4 takes its permutation into the next convolution the wrong way round.
        channels = int(weight.shape[0])
        apart = op.Reshape(out, [0, groups, channels // groups, -1])
        out = op.Reshape(op.Transpose(apart, perm=[0, 2, 1, 3]), op.Shape(out))
    return out, sums if save_preactivation else op.CastLike(op.ConstantOfShape([0]), input)


def _compute_type(image: Value) -> int:
    if int(image.dtype) == DOUBLE:
        raise TypeError(
            "safnet_ops.onnx: pictures must be float32 or float16, got float64, which onnxruntime does not sample"
        )
    return FLOAT


def _like(number: float, value: Value) -> Value:
    return op.CastLike(number, value)


def _without_nan(geometry: Sequence[Value]) -> tuple[list[Value], Value]:
    """Flows and masks with zeros where any of them is NaN, and (N, 1, H, W) where that is."""
    joined = op.Concat(*geometry, axis=1) if len(geometry) > 1 else geometry[0]
    lost = op.Cast(op.ReduceMax(op.Cast(op.IsNaN(joined), to=FLOAT), [1], keepdims=1), to=BOOL)
    return [op.Where(lost, _like(0.0, value), value) for value in geometry], lost


def _mark(picture: Value, lost: Value) -> Value:
    return op.Where(lost, _like(float("nan"), picture), picture)


def _warp(image: Value, flow: Value) -> Value:
    """`image` at every pixel + `flow`, both of the type that is computed in, without NaN in the flow."""
    grid = op.Concat(_positions(flow, 0, 3), _positions(flow, 1, 2), axis=1)
    grid = op.Transpose(grid, perm=[0, 2, 3, 1])
    return op.GridSample(image, grid, mode="bilinear", padding_mode="border", align_corners=1)


def _positions(flow: Value, channel: int, dimension: int) -> Value:
    """(N, 1, H, W): where along a dimension to sample, clamped to the picture's first and last pixel, which are -1 and 1."""
    side = op.Squeeze(op.Shape(flow, start=dimension, end=dimension + 1), [0])
    centres = op.CastLike(op.Range(0, side, 1), flow)
    if dimension == 2:
        centres = op.Unsqueeze(centres, [1])
    last = op.CastLike(op.Sub(side, 1), flow)
    position = op.Add(op.Gather(flow, [channel], axis=1), centres)
    inside = op.Min(op.Max(position, _like(0.0, flow)), last)
    to_grid = op.Div(_like(2.0, flow), op.Max(last, _like(1.0, flow)))
    return op.Sub(op.Mul(inside, to_grid), _like(1.0, flow))


def _triangle_weights(ldr: Value) -> list[Value]:
    half, one, two = (_like(number, ldr) for number in (0.5, 1.0, 2.0))
    short, long = (op.Mul(op.Relu(difference), two) for difference in (op.Sub(ldr, half), op.Sub(half, ldr)))
    return [short, op.Sub(one, op.Abs(op.Sub(op.Mul(two, ldr), one))), long]


def _fuse(images: Sequence[Value], alignment: Sequence[Value], weights: Sequence[Value]) -> Value:
    """Flows, masks and base weights have the type that is computed in."""
    kind = _compute_type(images[0])
    short, reference, long = (op.Cast(image, to=kind) for image in images)
    (flow_short, flow_long, mask_short, mask_long), lost = _without_nan(alignment)
    base_short, base_reference, base_long = weights
    one = _like(1.0, mask_short)
    weight_short, weight_long = op.Mul(base_short, mask_short), op.Mul(base_long, mask_long)
    weight_reference = op.Add(
        op.Add(base_reference, op.Mul(base_short, op.Sub(one, mask_short))),
        op.Mul(base_long, op.Sub(one, mask_long)),
    )
    total = op.Add(
        op.Add(op.Mul(weight_short, _warp(short, flow_short)), op.Mul(weight_reference, reference)),
        op.Mul(weight_long, _warp(long, flow_long)),
    )
    divisor = op.Add(op.Add(op.Add(weight_short, weight_reference), weight_long), _like(FUSION_EPSILON, total))
    return op.CastLike(_mark(op.Div(total, divisor), lost), images[0])
