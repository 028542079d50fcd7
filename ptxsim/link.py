"""Turns a parsed kernel into one flat instruction list: inlines calls, lays out memory, finds constant registers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from .errors import Unsupported
from .ir import Function, Imm, Instr, Mem, PtxModule, Sym, Variable, Vec, map_instr, operands

_MAX_DEPTH = 40
_INTRINSICS = {"vprintf", "__assertfail"}


@dataclass
class Program:
    """A kernel ready for execution.

    ``shared`` and ``local`` map variable names to byte offsets; dynamic shared memory starts at ``static_shared``.
    ``single`` holds the registers that have exactly one defining instruction.
    """

    name: str
    params: list[Variable]
    code: list[Instr]
    regs: dict[str, str]
    param_offsets: dict[str, int]
    param_size: int
    shared: dict[str, int]
    static_shared: int
    local: dict[str, int]
    local_size: int
    call_params: set[str]
    single: set[str]
    reqntid: tuple[int, ...] | None
    globals_used: list[Variable] = field(default_factory=list)


def _round(n: int, align: int) -> int:
    return -(-n // align) * align


class _Inliner:
    """Emits the code of a function and, recursively, of everything it calls."""

    def __init__(self, module: PtxModule, entry: Function):
        self.module = module
        self.regs = dict(entry.regs)
        self.variables = dict(entry.variables)
        self.calls = 0
        self.code = self.expand(entry, {}, "", 0)

    def expand(self, fn: Function, names: dict[str, str], prefix: str, depth: int) -> list[Instr]:
        if depth > _MAX_DEPTH:
            raise Unsupported(f"function {fn.name}: recursion, or calls nested deeper than {_MAX_DEPTH}")
        rename = (lambda n: prefix + n) if prefix else (lambda n: n)
        own = set(fn.variables) | {v.name for v in fn.params + fn.returns}

        def symbol(n: str) -> str:
            return names.get(n) or (rename(n) if n in own else n)

        if prefix:
            self.regs.update({rename(n): t for n, t in fn.regs.items()})
            self.variables.update({rename(n): replace(v, name=rename(n)) for n, v in fn.variables.items()})
        out: list[Instr] = []
        start: list[int] = []
        patches: list[int] = []
        for ins in fn.code:
            start.append(len(out))
            if ins.op == "call":
                out.extend(self.call(ins, len(out), symbol, depth))
                continue
            if ins.op == "ret" and depth:
                ins = replace(ins, op="bra", mods=(), targets=(len(fn.code),))
            if ins.targets:
                patches.append(len(out))
            out.append(map_instr(ins, rename, symbol, lambda t: t))
        start.append(len(out))
        for i in patches:
            out[i] = replace(out[i], targets=tuple(start[t] for t in out[i].targets))
        return out

    def call(self, ins: Instr, base: int, symbol, depth: int) -> list[Instr]:
        lists = [a for a in ins.args if isinstance(a, Vec)]
        callee = next((a.name for a in ins.args if isinstance(a, Sym)), None)
        if callee is None or (callee not in self.module.functions and callee not in _INTRINSICS):
            raise Unsupported(f"PTX line {ins.line}: indirect or unresolved call: {ins.text}")
        if callee in _INTRINSICS:
            results = [o for o in (lists[0].items if len(lists) > 1 else ()) if isinstance(o, Sym)]
            zero = [
                replace(ins, op="st", mods=("param", "b32"), args=(Mem(Sym(symbol(o.name))), Imm(0))) for o in results
            ]
            return [replace(ins, op=callee, mods=(), args=()), *zero]
        fn = self.module.functions[callee]
        if not fn.code:
            raise Unsupported(f"PTX line {ins.line}: call of external function {callee}")
        if ins.pred:
            raise Unsupported(f"PTX line {ins.line}: predicated call")
        self.calls += 1
        formal = fn.returns + fn.params
        actual = [symbol(o.name) for v in lists for o in v.items]
        if len(formal) != len(actual):
            raise Unsupported(
                f"PTX line {ins.line}: call of {callee} with {len(actual)} operands, expected {len(formal)}"
            )
        bound = {f.name: a for f, a in zip(formal, actual)}
        body = self.expand(fn, bound, f"{callee}#{self.calls}.", depth + 1)
        return [replace(i, targets=tuple(t + base for t in i.targets)) for i in body]


def link(module: PtxModule, name: str) -> Program:
    """Program of entry ``name``; raises :class:`Unsupported` for indirect calls, recursion and external functions."""
    entry = module.functions[name]
    flat = _Inliner(module, entry)
    code = flat.code
    used = {o.name for i in code for a in i.args for o in operands(a) if isinstance(o, Sym)}
    variables = {**{n: v for n, v in module.variables.items() if n in used}, **flat.variables}
    shared, local, top, frame = {}, {}, 0, 0
    dynamic = [v for v in variables.values() if v.space == "shared" and v.count is None]
    for v in variables.values():
        if v.space == "shared" and v.count is not None:
            top = _round(top, v.align)
            shared[v.name] = top
            top += v.size
        elif v.space in ("local", "param"):
            frame = _round(frame, max(v.align, 8))
            local[v.name] = frame
            frame += v.size
    if dynamic:
        top = _round(top, max(16, *(v.align for v in dynamic)))
        shared.update({v.name: top for v in dynamic})
    offsets, size = {}, 0
    for p in entry.params:
        size = _round(size, p.align)
        offsets[p.name] = size
        size += p.size
    count = Counter(d for i in code for d in i.defs)
    return Program(
        name=name,
        params=entry.params,
        code=code,
        regs=flat.regs,
        param_offsets=offsets,
        param_size=size,
        shared=shared,
        static_shared=top,
        local=local,
        local_size=_round(frame, 16),
        call_params={v.name for v in variables.values() if v.space == "param"},
        single={r for r, n in count.items() if n == 1},
        reqntid=entry.reqntid,
        globals_used=[v for v in variables.values() if v.space in ("global", "const")],
    )
