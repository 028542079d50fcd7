"""Which implementation runs an operator: the choice by device, its overrides, and the reasons when one is missing.

Every operator is registered twice: `torch.ops.safnet_ops` holds the compiled kernels (C++ under the CPU key, CUDA C++ under the
CUDA key), `torch.ops.safnet_ops_triton` the Triton ones. schemas.txt has their signatures. The library of C++ kernels defines
the compiled ones, so that programs without Python have them; where nothing was compiled they are defined here, as fakes,
torch.compile and the Triton kernels need them.
"""

import contextlib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from safnet_ops.operators import OPERATORS

BACKENDS = ("reference", "cpp", "cuda", "triton")

_SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_LIBRARIES = {
    "cpp": f"libsafnet_ops{_SUFFIX}",
    "cuda": f"libsafnet_ops_cuda{_SUFFIX}",
}  # of shared objects without Python

_PREFERRED = {
    "cpu": ("cpp",),
    "cuda": ("cuda", "triton"),
}  # device type -> backends, the first that has a kernel serves
_missing: dict[str, str] = {}  # backend -> why none of its kernels can run
_served: dict[str, frozenset[str]] = {"reference": frozenset(OPERATORS)}  # backend -> operators it has kernels for
_forced: ContextVar[str | None] = ContextVar("safnet_ops backend", default=None)  # by the innermost `use_backend`
_blocks: list["_Block"] = []  # of `use_backend` in all threads, for torch.compile, which reads no context variables


def _load_library(backend: str) -> None:
    """Load the library of this backend's kernels, or note why it is missing. Never fails, never builds."""
    path = _path(backend)
    if not path.is_file():
        _missing[backend] = _why_not_built(path.name)
        return
    if backend == "cuda" and torch.version.cuda is None:
        _missing[backend] = f"{path.name} was built, but this torch has no CUDA"
        return
    try:
        torch.ops.load_library(path)
    except OSError as error:
        _missing[backend] = f"{path.name} failed to load: {error}"


def _path(backend: str) -> Path:
    return Path(__file__).with_name(_LIBRARIES[backend])


def _why_not_built(library: str) -> str:
    report = Path(__file__).with_name("build_report.json")
    reason = json.loads(report.read_text())["missing"].get(library) if report.is_file() else None
    return f"{library} was not built: {reason or 'pip install was not run on this checkout'}"


_load_library("cpp")
COMPILED = torch.library.Library("safnet_ops", "FRAGMENT")
TRITON = torch.library.Library("safnet_ops_triton", "DEF")
_SCHEMAS = {
    line.partition("(")[0]: line
    for line in Path(__file__).with_name("schemas.txt").read_text().splitlines()
    if not line.startswith("#")
}


def define(name: str, fake: Callable[..., Any]) -> None:
    """Define an operator of schemas.txt for the compiled and for the Triton kernels, with its fake (meta) implementation.

    Raises:
        ImportError: the library of C++ kernels has defined it with another signature.
    """
    for library in (COMPILED, TRITON):
        operators = getattr(torch.ops, library.ns)
        if not hasattr(operators, name):
            library.define(_SCHEMAS[name])
        elif getattr(operators, name).default._schema != torch._C.parse_schema(f"{library.ns}::{_SCHEMAS[name]}"):
            raise ImportError(
                f"{_path('cpp')} was built from other sources, with another {name}: run pip install again"
            )
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)


def load() -> None:
    """Find what kernels this installation has for the operators, and why others are missing. Never fails, never builds."""
    _load_library("cuda")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for backend, key in (("cpp", "CPU"), ("cuda", "CUDA")):
        if backend not in _missing:
            _served[backend] = frozenset(name for name in OPERATORS if has_kernel(f"safnet_ops::{name}", key))
    _load_triton()


def libraries() -> tuple[Path, ...]:
    """The shared libraries of this installation's C++ and CUDA kernels: what programs without Python load.

    Loading the first defines the operators. They need libtorch 2.11 or newer, and no Python.
    """
    return tuple(_path(backend) for backend in _LIBRARIES if backend not in _missing)


def _load_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        _missing["triton"] = "the package triton is not installed (it exists for Linux: pip install triton)"
        return
    if importlib.util.find_spec("safnet_ops.triton") is None:
        _missing["triton"] = "this installation has no Triton kernels"
        return
    try:
        kernels = importlib.import_module("safnet_ops.triton").KERNELS
    except ImportError as error:
        _missing["triton"] = f"triton failed to load: {error}"
        return
    for name, kernel in kernels.items():
        TRITON.impl(name, kernel, "CUDA")
        TRITON.impl(name, kernel, "CPU")  # where an interpreter of device code launches it
    _served["triton"] = frozenset(OPERATORS)


def serves(operator: str, backend: str) -> bool:
    """Whether this installation has a kernel of `backend` for `operator`."""
    return operator in _served.get(backend, frozenset())


def why_missing(operator: str, backend: str) -> str | None:
    """The reason why `backend` cannot run `operator`, or None if it can."""
    if serves(operator, backend):
        return None
    return _missing.get(backend, f"the {backend} backend has no kernel for it")


class _Block:
    def __init__(self, backend: str) -> None:
        self.backend = backend


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run all operators called in this block with one backend: "reference", "cpp", "cuda" or "triton".

    It holds for the thread or task that enters the block, as context variables do; a new thread starts without it. `backend=`
    of a call wins over it. Gradients are computed by the backend that computed the result, in whatever thread backward runs.
    A function that torch.compile has compiled takes the block entered last in any thread.

    Raises:
        ValueError: there is no such backend.
    """
    _check_name("use_backend", name)
    block = _Block(name)
    _blocks.append(block)
    before = None if torch.compiler.is_compiling() else _forced.set(name)
    try:
        yield
    finally:
        _blocks.remove(block)
        if before is not None:
            _forced.reset(before)


def forced_backend() -> str | None:
    """The innermost `use_backend`'s choice."""
    if not torch.compiler.is_compiling():
        return _forced.get()
    return _blocks[-1].backend if _blocks else None


def choose(operator: str, device: torch.device, backend: str | None) -> str:
    """The backend that runs `operator` on tensors of `device`; `backend` and `use_backend` override the default.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: the backend asked for cannot run the operator here; the message says why.
    """
    if backend is None:
        backend = forced_backend()
    if backend is None:
        for name in _PREFERRED.get(device.type, ()):
            if serves(operator, name):
                return name
        return "reference"
    _check_name(operator, backend)
    if not serves(operator, backend):
        raise RuntimeError(f"{operator}: backend {backend!r} is not available: {why_missing(operator, backend)}")
    if (backend == "cpp" and device.type != "cpu") or (backend == "cuda" and device.type != "cuda"):
        raise RuntimeError(f"{operator}: backend {backend!r} cannot run tensors on device {str(device)!r}")
    return backend


def _check_name(operator: str, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{operator}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
