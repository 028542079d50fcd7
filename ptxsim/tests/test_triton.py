"""Triton kernels, compiled by Triton's own JIT and run on CPU tensors."""

import re

import pytest

import ptxsim
from ptxsim.tests.ptx_support import needs_triton

pytestmark = needs_triton
torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def axpy(x, y, out, a, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(out + i, a * tl.load(x + i, mask=m) + tl.exp(tl.load(y + i, mask=m)), mask=m)


@triton.jit
def gather_rows(table, index, out, columns, BLOCK: tl.constexpr):
    row = tl.load(index + tl.program_id(0))
    c = tl.arange(0, BLOCK)
    tl.store(
        out + tl.program_id(0) * columns + c, tl.load(table + row * columns + c, mask=c < columns), mask=c < columns
    )


@triton.jit
def scatter_add(x, index, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.atomic_add(out + tl.load(index + i, mask=m), tl.load(x + i, mask=m), mask=m)


@triton.jit
def softmax(x, out, stride_x, stride_out, n, BLOCK: tl.constexpr):
    r, c = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + r * stride_x + c, mask=c < n, other=-float("inf"))
    e = tl.exp(v - tl.max(v, 0))
    tl.store(out + r * stride_out + c, e / tl.sum(e, 0), mask=c < n)


@triton.jit
def cumulative(x, s, order, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(s + i, tl.cumsum(tl.load(x + i), 0))
    tl.store(order + i, tl.sort(tl.load(x + i)))


@triton.jit
def matmul(A, B, C, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        a = tl.load(A + m[:, None] * K + (k0 + k)[None, :], mask=(k0 + k)[None, :] < K, other=0.0)
        b = tl.load(B + (k0 + k)[:, None] * N + n[None, :], mask=(k0 + k)[:, None] < K, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(C + m[:, None] * N + n[None, :], acc.to(C.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def int_matmul(A, B, C, N: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(A + i[:, None] * K + k[None, :]), tl.load(B + k[:, None] * N + i[None, :])
    tl.store(C + i[:, None] * N + i[None, :], tl.dot(a, b))


@triton.jit
def double_matmul(A, B, C, N: tl.constexpr, K: tl.constexpr):
    i, k = tl.arange(0, N), tl.arange(0, K)
    a, b = tl.load(A + i[:, None] * K + k[None, :]), tl.load(B + k[:, None] * N + i[None, :])
    tl.store(C + i[:, None] * N + i[None, :], tl.dot(a, b, out_dtype=tl.float64))


@triton.jit
def out_of_bounds(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, i, mask=i <= n)


@triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 128})], key=["n"])
@triton.jit
def tuned_double(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, 2 * tl.load(x + i, mask=i < n), mask=i < n)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [1000, 1024])
def test_elementwise(dtype, n):
    x, y = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    out = ptxsim.poison(torch.empty(n, dtype=torch.float32))
    y = y.float()
    ptxsim.run_triton(axpy, (triton.cdiv(n, 256),), x, y, out, 2.5, n, BLOCK=256)
    torch.testing.assert_close(out, 2.5 * x.float() + y.exp(), rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-5)


def test_gather():
    table, index = torch.randn(50, 40), torch.randint(0, 50, (30,))
    out = ptxsim.poison(torch.empty(30, 40))
    ptxsim.run_triton(gather_rows, 30, table, index, out, 40, BLOCK=64)
    assert torch.equal(out, table[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_atomic_add(dtype):
    x, index = torch.randint(0, 4, (1000,)).to(dtype), torch.randint(0, 10, (1000,))
    out = torch.zeros(10, dtype=dtype)
    ptxsim.run_triton(scatter_add, (4,), x, index, out, 1000, BLOCK=256)
    assert torch.equal(out, torch.zeros(10, dtype=dtype).index_add(0, index, x))


@pytest.mark.parametrize("num_warps", [1, 4, 8])
def test_strided_softmax(num_warps):
    x, out = torch.randn(20, 200), torch.zeros(20, 300)
    ptxsim.run_triton(softmax, (20,), x[:, :100], out[:, 50:150], 200, 300, 100, BLOCK=128, num_warps=num_warps)
    torch.testing.assert_close(out[:, 50:150], x[:, :100].softmax(1))


def test_scan_and_sort():
    x, s, order = torch.randn(256), torch.zeros(256), torch.zeros(256)
    ptxsim.run_triton(cumulative, (1,), x, s, order, 256)
    torch.testing.assert_close(s, x.cumsum(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(order, x.sort().values)


@pytest.mark.parametrize(
    "dtype,precision,tolerance",
    [
        (torch.float16, "ieee", 1e-3),
        (torch.bfloat16, "ieee", 1e-3),
        (torch.float32, "tf32", 0.1),
        (torch.float32, "ieee", 1e-4),
        (torch.float32, "tf32x3", 1e-4),
    ],
)
@pytest.mark.parametrize("num_stages", [1, 3])
def test_matmul(dtype, precision, tolerance, num_stages):
    M, N, K = 64, 96, 80
    A, B, C = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype), ptxsim.poison(torch.empty(M, N))
    with ptxsim.options(stats=True):
        r = ptxsim.run_triton(
            matmul, (2, 3), A, B, C, M, N, K, BM=32, BN=32, BK=32, PRECISION=precision, num_stages=num_stages
        )
    torch.testing.assert_close(C, A.float() @ B.float(), rtol=tolerance, atol=tolerance)
    if precision in ("tf32", "ieee") and not (dtype == torch.float32 and precision == "ieee"):
        assert r.stats.flops["tensor"] == 2 * M * N * 96
        assert ("cp.async.commit_group" in r.stats.by_opcode()) == (num_stages > 1)


def test_half_output_and_schedules():
    A, B = torch.randn(64, 64).half(), torch.randn(64, 64).half()
    results = []
    for s in (None, 1, 2):
        C = ptxsim.poison(torch.empty(64, 64, dtype=torch.float16))
        with ptxsim.options(seed=s):
            ptxsim.run_triton(matmul, (1, 1), A, B, C, 64, 64, 64, BM=64, BN=64, BK=16, PRECISION="ieee", num_warps=8)
        results.append(C)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    torch.testing.assert_close(results[0].float(), A.float() @ B.float(), rtol=1e-2, atol=1e-2)


def test_int8_matmul():
    A, B, C = (torch.randint(-128, 127, s, dtype=torch.int8) for s in ((32, 64), (64, 32), (1, 1)))
    C = torch.zeros(32, 32, dtype=torch.int32)
    ptxsim.run_triton(int_matmul, (1,), A, B, C, 32, 64)
    assert torch.equal(C, (A.int() @ B.int()))


def test_double_matmul():
    A, B, C = torch.randn(32, 64).double(), torch.randn(64, 32).double(), torch.zeros(32, 32).double()
    with ptxsim.options(stats=True):
        r = ptxsim.run_triton(double_matmul, (1,), A, B, C, 32, 64)
    torch.testing.assert_close(C, A @ B)
    assert r.stats.tensor_flops == {"f64": 2 * 32 * 32 * 64} and ptxsim.roofline(r.stats, "A100").limits["tensor"] > 0


def test_faults_name_the_python_line():
    x = ptxsim.poison(torch.empty(100, dtype=torch.int32))
    with pytest.raises(ptxsim.OutOfBounds, match=r"test_triton\.py:\d+"):
        ptxsim.run_triton(out_of_bounds, (1,), x, 100, BLOCK=128)


def double(x):
    """Library code that launches a kernel itself."""
    tuned_double[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, x.numel())
    return x


def test_library_code_and_autotuning():
    with ptxsim.triton_on_cpu(), ptxsim.options(stats=True) as log:
        assert torch.equal(double(torch.ones(300)), torch.full((300,), 2.0))
    assert log[0].kernel == "tuned_double" and log[0].grid == (5, 1, 1)
    assert log[0].stats.hot_spots()[0][0].startswith("test_triton.py:")


@triton.jit
def copy_described(source, target, B: tl.constexpr):
    target.store([tl.program_id(0) * B, 0], source.load([tl.program_id(0) * B, 0]) * 2)


def test_tensor_descriptors():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, y = torch.randn(50, 16), torch.zeros(50, 16)
    ptxsim.run_triton(
        copy_described, 4, TensorDescriptor.from_tensor(x, [16, 16]), TensorDescriptor.from_tensor(y, [16, 16]), B=16
    )
    assert torch.equal(y, 2 * x)


def test_poisoned_empty():
    with ptxsim.triton_on_cpu(poison_empty=True):
        with pytest.raises(ptxsim.Uninitialised):
            double(torch.empty(64))
        assert torch.equal(double(torch.empty(64).fill_(1)), torch.full((64,), 2.0))
    assert not torch.empty(4).fill_(0).isnan().any()


def test_ptx_text():
    ptx, metadata = ptxsim.triton_ptx(
        axpy, (torch.ones(64), torch.ones(64), torch.ones(64), 1.0, 64), {"BLOCK": 64}, num_warps=2
    )
    assert ".entry axpy" in ptx and "sm_80" in ptx and metadata.num_warps == 2


def without(ptx, pattern):
    """Every copy of the PTX that lacks one line that matches."""
    lines = ptx.split("\n")
    return ["\n".join(lines[:i] + lines[i + 1 :]) for i, line in enumerate(lines) if re.match(pattern, line)]


def test_every_barrier_of_a_reduction_is_needed():
    x, out = torch.randn(4, 128), torch.zeros(4, 128)
    ptx, metadata = ptxsim.triton_ptx(softmax, (x, out, 128, 128, 100), {"BLOCK": 128})
    mutants = without(ptx, r"\s*bar\.sync")
    assert len(mutants) >= 2
    for text in mutants:
        with pytest.raises(ptxsim.SharedRace):
            ptxsim.Module.from_source(text).kernel(metadata.name)[4, 128, metadata.shared](
                x, out, 128, 128, 100, None, None
            )


def test_missing_waits_of_a_pipelined_matmul_are_found():
    A, B, C = torch.randn(64, 128).half(), torch.randn(128, 96).half(), torch.zeros(64, 96)
    meta = {"BM": 32, "BN": 32, "BK": 32, "PRECISION": "ieee"}
    ptx, metadata = ptxsim.triton_ptx(matmul, (A, B, C, 64, 96, 128), meta, num_stages=3)
    run = lambda text: ptxsim.Module.from_source(text).kernel(metadata.name)[(2, 3), 128, metadata.shared](
        A, B, C, 64, 96, 128, None, None
    )
    run(ptx)
    with pytest.raises(ptxsim.AsyncNotReady):
        run(re.sub(r"cp\.async\.wait_group[^;]*;", "", ptx))
    with pytest.raises(ptxsim.AsyncNotReady):
        run(re.sub(r"(cp\.async\.wait_group\s+)2;", r"\g<1>4;", ptx))
    with pytest.raises(ptxsim.SharedRace):
        run(re.sub(r"bar\.sync[^;]*;", "", ptx))


def test_hopper_code_is_refused_with_advice():
    A, B, C = torch.randn(64, 64).half(), torch.randn(64, 64).half(), torch.zeros(64, 64)
    with pytest.raises(ptxsim.Unsupported, match="cc=80"):
        ptxsim.run_triton(matmul, (1, 1), A, B, C, 64, 64, 64, BM=64, BN=64, BK=32, PRECISION="ieee", cc=90)
