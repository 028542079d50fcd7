"""The machine: the state of one kernel for a batch of blocks, all threads of the batch advancing together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import isa
from .bind import Binder, Step, nothing
from .check import Checker, Shadow
from .errors import Fault, Where
from .ir import Instr
from .lanes import Lanes
from .link import Program
from .memory import GlobalMemory, Region, WindowArena
from .scheduler import Kind, Scheduler
from .stats import Stats

if TYPE_CHECKING:
    from .launch import Options


@dataclass(frozen=True)
class Barrier:
    """Operands of a block barrier: number and thread count per thread; for ``bar.red`` also result writer and predicate."""

    ident: np.ndarray
    count: np.ndarray | None
    write: Callable[[Lanes, np.ndarray], None] | None
    pred: Callable[[], np.ndarray] | None


class Machine:
    """Execution state of ``blocks_per_batch`` blocks of a program.

    N           threads in the batch (blocks padded to whole warps)
    code        int64[N]: thread code within the batch (see :mod:`ptxsim.check`); global_code: within the grid
    block_time  int32[N]: clock at the last barrier of the thread's block; warp_time: also warp barriers
    """

    def __init__(
        self,
        prog: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        dynamic_shared: int,
        params: np.ndarray,
        symbols: dict[str, int],
        memory: GlobalMemory,
        options: Options,
        checker: Checker | None,
        stats: Stats | None,
        blocks_per_batch: int,
    ):
        self.prog, self.grid, self.block, self.memory, self.options = prog, grid, block, memory, options
        self.params, self.param_base, self.symbols = params, params.ctypes.data, symbols
        self.checker, self.stats, self.clock = checker, stats, 0
        self.nb = blocks_per_batch
        self.threads = int(np.prod(block))
        self.warps_per_block = -(-self.threads // 32)
        self.padded = self.warps_per_block * 32
        self.codes_per_block = self.warps_per_block * 64
        self.N = N = self.nb * self.padded
        t = np.arange(N)
        self.lane = (t % 32).astype(np.uint32)
        self.tid = t % self.padded
        self.block_slot = t // self.padded
        self.code = (t >> 5 << 6) | (t & 31)
        self.global_code = np.zeros(N, np.int64)
        self.block_time = np.zeros(N, np.int32)
        self.warp_time = np.zeros(N, np.int32)
        self.block_of = np.zeros(N, np.int64)
        self._specials: dict[str, Any] = {}
        size = -(-(prog.static_shared + dynamic_shared) // 16) * 16
        self.shared_limit = prog.static_shared + dynamic_shared
        self.dynamic_shared = dynamic_shared
        self.shared = WindowArena("shared", self.shared_limit, self.block_slot * size, size * self.nb)
        self.local = WindowArena("local", prog.local_size, t * prog.local_size, N * prog.local_size)
        if checker is not None:
            self.shared.shadow = Shadow("shared", len(self.shared.data), checker.shared_shift)
            self.local.shadow = Shadow("local", len(self.local.data), checker.local_shift)
        self.carry = np.zeros(N, np.bool_)
        self.async_groups = np.zeros(N, np.int64)
        self.async_pending: list = []
        self.binder = Binder(self)
        self.born = np.zeros(N, np.bool_)
        self.live = self.born
        self.live_count = 0
        self.steps: list[Step] = []
        self.kinds: list[Kind] = []
        self.predicates: list[tuple[np.ndarray, bool] | None] = []
        self.barriers: dict[int, Barrier] = {}
        self.tables: dict[int, np.ndarray] = {}
        for pc, ins in enumerate(prog.code):
            self._bind(pc, ins)

    # -- binding -----------------------------------------------------------------------------------------------------
    def _bind(self, pc: int, ins: Instr) -> None:
        kind = Kind.PLAIN
        step: Step = nothing
        if ins.op == "bra":
            kind = Kind.BRANCH
        elif ins.op == "brx":
            kind = Kind.TABLE
            self.tables[pc] = self.binder.all_lanes(ins.args[0], "u32")
        elif ins.op in ("ret", "exit"):
            kind = Kind.EXIT
        elif ins.op in ("bar", "barrier") and not ins.has("warp", "cluster"):
            kind = Kind.BARRIER
            self.barriers[pc] = self._barrier(ins)
        else:
            kind = Kind.SYNC if isa.needs_convergence(ins) else Kind.PLAIN
            step = isa.build(self.binder, ins, pc)
        self.kinds.append(kind)
        self.steps.append(step)
        self.predicates.append(
            None if ins.pred is None else (self.binder.all_lanes(ins.pred, "pred"), ins.pred.negated)
        )

    def _barrier(self, ins: Instr) -> Barrier:
        """``bar{.red}{.op} {d,} id {, count} {, p}``."""
        args, write, pred = list(ins.args), None, None
        if ins.has("red"):
            write = self.binder.writer(args.pop(0), "pred" if ins.mods[-1] == "pred" else "u32")
            pred = self.binder.predicate(args.pop())
        ident = self.binder.all_lanes(args[0], "u32") if args else np.zeros(self.N, np.uint32)
        count = self.binder.all_lanes(args[1], "u32") if len(args) > 1 else None
        return Barrier(ident, count, write, pred)

    def special(self, name: str):
        """Value of a special register: uint32[N], or an int if the same for all threads of the launch."""
        if name in self._specials:
            return self._specials[name]
        base, _, axis = name[1:].partition(".")
        a = "xyz".index(axis) if axis else 0
        bx, by = self.block[0], self.block[1]
        fixed = {
            "tid": lambda: (self.tid % bx, self.tid // bx % by, self.tid // (bx * by))[a].astype(np.uint32),
            "ntid": lambda: self.block[a],
            "nctaid": lambda: self.grid[a],
            "ctaid": lambda: np.zeros(self.N, np.uint32),
            "laneid": lambda: self.lane,
            "warpid": lambda: (self.tid // 32).astype(np.uint32),
            "nwarpid": lambda: self.warps_per_block,
            "smid": lambda: 0,
            "nsmid": lambda: 1,
            "gridid": lambda: 0,
            "lanemask_eq": lambda: np.uint32(1) << self.lane,
            "lanemask_lt": lambda: (np.uint32(1) << self.lane) - np.uint32(1),
            "lanemask_le": lambda: (np.uint32(2) << self.lane) - np.uint32(1),
            "lanemask_gt": lambda: ~((np.uint32(2) << self.lane) - np.uint32(1)),
            "lanemask_ge": lambda: ~((np.uint32(1) << self.lane) - np.uint32(1)),
            "dynamic_smem_size": lambda: self.dynamic_shared,
            "total_smem_size": lambda: self.shared_limit,
            "clock": lambda: 0,
            "clock64": lambda: 0,
            "clock_hi": lambda: 0,
            "globaltimer": lambda: 0,
            "globaltimer_lo": lambda: 0,
            "globaltimer_hi": lambda: 0,
        }
        if base not in fixed:
            raise isa.unsupported(f"special register {name}")
        self._specials[name] = fixed[base]()
        return self._specials[name]

    # -- faults --------------------------------------------------------------------------------------------------------
    def block_index(self, linear: int) -> tuple[int, int, int]:
        """(x, y, z) of a linear block number."""
        gx, gy = self.grid[0], self.grid[1]
        return int(linear % gx), int(linear // gx % gy), int(linear // (gx * gy))

    def fault(
        self,
        kind: type[Fault],
        ins: Instr,
        t: int | None,
        message: str,
        arena=None,
        offset: int | None = None,
        address: str | None = None,
    ) -> None:
        """Raise ``kind`` for batch thread ``t``; the address is given as an arena offset or as text."""
        block = thread = None
        if t is not None:
            block = self.block_index(int(self.block_of[t]))
            i, bx, by = int(self.tid[t]), self.block[0], self.block[1]
            thread = (i % bx, i // bx % by, i // (bx * by))
        if arena is not None and offset is not None:
            if isinstance(arena, Region):
                o = offset - arena.skew
                address = f"{arena.origin + offset:#x} = {arena.name} + {o} bytes"
            else:
                address = f"{arena.space} + {offset - int(arena.base[t])}"
        raise kind(
            message,
            Where(self.prog.name, ins.line, ins.text, str(ins.loc) if ins.loc else None, block, thread, address),
        )

    # -- running -------------------------------------------------------------------------------------------------------
    def run(self, blocks: np.ndarray, rng: np.random.Generator | None) -> None:
        """Run the given linear block numbers (at most ``blocks_per_batch``) to completion."""
        self._begin(blocks)
        Scheduler(self, rng).run()

    def _begin(self, blocks: np.ndarray) -> None:
        per_slot = np.zeros(self.nb, np.int64)
        per_slot[: len(blocks)] = blocks
        self.block_of[:] = per_slot[self.block_slot]
        self.global_code[:] = self.block_of * self.codes_per_block + self.code % self.codes_per_block
        gx, gy = self.grid[0], self.grid[1]
        for axis, value in zip("xyz", (self.block_of % gx, self.block_of // gx % gy, self.block_of // (gx * gy))):
            special = self._specials.get(f"%ctaid.{axis}")
            if special is not None:
                special[:] = value
        self.live = self.born = (self.tid < self.threads) & (self.block_slot < len(blocks))
        self.live_count = int(np.count_nonzero(self.live))
        self.clock += 1
        self.block_time.fill(self.clock)
        self.warp_time.fill(self.clock)
        self.async_groups.fill(0)
        self.async_pending.clear()
        self.shared.data.fill(0xFF)
        self.local.data.fill(0xFF)
        for arena in (self.shared, self.local):
            if arena.shadow is not None:
                arena.shadow.reset()

    def sync_warps(self, g: Lanes) -> None:
        """Record a warp barrier passed by ``g``."""
        self.clock += 1
        self.warp_time[g.ix] = self.clock
