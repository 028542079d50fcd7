"""Tensor-core instructions: fragments are filled according to the PTX ISA and compared with a plain product."""

import numpy as np
import pytest

from ptxsim import Module
from ptxsim.tests.ptx_support import HEADER
from ptxsim.tests.test_arith import bf16, widen

LANE = np.arange(32)
G, T = LANE >> 2, LANE & 3


def coordinates(kind, k, bits):
    """(row, col)[lane][element] of an A (16 x k), B (k x 8) or C (16 x 8) fragment, straight from the ISA's formulas."""
    out = []
    per = 32 // bits
    if kind == "c":
        return [[(G[x] + 8 * (i >= 2), T[x] * 2 + (i & 1)) for i in range(4)] for x in LANE]
    for x in LANE:
        e = []
        for i in range((16 if kind == "a" else 8) * k // 32):
            word, part = divmod(i, per)
            if kind == "a":
                e.append((G[x] + 8 * (word % 2), T[x] * per + part + 4 * per * (word // 2)))
            else:
                e.append((T[x] * per + part + 4 * per * word, G[x]))
        out.append(e)
    return out


def pack(M, kind, k, raw):
    coords = coordinates(kind, k, 8 * raw.itemsize)
    flat = np.array([[raw[r, c] for r, c in lane] for lane in coords], raw.dtype)
    return np.ascontiguousarray(flat).view(np.uint32)


CASES = [
    ("f16", 8),
    ("f16", 16),
    ("bf16", 8),
    ("bf16", 16),
    ("tf32", 4),
    ("tf32", 8),
    ("s8", 16),
    ("s8", 32),
    ("u8", 32),
]


@pytest.mark.parametrize("ty,k", CASES)
def test_mma(rng, ty, k):
    if ty in ("s8", "u8"):
        dtype = np.int8 if ty == "s8" else np.uint8
        A, B = (
            rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, s, dtype=dtype, endpoint=True)
            for s in ((16, k), (k, 8))
        )
        values, raws, acc = (A.astype(int), B.astype(int)), (A, B), "s32"
        C = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
    else:
        A, B = rng.standard_normal((16, k)).astype(np.float32), rng.standard_normal((k, 8)).astype(np.float32)
        C, acc = rng.standard_normal((16, 8)).astype(np.float32), "f32"
        if ty == "f16":
            raws = A.astype(np.float16), B.astype(np.float16)
            values = tuple(x.astype(np.float64) for x in raws)
        elif ty == "bf16":
            raws = bf16(A.ravel()).reshape(A.shape), bf16(B.ravel()).reshape(B.shape)
            values = tuple(widen(x).astype(np.float64) for x in raws)
        else:
            raws = A.view(np.uint32), B.view(np.uint32)
            values = tuple((x & 0xFFFFE000).astype(np.uint32).view(np.float32).astype(np.float64) for x in raws)
    fa, fb = pack(A, "a", k, raws[0]), pack(B, "b", k, raws[1])
    fc = np.array([[C[r, c] for r, c in lane] for lane in coordinates("c", k, 32)], C.dtype).view(np.uint32)
    na, nb = fa.shape[1], fb.shape[1]
    loads = [f"ld.global.b32 %{x}{j}, [%p{x}+{4 * j}];" for x, n in (("a", na), ("b", nb), ("c", 4)) for j in range(n)]
    m = Module.from_source(
        HEADER
        + f"""
.visible .entry k(.param .u64 pa, .param .u64 pb, .param .u64 pc) {{
 .reg .b64 %pa, %pb, %pc; .reg .b32 %i, %a<4>, %b<4>, %c<4>; mov.u32 %i, %tid.x;
 {" ".join(f"ld.param.u64 %p{x}, [p{x}]; mad.wide.u32 %p{x}, %i, {4 * n}, %p{x};" for x, n in (("a", na), ("b", nb), ("c", 4)))}
 {" ".join(loads)}
 mma.sync.aligned.m16n8k{k}.row.col.{acc}.{ty}.{ty}.{acc} {{%c0,%c1,%c2,%c3}}, {{{",".join(f"%a{j}" for j in range(na))}}},
   {{{",".join(f"%b{j}" for j in range(nb))}}}, {{%c0,%c1,%c2,%c3}};
 st.global.v4.b32 [%pc], {{%c0,%c1,%c2,%c3}}; ret; }}"""
    )
    m.kernel("k")[1, 32](fa, fb, fc)
    got = np.zeros((16, 8), C.dtype)
    for x, lane in enumerate(coordinates("c", k, 32)):
        for i, (r, c) in enumerate(lane):
            got[r, c] = fc.view(C.dtype)[x, i]
    np.testing.assert_allclose(got, values[0] @ values[1] + C, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("op", ["ldmatrix", "stmatrix"])
def test_matrix_moves(rng, count, trans, op):
    """Matrix q, row r lies at lane 8q + r; each lane holds the pair (lane / 4, 2 * (lane % 4)) of every matrix."""
    x = rng.integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    regs = "{" + ",".join(f"%v{j}" for j in range(count)) + "}"
    mods = f"sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16"
    load = op == "ldmatrix"
    fragments = np.ascontiguousarray(np.stack([(m.T if trans else m).reshape(32, 2) for m in x], 1)).view(np.uint32)[
        ..., 0
    ]
    source, target = (x, np.zeros((32, 4), np.uint32)) if load else (np.ascontiguousarray(fragments), np.zeros_like(x))
    m = Module.from_source(
        HEADER
        + f"""
.shared .align 16 .b8 s[512];
.visible .entry k(.param .u64 src, .param .u64 dst) {{
 .reg .b64 %p, %q; .reg .b32 %i, %a, %v<4>;
 mov.u32 %i, %tid.x; ld.param.u64 %p, [src]; mad.wide.u32 %p, %i, 16, %p; ld.param.u64 %q, [dst]; mad.wide.u32 %q, %i, 16, %q;
 mov.u32 %a, s; mad.lo.u32 %a, %i, 16, %a; mov.b32 %v0, 0; mov.b32 %v1, 0; mov.b32 %v2, 0; mov.b32 %v3, 0;
 {
            "ld.global.v4.b32 {%v0,%v1,%v2,%v3}, [%p]; st.shared.v4.b32 [%a], {%v0,%v1,%v2,%v3}; bar.warp.sync -1;"
            if load
            else "st.shared.v4.b32 [%a], {%v0,%v1,%v2,%v3}; bar.warp.sync -1; ld.global.v4.b32 {%v0,%v1,%v2,%v3}, [%p];"
        }
 {f"ldmatrix.{mods} {regs}, [%a];" if load else f"stmatrix.{mods} [%a], {regs}; bar.warp.sync -1;"}
 {"" if load else "ld.shared.v4.b32 {%v0,%v1,%v2,%v3}, [%a];"} st.global.v4.b32 [%q], {{%v0,%v1,%v2,%v3}}; ret; }}"""
    )
    m.kernel("k")[1, 32](source, target)
    if load:
        np.testing.assert_array_equal(target[:, :count], fragments[:, :count])
    else:
        np.testing.assert_array_equal(target[:count], x[:count])
