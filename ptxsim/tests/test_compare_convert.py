"""setp, selp, mov and cvt."""

import numpy as np
import pytest

from ptxsim.tests.ptx_support import run_op
from ptxsim.tests.test_arith import bf16, widen

OPS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


@pytest.mark.parametrize("op", OPS)
def test_setp_int(rng, op):
    a, b = (rng.integers(-3, 3, 200).astype(np.int32) for _ in range(2))
    np.testing.assert_array_equal(run_op(f"setp.{op}.s32 %z, %a, %b;", bool, a, b), OPS[op](a, b))
    u, v = a.view(np.uint32), b.view(np.uint32)
    np.testing.assert_array_equal(run_op(f"setp.{op}.u32 %z, %a, %b;", bool, u, v), OPS[op](u, v))


@pytest.mark.parametrize("op", OPS)
def test_setp_float_and_nan(rng, op):
    a, b = (rng.integers(-2, 2, 200).astype(np.float32) for _ in range(2))
    a[::7], b[::5] = np.nan, np.nan
    ordered = OPS[op](a, b) & ~np.isnan(a) & ~np.isnan(b)
    np.testing.assert_array_equal(run_op(f"setp.{op}.f32 %z, %a, %b;", bool, a, b), ordered)
    np.testing.assert_array_equal(
        run_op(f"setp.{op}u.f32 %z, %a, %b;", bool, a, b), OPS[op](a, b) | np.isnan(a) | np.isnan(b)
    )
    np.testing.assert_array_equal(run_op("setp.nan.f32 %z, %a, %b;", bool, a, b), np.isnan(a) | np.isnan(b))


def test_setp_combined_and_two_results(rng):
    a, b, c = rng.integers(0, 3, 100).astype(np.int32), rng.integers(0, 3, 100).astype(np.int32), rng.random(100) < 0.5
    np.testing.assert_array_equal(run_op("setp.lt.and.s32 %z, %a, %b, !%c;", bool, a, b, c), (a < b) & ~c)
    np.testing.assert_array_equal(
        run_op("{.reg .pred t; setp.lt.or.s32 t|%z, %a, %b, %c;}", bool, a, b, c), (a >= b) | c
    )


def test_setp_half_pair(rng):
    a, b = (rng.standard_normal(64).astype(np.float16) for _ in range(2))
    pa, pb = a.view(np.uint32), b.view(np.uint32)
    np.testing.assert_array_equal(run_op("{.reg .pred t; setp.gt.f16x2 t|%z, %a, %b;}", bool, pa, pb), (a > b)[1::2])


def test_selp_slct_set(rng):
    a, b, p = (
        rng.standard_normal(64).astype(np.float32),
        rng.standard_normal(64).astype(np.float32),
        rng.random(64) < 0.5,
    )
    np.testing.assert_array_equal(run_op("selp.f32 %z, %a, %b, %c;", np.float32, a, b, p), np.where(p, a, b))
    np.testing.assert_array_equal(run_op("selp.b32 %z, 7, 9, %a;", np.uint32, p), np.where(p, 7, 9))
    np.testing.assert_array_equal(
        run_op("slct.f32.s32 %z, %a, %b, %c;", np.float32, a, b, np.where(p, 1, -1).astype(np.int32)), np.where(p, a, b)
    )
    np.testing.assert_array_equal(run_op("set.gt.u32.f32 %z, %a, %b;", np.uint32, a, b), np.where(a > b, 0xFFFFFFFF, 0))


def test_set_packed():
    a, b = np.array([1, 2, np.nan, 4], np.float16), np.array([0, 3, 1, 4], np.float16)
    got = run_op("set.ge.f16x2.f16x2 %z, %a, %b;", np.uint32, a.view(np.uint32), b.view(np.uint32)).view(np.float16)
    np.testing.assert_array_equal(got, [1, 0, 0, 1])


def test_mov_pack_unpack(rng):
    a = rng.integers(0, 2**32, 64, dtype=np.uint32)
    swap = "{.reg .b16 l, h; mov.b32 {l, h}, %a; mov.b32 %z, {h, l};}"
    np.testing.assert_array_equal(run_op(swap, np.uint32, a), a >> 16 | a << 16)
    np.testing.assert_array_equal(
        run_op("mov.b64 %z, {%a, %b};", np.uint64, a, ~a), a.astype(np.uint64) | (~a).astype(np.uint64) << np.uint64(32)
    )
    np.testing.assert_array_equal(
        run_op("{.reg .b32 t; mov.b64 {_, t}, %a; mov.u32 %z, t;}", np.uint32, a.astype(np.uint64) << np.uint64(32)), a
    )


SPECIAL = np.array(
    [0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 1e10, -1e10, np.nan, np.inf, -np.inf, 254.5, 255.5, 70000.3], np.float32
)


@pytest.mark.parametrize("mode,f", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)])
@pytest.mark.parametrize(
    "ty,dtype",
    [("s32", np.int32), ("u32", np.uint32), ("s16", np.int16), ("u8", np.uint8), ("s64", np.int64), ("u64", np.uint64)],
)
def test_float_to_int(mode, f, ty, dtype):
    info = np.iinfo(dtype)
    want = np.array(
        [
            0
            if np.isnan(x)
            else int(max(info.min, min(info.max, f(x) if np.isfinite(x) else (info.max if x > 0 else info.min))))
            for x in SPECIAL.astype(np.float64)
        ],
        dtype,
    )
    np.testing.assert_array_equal(run_op(f"cvt.{mode}.{ty}.f32 %z, %a;", dtype, SPECIAL), want)


@pytest.mark.parametrize(
    "ty,dtype",
    [("s32", np.int32), ("u32", np.uint32), ("s64", np.int64), ("u64", np.uint64), ("s8", np.int8), ("u16", np.uint16)],
)
def test_int_to_float(rng, ty, dtype):
    a = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, 200, dtype=dtype)
    np.testing.assert_array_equal(run_op(f"cvt.rn.f32.{ty} %z, %a;", np.float32, a), a.astype(np.float32))
    np.testing.assert_array_equal(run_op(f"cvt.rn.f64.{ty} %z, %a;", np.float64, a), a.astype(np.float64))


def test_int_to_int(rng):
    a = rng.integers(-(2**31), 2**31 - 1, 200, dtype=np.int32)
    np.testing.assert_array_equal(run_op("cvt.s64.s32 %z, %a;", np.int64, a), a.astype(np.int64))
    np.testing.assert_array_equal(
        run_op("cvt.u64.u32 %z, %a;", np.uint64, a.view(np.uint32)), a.view(np.uint32).astype(np.uint64)
    )
    np.testing.assert_array_equal(run_op("cvt.s32.s8 %z, %a;", np.int32, a), a.astype(np.int8))
    np.testing.assert_array_equal(run_op("cvt.u16.u32 %z, %a;", np.uint16, a.view(np.uint32)), a.astype(np.uint16))
    np.testing.assert_array_equal(run_op("cvt.sat.u8.s32 %z, %a;", np.uint8, a // 2**23), np.clip(a // 2**23, 0, 255))


def test_half_conversions(rng):
    f = np.concatenate([rng.standard_normal(200), [70000, 1e-7, -1e-8, np.inf, np.nan]]).astype(np.float32)
    with np.errstate(over="ignore"):
        h = f.astype(np.float16)
    np.testing.assert_array_equal(run_op("cvt.rn.f16.f32 %z, %a;", np.float16, f), h)
    np.testing.assert_array_equal(run_op("cvt.f32.f16 %z, %a;", np.float32, h), h.astype(np.float32))
    z = run_op("cvt.rz.f16.f32 %z, %a;", np.float16, f[:200]).astype(np.float32)
    assert np.all(np.abs(z) <= np.abs(f[:200])) and np.all(np.abs(z - f[:200]) < 0.01)
    got = run_op("cvt.rn.f16x2.f32 %z, %a, %b;", np.uint32, f, -f)
    np.testing.assert_array_equal(got.view(np.float16).reshape(-1, 2), np.stack([-h, h], 1))


def test_bfloat_conversions(rng):
    f = rng.standard_normal(400).astype(np.float32)
    f[:50] = widen(bf16(f[:50])) + np.spacing(widen(bf16(f[:50]))) * 2**15  # exact ties
    np.testing.assert_array_equal(run_op("cvt.rn.bf16.f32 %z, %a;", np.uint16, f), bf16(f.astype(np.float64)))
    np.testing.assert_array_equal(run_op("cvt.f32.bf16 %z, %a;", np.float32, bf16(f)), widen(bf16(f)))
    got = run_op("cvt.rn.bf16x2.f32 %z, %a, %b;", np.uint32, f, -f).view(np.uint16).reshape(-1, 2)
    np.testing.assert_array_equal(got, np.stack([bf16(-f), bf16(f)], 1))
    got = run_op("cvt.rn.relu.bf16x2.f32 %z, %a, %b;", np.uint32, f, -f).view(np.uint16).reshape(-1, 2)
    np.testing.assert_array_equal(got, np.stack([bf16(np.maximum(-f, 0)), bf16(np.maximum(f, 0))], 1))
    np.testing.assert_array_equal(
        run_op("cvt.rz.bf16.f32 %z, %a;", np.uint16, f), (f.view(np.uint32) >> 16).astype(np.uint16)
    )
    assert run_op("cvt.rn.bf16.f32 %z, %a;", np.uint16, np.array([np.nan, np.inf], np.float32)).tolist() == [
        0x7FFF,
        0x7F80,
    ]


def test_tf32_and_double(rng):
    f = rng.standard_normal(200).astype(np.float32)
    u = f.view(np.uint32).astype(np.uint64)
    np.testing.assert_array_equal(
        run_op("cvt.rna.tf32.f32 %z, %a;", np.uint32, f), ((u + 0x1000) & ~np.uint64(0x1FFF)).astype(np.uint32)
    )
    d = rng.standard_normal(200)
    np.testing.assert_array_equal(run_op("cvt.rn.f32.f64 %z, %a;", np.float32, d), d.astype(np.float32))
    np.testing.assert_array_equal(run_op("cvt.f64.f32 %z, %a;", np.float64, f), f.astype(np.float64))
    np.testing.assert_array_equal(run_op("cvt.sat.f32.f32 %z, %a;", np.float32, f), np.clip(f, 0, 1))
