"""Atomics: atom and red on global, shared and generic addresses.

Lanes that hit the same address in one instruction are applied one after the other in lane order, so each gets the value
its predecessor left.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..access import memory_space, observe, resolver
from ..bind import Binder, Step, items
from ..floats import lift
from ..ir import Instr
from ..types import DTYPE, UINT, is_float, size_of
from .registry import op, unsupported_instr

_OPS = ("add", "min", "max", "exch", "cas", "and", "or", "xor", "inc", "dec")
_UFUNC = {
    "add": np.add,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _combine(name: str, ty: str) -> Callable:
    """New memory value from (old, operand{, second operand})."""
    if name in ("add", "min", "max") and is_float(ty):
        return lift(ty, _UFUNC[name])
    if name in _UFUNC:
        return _UFUNC[name]
    one = DTYPE[ty](1)
    others: dict[str, Callable] = {
        "exch": lambda old, x: x,
        "cas": lambda old, x, y: np.where(old == x, y, old),
        "inc": lambda old, x: np.where(old >= x, DTYPE[ty](0), old + one),
        "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - one),
    }
    return others[name]


@op("atom", "red")
def atom(b: Binder, ins: Instr, pc: int) -> Step:
    """``atom.op.type d, [a], b{, c}`` and ``red.op.type [a], b``."""
    m = b.m
    name = ins.pick(_OPS)
    ty = next((t for t in reversed(ins.mods) if t in DTYPE), None)
    if name is None or ty is None or ins.has("async"):
        raise unsupported_instr(ins)
    d = ins.args[0] if ins.op == "atom" else None
    place = 0 if d is None else 1
    a, rest = ins.memory(place), ins.args[place + 1 :]
    vector = len(items(rest[0]))
    esize = size_of(ty)
    space = memory_space(b, ins, a)
    addresses, resolve = b.addresses(a), resolver(b, ins, space, esize * vector, True)
    outs = [b.writer(o, ty) for o in items(d)] if d is not None else []
    operands = [[b.reader(o, ty) for o in items(r)] for r in rest]
    combine = _combine(name, ty)
    fast = not outs and name in _UFUNC and ty in ("f32", "f64", "s32", "u32", "s64", "u64", "b32", "b64")
    shift = esize.bit_length() - 1
    dtype = DTYPE[ty]

    def step(g):
        for arena, off, sub in resolve(g, addresses(g)):
            if m.stats is not None:
                observe(m, ins, pc, arena, off, sub, esize * vector, True)
            if m.checker is not None:
                m.checker.write(m, arena, off, esize * vector, sub.ix, ins, None, atomic=True)
                m.checker.wrote(m, arena, off, esize * vector, sub.ix, ins, None, atomic=True)
            for k in range(vector):
                index = (off >> shift) + k
                view = arena.view(esize).view(dtype)
                values = [v[k](sub) for v in operands]
                if fast:
                    _UFUNC[name].at(view, index, values[0])
                else:
                    old = _in_order(view, index, values, combine)
                    if outs:
                        outs[k](sub, old.view(UINT[esize]))

    return step


def _in_order(view: np.ndarray, index: np.ndarray, values: list[np.ndarray], combine: Callable) -> np.ndarray:
    """Apply ``combine`` with collisions in lane order; returns the value each lane found."""
    old = np.empty(len(index), view.dtype)
    order = np.argsort(index, kind="stable")
    s = index[order]
    start = np.flatnonzero(np.concatenate(([True], s[1:] != s[:-1])))
    length = np.diff(np.append(start, len(s)))
    rank = np.arange(len(s)) - np.repeat(start, length)
    by_rank = order[np.argsort(rank, kind="stable")]
    position = 0
    for count in np.bincount(rank):
        lanes = by_rank[position : position + count]
        position += count
        where = index[lanes]
        found = view[where]
        old[lanes] = found
        view[where] = combine(found, *[v[lanes] for v in values])
    return old
