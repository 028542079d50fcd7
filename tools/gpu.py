"""Everything that needs a GPU, in one command: builds, tests and times the kernels, and writes one report.

    python -m tools.gpu [--report docs/measured/gpu.md] [--dry-run]

It uses the Python, torch (2.11 or newer, built with CUDA) and nvcc that are there, and no network. A step that fails or
takes too long is reported as such, and the next one runs. --dry-run does all that needs no GPU: the build, with the CUDA
kernels where nvcc is found, collecting the tests, a few rounds of small benchmarks on the CPU, and the report.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch  # at run time where it is used: main() says what is missing

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "measured" / "gpu.md"
BUDGET = {
    "build": 200,
    "tests, cuda": 90,
    "tests, triton": 90,
}  # seconds on a machine with a GPU and 16 cores; the benchmarks take what they take, about a minute
PATIENCE = 10  # a dry run may take so many times as long: it runs on any machine
DRY_ARCHITECTURE = "9.0"
NEEDED = ("torch", "ninja", "pybind11", "setuptools", "numpy", "pytest", "hypothesis")
TAIL = 40  # lines of a failing step's output in the report


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build, test and time the kernels on the GPU of this machine; write one report."
    )
    parser.add_argument("--report", type=Path, default=REPORT, help=f"the report (default: {REPORT.relative_to(ROOT)})")
    parser.add_argument("--dry-run", action="store_true", help="do what needs no GPU")
    options = parser.parse_args()
    began = time.monotonic()
    missing = [name for name in NEEDED if not _installed(name)]
    if missing:
        print(f"gpu: these packages are needed and not installed: {', '.join(missing)}", file=sys.stderr)
        return 1
    import torch

    if not options.dry_run and not torch.cuda.is_available():
        print("gpu: torch finds no GPU (--dry-run does what needs none)", file=sys.stderr)
        return 1
    sections = [
        "# On a GPU",
        "Written by `python -m tools.gpu`" + (", **as a dry run: no GPU was used.**" if options.dry_run else "."),
    ]
    sections.append(_machine())
    built, text = _build(options.dry_run)
    sections.append(text)
    passed = [built]
    if built:
        for backend in ("cuda", "triton"):
            ok, text = _test(backend, options.dry_run)
            passed.append(ok)
            sections.append(text)
        sections.append(_benchmarks(options.dry_run))
    sections.append(
        f"{'Everything passed' if all(passed) else '**Something failed**'}, in {time.monotonic() - began:.0f} s."
    )
    options.report.parent.mkdir(parents=True, exist_ok=True)
    partial = options.report.with_name(options.report.name + ".partial")
    partial.write_text("\n\n".join(sections) + "\n")
    partial.replace(options.report)
    print(f"wrote {options.report}")
    return 0 if all(passed) else 1


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _machine() -> str:
    import torch

    lines = [
        f"- {platform.platform()}, Python {platform.python_version()}",
        f"- torch {torch.__version__} (CUDA {torch.version.cuda})",
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        lines.append(f"- GPU {index}: {found.name}, {found.major}.{found.minor}, {found.total_memory >> 20} MiB")
    for command in (
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"],
        ["nvcc", "--version"],
    ):
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip().splitlines()
            lines.append(f"- {command[0]}: {text[-1] if text else 'no answer'}")
        except (OSError, subprocess.TimeoutExpired):
            lines.append(f"- {command[0]}: not found")
    return "\n".join(lines)


def _step(name: str, command: list[str], changes: dict[str, str], dry_run: bool) -> tuple[bool, str]:
    """Run one step within its budget; (whether it succeeded, what to write about it)."""
    budget = BUDGET[name] * (PATIENCE if dry_run else 1)
    began = time.monotonic()
    print(f"gpu: {name}: {' '.join(command)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **changes}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=budget,
        )
        output, ok, end = done.stdout, done.returncode == 0, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as late:
        raw = late.stdout or b""
        output, ok, end = (
            raw.decode(errors="replace") if isinstance(raw, bytes) else raw,
            False,
            f"stopped after {budget} s",
        )
    lines = output.strip().splitlines()
    shown = lines[-1:] if ok else lines[-TAIL:]
    state = "done" if ok else f"**failed** ({end})"
    return ok, f"## {name[0].upper()}{name[1:]}\n\n{state} in {time.monotonic() - began:.0f} s\n\n```\n" + "\n".join(
        shown
    ) + "\n```"


def _build(dry_run: bool) -> tuple[bool, str]:
    """For the GPU that is there only: seconds a file instead of minutes."""
    import torch

    changes = {"MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count() or 2)}
    if not dry_run or shutil.which("nvcc"):
        capability = DRY_ARCHITECTURE if dry_run else "{}.{}".format(*torch.cuda.get_device_capability())
        changes |= {"TORCH_CUDA_ARCH_LIST": f"{capability}+PTX", "FORCE_CUDA": "1"}
    return _step("build", [sys.executable, "setup.py", "build_ext", "--inplace"], changes, dry_run)


def _test(backend: str, dry_run: bool) -> tuple[bool, str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--import-mode=importlib",
        "tests/safnet_ops/cuda",
    ]
    if dry_run:
        command.append("--collect-only")
    return _step(f"tests, {backend}", command, {"SAFNET_OPS_TEST_GPU": backend}, dry_run)


def _benchmarks(dry_run: bool) -> str:
    """Medians of the operators and of their references, forward and backward."""
    import torch

    import safnet_ops

    device = torch.device("cpu" if dry_run else "cuda")
    scale = 16 if dry_run else 1
    rows = [
        "| call | backend | forward us | spread | forward + backward us | spread | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    backends = ["reference", "cpp"] if dry_run else ["reference", "cuda", "triton"]
    for name, function in _calls(device, scale):
        for backend in backends:
            if safnet_ops.backends.why_missing(name.split(",")[0], backend) and backend != "reference":
                rows.append(f"| {name} | {backend} | missing | | | | |")
                continue
            try:
                cells = _time(function, backend, device, 3 if dry_run else 50)
            except Exception as error:  # one failing call must not cost the report
                cells = [f"failed: {type(error).__name__}: {str(error).splitlines()[0]}", "", "", "", ""]
            rows.append(f"| {name} | {backend} | {' | '.join(cells)} |")
    about = "Times of one call: median and interquartile range, from CUDA events with the GPU kept busy before."
    return (
        "## Benchmarks\n\n"
        + (f"{about} Peak: memory allocated beyond the inputs." if not dry_run else "Dry run: tiny sizes, on the CPU.")
        + "\n\n"
        + "\n".join(rows)
    )


def _calls(device: torch.device, scale: int) -> list[tuple[str, Callable]]:
    """(name, function(backend) -> (result, inputs that want gradients))."""
    import torch

    import safnet_ops

    def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(shape, device=device).to(dtype)

    def fuse(height: int, width: int, dtype: torch.dtype) -> Callable:
        images = [rand(1, 3, height, width, dtype=dtype).requires_grad_() for _ in range(4)]
        maps = [(8 * rand(1, 2, height, width)).requires_grad_() for _ in range(2)]
        masks = [rand(1, 1, height, width).requires_grad_() for _ in range(2)]
        values = [*images[:3], *maps, *masks, images[3]]
        return lambda backend: (safnet_ops.fused_fuse(*values, backend=backend), values)

    def warp(height: int, width: int, layout: torch.memory_format) -> Callable:
        image = rand(1, 40, height, width).contiguous(memory_format=layout).requires_grad_()
        flow = (8 * rand(1, 2, height, width)).requires_grad_()
        return lambda backend: (safnet_ops.backward_warp(image, flow, backend=backend), [image, flow])

    def upsample(height: int, width: int) -> Callable:
        images = [rand(1, 3, height, width) for _ in range(4)]
        low = [rand(1, channels, height // 2, width // 2) for channels in (2, 2, 1, 1)]
        operator: Callable = safnet_ops.upsample_fuse
        return lambda backend: (operator(*images[:3], *low, images[3], backend=backend)[0], [])

    def census(height: int, width: int) -> Callable:
        prediction, target = rand(1, 3, height, width).requires_grad_(), rand(1, 3, height, width)
        return lambda backend: (safnet_ops.census_loss(prediction, target, backend=backend), [prediction])

    def conv(
        channels: int, groups: int, height: int, width: int, dtype: torch.dtype, layout: torch.memory_format
    ) -> Callable:
        image = (
            torch.randn(1, channels, height, width, device=device)
            .to(dtype)
            .contiguous(memory_format=layout)
            .requires_grad_()
        )
        weight = (torch.randn(channels, channels // groups, 3, 3, device=device) / 20).to(dtype).requires_grad_()
        slopes = rand(channels, dtype=dtype).requires_grad_()
        return lambda backend: (
            safnet_ops.group_conv_shuffle(image, weight, slopes, slopes, groups, backend=backend),
            [image, weight, slopes],
        )

    full, half, last, first = (
        (1000 // scale, 1500 // scale // 4 * 4),
        torch.float16,
        torch.channels_last,
        torch.contiguous_format,
    )
    return [
        ("fused_fuse, 1500x1000, float32", fuse(*full, torch.float32)),
        ("fused_fuse, 1500x1000, float16", fuse(*full, half)),
        ("upsample_fuse, 1500x1000, float32", upsample(*full)),
        ("backward_warp, 40 channels, 752x500", warp(500 // scale, 752 // scale, first)),
        ("backward_warp, 40 channels, 752x500, channels_last", warp(500 // scale, 752 // scale, last)),
        ("census_loss, 512x512", census(512 // scale, 512 // scale)),
        (
            "group_conv_shuffle, 120 channels, 3 groups, 376x250, float32",
            conv(120, 3, 250 // scale, 376 // scale, torch.float32, first),
        ),
        (
            "group_conv_shuffle, 120 channels, 3 groups, 376x250, float16",
            conv(120, 3, 250 // scale, 376 // scale, half, first),
        ),
        (
            "group_conv_shuffle, 120 channels, 3 groups, 376x250, float16, channels_last",
            conv(120, 3, 250 // scale, 376 // scale, half, last),
        ),
        ("group_conv_shuffle, 80 channels, 1500x1000, float16, channels_last", conv(80, 1, *full, half, last)),
    ]


def _time(function: Callable, backend: str, device: object, rounds: int) -> list[str]:
    import torch

    on_gpu = getattr(device, "type", "") == "cuda"

    def forward() -> None:
        with torch.no_grad():
            function(backend)

    def both() -> None:
        result, inputs = function(backend)
        if inputs:
            torch.autograd.grad(result.float().sum(), inputs)

    cells = []
    for run in (forward, both):
        for _ in range(3):
            run()
        if on_gpu:
            torch.cuda.synchronize()
            if run is forward:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        times = [_one(run, on_gpu) for _ in range(rounds)]
        quartiles = statistics.quantiles(times, n=4)
        cells += [f"{statistics.median(times):.1f}", f"{quartiles[2] - quartiles[0]:.1f}"]
        if on_gpu and run is forward:
            peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return [*cells, f"{peak:.1f}" if on_gpu else ""]


def _one(run: Callable[[], None], on_gpu: bool) -> float:
    """Microseconds."""
    import torch

    if not on_gpu:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(400_000)  # the GPU is busy while the launches are queued: no gaps of the host in the time
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


if __name__ == "__main__":
    sys.exit(main())
