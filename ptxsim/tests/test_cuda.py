"""Real CUDA sources, compiled by nvcc, against numpy and the math library."""

import ctypes
import math

import numpy as np
import pytest

import ptxsim
from ptxsim.tests.ptx_support import KERNELS, needs_nvcc
from ptxsim.tests.test_arith import bf16, widen

pytestmark = needs_nvcc
F = np.float32


def cu(name, **kw):
    return ptxsim.nvcc(KERNELS / f"{name}.cu", **kw)


def bilinear(img, x, y):
    """Sample img [C, H, W] at clamped float32 positions [H, W]."""
    h, w = img.shape[1:]
    x, y = np.clip(x, 0, w - 1), np.clip(y, 0, h - 1)
    x0, y0 = np.floor(x).astype(int), np.floor(y).astype(int)
    x1, y1 = np.minimum(x0 + 1, w - 1), np.minimum(y0 + 1, h - 1)
    fx, fy = x - x0, y - y0
    return (img[:, y0, x0] * (1 - fx) + img[:, y0, x1] * fx) * (1 - fy) + (
        img[:, y1, x0] * (1 - fx) + img[:, y1, x1] * fx
    ) * fy


@pytest.mark.parametrize("seed", [None, 3])
def test_warp_blend(rng, seed):
    B, C, H, W = 2, 3, 45, 70
    i0, i1, mask = (rng.random(s, dtype=F) for s in ((B, C, H, W), (B, C, H, W), (B, 1, H, W)))
    flow = ((rng.random((B, 4, H, W)) - 0.5) * 10).astype(F)
    out = ptxsim.empty((B, C, H, W))
    cu("warp").kernel("warp_blend")[(-(-W // 32), -(-H // 8), B), (32, 8)](i0, i1, flow, mask, out, C, H, W, seed=seed)
    ys, xs = np.mgrid[:H, :W].astype(F)
    for b in range(B):
        m = 1 / (1 + np.exp(-mask[b]))
        want = bilinear(i0[b], xs + flow[b, 0], ys + flow[b, 1]) * m + bilinear(
            i1[b], xs + flow[b, 2], ys + flow[b, 3]
        ) * (1 - m)
        np.testing.assert_allclose(out[b], want, atol=1e-5)


def test_warp_backward_is_the_adjoint(rng):
    C, H, W = 2, 33, 40
    go, img = rng.random((1, C, H, W), dtype=F), rng.random((1, C, H, W), dtype=F)
    flow, grad = ((rng.random((1, 2, H, W)) - 0.5) * 8).astype(F), np.zeros((1, C, H, W), F)
    cu("warp").kernel("warp_backward")[(2, 5), (32, 8)](go, flow, grad, C, H, W)
    ys, xs = np.mgrid[:H, :W].astype(F)
    forward = bilinear(img[0].astype(float), xs + flow[0, 0], ys + flow[0, 1])
    assert np.vdot(grad, img) == pytest.approx(np.vdot(go[0], forward), rel=1e-5)


def census(a, b):
    """Soft census distance, float64."""
    H, W = a.shape
    ca, cb, s = a[3:-3, 3:-3].astype(float), b[3:-3, 3:-3].astype(float), 0
    for y in range(7):
        for x in range(7):
            da, db = a[y : y + H - 6, x : x + W - 6] - ca, b[y : y + H - 6, x : x + W - 6] - cb
            d = (da / np.sqrt(0.81 + da * da) - db / np.sqrt(0.81 + db * db)) ** 2
            s = s + d / (0.1 + d)
    return ((s / 49 + 1e-6) ** 0.45 + np.log(1 + s)).sum()


@pytest.mark.parametrize("flags", [(), ("-use_fast_math",)])
@pytest.mark.parametrize("seed", [None, 5])
def test_census(rng, flags, seed):
    a, b, out = rng.random((37, 70), dtype=F), rng.random((37, 70), dtype=F), np.zeros(1, F)
    cu("census", flags=flags).kernel("census_loss")[(3, 5), (32, 8)](a, b, out, 37, 70, seed=seed)
    assert out[0] == pytest.approx(census(a, b), rel=1e-5)


@pytest.mark.parametrize("define,error", [("NO_BARRIER", ptxsim.SharedRace), ("BAD_MASK", ptxsim.InactiveLane)])
def test_census_with_a_bug(rng, define, error):
    a = rng.random((37, 70), dtype=F)
    with pytest.raises(error):
        cu("census", defines={define: 1}).kernel("census_loss")[(3, 5), (32, 8)](a, a, np.zeros(1, F), 37, 70)


def test_grouped_convolution(rng):
    C, G, H, W = 16, 4, 9, 40
    x, w = rng.random((1, C, H, W)).astype(np.float16), ((rng.random((C, C // G, 3, 3)) - 0.5) * 0.2).astype(np.float16)
    bias, y = rng.random(C).astype(np.float16), ptxsim.empty((1, C, H, W), np.float16)
    cg = C // G
    cu("grouped_conv").kernel("gconv3x3_shuffle")[(1, H, G), 64, cg * cg * 18](x, w, bias, y, C, G, H, W)
    p = np.pad(x[0].astype(F), ((0, 0), (1, 1), (1, 1)))
    for oc in range(C):
        g, o = oc % G, oc // G
        acc = float(bias[g * cg + o]) + sum(
            float(w[g * cg + o, i, ky, kx]) * p[g * cg + i, ky : ky + H, kx : kx + W]
            for i in range(cg)
            for ky in range(3)
            for kx in range(3)
        )
        np.testing.assert_allclose(y[0, oc].astype(F), np.where(acc > 0, acc, 0.2 * acc), atol=2e-3)


MATH = {
    "k_exp": np.exp,
    "k_log": np.log,
    "k_pow": np.power,
    "k_tanh": np.tanh,
    "k_sin": np.sin,
    "k_cos": np.cos,
    "k_rsqrt": lambda x, y: 1 / np.sqrt(x),
    "k_fast_exp": np.exp,
    "k_fast_div": np.divide,
    "k_erf": np.vectorize(math.erf),
    "k_fmod": np.fmod,
    "k_round": lambda x, y: np.floor(x + 0.5),
    "k_cbrt": np.cbrt,
    "k_hypot": np.hypot,
    "k_atan2": np.arctan2,
    "k_log1p": np.log1p,
    "k_lgamma": np.vectorize(math.lgamma),
    "k_double": np.exp,
}
BINARY = {"k_pow", "k_fast_div", "k_fmod", "k_hypot", "k_atan2"}


@pytest.mark.parametrize("name", MATH)
def test_math_library(rng, name):
    v = (rng.random(64) * 6 + 0.01).astype(F)
    x, y = v[:32].astype(float), v[32:].astype(float)
    f = MATH[name]
    try:
        want = f(x, y) if name in BINARY else f(x)
    except TypeError:
        want = f(x, y)
    a = v.copy()
    cu("mathfns").kernel(name)[1, 32](a)
    np.testing.assert_allclose(a[:32], want, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(
    "name,dtype,out",
    [
        ("wmma_f16", np.float16, F),
        ("wmma_f16_f16", np.float16, np.float16),
        ("wmma_bf16", np.uint16, F),
        ("wmma_s8", np.int8, np.int32),
    ],
)
def test_wmma(rng, name, dtype, out):
    M, N, K = 32, 48, 80
    if dtype == np.int8:
        A, B = rng.integers(-128, 127, (M, K)).astype(np.int8), rng.integers(-128, 127, (K, N)).astype(np.int8)
        a, b = A.astype(float), B.astype(float)
    else:
        a, b = rng.standard_normal((M, K)), rng.standard_normal((K, N))
        A, B = (bf16(v.ravel()).reshape(v.shape) if dtype == np.uint16 else v.astype(np.float16) for v in (a, b))
        a, b = (widen(v).astype(float) if dtype == np.uint16 else v.astype(float) for v in (A, B))
    C = ptxsim.empty((M, N), out)
    cu("tensor").kernel(name)[(N // 16, M // 16), 32](A, B, C, N, K)
    np.testing.assert_allclose(
        C.astype(float), 2 * (a @ b), rtol=2e-2 if out == np.float16 else 1e-4, atol=0.1 if out == np.float16 else 1e-4
    )


def test_wmma_tf32_and_column_major(rng):
    A, Bt, C = (
        rng.standard_normal((16, 8)).astype(F),
        rng.standard_normal((16, 8)).astype(F),
        rng.standard_normal((16, 16)).astype(F),
    )
    out = C.copy()
    cu("tensor").kernel("wmma_tf32")[1, 32](A, Bt, out)
    np.testing.assert_allclose(out.T, A @ Bt.T + C.T, atol=2e-2)


def test_ldmatrix_from_cuda(rng):
    x, o = rng.standard_normal((16, 16)).astype(np.float16), ptxsim.empty((32, 4), np.uint32)
    cu("tensor").kernel("ldmatrix_x4")[1, 32](x, o)
    pairs = o.view(np.float16).reshape(32, 4, 2)
    for lane in range(32):
        for q in range(4):
            r, c = lane // 4 + 8 * (q % 2), 2 * (lane % 4) + 8 * (q // 2)
            np.testing.assert_array_equal(pairs[lane, q], x[r, c : c + 2])


def test_function_call_and_constant_memory(rng):
    x, y, m = rng.random(100, dtype=F), ptxsim.empty(100), cu("features")
    m.kernel("call")[1, 128](x, y, 100)
    want = [np.polyval([8, 4, 2, 1][-n:], v) for v, n in zip(x, 1 + np.arange(100) % 4)]
    np.testing.assert_allclose(y, want, rtol=1e-6)
    m.variable("coefficients", F)[:] = 0
    m.kernel("call")[1, 128](x, y, 100)
    assert (y == 0).all()


def test_switch(rng):
    kind, x, y = rng.integers(0, 9, 200).astype(np.int32), (rng.random(200) + 0.5).astype(F), ptxsim.empty(200)
    cu("features").kernel("choose")[2, 128](kind, x, y, 200)
    want = np.choose(kind, [x + 1, x * x, np.sin(x), -x, x * 3 - 1, np.abs(x), 1 / x, 0 * x, 0 * x])
    np.testing.assert_allclose(y, want, rtol=1e-6)


def test_local_array_with_dynamic_index(rng):
    x = rng.integers(0, 100, (64, 8)).astype(np.int32)
    y = x.copy()
    record = cu("features").kernel("insertion_sort")[2, 32](y, stats=True)
    np.testing.assert_array_equal(y, np.sort(x, 1))
    assert record.stats.local_bytes > 0


def test_struct_argument(rng):
    class Affine(ctypes.Structure):
        _fields_ = [
            ("src", ctypes.c_void_p),
            ("dst", ctypes.c_void_p),
            ("a", ctypes.c_float),
            ("b", ctypes.c_float),
            ("n", ctypes.c_int),
        ]

    x, y = rng.random(50, dtype=F), ptxsim.empty(50)
    cu("features").kernel("affine")[1, 64](Affine(x.ctypes.data, y.ctypes.data, 2, 1, 50), buffers=[x, y])
    np.testing.assert_allclose(y, 2 * x + 1, rtol=1e-6)


def test_device_variable():
    m = cu("features")
    m.kernel("count")[3, 40]()
    assert m.variable("counter", np.int32)[0] == 125


def test_spin_lock():
    lock, value = np.zeros(1, np.int32), np.zeros(1, np.int32)
    cu("features").kernel("locked_add")[3, 40](lock, value)
    assert value[0] == 120


@pytest.mark.parametrize("seed", [None, 7])
def test_histogram(rng, seed):
    x, h = rng.integers(0, 256, 5000).astype(np.uint8), np.zeros(256, np.uint32)
    cu("features").kernel("histogram")[4, 256](x, h, 5000, seed=seed)
    np.testing.assert_array_equal(h, np.bincount(x, minlength=256))


def test_last_block_reduction(rng):
    x, partial, ticket, out = rng.random(3000, dtype=F), ptxsim.empty(8), np.zeros(1, np.uint32), ptxsim.empty(1)
    cu("features").kernel("last_block_sum")[8, 32](x, partial, ticket, out, 3000)
    assert out[0] == pytest.approx(x.sum(), rel=1e-5) and ticket[0] == 0


def test_packed_half_arithmetic(rng):
    x, y = rng.standard_normal(64).astype(np.float16), bf16(rng.standard_normal(64))
    u, v = ptxsim.empty(64, np.float16), ptxsim.empty(64, np.uint16)
    cu("features").kernel("half_ops")[1, 32](x, y, u, v)
    np.testing.assert_array_equal(u, (x.astype(float) ** 2 + np.maximum(x, np.float16(0.25))).astype(np.float16))
    np.testing.assert_allclose(widen(v), widen(y) ** 2 + 1, rtol=1e-2)


def test_barrier_with_count(rng):
    x, out = rng.standard_normal(96).astype(F), ptxsim.empty(96, np.int32)
    cu("features").kernel("count_positive")[1, 96](x, out)
    assert (out == (x > 0).sum() * 10 + int((x > 2).any())).all()


def test_generic_pointer():
    g = np.arange(32, dtype=F)
    cu("features").kernel("generic_pointer")[1, 32](g, 1)
    np.testing.assert_array_equal(g, np.arange(32) + 100)


def test_mangled_and_template_names():
    m, x, y = cu("features"), np.ones(8, F), np.zeros(8)
    m.kernel("scale")[1, 8](x, 3.0)
    m.kernel("fill")[1, 8](y, 2.5)
    assert (x == 3).all() and (y == 2.5).all()


def test_compile_errors_and_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PTXSIM_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "k.cu"
    (tmp_path / "v.h").write_text("#define V 1\n")
    source.write_text('#include "v.h"\nextern "C" __global__ void k(int* x) { *x = V; }')
    x = np.zeros(1, np.int32)
    for want in (1, 2):
        (tmp_path / "v.h").write_text(f"#define V {want}\n")
        ptxsim.nvcc(source).kernel("k")[1, 1](x)
        assert x[0] == want
    assert len(list((tmp_path / "cache").glob("*.ptx"))) == 2
    source.write_text("nonsense")
    with pytest.raises(ptxsim.CompileError, match="k.cu"):
        ptxsim.nvcc(source)
