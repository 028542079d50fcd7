"""`safnet export`: programs that other runtimes run, at sizes that were not traced, and its refusals."""

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import safnet_ops
from safnet.cli import app
from safnet.export import TRACED, ExportWarning, export_model, trace, write_program
from safnet.model import SAFNet, network_size
from safnet.radiance import exposure_input
from safnet.weights import load_model

ROOT = Path(__file__).parents[2]
BATCH, _, *SIDES = TRACED
SIZES = [(BATCH, *SIDES), (1, 64, 64), (1, 33, 47), (3, 40, 101)]
TINY = [(1, 20, 30), (1, 1, 5)]  # what torch.export's guards refuse, the other formats take


@pytest.fixture(scope="module")
def model():
    return load_model("safnet-s")


@pytest.fixture(scope="module")
def program(model):
    return trace(model)


@pytest.fixture(scope="module")
def files(program, tmp_path_factory):
    """Format -> file, all of one trace."""
    folder = tmp_path_factory.mktemp("programs")
    found = {ending: folder / f"model.{ending}" for ending in ("onnx", "xml", "pt2")}
    for ending in ("onnx", "pt2"):
        write_program(program, found[ending])
    with pytest.warns(ExportWarning, match="INFERENCE_PRECISION_HINT"):
        write_program(program, found["xml"])
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "model.xml", "model.bin", "model.pt2"}
    return found


def smooth(n, height, width):
    return [F.interpolate(torch.rand(n, 6, 5, 5), (height, width), mode="bicubic").clamp(0, 1) for _ in range(3)]


def noise(n, height, width):
    return [torch.rand(n, 6, height, width) for _ in range(3)]


def onnxruntime_of(path):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda exposures: session.run(
        ["fused", "refined"], dict(zip(("short", "reference", "long"), (e.numpy() for e in exposures), strict=True))
    )


def openvino_of(path):
    network = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(exposures):
        results = network({name: e.numpy() for name, e in zip(("short", "reference", "long"), exposures, strict=True)})
        return [results["fused"], results["refined"]]

    return run


def pytorch_of(path):
    module = torch.export.load(path).module()
    return lambda exposures: [result.numpy() for result in module(*exposures)]


RUNTIMES = {"onnx": onnxruntime_of, "xml": openvino_of, "pt2": pytorch_of}


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request, files):
    """A format, and a function from three exposures to the program's results."""
    return request.param, RUNTIMES[request.param](files[request.param])


def differences(found, expected):
    return [(torch.from_numpy(value).double() - right).abs() for value, right in zip(found, expected, strict=True)]


def largest(found, expected):
    return max(float(difference.max()) for difference in differences(found, expected))


@torch.no_grad()
def test_a_program_of_any_size_has_the_models_values(model, runtime):
    ending, run = runtime
    for size in SIZES + (TINY if ending != "pt2" else []):
        exposures = smooth(*size)
        assert largest(run(exposures), model(*exposures)) < 1e-4, size


@torch.no_grad()
def test_a_program_has_the_models_values_on_white_noise(model, runtime):
    """In noise a rounding error may lead a flow to another place, in float32 on the CPU as well; but at few pixels."""
    _, run = runtime
    for size in SIZES:
        exposures = noise(*size)
        for difference in differences(run(exposures), model(*exposures)):
            assert (difference > 1e-4).double().mean() < 1e-3, size
            assert difference.max() < 5e-3, size


def test_warps_are_grid_samples_and_nothing_is_ours(files):
    graph = onnx.load(files["onnx"])
    onnx.checker.check_model(graph, full_check=True)
    assert {opset.domain for opset in graph.opset_import} <= {"", "ai.onnx", "pkg.onnxscript.torch_lib.common"}
    types = [node.op_type for node in graph.graph.node]
    assert types.count("GridSample") == 12  # two at each of four levels, two in the fusion, two in the refine module
    assert not [name for name in types if name.startswith("Gather") and name != "Gather"]
    sides = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in graph.graph.input]
    assert all(isinstance(side, str) for shape in sides for side in (shape[0], *shape[2:]))


@torch.no_grad()
def test_the_command_writes_a_program_of_half_precision_as_good_as_the_model_in_it(model, tmp_path):
    path = tmp_path / "half.onnx"
    path.write_text("another")
    outcome = export("safnet-s", "-o", path, "--precision", "float16", "--overwrite")
    assert outcome.exit_code == 0, outcome.stderr
    assert f"{path}: safnet-s in float16\n" == outcome.stdout
    weights = [value for value in onnx.load(path).graph.initializer if len(value.dims) == 4]
    assert len(weights) > 20
    assert {value.data_type for value in weights} == {onnx.TensorProto.FLOAT16}
    half, run = copy.deepcopy(model).half(), onnxruntime_of(path)
    for size in SIZES:
        exposures = [exposure.half() for exposure in smooth(*size)]
        found = run(exposures)
        assert all(value.dtype == "float16" for value in found)
        expected = model(*(exposure.float() for exposure in exposures))
        rounding = largest([value.numpy() for value in half(*exposures)], expected)
        assert largest(found, expected) < 2 * rounding < 0.1, size


class Fusion(torch.nn.Module):
    """The model's sizes and fusion without its layers, which take a minute to compile."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, short, reference, long):
        size = network_size(reference.shape[2], reference.shape[3], 0.5)
        low = F.interpolate(reference, size, mode="bilinear").split([2, 2, 1, 1], 1)
        return (
            safnet_ops.upsample_fuse(short[:, :3], reference[:, :3], long[:, :3], *low, reference[:, 3:])[0] * self.gain
        )


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """What AOTInductor makes of a Fusion, by way of a file."""
    folder = tmp_path_factory.mktemp("package")
    with torch.no_grad():
        torch.export.save(trace(Fusion()), folder / "fusion.pt2")
        program = torch.export.load(folder / "fusion.pt2")
        return torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "compiled.pt2"))


@torch.no_grad()
def test_a_package_of_aot_inductor_freezes_no_size(package):
    """AOTInductor keeps no guards: a size that was frozen would give wrong results in silence."""
    module, compiled = Fusion(), torch._inductor.aoti_load_package(package)
    for size in SIZES + TINY:
        exposures = noise(*size)
        assert (compiled(*exposures) - module(*exposures)).abs().max() < 1e-4, size


@pytest.fixture(scope="module")
def cpp_program(tmp_path_factory):
    """The example in C++, built as its CMakeLists.txt says; runs it and returns its exit code and complaint."""
    folder = tmp_path_factory.mktemp("cpp")
    choose = f"-DPython3_EXECUTABLE={sys.executable}"
    for command in (["-B", folder, "-S", ROOT / "examples" / "cpp", choose], ["--build", folder]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(*arguments):
        done = subprocess.run([folder / "fuse", *map(str, arguments)], capture_output=True, text=True)
        return done.returncode, done.stderr

    return run


EVS = (-2, 0, 2)


def write_frames(folder, height, width):
    """Three PPM files, two of 8 bits and one of 16; the exposures that they stand for."""
    inputs = []
    for name, ev, highest in zip(("short", "reference", "long"), EVS, (255, 65535, 255), strict=True):
        codes = (torch.rand(height, width, 3) * highest).round()
        kind = np.uint8 if highest == 255 else np.dtype(">u2")
        (folder / f"{name}.ppm").write_bytes(
            f"P6 {width} {height} {highest}\n".encode() + codes.numpy().astype(kind).tobytes()
        )
        inputs.append(exposure_input(codes.permute(2, 0, 1)[None] / highest, 2.0 ** (ev - min(EVS))))
    return inputs


def frames_of(folder, evs=EVS):
    names = ("short", "reference", "long")
    return [part for name, ev in zip(names, evs, strict=True) for part in (folder / f"{name}.ppm", ev)]


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@torch.no_grad()
def test_a_program_without_python_runs_a_package(package, cpp_program, tmp_path):
    inputs = write_frames(tmp_path, 40, 51)
    fused = tmp_path / "fused.pfm"
    assert cpp_program(package, fused, *frames_of(tmp_path)) == (0, "")
    found = torch.from_numpy(cv2.imread(str(fused), cv2.IMREAD_UNCHANGED)[..., ::-1].copy())
    expected = Fusion()(*inputs)[0].permute(1, 2, 0)
    assert (found - expected).abs().max() < 1e-4

    assert cpp_program() == (2, "usage: fuse compiled.pt2 fused.pfm short.ppm EV reference.ppm EV long.ppm EV\n")
    code, complaint = cpp_program(package, fused, *frames_of(tmp_path, (-2, "1/3", 2)))
    assert (code, complaint) == (1, "fuse: an EV must be a number, got 1/3\n")
    (tmp_path / "long.ppm").write_bytes(b"P6 51 40 255\n")
    code, complaint = cpp_program(package, fused, *frames_of(tmp_path))
    assert (code, complaint) == (1, f"fuse: {tmp_path / 'long.ppm'}: fewer pixels than its header says\n")


def export(*arguments):
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.mark.slow
@torch.no_grad()
def test_pytorchs_programs_are_of_any_precision_and_leave_the_model_as_it_is(tmp_path):
    model = SAFNet("small").train()
    export_model(model, tmp_path / "model.pt2", precision="bfloat16")
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
    exposures = [exposure.bfloat16() for exposure in smooth(1, 64, 64)]
    found = torch.export.load(tmp_path / "model.pt2").module()(*exposures)
    for value, right in zip(found, model.eval().bfloat16()(*exposures), strict=True):
        torch.testing.assert_close(value, right)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("model.tflite", [], r"must end in one of \.onnx, \.xml, \.pt2, got '\.tflite'"),
        ("model.onnx", ["--precision", "bfloat16"], "take no bfloat16"),
        ("there.onnx", [], "there.onnx exists; --overwrite replaces it"),
        ("none/model.onnx", [], "folder .*none' does not exist"),
    ],
)
def test_what_cannot_be_written_is_one_line(tmp_path, name, options, message):
    (tmp_path / "there.onnx").touch()
    outcome = export("safnet-s", "-o", tmp_path / name, *options)
    assert outcome.exit_code == 2
    assert len(outcome.stderr.splitlines()) == 1
    assert re.search(message, outcome.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"there.onnx"}


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("model.onnx", "onnxscript", "export"), ("model.xml", "openvino", "openvino")],
)
def test_a_missing_package_names_the_extra(tmp_path, name, package, extra):
    program = f"""
import sys
sys.modules[{package!r}] = None
from safnet.export import ExportError, export_model
from safnet.model import SAFNet
try:
    export_model(SAFNet("small"), {str(tmp_path / name)!r})
except ExportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert f"{package}: pip install 'safnet-ops[{extra}]'" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())
