"""`pytest bench/` compares all backends with the reference, operator by operator, behind a correctness gate.

Each test is one implementation of one case in one direction; pytest-benchmark puts those of one case side by side, with the
ratio to the fastest in brackets, and a second table gives their peak memory. SAFNET_BENCH_THREADS sets the number of CPU
threads (default: all cores).
"""

import time

import pytest

from bench.case import Case, Direction, Work
from bench.measure import extra_memory, rounds_for, set_threads

SECONDS = 1.0  # about, for the rounds of one test

_memory: list[tuple[str, str, int | None]] = []


@pytest.fixture(autouse=True)
def prepared():
    set_threads()


@pytest.fixture
def speed(benchmark):
    """speed(case, direction, implementation): check it, then take its time and peak memory."""

    def run(case: Case, direction: Direction, implementation: str) -> None:
        work = Work(case, implementation, direction)
        work.check()
        memory = extra_memory(work.prepare_for_memory, runs=1)
        benchmark.group = f"{case} {direction}"
        benchmark.extra_info["extra_bytes"] = memory
        _memory.append((benchmark.group, implementation, memory))
        began = time.perf_counter()
        work.prepare()()
        rounds = rounds_for(time.perf_counter() - began, SECONDS, least=3, most=15)
        benchmark.pedantic(lambda timed: timed(), setup=lambda: ((work.prepare(),), {}), rounds=rounds, warmup_rounds=1)

    return run


def pytest_terminal_summary(terminalreporter):
    if not _memory:
        return
    terminalreporter.section("peak memory beyond inputs and results, MB")
    for group in dict.fromkeys(group for group, _, _ in _memory):
        cells = [
            f"{name} {'unknown' if memory is None else format(memory / 1e6, '.1f')}"
            for other, name, memory in _memory
            if other == group
        ]
        terminalreporter.write_line(f"{group}: {', '.join(cells)}")
