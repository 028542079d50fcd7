"""How many machine instructions a PTX instruction becomes.

PTX is not what the GPU issues: ``div.rn.f32`` is a reciprocal and several FMAs, a register ``mov`` usually vanishes, 64-bit
integer operations take two or more 32-bit ones.  The table holds the fast path of the sequences that ptxas (CUDA 13.0,
sm_80; sm_90 differs by at most one instruction) emits, as counted in its disassembly.  Everything absent counts as one
instruction of its own class.
"""

from __future__ import annotations

from .ir import Instr, Reg
from .stats import classify
from .types import DTYPE, size_of

_FLOAT: dict[str, dict[str, int]] = {
    "div.rn": {"sfu": 1, "fp32": 6, "control": 1},
    "div.full": {"sfu": 1, "fp32": 7},
    "div.approx": {"sfu": 1, "fp32": 4},
    "sqrt.rn": {"sfu": 1, "fp32": 4, "int": 2, "control": 1},
    "rcp.rn": {"sfu": 1, "fp32": 3, "int": 3, "control": 1},
    "sqrt.approx": {"sfu": 1, "fp32": 3},
    "rsqrt.approx": {"sfu": 1, "fp32": 3},
    "ex2.approx": {"sfu": 1, "fp32": 3},
    "lg2.approx": {"sfu": 1, "fp32": 3},
    "rcp.approx": {"sfu": 1, "fp32": 6},
    "sin.approx": {"sfu": 1, "fp32": 1},
    "cos.approx": {"sfu": 1, "fp32": 1},
}
_FLUSHED = {"sqrt", "rsqrt", "ex2", "lg2", "rcp"}
_INTEGER: dict[tuple[str, str], dict[str, int]] = {
    ("div", "s32"): {"int": 21, "convert": 2, "sfu": 1},
    ("div", "u32"): {"int": 15, "convert": 2, "sfu": 1},
    ("rem", "s32"): {"int": 20, "convert": 2, "sfu": 1},
    ("rem", "u32"): {"int": 14, "convert": 2, "sfu": 1},
    ("bfe", "s32"): {"int": 2},
    ("bfe", "u32"): {"int": 2},
    ("mul", "s64"): {"int": 4},
    ("mul", "u64"): {"int": 4},
    ("div", "s64"): {"int": 70},
    ("div", "u64"): {"int": 70},
    ("rem", "s64"): {"int": 70},
    ("rem", "u64"): {"int": 70},
}
_DOUBLE: dict[str, dict[str, int]] = {
    "div": {"fp64": 8, "sfu": 1},
    "sqrt": {"fp64": 8, "sfu": 1},
    "rcp": {"fp64": 6, "sfu": 1},
}
_TWO_HALVES = {"add", "sub", "shl", "shr", "and", "or", "xor", "not", "min", "max", "selp", "setp", "neg"}


def expand(ins: Instr) -> dict[str, int]:
    """Machine instructions by class (see :func:`ptxsim.stats.classify`) for one execution of ``ins``."""
    kind, op = classify(ins), ins.op
    ty = ins.mods[-1] if ins.mods else ""
    if kind.endswith(" param") or op == "cvta" or (op == "not" and ty == "pred"):
        return {}
    if op == "mov":
        return {} if isinstance(ins.args[1], Reg) else {kind: 1}
    if op == "cvt" and all(m in DTYPE and m[0] in "usb" for m in ins.mods[-2:]):
        return {"int": 1} if size_of(ins.mods[-2]) > size_of(ty) and ty[0] == "s" else {}
    if ty == "f32":
        key = f"{op}.{ins.pick(('rn', 'full', 'approx'), '')}"
        if key in _FLOAT:
            return {"sfu": 1} if op in _FLUSHED and ins.has("approx") and ins.has("ftz") else _FLOAT[key]
    if ty == "f64" and op in _DOUBLE:
        return _DOUBLE[op]
    if (op, ty) in _INTEGER and not ins.has("wide", "hi"):
        return _INTEGER[op, ty]
    if kind == "int" and op in _TWO_HALVES and ty in ("s64", "u64", "b64"):
        return {"int": 2}
    if op == "cvt":
        return {"convert": 1}
    return {kind: 1}
