"""Scheduling: which threads execute which instruction next.

Threads at the same instruction form a group; the group with the lowest program counter runs first, which reconverges
structured code.  Threads that wait (at a block barrier, or for their warp at a ``.sync`` instruction) are parked.  If a
group spins, the others get their turn.  With a random generator, warps are dealt into phases that run one after the other
from barrier to barrier, which exposes dependence on execution order.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from . import isa
from .errors import BarrierDivergence, BudgetExceeded, Deadlock, InactiveLane
from .ir import Instr
from .lanes import Lanes

if TYPE_CHECKING:
    from .machine import Machine

_PHASES = 4
_PATIENCE = 256


class Kind(IntEnum):
    """How the scheduler treats an instruction."""

    PLAIN = 0
    BRANCH = 1
    EXIT = 2
    BARRIER = 3
    SYNC = 4
    TABLE = 5


Groups = dict[int, np.ndarray]


class Scheduler:
    """Runs the threads of one batch to completion.

    Groups are bool[N] masks.  ``ready`` and ``waiting`` (for the rest of the warp) are keyed by phase * (code length + 1) +
    instruction, ``parked`` (at a block barrier) by instruction; ``arrived`` counts ``bar.arrive`` per barrier and block.
    """

    def __init__(self, machine: Machine, rng: np.random.Generator | None):
        self.m, self.rng = machine, rng
        self.span = len(machine.steps) + 1
        self.ready: Groups = {}
        self.waiting: Groups = {}
        self.parked: Groups = {}
        self.arrived: Groups = {}
        self.budget = machine.options.budget
        self.spins = 0
        self.turn = 0

    def run(self) -> None:
        """Run until every thread has exited; raises the faults of the kernel."""
        self._deal(0, self.m.live)
        while self.ready or self._release():
            self._run_group(self._pick())

    # -- groups ------------------------------------------------------------------------------------------------------
    def _pick(self) -> int:
        """Key of the group to run: the lowest, or each in turn if one is spinning."""
        if self.spins > _PATIENCE and len(self.ready) > 1:
            keys = sorted(self.ready)
            self.spins, self.turn = 0, self.turn + 1
            return keys[self.turn % len(keys)]
        return min(self.ready)

    def _deal(self, pc: int, mask: np.ndarray) -> None:
        """Make threads ready at ``pc``, split into random phases if there is a generator."""
        if self.rng is None:
            _push(self.ready, pc, mask)
            return
        phases = np.repeat(self.rng.integers(0, _PHASES, len(mask) // 32), 32)
        for k in range(_PHASES):
            part = mask & (phases == k)
            if part.any():
                _push(self.ready, k * self.span + pc, part)

    def _lanes(self, mask: np.ndarray) -> Lanes:
        return Lanes(mask, self.m.live_count)

    def _run_group(self, key: int) -> None:
        """Run one group until it ends, waits, or another group comes first."""
        m, ready = self.m, self.ready
        steps, kinds, predicates, stats = m.steps, m.kinds, m.predicates, m.stats
        plain, branch = Kind.PLAIN, Kind.BRANCH
        pc = key % self.span
        phase = key - pc
        g = self._lanes(ready.pop(key))
        while pc < len(steps):
            if ready and phase + pc in ready:
                g = self._lanes(g.mask | ready.pop(phase + pc))
            self.budget -= 1
            if self.budget < 0:
                m.fault(
                    BudgetExceeded,
                    m.prog.code[pc],
                    int(g.ix[0]),
                    f"instruction budget of {m.options.budget} exceeded (infinite loop?)",
                )
            kind, pred = kinds[pc], predicates[pc]
            active: Lanes | None = g
            if pred is not None:
                mask = g.mask & ~pred[0] if pred[1] else g.mask & pred[0]
                taken = int(np.count_nonzero(mask))
                if taken != g.n:
                    active = self._lanes(mask) if taken else None
            if stats is not None and (active is not None or kind is branch):
                issued = g if kind is branch or active is None else active
                stats.warp_execs[pc] += issued.warps
                stats.lane_execs[pc] += issued.n
            if active is None:
                pc += 1
            elif kind is plain:
                steps[pc](active)
                pc += 1
            elif kind is branch:
                pc = self._branch(pc, phase, g, active)
                if pc < 0:
                    return
            else:
                rest = self._control(kind, pc, phase, g, active)
                if rest is None:
                    return
                g = rest
                pc += 1
        self._exit(g)

    def _branch(self, pc: int, phase: int, g: Lanes, active: Lanes) -> int:
        """Next instruction of the group, or -1 if it was split or must let another group run."""
        target = self.m.prog.code[pc].targets[0]
        if target <= pc:
            self.spins = self.spins + 1 if self.ready else 0
        if active is not g:
            _push(self.ready, phase + pc + 1, g.mask & ~active.mask)
            _push(self.ready, phase + target, active.mask)
            return -1
        if self.ready and (self.spins > _PATIENCE or min(self.ready) < phase + target):
            _push(self.ready, phase + target, g.mask)
            return -1
        return target

    def _control(self, kind: Kind, pc: int, phase: int, g: Lanes, active: Lanes) -> Lanes | None:
        """Execute an instruction that may hold threads; returns those that go on to the next one."""
        if kind == Kind.SYNC:
            return self._sync(pc, phase, g, active)
        if kind == Kind.BARRIER:
            if self.m.stats is not None:
                self.m.stats.barriers += active.warps
            if self.m.prog.code[pc].has("arrive"):
                self._arrive(pc, active)
                return g
            _push(self.parked, pc, active.mask)
        elif kind == Kind.EXIT:
            self._exit(active)
        else:
            index, targets = self.m.tables[pc], self.m.prog.code[pc].targets
            for k, target in enumerate(targets):
                mask = active.mask & (index == k)
                if mask.any():
                    _push(self.ready, phase + target, mask)
        return None if active is g else self._lanes(g.mask & ~active.mask)

    def _exit(self, g: Lanes) -> None:
        self.m.live = self.m.live & ~g.mask
        self.m.live_count -= g.n

    # -- warp convergence ----------------------------------------------------------------------------------------------
    def _sync(self, pc: int, phase: int, g: Lanes, active: Lanes) -> Lanes | None:
        """Execute a warp-synchronous instruction for the warps that are complete; the others wait for their lanes."""
        held = self.waiting.pop(phase + pc, None)
        arrivals = active if held is None else self._lanes(active.mask | held)
        together = self._converged(self.m.prog.code[pc], arrivals)
        if together is arrivals.mask:
            self.m.steps[pc](arrivals)
            if held is None:
                return g
        else:
            self.waiting[phase + pc] = arrivals.mask & ~together
            if together.any():
                self.m.steps[pc](self._lanes(together))
        rest = (g.mask & ~active.mask) | together
        return self._lanes(rest) if rest.any() else None

    def _converged(self, ins: Instr, g: Lanes) -> np.ndarray:
        """bool[N]: arrived threads whose warp partners, named by the member mask, have all arrived (``g.mask`` if all)."""
        m = self.m
        mask = isa.member_mask(m.binder, ins)
        if g.full and isinstance(mask, np.uint32) and mask == 0xFFFFFFFF:
            return g.mask
        members = np.where(g.mask, mask, np.uint32(0))
        required = np.bitwise_or.reduce(members.reshape(-1, 32), axis=1)
        busy = g.active != 0
        live, born = (np.packbits(x, bitorder="little").view(np.uint32) for x in (m.live, m.born))
        if m.checker is not None and m.checker.checks.warp_masks:
            gone = busy & (required & born & ~live != 0)
            if gone.any():
                w = int(np.argmax(gone))
                m.fault(
                    InactiveLane,
                    ins,
                    int(g.ix[np.searchsorted(g.ix, w * 32)]),
                    f"member mask {int(required[w]):#010x} names lanes that have exited "
                    f"({int(required[w] & born[w] & ~live[w]):#010x})",
                )
            outside = g.mask & ((members >> m.lane) & 1 == 0)
            if outside.any():
                t = int(np.argmax(outside))
                m.fault(
                    InactiveLane, ins, t, f"executing lane {t % 32} is not in its member mask {int(members[t]):#010x}"
                )
        missing = busy & (required & live & ~g.active != 0)
        return g.mask & ~np.repeat(missing, 32) if missing.any() else g.mask

    # -- block barriers ------------------------------------------------------------------------------------------------
    def _per_block(self, mask: np.ndarray) -> np.ndarray:
        """int64[blocks]: number of threads of ``mask`` in each block."""
        return mask.reshape(self.m.nb, -1).sum(1)

    def _arrive(self, pc: int, g: Lanes) -> None:
        ident = int(self.m.barriers[pc].ident[g.ix[0]])
        self.arrived[ident] = self.arrived.get(ident, 0) + self._per_block(g.mask)

    def _release(self) -> bool:
        """Open every barrier that is complete.  False if no thread is left; raises if none can proceed."""
        if not self.parked and not self.waiting:
            return False
        by_ident: dict[int, list[int]] = {}
        for pc, mask in self.parked.items():
            ident = self.m.barriers[pc].ident[mask]
            if ident.min() != ident.max():
                raise isa.unsupported("bar.sync with a barrier number that differs between threads of a group")
            by_ident.setdefault(int(ident[0]), []).append(pc)
        opened = [self._open(ident, pcs) for ident, pcs in by_ident.items()]
        if not any(opened):
            self._stuck()
        return True

    def _open(self, ident: int, pcs: list[int]) -> bool:
        """Release the blocks for which barrier ``ident``, where threads wait at ``pcs``, is complete."""
        m = self.m
        there = [self._per_block(self.parked[pc]) for pc in pcs]
        waiting = np.sum(there, axis=0)
        counts = m.barriers[pcs[0]].count
        if counts is None:
            done = (waiting > 0) & (waiting == self._per_block(m.live))
        else:
            done = (waiting > 0) & (waiting + self.arrived.get(ident, 0) >= int(counts[np.argmax(self.parked[pcs[0]])]))
        if not done.any():
            return False
        if counts is None:
            split = done & (np.sum([n > 0 for n in there], axis=0) > 1)
            if split.any():
                self._diverged(pcs, int(np.argmax(split)))
        if ident in self.arrived:
            self.arrived[ident] = np.where(done, 0, self.arrived[ident])
        opened = np.repeat(done, m.padded)
        released = np.logical_or.reduce([self.parked[pc] for pc in pcs]) & opened
        m.clock += 1
        m.block_time[released] = m.warp_time[released] = m.clock
        for pc in pcs:
            mask = self.parked.pop(pc)
            if (mask & ~opened).any():
                self.parked[pc] = mask & ~opened
            if (mask & opened).any():
                self._reduce(pc, mask & opened)
                self._deal(pc + 1, mask & opened)
        return True

    def _reduce(self, pc: int, out: np.ndarray) -> None:
        """Result of ``bar.red`` for the released threads."""
        bar = self.m.barriers[pc]
        if bar.write is None or bar.pred is None:
            return
        hits = self._per_block(np.broadcast_to(bar.pred(), out.shape) & out)
        mods = self.m.prog.code[pc].mods
        all_of = hits == self._per_block(out)
        value = hits.astype(np.uint32) if "popc" in mods else all_of if "and" in mods else hits > 0
        g = self._lanes(out)
        bar.write(g, g.pick(np.repeat(value, self.m.padded)))

    # -- dead ends -----------------------------------------------------------------------------------------------------
    def _stuck(self) -> None:
        """Nothing can run: say why."""
        code = self.m.prog.code
        for key, mask in self.waiting.items():
            self.m.fault(
                InactiveLane,
                code[key % self.span],
                int(np.argmax(mask)),
                "warp-synchronous instruction waits for lanes of its member mask that never arrive",
            )
        pcs = sorted(self.parked)
        present = np.stack([self._per_block(self.parked[pc]) > 0 for pc in pcs])
        split = present.sum(0) > 1
        if split.any():
            block = int(np.argmax(split))
            self._diverged([pc for pc, hit in zip(pcs, present[:, block], strict=True) if hit], block)
        t = int(np.argmax(self.parked[pcs[0]]))
        block = t // self.m.padded
        self.m.fault(
            Deadlock,
            code[pcs[0]],
            t,
            f"barrier never completes: {self._per_block(self.parked[pcs[0]])[block]} of "
            f"{self._per_block(self.m.live)[block]} live threads of the block have arrived",
        )

    def _diverged(self, pcs: list[int], block: int) -> None:
        code = self.m.prog.code
        places = ", ".join(f"PTX line {code[pc].line}" + (f" ({code[pc].loc})" if code[pc].loc else "") for pc in pcs)
        here = self.parked[pcs[0]].reshape(self.m.nb, -1)[block]
        self.m.fault(
            BarrierDivergence,
            code[pcs[0]],
            block * self.m.padded + int(np.argmax(here)),
            f"threads of one block wait at different barriers: {places}",
        )


def _push(groups: Groups, key: int, mask: np.ndarray) -> None:
    groups[key] = groups[key] | mask if key in groups else mask
