"""What the parser produces: operands, instructions, functions and modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Reg:
    """A virtual register; ``name`` is unique within its function."""

    name: str
    negated: bool = False  # ``!%p`` in a predicate position


@dataclass(frozen=True)
class Special:
    """A read-only special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Imm:
    """An immediate.  For a ``0f``/``0d`` literal ``bits`` is its size and ``value`` its bit pattern; else bits = 0."""

    value: int
    bits: int = 0


@dataclass(frozen=True)
class Sym:
    """Address of a variable plus a byte offset (also: a label or a function name)."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Mem:
    """``[base + offset]``."""

    base: Reg | Sym | Imm
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    """``{a, b, ...}``, or a parenthesised list of call operands."""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """``p | q``: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Sink:
    """``_``."""


Operand = Reg | Special | Imm | Sym | Mem | Vec | Pair | Sink


@dataclass(frozen=True)
class Loc:
    """Source position; ``str()`` gives ``file:line``."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


_NO_RESULT = {
    "st",
    "red",
    "bra",
    "brx",
    "ret",
    "exit",
    "trap",
    "membar",
    "fence",
    "cp",
    "prefetch",
    "nanosleep",
    "call",
}


@dataclass(frozen=True)
class Instr:
    """One instruction.  ``targets`` are the indices of the instructions it may branch to."""

    op: str
    mods: tuple[str, ...]
    args: tuple[Operand, ...]
    pred: Reg | None
    line: int
    text: str
    loc: Loc | None = None
    targets: tuple[int, ...] = ()

    def has(self, *mods: str) -> bool:
        """True if any of ``mods`` is among the modifiers."""
        return any(m in self.mods for m in mods)

    def memory(self, k: int) -> Mem:
        """Argument ``k``, which is an address in every form of the instruction."""
        argument = self.args[k]
        assert isinstance(argument, Mem), self.text
        return argument

    def immediate(self, k: int) -> int:
        """Value of argument ``k``, which is an immediate in every form of the instruction."""
        argument = self.args[k]
        assert isinstance(argument, Imm), self.text
        return argument.value

    def pick(self, options, default=None):
        """First modifier that is in ``options``, else ``default``."""
        return next((m for m in self.mods if m in options), default)

    @property
    def defs(self) -> tuple[str, ...]:
        """Names of the registers the instruction writes."""
        if not self.args or isinstance(self.args[0], Mem) or self.op in _NO_RESULT:
            return ()
        if self.op in ("bar", "barrier") and "red" not in self.mods:
            return ()
        return tuple(o.name for o in operands(self.args[0]) if isinstance(o, Reg))


@dataclass(frozen=True)
class Variable:
    """A variable or parameter in memory.  ``count`` is ``None`` for unsized (dynamic shared) arrays."""

    name: str
    space: str
    type: str
    count: int | None
    size: int
    align: int
    init: bytes | None = None
    array: bool = False


@dataclass
class Function:
    """A ``.entry`` kernel or a ``.func``."""

    name: str
    is_entry: bool
    params: list[Variable] = field(default_factory=list)
    returns: list[Variable] = field(default_factory=list)
    regs: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    code: list[Instr] = field(default_factory=list)
    reqntid: tuple[int, ...] | None = None


@dataclass
class PtxModule:
    """A parsed PTX file."""

    version: str = ""
    target: str = ""
    functions: dict[str, Function] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)


def map_operand(o: Operand, reg: Callable[[str], str], sym: Callable[[str], str]) -> Operand:
    """Copy of ``o`` with register and symbol names replaced."""
    if isinstance(o, Reg):
        return Reg(reg(o.name), o.negated)
    if isinstance(o, Sym):
        return Sym(sym(o.name), o.offset)
    if isinstance(o, Mem):
        base = map_operand(o.base, reg, sym)
        assert isinstance(base, Reg | Sym | Imm)
        return Mem(base, o.offset)
    if isinstance(o, Vec):
        return Vec(tuple(map_operand(i, reg, sym) for i in o.items))
    if isinstance(o, Pair):
        return Pair(map_operand(o.first, reg, sym), map_operand(o.second, reg, sym))
    return o


def map_instr(i: Instr, reg: Callable[[str], str], sym: Callable[[str], str], shift: Callable[[int], int]) -> Instr:
    """Copy of ``i`` with names replaced and branch targets shifted."""
    return replace(
        i,
        args=tuple(map_operand(a, reg, sym) for a in i.args),
        pred=None if i.pred is None else Reg(reg(i.pred.name), i.pred.negated),
        targets=tuple(shift(t) for t in i.targets),
    )


def operands(o: Operand):
    """All leaves of an operand."""
    if isinstance(o, Mem):
        yield o.base
    elif isinstance(o, Vec):
        for item in o.items:
            yield from operands(item)
    elif isinstance(o, Pair):
        yield from operands(o.first)
        yield from operands(o.second)
    else:
        yield o
