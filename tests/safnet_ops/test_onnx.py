"""The operators' ONNX translations, run by onnxruntime and OpenVINO at sizes that were not traced."""

from functools import partial

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch

import safnet_ops
from operator_inputs import conv_inputs, fusion_inputs, upsample_inputs, warp_inputs
from safnet_ops.onnx import OPSET, translation_table
from safnet_ops.operators import OPERATORS

DYNAMIC = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
SIZES = [(1, (17, 30)), (3, (32, 16)), (2, (1, 9))]  # n, (height, width)


class Call(torch.nn.Module):
    def __init__(self, operator, **options):
        super().__init__()
        self.operator = partial(operator, **options)

    def forward(self, *tensors):
        return self.operator(*tensors)


def translate(operator, tensors, **options):
    """The operator as an ONNX file's content; pictures of any size, other tensors of the one given."""
    dynamic = (tuple(DYNAMIC if tensor.dim() == 4 and tensor.shape[0] == 2 else None for tensor in tensors),)
    with torch.no_grad():
        program = torch.export.export(Call(operator, **options), tuple(tensors), dynamic_shapes=dynamic)
    table = translation_table()
    exported = torch.onnx.export(program, custom_translation_table=table, opset_version=OPSET, verbose=False)
    return exported.model_proto.SerializeToString()


def in_onnxruntime(content, tensors):
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)})


def in_openvino(content, tensors):
    core = openvino.Core()
    network = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return list(network([tensor.numpy() for tensor in tensors]).values())


def check(content, operator, tensors, tolerance, runtimes=(in_onnxruntime, in_openvino), **options):
    expected = operator(*tensors, **options)
    for run in runtimes:
        found = run(content, tensors)
        for value, right in zip(found, expected if isinstance(expected, tuple) else [expected], strict=True):
            assert value.dtype == right.numpy().dtype
            np.testing.assert_allclose(value, right.numpy(), tolerance, tolerance, err_msg=run.__name__)


def node_types(content):
    return [node.op_type for node in onnx.load_from_string(content).graph.node]


def weighted_fuse(*tensors, mask_logits):
    return safnet_ops.fused_fuse(*tensors[:7], weights=tensors[7:], mask_logits=mask_logits)


CASES = {
    "backward_warp": (safnet_ops.backward_warp, warp_inputs, {}),
    "fused_fuse": (safnet_ops.fused_fuse, fusion_inputs, {}),
    "fused_fuse, weights": (
        weighted_fuse,
        partial(fusion_inputs, weights=(3, 3, 3), logits=True),
        {"mask_logits": True},
    ),
    "upsample_fuse": (safnet_ops.upsample_fuse, upsample_inputs, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_fusion_of_any_size_has_the_operators_values(case):
    operator, make, options = CASES[case]
    content = translate(operator, make((20, 24), n=2), **options)
    assert "GridSample" in node_types(content)
    for n, size in SIZES:
        check(content, operator, make(size, n=n), 1e-4, **options)


def convolve(input, weight, bias, slopes, residual=None, **options):
    return safnet_ops.group_conv_shuffle(input, weight, bias, slopes, residual=residual, **options)


@pytest.mark.parametrize(("groups", "options"), [(1, {"stride": 2}), (3, {"dilation": 2}), (3, {"residual": True})])
def test_a_convolution_of_any_size_has_the_operators_values(groups, options):
    channels = (6, 12)
    options = {**options, "groups": groups}
    has_residual = options.pop("residual", False)
    _, *parameters = conv_inputs((20, 24), channels, groups, n=2)

    def inputs(size, n):
        picture, *_, residual = conv_inputs(size, channels, groups, n=n)
        return [picture, *parameters[:3], *([residual] if has_residual else [])]

    content = translate(convolve, inputs((20, 24), 2), **options)
    for n, size in SIZES:
        check(content, convolve, inputs(size, n), 1e-4, **options)


def test_a_shuffle_before_a_convolution_is_not_folded_wrongly():
    """OpenVINO folds a Gather of channels into the weights of the convolution behind it, in the wrong order."""
    picture, *first = conv_inputs((20, 24), (6, 12), 3, n=2)
    _, *second = conv_inputs((20, 24), (12, 4), n=2)

    def convolve_twice(input):
        return convolve(convolve(input, *first[:3], groups=3), *second[:3])

    content = translate(convolve_twice, [picture])
    check(content, convolve_twice, [picture], 1e-4)


def test_lost_and_far_flows_are_as_in_the_operator():
    image, flow = warp_inputs((20, 24), n=2)
    content = translate(safnet_ops.backward_warp, [image, flow])
    flow[0, 0, 3, 4] = torch.nan
    flow[1, 1, 5, 6] = torch.inf
    flow[0, :, 7, 8] = torch.tensor([-1e30, 1e30])
    check(content, safnet_ops.backward_warp, [image, flow], 1e-4, [in_onnxruntime])


@pytest.mark.parametrize("geometry", [torch.float32, torch.float16])
def test_half_precision_is_kept_and_computed_as_by_the_operator(geometry):
    make = partial(fusion_inputs, dtype=torch.float16, geometry=geometry)
    content = translate(safnet_ops.fused_fuse, make((20, 24), n=2))
    check(content, safnet_ops.fused_fuse, make((17, 30)), 2e-3, [in_onnxruntime])


def test_float64_is_refused():
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="must be float32 or float16, got float64"):
        translate(safnet_ops.backward_warp, warp_inputs((20, 24), n=2, dtype=torch.float64))


def test_what_inference_needs_is_translated():
    namespaces = (torch.ops.safnet_ops, torch.ops.safnet_ops_triton)
    expected = {
        getattr(namespace, name).default for namespace in namespaces for name in OPERATORS.keys() - {"census_loss"}
    }
    assert translation_table().keys() == expected
