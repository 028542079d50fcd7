"""Parser: PTX text to :class:`ptxsim.ir.PtxModule`."""

from __future__ import annotations

import bisect
import os
import re
import struct
from dataclasses import replace

from .errors import ParseError, Unsupported
from .ir import Function, Imm, Instr, Loc, Mem, Operand, Pair, PtxModule, Reg, Sink, Special, Sym, Variable, Vec
from .types import size_of

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LABEL = re.compile(r"([%$A-Za-z_][\w$%.]*)\s*:(?!:)")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+(?:[^\n;]*?inlined_at\s+(\d+)\s+(\d+))?[^\n;]*\n?")
_FILE = re.compile(r"\.file\s+(\d+)\s+\"([^\"]*)\"[^\n]*")
_HEADER = re.compile(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(entry|func)\b")
_VARIABLE = re.compile(r"(?:\.(?:visible|weak|extern|common)\s+)*\.(global|const|shared|local|param)\b(.*)", re.S)
_INSTR = re.compile(r"(?:@(!?)\s*([%$\w]+)\s+)?([a-z][a-z0-9]*)((?:[.:]{1,2}[\w]+)*)\s*(.*)", re.S)
_SPECIAL = re.compile(
    r"%(?:n?tid|n?ctaid)\.[xyz]$|%(?:laneid|warpid|nwarpid|smid|nsmid|gridid|clock|clock64|clock_hi|globaltimer|"
    r"globaltimer_lo|globaltimer_hi|lanemask_(?:eq|lt|le|gt|ge)|dynamic_smem_size|total_smem_size|is_explicit_cluster|"
    r"cluster_(?:n?ctaid|n?ctarank)(?:\.[xyz])?|envreg\d+)$"
)


def parse(text: str) -> PtxModule:
    """Parse PTX source.

    Raises :class:`ParseError` on malformed text and :class:`Unsupported` for features out of scope.
    """
    return _Parser(text).module


def split_operands(text: str) -> list[str]:
    """Split at commas that are outside brackets."""
    out, depth, start = [], 0, 0
    for i, ch in enumerate(text):
        if ch in "{[(":
            depth += 1
        elif ch in "}])":
            depth -= 1
        elif ch == "," and depth == 0:
            out.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    return out + [tail] if tail else out


def parse_int(text: str) -> int:
    """Integer literal: decimal, ``0x`` hexadecimal, ``0b`` binary or ``0`` octal, optional sign and ``U``."""
    t = text.rstrip("Uu")
    sign, t = (-1, t[1:]) if t.startswith("-") else (1, t)
    if re.fullmatch(r"0[0-7]+", t):
        return sign * int(t, 8)
    return sign * int(t, 0)


class _Scope:
    """One ``{ }`` level of a function body."""

    def __init__(self, number: int, parent: _Scope | None):
        self.number, self.parent = number, parent
        self.names: dict[str, str] = {}
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}

    def find(self, table: str, name: str):
        scope: _Scope | None = self
        while scope is not None:
            hit = getattr(scope, table).get(name)
            if hit is not None:
                return hit
            scope = scope.parent
        return None


class _Parser:
    def __init__(self, text: str):
        self.text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
        self.starts = [0] + [m.end() for m in re.finditer("\n", self.text)]
        self.files = {int(n): os.path.basename(f) for n, f in _FILE.findall(self.text)}
        self.module = PtxModule()
        self.pos = 0
        self.run()

    # -- places ------------------------------------------------------------------------------------------------
    def line(self, pos: int | None = None) -> int:
        return bisect.bisect_right(self.starts, self.pos if pos is None else pos)

    def loc(self, file: str, line: str) -> Loc:
        return Loc(self.files.get(int(file), f"file{file}"), int(line))

    def fail(self, what: str) -> ParseError:
        return ParseError(f"PTX line {self.line()}: {what}")

    def skip_space(self) -> None:
        while self.pos < len(self.text) and self.text[self.pos].isspace():
            self.pos += 1

    def upto(self, ch: str) -> str:
        end = self.text.find(ch, self.pos)
        if end < 0:
            raise self.fail(f"missing {ch!r}")
        out, self.pos = self.text[self.pos : end], end + 1
        return out

    def line_rest(self) -> str:
        end = self.text.find("\n", self.pos)
        end = len(self.text) if end < 0 else end
        out, self.pos = self.text[self.pos : end], end
        return out

    # -- module level ------------------------------------------------------------------------------------------
    def run(self) -> None:
        while True:
            self.skip_space()
            if self.pos >= len(self.text):
                return
            rest = self.text[self.pos : self.pos + 400]
            if m := re.match(r"\.(version|target|address_size)\b\s*(.*)", rest):
                if m[1] in ("version", "target"):
                    setattr(self.module, m[1], m[2].split("\n")[0].strip())
                self.line_rest()
            elif rest.startswith((".file", ".loc")):
                self.line_rest()
            elif rest.startswith(".section"):
                self.upto("{")
                self.upto("}")
            elif rest.startswith((".pragma", ".alias")):
                self.upto(";")
            elif _HEADER.match(rest):
                self.function()
            elif _VARIABLE.match(rest):
                for v in self.variables(self.upto(";")):
                    self.module.variables[v.name] = v
            elif rest[0] == "}":
                self.pos += 1
            else:
                raise self.fail(f"cannot parse {rest[:60]!r}")

    def variables(self, text: str) -> list[Variable]:
        """Variables declared by one statement, e.g. ``.shared .align 4 .b8 tile[128], other[4]``."""
        m = _VARIABLE.match(text.strip())
        if not m:
            raise self.fail(f"cannot parse declaration {text[:80]!r}")
        space, rest = m[1], m[2]
        head = re.match(
            r"((?:\s*\.(?:ptr|align\s+\d+|global|const|shared|local|param|attribute\([^)]*\)|v\d|\w+))*)\s*(.*)",
            rest,
            re.S,
        )
        assert head is not None  # it also matches nothing
        words, names = head[1], head[2]
        align = re.search(r"(?<!ptr)\s\.align\s+(\d+)", " " + re.sub(r"\.ptr.*", "", words))
        kinds = [
            w for w in re.findall(r"\.([a-z]\w*)", words) if re.fullmatch(r"[usbf](8|16|32|64|128)|pred|b?f16(x2)?", w)
        ]
        if not kinds:
            raise self.fail(f"no type in declaration {text[:80]!r}")
        ty = kinds[0]
        vector = re.search(r"\.v(\d)", words)
        lanes = int(vector[1]) if vector else 1
        out = []
        for item in split_operands(names):
            name, _, init = item.partition("=")
            nm = re.match(r"([\w$%.]+)\s*((?:\[\s*\w*\s*\]\s*)*)$", name.strip())
            if not nm:
                raise self.fail(f"cannot parse variable {item[:60]!r}")
            dims = re.findall(r"\[\s*(\w*)\s*\]", nm[2])
            count: int | None = lanes
            for d in dims:
                count = None if d == "" or count is None else count * parse_int(d)
            data = self.initialiser(init.strip(), ty) if init else None
            if count is None and data is not None:
                count = len(data) // size_of(ty)
            size = 0 if count is None else count * size_of(ty)
            if data is not None:
                data = data.ljust(size, b"\0")
            out.append(
                Variable(
                    nm[1], space, ty, count, size, int(align[1]) if align else size_of(ty) * lanes, data, bool(dims)
                )
            )
        return out

    def initialiser(self, text: str, ty: str) -> bytes:
        flat = [t for t in re.split(r"[{},\s]+", text) if t]
        out = b""
        for t in flat:
            if not re.match(r"-?\d", t):
                raise Unsupported(f"PTX line {self.line()}: initialiser with symbol {t!r}")
            imm = self.literal(t)
            if imm.bits:
                out += int(imm.value).to_bytes(imm.bits // 8, "little")
            else:
                out += (int(imm.value) & ((1 << 8 * size_of(ty)) - 1)).to_bytes(size_of(ty), "little")
        return out

    # -- functions ---------------------------------------------------------------------------------------------
    def function(self) -> None:
        start = self.pos
        brace, semi = self.text.find("{", start), self.text.find(";", start)
        declared_only = semi >= 0 and (brace < 0 or semi < brace)
        head = self.upto(";" if declared_only else "{")
        m = re.search(
            r"\.(entry|func)\s*(\((?:[^()]|\([^()]*\))*\))?\s*([\w$%.]+)\s*(\((?:[^()]|\([^()]*\))*\))?(.*)", head, re.S
        )
        if not m:
            raise self.fail(f"cannot parse function header {head[:80]!r}")
        fn = Function(m[3], m[1] == "entry")
        for target, text in ((fn.returns, m[2]), (fn.params, m[4])):
            for p in split_operands((text or "")[1:-1]):
                if p.strip().startswith(".reg"):
                    raise Unsupported(f"function {fn.name}: register parameters")
                target.extend(self.variables(p))
        if q := re.search(r"\.reqntid\s+([\d,\s]+)", m[5]):
            fn.reqntid = tuple(int(x) for x in q[1].replace(",", " ").split())
        if not declared_only:
            _Body(self, fn)
        if fn.name not in self.module.functions or not declared_only:
            self.module.functions[fn.name] = fn

    def literal(self, t: str) -> Imm:
        """Numeric literal; raises :class:`ParseError` if ``t`` is none."""
        if m := re.fullmatch(r"(-?)0(?:[fF]([0-9a-fA-F]{8})|[dD]([0-9a-fA-F]{16}))", t):
            size = 32 if m[2] else 64
            return Imm(int(m[2] or m[3], 16) ^ (1 << (size - 1) if m[1] else 0), size)
        if re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", t):
            return Imm(struct.unpack("<Q", struct.pack("<d", float(t)))[0], 64)
        try:
            return Imm(parse_int(t))
        except ValueError:
            raise self.fail(f"bad operand {t!r}") from None


class _Body:
    """Parses one function body."""

    def __init__(self, parser: _Parser, fn: Function):
        self.p, self.fn = parser, fn
        self.scope = _Scope(0, None)
        self.count = 0
        self.loc: Loc | None = None
        self.file: str | None = None
        self.called_from: dict[Loc, Loc] = {}
        self.branches: list[tuple[int, _Scope, str]] = []
        for v in fn.params + fn.returns:
            self.scope.names[v.name] = v.name
        self.run()
        for index, scope, name in self.branches:
            names = scope.find("tables", name) or [name]
            targets = [scope.find("labels", n) for n in names]
            if None in targets:
                raise ParseError(f"function {fn.name}: unknown label {name}")
            fn.code[index] = replace(fn.code[index], targets=tuple(targets))

    def run(self) -> None:
        p = self.p
        while True:
            p.skip_space()
            if p.pos >= len(p.text):
                raise p.fail(f"function {self.fn.name} is not closed")
            ch = p.text[p.pos]
            if ch == "{":
                p.pos += 1
                self.count += 1
                self.scope = _Scope(self.count, self.scope)
            elif ch == "}":
                p.pos += 1
                if self.scope.parent is None:
                    return
                self.scope = self.scope.parent
            elif ch == ";":
                p.pos += 1
            elif m := _LOC.match(p.text, p.pos):
                p.pos = m.end()
                self.location(m)
            elif p.text.startswith((".file", ".section"), p.pos):
                p.line_rest()
            elif m := _LABEL.match(p.text, p.pos):
                p.pos = m.end()
                p.skip_space()
                if p.text.startswith(".branchtargets", p.pos):
                    self.scope.tables[m[1]] = [t.strip() for t in p.upto(";").split(None, 1)[1].split(",")]
                elif p.text.startswith(".callprototype", p.pos):
                    p.upto(";")
                else:
                    self.scope.labels[m[1]] = len(self.fn.code)
            else:
                line = p.line()
                self.statement(" ".join(p.upto(";").split()), line)

    def location(self, m: re.Match) -> None:
        """Take over a ``.loc``.  Code inlined from another file (a header) is attributed to the line that calls it."""
        if not int(m[2]):
            return
        loc = self.p.loc(m[1], m[2])
        if m[3]:
            self.called_from[loc] = self.p.loc(m[3], m[4])
        self.file = self.file or loc.file
        seen = set()
        while loc.file != self.file and loc in self.called_from and loc not in seen:
            seen.add(loc)
            loc = self.called_from[loc]
        self.loc = loc

    def unique(self, name: str) -> str:
        out = name if self.scope.number == 0 else f"{name}@{self.scope.number}"
        self.scope.names[name] = out
        return out

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            m = re.match(r"\.reg\s*(\.v\d\s*)?\.(\w+)\s+(.*)", text)
            if not m or m[1]:
                raise self.p.fail(f"cannot parse {text!r}")
            for item in m[3].split(","):
                ranged = re.match(r"\s*([%\w$]+)<(\d+)>", item)
                names = [f"{ranged[1]}{k}" for k in range(int(ranged[2]))] if ranged else [item.strip()]
                for n in names:
                    self.fn.regs[self.unique(n)] = m[2]
        elif text.startswith(".pragma"):
            pass
        elif _VARIABLE.match(text):
            for v in self.p.variables(text):
                name = self.unique(v.name)
                self.fn.variables[name] = replace(v, name=name)
        elif text.startswith("."):
            raise self.p.fail(f"unknown directive {text[:60]!r}")
        else:
            self.instruction(text, line)

    def instruction(self, text: str, line: int) -> None:
        m = _INSTR.match(text)
        if not m:
            raise self.p.fail(f"cannot parse {text[:80]!r}")
        mods = tuple(x.replace("::", ":") for x in re.findall(r"\.((?:\w|::)+)", m[4]))
        pred = Reg(self.scope.find("names", m[2]) or m[2], bool(m[1])) if m[2] else None
        args: tuple[Operand, ...]
        if m[3] in ("bra", "brx"):
            names = split_operands(m[5])
            self.branches.append((len(self.fn.code), self.scope, names[-1]))
            args = tuple(self.operand(n) for n in names[:-1])
        else:
            args = tuple(self.operand(a) for a in split_operands(m[5]))
        self.fn.code.append(Instr(m[3], mods, args, pred, line, text, self.loc))

    def operand(self, t: str) -> Operand:
        if t == "_":
            return Sink()
        if t[0] in "{(":
            return Vec(tuple(self.operand(x) for x in split_operands(t[1:-1])))
        if t[0] == "[":
            return self.address(t[1:-1].strip())
        if "|" in t:
            a, b = t.split("|")
            return Pair(self.operand(a.strip()), self.operand(b.strip()))
        if t[0] == "!":
            negated = self.operand(t[1:].strip())
            if not isinstance(negated, Reg):
                raise self.p.fail(f"bad operand {t!r}")
            return Reg(negated.name, True)
        name = self.scope.find("names", t)
        if name is not None:
            return Reg(name) if name in self.fn.regs else Sym(name)
        if _SPECIAL.match(t):
            return Special(t)
        if t == "WARP_SZ":
            return Imm(32)
        if t in ("%pt", "true"):
            return Imm(1)
        if re.match(r"-?[\d.]", t):
            return self.p.literal(t)
        m = re.fullmatch(r"([%$A-Za-z_][\w$.]*)\s*(?:([-+])\s*(\w+))?", t)
        if not m:
            m = re.fullmatch(r"generic\(([\w$]+)\)()()", t)
        if not m:
            raise self.p.fail(f"bad operand {t!r}")
        offset = parse_int(m[3]) * (-1 if m[2] == "-" else 1) if m[3] else 0
        return Sym(self.scope.find("names", m[1]) or m[1], offset)

    def address(self, t: str) -> Mem:
        m = re.fullmatch(r"([^\s+,]+?)\s*(?:\+\s*(-?\s*\w+)|(-\s*\w+))?", t)
        if not m:
            raise Unsupported(f"PTX line {self.p.line()}: address [{t}] (tensor maps are out of scope)")
        offset = parse_int((m[2] or m[3] or "0").replace(" ", ""))
        base = self.operand(m[1])
        if isinstance(base, Sym):
            return Mem(Sym(base.name), base.offset + offset)
        if not isinstance(base, Reg | Imm):
            raise self.p.fail(f"bad address [{t}]")
        return Mem(base, offset)
