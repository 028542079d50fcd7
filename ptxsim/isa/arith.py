"""Arithmetic: add, sub, mul, mad, fma, div, rem, abs, neg, min, max, sad, dot products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..bind import Binder, Step
from ..floats import directed, finish, join, lift, pairs, rounding
from ..ir import Instr
from ..types import DTYPE, is_float, is_signed, size_of
from .registry import op

_WIDER = {"u16": np.uint32, "s16": np.int32, "u32": np.uint64, "s32": np.int64}


def _float(ins: Instr, ty: str, exact: Callable, ufunc: Callable) -> Callable:
    """Function of a float instruction: ``ufunc`` in the type itself, or ``exact`` in float64 for directed rounding."""
    mode = rounding(ins.mods)
    if ty == "f32" and mode != "rn":
        f = lambda *a: directed(exact(*[np.asarray(x).astype(np.float64) for x in a]), np.float32, mode)
    else:
        f = ufunc
    return lift(ty, finish(ins.mods, f))


def _saturated(f: Callable, dtype) -> Callable:
    """32-bit integer function computed in 64 bits and clamped."""
    info = np.iinfo(dtype)
    return lambda *a: np.clip(f(*[np.asarray(x).astype(np.int64) for x in a]), info.min, info.max).astype(dtype)


@op("add", "sub")
def add(b: Binder, ins: Instr, pc: int) -> Step:
    """``add`` and ``sub`` of every type, with ``.sat`` and directed rounding."""
    if ins.has("cc"):
        return carried(b, ins, pc)
    ty = ins.mods[-1]
    f: Callable = np.add if ins.op == "add" else np.subtract
    if is_float(ty):
        f = _float(ins, ty, f, f)
    elif ins.has("sat"):
        f = _saturated(f, DTYPE[ty])
    elif ty.endswith("x2"):
        g = f
        f = lambda x, y: join(g(pairs(x), pairs(y)))
    return b.alu(ins, ins.args[0], ty, f, *[b.value(a, ty) for a in ins.args[1:3]])


def multiply(ins: Instr, ty: str) -> tuple[Callable, str]:
    """Integer multiplication of ``.lo``/``.hi``/``.wide`` and its result type."""
    if ins.has("wide"):
        wide = _WIDER[ty]
        return lambda x, y: np.multiply(x, y, dtype=wide), ty[0] + str(16 * size_of(ty))
    if ins.has("hi"):
        if size_of(ty) == 8:
            return (_mulhi64 if is_signed(ty) else _umulhi64), ty
        wide, shift = _WIDER[ty], 8 * size_of(ty)
        return lambda x, y: (np.multiply(x, y, dtype=wide) >> wide(shift)).astype(DTYPE[ty]), ty
    return np.multiply, ty


def _umulhi64(x, y):
    mask, s = np.uint64(0xFFFFFFFF), np.uint64(32)
    xl, xh, yl, yh = x & mask, x >> s, y & mask, y >> s
    mid = xh * yl + (xl * yl >> s)
    low = xl * yh + (mid & mask)
    return xh * yh + (mid >> s) + (low >> s)


def _mulhi64(x, y):
    ux, uy = np.asarray(x).view(np.uint64), np.asarray(y).view(np.uint64)
    r = _umulhi64(ux, uy)
    r = r - np.where(np.asarray(x) < 0, uy, np.uint64(0)) - np.where(np.asarray(y) < 0, ux, np.uint64(0))
    return r.view(np.int64)


@op("mul", "mul24")
def mul(b: Binder, ins: Instr, pc: int) -> Step:
    """``mul``: floats, and integers ``.lo``/``.hi``/``.wide``."""
    ty = ins.mods[-1]
    if is_float(ty):
        f, out = _float(ins, ty, np.multiply, np.multiply), ty
    else:
        f, out = multiply(ins, ty)
    return b.alu(ins, ins.args[0], out, f, *[b.value(a, ty) for a in ins.args[1:3]])


def _fused(x, y, z):
    t = np.asarray(x).astype(np.float64)
    t = np.multiply(t, y, out=t) if isinstance(t, np.ndarray) and t.ndim else t * np.float64(y)
    t = t + z
    return t


def _fma32(x, y, z):
    return _fused(x, y, z).astype(np.float32)


@op("fma", "mad")
def fma(b: Binder, ins: Instr, pc: int) -> Step:
    """``fma``/``mad``: f32 through a float64 product and sum; f16/bf16 likewise with one final rounding."""
    ty = ins.mods[-1]
    if is_float(ty):
        mode = rounding(ins.mods)
        if ty == "f32":
            f = _fma32 if mode == "rn" else lambda *a: directed(_fused(*a), np.float32, mode)
            f = finish(ins.mods, f)
        else:
            f = lift(ty, finish(ins.mods, lambda x, y, z: x * y + z), np.float64)
        return b.alu(ins, ins.args[0], ty, f, *[b.value(a, ty) for a in ins.args[1:4]])
    if ins.has("cc"):
        return carried(b, ins, pc)
    m, out = multiply(ins, ty)
    if ins.has("sat"):
        f = _saturated(lambda x, y, z: (x * y >> (32 if ins.has("hi") else 0)) + z, DTYPE[ty])
    else:
        f = lambda x, y, z: np.add(m(x, y), z)
    return b.alu(
        ins, ins.args[0], out, f, b.value(ins.args[1], ty), b.value(ins.args[2], ty), b.value(ins.args[3], out)
    )


@op("addc", "subc", "madc")
def carried(b: Binder, ins: Instr, pc: int) -> Step:
    """Extended precision: ``add.cc``, ``addc{.cc}``, ``sub.cc``, ``subc{.cc}``, ``mad{c}.{lo,hi}.cc``.

    ``machine.carry`` holds the carry (for subtractions: the borrow) of every thread.
    """
    ty = ins.mods[-1]
    unsigned = f"u{8 * size_of(ty)}"
    put, reads = b.writer(ins.args[0], unsigned), [b.reader(a, ty) for a in ins.args[1:]]
    product = multiply(ins, ty)[0] if ins.op.startswith("mad") else None
    subtract, carry_in, carry_out = ins.op.startswith("sub"), ins.op.endswith("c"), ins.has("cc")
    dtype, carry = DTYPE[unsigned], b.m.carry

    def step(g):
        x, y, *rest = [r(g) for r in reads]
        if product is not None:
            x, y = product(x, y), rest[0]
        x, y = x.view(dtype), y.view(dtype)
        extra = g.pick(carry).astype(dtype) if carry_in else dtype(0)
        if subtract:
            part = x - y
            total = part - extra
            over = (x < y) | (part < extra)
        else:
            part = x + y
            total = part + extra
            over = (part < x) | (total < part)
        put(g, total)
        if carry_out:
            carry[g.ix] = over

    return step


def _divide(x, y, signed: bool):
    zero = np.asarray(y) == 0
    safe = np.where(zero, np.asarray(y).dtype.type(1), y)
    q = np.floor_divide(x, safe)
    if signed:
        q = q + ((np.multiply(q, safe) != x) & ((np.asarray(x) < 0) ^ (safe < 0))).astype(q.dtype)
    return np.where(zero, ~q.dtype.type(0), q)


def _divide32(x, y, dtype):
    zero = np.asarray(y) == 0
    q = np.trunc(np.asarray(x).astype(np.float64) / np.where(zero, 1, y))
    return np.where(zero, ~dtype(0), q.astype(np.int64).astype(dtype))


@op("div")
def div(b: Binder, ins: Instr, pc: int) -> Step:
    """``div``: integers truncate (x/0 gives all ones); float ``.approx``/``.full`` are computed like ``.rn``."""
    ty = ins.mods[-1]
    if is_float(ty):
        f = _float(ins, ty, np.divide, np.divide)
    elif size_of(ty) == 4:
        f = lambda x, y: _divide32(x, y, DTYPE[ty])
    else:
        f = lambda x, y: _divide(x, y, is_signed(ty))
    return b.alu(ins, ins.args[0], ty, f, *[b.value(a, ty) for a in ins.args[1:3]])


@op("rem")
def rem(b: Binder, ins: Instr, pc: int) -> Step:
    """``rem``: sign of the dividend; x % 0 gives x."""
    ty = ins.mods[-1]

    def f(x, y):
        zero = np.asarray(y) == 0
        return np.where(zero, x, np.fmod(x, np.where(zero, np.asarray(y).dtype.type(1), y)))

    return b.alu(ins, ins.args[0], ty, f, *[b.value(a, ty) for a in ins.args[1:3]])


@op("neg", "abs")
def sign(b: Binder, ins: Instr, pc: int) -> Step:
    """``neg`` and ``abs`` (bit operations for the 16-bit float formats)."""
    ty = ins.mods[-1]
    carrier = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(ty)
    if carrier:
        bit = np.uint16(0x8000) if carrier == "b16" else np.uint32(0x80008000)
        f: Callable = (lambda x: x ^ bit) if ins.op == "neg" else (lambda x: x & ~bit)
        return b.alu(ins, ins.args[0], carrier, f, b.value(ins.args[1], carrier))
    f = np.negative if ins.op == "neg" else np.abs
    return b.alu(ins, ins.args[0], ty, finish(ins.mods, f), b.value(ins.args[1], ty))


@op("min", "max")
def minmax(b: Binder, ins: Instr, pc: int) -> Step:
    """``min``/``max``: the non-NaN operand, or NaN with ``.NaN``; two or three operands."""
    ty = ins.mods[-1]
    two: Callable = {
        ("min", False): np.fmin,
        ("max", False): np.fmax,
        ("min", True): np.minimum,
        ("max", True): np.maximum,
    }[ins.op, ins.has("NaN") or not is_float(ty)]
    f: Callable = two if len(ins.args) == 3 else lambda x, y, z: two(two(x, y), z)
    if ty in ("s16x2", "u16x2"):
        half = np.int16 if ty[0] == "s" else np.uint16
        f = lambda x, y: join(two(pairs(x).view(half), pairs(y).view(half)))
    elif is_float(ty):
        f = lift(ty, finish(ins.mods, f))
    return b.alu(ins, ins.args[0], ty, f, *[b.value(a, ty) for a in ins.args[1:]])


@op("sad")
def sad(b: Binder, ins: Instr, pc: int) -> Step:
    """``sad``: c + |a - b|."""
    ty = ins.mods[-1]
    f = lambda x, y, z: z + (np.maximum(x, y) - np.minimum(x, y))
    return b.alu(ins, ins.args[0], ty, f, *[b.value(a, ty) for a in ins.args[1:4]])


@op("dp4a", "dp2a")
def dot(b: Binder, ins: Instr, pc: int) -> Step:
    """``dp4a.atype.btype d, a, b, c`` and ``dp2a.mode.atype.btype``."""
    at, bt = ins.mods[-2:]

    def parts(x, dtype):
        x = np.ascontiguousarray(x, np.uint32)
        return x.reshape(x.shape + (1,)).view(dtype).astype(np.int64)

    byte = {"u32": np.uint8, "s32": np.int8}
    word = {"u32": np.uint16, "s32": np.int16}

    def f(x, y, z):
        yb = parts(y, byte[bt])
        if ins.op == "dp4a":
            total = (parts(x, byte[at]) * yb).sum(-1)
        else:
            yb = yb[..., 2:] if ins.has("hi") else yb[..., :2]
            total = (parts(x, word[at]) * yb).sum(-1)
        return (total + np.asarray(z).astype(np.int64)).astype(np.uint32)

    signed = "s32" if "s32" in (at, bt) else "u32"
    return b.alu(
        ins,
        ins.args[0],
        "b32",
        f,
        b.value(ins.args[1], "b32"),
        b.value(ins.args[2], "b32"),
        b.value(ins.args[3], signed),
    )
