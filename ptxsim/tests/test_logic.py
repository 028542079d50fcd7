"""Bit operations against plain Python."""

import numpy as np
import pytest

from ptxsim.tests.ptx_support import run_op


def words(rng, dtype=np.uint32, n=200):
    x = rng.integers(0, np.iinfo(dtype).max, n, dtype=dtype, endpoint=True)
    x[:4] = [0, np.iinfo(dtype).max, 1, 1 << (8 * x.itemsize - 1)]
    return x


@pytest.mark.parametrize("op,f", [("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)])
@pytest.mark.parametrize("bits,dtype", [(16, np.uint16), (32, np.uint32), (64, np.uint64)])
def test_bitwise(rng, op, f, bits, dtype):
    a, b = words(rng, dtype), words(rng, dtype)[::-1].copy()
    np.testing.assert_array_equal(run_op(f"{op}.b{bits} %z, %a, %b;", dtype, a, b), f(a, b))


@pytest.mark.parametrize("bits,dtype", [(32, np.uint32), (64, np.uint64)])
def test_shifts(rng, bits, dtype):
    a, n = words(rng, dtype), rng.integers(0, bits + 10, 200).astype(np.uint32)
    mask = (1 << bits) - 1
    want = np.array([int(x) << int(k) & mask for x, k in zip(a, n)], dtype)
    np.testing.assert_array_equal(run_op(f"shl.b{bits} %z, %a, %b;", dtype, a, n), want)
    np.testing.assert_array_equal(
        run_op(f"shr.u{bits} %z, %a, %b;", dtype, a, n), np.array([int(x) >> int(k) for x, k in zip(a, n)], dtype)
    )
    signed = a.view(f"i{bits // 8}")
    np.testing.assert_array_equal(
        run_op(f"shr.s{bits} %z, %a, %b;", signed.dtype, a, n),
        np.array([int(x) >> int(k) for x, k in zip(signed, n)], signed.dtype),
    )
    np.testing.assert_array_equal(
        run_op(f"shl.b{bits} %z, %a, 40;", dtype, a), np.array([int(x) << 40 & mask for x in a], dtype)
    )


@pytest.mark.parametrize("side", ["l", "r"])
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shift(rng, side, mode):
    a, b, n = words(rng), words(rng)[::-1].copy(), rng.integers(0, 70, 200).astype(np.uint32)
    want = []
    for lo, hi, k in zip(a, b, n):
        k = min(int(k), 32) if mode == "clamp" else int(k) & 31
        v = int(hi) << 32 | int(lo)
        want.append((v << k >> 32 if side == "l" else v >> k) & 0xFFFFFFFF)
    np.testing.assert_array_equal(
        run_op(f"shf.{side}.{mode}.b32 %z, %a, %b, %c;", np.uint32, a, b, n), np.array(want, np.uint32)
    )


@pytest.mark.parametrize("table", [0x96, 0xE8, 0x1B, 0xCA])
def test_lop3(rng, table):
    a, b, c = words(rng), words(rng)[::-1].copy(), rng.permutation(words(rng))
    want = np.zeros(200, np.uint32)
    for bit in range(32):
        i = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        want |= ((table >> i) & 1).astype(np.uint32) << np.uint32(bit)
    np.testing.assert_array_equal(run_op(f"lop3.b32 %z, %a, %b, %c, {table};", np.uint32, a, b, c), want)


def bfe(x, pos, n, bits, signed):
    pos, n, msb = pos & 255, n & 255, bits - 1
    u = x & ((1 << bits) - 1)
    fill = u >> min(pos + n - 1, msb) & 1 if signed and n else 0
    r = 0
    for i in range(bits):
        r |= (u >> (pos + i) & 1 if i < n and pos + i <= msb else fill) << i
    return r


@pytest.mark.parametrize("ty,dtype", [("u32", np.uint32), ("s32", np.uint32), ("u64", np.uint64), ("s64", np.uint64)])
def test_bfe(rng, ty, dtype):
    bits = 8 * np.dtype(dtype).itemsize
    a, pos, n = (
        words(rng, dtype),
        rng.integers(0, bits + 6, 200).astype(np.uint32),
        rng.integers(0, bits + 6, 200).astype(np.uint32),
    )
    want = np.array([bfe(int(x), int(p), int(k), bits, ty[0] == "s") for x, p, k in zip(a, pos, n)], dtype)
    np.testing.assert_array_equal(run_op(f"bfe.{ty} %z, %a, %b, %c;", dtype, a, pos, n), want)
    want = np.array([bfe(int(x), 5, 9, bits, ty[0] == "s") for x in a], dtype)
    np.testing.assert_array_equal(run_op(f"bfe.{ty} %z, %a, 5, 9;", dtype, a), want)


@pytest.mark.parametrize("bits,dtype", [(32, np.uint32), (64, np.uint64)])
def test_bfi(rng, bits, dtype):
    a, b = words(rng, dtype), words(rng, dtype)[::-1].copy()
    pos, n = rng.integers(0, bits, 200).astype(np.uint32), rng.integers(0, bits + 4, 200).astype(np.uint32)
    want = []
    for x, y, p, k in zip(a, b, pos, n):
        mask = ((1 << int(k)) - 1) << int(p) & ((1 << bits) - 1)
        want.append(int(y) & ~mask | (int(x) << int(p)) & mask)
    np.testing.assert_array_equal(
        run_op(f"bfi.b{bits} %z, %a, %b, %c, %d;", dtype, a, b, pos, n), np.array(want, dtype)
    )


def test_prmt(rng):
    a, b, s = words(rng), words(rng)[::-1].copy(), words(rng)
    want = []
    for x, y, sel in zip(a, b, s):
        v = (int(y) << 32 | int(x)).to_bytes(8, "little")
        r = 0
        for k in range(4):
            c = int(sel) >> 4 * k & 15
            byte = v[c & 7]
            r |= ((255 if byte & 128 else 0) if c & 8 else byte) << 8 * k
        want.append(r)
    np.testing.assert_array_equal(run_op("prmt.b32 %z, %a, %b, %c;", np.uint32, a, b, s), np.array(want, np.uint32))
    got = run_op("prmt.b32.rc8 %z, %a, %b, 2;", np.uint32, a, b)
    np.testing.assert_array_equal(got, (a >> 16 & 255) * np.uint32(0x01010101))


@pytest.mark.parametrize("bits,dtype", [(32, np.uint32), (64, np.uint64)])
def test_counting(rng, bits, dtype):
    a = words(rng, dtype) >> rng.integers(0, bits, 200).astype(dtype)
    np.testing.assert_array_equal(run_op(f"clz.b{bits} %z, %a;", np.uint32, a), [bits - int(x).bit_length() for x in a])
    np.testing.assert_array_equal(run_op(f"popc.b{bits} %z, %a;", np.uint32, a), [int(x).bit_count() for x in a])
    np.testing.assert_array_equal(
        run_op(f"brev.b{bits} %z, %a;", dtype, a), np.array([int(f"{int(x):0{bits}b}"[::-1], 2) for x in a], dtype)
    )
    np.testing.assert_array_equal(
        run_op(f"bfind.u{bits} %z, %a;", np.uint32, a),
        np.array([(int(x).bit_length() - 1) & 0xFFFFFFFF for x in a], np.uint32),
    )


def test_bfind_signed():
    a = np.array([-1, 0, 5, -5, 2**31 - 1, -(2**31)], np.int32)
    want = [(int(x if x >= 0 else ~x).bit_length() - 1) & 0xFFFFFFFF for x in a]
    np.testing.assert_array_equal(run_op("bfind.s32 %z, %a;", np.uint32, a), np.array(want, np.uint32))


def test_predicate_logic(rng):
    a, b = rng.random(64) < 0.5, rng.random(64) < 0.5
    np.testing.assert_array_equal(run_op("and.pred %z, %a, %b;", bool, a, b), a & b)
    np.testing.assert_array_equal(run_op("xor.pred %z, %a, %b;", bool, a, b), a ^ b)
    np.testing.assert_array_equal(run_op("not.pred %z, %a;", bool, a), ~a)
