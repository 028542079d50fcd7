"""Measuring: times taken in turns, peak memory, what this machine can do, and who else was using it."""

import ctypes
import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from safnet.evaluation.timing import device_name, peak_memory_of
from safnet_ops import backends

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Times:
    """Seconds of one piece of work, run after run."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance of the quartiles."""
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / 2


def set_threads() -> None:
    """SAFNET_BENCH_THREADS, or all cores."""
    torch.set_num_threads(int(os.environ.get("SAFNET_BENCH_THREADS", os.cpu_count() or 1)))


def rounds_for(seconds_a_round: float, budget: float, least: int, most: int) -> int:
    return max(least, min(most, round(budget / max(seconds_a_round, 1e-9))))


def in_turns(
    works: Mapping[str, Callable[[], Callable[[], object]]], budget: float, least: int = 5, most: int = 25
) -> dict[str, Times]:
    """Time pieces of work by turns, so that what disturbs the machine for a while disturbs all of them.

    A piece of work is a function that prepares, untimed, and returns the function to be timed; it has run before.
    Between `least` and `most` rounds are run, in about `budget` seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}

    def round_of_all() -> float:
        began_round = time.perf_counter()
        for name, prepare in works.items():
            timed = prepare()
            began = time.perf_counter()
            timed()
            seconds[name].append(time.perf_counter() - began)
        return time.perf_counter() - began_round

    for _ in range(rounds_for(round_of_all(), budget, least, most) - 1):
        round_of_all()
    return {name: Times(tuple(values)) for name, values in seconds.items()}


def extra_memory(prepare: Callable[[], Callable[[], int]], runs: int = 2) -> int | None:
    """Peak bytes of resident memory beyond inputs and results: the timed function returns its results' size in bytes.

    The least of `runs`. Whole pages count, and whatever any library takes; None where the system does not tell.
    """
    found = []
    for _ in range(runs):
        timed = prepare()
        _return_free_memory()
        results = 0

        def run(timed: Callable[[], int] = timed) -> None:
            nonlocal results
            results = timed()

        peak = peak_memory_of(run, CPU)
        if peak is None:
            return None
        found.append(max(0, peak - results))
    return min(found)


def _return_free_memory() -> None:
    """Free memory that the allocator keeps is resident already, and would hide as much of what the work takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Peaks:
    """What this machine reached in the same run: operations (two a multiply-add) and bytes (read and written) a second."""

    float32: float
    copy: float


def measure_peaks() -> Peaks:
    """A product of two 2048x2048 float32 matrices by the library's sgemm, and a copy of 256 MiB to memory written before.

    The best of several runs. A matrix product stays below what multiply-adds on registers alone would reach.
    """
    size = 2048
    left, right, product = (torch.rand(size, size) for _ in range(3))
    source, destination = (torch.rand(2**26) for _ in range(2))
    works = {
        "product": lambda: lambda: torch.mm(left, right, out=product),
        "copy": lambda: lambda: destination.copy_(source),
    }
    for prepare in works.values():
        prepare()()
    times = in_turns(works, 4.0, 15, 30)
    return Peaks(2 * size**3 / min(times["product"].seconds), 2 * source.nbytes / min(times["copy"].seconds))


class OtherLoad:
    """The share of this machine's processors that others took between two readings, from Linux's own counts."""

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float | None:
        """Since this object was made, from 0 to 1; None where the system does not tell."""
        start, end = self._start, self._read()
        if start is None or end is None:
            return None
        busy, own, total = (after - before for after, before in zip(end, start, strict=True))
        return max(0.0, busy - own) / total if total > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            counts = [int(count) for count in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except (OSError, IndexError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        idle = counts[3] + counts[4]  # idle, and waiting for a disk
        return (sum(counts) - idle) / ticks, sum(os.times()[:4]), sum(counts) / ticks


def machine() -> dict[str, str]:
    """What the numbers were taken on, for people."""
    facts = {
        "processor": device_name(CPU),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "C++ kernels": _kernels(),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()}, {' '.join(platform.libc_ver())}".rstrip(", "),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    switches = [f"{name}={os.environ[name]}" for name in MEMORY_SWITCHES if name in os.environ]
    return facts | {"memory": ", ".join(switches) or "the system's ordinary pages, no allocator switches"}


def _kernels() -> str:
    """The instruction set that the C++ kernels use here."""
    if not backends.serves("group_conv_shuffle", "cpp"):
        return "none"
    return str(importlib.import_module("safnet_ops._C").instruction_set())


# They change how fast fresh memory is: by much, where results are large.
MEMORY_SWITCHES = ("THP_MEM_ALLOC_ENABLE", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
