"""Modules and kernels: the entry point of the library."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .errors import PtxSimError
from .ir import PtxModule
from .launch import Launch, current_options, run
from .link import Program, link
from .parse import parse


class Module:
    """A loaded PTX module.  ``.global`` and ``.const`` variables live as long as the module, as on a device."""

    def __init__(self, ptx: PtxModule):
        self.ptx = ptx
        self._storage: dict[str, np.ndarray] = {}
        self._symbols: dict[str, int] = {}
        self._programs: dict[str, Program] = {}
        for v in ptx.variables.values():
            if v.space in ("global", "const"):
                data = _aligned(max(v.size, 1), 256)
                if v.init:
                    data[: len(v.init)] = np.frombuffer(v.init, np.uint8)
                self._storage[v.name], self._symbols[v.name] = data, data.ctypes.data

    @classmethod
    def from_source(cls, text: str) -> Module:
        """Module from PTX text."""
        return cls(parse(text))

    @classmethod
    def from_file(cls, path: str | Path) -> Module:
        """Module from a ``.ptx`` file."""
        return cls.from_source(Path(path).read_text())

    @property
    def kernels(self) -> list[str]:
        """Names of the entries, as in the PTX."""
        return [f.name for f in self.ptx.functions.values() if f.is_entry]

    def kernel(self, name: str) -> Kernel:
        """The kernel called ``name``: exact, or the unmangled name, or a prefix of either if only one entry has it."""
        exact = [k for k in self.kernels if name in (k, unmangle(k), unmangle(k).split("::")[-1])]
        found = exact or [k for k in self.kernels if k.startswith(name) or unmangle(k).split("::")[-1].startswith(name)]
        if len(found) != 1:
            listing = ", ".join(f"{unmangle(k)} ({k})" for k in (found or self.kernels))
            raise PtxSimError(
                f"kernel {name!r} is {'ambiguous' if found else 'not in the module'}; candidates: {listing}"
            )
        if found[0] not in self._programs:
            self._programs[found[0]] = link(self.ptx, found[0])
        return Kernel(self, self._programs[found[0]])

    def variable(self, name: str, dtype: Any = np.uint8) -> np.ndarray:
        """Writable view of a ``__device__``/``__constant__`` variable, as a flat array of ``dtype``."""
        found = [n for n in self._storage if name in (n, unmangle(n), unmangle(n).split("::")[-1])]
        if len(found) != 1:
            raise PtxSimError(f"variable {name!r} not found; the module has {sorted(self._storage)}")
        return self._storage[found[0]].view(dtype)


class Kernel:
    """A kernel of a module; ``kernel[grid, block, dynamic_shared](*args, **options)`` launches it.

    grid, block      int or tuple of up to three ints
    dynamic_shared   bytes of dynamic shared memory (default 0)
    args             numpy arrays or CPU torch tensors (used in place), numbers (typed by the parameter's declaration),
                     ``bytes`` or ``ctypes.Structure`` for structs, None or an int address for pointers
    options          fields of :class:`ptxsim.Options`
    """

    def __init__(self, module: Module, program: Program):
        self.module, self.program = module, program
        self.name = program.name

    def __getitem__(self, config: Any) -> _Configured:
        if not isinstance(config, tuple) or not 2 <= len(config) <= 3:
            raise PtxSimError("launch as kernel[grid, block](...) or kernel[grid, block, dynamic_shared](...)")
        return _Configured(self, config[0], config[1], config[2] if len(config) == 3 else 0)


class _Configured:
    def __init__(self, kernel: Kernel, grid: Any, block: Any, dynamic_shared: int):
        self.kernel, self.grid, self.block, self.dynamic_shared = kernel, grid, block, dynamic_shared

    def __call__(self, *args: Any, **changes: Any) -> Launch:
        opts = replace(current_options(), **changes) if changes else current_options()
        module = self.kernel.module
        return run(
            self.kernel.program,
            self.grid,
            self.block,
            self.dynamic_shared,
            args,
            module._symbols,
            module._storage,
            opts,
        )


def unmangle(name: str) -> str:
    """Qualified name inside an Itanium-mangled symbol (``_ZN2ns4kernE...`` -> ``ns::kern``), arguments dropped."""
    m = re.match(r"_ZN?(?=\d)", name)
    if not m:
        return name
    parts, rest = [], name[m.end() :]
    while d := re.match(r"\d+", rest):
        n = int(d[0])
        parts.append(rest[d.end() : d.end() + n])
        rest = rest[d.end() + n :]
        if not m[0].endswith("N"):
            break
    return "::".join(parts)


def _aligned(nbytes: int, align: int) -> np.ndarray:
    """uint8[nbytes] of zeros whose address is a multiple of ``align``."""
    raw = np.zeros(nbytes + align, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start : start + nbytes]
