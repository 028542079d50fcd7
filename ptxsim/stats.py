"""Cost counters of a launch (``stats=True``).

Everything is counted per PTX instruction while the kernel runs; the summaries are derived afterwards.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import numpy as np

from .ir import Instr

if TYPE_CHECKING:
    from .lanes import Lanes
    from .memory import GlobalMemory, Region

_SFU = {"ex2", "lg2", "sin", "cos", "rsqrt", "tanh", "rcp", "sqrt", "div"}
_CONTROL = {"bra", "brx", "ret", "exit", "bar", "barrier", "call", "trap", "nanosleep", "membar", "fence"}
_WARP = {"shfl", "vote", "match", "redux", "activemask", "elect"}

#: sectors are 32 bytes, the unit in which L1, L2 and DRAM exchange data.
SECTOR = 32


def classify(ins: Instr) -> str:
    """Class of an instruction: fp32, fp16, fp64, int, convert, sfu, tensor, load/store/atomic by space, warp, control."""
    op = ins.op
    if op in ("ld", "ldu", "st", "cp", "ldmatrix", "stmatrix"):
        space = (
            "shared"
            if op.endswith("matrix")
            else "global"
            if op == "cp"
            else ins.pick(("global", "shared", "local", "const", "param", "shared:cta"), "generic").split(":")[0]
        )
        if op == "cp" and not ins.has("global"):
            return "control"
        return f"{'store' if op in ('st', 'stmatrix') else 'load'} {space}"
    if op == "wmma" and "mma" not in ins.mods:
        return f"{ins.mods[0]} {ins.pick(('global', 'shared'), 'generic')}"
    if op in ("mma", "wmma"):
        return "tensor"
    if op in ("atom", "red"):
        return f"atomic {ins.pick(('global', 'shared'), 'generic')}"
    if op in _CONTROL:
        return "control"
    if op in _WARP:
        return "warp"
    ty = ins.mods[-1] if ins.mods else ""
    if op in _SFU and ty.startswith(("f", "bf")):
        return "fp64" if ty == "f64" else "sfu"
    if op == "cvt":
        return "convert"
    if ty in ("f16", "f16x2", "bf16", "bf16x2"):
        return "fp16"
    return {"f32": "fp32", "f64": "fp64"}.get(ty, "int")


def _flops(ins: Instr) -> int:
    """Floating-point operations per active lane (per warp for tensor instructions)."""
    if ins.op in ("mma", "wmma"):
        shape = next((m for m in ins.mods if m[0] == "m" and m[1:2].isdigit()), None)
        if shape is None or (ins.op == "wmma" and "mma" not in ins.mods):
            return 0
        m, rest = shape[1:].split("n")
        n, k = rest.split("k")
        return 2 * int(m) * int(n) * int(k)
    ty = ins.mods[-1] if ins.mods else ""
    if not ty.startswith(("f", "bf")) or ins.op in ("mov", "ld", "st", "selp", "setp", "cvt", "neg", "abs", "copysign"):
        return 0
    return (2 if ins.op in ("fma", "mad") else 1) * (2 if ty.endswith("x2") else 1)


class Stats:
    """Counters of one kernel launch.

    Indexed by instruction: ``warp_execs``, ``lane_execs``, ``sectors`` (32 B, after coalescing within each warp request)
    and ``wavefronts`` (shared-memory passes; equal to the ideal ``passes`` if there is no bank conflict).  Indexed by
    (instruction, space): ``requests`` (warp-level) and ``bytes`` (requested).
    """

    def __init__(self, kernel: str, code: list[Instr], grid: tuple[int, ...], block: tuple[int, ...], smem: int):
        n = len(code) + 1
        self.kernel, self.code, self.grid, self.block, self.shared_bytes = kernel, code, grid, block, smem
        self.warp_execs, self.lane_execs = [0] * n, [0] * n
        self.requests: dict[tuple[int, str], int] = defaultdict(int)
        self.bytes: dict[tuple[int, str], int] = defaultdict(int)
        self.sectors: dict[int, int] = defaultdict(int)
        self.wavefronts: dict[int, int] = defaultdict(int)
        self.passes: dict[int, int] = defaultdict(int)
        self.unique_sectors = {"load": 0, "store": 0}
        self.barriers = 0

    # -- counting ------------------------------------------------------------------------------------------------
    def on_global(self, pc: int, g: Lanes, region: Region, off: np.ndarray, size: int, write: bool) -> None:
        """One global request: byte offsets ``off`` [g.n] into ``region``, ``size`` bytes each."""
        sector = (off - region.skew) >> 5
        for k in range(max(1, size // SECTOR)):
            region.sectors(write)[sector + k] = True
        rows = np.sort(g.rows(sector, -1), axis=1)
        distinct = np.count_nonzero(rows[:, 1:] != rows[:, :-1]) + np.count_nonzero(rows[:, 0] >= 0)
        self._request(pc, "global", g, size)
        self.sectors[pc] += int(distinct) * max(1, size // SECTOR)

    def on_shared(self, pc: int, g: Lanes, addr: np.ndarray, size: int) -> None:
        """One shared request.  8-byte accesses go in two passes of 16 lanes, 16-byte ones in four of 8."""
        self._request(pc, "shared", g, size)
        words = max(1, size // 4)
        lanes = 32 // min(words, 4)
        rows = g.rows(addr >> 2, -1).reshape(-1, lanes)
        rows = rows[rows.max(1) >= 0]
        if words > 1:
            rows = np.where(rows[:, :, None] >= 0, rows[:, :, None] + np.arange(words), -1).reshape(len(rows), -1)
        self.passes[pc] += len(rows)
        self.wavefronts[pc] += bank_passes(rows)

    def on_local(self, pc: int, g: Lanes, size: int) -> None:
        """One local-memory request."""
        self._request(pc, "local", g, size)

    def _request(self, pc: int, space: str, g: Lanes, size: int) -> None:
        self.requests[pc, space] += g.warps
        self.bytes[pc, space] += g.n * size

    def finish(self, memory: GlobalMemory) -> None:
        """Collect the unique sectors at the end of a launch."""
        for r in memory.regions:
            load, store = r.read_sectors, r.write_sectors
            self.unique_sectors["load"] += 0 if load is None else int(load.sum())
            self.unique_sectors["store"] += 0 if store is None else int(store.sum())

    # -- summaries -----------------------------------------------------------------------------------------------
    def by_class(self) -> dict[str, int]:
        """Dynamic warp instructions per class (see :func:`classify`)."""
        out: Counter = Counter()
        for ins, n in zip(self.code, self.warp_execs):
            out[classify(ins)] += n
        return {k: v for k, v in out.most_common() if v}

    def by_opcode(self) -> dict[str, int]:
        """Dynamic warp instructions per full opcode."""
        out: Counter = Counter()
        for ins, n in zip(self.code, self.warp_execs):
            out[".".join((ins.op, *ins.mods))] += n
        return {k: v for k, v in out.most_common() if v}

    @property
    def warp_instructions(self) -> int:
        """Dynamic warp instructions."""
        return sum(self.warp_execs)

    @property
    def active_fraction(self) -> float:
        """Active lanes per issued lane, 0 ... 1."""
        return sum(self.lane_execs) / max(1, 32 * self.warp_instructions)

    @property
    def flops(self) -> dict[str, int]:
        """Floating-point operations: ``tensor`` and one entry per other class that has any."""
        out: Counter = Counter()
        for ins, warps, lanes in zip(self.code, self.warp_execs, self.lane_execs):
            f = _flops(ins)
            if f:
                kind = classify(ins)
                out[kind] += f * (warps if kind == "tensor" else lanes)
        return dict(out)

    @property
    def tensor_flops(self) -> dict[str, int]:
        """Tensor-core operations by input type (f16, bf16, tf32, s8)."""
        out: Counter = Counter()
        for ins, warps in zip(self.code, self.warp_execs):
            if classify(ins) == "tensor":
                kind = ins.pick(("bf16", "tf32", "s8", "u8", "f64"), "f16")
                out["s8" if kind == "u8" else kind] += _flops(ins) * warps
        return {k: v for k, v in out.items() if v}

    def memory(self, kind: str) -> dict[str, int]:
        """Requests, requested bytes, sectors, wavefronts and ideal passes of the classes that start with ``kind``,
        e.g. ``"load global"``, ``"store shared"``, ``"atomic"``."""
        pcs = [pc for pc, ins in enumerate(self.code) if classify(ins).startswith(kind)]
        spaces = [s for s in ("global", "shared", "local") if kind.endswith(s)] or ["global", "shared", "local"]
        out = {
            name: sum(getattr(self, name).get((pc, s), 0) for pc in pcs for s in spaces)
            for name in ("requests", "bytes")
        }
        out.update(
            {name: sum(getattr(self, name).get(pc, 0) for pc in pcs) for name in ("sectors", "wavefronts", "passes")}
        )
        return out

    @property
    def global_sectors(self) -> int:
        """32-byte sectors moved between L1 and the rest, all global requests."""
        return sum(self.sectors.values())

    @property
    def compulsory_bytes(self) -> int:
        """Bytes that must cross DRAM at least once: unique sectors loaded plus unique sectors stored."""
        return SECTOR * (self.unique_sectors["load"] + self.unique_sectors["store"])

    @property
    def bank_conflict_ways(self) -> float:
        """Mean shared-memory wavefronts per ideal pass; 1.0 = conflict-free."""
        return sum(self.wavefronts.values()) / max(1, sum(self.passes.values()))

    @property
    def local_bytes(self) -> int:
        """Bytes of local-memory loads and stores."""
        return self.memory("load local")["bytes"] + self.memory("store local")["bytes"]

    def hot_spots(self, n: int = 10) -> list[tuple[str, int, int, int]]:
        """The ``n`` source lines with most warp instructions: (place, warp instructions, sectors, wavefronts)."""
        rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for pc, ins in enumerate(self.code):
            row = rows[str(ins.loc) if ins.loc else f"ptx:{ins.line}"]
            row[0] += self.warp_execs[pc]
            row[1] += self.sectors.get(pc, 0)
            row[2] += self.wavefronts.get(pc, 0)
        hottest = sorted(rows.items(), key=lambda kv: -kv[1][0])[:n]
        return [(place, execs, sectors, wavefronts) for place, (execs, sectors, wavefronts) in hottest if execs]

    def summary(self) -> str:
        """Readable report."""
        ld, st, at = (self.memory(k) for k in ("load global", "store global", "atomic global"))
        lines = [
            f"kernel {self.kernel}  grid {self.grid}  block {self.block}  shared {self.shared_bytes} B",
            f"  warp instructions {self.warp_instructions}, active lanes {self.active_fraction:.1%}, barriers {self.barriers}",
            "  by class: " + ", ".join(f"{k} {v}" for k, v in self.by_class().items()),
            "  flops: " + (", ".join(f"{k} {v}" for k, v in self.flops.items()) or "none"),
        ]
        for name, d in (("loads", ld), ("stores", st), ("atomics", at)):
            if d["requests"]:
                lines.append(
                    f"  global {name}: {d['requests']} requests, {d['bytes']} B, {d['sectors']} sectors "
                    f"({d['sectors'] / d['requests']:.2f} per request)"
                )
        lines.append(f"  compulsory DRAM bytes: {self.compulsory_bytes}")
        if self.passes:
            lines.append(f"  shared: bank-conflict ways {self.bank_conflict_ways:.2f}")
        if self.local_bytes:
            lines.append(f"  local memory: {self.local_bytes} B")
        lines.append("  hot spots: " + ", ".join(f"{k} ({v})" for k, v, *_ in self.hot_spots(5)))
        return "\n".join(lines)


def bank_passes(rows: np.ndarray) -> int:
    """Shared-memory passes for ``rows`` [requests, words] of 4-byte word indices (-1 = inactive): per request, the largest
    number of distinct words that fall into one of the 32 banks."""
    if not len(rows):
        return 0
    rows = np.sort(rows, axis=1)
    first = np.ones(rows.shape, np.bool_)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    first &= rows >= 0
    bank = (np.arange(len(rows))[:, None] * 32 + (rows & 31))[first]
    return int(np.bincount(bank, minlength=32 * len(rows)).reshape(-1, 32).max(1).sum())
