"""What the Triton kernels cost: registers, stack and shared memory of the machine code, and a modelled time.

    python -m tools.triton_costs             # the tables of docs/triton.md
    python -m tools.triton_costs --registers # compile only
    python -m tools.triton_costs --modelled  # execute on the simulator only
    python -m tools.triton_costs --overhead  # host time of a call whose kernel does nothing

No GPU is needed. Kernels are those that the library launches for the calls of `CASES`, in every autotuning
configuration,
compiled to machine code by Triton's own ptxas. Modelled figures are lower bounds by instruction and byte counts,
not times.
"""

import argparse
import contextlib
import functools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import ptxsim
from ptxsim import triton_bridge

import safnet_ops
from safnet_ops import backends

ARCHITECTURES = (80, 90, 100)
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
    def label(self) -> str:
        """Configuration and warps, as in "BLOCK 128, 4 warps"."""
        blocks = [f"{name} {value}" for name, value in self.constants.items() if name.startswith(("BLOCK", "TILE"))]
        return ", ".join([*blocks, f"{self.options['num_warps']} warps"])


@dataclass(frozen=True)
class Resources:
    """Per thread: registers, and bytes of stack and local memory (spills); per block: bytes of shared memory."""

    registers: int
    stack: int
    shared: int


class _Recorder(triton_bridge._Driver):
    """A driver that notes what is launched and runs nothing; with `all_configurations`, autotuning tries every one."""

    def __init__(self, all_configurations: bool):
        super().__init__(80)
        self.kernels: dict[str, Kernel] = {}
        self.all_configurations = all_configurations

    def get_current_device(self) -> str:
        return f"recorder{id(self)}"  # kernels are compiled, and so noted, anew for each recorder

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
    """Library calls on CPU tensors in this block compile their Triton kernels but do not run them; yields the
    kernels."""
    recorder = _Recorder(all_configurations)
    from triton.runtime import driver

    with ptxsim.triton_on_cpu():
        driver.set_active(recorder)
        forget_tuning()
        yield recorder.kernels
    forget_tuning()


def forget_tuning() -> None:
    """Empty the autotuners' caches, so that every configuration is compiled again."""
    for name, module in list(sys.modules.items()):
        if name.startswith("safnet_ops.triton."):
            for value in vars(module).values():
                for tuner in value.values() if isinstance(value, dict) else [value]:
                    if isinstance(tuner, triton.runtime.Autotuner):
                        tuner.cache.clear()


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


def _pictures(count: int, channels: int, dtype: torch.dtype, size: tuple[int, int], last: bool = False) -> list[Tensor]:
    layout = torch.channels_last if last else torch.contiguous_format
    return [torch.rand(1, channels, *size).to(dtype, memory_format=layout).requires_grad_() for _ in range(count)]


def _smooth_flow(size: tuple[int, int], count: int = 1) -> list[Tensor]:
    """Flows as an estimator gives them: neighbours sample neighbouring pixels."""
    y, x = torch.meshgrid(torch.linspace(0, 3, size[0]), torch.linspace(0, 3, size[1]), indexing="ij")
    flow = torch.stack([3 * torch.sin(x + y) + 0.4, 2 * torch.cos(x - y) + 0.3])[None]
    return [(flow * (-1) ** i).requires_grad_() for i in range(count)]


def _warp(dtype: torch.dtype, last: bool, size: tuple[int, int]) -> None:
    (image,) = _pictures(1, 40, dtype, size, last)
    out = safnet_ops.backward_warp(image, *_smooth_flow(size), backend="triton")
    out.backward(torch.ones_like(out))


def _fuse(dtype: torch.dtype, last: bool, size: tuple[int, int]) -> None:
    *images, ldr = _pictures(4, 3, dtype, size, last)
    masks = _pictures(2, 1, torch.float32, size)
    out = safnet_ops.fused_fuse(*images, *_smooth_flow(size, 2), *masks, ldr, backend="triton")
    out.backward(torch.ones_like(out))


def _upsample(dtype: torch.dtype, last: bool, size: tuple[int, int]) -> None:
    low = (size[0] // 2, size[1] // 2)
    with torch.no_grad():
        *images, ldr = _pictures(4, 3, dtype, size, last)
        masks = _pictures(2, 1, torch.float32, low)
        safnet_ops.upsample_fuse(*images, *_smooth_flow(low, 2), *masks, ldr, backend="triton")


def _census(dtype: torch.dtype, last: bool, size: tuple[int, int]) -> None:
    safnet_ops.census_loss(*_pictures(2, 3, dtype, size, last), backend="triton").backward()


def _convolution(dtype: torch.dtype, last: bool, size: tuple[int, int], exact: bool = False) -> None:
    with torch.backends.cudnn.flags(allow_tf32=not exact):
        (input,) = _pictures(1, 120, dtype, size, last)
        weight, bias, prelu = (
            torch.rand(shape, dtype=dtype, requires_grad=True) for shape in ((120, 40, 3, 3), (120,), (120,))
        )
        out = safnet_ops.group_conv_shuffle(input, weight, bias, prelu, 3, backend="triton")
        out.backward(torch.ones_like(out))


def _cases() -> dict[str, Callable[[tuple[int, int]], None]]:
    """What SAFNet calls, by operator, dtype and layout: forward and backward, all gradients."""
    found: dict[str, Callable[[tuple[int, int]], None]] = {}
    kinds = (
        ("float32", torch.float32, False),
        ("float16", torch.float16, False),
        ("float16 channels_last", torch.float16, True),
    )
    for name, call in (
        ("backward_warp", _warp),
        ("fused_fuse", _fuse),
        ("upsample_fuse", _upsample),
        ("census_loss", _census),
    ):
        for kind, dtype, last in kinds[: 3 if call is _warp else 2]:
            found[f"{name} {kind}"] = functools.partial(call, dtype, last)
    for kind, dtype, last in (("TF32", torch.float32, False), *kinds[1:]):
        found[f"group_conv_shuffle {kind}"] = functools.partial(_convolution, dtype, last)
    found["group_conv_shuffle exact float32"] = functools.partial(_convolution, torch.float32, False, exact=True)
    return found


CASES = _cases()


def print_registers(pattern: str) -> None:
    print("| call | kernel | configuration |", " | ".join(f"sm_{a}" for a in ARCHITECTURES), "|")
    print("|---|---|---|" + "---|" * len(ARCHITECTURES))
    for name, call in CASES.items():
        if not re.search(pattern, name):
            continue
        with recording() as kernels:
            call((16, 16))
        for kernel in kernels.values():
            found = [compile_for(kernel, architecture) for architecture in ARCHITECTURES]
            cells = [f"{r.registers} / {r.stack} / {r.shared}" for r in found]
            print("|", " | ".join([name, kernel.name.rpartition(".")[2], kernel.label, *cells]), "|", flush=True)


def print_modelled(pattern: str, size: tuple[int, int] = (48, 128)) -> None:
    """Scaled from a small picture to one that fills the GPU: limits per pixel, with all multiprocessors at work."""
    print("| call | kernel | DRAM B/pixel | L1 B/pixel | modelled ns per 1000 pixels on H100 | bound | DRAM alone |")
    print("|---|---|---|---|---|---|---|")
    pixels = size[0] * size[1]
    for name, call in CASES.items():
        if not re.search(pattern, name):
            continue
        with ptxsim.triton_on_cpu(), ptxsim.options(stats=True, checks=False) as launches:
            call(size)
        for launch in launches:
            stats = launch.stats
            gpu = ptxsim.GPUS["H100"]
            model = ptxsim.roofline(stats, gpu)
            busy = min(gpu.sms, stats.grid[0] * stats.grid[1] * stats.grid[2]) / gpu.sms
            shared_by_all = ("DRAM", "L2", "atomics")
            limits = {k: v * (1 if k in shared_by_all else busy) for k, v in model.limits.items()}
            bound = max(limits, key=limits.__getitem__)
            cells = [
                name,
                stats.kernel.strip("_"),
                f"{stats.compulsory_bytes / pixels:.0f}",
                f"{stats.global_sectors * 32 / pixels:.0f}",
                f"{limits[bound] / pixels * 1e12:.1f}",
                bound,
                f"{limits['DRAM'] / pixels * 1e12:.1f}",
            ]
            print("|", " | ".join(cells), "|", flush=True)


def print_overhead() -> None:
    """Host microseconds of a whole call of the public function: checks, dispatcher, allocation, Triton's launcher
    in Python."""
    print("| call | backend | us a call, median of 7 x 200 |")
    print("|---|---|---|")
    image, flow = torch.rand(1, 3, 1, 1), torch.rand(1, 2, 1, 1)
    mask = torch.rand(1, 1, 1, 1)
    fusion = (image, image, image, flow, flow, mask, mask, image)
    weight = torch.rand(3, 3, 3, 3)
    calls: dict[str, Callable[[str], Any]] = {
        "backward_warp": lambda backend: safnet_ops.backward_warp(image, flow, backend=backend),
        "fused_fuse": lambda backend: safnet_ops.fused_fuse(*fusion, backend=backend),
        "upsample_fuse": lambda backend: safnet_ops.upsample_fuse(*fusion, backend=backend),
        "census_loss": lambda backend: safnet_ops.census_loss(image, image, backend=backend),
        "group_conv_shuffle": lambda backend: safnet_ops.group_conv_shuffle(image, weight, backend=backend),
    }
    with recording(all_configurations=False):
        for name, call in calls.items():
            for backend in ("triton", "cpp"):
                if backends.why_missing(name, backend) is None:
                    print(f"| {name} | {backend} | {_median_us(functools.partial(call, backend)):.0f} |", flush=True)


def _median_us(call: Callable[[], Any]) -> float:
    times = []
    call()
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(200):
            call()
        times.append((time.perf_counter() - start) / 200 * 1e6)
    return sorted(times)[3]


def main() -> None:
    parser = argparse.ArgumentParser(description="Costs of the Triton kernels: machine code, model, host overhead.")
    parser.add_argument("--registers", action="store_true")
    parser.add_argument("--modelled", action="store_true")
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="regular expression that a call's name must match"
    )
    arguments = parser.parse_args()
    everything = not (arguments.registers or arguments.modelled or arguments.overhead)
    if arguments.registers or everything:
        print_registers(arguments.only)
    if arguments.modelled or everything:
        print_modelled(arguments.only)
    if arguments.overhead or everything:
        print_overhead()


if __name__ == "__main__":
    main()
