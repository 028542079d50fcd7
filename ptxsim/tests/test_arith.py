"""Arithmetic opcodes against numpy."""

import math

import numpy as np
import pytest

from ptxsim.tests.ptx_support import run_op

INTS = {"s32": np.int32, "u32": np.uint32, "s64": np.int64, "u64": np.uint64, "s16": np.int16, "u16": np.uint16}


def ints(rng, ty, n=128):
    info = np.iinfo(INTS[ty])
    x = rng.integers(info.min, info.max, n, dtype=INTS[ty], endpoint=True)
    x[:6] = [info.min, info.max, 0, 1, info.max - 1, 3]
    return x


def floats(rng, n=256, dtype=np.float32):
    x = (rng.standard_normal(n) * np.exp(rng.uniform(-3, 3, n))).astype(dtype)
    x[:6] = [0, -0.0, np.inf, -np.inf, np.nan, 1]
    return x


def bf16(x):
    """Nearest bf16 of float64 values, as uint16, by exhaustive comparison of the two neighbours."""
    f = np.asarray(x, np.float32)
    low = (f.view(np.uint32) >> 16).astype(np.uint32)
    a, b = ((low + k) << 16 for k in (0, 1))
    da, db = (np.abs(np.asarray(x, np.float64) - v.astype(np.uint32).view(np.float32)) for v in (a, b))
    up = (db < da) | ((db == da) & (low & 1 == 1))
    return np.where(up, low + 1, low).astype(np.uint16)


def widen(u):
    return (u.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("ty", INTS)
@pytest.mark.parametrize(
    "op,f", [("add", np.add), ("sub", np.subtract), ("mul.lo", np.multiply), ("min", np.minimum), ("max", np.maximum)]
)
def test_int_binary(rng, ty, op, f):
    a, b = ints(rng, ty), ints(rng, ty)[::-1].copy()
    np.testing.assert_array_equal(run_op(f"{op}.{ty} %z, %a, %b;", INTS[ty], a, b), f(a, b))


@pytest.mark.parametrize("ty", INTS)
def test_int_division(rng, ty):
    a, b = ints(rng, ty), ints(rng, ty)[::-1].copy()
    b[b == 0] = 7
    b[10:40] = b[10:40] % 9 + 1
    if ty[0] == "s":
        b[(a == np.iinfo(INTS[ty]).min) & (b == -1)] = 2
    q = np.array(
        [
            int(math.trunc(int(x) // int(y))) if (x < 0) == (y < 0) else -(abs(int(x)) // abs(int(y)))
            for x, y in zip(a, b)
        ],
        INTS[ty],
    )
    np.testing.assert_array_equal(run_op(f"div.{ty} %z, %a, %b;", INTS[ty], a, b), q)
    np.testing.assert_array_equal(run_op(f"rem.{ty} %z, %a, %b;", INTS[ty], a, b), a - q * b)


@pytest.mark.parametrize("ty", ["s32", "u32", "s64", "u64", "s16", "u16"])
def test_mul_hi(rng, ty):
    a, b = ints(rng, ty), ints(rng, ty)[::-1].copy()
    bits = 8 * a.itemsize
    want = np.array([(int(x) * int(y) >> bits) & ((1 << bits) - 1) for x, y in zip(a, b)], np.uint64)
    got = run_op(f"mul.hi.{ty} %z, %a, %b;", INTS[ty], a, b)
    np.testing.assert_array_equal(got.view(f"u{a.itemsize}").astype(np.uint64), want)


@pytest.mark.parametrize("ty,wide", [("s32", np.int64), ("u32", np.uint64), ("s16", np.int32), ("u16", np.uint32)])
def test_mul_wide_and_mad(rng, ty, wide):
    a, b = ints(rng, ty), ints(rng, ty)[::-1].copy()
    c = rng.integers(0, 1000, len(a)).astype(wide)
    np.testing.assert_array_equal(run_op(f"mul.wide.{ty} %z, %a, %b;", wide, a, b), a.astype(wide) * b.astype(wide))
    np.testing.assert_array_equal(
        run_op(f"mad.wide.{ty} %z, %a, %b, %c;", wide, a, b, c), a.astype(wide) * b.astype(wide) + c
    )
    np.testing.assert_array_equal(run_op(f"mad.lo.{ty} %z, %a, %b, %a;", INTS[ty], a, b), a * b + a)


def test_saturating_add(rng):
    a, b = ints(rng, "s32"), ints(rng, "s32")[::-1].copy()
    want = np.clip(a.astype(np.int64) + b, -(2**31), 2**31 - 1)
    np.testing.assert_array_equal(run_op("add.sat.s32 %z, %a, %b;", np.int32, a, b), want)


def test_packed_integers(rng):
    a, b = rng.integers(-(2**15), 2**15, (2, 128)).astype(np.int16)
    pa, pb = a.view(np.uint32), b.view(np.uint32)
    for op, ty, f in (("add", "u16x2", np.add), ("min", "s16x2", np.minimum), ("max", "s16x2", np.maximum)):
        np.testing.assert_array_equal(run_op(f"{op}.{ty} %z, %a, %b;", np.uint32, pa, pb).view(np.int16), f(a, b))


def test_carry_chain(rng):
    a, b = ints(rng, "u64"), ints(rng, "u64")[::-1].copy()
    split = "{.reg .b32 al, ah, bl, bh, l, h; mov.b64 {al, ah}, %a; mov.b64 {bl, bh}, %b; "
    join = "mov.b64 %z, {l, h};}"
    np.testing.assert_array_equal(
        run_op(split + "add.cc.u32 l, al, bl; addc.u32 h, ah, bh;" + join, np.uint64, a, b), a + b
    )
    np.testing.assert_array_equal(
        run_op(split + "sub.cc.u32 l, al, bl; subc.u32 h, ah, bh;" + join, np.uint64, a, b), a - b
    )
    product = "mul.lo.u32 l, al, bl; mul.hi.u32 h, al, bl; mad.lo.u32 h, al, bh, h; mad.lo.u32 h, ah, bl, h;"
    np.testing.assert_array_equal(run_op(split + product + join, np.uint64, a, b), a * b)
    square = "mul.lo.u32 l, al, al; mad.lo.cc.u32 l, bl, bl, l; mul.hi.u32 h, al, al; madc.hi.u32 h, bl, bl, h;"
    low = np.uint64(0xFFFFFFFF)
    np.testing.assert_array_equal(run_op(split + square + join, np.uint64, a, b), (a & low) ** 2 + (b & low) ** 2)


def test_sad_abs_neg(rng):
    a, b = ints(rng, "s32") // 4, ints(rng, "s32")[::-1] // 4
    np.testing.assert_array_equal(run_op("sad.s32 %z, %a, %b, 5;", np.int32, a, b), np.abs(a - b) + 5)
    np.testing.assert_array_equal(run_op("abs.s32 %z, %a;", np.int32, a), np.abs(a))
    np.testing.assert_array_equal(run_op("neg.s32 %z, %a;", np.int32, a), -a)


@pytest.mark.parametrize("ta,tb", [("s32", "s32"), ("u32", "u32"), ("s32", "u32"), ("u32", "s32")])
def test_dp4a(rng, ta, tb):
    a, b = ints(rng, "u32"), ints(rng, "u32")[::-1].copy()
    c = rng.integers(0, 1000, len(a)).astype(np.uint32)
    pa = a.view(np.int8 if ta == "s32" else np.uint8).reshape(-1, 4).astype(np.int64)
    pb = b.view(np.int8 if tb == "s32" else np.uint8).reshape(-1, 4).astype(np.int64)
    np.testing.assert_array_equal(
        run_op(f"dp4a.{ta}.{tb} %z, %a, %b, %c;", np.uint32, a, b, c), ((pa * pb).sum(1) + c).astype(np.uint32)
    )


@pytest.mark.parametrize(
    "op,f",
    [
        ("add", np.add),
        ("sub", np.subtract),
        ("mul", np.multiply),
        ("min", np.fmin),
        ("max", np.fmax),
        ("div.rn", np.divide),
    ],
)
@pytest.mark.parametrize("ty,dtype", [("f32", np.float32), ("f64", np.float64)])
def test_float_binary(rng, op, f, ty, dtype):
    a, b = floats(rng, dtype=dtype), floats(rng, dtype=dtype)[::-1].copy()
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(run_op(f"{op}.{ty} %z, %a, %b;", dtype, a, b), f(a, b))


def test_fma_rounds_once(rng):
    a, b = floats(rng)[6:], floats(rng)[6:][::-1].copy()
    c = (-(a.astype(np.float64) * b)).astype(np.float32)  # cancellation: a separate rounding would be visible
    want = (a.astype(np.float64) * b + c).astype(np.float32)
    np.testing.assert_array_equal(run_op("fma.rn.f32 %z, %a, %b, %c;", np.float32, a, b, c), want)
    assert np.any(want != 0)


def test_directed_rounding(rng):
    a, b = floats(rng)[6:], floats(rng)[6:][::-1].copy()
    exact = a.astype(np.float64) * b
    down = run_op("mul.rm.f32 %z, %a, %b;", np.float32, a, b)
    up = run_op("mul.rp.f32 %z, %a, %b;", np.float32, a, b)
    zero = run_op("mul.rz.f32 %z, %a, %b;", np.float32, a, b)
    assert np.all(down <= exact) and np.all(exact <= up) and np.all(np.abs(zero) <= np.abs(exact))
    assert np.all((up == down) | (np.nextafter(down, np.float32(np.inf)) == up))


def test_saturation_flush_relu():
    a = np.array([-1, 0.5, 2, np.nan], np.float32)
    np.testing.assert_array_equal(run_op("add.sat.f32 %z, %a, 0f00000000;", np.float32, a), [0, 0.5, 1, 0])
    tiny = np.array([1e-39, -1e-39, 1e-37], np.float32)
    np.testing.assert_array_equal(
        run_op("add.ftz.f32 %z, %a, 0f00000000;", np.float32, tiny), np.array([0, 0, 1e-37], np.float32)
    )


def test_nan_propagating_max():
    a, b = np.array([1, np.nan, 2], np.float32), np.array([2, 1, np.nan], np.float32)
    np.testing.assert_array_equal(run_op("max.NaN.f32 %z, %a, %b;", np.float32, a, b), [2, np.nan, np.nan])
    np.testing.assert_array_equal(run_op("max.f32 %z, %a, %b;", np.float32, a, b), [2, 1, 2])


@pytest.mark.parametrize(
    "op,f", [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("min", np.fmin), ("max", np.fmax)]
)
def test_half(rng, op, f):
    a, b = (rng.standard_normal(200).astype(np.float16) for _ in range(2))
    np.testing.assert_array_equal(run_op(f"{op}.f16 %z, %a, %b;", np.float16, a, b), f(a, b))
    pa, pb = a.view(np.uint32), b.view(np.uint32)
    np.testing.assert_array_equal(run_op(f"{op}.f16x2 %z, %a, %b;", np.uint32, pa, pb).view(np.float16), f(a, b))


@pytest.mark.parametrize("op,f", [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_bfloat(rng, op, f):
    a, b = (bf16(rng.standard_normal(200)) for _ in range(2))
    want = bf16(f(widen(a).astype(np.float64), widen(b)))
    np.testing.assert_array_equal(run_op(f"{op}.bf16 %z, %a, %b;", np.uint16, a, b), want)
    got = run_op(f"{op}.bf16x2 %z, %a, %b;", np.uint32, a.view(np.uint32), b.view(np.uint32))
    np.testing.assert_array_equal(got.view(np.uint16), want)


def test_half_and_bfloat_fma(rng):
    a, b, c = (rng.standard_normal(200).astype(np.float16) for _ in range(3))
    want = (a.astype(np.float64) * b + c).astype(np.float16)
    np.testing.assert_array_equal(run_op("fma.rn.f16 %z, %a, %b, %c;", np.float16, a, b, c), want)
    got = run_op("fma.rn.relu.f16x2 %z, %a, %b, %c;", np.uint32, *[x.view(np.uint32) for x in (a, b, c)])
    np.testing.assert_array_equal(got.view(np.float16), np.maximum(want, 0))
    x, y, z = (bf16(rng.standard_normal(200)) for _ in range(3))
    want = bf16(widen(x).astype(np.float64) * widen(y) + widen(z))
    np.testing.assert_array_equal(run_op("fma.rn.bf16 %z, %a, %b, %c;", np.uint16, x, y, z), want)


def test_half_sign_ops(rng):
    a = rng.standard_normal(64).astype(np.float16)
    np.testing.assert_array_equal(run_op("neg.f16x2 %z, %a;", np.uint32, a.view(np.uint32)).view(np.float16), -a)
    np.testing.assert_array_equal(run_op("abs.f16 %z, %a;", np.float16, a), np.abs(a))


@pytest.mark.parametrize(
    "op,f",
    [
        ("rcp.rn", lambda x: 1 / x),
        ("sqrt.rn", np.sqrt),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(x)),
        ("ex2.approx", np.exp2),
        ("lg2.approx", np.log2),
        ("sin.approx", np.sin),
        ("cos.approx", np.cos),
        ("tanh.approx", np.tanh),
    ],
)
def test_special_functions(rng, op, f):
    a = rng.uniform(0.01, 9, 200).astype(np.float32)
    np.testing.assert_array_max_ulp(
        run_op(f"{op}.f32 %z, %a;", np.float32, a), f(a.astype(np.float64)).astype(np.float32), 1
    )


def test_copysign(rng):
    a, b = floats(rng)[6:], floats(rng)[6:][::-1].copy()
    np.testing.assert_array_equal(run_op("copysign.f32 %z, %a, %b;", np.float32, a, b), np.copysign(b, a))
