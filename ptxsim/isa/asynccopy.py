"""``cp.async``: copies that become visible only when waited for.

At issue the target is filled with 0xFF bytes; the data arrives at the ``wait_group``/``wait_all`` of the issuing thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..access import observe, resolver
from ..bind import Binder, Step
from ..ir import Imm, Instr
from ..lanes import Lanes
from ..memory import POISON, WindowArena
from ..types import UINT
from .registry import op, unsupported_instr


@dataclass
class Copy:
    """Pending copies of one executed ``cp.async``.

    threads int64[n]; group int64[n] commit group; target int64[n] byte offset in shared memory; data uint8[n, size]
    """

    threads: np.ndarray
    group: np.ndarray
    target: np.ndarray
    data: np.ndarray

    def part(self, sel: np.ndarray) -> Copy:
        """The selected threads' copies."""
        return Copy(self.threads[sel], self.group[sel], self.target[sel], self.data[sel])


@op("cp")
def cp(b: Binder, ins: Instr, pc: int) -> Step:
    """The non-bulk ``cp.async`` family."""
    if ins.has("bulk", "reduce", "mbarrier") or not ins.has("async"):
        raise unsupported_instr(ins)
    m = b.m
    if ins.has("commit_group"):

        def commit(g):
            m.async_groups[g.ix] += 1

        return commit
    if ins.has("wait_all"):
        return lambda g: complete(m, g, None)
    if ins.has("wait_group"):
        keep = ins.immediate(0)
        return lambda g: complete(m, g, keep)
    return _issue(b, ins, pc)


def _issue(b: Binder, ins: Instr, pc: int) -> Step:
    m = b.m
    size = ins.immediate(2)
    to, source = b.addresses(ins.memory(0)), b.addresses(ins.memory(1))
    into = resolver(b, ins, "shared", size, True)
    origin = resolver(b, ins, "global", size, False)
    length, ignore = None, None
    if len(ins.args) > 3:
        if isinstance(ins.args[3], Imm) or b.prog.regs.get(getattr(ins.args[3], "name", "")) != "pred":
            length = b.reader(ins.args[3], "u32")
        else:
            ignore = b.predicate(ins.args[3])
    unit = UINT[min(size, 8)]
    step_bytes = np.dtype(unit).itemsize
    lanes = size // step_bytes

    def step(g: Lanes) -> None:
        ((arena, target, _),) = into(g, to(g))
        assert isinstance(arena, WindowArena)
        if m.stats is not None:
            m.stats.on_shared(pc, g, target - g.pick(arena.base), size)
        wanted = np.full(g.n, size, np.int64) if length is None else length(g).astype(np.int64)
        if ignore is not None:
            wanted[g.pick(np.broadcast_to(ignore(), (m.N,)))] = 0
        data = np.zeros((g.n, size), np.uint8)
        reads = wanted > 0
        if reads.any():
            sub = g
            if not reads.all():
                mask = np.zeros(m.N, np.bool_)
                mask[g.ix[reads]] = True
                sub = Lanes(mask, m.live_count)
            position = np.zeros(m.N, np.int64)
            position[g.ix] = np.arange(g.n)
            for region, off, part in origin(sub, source(sub)):
                if m.checker is not None:
                    m.checker.read(m, region, off, size, part.ix, ins)
                if m.stats is not None:
                    observe(m, ins, pc, region, off, part, size, False)
                rows = np.ascontiguousarray(region.view(step_bytes, lanes).take(off // size, axis=0)).reshape(
                    part.n, -1
                )
                data[position[part.ix]] = rows.view(np.uint8)
            if (wanted < size).any():
                data[np.arange(size) >= wanted[:, None]] = 0
        if m.checker is not None:
            m.checker.issue_async(m, arena, target, size, g.ix, ins)
        arena.view(step_bytes, lanes)[target // size] = unit(int.from_bytes(bytes([POISON] * step_bytes), "little"))
        m.async_pending.append(Copy(g.ix, m.async_groups[g.ix], target, data))

    return step


def complete(m, g: Lanes, keep: int | None) -> None:
    """Deliver the active threads' copies: all of them, or all but those of the ``keep`` latest commit groups."""
    rest = []
    for copy in m.async_pending:
        done = g.mask[copy.threads]
        if keep is not None:
            done &= copy.group < m.async_groups[copy.threads] - keep
        if not done.any():
            rest.append(copy)
            continue
        now = copy if done.all() else copy.part(done)
        if now is not copy:
            rest.append(copy.part(~done))
        size = now.data.shape[1]
        view = m.shared.view(min(size, 8), size // min(size, 8))
        view[now.target // size] = now.data.view(UINT[min(size, 8)]).reshape((-1,) + view.shape[1:])
        if m.checker is not None:
            m.checker.land_async(m, m.shared, now.target, size, now.threads)
    m.async_pending[:] = rest
