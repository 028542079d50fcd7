"""Random structured programs, compared with a scalar interpreter that runs one thread at a time."""

import numpy as np
import pytest

from ptxsim.tests.ptx_support import entry

MASK = 0xFFFFFFFF
REGS = 6
OPS = {
    "add.u32": lambda a, b: a + b & MASK,
    "sub.u32": lambda a, b: a - b & MASK,
    "mul.lo.u32": lambda a, b: a * b & MASK,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "min.u32": min,
    "max.u32": max,
    "shr.u32": lambda a, b: a >> b if b < 32 else 0,
}


class Program:
    """A random program as PTX text and as a list of Python closures on a register list."""

    def __init__(self, rng):
        self.rng, self.labels, self.text = rng, 0, []
        self.body = self.block(3)

    def label(self):
        self.labels += 1
        return f"L{self.labels}"

    def block(self, depth):
        kinds = [self.op] * 4 + ([self.branch, self.loop, self.predicated, self.skip] if depth else [self.predicated])
        return [kinds[self.rng.integers(len(kinds))](depth) for _ in range(self.rng.integers(2, 6))]

    def op(self, depth):
        d, a, b = (int(x) for x in self.rng.integers(0, REGS, 3))
        name = str(self.rng.choice(list(OPS)))
        self.text.append(f"{name} %r{d}, %r{a}, %r{b};")

        def run(r):
            r[d] = OPS[name](r[a], r[b])

        return run

    def condition(self):
        a, bit = int(self.rng.integers(0, REGS)), int(self.rng.integers(0, 7))
        self.text.append(f"shr.u32 %r9, %r{a}, {bit}; and.b32 %r9, %r9, 1; setp.ne.u32 %p1, %r9, 0;")
        return lambda r: r[a] >> bit & 1

    def predicated(self, depth):
        test = self.condition()
        start = len(self.text)
        run = self.op(depth)
        self.text[start] = "@%p1 " + self.text[start]
        return lambda r: run(r) if test(r) else None

    def skip(self, depth):
        """A branch around a block."""
        test, end = self.condition(), self.label()
        self.text.append(f"@%p1 bra {end};")
        body = self.block(depth - 1)
        self.text.append(f"{end}:")
        return lambda r: None if test(r) else [s(r) for s in body]

    def branch(self, depth):
        test, other, end = self.condition(), self.label(), self.label()
        self.text.append(f"@!%p1 bra {other};")
        yes = self.block(depth - 1)
        self.text.append(f"bra.uni {end}; {other}:")
        no = self.block(depth - 1)
        self.text.append(f"{end}:")
        return lambda r: [s(r) for s in (yes if test(r) else no)]

    def loop(self, depth):
        """A loop whose trip count, 0 to 3, depends on a register."""
        a, counter, top, end = int(self.rng.integers(0, REGS)), f"%c{self.labels}", self.label(), self.label()
        self.text.append(
            f"{{ .reg .b32 {counter}; and.b32 {counter}, %r{a}, 3; {top}: setp.eq.u32 %p1, {counter}, 0; @%p1 bra {end};"
        )
        body = self.block(depth - 1)
        self.text.append(f"sub.u32 {counter}, {counter}, 1; bra {top}; {end}: }}")

        def run(r):
            for _ in range(r[a] & 3):
                for s in body:
                    s(r)

        return run


@pytest.mark.parametrize("case", range(40))
def test_random_program(case):
    rng = np.random.default_rng(case)
    program = Program(rng)
    threads, blocks = int(rng.choice([20, 64, 96])), 3
    text = " ".join(f"mad.lo.u32 %r{k}, %i, {int(rng.integers(1, 99999))}, %r20;" for k in range(REGS))
    factors = [int(t.split(",")[2]) for t in text.split(";") if t.strip()]
    stores = " ".join(f"st.global.u32 [%d1+{4 * k}], %r{k};" for k in range(REGS))
    module = entry(f"""mov.u32 %r20, %ctaid.x; {text} {chr(10).join(program.text)}
      mov.u32 %r21, %ntid.x; mad.lo.u32 %r22, %r20, %r21, %i; mad.wide.u32 %d1, %r22, {4 * REGS}, %base; {stores}""")
    want = np.zeros((blocks, threads, REGS), np.uint32)
    for b in range(blocks):
        for t in range(threads):
            r = [(t * f + b) & MASK for f in factors]
            for statement in program.body:
                statement(r)
            want[b, t] = r
    for seed, batch in ((None, 16384), (case, 64)):
        got = np.zeros_like(want)
        module.kernel("k")[blocks, threads](got, seed=seed, batch=batch)
        np.testing.assert_array_equal(got, want)
