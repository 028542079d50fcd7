"""What the Triton kernels cost: registers from machine code, modelled costs from executed device code, host time of a call.

Registers are those of the kernels that the library launches for `CALLS`, in every autotuning configuration, by Triton's own
ptxas. Modelled costs are of the same calls, and by the same model, as the CUDA kernels' (`cuda_costs`): lower bounds by
instruction and byte counts, not times. `python -m tools.kernel_costs` writes and prints them.
"""

import contextlib
import functools
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import ptxsim
import safnet_ops
from operator_inputs import (
    census_inputs,
    conv_inputs,
    fusion_inputs,
    positional_inputs,
    upsample_inputs,
    warp_inputs,
)
from ptxsim import triton_bridge
from safnet_ops.operators import OPERATORS
from safnet_ops.triton import launching
from simulated_gpu import cuda_costs

ARCHITECTURES = (80, 90, 100)
_numbers = itertools.count()
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """One compiled variant of a kernel: what Triton needs to compile it again for another GPU."""

    name: str
    source: Any
    options: dict[str, Any]

    @property
    def constants(self) -> dict[str, Any]:
        return {self.source.fn.arg_names[path[0]]: value for path, value in self.source.constants.items()}

    @property
    def configuration(self) -> str:
        """Tile and warps, as in "BLOCK 128, 4 warps"; tiles of two heights as in "BLOCK_M 32+16"."""
        constants = self.constants
        blocks = [f"{name} {value}" for name, value in constants.items() if name.startswith(("BLOCK", "TILE"))]
        if constants.get("REST_M"):
            blocks[0] += f"+{constants['REST_M']}"
        return ", ".join([*blocks, f"{self.options['num_warps']} warps"])

    @property
    def identity(self) -> str:
        """Equal for the variants that differ in the width of their offsets only."""
        constants = {name: str(value) for name, value in self.constants.items() if name != "WIDE"}
        return f"{self.name} {constants} {self.source.signature} {self.options}"


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, and bytes of stack and local memory (spills); per block: bytes of shared memory."""

    registers: int
    stack: int
    shared: int

    def __str__(self) -> str:
        return f"{self.registers} + {self.stack} B spilled" if self.stack else str(self.registers)


class _Recorder(triton_bridge.SimulatedDriver):
    """A driver that notes what is launched and runs nothing; with `all_configurations`, autotuning tries every one."""

    def __init__(self, all_configurations: bool):
        super().__init__(80)
        self.kernels: dict[str, Kernel] = {}
        self.all_configurations = all_configurations
        self.name = f"recorder {next(_numbers)}"

    def get_current_device(self) -> str:
        return self.name  # kernels are compiled, and so noted, anew for each recorder

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        options = {name: getattr(metadata, name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        name = f"{src.fn.__module__.rpartition('.')[2]}.{metadata.name.strip('_')}"
        self.kernels[metadata.hash] = Kernel(name, src, options)
        return lambda *args: None

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def try_once(call: Callable[[], Any], quantiles: Any = None, **_: Any) -> list[float]:
            if self.all_configurations:
                call()
            return [0.0] * len(quantiles or (0,))

        return try_once


@contextlib.contextmanager
def recording(all_configurations: bool = True) -> Iterator[dict[str, Kernel]]:
    """Library calls on CPU tensors in this block compile their Triton kernels but do not run them; yields the kernels."""
    recorder = _Recorder(all_configurations)
    from triton.runtime import driver

    with ptxsim.triton_on_cpu():
        driver.set_active(recorder)
        forget_tuning()
        yield recorder.kernels
    forget_tuning()


def tuners() -> list[Any]:
    """The autotuners of all Triton kernels in the library."""
    modules = [module for name, module in sys.modules.items() if name.startswith("safnet_ops.triton.")]
    values = [value for module in modules for value in vars(module).values()]
    flat = [part for value in values for part in (value.values() if isinstance(value, dict) else [value])]
    return [value for value in flat if isinstance(value, triton.runtime.Autotuner)]


def forget_tuning() -> None:
    """Empty the autotuners' caches, so that every configuration is compiled again; and forget the driver's benchmarker."""
    for tuner in tuners():
        tuner.cache.clear()
        tuner.__dict__.pop("do_bench", None)


def compile_for(kernel: Kernel, architecture: int) -> Resources:
    """Compile to machine code; read the resources from it with the cuobjdump that comes with Triton."""
    compiled = triton.compile(kernel.source, target=GPUTarget("cuda", architecture, 32), options=kernel.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = _RESOURCES.findall(text)
    assert len(found) == 1, text
    registers, stack, _, local = map(int, found[0])
    return Resources(registers, stack + local, compiled.metadata.shared)


# --- registers: what is compiled


@dataclass(frozen=True)
class Call:
    """A call of an operator as SAFNet makes it, forward and backward with all gradients."""

    operator: str
    dtype: torch.dtype
    channels_last: bool
    variant: str = ""
    exact: bool = True  # float32 convolutions: False for TF32

    @property
    def name(self) -> str:
        return ", ".join(part for part in (self.operator, self.variant, self.types, self.layout) if part)

    @property
    def is_usual(self) -> bool:
        return self.variant in ("", "120 channels, 3 groups")

    @property
    def in_every_configuration(self) -> bool:
        """Whether the table shows all of them; the convolution's are checked by `pytest -m slow`, as they take minutes."""
        usual = self.is_usual and self.operator != "group_conv_shuffle"
        return usual and self.dtype in (torch.float32, torch.float16)

    @property
    def types(self) -> str:
        if self.operator != "group_conv_shuffle" or self.dtype != torch.float32:
            return str(self.dtype)[6:]
        return "float32, exact" if self.exact else "float32 as TF32"

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    def __call__(self, size: tuple[int, int] = (16, 16)) -> None:
        was_deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(self.variant == "deterministic")
        try:
            with _float32_products("ieee" if self.exact else "tf32"):
                self._run(size)
        finally:
            torch.use_deterministic_algorithms(was_deterministic)

    def _run(self, size: tuple[int, int]) -> None:
        inputs = [self._arranged(value) for value in self._inputs(size)]
        options: dict[str, Any] = {"backend": "triton"}
        if self.operator == "upsample_fuse":
            with torch.no_grad():
                safnet_ops.upsample_fuse(*inputs, **options)
            return
        if self.operator == "group_conv_shuffle":
            options["groups"] = self._channels_and_groups[1]
        elif len(inputs) == 10:
            inputs, options = inputs[:7], options | {"weights": tuple(inputs[7:]), "mask_logits": True}
        out = getattr(safnet_ops, self.operator)(*inputs, **options)
        out.backward(torch.ones_like(out))

    @property
    def _channels_and_groups(self) -> tuple[int, int]:
        channels, groups = map(int, re.findall(r"\d+", self.variant))
        return channels, groups

    def _inputs(self, size: tuple[int, int]) -> list[Tensor]:
        """As the model has them: flows and masks are float32, or float64 as the pictures."""
        geometry = torch.float64 if self.dtype == torch.float64 else torch.float32
        if self.operator == "backward_warp":
            return warp_inputs(size, channels=40, dtype=self.dtype, flow_dtype=geometry)
        if self.operator == "census_loss":
            return census_inputs(size, dtype=self.dtype)
        if self.operator == "group_conv_shuffle":
            channels, groups = self._channels_and_groups
            return conv_inputs(size, (channels, channels), groups, dtype=self.dtype)[:4]
        if self.operator == "upsample_fuse":
            return upsample_inputs(size, dtype=self.dtype, geometry=geometry)
        weights = (3, 3, 3) if self.variant == "explicit weights, logits" else ()
        return fusion_inputs(size, dtype=self.dtype, geometry=geometry, weights=weights)

    def _arranged(self, value: Tensor) -> Tensor:
        """Pictures in the layout; flows, masks and filters stay contiguous."""
        is_picture = value.dim() == 4 and value.shape[1] > 2 and value.shape[0] == 1
        layout = torch.channels_last if self.channels_last and is_picture else torch.contiguous_format
        return value.to(memory_format=layout).requires_grad_()  # also where the sizes tell no layout


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = conv.fp32_precision
    conv.fp32_precision = precision
    try:
        yield
    finally:
        conv.fp32_precision = before


def _calls() -> list[Call]:
    """Every type and layout; of what is not an operator's usual call, float32 (float16 and TF32 for tensor cores)."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    found = [
        Call(operator, dtype, last)
        for operator in OPERATORS
        if operator != "group_conv_shuffle"  # whose usual call names its channels
        for dtype in dtypes
        for last in (False, True)
    ]
    for last in (False, True):
        found += [
            Call(operator, torch.float32, last, variant)
            for operator, variant in (
                ("backward_warp", "deterministic"),
                ("fused_fuse", "deterministic"),
                ("fused_fuse", "explicit weights, logits"),
            )
        ]
        conv = "group_conv_shuffle"
        found += [Call(conv, dtype, last, "120 channels, 3 groups") for dtype in dtypes]
        found += [Call(conv, torch.float32, last, "120 channels, 3 groups", exact=False)]
        found += [Call(conv, torch.float16, last, "80 channels, 1 group")]
        found += [Call(conv, torch.float32, last, "80 channels, 1 group", exact=False)]
    return found


CALLS = _calls()


@dataclass
class Row:
    """A kernel in one configuration, compiled for every architecture."""

    operator: str
    variant: str
    types: str
    kernel: Kernel
    layouts: set[str] = field(default_factory=set)
    found: dict[tuple[int, bool], Resources] = field(default_factory=dict)  # by architecture and 64-bit offsets

    def __str__(self) -> str:
        cells = []
        for architecture in ARCHITECTURES:
            narrow, wide = self.found.get((architecture, False)), self.found.get((architecture, True))
            cells.append(f"{narrow} ({wide})" if wide else str(narrow))
        name = f"{self.operator}: {self.kernel.name.rpartition('.')[2].replace('_', ' ')}"
        variant = f", {self.variant}" if self.variant else ""
        layout = "any" if len(self.layouts) > 1 else next(iter(self.layouts))
        shared = max(found.shared for found in self.found.values())
        cells = [name + variant, self.types, layout, self.kernel.configuration, *cells, str(shared)]
        return f"| {' | '.join(cells)} |"


def register_rows(pattern: str) -> list[Row]:
    """Compile what `CALLS` launch in the first configuration or in every one; for exact float32 the first one
    with 64-bit offsets too."""
    rows: dict[str, Row] = {}
    for call in CALLS:
        if not re.search(pattern, call.name):
            continue
        print(f"compiling {call.name}", file=sys.stderr, flush=True)
        for wide in (False, True) if call.dtype == torch.float32 and call.exact else (False,):
            limit = mock.patch.object(launching, "WIDE_FROM", 0) if wide else contextlib.nullcontext()
            with limit, recording(all_configurations=call.in_every_configuration and not wide) as kernels:
                call()
            for kernel in kernels.values():
                row = rows.setdefault(kernel.identity, Row(call.operator, call.variant, call.types, kernel))
                row.layouts.add(call.layout)
                for architecture in ARCHITECTURES:
                    if (architecture, wide) not in row.found:
                        row.found[architecture, wide] = compile_for(kernel, architecture)
    return list(rows.values())


def register_table(rows: list[Row]) -> str:
    spilling = sum(found.stack > 0 for row in rows for found in row.found.values())
    total = sum(len(row.found) for row in rows)
    verdict = f"{spilling} of them spill." if spilling else "None has a stack frame, none spills."
    header = " | ".join(f"sm_{architecture}" for architecture in ARCHITECTURES)
    lines = [
        f"{total} compilations. {verdict}",
        "",
        f"| kernel | types | layout | configuration | {header} | shared memory, bytes |",
        f"|---|---|---|---|{'---|' * (len(ARCHITECTURES) + 1)}",
    ]
    return "\n".join([*lines, *map(str, rows)])


# --- modelled cost


class SimulatedDevice:
    """Runs the operators' Triton kernels on CPU tensors, for the cases of cuda_costs."""

    def call(self, operator: str, *arguments: Any) -> Any:
        with ptxsim.triton_on_cpu():
            return getattr(torch.ops.safnet_ops_triton, operator)(*arguments)


def cost_cases(pattern: str) -> list[Any]:
    """The cases of the CUDA kernels' table whose name matches."""
    return [case for case in cuda_costs.CASES if re.search(pattern, case.name)]


def cost_table(cases: Iterable[Any]) -> str:
    """What cuda_costs writes of CUDA kernels, for the Triton ones."""
    device: Any = SimulatedDevice()
    lines = [f"| {' | '.join(cuda_costs.TITLES)} |", f"|{'---|' * len(cuda_costs.TITLES)}"]
    for case in cases:
        torch.manual_seed(2407)
        # As large pictures are: channels are not spread over more programs for the sake of a small one. A case may change
        # how float32 is multiplied.
        precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        with mock.patch.object(launching, "FILL", 1), _float32_products(precision):
            found = cuda_costs.cost_rows(case, device)
        print(*found, sep="\n", file=sys.stderr, flush=True)
        lines += found
    return "\n".join(lines)


# --- host time


def print_overhead() -> None:
    """Host time of a whole call of the public function with pictures of one pixel, forward without gradients.

    Included: checks, torch's dispatcher, allocations, and Triton's launch path in Python down to its launcher, which is
    replaced by a function that returns at once. Not included: that launcher (in C), the driver and the GPU. The C++ kernel
    beside it, called through the same function, does compute its one pixel.
    """
    print("| call | launches | Triton, us | compiled C++ module, us | Triton's extra, us a launch |")
    print("|---|---|---|---|---|")
    for name in OPERATORS:
        call = functools.partial(getattr(safnet_ops, name), *positional_inputs(name, (1, 1)))
        compiled = _median_us(functools.partial(call, backend="cpp"))
        with recording(all_configurations=False) as kernels:
            found = _median_us(functools.partial(call, backend="triton"))
        launches = len(kernels)  # each of a forward's kernels is launched once
        extra = (found - compiled) / launches
        print(f"| {name} | {launches} | {found:.0f} | {compiled:.1f} | {extra:.0f} |", flush=True)


def _median_us(call: Callable[[], Any]) -> float:
    """Microseconds a call: the median of 7 means over 200 calls."""
    times = []
    call()
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(200):
            call()
        times.append((time.perf_counter() - start) / 200 * 1e6)
    return sorted(times)[3]
