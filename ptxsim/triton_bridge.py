"""Running ``@triton.jit`` kernels on CPU tensors.

Triton's own JIT specialises and compiles the kernel; a driver that claims an sm_80 device hands the resulting PTX to the
simulator instead of a GPU.  Neither ``ptxas`` nor a GPU is needed: the final (cubin) stage just passes the PTX on.

Triton 3.4 to 3.9 differ in how a driver is kept and a tensor descriptor is taken apart; `_active_driver` and
`_descriptor_parts` know how.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from .errors import CompilerNotFound, PtxSimError
from .launch import Launch, current_options, is_array, options, run
from .memory import poison
from .module import Module

_DEVICE = "ptxsim"
_MAX_SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448}


def _check_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as e:
        raise CompilerNotFound(f"Triton is not installed: {e}") from None


@functools.cache
def _ptx_backend() -> Any:
    """Triton's NVIDIA backend, whose binary of a kernel is the PTX text; its hash keeps these out of the GPU's cache."""
    from triton.backends import backends

    nvidia = backends["nvidia"]
    compiler: Any = nvidia.compiler

    class PtxBackend(compiler):
        def add_stages(self, stages: Any, *args: Any) -> None:
            super().add_stages(stages, *args)
            stages["cubin"] = lambda ptx, metadata: ptx.encode() if isinstance(ptx, str) else ptx

        def hash(self) -> str:
            return f"{super().hash()}-ptxsim"

    return replace(nvidia, compiler=PtxBackend)


def _active_driver() -> Any:
    """The driver in force, or None where none was asked for yet: asking Triton for it would look for a GPU."""
    from triton.runtime import driver

    held = vars(driver)
    return held["_active"] if "_active" in held else held["active"]


def _descriptor_parts(descriptor: Any) -> list[Any]:
    """What a kernel compiled for a GPU without TMA takes in place of a tensor descriptor."""
    try:
        from triton.backends.driver import decompose_descriptor
    except ImportError:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        return make_tensordesc_arg(descriptor, None)
    return decompose_descriptor(descriptor)


class _Utils:
    """The part of Triton's driver utilities that compiling and loading needs."""

    def __init__(self, cc: int):
        self.cc = cc
        self.modules: dict[bytes, Module] = {}

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return dict(
            max_shared_mem=_MAX_SHARED.get(self.cc, 101376),
            multiprocessor_count=108,
            warpSize=32,
            max_num_regs=65536,
            sm_clock_rate=1410000,
            mem_clock_rate=1215000,
            mem_bus_width=5120,
        )

    def load_binary(self, name: str, binary: bytes, shared: int, device: Any):
        if binary not in self.modules:
            self.modules[binary] = Module.from_source(binary.decode())
        return self.modules[binary], (self.modules[binary], name), 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class SimulatedDriver:
    """A Triton driver whose device is the simulator."""

    def __init__(self, cc: int):
        self.cc, self.utils = cc, _Utils(cc)

    def is_active(self) -> bool:
        return True

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.cc, 32)

    def get_current_device(self) -> str:
        return f"{_DEVICE}{self.cc}"

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_interface(self):
        raise PtxSimError("the simulated device cannot time kernels; use stats=True and roofline()")

    def get_empty_cache_for_benchmark(self):
        return None

    def clear_cache(self, cache: Any) -> None:
        pass

    def get_benchmarker(self):
        """Autotuning has nothing to measure: every configuration is equally fast, so the first one wins."""
        return lambda kernel_call, quantiles=None, **kw: [0.0] * len(quantiles or (0,))

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return _Launcher(src, metadata)


class _Launcher:
    """Launches one compiled Triton kernel on the simulator."""

    def __init__(self, src: Any, metadata: Any):
        self.metadata = metadata
        self.types = tuple(src.signature.values())

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: Any,
        function: Any,
        packed: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *args: Any,
    ) -> None:
        module, name = function
        program = module.kernel(name).program
        values = list(_flatten(args, self.types))
        grid = (grid_x, grid_y, grid_z)
        if min(grid) == 0:
            return
        blocks = grid_x * grid_y * grid_z
        for scratch in ("global_scratch_size", "profile_scratch_size"):
            size = getattr(self.metadata, scratch, 0)
            values.append(np.zeros(blocks * size, np.uint8) if size else None)
        values = values[: len(program.params)]
        if len(values) != len(program.params):
            raise PtxSimError(f"{name}: {len(values)} launch values for {len(program.params)} PTX parameters")
        opts = replace(current_options(), strided=True)
        run(
            program,
            grid,
            32 * self.metadata.num_warps,
            self.metadata.shared,
            values,
            module._symbols,
            module._storage,
            opts,
        )


def _flatten(values: Any, types: Any) -> Iterator[Any]:
    """Launch values as kernel parameters: constexprs dropped, tuples and tensor descriptors expanded."""
    for value, ty in zip(values, types):
        if isinstance(ty, tuple):
            yield from _flatten(value, ty)
        elif ty.startswith("tensordesc"):
            yield from _descriptor_parts(value)
        elif ty in _FLOATS:
            yield _FLOATS[ty](value)
        elif ty != "constexpr":
            yield value if value is None or is_array(value) or not hasattr(value, "data_ptr") else value.data_ptr()


_FLOATS = {"fp16": np.float16, "fp32": np.float32, "f32": np.float32, "fp64": np.float64, "f64": np.float64}


@contextmanager
def _poisoned_empty() -> Iterator[None]:
    """``torch.empty`` and its relatives return poisoned CPU tensors."""
    import torch

    names = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    saved = [getattr(owner, name) for owner, name in names]

    def wrap(f: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            t = f(*args, **kwargs)
            if t.device.type == "cpu" and t.numel() and t.is_contiguous() and t.dtype != torch.bool:
                poison(t)
            return t

        return allocate

    for (owner, name), f in zip(names, saved):
        setattr(owner, name, wrap(f))
    try:
        yield
    finally:
        for (owner, name), f in zip(names, saved):
            setattr(owner, name, f)


@contextmanager
def triton_on_cpu(cc: int = 80, poison_empty: bool = False) -> Iterator[None]:
    """Inside the ``with`` block every ``kernel[grid](...)`` on CPU tensors runs on the simulator.

    ``cc`` is the compute capability to compile for; 80 avoids Hopper-only instructions.  ``poison_empty`` makes
    ``torch.empty`` return poisoned tensors, so that kernels which read unwritten outputs are found.  Combine with
    :func:`ptxsim.options` to choose checks, statistics or a schedule seed.
    """
    _check_triton()
    from triton.backends import backends
    from triton.runtime import driver

    previous, nvidia = _active_driver(), backends["nvidia"]
    driver.set_active(_drivers.setdefault(cc, SimulatedDriver(cc)))
    backends["nvidia"] = _ptx_backend()
    try:
        with _poisoned_empty() if poison_empty else nullcontext():
            yield
    finally:
        driver.set_active(previous)
        backends["nvidia"] = nvidia


_drivers: dict[int, SimulatedDriver] = {}


def run_triton(kernel: Any, grid: Any, *args: Any, cc: int = 80, **meta: Any) -> Launch:
    """Run a ``@triton.jit`` kernel on CPU tensors and return the launch record.

    ``grid`` is an int, a tuple or a function of the meta-parameters; ``meta`` are constexprs, ``num_warps`` and so on.
    Options are those in force (see :func:`ptxsim.options`).
    """
    with options() as log, triton_on_cpu(cc):
        kernel[grid if callable(grid) or isinstance(grid, tuple) else (grid,)](*args, **meta)
    return log[-1]


def triton_ptx(
    kernel: Any,
    args: tuple,
    constexprs: Mapping[str, Any] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
    cc: int = 80,
) -> tuple[str, Any]:
    """PTX text and metadata of a ``@triton.jit`` kernel specialised for ``args``, without running it."""
    with triton_on_cpu(cc):
        compiled = kernel.warmup(*args, grid=(1,), num_warps=num_warps, num_stages=num_stages, **(constexprs or {}))
    return compiled.asm["ptx"], compiled.metadata
