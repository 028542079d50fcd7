"""What a model costs: time and memory on this machine, parameters, multiply-adds."""

import ctypes
import gc
import os
import pickle
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import safnet_ops
from safnet.fuse import fuse_exposures
from safnet.model import SAFNet

TIMING_EVS = (-2.0, 0.0, 2.0)
SMALL_SIZE = 32, 32  # pixels
M_MMAP_THRESHOLD = -3  # mallopt(3)


@dataclass(frozen=True)
class Timing:
    """A measurement of `fuse_exposures`.

    Attributes:
        seconds: of each run, after the warm-up.
        peak_memory: bytes in use at a run's peak above model and frames, None where the system does not tell. What the
            allocator keeps beside that, often a sixth of it, is left out.
        multiply_adds: of one run's convolutions.
    """

    height: int
    width: int
    seconds: tuple[float, ...]
    peak_memory: int | None
    parameters: int
    multiply_adds: int
    device: str
    threads: int
    precision: str

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_model(
    model: SAFNet,
    height: int,
    width: int,
    *,
    runs: int = 5,
    warm_up: int = 1,
    tile: int | None = None,
    precision: torch.dtype = torch.float32,
) -> Timing:
    """Time a model on noise frames of a size, on the device where it lies. `runs` is at least 1.

    On a CPU the memory is measured in a process of its own, as the modules `multiprocessing` starts them: scripts that call
    this must do so under `if __name__ == "__main__":`.
    """
    device = next(model.parameters()).device
    frames = _noise_frames(height, width, device)

    def run() -> float:
        started = time.perf_counter()
        fuse_exposures(model, frames, TIMING_EVS, alignment="paper", tile=tile, precision=precision)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    if device.type == "cpu":
        peak_memory = _peak_memory_elsewhere(model, height, width, tile, precision)
    else:
        peak_memory = peak_memory_of(run, device)
    for _ in range(warm_up):
        run()
    seconds = tuple(run() for _ in range(runs))
    return Timing(
        height,
        width,
        seconds,
        peak_memory,
        sum(parameter.numel() for parameter in model.parameters()),
        count_multiply_adds(model, height, width),
        device_name(device),
        torch.get_num_threads(),
        str(precision).removeprefix("torch."),
    )


def count_multiply_adds(model: SAFNet, height: int, width: int) -> int:
    """Multiply-adds of all convolutions for three exposures of a size, counted without computing anything.

    A transposed convolution counts by its input's pixels, which is what it computes. Biases, activations, resizing and
    warps are left out.
    """
    with FakeTensorMode(), torch.no_grad(), safnet_ops.use_backend("reference"):
        twin = SAFNet(model.variant).eval()
        exposure = torch.empty(1, 6, height, width)
        with FlopCounterMode(display=False) as counter:
            twin(exposure, exposure, exposure)
    return counter.get_total_flops() // 2  # a multiply-add counts as two operations there


def _noise_frames(height: int, width: int, device: torch.device) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.rand(1, 3, height, width, generator=noise).to(device) for _ in TIMING_EVS]


def _peak_memory_elsewhere(
    model: SAFNet, height: int, width: int, tile: int | None, precision: torch.dtype
) -> int | None:
    """`peak_memory_of` a fusion on the CPU in a new process; None where the system does not tell, or ended it.

    Here, memory that the allocator kept from earlier runs would be used again and not count.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, get_context("spawn")) as executor:
        data = pickle.dumps(model)  # a plain copy: multiprocessing would share its tensors
        task = executor.submit(_peak_memory_here, data, height, width, tile, precision, torch.get_num_threads())
        try:
            return task.result()
        except BrokenProcessPool:
            return None


def _peak_memory_here(
    data: bytes, height: int, width: int, tile: int | None, precision: torch.dtype, threads: int
) -> int | None:
    torch.set_num_threads(threads)
    _return_freed_memory()
    model, device = pickle.loads(data), torch.device("cpu")
    small, frames = (_noise_frames(*size, device) for size in (SMALL_SIZE, (height, width)))
    fuse_exposures(model, small, TIMING_EVS, alignment="paper", precision=precision)  # loads kernels and starts threads
    return peak_memory_of(
        lambda: fuse_exposures(model, frames, TIMING_EVS, alignment="paper", tile=tile, precision=precision), device
    )


def _return_freed_memory() -> None:
    """Make glibc give tensors back to the system when they are freed.

    Else it learns from their sizes what to keep, and how much that is varies by a tenth and more from run to run.
    """
    with suppress(AttributeError, OSError, TypeError):  # of another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 * 1024)


def peak_memory_of(work: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes that `work` takes on the device above what was in use before; None where the system does not tell.

    On a CPU it counts what the process gets from the system: nothing, if `work` has run there before.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # what is freed while `work` runs would hide as much of what it takes
    try:
        # Linux: 5 resets the process's high-water mark (proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5")
        before = _process_memory("VmRSS")
    except (OSError, StopIteration):
        work()
        return None
    work()
    return max(0, _process_memory("VmHWM") - before)


def device_name(device: torch.device) -> str:
    """The GPU's name or the processor's, with its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def _process_memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
