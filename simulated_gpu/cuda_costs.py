"""Registers, spills and occupancy of every CUDA kernel, and the modelled cost of operators, from executed device code.

ptxas compiles the kernels for every architecture, ptxsim executes them on the CPU and counts. What was computed stays in
build/kernel_costs; `python -m tools.kernel_costs` writes the page.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ptxsim
from operator_inputs import census_inputs, conv_inputs, fusion_inputs, warp_inputs
from ptxsim import Stats
from simulated_gpu import device as simulated

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = {  # compute capability: warps and blocks an SM holds (CUDA C++ Programming Guide, compute capabilities)
    75: (32, 16),
    80: (64, 32),
    86: (48, 16),
    89: (48, 24),
    90: (64, 32),
    100: (64, 32),
    120: (48, 24),
}
REGISTERS_OF_SM = 65536
GPU = "H100"
OTHERS = ("A100", "A30", "RTX4090")


@dataclass(frozen=True)
class Compiled:
    """What ptxas says of one kernel for one architecture."""

    registers: int
    stack: int
    spills: int
    threads: int

    def occupancy(self, capability: int) -> float:
        """Share of an SM's warps that registers and threads allow (shared memory not counted)."""
        warps, blocks = ARCHITECTURES[capability]
        per_warp = -(-self.registers * 32 // 256) * 256
        block_warps = self.threads // 32
        resident = min(REGISTERS_OF_SM // (per_warp * block_warps), warps // block_warps, blocks)
        return resident * block_warps / warps


def compile_ptx(ptx: Path, capability: int, so_far: bool = False) -> dict[str, Compiled]:
    """Kernel name -> what ptxas says of it, now or when it last compiled the same PTX."""
    if capability < 80 and not so_far:
        ptx = simulated.compile_for_turing(ptx.stem)
    found = cached(ptx, (str(capability),), lambda: _compile_ptx(ptx, capability), so_far)
    return {name: Compiled(*numbers) for name, numbers in (found or {}).items()}


def _compile_ptx(ptx: Path, capability: int) -> dict[str, tuple[int, int, int, int]]:
    text = ptx.read_text()
    threads = {name: int(n) for name, n in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", text)}
    with tempfile.TemporaryDirectory() as folder:
        command = ["ptxas", "-v", f"-arch=sm_{capability}", str(ptx), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    found = {}
    pattern = (
        r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, done.stderr, re.S):
        found[name] = (int(registers), int(stack), int(stores) + int(loads), threads.get(name, 256))
    return found


def readable(name: str) -> str:
    """A kernel's name with its template arguments in words."""
    full = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip() or name
    full = full.removeprefix("void ").replace("safnet::cuda::", "")
    full = re.sub(r">\(.*", ">", full)
    for mangled, word in (
        ("__half", "float16"),
        ("__nv_bfloat16", "bfloat16"),
        ("(int)", ""),
        ("(bool)1", "true"),
        ("(bool)0", "false"),
    ):
        full = full.replace(mangled, word)
    return re.sub(r"\b(\w+)<", r"\1<", full).replace("long", "int64").replace(" int,", " int32,")


def compile_all(
    folder: Path, architectures: list[int], so_far: bool = False
) -> dict[tuple[str, int], dict[str, Compiled]]:
    """(source, compute capability) -> what ptxas says of its kernels."""
    jobs = [(ptx, capability) for capability in architectures for ptx in sorted(folder.glob("*.ptx"))]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: compile_ptx(job[0], job[1], so_far), jobs)
    return {(ptx.stem, capability): result for (ptx, capability), result in zip(jobs, results, strict=True)}


def register_tables(results: dict[tuple[str, int], dict[str, Compiled]]) -> str:
    architectures = sorted({capability for _, capability in results})
    spilling = [
        f"`{readable(name)}` for sm_{capability}: stack {found.stack} B, spills {found.spills} B"
        for (_, capability), result in results.items()
        for name, found in result.items()
        if found.spills or found.stack
    ]
    total = sum(len(result) for result in results.values())
    lines = [f"{total} compilations for {len(architectures)} architectures."]
    missing = [f"{source} for sm_{capability}" for (source, capability), result in results.items() if not result]
    if missing:
        lines.append(f"Not compiled yet: {', '.join(missing)}.")
    if spilling:
        lines += [f"{len(spilling)} use local memory:", "", *(f"- {line}" for line in spilling)]
    else:
        lines.append("None of those compiled has a stack frame, none spills.")
    header = " | ".join(f"sm_{capability}" for capability in architectures)
    lines += ["", f"| kernel | {header} |", f"|---|{'---|' * len(architectures)}"]
    for source in sorted({source for source, _ in results}):
        names = dict.fromkeys(name for capability in architectures for name in results[source, capability])
        for name in names:
            cells = [results[source, capability].get(name) for capability in architectures]
            shown = [
                f"{cell.registers} ({cell.occupancy(capability):.0%})" if cell else "-"
                for cell, capability in zip(cells, architectures, strict=True)
            ]
            lines.append(f"| `{readable(name)}` | {' | '.join(shown)} |")
    return "\n".join(lines)


Sizes = tuple[int, int]  # height, width
Call = Callable[[simulated.Device], object]


@dataclass(frozen=True)
class Case:
    """One operator call of the cost table.

    `prepare(height, width, height of the whole picture)` gives the call and the bytes it cannot avoid. It is simulated at two
    small sizes, from which the counts are extrapolated linearly to the sizes of the table.
    """

    name: str
    prepare: Callable[[int, int, int], tuple[Call, int]]
    simulated: tuple[Sizes, Sizes] | None = None  # default: strips of the picture
    sizes: tuple[Sizes, ...] = ((1000, 1500), (512, 512))


def size_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def smooth_flow(height: int, width: int, whole: int) -> torch.Tensor:
    """A flow of a few pixels, as a moving scene gives; `height` rows of a picture of `whole`."""
    rows, columns = 6 * height / whole, 6 * width / whole
    y, x = torch.meshgrid(torch.linspace(0, rows, height), torch.linspace(0, columns, width), indexing="ij")
    return torch.stack([4 * torch.sin(x + y) + 2.3, 3 * torch.cos(y - x) - 1.7])[None].contiguous()


def fuse_inputs(height: int, width: int, whole: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What fused_fuse takes, the second flow against the first."""
    flow = smooth_flow(height, width, whole)
    return fusion_inputs((height, width), dtype=dtype, geometry=torch.float32, flows=(flow, (-flow).contiguous()))


def warp_of_features(height: int, width: int, whole: int, layout: torch.memory_format) -> list[torch.Tensor]:
    image, flow = warp_inputs((height, width), channels=40, flow=smooth_flow(height, width, whole))
    return [image.contiguous(memory_format=layout), flow]


def fuse(dtype: torch.dtype) -> Case:
    def prepare(height: int, width: int, whole: int) -> tuple[Call, int]:
        values = fuse_inputs(height, width, whole, dtype)
        return lambda d: d.call("fused_fuse", *values, None, None, None, False), size_of(*values, values[0])

    return Case(f"fused_fuse, {_word(dtype)}", prepare)


def fuse_backward(deterministic: bool) -> Case:
    def prepare(height: int, width: int, whole: int) -> tuple[Call, int]:
        values = fuse_inputs(height, width, whole, torch.float32)
        grad = torch.rand_like(values[0])
        nothing = (None, None, None, False)
        return (
            lambda d: d.call("fused_fuse_backward", grad, *values, *nothing, 0xFF, deterministic),
            size_of(grad, *values, *values),
        )

    return Case(f"fused_fuse backward, {'deterministic' if deterministic else 'atomic'}", prepare)


def upsample(dtype: torch.dtype) -> Case:
    def prepare(height: int, width: int, whole: int) -> tuple[Call, int]:
        values = fuse_inputs(height, width, whole, dtype)
        resize = torch.nn.functional.interpolate
        low = [resize(value, (height // 2, -(-width // 8) * 4), mode="bilinear") for value in values[3:7]]
        return (
            lambda d: d.call("upsample_fuse", *values[:3], *low, values[7]),
            size_of(*values[:3], values[7], values[0], *low, *values[3:7]),
        )

    return Case(f"upsample_fuse, {_word(dtype)}", prepare)


def warp(layout: torch.memory_format) -> Case:
    def prepare(height: int, width: int, whole: int) -> tuple[Call, int]:
        image, flow = warp_of_features(height, width, whole, layout)
        return lambda d: d.call("backward_warp", image, flow), size_of(image, flow, image)

    return Case(f"backward_warp, 40 channels, {_layout(layout)}", prepare, _STRIPS_OF_CHANNELS)


def warp_backward(layout: torch.memory_format, deterministic: bool) -> Case:
    def prepare(height: int, width: int, whole: int) -> tuple[Call, int]:
        image, flow = warp_of_features(height, width, whole, layout)
        grad = torch.rand_like(image)
        return (
            lambda d: d.call("backward_warp_backward", grad, image, flow, 0b11, deterministic),
            size_of(grad, image, flow, image, flow),
        )

    kind = "deterministic" if deterministic else "atomic"
    return Case(f"backward_warp backward, 40 channels, {_layout(layout)}, {kind}", prepare, _STRIPS_OF_CHANNELS)


def census(backward: bool) -> Case:
    def prepare(height: int, width: int, whole: int) -> tuple[Call, int]:
        (prediction, target), grad = census_inputs((height, width)), torch.tensor(1.0)
        if backward:
            return (
                lambda d: d.call("census_loss_backward", grad, prediction, target, 7, False),
                size_of(prediction, target, prediction),
            )
        return lambda d: d.call("census_loss", prediction, target, 7, False), size_of(prediction, target)

    return Case(f"census_loss{' backward' if backward else ''}", prepare, ((32, 128), (64, 128)))


def conv(kind: str, dtype: torch.dtype, layout: torch.memory_format, part: str = "", tf32: bool = False) -> Case:
    """`kind`: "decoder", 120 -> 120 channels in 3 groups, or "refine", 80 -> 80. `part`: "" or the gradient of what."""
    channels, groups = (120, 3) if kind == "decoder" else (80, 1)

    def prepare(height: int, width: int, whole: int) -> tuple[Call, int]:
        image, weight, bias, slopes, _ = conv_inputs((height, width), (channels, channels), groups, dtype=dtype)
        image = image.contiguous(memory_format=layout)
        if not part:
            arguments: tuple[object, ...] = (image, weight, bias, slopes, None, groups, 1, 1, False)
            return lambda d: _with_tf32(tf32, d, "group_conv_shuffle", *arguments), size_of(image, image, weight)
        # Without PReLU and shuffle, whose backward is a kernel of its own: the convolution alone.
        needs, result = (1, image) if part == "input" else (2, weight)
        arguments = (image, image[:0], image, weight, None, groups, 1, 1, needs, False)
        read = (image, weight) if part == "input" else (image, image)
        return lambda d: _with_tf32(tf32, d, "group_conv_shuffle_backward", *arguments), size_of(*read, result)

    name = f"group_conv_shuffle{f' backward ({part})' if part else ''}, {kind}"
    number = "TF32" if tf32 else _word(dtype)
    # The gradient of the weights: as many tiles as it has slices, and twice as many.
    simulated_sizes = ((32, 32), (64, 32)) if part != "weights" else ((16 * 27, 32), (2 * 16 * 27, 32))
    return Case(f"{name}, {number}, {_layout(layout)}", prepare, simulated_sizes)


def _with_tf32(allowed: bool, device: simulated.Device, operator: str, *arguments: object) -> None:
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    convolutions.fp32_precision = "tf32" if allowed else "ieee"
    device.call(operator, *arguments)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layout(layout: torch.memory_format) -> str:
    return "channels_last" if layout == torch.channels_last else "contiguous"


_STRIPS_OF_CHANNELS = ((16, 128), (32, 128))
_LAST, _FIRST = torch.channels_last, torch.contiguous_format
CASES = [
    fuse(torch.float32),
    fuse(torch.float16),
    fuse_backward(deterministic=False),
    fuse_backward(deterministic=True),
    upsample(torch.float32),
    upsample(torch.float16),
    warp(_FIRST),
    warp(_LAST),
    warp_backward(_FIRST, deterministic=False),
    warp_backward(_LAST, deterministic=False),
    warp_backward(_FIRST, deterministic=True),
    census(backward=False),
    census(backward=True),
    *(conv(kind, torch.float16, layout) for kind in ("decoder", "refine") for layout in (_LAST, _FIRST)),
    *(conv(kind, torch.float32, _LAST, tf32=tf32) for kind in ("decoder", "refine") for tf32 in (True, False)),
    *(conv("refine", torch.float16, _LAST, part) for part in ("input", "weights")),
]


def extrapolate(first: Stats, second: Stats, steps: float) -> Stats:
    """Counts `steps` times as far beyond `first` as `second` is."""

    def value(a: float, b: float) -> int:
        return max(0, round(a + (b - a) * steps))

    found = copy.copy(second)
    blocks = [stats.grid[0] * stats.grid[1] * stats.grid[2] for stats in (first, second)]
    found.grid = (max(1, value(*blocks)), 1, 1)
    for name in ("warp_execs", "lane_execs"):
        setattr(found, name, [value(a, b) for a, b in zip(getattr(first, name), getattr(second, name), strict=True)])
    for name in ("requests", "bytes", "sectors", "wavefronts", "passes", "unique_sectors"):
        one, two = getattr(first, name), getattr(second, name)
        setattr(found, name, {key: value(one.get(key, 0), two.get(key, 0)) for key in {*one, *two}})
    return found


def cost_rows(case: Case, device: simulated.Device) -> list[str]:
    """The case's rows of the table, one for each size."""
    runs: dict[Sizes, tuple[list[Stats], int]] = {}

    def run(height: int, width: int, whole: int) -> tuple[list[Stats], int]:
        if (height, width) not in runs:
            call, compulsory = case.prepare(height, width, whole)
            with ptxsim.options(checks=False, stats=True) as launches:
                call(device)
            runs[height, width] = [launch.stats for launch in launches if launch.stats is not None], compulsory
        return runs[height, width]

    rows = []
    for height, width in case.sizes:
        small = case.simulated or ((16, width), (32, width))
        (one, least), (two, more) = (run(*size, height) for size in small)
        pixels = [h * w for h, w in small]
        steps = (height * width - pixels[0]) / (pixels[1] - pixels[0])
        stats = [extrapolate(a, b, steps) for a, b in zip(one, two, strict=True)]
        rows.append(cost_row(case.name, height, width, stats, round(least + (more - least) * steps)))
    return rows


def cost_row(name: str, height: int, width: int, stats: list[Stats], compulsory: int) -> str:
    bounds = [ptxsim.roofline(s, GPU) for s in stats]
    main = max(range(len(stats)), key=lambda i: bounds[i].seconds)
    moved = sum(s.compulsory_bytes for s in stats)
    loads, stores = _totals(stats, "load global"), _totals(stats, "store global")
    ways = sum(sum(s.wavefronts.values()) for s in stats) / max(1, sum(sum(s.passes.values()) for s in stats))
    shared = f"{ways:.2f}" if any(s.passes for s in stats) else "-"
    instructions = 32 * sum(s.warp_instructions for s in stats) / (height * width)
    seconds = sum(bound.seconds for bound in bounds)
    tensor = sum(bound.limits["tensor"] for bound in bounds) / seconds
    cells = [
        name,
        f"{width} x {height}",
        str(len(stats)),
        f"{moved / compulsory:.3f}",
        f"{loads['sectors'] / max(1, loads['requests']):.1f} / {stores['sectors'] / max(1, stores['requests']):.1f}",
        shared,
        f"{instructions:.0f}",
        f"{tensor:.0%}" if tensor else "-",
        bounds[main].bound,
        f"{seconds * 1e6:.1f}",
        " / ".join(f"{sum(ptxsim.roofline(s, gpu).seconds for s in stats) * 1e6:.0f}" for gpu in OTHERS),
    ]
    return f"| {' | '.join(cells)} |"


def _totals(stats: list[Stats], kind: str) -> dict[str, int]:
    rows = [s.memory(kind) for s in stats]
    return {name: sum(row[name] for row in rows) for name in ("requests", "sectors")}


TITLES = (
    "operator",
    "size",
    "launches",
    "bytes / compulsory",
    "sectors a request, load / store",
    "bank passes / ideal",
    "instructions a pixel",
    "tensor pipe",
    "bound by",
    "modelled us",
    " / ".join(OTHERS),
)


def all_cost_rows(folder: Path, so_far: bool = False, only: str = "") -> list[str]:
    """Rows of all cases, or of those with `only` in their name; those of unchanged kernels come from an earlier run.

    `so_far`: compute nothing.
    """
    rows: list[str] = []
    with contextlib.ExitStack() as stack:
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        stack.callback(setattr, convolutions, "fp32_precision", convolutions.fp32_precision)
        for case in (case for case in CASES if only in case.name):
            source = folder / f"{case.name.split(',')[0].split()[0]}.ptx"

            def compute(case: Case = case) -> list[str]:
                print(f"running {case.name}", file=sys.stderr, flush=True)
                torch.manual_seed(2407)
                return cost_rows(case, simulated.device())

            rates = str([ptxsim.GPUS[gpu] for gpu in (GPU, *OTHERS)])
            words = (case.name, str(case.sizes), str(case.simulated), rates, inspect.getsource(case.prepare))
            found = cached(source, (*words, inspect.getsource(cost_row)), compute, so_far)
            rows += found or [f"| {case.name} | not computed yet |{' |' * (len(TITLES) - 2)}"]
    return rows


def cached(ptx: Path, words: tuple[str, ...], compute: Callable[[], Any], so_far: bool = False) -> Any:
    """What `compute` returned before for the same device code and words, or does now; JSON in build/kernel_costs.

    None: it has not been computed, and `so_far` asks for earlier results only.
    """
    # Neither line numbers nor what follows the code, names for debuggers, change a result.
    code = ptx.read_text().partition("\t.section\t")[0]
    code = re.sub(r"^\s*(\.loc|\.file|//).*\n", "", code, flags=re.M)
    store = ROOT / "build" / "kernel_costs" / f"{simulated.digest([], code, *words)}.json"
    if not store.exists():
        if so_far:
            return None
        result = compute()
        store.parent.mkdir(parents=True, exist_ok=True)
        partial = store.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.replace(store)
    return json.loads(store.read_text())
