"""Checking mode: initialisation, race and asynchronous-copy shadows.

Time is a counter that grows at every synchronisation.  A shadow keeps, per granule of memory, who wrote and who read it
last and when.  Thread ``u``'s access at time ``at`` is *ordered before* one by thread ``t`` if both are the same thread,
or ``at`` precedes the last barrier of their common block, or they share a warp and ``at`` precedes its last warp barrier.
For global memory it also is if both sides executed a fence (or an acquire/release atomic) since: the two threads if they
share a block, any threads of the two blocks otherwise.  That is generous: fences only hide races, they never report one.

A thread is coded as ``warp << 6 | lane``; lane 32 stands for "several lanes of this warp", code -1 for "several warps".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import AsyncNotReady, GlobalRace, SharedRace, Uninitialised
from .ir import Instr
from .memory import Region, WindowArena

if TYPE_CHECKING:
    from .machine import Machine

_SEVERAL_LANES = 32
_SEVERAL_WARPS = -1
UNSET, SET, PENDING = 0, 1, 2
#: modifiers of global accesses that are meant for communication between running threads: no data race in PTX's terms.
_STRONG = ("volatile", "relaxed", "acquire", "release", "acq_rel")


@dataclass(frozen=True)
class Checks:
    """Which checks run.  Bounds, alignment and barrier checks are always on."""

    uninitialised: bool = True
    shared_races: bool = True
    global_races: bool = True
    warp_masks: bool = True

    @classmethod
    def of(cls, value: bool | Checks) -> Checks:
        """``True``/``False`` stand for all/none."""
        return value if isinstance(value, Checks) else cls(value, value, value, value)

    def __bool__(self) -> bool:
        return self.uninitialised or self.shared_races or self.global_races or self.warp_masks


class Shadow:
    """Shadow state of one arena at ``1 << shift`` bytes per granule; which parts exist depends on the address space."""

    def __init__(self, space: str, nbytes: int, shift: int):
        n = (nbytes >> shift) + 1
        self.shift = shift
        self.state = np.zeros(0 if space == "global" else n, np.uint8)
        writes, others = (0 if space == "local" else n), (n if space == "shared" else 0)
        self.write_code = np.full(writes, _SEVERAL_WARPS, np.int64)
        self.write_time = np.full(writes, -1, np.int32)
        self.write_atomic = np.zeros(others, np.bool_)
        self.read_code = np.full(others, _SEVERAL_WARPS, np.int64)
        self.read_time = np.full(others, -1, np.int32)

    def reset(self) -> None:
        """Forget everything (new blocks in the same memory)."""
        self.write_time.fill(-1)
        self.read_time.fill(-1)
        self.state.fill(UNSET)


class Checker:
    """The checks of one launch; bound to the machine that currently runs."""

    def __init__(self, checks: Checks, shared_shift: int, global_shift: int, local_shift: int, blocks: int, warps: int):
        self.checks, self.shared_shift, self.global_shift = checks, shared_shift, global_shift
        self.local_shift = local_shift
        self._block_fence = np.full(blocks, -1, np.int32)
        self._thread_fence = np.full(blocks * warps * 64, -1, np.int32)

    def fence(self, m: Machine, t: np.ndarray) -> None:
        """Threads ``t`` execute a fence, or an atomic with acquire/release semantics."""
        m.clock += 1
        self._block_fence[m.block_of[t]] = m.clock
        self._thread_fence[m.global_code[t]] = m.clock

    # -- entry points used by the memory instructions ------------------------------------------------------------
    def read(self, m: Machine, arena, off: np.ndarray, size: int, t: np.ndarray, ins: Instr) -> None:
        """Before a plain load of ``size`` bytes at byte offsets ``off`` by threads ``t``."""
        if isinstance(arena, Region):
            if arena.uninit is not None and self.checks.uninitialised:
                self._uninit_global(m, arena, off, size, t, ins)
            if ins.has(*_STRONG):
                self._order(m, t, ins)
            elif arena.shadow is not None:
                for g in _granules(off, size, self.global_shift):
                    self._global_conflict(m, arena, g, t, ins, None)
            return
        shadow = arena.shadow
        for g in _granules(off, size, shadow.shift):
            self._state(m, arena, g, t, ins)
            if self.checks.shared_races and arena.space == "shared":
                hit = _conflict(m, shadow.write_code[g], shadow.write_time[g], t)
                if hit.any():
                    self._shared_race(m, arena, g, t, ins, hit, "reads what", shadow.write_code[g], "wrote")
                _record(m, shadow.read_code, shadow.read_time, g, t)

    def write(
        self,
        m: Machine,
        arena,
        off: np.ndarray,
        size: int,
        t: np.ndarray,
        ins: Instr,
        differs: Callable[[], np.ndarray] | None,
        atomic: bool = False,
    ) -> None:
        """Before a store.  ``differs()`` tells which threads change the memory (None: assume all)."""
        if isinstance(arena, Region):
            if arena.uninit is not None:
                _clear(arena.uninit, off, size)
            if ins.has(*_STRONG):
                self._order(m, t, ins)
            elif self.checks.global_races and not atomic:
                if arena.shadow is None:
                    arena.shadow = Shadow("global", len(arena.data), self.global_shift)
                for g in _granules(off, size, self.global_shift):
                    self._global_conflict(m, arena, g, t, ins, differs)
            return
        shadow = arena.shadow
        for g in _granules(off, size, shadow.shift):
            pending = shadow.state[g] == PENDING
            if pending.any():
                self._pending(m, arena, g, t, ins, pending)
            if atomic and self.checks.uninitialised:
                self._state(m, arena, g, t, ins)
            shadow.state[g] = SET
            if not self.checks.shared_races or arena.space != "shared":
                continue
            hit = _conflict(m, shadow.read_code[g], shadow.read_time[g], t)
            if hit.any():
                self._shared_race(m, arena, g, t, ins, hit, "writes what", shadow.read_code[g], "read")
            hit = _conflict(m, shadow.write_code[g], shadow.write_time[g], t)
            if hit.any():
                hit &= ~shadow.write_atomic[g] if atomic else True if differs is None else differs()
                if hit.any():
                    self._shared_race(m, arena, g, t, ins, hit, "writes what", shadow.write_code[g], "wrote")

    def wrote(
        self,
        m: Machine,
        arena,
        off: np.ndarray,
        size: int,
        t: np.ndarray,
        ins: Instr,
        lost: Callable[[], np.ndarray],
        atomic: bool = False,
    ) -> None:
        """After a store.  ``lost()`` tells which threads do not find their value back."""
        region, shadow = isinstance(arena, Region), arena.shadow
        if shadow is None or arena.space == "local":
            return
        if not (
            self.checks.global_races and not atomic and not ins.has(*_STRONG) if region else self.checks.shared_races
        ):
            return
        code = m.global_code[t] if region else m.code[t]
        for g in _granules(off, size, shadow.shift):
            if atomic:
                _record(m, shadow.write_code, shadow.write_time, g, t)
                shadow.write_atomic[g] = True
                continue
            shadow.write_code[g] = code
            shadow.write_time[g] = m.clock
            if not region:
                shadow.write_atomic[g] = False
            clash = shadow.write_code[g] != code
            if clash.any():
                clash &= lost()
                if clash.any():
                    i = int(np.argmax(clash))
                    kind = GlobalRace if region else SharedRace
                    m.fault(
                        kind,
                        ins,
                        int(t[i]),
                        f"{_name(m, shadow.write_code[g][i], region)} writes a different value "
                        f"to the same {arena.space} address in the same instruction",
                        arena,
                        int(g[i]) << shadow.shift,
                    )

    def issue_async(
        self, m: Machine, arena: WindowArena, off: np.ndarray, size: int, t: np.ndarray, ins: Instr
    ) -> None:
        """At ``cp.async``: the target counts as written, and as not readable until waited for."""
        self.write(m, arena, off, size, t, ins, None)
        shadow = arena.shadow
        assert shadow is not None
        for g in _granules(off, size, shadow.shift):
            shadow.state[g] = PENDING

    def land_async(self, m: Machine, arena: WindowArena, off: np.ndarray, size: int, t: np.ndarray) -> None:
        """At the wait: the data is there, written now by the thread that issued the copy."""
        shadow = arena.shadow
        assert shadow is not None
        for g in _granules(off, size, shadow.shift):
            shadow.state[g] = SET
            shadow.write_code[g] = m.code[t]
            shadow.write_time[g] = m.clock
            shadow.write_atomic[g] = False

    def _order(self, m: Machine, t: np.ndarray, ins: Instr) -> None:
        """Acquire loads, release stores and such atomics order like fences."""
        if ins.has("acquire", "release", "acq_rel"):
            self.fence(m, t)

    # -- details ---------------------------------------------------------------------------------------------------
    def _uninit_global(self, m, arena: Region, off, size, t, ins) -> None:
        assert arena.uninit is not None
        step = min(size, 8)
        for k in range(0, size, step):
            bad = arena.uninit.view(step).take((off + k) >> (step.bit_length() - 1)) != 0
            if bad.any():
                i = int(np.argmax(bad))
                m.fault(
                    Uninitialised,
                    ins,
                    int(t[i]),
                    f"reads uninitialised global memory of {arena.name}",
                    arena,
                    int(off[i]) + k,
                )

    def _state(self, m, arena, g, t, ins) -> None:
        state = arena.shadow.state[g]
        if state.min(initial=SET) == SET and state.max(initial=SET) == SET:
            return
        pending = state == PENDING
        if pending.any():
            self._pending(m, arena, g, t, ins, pending)
        if self.checks.uninitialised:
            i = int(np.argmin(state))
            m.fault(
                Uninitialised,
                ins,
                int(t[i]),
                f"reads uninitialised {arena.space} memory",
                arena,
                int(g[i]) << arena.shadow.shift,
            )

    def _pending(self, m, arena, g, t, ins, hit) -> None:
        i = int(np.argmax(hit))
        m.fault(
            AsyncNotReady,
            ins,
            int(t[i]),
            "accesses the target of a cp.async that has not completed (missing cp.async.wait_group / wait_all)",
            arena,
            int(g[i]) << arena.shadow.shift,
        )

    def _shared_race(self, m, arena, g, t, ins, hit, verb, other, did) -> None:
        i = int(np.argmax(hit))
        m.fault(
            SharedRace,
            ins,
            int(t[i]),
            f"shared-memory race: {verb} {_name(m, other[i], False)} {did} with no barrier between",
            arena,
            int(g[i]) << arena.shadow.shift,
        )

    def _global_conflict(self, m, arena: Region, g, t, ins, differs) -> None:
        if not self.checks.global_races:
            return
        shadow = arena.shadow
        assert shadow is not None
        time = shadow.write_time[g]
        if time.max(initial=-1) < 0:
            return
        code, mine = shadow.write_code[g], m.global_code[t]
        other_block = code // m.codes_per_block
        my_block = mine // m.codes_per_block
        same = other_block == my_block
        hit = (time >= 0) & (code != mine)
        hit &= ~same | ((time >= m.block_time[t]) & (((code ^ mine) >> 6 != 0) | (time >= m.warp_time[t])))
        other = np.maximum(code, 0)
        hit &= np.where(
            same,
            (self._thread_fence[mine] <= time) | (self._thread_fence[other] <= time),
            (self._block_fence[my_block] <= time) | (self._block_fence[other // m.codes_per_block] <= time),
        )
        if hit.any() and differs is not None:
            hit &= differs()
        if hit.any():
            i = int(np.argmax(hit))
            verb = "reads what" if differs is None else "overwrites with a different value what"
            m.fault(
                GlobalRace,
                ins,
                int(t[i]),
                f"global-memory race on {arena.name}: {verb} {_name(m, code[i], True)} wrote, unordered",
                arena,
                int(g[i]) << shadow.shift,
            )


def _granules(off: np.ndarray, size: int, shift: int):
    """Granule indices of the accesses, one array per granule an access covers."""
    first = off >> shift
    for k in range(max(1, size >> shift)):
        yield first + k if k else first


def _clear(uninit, off: np.ndarray, size: int) -> None:
    step = min(size, 8)
    for k in range(0, size, step):
        uninit.view(step)[(off + k) >> (step.bit_length() - 1)] = 0


def _conflict(m: Machine, code: np.ndarray, time: np.ndarray, t: np.ndarray) -> np.ndarray:
    """bool[n]: the recorded access is not ordered before one by thread ``t`` now."""
    recent = time >= m.block_time[t]
    if not recent.any():
        return recent
    mine = m.code[t]
    return recent & (code != mine) & (((code ^ mine) >> 6 != 0) | (time >= m.warp_time[t]))


def _record(m: Machine, codes: np.ndarray, times: np.ndarray, g: np.ndarray, t: np.ndarray) -> None:
    """Add accesses to a who/when pair, merging with unordered earlier ones and within the instruction."""
    mine = m.code[t]
    time = times[g]
    recent = time >= m.block_time[t]
    new = mine
    if recent.any():
        old = codes[g]
        unordered = recent & (time >= m.warp_time[t]) & (old != mine)
        new = np.where(unordered, mine >> 6 << 6 | _SEVERAL_LANES, mine)
        new[recent & ((old ^ mine) >> 6 != 0)] = _SEVERAL_WARPS
    codes[g] = new
    times[g] = m.clock
    won = codes[g]
    clash = np.flatnonzero(won != new)
    if len(clash):
        other = (won[clash] ^ mine[clash]) >> 6 != 0
        codes[g[clash[~other]]] = (mine[clash[~other]] >> 6 << 6) | _SEVERAL_LANES
        codes[g[clash[other]]] = _SEVERAL_WARPS


def _name(m: Machine, code: int, grid: bool) -> str:
    """Words for a thread code."""
    if code < 0:
        return "other warps"
    if grid:
        block, code = divmod(int(code), m.codes_per_block)
        where = f" of block {m.block_index(block)}"
    else:
        code, where = int(code) % m.codes_per_block, ""
    warp, lane = code >> 6, code & 63
    return (f"warp {warp}" if lane >= _SEVERAL_LANES else f"thread {warp * 32 + lane}") + where
