"""Writes docs/kernels.md: registers, spills and occupancy of every CUDA kernel, and modelled costs.

    python -m tools.kernel_costs [--architectures 80 90]

ptxas compiles the kernels for every architecture, ptxsim executes them on the CPU and counts. Takes some minutes; needs
nvcc, and no GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests" / "cuda"), str(ROOT / "tests"), str(ROOT)]

import ptxsim  # noqa: E402
import simulated  # noqa: E402
import torch  # noqa: E402
from ptxsim import Stats  # noqa: E402

PAGE = ROOT / "docs" / "kernels.md"
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


def compile_ptx(ptx: Path, capability: int) -> dict[str, Compiled]:
    """Kernel name -> what ptxas says of it."""
    text = ptx.read_text()
    threads = {name: int(n) for name, n in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", text)}
    if capability < 80:
        ptx = simulated.compile_for_turing(ptx.stem)
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
        found[name] = Compiled(int(registers), int(stack), int(stores) + int(loads), threads.get(name, 256))
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


def compile_all(folder: Path, architectures: list[int]) -> dict[tuple[str, int], dict[str, Compiled]]:
    """(source, compute capability) -> what ptxas says of its kernels."""
    jobs = [(ptx, capability) for capability in architectures for ptx in sorted(folder.glob("*.ptx"))]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: compile_ptx(*job), jobs)
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
    lines = [
        f"{total} compilations, {total // len(architectures)} kernels each for {len(architectures)} architecture(s)."
    ]
    if spilling:
        lines += [f"{len(spilling)} use local memory:", "", *(f"- {line}" for line in spilling)]
    else:
        lines.append("None has a stack frame, none spills.")
    header = " | ".join(f"sm_{capability}" for capability in architectures)
    lines += ["", f"| kernel | {header} |", f"|---|{'---|' * len(architectures)}"]
    for source in sorted({source for source, _ in results}):
        for name in results[source, architectures[-1]]:
            cells = [results[source, capability].get(name) for capability in architectures]
            shown = [
                f"{cell.registers} ({cell.occupancy(capability):.0%})" if cell else "-"
                for cell, capability in zip(cells, architectures, strict=True)
            ]
            lines.append(f"| `{readable(name)}` | {' | '.join(shown)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Case:
    """One row of the cost table: a call of an operator, and the bytes it cannot avoid."""

    name: str
    size: str
    pixels: int
    call: Callable[[simulated.Device], object]
    compulsory: int


def size_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def fuse_inputs(n: int, height: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Three pictures, smooth flows of a few pixels, masks, LDR: what a moving scene gives."""
    images = [torch.rand(n, 3, height, width).to(dtype) for _ in range(3)]
    y, x = torch.meshgrid(torch.linspace(0, 6, height), torch.linspace(0, 9, width), indexing="ij")
    flow = torch.stack([4 * torch.sin(x + y) + 2.3, 3 * torch.cos(y - x) - 1.7]).expand(n, 2, height, width)
    flows = [flow.contiguous(), (-flow).contiguous()]
    masks = [torch.rand(n, 1, height, width) for _ in range(2)]
    return [*images, *flows, *masks, torch.rand(n, 3, height, width).to(dtype)]


def fuse_cases() -> list[Case]:
    cases = []
    for dtype in (torch.float32, torch.float16):
        values = fuse_inputs(1, 1000, 1500, dtype)
        cases.append(
            Case(
                f"fused_fuse, {str(dtype)[6:]}", "1500 x 1000", 1500 * 1000,
                lambda d, v=values: d.call("fused_fuse", *v, None, None, None, False), size_of(*values, values[0]),
            )
        )  # fmt: skip
    values = fuse_inputs(1, 512, 512, torch.float32)
    grad = torch.rand_like(values[0])
    for deterministic in (False, True):
        label = "deterministic" if deterministic else "atomic"
        cases.append(
            Case(
                f"fused_fuse backward, {label}", "512 x 512", 512 * 512,
                lambda d, v=values, g=grad, m=deterministic: d.call(
                    "fused_fuse_backward", g, *v, None, None, None, False, 0xFF, m
                ),
                size_of(grad, *values, *values),
            )
        )  # fmt: skip
    values = fuse_inputs(1, 1000, 1500, torch.float32)
    low = [torch.nn.functional.interpolate(value, (500, 752), mode="bilinear") for value in values[3:7]]
    cases.append(
        Case(
            "upsample_fuse, float32", "1500 x 1000", 1500 * 1000,
            lambda d, v=values, m=low: d.call("upsample_fuse", *v[:3], *m, v[7]),
            size_of(*values[:3], values[7], values[0], *low, *values[3:7]),
        )
    )  # fmt: skip
    return cases


def warp_cases() -> list[Case]:
    flow = fuse_inputs(1, 500, 752, torch.float32)[3]
    image = torch.rand(1, 40, 500, 752)
    last = image.contiguous(memory_format=torch.channels_last)
    grad = torch.rand_like(image)
    pixels, once = 500 * 752, size_of(image, flow, image)
    return [
        Case("backward_warp, 40 channels", "752 x 500", pixels, lambda d: d.call("backward_warp", image, flow), once),
        Case(
            "backward_warp, 40 channels, channels_last", "752 x 500", pixels,
            lambda d: d.call("backward_warp", last, flow), once,
        ),
        Case(
            "backward_warp backward, 40 channels", "752 x 500", pixels,
            lambda d: d.call("backward_warp_backward", grad, image, flow, True, True, False),
            size_of(grad, image, flow, image, flow),
        ),
    ]  # fmt: skip


def census_cases() -> list[Case]:
    prediction, target, grad = torch.rand(1, 3, 512, 512), torch.rand(1, 3, 512, 512), torch.tensor(1.0)
    return [
        Case(
            "census_loss", "512 x 512", 512 * 512, lambda d: d.call("census_loss", prediction, target, 7, False),
            size_of(prediction, target),
        ),
        Case(
            "census_loss backward", "512 x 512", 512 * 512,
            lambda d: d.call("census_loss_backward", grad, prediction, target, 7, False),
            size_of(prediction, target, prediction),
        ),
    ]  # fmt: skip


def conv_cases() -> list[Case]:
    cases = []
    for channels, groups, label in ((120, 3, "decoder"), (80, 1, "refine")):
        height, width = (250, 376) if groups == 3 else (128, 192)
        for dtype, layout in (
            (torch.float16, torch.channels_last),
            (torch.float16, torch.contiguous_format),
            (torch.float32, torch.channels_last),
        ):
            image = torch.randn(1, channels, height, width).to(dtype).contiguous(memory_format=layout)
            weight = torch.randn(channels, channels // groups, 3, 3).to(dtype)
            vector = torch.rand(channels).to(dtype)
            name = "channels_last" if layout == torch.channels_last else "contiguous"
            cases.append(
                Case(
                    f"group_conv_shuffle, {label} {channels} -> {channels}, groups {groups}, {str(dtype)[6:]}, {name}",
                    f"{width} x {height}", height * width,
                    lambda d, i=image, w=weight, v=vector, g=groups: d.call(
                        "group_conv_shuffle", i, w, v, v, None, g, 1, 1, False
                    ),
                    size_of(image, image, weight),
                )
            )  # fmt: skip
    return cases


def cost_row(case: Case, device: simulated.Device) -> str:
    with ptxsim.options(checks=False, stats=True) as launches:
        case.call(device)
    stats = [launch.stats for launch in launches if launch.stats is not None]
    bounds = [ptxsim.roofline(s, GPU) for s in stats]
    main = max(range(len(stats)), key=lambda i: bounds[i].seconds)
    moved = sum(s.compulsory_bytes for s in stats)
    loads, stores = _totals(stats, "load global"), _totals(stats, "store global")
    ways = sum(sum(s.wavefronts.values()) for s in stats) / max(1, sum(sum(s.passes.values()) for s in stats))
    shared = f"{ways:.2f}" if any(s.passes for s in stats) else "-"
    instructions = 32 * sum(s.warp_instructions for s in stats) / case.pixels
    seconds = sum(bound.seconds for bound in bounds)
    tensor = sum(bound.limits["tensor"] for bound in bounds) / seconds
    cells = [
        case.name,
        case.size,
        str(len(stats)),
        f"{moved / case.compulsory:.3f}",
        f"{loads['sectors'] / max(1, loads['requests']):.1f} / {stores['sectors'] / max(1, stores['requests']):.1f}",
        shared,
        f"{instructions:.0f}",
        f"{tensor:.0%}" if tensor else "-",
        bounds[main].bound,
        f"{seconds * 1e6:.1f}",
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
)


def cost_rows() -> list[str]:
    device = simulated.device()
    rows = []
    for case in [*fuse_cases(), *warp_cases(), *census_cases(), *conv_cases()]:
        print(f"running {case.name} at {case.size}", file=sys.stderr, flush=True)
        rows.append(cost_row(case, device))
    return rows


def page(rows: list[str], registers: str) -> str:
    costs = "\n".join([f"| {' | '.join(TITLES)} |", f"|{'---|' * len(TITLES)}", *rows])
    return f"""# The CUDA kernels in numbers

Written by `python -m tools.kernel_costs`; no GPU was used. How the kernels work: [cuda.md](cuda.md).

## Modelled cost on an {GPU}

**Everything in this table is modelled, nothing is measured on a GPU.** The shipped host code launched the kernels'
PTX on a simulator (tests/ptxsim), which counted instructions and memory requests; the time is the roofline bound of
those counts: the busiest unit at its peak rate, no latency, no launch overhead, launches one after the other. Bytes
are the 32-byte sectors that a launch touches, each once, summed over an operator's launches, against inputs read once
and outputs written once. `bound by` is the unit that limits the longest launch. `tensor pipe` is the share of the
modelled time that the tensor cores are busy. `group_conv_shuffle` of float32 is exact (no TF32).

{costs}

## Registers and occupancy

From `ptxas -v`. In brackets the share of an SM's warps that registers and threads allow;
group_conv_shuffle holds one to two blocks of 8 warps on an SM by design, with three stages of copies
under way. {registers}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/kernels.md.")
    parser.add_argument(
        "--architectures",
        type=int,
        nargs="+",
        choices=list(ARCHITECTURES),
        default=list(ARCHITECTURES),
        help="default: all",
    )
    options = parser.parse_args()
    torch.manual_seed(2407)
    rows = cost_rows()
    PAGE.write_text(page(rows, register_tables(compile_all(simulated.build(), options.architectures))))
    print(f"wrote {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
