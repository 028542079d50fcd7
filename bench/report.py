"""`python -m bench.report` measures all operators and both models on this machine and writes docs/measured/benchmarks.md."""

import datetime
import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import bench.models
from bench.case import STOCK, Case, Direction, Work, WrongResult
from bench.measure import OtherLoad, Peaks, Times, extra_memory, in_turns, machine, measure_peaks, set_threads
from bench.models import HEIGHT, OURS, REFERENCE, WIDTH, Score
from bench.picture import Bar, draw_ratios
from safnet_ops.operators import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
PICTURE = "benchmarks.png"
MOST_OTHER_LOAD = 0.05  # share of the processors that others may take before measuring starts
HOW = """\
**How.** Each implementation is first checked against the reference, results and gradients; a wrong one stops the run. The
implementations of a row then run by turns, 5 to 25 rounds, so that a disturbance meets all. Times are medians, ± half the
distance of the quartiles. *reference* is the exact definition in `safnet_ops/reference.py`. *stock* is what one writes with
PyTorch's own operators (`bench/baselines.py`: grid_sample, a one-hot convolution for the census), where that is not the
reference itself, as it is for convolutions. *forward* is inference, *both* a forward that keeps what a backward needs, and the
backward. fused_fuse's gradients are those of flows and masks, as training needs them, census_loss's that of the prediction,
the others' those of all inputs. *extra* is peak resident memory beyond inputs and results, true to about 0.1 MB. What allocates
much, as the reference does, is as fast as the system hands out memory: on a virtual machine, ratios to it vary from run to run.
"""
OPERATORS_HEAD = """\
## Operators

Milliseconds, and in brackets the ratio to the C++ kernel's time. *of FMA* and *of copy* are the shares of the two peaks above
that the C++ kernel reaches, where a multiply-add counts as two operations, and inputs and results as read or written once
(it may move more). Counted are the multiply-adds of the definition; Winograd's method does up to four times fewer, so a
convolution may pass 100 %.

| operator | | C++ | reference | stock | extra MB: C++ / reference / stock | of FMA | of copy |
|---|---|---|---|---|---|---|---|"""
MODELS_HEAD = f"""\
## Models, {HEIGHT}x{WIDTH}

Both on `examples/bracket`, resized; the full model with random weights, which does not change its time. Results are compared
with those of the reference operators in float32: *PSNR* of the tone-mapped pictures, and the largest difference in linear
radiance from 0 to 1. *peak* is resident memory beyond inputs and weights. bfloat16 is autocast. torch.compile runs with
`torch._inductor.config.freezing`, OpenVINO the graph that torch.export gives; their time to compile is not counted.
Of two runs one after the other the second counts. *in one Workspace*: results lie in memory that `safnet_ops.Workspace` keeps,
as OpenVINO keeps its own.
"""
NO_BFLOAT16 = """\
This processor has no bfloat16 arithmetic. The libraries emulate it, which takes many times longer, so only the C++ operators
are measured in it.
"""
MODULES = [importlib.import_module(f"bench.test_{name}") for name in OPERATORS]

console = Console(stderr=True, log_path=False)


@dataclass(frozen=True)
class Row:
    """What was measured of one case in one direction; times and memory by implementation."""

    case: Case
    direction: Direction
    times: dict[str, Times]
    memory: dict[str, int | None]
    compulsory_bytes: int
    multiply_adds: int

    def ratio(self, name: str) -> float | None:
        """Another implementation's median time to the C++ kernel's."""
        return self.times[name].median / self.times["cpp"].median if name in self.times else None


@dataclass(frozen=True)
class Models:
    scores: dict[str, list[Score]]
    missing: dict[str, str]


def report(
    output: Annotated[Path, typer.Option(help=f"Folder for benchmarks.md and {PICTURE}.")] = ROOT / "docs" / "measured",
    only: Annotated[
        str, typer.Option(help="Print only operators whose name begins so, or 'models'; write nothing.")
    ] = "",
    models: Annotated[bool, typer.Option(help="Measure the models, too, which takes most of the time.")] = True,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Measure though others use this machine; the page says so.")
    ] = False,
) -> None:
    """Measure all operators and both models, and write the page and the picture of the ratios."""
    set_threads()
    busy = wait_for_quiet(anyway)
    began, load = time.monotonic(), OtherLoad()
    peaks = measure_peaks()
    cases = [case for module in MODULES for case in module.CASES if case.operator.startswith(only)]
    rows = [measure(case, direction) for case in cases for direction in case.directions if direction in case.reported]
    end_to_end = measure_models() if models and only in ("", "models") else Models({}, {})
    lines = [
        *page_head(busy, load.share(), time.monotonic() - began, peaks),
        *targets_table(rows),
        *operators_table(rows, peaks),
        *models_tables(end_to_end),
    ]
    if only:
        print("\n".join(lines))
        return
    draw_ratios([bar(row) for row in rows], output / PICTURE)
    write(output / "benchmarks.md", "\n".join(lines))
    console.print(f"wrote {output / 'benchmarks.md'} and {output / PICTURE}")


def wait_for_quiet(anyway: bool) -> float | None:
    """The share of the processors that others take; too much is an error unless `anyway`."""
    load = OtherLoad()
    time.sleep(3)
    share = load.share()
    if share is not None and share > MOST_OTHER_LOAD and not anyway:
        console.print(
            f"bench.report: other processes take {share:.0%} of the processors, expected at most {MOST_OTHER_LOAD:.0%}:"
            " stop them, or measure with --anyway"
        )
        raise typer.Exit(1)
    return share


def measure(case: Case, direction: Direction) -> Row:
    """All implementations of a case in one direction, behind the correctness gate."""
    console.log(f"{case} {direction}")
    works = {name: Work(case, name, direction) for name in case.implementations}
    for work in works.values():
        work.check()
    memory = {name: extra_memory(work.prepare_for_memory) for name, work in works.items()}
    times = in_turns({name: work.prepare for name, work in works.items()}, budget=2.0)
    some = works["reference"]
    return Row(case, direction, times, memory, some.compulsory_bytes(), some.multiply_adds())


def measure_models() -> Models:
    scores: dict[str, list[Score]] = {}
    missing: dict[str, str] = {}
    for variant in bench.models.VARIANTS:
        scores[variant], without = bench.models.compare(variant, console.log)
        missing |= {f"{variant} model, {name}": reason for name, reason in without.items()}
    return Models(scores, missing)


def bar(row: Row) -> Bar:
    label = f"{row.case} {row.direction}"
    to_reference = row.ratio("reference")
    assert to_reference is not None
    return Bar(label, to_reference, row.ratio(STOCK), row.case.targets.get(row.direction))


def page_head(busy: float | None, share: float | None, seconds: float, peaks: Peaks) -> list[str]:
    facts = machine()
    others = "unknown" if share is None else f"{share:.0%}"
    lines = [
        "# Benchmarks",
        "",
        f"Written by `python -m bench.report` on {datetime.date.today():%Y-%m-%d} in {seconds / 60:.0f} minutes.",
        "All numbers are of that one run.",
        "",
    ]
    if busy is not None and busy > MOST_OTHER_LOAD:
        lines += [f"**Other processes took {busy:.0%} of the processors before the run: times are too long.**", ""]
    return [
        *lines,
        "| | |",
        "|---|---|",
        f"| processor | {facts['processor']}; {facts['threads']} threads; PyTorch sees {facts['instructions']} |",
        f"| software | torch {facts['torch']}, Python {facts['python']}, {facts['system']} |",
        f"| memory | {facts['memory']} |",
        f"| float32 peak | {peaks.float32 / 1e9:.0f} GFLOP/s: the library's product of two 2048x2048 matrices, best run |",
        f"| copy | {peaks.copy / 1e9:.1f} GB/s read and written: 256 MiB to memory written before, best run |",
        f"| other processes | took {others} of the processors while measuring |",
        "",
        HOW,
    ]


def targets_table(rows: list[Row]) -> list[str]:
    lines = [
        "## Targets",
        "",
        "How many times faster than the reference the C++ kernel must be, should be, and is; and than stock PyTorch.",
        "",
        "| operator | must | aim | to the reference | to stock | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        targets = row.case.targets.get(row.direction)
        ratio = row.ratio("reference")
        if targets is None or ratio is None:
            continue
        must, aim = targets
        verdict = "aim reached" if ratio >= aim else "must reached" if ratio >= must else "**missed**"
        cells = [f"{row.case}, {row.direction}", f"{must:g}x", f"{aim:g}x", times_faster(ratio)]
        lines.append(table_line([*cells, times_faster(row.ratio(STOCK)), verdict]))
    return [*lines, "", f"![Ratios of all operators]({PICTURE})", ""]


def operators_table(rows: list[Row], peaks: Peaks) -> list[str]:
    lines = [OPERATORS_HEAD]
    for row in rows:
        seconds = row.times["cpp"].median
        arithmetic = 2 * row.multiply_adds / seconds / peaks.float32
        names = [name for name in ("cpp", "reference", STOCK) if name in row.times]
        lines.append(
            table_line(
                [
                    str(row.case),
                    row.direction,
                    milliseconds(row.times["cpp"]),
                    *(
                        f"{milliseconds(row.times[name])} ({times_faster(row.ratio(name))})"
                        if name in row.times
                        else ""
                        for name in ("reference", STOCK)
                    ),
                    " / ".join(megabytes(row.memory[name]) for name in names),
                    f"{arithmetic:.0%}" if row.multiply_adds else "",
                    f"{row.compulsory_bytes / seconds / peaks.copy:.0%}",
                ]
            )
        )
    return [*lines, ""]


def models_tables(models: Models) -> list[str]:
    if not models.scores:
        return ["The models were left out of this run."]
    lines = [MODELS_HEAD]
    for variant, scores in models.scores.items():
        ours = next(score for score in scores if score.name == OURS and score.precision == torch.float32)
        lines += [
            f"**The {variant} model**",
            "",
            f"| way | precision | seconds | to {OURS} | PSNR, off by | peak MB |",
            "|---|---|---|---|---|---|",
        ]
        for score in scores:
            exact = score.name == REFERENCE and score.precision == torch.float32
            lines.append(
                table_line(
                    [
                        score.name,
                        str(score.precision).removeprefix("torch."),
                        f"{score.times.median:.2f} ± {score.times.spread:.2f}",
                        times_faster(score.times.median / ours.times.median),
                        "" if exact else f"{score.psnr:.0f} dB, {score.error:.0e}",
                        megabytes(score.memory),
                    ]
                )
            )
        lines.append("")
    if not bench.models.has_fast_bfloat16():
        lines.append(NO_BFLOAT16)
    lines += [f"Not measured: {name}: {reason}." for name, reason in models.missing.items()]
    return lines


def milliseconds(times: Times) -> str:
    digits = 2 if times.median < 0.00995 else 1 if times.median < 0.0995 else 0
    return f"{times.median * 1e3:.{digits}f} ± {times.spread * 1e3:.{digits}f}"


def megabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.1f}" if count < 99.5e6 else f"{count / 1e6:.0f}"


def times_faster(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x" if ratio < 9.95 else f"{ratio:.0f}x"


def table_line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text.rstrip() + "\n")
    partial.replace(path)


if __name__ == "__main__":
    try:
        typer.run(report)
    except WrongResult as wrong:
        console.print(f"bench.report: {wrong}; nothing was written")
        raise SystemExit(1) from None
