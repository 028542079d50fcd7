"""Data movement and conversion: mov, cvt, cvta, isspacep."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..bind import Binder, Step
from ..floats import directed, flush, from_bf16, join, rounding, to_bf16, to_tf32
from ..ir import Instr, Sink, Vec
from ..memory import LOCAL_BASE, SHARED_BASE
from ..types import DTYPE, UINT, is_float, size_of
from .registry import op, unsupported_instr

_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _same(x):
    return x


@op("mov")
def mov(b: Binder, ins: Instr, pc: int) -> Step:
    """``mov``: copy, pack ``d = {a, b, ...}`` or unpack ``{a, b, ...} = s``."""
    ty = ins.mods[-1]
    d, s = ins.args
    if isinstance(d, Vec):
        return _unpack(b, ins, d, s, ty)
    if isinstance(s, Vec):
        return _pack(b, ins, d, s, ty)
    return b.alu(ins, d, ty, _same, b.value(s, ty))


def _pack(b: Binder, ins: Instr, d, s: Vec, ty: str) -> Step:
    part = size_of(ty) // len(s.items)
    dtype = UINT[size_of(ty)]

    def f(*parts):
        r = np.asarray(parts[0]).astype(dtype)
        for k, p in enumerate(parts[1:], 1):
            r = r | (np.asarray(p).astype(dtype) << dtype(8 * part * k))
        return r

    return b.alu(ins, d, f"b{8 * size_of(ty)}", f, *[b.value(i, f"b{8 * part}") for i in s.items])


def _unpack(b: Binder, ins: Instr, d: Vec, s, ty: str) -> Step:
    part = size_of(ty) // len(d.items)
    whole = b.value(s, f"b{8 * size_of(ty)}")
    steps = []
    for k, item in enumerate(d.items):
        if isinstance(item, Sink):
            continue
        piece: np.ndarray | np.unsignedinteger
        if isinstance(whole, np.ndarray):
            piece = whole.view(UINT[part])[k :: len(d.items)]
        else:
            piece = UINT[part](int(whole) >> (8 * part * k) & ((1 << 8 * part) - 1))
        steps.append(b.alu(ins, item, f"b{8 * part}", _same, piece))

    def step(g):
        for f in steps:
            f(g)

    return step


def _to_int(x: np.ndarray, dt: str) -> np.ndarray:
    """Integral floats to an integer type: clamp, NaN to 0."""
    info = np.iinfo(DTYPE[dt])
    if size_of(dt) == 8:
        limit = 2.0 ** (63 if dt[0] == "s" else 64)
        inside = np.where(x < limit, x, 0).astype(np.float64)
        inside = np.where(inside >= info.min, inside, 0)
        r: np.ndarray = inside.astype(DTYPE[dt])
        r = np.where(x >= limit, DTYPE[dt](info.max), r)
        return np.where(x < info.min, DTYPE[dt](info.min), r)
    wide = np.clip(np.asarray(x).astype(np.float64), info.min, info.max)
    return np.where(np.isnan(wide), 0, wide).astype(np.int64).astype(DTYPE[dt])


def _from_float(st: str, dt: str, ins: Instr) -> Callable:
    mode = rounding(ins.mods)
    integral = next((_INTEGRAL[m] for m in ins.mods if m in _INTEGRAL), None)
    widen: Callable = (
        from_bf16
        if st == "bf16"
        else (lambda x: np.asarray(x, np.uint32).view(np.float32))
        if st == "tf32"
        else np.asarray
    )

    def f(x):
        x = widen(x)
        if "ftz" in ins.mods and x.dtype == np.float32:
            x = flush(x)
        if integral is not None:
            x = integral(x)
        if not is_float(dt):
            return _to_int(x, dt)
        if ins.has("sat"):
            x = np.fmin(np.fmax(x, x.dtype.type(0)), x.dtype.type(1))
        if ins.has("relu"):
            x = np.maximum(x, x.dtype.type(0))
        return narrow(x, dt, mode, ins.has("satfinite"))

    return f


def narrow(x: np.ndarray, dt: str, mode: str, satfinite: bool = False) -> np.ndarray:
    """Floats to carriers of float type ``dt``."""
    if satfinite:
        limit = {"f16": 65504.0, "bf16": 3.3895313892515355e38, "tf32": 3.4011621342146535e38}[dt]
        x = np.where(np.isnan(x), x, np.clip(x, -limit, limit)).astype(x.dtype)
    if dt == "bf16":
        return to_bf16(x, mode)
    if dt == "tf32":
        return to_tf32(x, mode)
    dtype = DTYPE[dt]
    return x.astype(dtype) if mode == "rn" else directed(x, dtype, mode)


def _from_int(st: str, dt: str, ins: Instr) -> Callable:
    dtype = DTYPE[dt]
    if not is_float(dt):
        if ins.has("sat"):
            lo, hi = np.iinfo(dtype).min, np.iinfo(dtype).max
            slo, shi = np.iinfo(DTYPE[st]).min, np.iinfo(DTYPE[st]).max
            return lambda x: np.clip(x, max(lo, slo), min(hi, shi)).astype(dtype)
        return lambda x: np.asarray(x).astype(dtype)
    mode = rounding(ins.mods)
    if dt in ("f32", "f64") and mode == "rn":
        return lambda x: np.asarray(x).astype(dtype)
    return lambda x: narrow(np.asarray(x).astype(np.float64), dt, mode)


@op("cvt")
def cvt(b: Binder, ins: Instr, pc: int) -> Step:
    """``cvt`` among integers, f16, bf16, tf32, f32, f64; ``cvt.f16x2/bf16x2.f32 d, high, low``."""
    if ins.has("pack"):
        return _cvt_pack(b, ins)
    dt, st = ins.mods[-2:]
    if dt not in DTYPE or st not in DTYPE:
        raise unsupported_instr(ins)
    if dt in ("f16x2", "bf16x2"):
        one = _from_float(st, dt[:-2], ins)

        def two(high, low):
            h, lo = np.broadcast_arrays(one(high), one(low))
            return join(np.stack([np.asarray(lo).view(np.uint16), np.asarray(h).view(np.uint16)], -1))

        return b.alu(ins, ins.args[0], dt, two, b.value(ins.args[1], st), b.value(ins.args[2], st))
    f = _from_float(st, dt, ins) if is_float(st) else _from_int(st, dt, ins)
    return b.alu(ins, ins.args[0], dt, f, b.value(ins.args[1], st))


def _cvt_pack(b: Binder, ins: Instr) -> Step:
    """``cvt.pack.sat.convertType.s32{.b32} d, a, b{, c}``."""
    kinds = [m for m in ins.mods if m in ("s8", "u8", "s16", "u16")]
    if not kinds:
        raise unsupported_instr(ins)
    info, bits = np.iinfo(DTYPE[kinds[0]]), 8 * size_of(kinds[0])

    def f(x, y, *rest):
        field = [
            np.clip(v, info.min, info.max).astype(np.int64).astype(np.uint32) & np.uint32((1 << bits) - 1)
            for v in (x, y)
        ]
        r = (field[0] << np.uint32(bits)) | field[1]
        return r | (rest[0] << np.uint32(2 * bits)) if rest else r

    return b.alu(
        ins,
        ins.args[0],
        "b32",
        f,
        b.value(ins.args[1], "s32"),
        b.value(ins.args[2], "s32"),
        *[b.value(a, "b32") for a in ins.args[3:]],
    )


@op("cvta")
def cvta(b: Binder, ins: Instr, pc: int) -> Step:
    """``cvta``: between a state space and generic addresses."""
    ty = ins.mods[-1]
    base = SHARED_BASE if ins.has("shared", "shared:cta") else LOCAL_BASE if ins.has("local") else 0
    dtype = DTYPE[ty]
    if base and size_of(ty) != 8:
        raise unsupported_instr(ins)
    offset = dtype((-base if ins.has("to") else base) & 0xFFFFFFFFFFFFFFFF) if base else dtype(0)
    return b.alu(ins, ins.args[0], ty, lambda x: x + offset, b.value(ins.args[1], ty))


@op("isspacep")
def isspacep(b: Binder, ins: Instr, pc: int) -> Step:
    """``isspacep``: does a generic address lie in the window of a state space?"""
    space = ins.mods[0].split(":")[0]
    test = {"shared": lambda a: (a >= SHARED_BASE) & (a < LOCAL_BASE), "local": lambda a: a >= LOCAL_BASE}.get(
        space, lambda a: a < SHARED_BASE
    )
    return b.alu(ins, ins.args[0], "pred", test, b.value(ins.args[1], "u64"))
