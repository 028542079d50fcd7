"""Writes docs/measured/kernels.md: registers, spills and modelled costs of the GPU kernels. Needs nvcc and Triton, and no GPU.

    python -m tools.kernel_costs [--cuda] [--triton] [--so-far]  # the whole page, or one part of it
    python -m tools.kernel_costs --case "census_loss backward"   # print: modelled costs of CUDA kernels, some rows
    python -m tools.kernel_costs --overhead                      # print: host time of calls of Triton kernels

Takes some minutes; an interrupted run goes on where it stopped.
"""

import argparse
import re
import sys
from pathlib import Path

from simulated_gpu import cuda_costs, device

PAGE = Path(__file__).resolve().parent.parent / "docs" / "measured" / "kernels.md"
MARKS = "<!-- triton:begin -->", "<!-- triton:end -->"


def triton_section(text: str) -> str:
    """The part of a page that is about Triton, marks included."""
    found = re.search(f"{MARKS[0]}.*?{MARKS[1]}", text, re.S)
    return found[0] if found else "\n".join(MARKS)


def cost_table(rows: list[str]) -> str:
    return "\n".join([f"| {' | '.join(cuda_costs.TITLES)} |", f"|{'---|' * len(cuda_costs.TITLES)}", *rows])


def page(rows: list[str], registers: str, triton: str) -> str:
    return f"""# The kernels in numbers

The CUDA kernels' part is written by `python -m tools.kernel_costs --cuda`; no GPU was used. How they work:
[cuda.md](../internals/cuda.md).

## CUDA: modelled cost on an {cuda_costs.GPU}

**Everything in this table is modelled, nothing is measured on a GPU.** The shipped host code launched the kernels'
PTX on a simulator (`ptxsim/`), which counted instructions and memory requests, on two small pictures each; the counts
were extrapolated linearly to the size of the row. The time is the roofline bound of those counts: the busiest unit at its
peak rate, no latency, no launch overhead, launches one after the other. Bytes are the 32-byte sectors that a launch
touches, each once, summed over an operator's launches, against inputs read once and outputs written once; at borders of
small pictures flows point outside, which saves some. `bound by` is the unit that limits the longest launch. `tensor pipe`
is the share of the modelled time that the tensor cores are busy, at the rate of `mma.sync`: on an H100 62.9 % of the data
sheet's, which only `wgmma` reaches (arXiv 2402.13499). The last column is the time on other
GPUs. Convolutions: decoder 120 -> 120 channels in 3 groups, refine 80 -> 80 channels.

{cost_table(rows)}

## CUDA: registers and occupancy

From `ptxas -v`. In brackets the share of an SM's warps that registers and threads allow; the convolutions hold one or
two blocks on an SM by design, with two or three stages of copies under way. {registers}

{triton}
"""


def section(registers: str, costs: str) -> str:
    """The Triton kernels' part of docs/measured/kernels.md."""
    import triton

    return f"""{MARKS[0]}
## The Triton kernels beside them

Written by `python -m tools.kernel_costs --triton`; no GPU was used. How these kernels work:
[triton.md](../internals/triton.md).

### Modelled cost on an H100, Triton

**Modelled, not measured**: the calls, columns and model of the CUDA kernels' table above, for the PTX that Triton
{triton.__version__} compiles for sm_80 from each kernel's first configuration, launched as for large pictures. Launches that
torch makes around the kernels (zeroing of sums, packing of weights, the last addition of partial sums) are in neither
count.

{costs}

Why they differ from the CUDA kernels:

- `fused_fuse`, `upsample_fuse`: a Triton tile has one width of access, so a lane reads four bytes and computes the
  addresses of one pixel, where a CUDA thread owns four pixels and shares them: more instructions, the same bytes.
  Backward, each lane adds its own shares to memory, where CUDA lanes first hand theirs to neighbours: fewer
  instructions, more atomics.
- `backward_warp`: likewise where pictures are contiguous; of channels_last ones both read 16 bytes a lane. What the
  deterministic gradients take before and after their scatter, torch launches here, outside the count.
- `census_loss`: no shared memory that a program could index, so grey planes are written first and read through L1,
  where the CUDA kernel keeps them in shared memory: more bytes and more instructions.
- `group_conv_shuffle`: each tap's pixels go through shared memory anew, where the CUDA kernel loads a tile with its halo
  once and shifts it: shared memory binds before the tensor cores do. 40 channels take 48 rows and 48 columns. Reads
  of contiguous half-precision pictures are two bytes wide, an address each. Exact float32 products read both factors from
  shared memory with bank conflicts, which no layout can be asked for to avoid: they cost ten times the CUDA kernel's.
- `group_conv_shuffle` backward (weights): each of the nine taps is a program of its own and reads both pictures again,
  where a CUDA warp keeps the sums of all nine.

### Registers, Triton

Registers a thread, from the machine code of Triton's own ptxas; in brackets with 64-bit offsets, compiled for float32 in
the first configuration. Of bfloat16, float64, convolutions and unusual calls there is the first configuration only
(`pytest -m slow tests/safnet_ops/triton` compiles all of them). A row that says "any" layout is one kernel for both: only its
strides differ. {registers}
{MARKS[1]}
"""


def _write(text: str) -> None:
    partial = PAGE.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(PAGE)
    print(f"wrote {PAGE}", file=sys.stderr)


def write_cuda(so_far: bool) -> None:
    folder = device.build()
    rows = cuda_costs.all_cost_rows(folder, so_far)
    registers = cuda_costs.register_tables(cuda_costs.compile_all(folder, list(cuda_costs.ARCHITECTURES), so_far))
    _write(page(rows, registers, triton_section(PAGE.read_text() if PAGE.exists() else "")))


def write_triton() -> None:
    from simulated_gpu import triton_costs

    registers = triton_costs.register_table(triton_costs.register_rows(""))
    text = section(registers, triton_costs.cost_table(triton_costs.cost_cases("")))
    found = PAGE.read_text()
    _write(found.replace(triton_section(found), text))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/measured/kernels.md.")
    parser.add_argument("--cuda", action="store_true", help="write the CUDA kernels' part")
    parser.add_argument("--triton", action="store_true", help="write the Triton kernels' part")
    parser.add_argument("--so-far", action="store_true", help="CUDA: compute nothing, take what earlier runs computed")
    parser.add_argument("--overhead", action="store_true", help="print the host time of calls of Triton kernels, only")
    parser.add_argument("--case", metavar="TEXT", help="print the CUDA kernels' rows with this in their name, only")
    options = parser.parse_args()
    if options.case is not None:
        print(cost_table(cuda_costs.all_cost_rows(device.build(), only=options.case)))
        return
    if options.overhead:
        from simulated_gpu import triton_costs

        triton_costs.print_overhead()
        return
    both = options.cuda == options.triton
    if both or options.cuda:
        write_cuda(options.so_far)
    if both or options.triton:
        write_triton()


if __name__ == "__main__":
    main()
