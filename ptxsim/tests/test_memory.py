"""Loads, stores, address spaces and atomics."""

import numpy as np
import pytest

import ptxsim
from ptxsim import Module
from ptxsim.tests.ptx_support import HEADER, entry


def test_vector_load_store():
    m = entry(
        """
      shl.b32 %n, %i, 4; cvt.u64.u32 %d1, %n; add.u64 %d2, %base, %d1; ld.param.u64 %d3, [src]; add.u64 %d3, %d3, %d1;
      ld.global.v4.f32 {%f0, %f1, %f2, %f3}, [%d3];
      st.global.v2.f32 [%d2], {%f3, %f2}; st.global.v2.f32 [%d2+8], {%f1, %f0};""",
        ".param .u64 out, .param .u64 src",
    )
    x = np.arange(256, dtype=np.float32).reshape(64, 4)
    y = ptxsim.empty((64, 4))
    m.kernel("k")[1, 64](y, x)
    np.testing.assert_array_equal(y, x[:, ::-1])


def test_narrow_loads_extend():
    m = entry(
        """
      cvt.u64.u32 %d1, %i; ld.param.u64 %d2, [src]; add.u64 %d2, %d2, %d1;
      ld.global.s8 %r1, [%d2]; ld.global.u8 %r2, [%d2]; sub.s32 %r3, %r2, %r1; st.global.u32 [%o], %r3;""",
        ".param .u64 out, .param .u64 src",
    )
    x = np.arange(-100, 28, dtype=np.int8)
    y = np.zeros(128, np.int32)
    m.kernel("k")[1, 128](y, x)
    np.testing.assert_array_equal(y, x.view(np.uint8).astype(int) - x)


def test_local_const_and_global_variables():
    m = Module.from_source(
        HEADER
        + """
.const .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 0f40400000, 0f40800000};
.global .align 4 .u32 total = 10;
.visible .entry k(.param .u64 out) {
 .local .align 8 .b8 frame[16];
 .reg .b64 %a<8>; .reg .b32 %r<8>; .reg .f32 %f<4>;
 mov.u32 %r1, %tid.x; and.b32 %r2, %r1, 3;
 mov.u64 %a1, table; mad.wide.u32 %a2, %r2, 4, %a1; ld.const.f32 %f1, [%a2];
 mov.u64 %a3, frame; cvta.local.u64 %a4, %a3; mad.wide.u32 %a4, %r2, 4, %a4; st.f32 [%a4], %f1; ld.f32 %f2, [%a4];
 ld.param.u64 %a5, [out]; mad.wide.u32 %a5, %r1, 4, %a5; st.global.f32 [%a5], %f2;
 atom.global.add.u32 %r3, [total], 1;
 ret; }"""
    )
    y = np.zeros(64, np.float32)
    m.kernel("k")[1, 64](y)
    np.testing.assert_array_equal(y, np.tile([1, 2, 3, 4], 16))
    assert m.variable("total", np.uint32)[0] == 74


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(
    "ty,op",
    [
        ("s32", "add"),
        ("u32", "min"),
        ("s32", "max"),
        ("b32", "and"),
        ("b32", "or"),
        ("b32", "xor"),
        ("u64", "add"),
        ("s64", "max"),
        ("f32", "add"),
        ("f64", "add"),
        ("u32", "inc"),
        ("b32", "exch"),
    ],
)
def test_atomics(rng, space, ty, op):
    """Every lane gets the value its predecessor left: the old values and the final one must form one serial history."""
    size = 8 if ty.endswith("64") else 4
    dtype = {"f": "f", "s": "i"}.get(ty[0], "u") + str(size)
    n, slots = 128, 3
    x = rng.integers(0, 50, n).astype(dtype)
    b = f"b{8 * size}"
    through_shared = f"@%p ld.global.{b} %v3, [%a4]; @%p st.shared.{b} [%a5], %v3; bar.sync 0; mov.u64 %a6, %a5;"
    m = Module.from_source(
        HEADER
        + f"""
.shared .align 8 .b8 tile[64];
.visible .entry k(.param .u64 p_mem, .param .u64 p_x, .param .u64 p_old) {{
 .reg .b64 %a<9>; .reg .b32 %r<9>; .reg .{b} %v<5>; .reg .pred %p;
 mov.u32 %r1, %tid.x; ld.param.u64 %a1, [p_mem]; ld.param.u64 %a2, [p_x]; ld.param.u64 %a3, [p_old];
 mad.wide.u32 %a2, %r1, {size}, %a2; mad.wide.u32 %a3, %r1, {size}, %a3; ld.global.{b} %v1, [%a2];
 rem.u32 %r2, %r1, {slots};
 setp.lt.u32 %p, %r1, {slots};
 mad.wide.u32 %a4, %r2, {size}, %a1; mov.u64 %a5, tile; mad.wide.u32 %a5, %r2, {size}, %a5;
 {through_shared if space == "shared" else "mov.u64 %a6, %a4;"}
 atom.{space}.{op}.{ty} %v2, [%a6], %v1; st.global.{b} [%a3], %v2;
 {f"bar.sync 0; @%p ld.shared.{b} %v3, [%a5]; @%p st.global.{b} [%a4], %v3;" if space == "shared" else ""}
 ret; }}"""
    )
    start = rng.integers(1, 50, slots).astype(dtype)
    mem, old = start.copy(), np.zeros(n, dtype)
    m.kernel("k")[1, n](mem, x, old)
    f = {
        "add": lambda o, v: o + v,
        "min": min,
        "max": max,
        "and": lambda o, v: o & v,
        "or": lambda o, v: o | v,
        "xor": lambda o, v: o ^ v,
        "inc": lambda o, v: dtype and (x.dtype.type(0) if o >= v else o + x.dtype.type(1)),
        "exch": lambda o, v: v,
    }[op]
    want = start.copy()
    for i in range(n):
        assert old[i] == want[i % slots]
        want[i % slots] = f(want[i % slots], x[i])
    np.testing.assert_array_equal(mem, want)


@pytest.mark.parametrize("ty", ["f16x2", "bf16x2"])
def test_packed_atomic_add(ty):
    m = entry(
        f"mov.b32 %r1, {'0x3C003C00' if ty == 'f16x2' else '0x3F803F80'}; red.global.add.noftz.{ty} [%base], %r1;"
    )
    y = np.zeros(1, np.uint32)
    m.kernel("k")[1, 64](y)
    halves = y.view(np.uint16)
    value = halves.view(np.float16) if ty == "f16x2" else (halves.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(value, [64, 64])


def test_compare_and_swap():
    m = entry("atom.global.cas.b32 %r1, [%base], %i, 100; st.global.u32 [%o+4], %r1;")
    y = np.zeros(65, np.uint32)
    m.kernel("k")[1, 64](y)
    assert y[0] == 100 and y[1] == 0 and (y[2:] == 100).all()


def test_generic_addresses_mix_spaces():
    m = entry("""
      .shared .align 4 .b8 s[128];
      mov.u32 %r1, s; mad.lo.u32 %r1, %i, 4, %r1; st.shared.u32 [%r1], %i; bar.warp.sync -1;
      cvt.u64.u32 %d1, %r1; cvta.shared.u64 %d2, %d1; and.b32 %r2, %i, 1; setp.eq.u32 %p1, %r2, 1;
      selp.b64 %d3, %d2, %o, %p1; ld.u32 %r3, [%d3]; isspacep.shared %p2, %d3; selp.u32 %r4, 1000, 0, %p2;
      add.u32 %r3, %r3, %r4; st.global.u32 [%o], %r3;""")
    y = np.full(32, 7, np.uint32)
    m.kernel("k")[1, 32](y)
    np.testing.assert_array_equal(y, np.where(np.arange(32) % 2, np.arange(32) + 1000, 7))


def test_unaligned_slice_of_an_array():
    m = entry("ld.global.u16 %r1, [%base]; st.global.u32 [%base+2], %r1;")
    x = np.arange(8, dtype=np.uint16)
    m.kernel("k")[1, 1](x[3:])  # the slice starts 6 bytes in: the 4-byte store is aligned
    assert x.tolist() == [0, 1, 2, 3, 3, 0, 6, 7]
