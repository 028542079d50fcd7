"""Warp-level exchange: shfl, vote, match, redux, elect, bar.warp.sync."""

from __future__ import annotations

import numpy as np

from ..bind import Binder, Step, both
from ..errors import InactiveLane
from ..ir import Instr, Reg, Sink
from ..types import DTYPE
from .registry import op, unsupported_instr


@op("bar", "barrier")
def warp_barrier(b: Binder, ins: Instr, pc: int) -> Step:
    """``bar.warp.sync``: orders shared-memory accesses within the warp."""
    if not ins.has("warp"):
        raise unsupported_instr(ins)
    return b.m.sync_warps


@op("shfl")
def shfl(b: Binder, ins: Instr, pc: int) -> Step:
    """``shfl.sync.mode.b32 d{|p}, a, b, c, mask``: p tells whether the source lane is in range."""
    m = b.m
    mode = ins.pick(("up", "down", "bfly", "idx"))
    d, p = both(ins.args[0])
    put, put_p = b.writer(d, "b32"), None if isinstance(p, Sink) else b.writer(p, "pred")
    source = b.all_lanes(ins.args[1], "b32")
    delta, clamp = b.value(ins.args[2], "u32"), b.value(ins.args[3], "u32")
    lane = m.lane.astype(np.int64)
    first = np.arange(m.N) - lane

    def target(delta, clamp):
        """Source lane and in-range flag of every thread."""
        shift, c = np.asarray(delta).astype(np.int64) & 31, np.asarray(clamp).astype(np.int64)
        segment = (c >> 8) & 31
        low, high = lane & segment, (lane & segment) | (c & 31 & ~segment)
        j = {"up": lane - shift, "down": lane + shift, "bfly": lane ^ shift, "idx": low | (shift & ~segment)}[mode]
        inside = j >= high if mode == "up" else j <= high
        return first + np.where(inside, j, lane), inside

    fixed = None
    if not isinstance(delta, np.ndarray) and not isinstance(clamp, np.ndarray):
        fixed = target(delta, clamp)
    strict = m.checker is not None and m.checker.checks.warp_masks

    def step(g):
        where, inside = fixed or target(delta, clamp)
        if strict and not g.full:
            stale = g.mask & ~g.mask[where] & inside
            if stale.any():
                t = int(np.argmax(stale))
                m.fault(
                    InactiveLane,
                    ins,
                    t,
                    f"lane {t % 32} reads from lane {int(where[t]) % 32}, which does not take part",
                )
        put(g, g.pick(source[where]))
        if put_p is not None:
            put_p(g, g.pick(inside))

    return step


def _per_warp(g, p) -> np.ndarray:
    """uint32[N/32]: bit mask of the active lanes whose predicate holds."""
    return np.packbits(np.logical_and(p, g.mask), bitorder="little").view(np.uint32)


@op("vote")
def vote(b: Binder, ins: Instr, pc: int) -> Step:
    """``vote.sync.{all,any,uni,ballot}``."""
    mode = ins.pick(("all", "any", "uni", "ballot"))
    pred = b.predicate(ins.args[1])
    put = b.writer(ins.args[0], "b32" if mode == "ballot" else "pred")

    def step(g):
        bits, active = _per_warp(g, pred()), g.active
        value = {
            "ballot": lambda: bits,
            "any": lambda: bits != 0,
            "all": lambda: bits == active,
            "uni": lambda: (bits == active) | (bits == 0),
        }[mode]()
        put(g, g.pick(np.repeat(value, 32)))

    return step


@op("match")
def match(b: Binder, ins: Instr, pc: int) -> Step:
    """``match.any.sync`` and ``match.all.sync d{|p}``."""
    ty = ins.mods[-1]
    d, p = both(ins.args[0])
    put, put_p = b.writer(d, "b32"), None if isinstance(p, Sink) else b.writer(p, "pred")
    source = b.all_lanes(ins.args[1], ty)
    weight = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def step(g):
        v, act = source.reshape(-1, 32), g.mask.reshape(-1, 32)
        same = (v[:, :, None] == v[:, None, :]) & act[:, None, :]
        bits = (same * weight).sum(2, dtype=np.uint32).reshape(-1)
        if ins.has("all"):
            equal = bits == np.repeat(g.active, 32)
            bits = np.where(equal, bits, np.uint32(0))
            if put_p is not None:
                put_p(g, g.pick(equal))
        put(g, g.pick(bits))

    return step


@op("redux")
def redux(b: Binder, ins: Instr, pc: int) -> Step:
    """``redux.sync.{add,min,max,and,or,xor}``."""
    ty = ins.mods[-1]
    name = ins.pick(("add", "min", "max", "and", "or", "xor"))
    ufunc = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name]
    dtype = np.dtype(DTYPE[ty])
    if dtype.kind == "f":
        neutral = dtype.type(np.inf if name == "min" else -np.inf)
        ufunc = np.fmin if name == "min" else np.fmax
    else:
        info = np.iinfo(DTYPE[ty])
        neutral = dtype.type(
            {"min": info.max, "max": info.min, "and": -1 if dtype.kind == "i" else info.max}.get(name, 0)
        )
    put, source = b.writer(ins.args[0], ty), b.all_lanes(ins.args[1], ty)

    def step(g):
        rows = np.where(g.mask, source, neutral).reshape(-1, 32)
        put(g, g.pick(np.repeat(ufunc.reduce(rows, axis=1, dtype=dtype), 32)))

    return step


@op("elect")
def elect(b: Binder, ins: Instr, pc: int) -> Step:
    """``elect.sync d|p, mask``: the lowest lane is the leader."""
    d, p = both(ins.args[0])
    put = b.writer(d, "b32") if isinstance(d, Reg) else None
    put_p = b.writer(p, "pred")

    def step(g):
        leader = np.repeat(np.log2((g.active & -g.active.astype(np.int64)) | (g.active == 0)).astype(np.uint32), 32)
        if put is not None:
            put(g, g.pick(leader))
        put_p(g, g.pick(leader == b.m.lane))

    return step
