"""How Triton kernels are reached: imports, errors, golden cases, torch.compile, and that a new size compiles
nothing."""

import subprocess
import sys

import golden
import pytest
import torch
from ops.support import assert_close

import safnet_ops

PRECISIONS = {torch.float64: 1e-12, torch.float32: 1e-5}


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=golden.FILE.parent.parent
    )


def test_import_without_triton_is_clean_and_says_so():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, safnet_ops\n"
        "assert 'safnet_ops.triton' not in sys.modules\n"
        "x = torch.zeros(1, 2, 3, 3)\n"
        "safnet_ops.backward_warp(x, x)\n"
        "try: safnet_ops.backward_warp(x, x, backend='triton')\n"
        "except RuntimeError as error: print(error)\n"
    )
    assert "the package triton is not installed" in run_python(code).stdout


def test_package_of_the_same_name_is_not_mistaken_for_triton():
    triton = pytest.importorskip("triton")
    from safnet_ops.triton import common

    assert common.triton is triton
    assert triton.__name__ == "triton"
    assert hasattr(triton, "jit")


def test_cpu_tensors_without_a_simulator_are_refused():
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="backward_warp: backend 'triton' runs CUDA tensors, got device 'cpu'"):
        safnet_ops.backward_warp(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2, 2), backend="triton")


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case.name)
def test_golden_cases(case, dtype, simulated, float32_products):
    golden.check(case, "triton", dtype, PRECISIONS[dtype], assert_close)


@pytest.mark.parametrize(
    "operator", ["backward_warp", "fused_fuse", "upsample_fuse", "census_loss", "group_conv_shuffle"]
)
def test_new_sizes_compile_nothing(operator):
    pytest.importorskip("triton")
    from tools import triton_costs

    call = next(call for name, call in triton_costs.CASES.items() if name.startswith(operator))
    with triton_costs.recording(all_configurations=False) as kernels:
        call((16, 16))
        first = set(kernels)
        for size in ((5, 7), (31, 64), (2, 2), (250, 376), (401, 333)):
            call(size)
        assert set(kernels) == first


def test_tuning_distinguishes_two_sizes_at_most():
    pytest.importorskip("triton")
    from safnet_ops.triton import backward_warp
    from tools import triton_costs

    with triton_costs.recording(all_configurations=False):
        for size in ((5, 7), (16, 16), (31, 64), (362, 363), (800, 700)):
            safnet_ops.backward_warp(torch.zeros(1, 3, *size), torch.zeros(1, 2, *size), backend="triton")
        assert len(backward_warp._tuned_forward[False].cache) == 2


def test_compiles_into_one_graph():
    """Forward and backward under torch.compile, without a break."""
    pytest.importorskip("triton")
    import ptxsim

    image = torch.randn(1, 3, 5, 7, requires_grad=True)
    flow = torch.randn(1, 2, 5, 7, requires_grad=True)

    def warp(image, flow):
        return safnet_ops.backward_warp(image * 2, flow, backend="triton").square()

    with ptxsim.triton_on_cpu():
        compiled = torch.compile(warp, backend="aot_eager", fullgraph=True)
        results = [torch.autograd.grad(function(image, flow).sum(), (image, flow)) for function in (compiled, warp)]
    for name, found, expected in zip(("image", "flow"), *results, strict=True):
        assert_close(f"gradient of {name}", found, expected.double(), 1e-6)


def test_operators_agree_with_their_fakes():
    pytest.importorskip("triton")
    import ptxsim

    ops = torch.ops.safnet_ops_triton
    image, flow = torch.randn(2, 3, 4, 5), torch.randn(2, 2, 4, 5)
    dense = image.contiguous(memory_format=torch.channels_last)
    mask, weight = torch.rand(2, 1, 4, 5), torch.randn(6, 3, 3, 3)
    fusion = (dense, image, image, flow, flow, mask, mask)
    calls = [
        (ops.backward_warp, (dense, flow)),
        (ops.backward_warp_backward, (image, dense, flow, True, False, False)),
        (ops.fused_fuse, (*fusion, image, None, None, None, False)),
        (ops.fused_fuse_backward, (image, *fusion, image, None, None, None, False, 0b10001011, False)),
        (ops.upsample_fuse, (*fusion, image)),
        (ops.census_loss, (image, dense, 3, False)),
        (ops.census_loss_backward, (torch.ones(()), dense, image, 3, False)),
        (ops.group_conv_shuffle, (dense, weight, None, weight[:, 0, 0, 0].contiguous(), None, 1, 2, 1, True)),
        (
            ops.group_conv_shuffle_backward,
            (
                torch.randn(2, 6, 4, 5),
                torch.randn(2, 6, 4, 5),
                dense,
                weight,
                weight[:, 0, 0, 0].contiguous(),
                1,
                1,
                1,
                0b11011,
                False,
            ),
        ),
    ]
    with ptxsim.triton_on_cpu():
        for op, arguments in calls:
            torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))
