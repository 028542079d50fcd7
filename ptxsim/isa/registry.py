"""Table from opcode to the function that builds its execution step."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ..bind import Binder, Step
from ..errors import Unsupported
from ..ir import Instr
from ..types import DTYPE

#: a builder takes (binder, instruction, index of the instruction) and returns the step.
Builder = Callable[[Binder, Instr, int], Step]

BUILDERS: dict[str, Builder] = {}

#: modifiers that the builders implement or may ignore; any other one makes an instruction unsupported, because ignoring an
#: unknown modifier could give wrong results.
_KNOWN = frozenset(
    (
        "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan "  # comparisons
        "finite infinite number notanumber normal subnormal "  # testp
        "and or xor add min max exch cas inc dec popc "  # atom, redux, bar.red, setp
        "rn rz rm rp rna rni rzi rmi rpi ftz sat satfinite relu NaN noftz approx full "  # rounding, result
        "lo hi wide cc l r clamp wrap shiftamt f4e b4e rc8 rc16 ecl ecr pack to "  # integer, bits, cvt, cvta
        "global shared shared:cta local const param param:entry "  # state spaces
        "v2 v4 v8 volatile relaxed acquire release acq_rel weak cta cluster gpu sys gl "  # memory
        "ca cg cs cv lu wb wt nc "  # cache operators
        "sync aligned up down bfly idx all any uni ballot warp arrive red u "  # warp, block, control
        "async commit_group wait_group wait_all "  # cp.async
        "m8n8 x1 x2 x4 trans row col load store mma a b c d"  # tensor
    ).split()
)
_HINT = re.compile(r"(?:L1|L2):|m\d+n\d+k\d+$")


def check_modifiers(ins: Instr) -> None:
    """Raise :class:`Unsupported` if the instruction has a modifier that no builder knows."""
    for m in ins.mods:
        if m not in _KNOWN and m not in DTYPE and not _HINT.match(m) and ins.op not in _NO_EFFECT:
            raise Unsupported(f"PTX line {ins.line}: {ins.text}: modifier .{m.replace(':', '::')} is not supported")


_NO_EFFECT = {
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "fence",
    "membar",
    "griddepcontrol",
    "pmevent",
    "createpolicy",
    "nanosleep",
}
_ALIGNED = {"mma", "wmma", "ldmatrix", "stmatrix"}
_MASKED = {"shfl", "vote", "match", "redux", "elect"}
_HOPPER = {
    "wgmma",
    "cp.async.bulk",
    "mbarrier",
    "tcgen05",
    "setmaxnreg",
    "mapa",
    "multimem",
    "tensormap",
    "clusterlaunchcontrol",
}


def op(*names: str) -> Callable[[Builder], Builder]:
    """Decorator: register a builder for the opcodes ``names``."""

    def register(f: Builder) -> Builder:
        for n in names:
            BUILDERS[n] = f
        return f

    return register


def unsupported(what: str) -> Unsupported:
    """Exception for something outside the simulator's scope."""
    return Unsupported(f"{what} is not supported")


def unsupported_instr(ins: Instr) -> Unsupported:
    """Exception for an instruction outside the simulator's scope."""
    hint = ""
    if ins.op in _HOPPER or ins.has("bulk", "cluster", "shared:cluster"):
        hint = " (Hopper and newer only: compile for compute_80, or for Triton use cc=80)"
    return Unsupported(f"PTX line {ins.line}: {ins.text}: instruction not supported{hint}")


def build(b: Binder, ins: Instr, pc: int) -> Step:
    """Execution step of ``ins``; raises :class:`Unsupported`."""
    builder = BUILDERS.get(ins.op)
    if builder is None:
        raise unsupported_instr(ins)
    check_modifiers(ins)
    try:
        return builder(b, ins, pc)
    except Unsupported as e:
        if str(e).startswith("PTX line"):
            raise
        raise Unsupported(f"PTX line {ins.line}: {ins.text}: {e}") from None


def needs_convergence(ins: Instr) -> bool:
    """True if the instruction must wait for the other lanes of its member mask."""
    return (
        ins.op in _ALIGNED
        or (ins.op in _MASKED and "sync" in ins.mods)
        or (ins.op in ("bar", "barrier") and ins.has("warp"))
    )


def member_mask(b: Binder, ins: Instr):
    """uint32 scalar, or uint32[N]: lanes that take part in a warp-synchronous instruction."""
    if ins.op in _ALIGNED:
        return np.uint32(0xFFFFFFFF)
    return b.value(ins.args[0 if ins.op in ("bar", "barrier") else -1], "u32")
