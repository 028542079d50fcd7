"""The CUDA operators on CPU tensors: their own host code, and their kernels' PTX executed by ptxsim.

csrc/cuda/*.cu is compiled as for a GPU, but linked with a stand-in for the CUDA runtime (cuda_runtime.cpp), and
registered as torch.ops.safnet_ops_simulated. So the launch plans, argument structs, allocations and dispatch under test
are the shipped ones. Outputs and workspaces start out poisoned: reading what nothing wrote is a fault, as is any access
outside a tensor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ptxsim
from ptxsim.module import Kernel, Module
from safnet_ops.autograd import bind
from safnet_ops.operators import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
RUNTIME = Path(__file__).with_name("cuda_runtime.cpp")
NAMESPACE = "safnet_ops_simulated"
FLAGS = (
    "-std=c++17",
    "-O0",  # of the host code; device code is optimised always
    "-Xcompiler=-fPIC",
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-I{sysconfig.get_path('include')}",
)

_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.POINTER(ctypes.c_uint * 3),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)
_ALLOCATION = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
_SHARED_LIMIT = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int)


class Device:
    """The simulated GPU: loaded kernels, the buffers they may touch, and the first fault they raised."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.modules: dict[str, Module] = {}
        self.kernels: dict[str, Kernel] = {}
        self.buffers: list[Any] = []
        self.fault: Exception | None = None
        self.launches: Counter[str] = Counter()
        self.shared_limits: Counter[tuple[str, int]] = Counter()  # how often a kernel was allowed how many bytes
        self._executes = True
        self._names: dict[str, Path] = {}
        for ptx in folder.glob("*.ptx"):
            for line in ptx.read_text().splitlines():
                if ".entry " in line:
                    self._names[line.split(".entry ")[1].split("(")[0].strip()] = ptx
        self.runtime = ctypes.CDLL(str(folder / "libcudart_simulated.so"), mode=ctypes.RTLD_GLOBAL)
        self._callbacks = _LAUNCH(self._launch), _ALLOCATION(self._allocation), _SHARED_LIMIT(self._shared_limit)
        self.runtime.simulated_callbacks(*self._callbacks)

    def saw(self, part: str) -> bool:
        """Whether a kernel with this in its (mangled) name has run so far."""
        return any(part in name for name in self.launches)

    @contextmanager
    def capability(self, capability: int) -> Iterator[None]:
        """Host code sees a GPU of this compute capability in the block; otherwise it sees 9.0."""
        self.runtime.simulated_capability(capability)
        try:
            yield
        finally:
            self.runtime.simulated_capability(90)

    @contextmanager
    def checking_launches_only(self) -> Iterator[None]:
        """Launches are checked in the block, but kernels do not run: for grids too large to execute."""
        self._executes = False
        try:
            yield
        finally:
            self._executes = True

    def _kernel(self, name: str) -> Kernel:
        if name not in self.kernels:
            path = str(self._names[name])
            if path not in self.modules:
                self.modules[path] = Module.from_file(path)
            self.kernels[name] = self.modules[path].kernel(name)
        return self.kernels[name]

    def _launch(self, name: bytes, grid: Any, block: Any, shared: int, arguments: Any) -> int:
        try:
            kernel = self._kernel(name.decode())
            values = [ctypes.string_at(arguments[i], p.size) for i, p in enumerate(kernel.program.params)]
            if self._executes:
                kernel[tuple(grid.contents), tuple(block.contents), shared](*values, buffers=self.buffers)
            self.launches[name.decode()] += 1
            return 0
        except Exception as error:
            self.fault = self.fault or error
            return 1

    def _allocation(self, data: int, size: int) -> None:
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(data))
        self.buffers.append(ptxsim.poison(array))

    def _shared_limit(self, name: bytes, size: int) -> None:
        self.shared_limits[name.decode(), size] += 1

    def call(self, operator: str, *arguments: Any) -> Any:
        """Run an operator; a fault of a kernel is raised as what it is."""
        self.buffers = [extent(value) for value in arguments if isinstance(value, torch.Tensor) and value.numel()]
        self.fault = None
        try:
            return getattr(getattr(torch.ops, NAMESPACE), operator)(*arguments)
        except RuntimeError:
            if self.fault is not None:
                raise self.fault from None
            raise
        finally:
            self.buffers = []


def kernel_name(mangled: str) -> str:
    """The name in the source, without template arguments."""
    length, rest = re.match(r"_ZN6safnet4cuda(\d+)(.*)", mangled).groups()  # type: ignore[union-attr]
    return rest[: int(length)]


def extent(tensor: torch.Tensor) -> np.ndarray:
    """The bytes between a tensor's first and last element, whatever its strides."""
    count = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = count * tensor.element_size()
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(tensor.data_ptr()))


@cache
def device() -> Device:
    """Build what changed, load it, and register the operators. Takes a minute or two the first time."""
    folder = build()
    found = Device(folder)
    library = torch.library.Library(NAMESPACE, "DEF")
    for name in (name for operator in OPERATORS.values() for name in operator.registered):
        schema = str(getattr(torch.ops.safnet_ops, name).default._schema)
        library.define(schema.removeprefix("safnet_ops::"))
    device.library = library  # type: ignore[attr-defined]  # the operators live as long as it does
    torch.ops.load_library(str(folder / "simulated.so"))
    return found


def build() -> Path:
    """Compile csrc/cuda into build/simulated, each file only if it or a header changed."""
    nvcc = ptxsim.find_nvcc()
    assert nvcc is not None
    root = ROOT / "build" / "simulated"
    root.mkdir(parents=True, exist_ok=True)
    sources = sorted(CSRC.glob("cuda/*.cu"))
    keys = {
        source: f"{source.stem}-{digest(_with_includes(source), nvcc, torch.__version__, *FLAGS)}" for source in sources
    }
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 2))) as pool:
        list(pool.map(lambda source: _compile(nvcc, source, root / keys[source]), sources))
    folder = root / f"linked-{digest([RUNTIME], *keys.values())}"
    if not folder.exists():
        partial = root / f"{folder.name}.{os.getpid()}"
        partial.mkdir()
        for source in sources:
            os.link(root / keys[source] / f"{source.stem}.ptx", partial / f"{source.stem}.ptx")
        runtime = partial / "libcudart_simulated.so"
        _run("g++", "-std=c++17", "-O1", "-shared", "-fPIC", str(RUNTIME), "-o", str(runtime))
        libraries = Path(torch.__file__).parent / "lib"
        objects = [str(root / keys[source] / f"{source.stem}.o") for source in sources]
        _run(
            "g++", "-shared", *objects, "-o", str(partial / "simulated.so"), f"-L{libraries}", "-ltorch_cpu", "-ltorch"
        )
        with suppress(OSError):  # another process was faster
            partial.rename(folder)
    return folder


def _compile(nvcc: str, source: Path, target: Path) -> None:
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.mkdir()
    include = Path(torch.__file__).parent / "include"
    arch = "-gencode=arch=compute_80,code=compute_80"
    keep = ("-lineinfo", "-keep", "-keep-dir", str(partial))
    _run(
        nvcc, "-c", *FLAGS, "-DSAFNET_OPS_SIMULATED", f"-I{CSRC}", f"-I{include}", arch, *keep, str(source),
        "-o", str(partial / f"{source.stem}.o"),
    )  # fmt: skip
    for file in partial.iterdir():
        if file.suffix not in (".o", ".ptx"):
            file.unlink()
    with suppress(OSError):
        partial.rename(target)


def compile_for_turing(stem: str) -> Path:
    """The PTX of one source for compute capability 7.5, which has its own code path (and its own compilation)."""
    nvcc = ptxsim.find_nvcc()
    assert nvcc is not None
    source = CSRC / "cuda" / f"{stem}.cu"
    target = ROOT / "build" / "simulated" / f"{stem}-{digest(_with_includes(source), 'compute_75')}.ptx"
    if not target.exists():
        include = Path(torch.__file__).parent / "include"
        partial = target.with_suffix(f".{os.getpid()}")
        _run(nvcc, "-ptx", *FLAGS, f"-I{CSRC}", f"-I{include}", "-arch=compute_75", str(source), "-o", str(partial))
        partial.rename(target)
    return target


def _with_includes(source: Path) -> list[Path]:
    """A source and the files of csrc/ that it includes, directly or not."""
    found: dict[Path, None] = {}
    pending = [source]
    while pending:
        file = pending.pop()
        if file in found or not file.is_file():
            continue
        found[file] = None
        pending += [CSRC / name for name in re.findall(r'^#include "([^"]+)"', file.read_text(), re.M)]
    return sorted(found)


def digest(files: list[Path], *words: str) -> str:
    found = hashlib.sha256("\0".join(words).encode())
    for file in files:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:20]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


class RealDevice:
    """A GPU in the place of the simulated one: the same calls on the same tensors, copied there.

    Copies keep strides and misalignment: new memory starts at a multiple of `ALIGNMENT` bytes, a tensor that starts
    between such multiples must do so there, too.
    """

    ALIGNMENT = 64

    def __init__(self, backend: str) -> None:
        self.launches: Counter[str] = Counter()  # not known here
        self.operators = torch.ops.safnet_ops if backend == "cuda" else torch.ops.safnet_ops_triton

    def call(self, operator: str, *arguments: Any) -> Any:
        there = [self._copy(value) if isinstance(value, torch.Tensor) else value for value in arguments]
        found = getattr(self.operators, operator)(*there)
        return found.cpu() if isinstance(found, torch.Tensor) else tuple(value.cpu() for value in found)

    @classmethod
    def _copy(cls, value: torch.Tensor, device: str = "cuda") -> torch.Tensor:
        if value.numel() == 0:
            return value.to(device)
        count = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
        before = value.data_ptr() % cls.ALIGNMENT // value.element_size()
        there = torch.empty(before + count, dtype=value.dtype, device=device)
        there[before:].copy_(value.detach().as_strided((count,), (1,)))
        return there.as_strided(value.shape, value.stride(), before)

    @contextmanager
    def checking_launches_only(self) -> Iterator[None]:
        yield

    def saw(self, part: str) -> bool:
        return True

    def capability(self, capability: int) -> Any:
        import pytest

        pytest.skip("a GPU has the capability it has")


def run_operators_on(device: Device | RealDevice, patch: Callable[[str, Any], None]) -> None:
    """Let the public functions of safnet_ops run on `device`, given CPU tensors.

    `patch(dotted name, value)` replaces an attribute.
    """
    rules = {
        name: bind(name, partial(device.call, name), lambda name: rules[name].call)
        for operator in OPERATORS.values()
        for name in operator.registered
    }
    for module in OPERATORS:
        patch(f"safnet_ops.{module}.choose", lambda operator, device, backend: backend or "cuda")
        patch(f"safnet_ops.{module}.kernel", lambda backend, name: rules[name].call)
