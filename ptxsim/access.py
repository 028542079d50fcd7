"""From addresses to memory: picks the arena of each access and checks bounds and alignment."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .bind import Binder
from .errors import Misaligned, OutOfBounds
from .ir import Instr, Mem, Sym
from .lanes import Lanes
from .memory import LOCAL_BASE, SHARED_BASE, Region, WindowArena
from .types import SPACES, size_of

#: arena, byte offsets int64[n], and the n active threads they belong to.
Part = tuple[Region | WindowArena, np.ndarray, Lanes]
Resolver = Callable[[Lanes, np.ndarray], list[Part]]


def space_of(ins: Instr) -> str:
    """State space of a memory instruction: one of :data:`ptxsim.types.SPACES`, or ``generic``."""
    for m in ins.mods:
        base = m.split(":")[0]
        if base in SPACES:
            return base
    return "generic"


def granularity(code: list[Instr], space: str) -> int:
    """log2 of the smallest access to ``space`` that the code contains."""
    smallest = 16
    for ins in code:
        if ins.op in ("ld", "st", "ldu", "atom", "red", "wmma") and space_of(ins) in (space, "generic"):
            ty = ins.mods[-1]
            if ins.op == "wmma":
                smallest = min(smallest, 1)
            else:
                smallest = min(smallest, size_of(ty) if ins.mods[-1] != "noftz" else 2)
        elif ins.op == "ldmatrix" or ins.op == "stmatrix":
            smallest = min(smallest, 16)
        elif ins.op == "cp" and len(ins.args) > 2:
            smallest = min(smallest, 4)
    return smallest.bit_length() - 1


def resolver(b: Binder, ins: Instr, space: str, size: int, write: bool) -> Resolver:
    """Function (active threads, addresses int64[n]) -> parts, for accesses of ``size`` bytes (a power of two).

    Usually there is one part; accesses that spread over several buffers or windows are split.  Raises
    :class:`OutOfBounds` / :class:`Misaligned` through the machine.
    """
    m = b.m
    if space == "shared":
        return lambda g, addr: [_window(m, ins, m.shared, size, write, g, addr)]
    if space == "local":
        return lambda g, addr: [_window(m, ins, m.local, size, write, g, addr)]
    hint: list[Region | None] = [None]

    def resolve(g: Lanes, addr: np.ndarray) -> list[Part]:
        first = int(addr[0])
        r = hint[0]
        if r is None or not r.base <= first < r.end:
            r = hint[0] = m.memory.find(first)
        if r is not None and (r.writable or not write):
            off = addr - r.origin
            if (
                int(off.view(np.uint64).max()) <= r.skew + r.nbytes - size
                and (r.skew == 0 or int(off.min()) >= r.skew)
                and int(np.bitwise_or.reduce(addr)) & (size - 1) == 0
            ):
                return [(r, off, g)]
        return _split(m, ins, space, size, write, g, addr)

    return resolve


def _window(m, ins: Instr, arena: WindowArena, size: int, write: bool, g: Lanes, addr: np.ndarray) -> Part:
    """Shared or local access: every thread within its own window."""
    if int(addr.view(np.uint64).max()) > arena.limit - size:
        bad = (addr < 0) | (addr > arena.limit - size)
        i = int(np.argmax(bad))
        m.fault(
            OutOfBounds,
            ins,
            int(g.ix[i]),
            f"{size}-byte {'write to' if write else 'read from'} {arena.space} memory out of "
            f"bounds: the {'block' if arena.space == 'shared' else 'thread'} has {arena.limit} bytes",
            address=f"{arena.space} + {int(addr[i])}",
        )
    _aligned(m, ins, size, write, g, addr, arena.space)
    return arena, g.pick(arena.base) + addr, g


def _aligned(m, ins: Instr, size: int, write: bool, g: Lanes, addr: np.ndarray, space: str) -> None:
    if int(np.bitwise_or.reduce(addr)) & (size - 1):
        i = int(np.argmax(addr & (size - 1) != 0))
        where = m.memory.find(int(addr[i])) if space == "global" else None
        m.fault(
            Misaligned,
            ins,
            int(g.ix[i]),
            f"misaligned {size}-byte {'write' if write else 'read'}",
            address=f"{int(addr[i]):#x}" + (f" = {where.name} + {int(addr[i]) - where.base} bytes" if where else ""),
        )


def _split(m, ins: Instr, space: str, size: int, write: bool, g: Lanes, addr: np.ndarray) -> list[Part]:
    """Per-thread resolution of global and generic addresses."""
    out: list[Part] = []
    todo = np.ones(len(addr), np.bool_)
    if space == "generic":
        for arena, low, high in ((m.local, LOCAL_BASE, LOCAL_BASE << 1), (m.shared, SHARED_BASE, LOCAL_BASE)):
            hit = (addr >= low) & (addr < high)
            if hit.any():
                out.append(_window(m, ins, arena, size, write, _subset(m, g, hit), addr[hit] - low))
                todo &= ~hit
    if not todo.any():
        return out
    rest = addr[todo]
    lanes = g if todo.all() else _subset(m, g, todo)
    index = np.searchsorted(np.array(m.memory.starts, np.int64), rest, side="right") - 1
    ends = np.array([r.end for r in m.memory.regions], np.int64)
    bad = (index < 0) | (rest + size > ends[np.maximum(index, 0)]) if len(ends) else np.ones(len(rest), np.bool_)
    if bad.any():
        i = int(np.argmax(bad))
        address = int(rest[i])
        m.fault(
            OutOfBounds,
            ins,
            int(lanes.ix[i]),
            f"{size}-byte {'write' if write else 'read'} out of bounds: {m.memory.nearest(address)}"
            if m.memory.find(address) is None
            else f"{size}-byte {'write' if write else 'read'} crosses the end of {m.memory.find(address).name}",
            address=f"{address:#x}",
        )
    _aligned(m, ins, size, write, lanes, rest, "global")
    for k in np.unique(index):
        region = m.memory.regions[k]
        hit = index == k
        sub = lanes if hit.all() else _subset(m, lanes, hit)
        if write and not region.writable:
            m.fault(
                OutOfBounds, ins, int(sub.ix[0]), f"write to read-only {region.name}", address=f"{int(rest[hit][0]):#x}"
            )
        out.append((region, rest[hit] - region.origin, sub))
    return out


def _subset(m, g: Lanes, hit: np.ndarray) -> Lanes:
    """Those of the active threads for which ``hit`` [n] holds."""
    mask = np.zeros(len(g.mask), np.bool_)
    mask[g.ix[hit]] = True
    return Lanes(mask, m.live_count)


def memory_space(b: Binder, ins: Instr, a: Mem) -> str:
    """Where a memory operand really lives: call parameters are local, kernel parameters and constants global."""
    space = space_of(ins)
    if space == "param":
        return "local" if isinstance(a.base, Sym) and a.base.name in b.prog.call_params else "global"
    return "global" if space == "const" else space


def observe(
    m, ins: Instr, pc: int, arena: Region | WindowArena, off: np.ndarray, g: Lanes, size: int, write: bool
) -> None:
    """Count one request in the statistics."""
    if isinstance(arena, Region):
        if not ins.has("param", "const"):
            m.stats.on_global(pc, g, arena, off, size, write)
    elif arena.space == "shared":
        m.stats.on_shared(pc, g, off - g.pick(arena.base), size)
    elif not ins.has("param"):
        m.stats.on_local(pc, g, size)
