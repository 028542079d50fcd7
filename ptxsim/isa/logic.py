"""Bit operations: and, or, xor, not, shifts, lop3, bfe, bfi, prmt, clz, popc, brev, bfind, bmsk."""

from __future__ import annotations

import numpy as np

from ..bind import Binder, Step
from ..ir import Instr
from ..types import DTYPE, UINT, is_signed, size_of
from .registry import op

_BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@op("and", "or", "xor")
def bitwise(b: Binder, ins: Instr, pc: int) -> Step:
    """Two-operand logic on integers or predicates."""
    ty = ins.mods[-1]
    return b.alu(ins, ins.args[0], ty, _BITWISE[ins.op], *[b.value(a, ty) for a in ins.args[1:3]])


@op("not", "cnot")
def invert(b: Binder, ins: Instr, pc: int) -> Step:
    """``not`` (bitwise) and ``cnot`` (logical)."""
    ty = ins.mods[-1]
    f = np.bitwise_not if ins.op == "not" else lambda x: np.equal(x, 0).astype(DTYPE[ty])
    return b.alu(ins, ins.args[0], ty, f, b.value(ins.args[1], ty))


@op("shl", "shr")
def shift(b: Binder, ins: Instr, pc: int) -> Step:
    """Shifts; amounts of at least the width give 0 (or the sign)."""
    ty = ins.mods[-1]
    dtype, width = DTYPE[ty], 8 * size_of(ty)
    amount = b.value(ins.args[2], "u32")
    fixed = not isinstance(amount, np.ndarray)
    if fixed and (int(amount) < width or is_signed(ty)):
        k = dtype(min(int(amount), width - 1))
        ufunc = np.left_shift if ins.op == "shl" else np.right_shift
        return b.alu(ins, ins.args[0], ty, lambda x: ufunc(x, k), b.value(ins.args[1], ty))

    def f(x, n):
        clipped = np.minimum(n, np.uint32(width - 1)).astype(dtype)
        if ins.op == "shr":
            return x >> clipped if is_signed(ty) else np.where(n < width, x >> clipped, dtype(0))
        return np.where(n < width, x << clipped, dtype(0))

    return b.alu(ins, ins.args[0], ty, f, b.value(ins.args[1], ty), amount)


@op("shf")
def funnel(b: Binder, ins: Instr, pc: int) -> Step:
    """``shf.l``/``shf.r`` with ``.wrap`` or ``.clamp``: shift the 64-bit value {b, a}."""

    def f(lo, hi, n):
        n = np.minimum(n, np.uint32(32)) if ins.has("clamp") else n & np.uint32(31)
        both = (np.asarray(hi).astype(np.uint64) << np.uint64(32)) | lo
        n = np.asarray(n).astype(np.uint64)
        r = both << n >> np.uint64(32) if ins.has("l") else both >> n
        return r.astype(np.uint32)

    return b.alu(ins, ins.args[0], "b32", f, *[b.value(a, "b32") for a in ins.args[1:4]])


@op("lop3")
def lop3(b: Binder, ins: Instr, pc: int) -> Step:
    """Any three-input logic function, given by its truth table."""
    table = ins.immediate(4)

    def f(x, y, z):
        r = np.uint32(0)
        for i in range(8):
            if table >> i & 1:
                r = r | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        return r

    return b.alu(ins, ins.args[0], "b32", f, *[b.value(a, "b32") for a in ins.args[1:4]])


@op("bfe")
def bfe(b: Binder, ins: Instr, pc: int) -> Step:
    """Bit field extract; bits beyond the msb are zero, or copies of the sign."""
    ty = ins.mods[-1]
    width = 8 * size_of(ty)
    unsigned = UINT[size_of(ty)]

    def f(x, pos, length):
        u = np.asarray(x).view(unsigned)
        pos, length = (np.asarray(v).astype(np.int64) & 255 for v in (pos, length))
        valid = np.minimum(length, np.maximum(width - pos, 0))
        ones = ~unsigned(0)
        mask = np.where(valid == 0, unsigned(0), ones >> np.minimum(width - valid, width - 1).astype(unsigned))
        r = (u >> np.minimum(pos, width - 1).astype(unsigned)) & mask
        if is_signed(ty):
            top = np.clip(pos + length - 1, 0, width - 1).astype(unsigned)
            negative = ((u >> top) & unsigned(1) != 0) & (length != 0)
            r = np.where(negative, r | ~mask, r).view(DTYPE[ty])
        return r

    return b.alu(
        ins, ins.args[0], ty, f, b.value(ins.args[1], ty), b.value(ins.args[2], "u32"), b.value(ins.args[3], "u32")
    )


@op("bfi")
def bfi(b: Binder, ins: Instr, pc: int) -> Step:
    """Bit field insert: the low bits of a replace a field of b."""
    ty = ins.mods[-1]
    dtype, width = DTYPE[ty], 8 * size_of(ty)

    def f(x, y, pos, length):
        pos, length = np.asarray(pos) & 255, np.minimum(np.asarray(length) & 255, width)
        ones = np.where(
            length >= width, ~dtype(0), (dtype(1) << np.minimum(length, width - 1).astype(dtype)) - dtype(1)
        )
        p = np.minimum(pos, width - 1).astype(dtype)
        mask = np.where(pos < width, ones << p, dtype(0)).astype(dtype)
        return (y & ~mask) | ((x << p) & mask)

    return b.alu(
        ins,
        ins.args[0],
        ty,
        f,
        b.value(ins.args[1], ty),
        b.value(ins.args[2], ty),
        b.value(ins.args[3], "u32"),
        b.value(ins.args[4], "u32"),
    )


_PRMT_MODES = {
    "f4e": [(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (3, 4, 5, 6)],
    "b4e": [(0, 7, 6, 5), (1, 0, 7, 6), (2, 1, 0, 7), (3, 2, 1, 0)],
    "rc8": [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (3, 3, 3, 3)],
    "ecl": [(0, 1, 2, 3), (1, 1, 2, 3), (2, 2, 2, 3), (3, 3, 3, 3)],
    "ecr": [(0, 0, 0, 0), (0, 1, 1, 1), (0, 1, 2, 2), (0, 1, 2, 3)],
    "rc16": [(0, 1, 0, 1), (2, 3, 2, 3), (0, 1, 0, 1), (2, 3, 2, 3)],
}


@op("prmt")
def prmt(b: Binder, ins: Instr, pc: int) -> Step:
    """Byte permute, generic mode and the six named ones."""
    mode = ins.pick(_PRMT_MODES)

    def f(x, y, sel):
        both = (np.asarray(y).astype(np.uint64) << np.uint64(32)) | x
        r = np.uint32(0)
        for k in range(4):
            if mode:
                s = np.array([row[k] for row in _PRMT_MODES[mode]], np.uint64)[np.asarray(sel) & 3]
                sign = False
            else:
                nibble = np.asarray(sel >> np.uint32(4 * k)).astype(np.uint64)
                s, sign = nibble & np.uint64(7), (nibble & np.uint64(8)) != 0
            byte = (both >> (s * np.uint64(8))) & np.uint64(255)
            byte = np.where(sign, np.where(byte & np.uint64(128), 255, 0), byte).astype(np.uint32)
            r = r | (byte << np.uint32(8 * k))
        return r

    return b.alu(ins, ins.args[0], "b32", f, *[b.value(a, "b32") for a in ins.args[1:4]])


def leading_zeros(x, width: int) -> np.ndarray:
    """uint32 count of leading zero bits of unsigned integers."""
    x = np.asarray(x).astype(np.uint64)
    n = np.zeros(x.shape, np.uint32)
    for k in (32, 16, 8, 4, 2, 1):
        high = x >> np.uint64(k)
        big = high != 0
        n += np.where(big, np.uint32(k), np.uint32(0))
        x = np.where(big, high, x)
    return np.uint32(width - 1) - n + (x == 0).astype(np.uint32)


@op("clz", "popc", "brev", "bfind")
def count(b: Binder, ins: Instr, pc: int) -> Step:
    """``clz``, ``popc``, ``brev``, ``bfind`` (``.shiftamt``)."""
    ty = ins.mods[-1]
    width, unsigned = 8 * size_of(ty), UINT[size_of(ty)]
    if ins.op == "popc":
        return b.alu(ins, ins.args[0], "u32", lambda x: np.bitwise_count(x).astype(np.uint32), b.value(ins.args[1], ty))
    if ins.op == "clz":
        return b.alu(ins, ins.args[0], "u32", lambda x: leading_zeros(x, width), b.value(ins.args[1], ty))
    if ins.op == "bfind":

        def find(x):
            x = np.asarray(x)
            u = np.where(x < 0, ~x, x).view(unsigned) if is_signed(ty) else x
            z = leading_zeros(u, width)
            r = z if ins.has("shiftamt") else np.uint32(width - 1) - z
            return np.where(z == width, np.uint32(0xFFFFFFFF), r)

        return b.alu(ins, ins.args[0], "u32", find, b.value(ins.args[1], ty))

    def reverse(x):
        raw = np.ascontiguousarray(x)
        bits = np.unpackbits(raw.reshape(-1, 1).view(np.uint8), axis=1, bitorder="little")[:, ::-1]
        return np.packbits(bits, axis=1, bitorder="little").view(unsigned).reshape(raw.shape)

    return b.alu(ins, ins.args[0], ty, reverse, b.value(ins.args[1], ty))


@op("bmsk")
def bmsk(b: Binder, ins: Instr, pc: int) -> Step:
    """Bit mask of given position and width (``.clamp`` or ``.wrap``)."""

    def f(pos, n):
        pos, n = (np.asarray(v).astype(np.uint64) for v in (pos, n))
        if ins.has("wrap"):
            pos, n = pos & np.uint64(31), n & np.uint64(31)
        pos, n = np.minimum(pos, np.uint64(32)), np.minimum(n, np.uint64(32))
        return (((np.uint64(1) << n) - np.uint64(1)) << pos).astype(np.uint32)

    return b.alu(ins, ins.args[0], "b32", f, *[b.value(a, "u32") for a in ins.args[1:3]])
