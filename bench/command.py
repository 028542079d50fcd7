"""`python -m bench.command` times `safnet fuse` as photographers run it and writes docs/measured/command.md.

Brackets of a camera's size are the demo's, enlarged and with a camera's noise, as 8-bit JPEG files.
"""

import datetime
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer
from rich.console import Console

from bench.measure import OtherLoad, machine
from safnet.files import write_text

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "bracket"
PAGE = ROOT / "docs" / "measured" / "command.md"
ASPECT = 1.5  # of the frames' sides
NOISE = 1.0  # standard deviation in 8-bit values
QUALITY = 93  # of JPEG
HEAD = """\
# The command, from files to files

{date}, {facts}.

`safnet fuse short.jpg reference.jpg long.jpg --ev -2 0 2 -o result.exr`, and with `--preview result.jpg`, in a process of its
own: start of Python, reading, alignment with everything measured, fusion, refining by the small model, writing. The frames are
the demo's, enlarged, with noise. Each row is the fastest of {rounds} runs; *peak* is resident memory. Other programs took
{load} of the processors meanwhile. Made by `python -m bench.command`.

| megapixels | | seconds | of the processors: user | system | peak, GiB |
|---|---|---|---|---|---|
"""

console = Console(stderr=True, log_path=False)


@dataclass(frozen=True)
class Run:
    """What the system counted of a process: seconds and GiB."""

    wall: float
    user: float
    system: float
    peak: float


def write_bracket(folder: Path, megapixels: float) -> list[Path]:
    """Three JPEG files of that size."""
    height = round((megapixels * 1e6 / ASPECT) ** 0.5)
    random = np.random.default_rng(1)
    paths = []
    for source in sorted(DEMO.glob("*.tif")):
        picture = cv2.imread(str(source), cv2.IMREAD_COLOR)
        assert picture is not None
        large = cv2.resize(picture, (round(ASPECT * height), height), interpolation=cv2.INTER_CUBIC)
        noisy = large + NOISE * random.standard_normal(large.shape, np.float32)
        paths.append(folder / f"{source.stem}.jpg")
        pixels = noisy.round().clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(paths[-1]), pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return paths


def run(arguments: list[str]) -> Run:
    """Run `safnet` once."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "safnet.cli", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Run(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss / 2**20)


def measure(
    megapixels: Annotated[list[float] | None, typer.Option(help="Sizes of the frames.", show_default="2 24 45")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row, of which the fastest counts.")] = 2,
    output: Annotated[Path, typer.Option(help="The page.")] = PAGE,
) -> None:
    """Time the whole command."""
    rows = []
    load = OtherLoad()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in megapixels or [2.0, 24.0, 45.0]:
            frames = [str(path) for path in write_bracket(folder, size)]
            fuse = ["fuse", *frames, "--ev", "-2", "0", "2", "-o", str(folder / "result.exr"), "--overwrite"]
            for label, options in (("", []), ("with preview", ["--preview", str(folder / "result.jpg")])):
                best = min((run(fuse + options) for _ in range(rounds)), key=lambda found: found.wall)
                rows.append(
                    f"| {size:g} | {label} | {best.wall:.1f} | {best.user:.1f} | {best.system:.1f} | {best.peak:.2f} |"
                )
                console.log(rows[-1])
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    others = load.share()
    share = "an unknown share" if others is None else f"{100 * others:.0f} %"
    head = HEAD.format(date=datetime.date.today(), facts=facts, rounds=rounds, load=share)
    write_text(output, head + "\n".join(rows) + "\n")


if __name__ == "__main__":
    typer.run(measure)
