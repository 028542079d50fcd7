"""Tensor-core instructions: mma, ldmatrix, stmatrix, wmma.

``mma`` uses the fragment layouts of the PTX ISA.  ``wmma`` fragments are opaque there; this implementation spreads a
matrix row by row over the lanes (repeating it if the fragment has room for more elements than the matrix).
Products are exact and accumulated in float32 (hardware differs in the last bits); s8/u8 accumulate exactly.
"""

from __future__ import annotations

import functools
import re

import numpy as np

from ..access import observe, resolver, space_of
from ..bind import Binder, Step, items
from ..floats import from_bf16
from ..ir import Instr, Operand
from ..lanes import Lanes
from ..types import UINT, size_of
from .registry import op, unsupported_instr

_LANES = np.arange(32)


def shape_of(ins: Instr) -> tuple[int, int, int]:
    """(M, N, K) of an instruction."""
    for mod in ins.mods:
        if found := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", mod):
            return int(found[1]), int(found[2]), int(found[3])
    raise unsupported_instr(ins)


def decode(raw: np.ndarray, ty: str) -> np.ndarray:
    """Register words uint32[...] to float32 elements [..., per word], low part first."""
    if ty == "f16":
        return raw.reshape(raw.shape + (1,)).view(np.float16).astype(np.float32)
    if ty == "bf16":
        return from_bf16(raw.reshape(raw.shape + (1,)).view(np.uint16))
    if ty == "tf32":
        return (raw & np.uint32(0xFFFFE000)).view(np.float32)[..., None]
    if ty in ("s8", "u8"):
        return raw.reshape(raw.shape + (1,)).view(np.int8 if ty == "s8" else np.uint8).astype(np.float32)
    raise ValueError(ty)


@functools.cache
def fragment(kind: str, per_word: int, words: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column, int[words, 32, per_word], of the elements of an ``mma`` fragment of kind a, b or c.

    Group g = lane / 4 and thread t = lane % 4: an a/b word holds ``per_word`` consecutive k of row (column) g; words go
    first over the two halves of the 16 rows (a only), then over k.
    """
    w, lane, e = np.meshgrid(np.arange(words), _LANES, np.arange(per_word), indexing="ij")
    g, t = lane >> 2, lane & 3
    if kind == "a":
        return g + 8 * (w & 1), t * per_word + e + 4 * per_word * (w >> 1)
    if kind == "b":
        return t * per_word + e + 4 * per_word * w, g
    return g + 8 * (w * per_word >> 1), t * 2 + (w * per_word + e) % 2


def gather(b: Binder, o: Operand) -> tuple[np.ndarray, ...]:
    """Arrays uint32[N] of the words of a fragment operand."""
    return tuple(b.all_lanes(i, "b32") for i in items(o))


def _words(arrays: tuple[np.ndarray, ...], g: Lanes) -> np.ndarray:
    """uint32[active warps, words, 32] of the (fully active) warps of ``g``."""
    raw = np.stack([a.reshape(-1, 32) for a in arrays], axis=1)
    return raw if g.full else raw[g.active != 0]


@op("mma")
def mma(b: Binder, ins: Instr, pc: int) -> Step:
    """``mma.sync.aligned.mMnNkK.row.col.dtype.atype.btype.ctype d, a, b, c``."""
    m, n, k = shape_of(ins)
    if (m, n, k) == (8, 8, 4) and ins.mods[-1] == "f64":
        return _mma_f64(b, ins)
    types = [t for t in ins.mods if t in ("f16", "bf16", "tf32", "f32", "s8", "u8", "s32")]
    if (
        (m, n) != (16, 8)
        or len(types) != 4
        or ins.has("sp", "m8n8k4")
        or types[1] not in ("f16", "bf16", "tf32", "s8", "u8")
    ):
        raise unsupported_instr(ins)
    dt, at, bt, ct = types
    d, a, bb, c = ins.args
    ra, rb = gather(b, a), gather(b, bb)
    per_word = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4}[at]
    if len(ra) * 32 * per_word != m * k or len(rb) * 32 * per_word != n * k:
        raise unsupported_instr(ins)
    fa, fb = fragment("a", per_word, len(ra)), fragment("b", per_word, len(rb))
    rc = tuple(b.all_lanes(i, "b32") for i in items(c))
    outs = [b.writer(i, "b32") for i in items(d)]
    fc = fragment("c", 2 if ct == "f16" else 1, len(rc))
    fd = fragment("c", 2 if dt == "f16" else 1, len(outs))

    def step(g: Lanes) -> None:
        wa, wb, wc = _words(ra, g), _words(rb, g), _words(rc, g)
        warps = len(wa)
        A, B = np.empty((warps, m, k), np.float32), np.empty((warps, k, n), np.float32)
        A[:, fa[0], fa[1]] = decode(wa, at)
        B[:, fb[0], fb[1]] = decode(wb, bt)
        product = A @ B
        if dt == "s32":
            total = product[:, fd[0], fd[1]].astype(np.int64) + wc.view(np.int32)[..., None]
            if ins.has("satfinite"):
                total = np.clip(total, -(2**31), 2**31 - 1)
            words = total.astype(np.int32)[..., 0].view(np.uint32)
        else:
            C = np.empty((warps, m, n), np.float32)
            C[:, fc[0], fc[1]] = wc.view(np.float32)[..., None] if ct == "f32" else decode(wc, "f16")
            words = _encode((product + C)[:, fd[0], fd[1]], dt)
        for w, put in enumerate(outs):
            put(g, np.ascontiguousarray(words[:, w]).reshape(-1))

    return step


def _mma_f64(b: Binder, ins: Instr) -> Step:
    """``mma.m8n8k4`` in double precision: lane 4g + t holds A[g, t], B[t, g] and C[g, 2t : 2t + 2]."""
    a, bb, c0, c1 = (b.all_lanes(i, "f64") for o in ins.args[1:] for i in items(o))
    puts = [b.writer(i, "f64") for i in items(ins.args[0])]

    def step(g: Lanes) -> None:
        busy = g.active != 0
        A, Bt = a.reshape(-1, 8, 4)[busy], bb.reshape(-1, 8, 4)[busy]
        D = (A @ Bt.transpose(0, 2, 1)).reshape(-1, 32, 2)
        D += np.stack([c.reshape(-1, 32)[busy] for c in (c0, c1)], axis=2)
        for k, put in enumerate(puts):
            put(g, np.ascontiguousarray(D[:, :, k]).reshape(-1))

    return step


def _encode(x: np.ndarray, ty: str) -> np.ndarray:
    """float32 [..., per word] to register words uint32[...]."""
    x = np.ascontiguousarray(x if ty == "f32" else x.astype(np.float16))
    return x.view(np.uint32)[..., 0]


@op("ldmatrix")
def ldmatrix(b: Binder, ins: Instr, pc: int) -> Step:
    """``ldmatrix.sync.aligned.m8n8.x{1,2,4}{.trans}.shared.b16``: lane 8q + r gives the address of row r of matrix q."""
    if ins.mods[-1] != "b16" or not ins.has("m8n8"):
        raise unsupported_instr(ins)
    return _matrix(b, ins, pc, load=True)


@op("stmatrix")
def stmatrix(b: Binder, ins: Instr, pc: int) -> Step:
    """``stmatrix.sync.aligned.m8n8.x{1,2,4}{.trans}.shared.b16``."""
    if ins.mods[-1] != "b16" or not ins.has("m8n8"):
        raise unsupported_instr(ins)
    return _matrix(b, ins, pc, load=False)


def _matrix(b: Binder, ins: Instr, pc: int, load: bool) -> Step:
    m = b.m
    count = int(ins.pick(("x1", "x2", "x4"))[1])
    memory, registers = (ins.memory(1), ins.args[0]) if load else (ins.memory(0), ins.args[1])
    addresses, resolve = b.addresses(memory), resolver(b, ins, space_of(ins), 16, not load)
    puts = [b.writer(i, "b32") for i in items(registers)] if load else []
    sources = () if load else gather(b, registers)
    gives_row = m.lane < 8 * count
    trans = ins.has("trans")

    def step(g: Lanes) -> None:
        rows = g if count == 4 else Lanes(g.mask & gives_row, m.live_count)
        ((arena, off, _),) = resolve(rows, addresses(rows))
        if m.stats is not None:
            observe(m, ins, pc, arena, off, rows, 16, not load)
        view = arena.view(2, 8)
        if load:
            if m.checker is not None:
                m.checker.read(m, arena, off, 16, rows.ix, ins)
            tiles = view.take(off >> 4, axis=0).reshape(-1, count, 8, 8)
            tiles = tiles.transpose(0, 1, 3, 2) if trans else tiles
            words = np.ascontiguousarray(tiles).reshape(len(tiles), count, 32, 2).view(np.uint32)[..., 0]
            for q, put in enumerate(puts):
                put(g, np.ascontiguousarray(words[:, q]).reshape(-1))
            return
        stored = np.ascontiguousarray(_words(sources, g)).view(np.uint16).reshape(-1, 8, 8)
        stored = np.ascontiguousarray(stored.transpose(0, 2, 1)) if trans else stored
        data = stored.reshape(-1, 8)
        if m.checker is not None:
            differs = lambda: (view[off >> 4] != data).any(1)
            m.checker.write(m, arena, off, 16, rows.ix, ins, differs)
        view[off >> 4] = data
        if m.checker is not None:
            m.checker.wrote(m, arena, off, 16, rows.ix, ins, differs)

    return step


# -- wmma ----------------------------------------------------------------------------------------------------------------
def _slots(rows: int, cols: int, per_lane: int) -> np.ndarray:
    """int[32, per_lane]: flat row-major matrix index held by each fragment slot."""
    lanes = rows * cols // per_lane
    return (_LANES % lanes)[:, None] * per_lane + np.arange(per_lane)


def _per_word(ty: str) -> int:
    return {"f16": 2, "bf16": 2, "s8": 4, "u8": 4}.get(ty, 1)


@op("wmma")
def wmma(b: Binder, ins: Instr, pc: int) -> Step:
    """``wmma.load.{a,b,c}``, ``wmma.mma`` and ``wmma.store.d``."""
    if "mma" in ins.mods:
        return _wmma_mma(b, ins)
    return _wmma_memory(b, ins, pc)


def _wmma_memory(b: Binder, ins: Instr, pc: int) -> Step:
    m, ty = b.m, ins.mods[-1]
    load, which = ins.mods[0] == "load", ins.mods[1]
    mm, nn, kk = shape_of(ins)
    rows, cols = {"a": (mm, kk), "b": (kk, nn), "c": (mm, nn), "d": (mm, nn)}[which]
    memory, registers = (ins.memory(1), ins.args[0]) if load else (ins.memory(0), ins.args[1])
    regs = items(registers)
    esize, per_word = size_of("b32" if ty == "tf32" else ty), _per_word(ty)
    if ty in ("f64", "s4", "u4", "b1"):
        raise unsupported_instr(ins)
    addresses, resolve = b.addresses(memory), resolver(b, ins, space_of(ins), esize, not load)
    default = cols if ins.has("row") else rows
    stride = b.reader(ins.args[2], "u32") if len(ins.args) > 2 else lambda g: np.full(g.n, default, np.uint32)
    slot = _slots(rows, cols, len(regs) * per_word)
    r, c = slot // cols, slot % cols
    major, minor = (r, c) if ins.has("row") else (c, r)
    sources = () if load else gather(b, registers)
    puts = [b.writer(i, "b32") for i in regs] if load else []

    def step(g: Lanes) -> None:
        base = addresses(g).reshape(-1, 32)
        ld = stride(g).astype(np.int64).reshape(-1, 32)
        parts: np.ndarray = np.empty(0)
        if not load:
            parts = np.ascontiguousarray(_words(sources, g).transpose(0, 2, 1)).view(UINT[esize])
        data: np.ndarray = np.empty((len(base), 32, len(regs) * per_word), UINT[esize])
        for e in range(len(regs) * per_word):
            addr = np.ascontiguousarray(base + (major[:, e] * ld + minor[:, e]) * esize).reshape(-1)
            for arena, off, sub in resolve(g, addr):
                if m.stats is not None:
                    observe(m, ins, pc, arena, off, sub, esize, not load)
                view, index = arena.view(esize), off >> (esize.bit_length() - 1)
                if load:
                    if m.checker is not None:
                        m.checker.read(m, arena, off, esize, sub.ix, ins)
                    data[:, :, e] = view.take(index).reshape(-1, 32)
                    continue
                value = np.ascontiguousarray(parts[:, :, e]).reshape(-1)
                differs = lambda v=view, i=index, x=value: v[i] != x
                if m.checker is not None:
                    m.checker.write(m, arena, off, esize, sub.ix, ins, differs)
                view[index] = value
                if m.checker is not None:
                    m.checker.wrote(m, arena, off, esize, sub.ix, ins, differs)
        if load:
            packed = data.view(np.uint32)
            for w, put in enumerate(puts):
                put(g, np.ascontiguousarray(packed[:, :, w]).reshape(-1))

    return step


def _matrix_of(words: np.ndarray, ty: str, rows: int, cols: int) -> np.ndarray:
    """Fragment words [warps, words, 32] to float32 matrices [warps, rows, cols]."""
    x = words.transpose(0, 2, 1)
    x = np.ascontiguousarray(x)
    x = (
        x.view(np.float32)
        if ty == "f32"
        else x.view(np.int32).astype(np.float64)
        if ty == "s32"
        else decode(x, ty).reshape(len(x), 32, -1)
    )
    lanes = rows * cols // x.shape[2]
    return x[:, :lanes].reshape(len(x), rows, cols)


def _wmma_mma(b: Binder, ins: Instr) -> Step:
    mm, nn, kk = shape_of(ins)
    types = [t for t in ins.mods if t in ("f16", "bf16", "tf32", "f32", "s8", "u8", "s32", "f64")]
    if "f64" in types:
        raise unsupported_instr(ins)
    if len(types) == 2:  # f16 multiplicands are implied
        dt, ct, at = types[0], types[1], "f16"
    else:
        dt, at, ct = types[0], types[1], types[3]
    d, a, bb, c = ins.args
    ra, rb, rc = gather(b, a), gather(b, bb), gather(b, c)
    outs = [b.writer(i, "b32") for i in items(d)]
    per_lane = len(outs) * _per_word(dt)
    slot = _slots(mm, nn, per_lane)

    def step(g: Lanes) -> None:
        A, B = _matrix_of(_words(ra, g), at, mm, kk), _matrix_of(_words(rb, g), at, kk, nn)
        total = A @ B + _matrix_of(_words(rc, g), ct, mm, nn)
        flat = total.reshape(len(total), -1)[:, slot]
        if dt == "s32":
            limit = (-(2**31), 2**31 - 1)
            words = (
                (np.clip(flat, *limit) if ins.has("satfinite") else flat)
                .astype(np.int64)
                .astype(np.int32)
                .view(np.uint32)
            )
        else:
            words = np.ascontiguousarray(flat.astype(np.float32 if dt == "f32" else np.float16)).view(np.uint32)
        for w, put in enumerate(outs):
            put(g, np.ascontiguousarray(words[:, :, w]).reshape(-1))

    return step
