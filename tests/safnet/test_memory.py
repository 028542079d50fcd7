"""Memory: what is said to be needed is enough, and too little is said in one line."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from safnet.fuse import TILE
from safnet.memory import GIB, RADIANCE_BYTES, RESULT_BYTES, WRITING_BYTES, needed_memory, parse_size
from tests.support.scenes import handheld

HEIGHT, WIDTH = 1200, 1600
# Of a process, in bytes. On Linux getrusage would also count what the process was forked from.
PEAK = """
import re, resource, sys
def peak():
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Three JPEG files of 2 megapixels."""
    folder = tmp_path_factory.mktemp("frames")
    paths = []
    for number, frame in enumerate(handheld((6.0, 1.0), height=150, width=200)[0]):
        picture = (255 * frame[0].permute(1, 2, 0).numpy()[..., ::-1]).round().astype(np.uint8)
        paths.append(folder / f"{number}.jpg")
        cv2.imwrite(str(paths[-1]), cv2.resize(picture, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC))
    return [str(path) for path in paths]


def fuse(frames, output, *options, before=""):
    """Run the command in a process of its own: its exit code, what it wrote to stderr, and its peak in bytes."""
    code = (
        f"{PEAK}{before}\n"
        "from safnet.cli import app\n"
        "code = app(sys.argv[1:], standalone_mode=False)\n"
        "print(peak())\n"
        "sys.exit(code)"
    )
    arguments = ["fuse", *frames, "--ev", "-2", "0", "2", "-o", str(output), "--trust", *options]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr, int(done.stdout.split()[-1])


def test_what_is_needed_is_enough(frames, tmp_path):
    needed = needed_memory(HEIGHT, WIDTH, 3, 1, "small", TILE)
    code, error, peak = fuse(frames, tmp_path / "r.exr", "--memory", str(needed))
    assert code == 0, error
    assert peak < needed
    assert peak > needed / 2


def test_too_little_is_refused_with_what_is_needed(frames, tmp_path):
    code, error, _ = fuse(frames, tmp_path / "r.exr", "--memory", "200MB")
    assert code == 1
    assert re.fullmatch(
        r"error: --memory 0.19 GiB is too little: frames of 1600 x 1200 need about \d\.\d\d GiB\n", error
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are Linux's")
def test_running_out_of_memory_is_one_line(frames, tmp_path):
    before = (
        "import torch, safnet.fuse; now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
        "resource.setrlimit(resource.RLIMIT_AS, (now + 300 * 2**20,) * 2)"
    )
    code, error, _ = fuse(frames, tmp_path / "r.exr", "--threads", "1", before=before)
    assert code == 1
    assert re.fullmatch(r"error: out of memory: frames of 1600 x 1200 need about .* GiB\n", error)
    assert list(tmp_path.iterdir()) == []


def test_more_is_needed_of_larger_tiles_and_frames():
    need = needed_memory(4000, 6000, 3, 1, "full", 448)
    assert needed_memory(4000, 6000, 3, 1, "full", 2000) > need + 4e9
    assert needed_memory(4000, 6000, 3, 1, "full", 0) == needed_memory(4000, 6000, 3, 1, "full", 10000)
    assert needed_memory(4000, 6000, 3, 2, "full", 448) - need == 9 * 24e6
    assert needed_memory(4000, 6000, 3, 1, "full", 448, inspect=True) > need + 1e9


def test_a_mask_counts():
    need = needed_memory(4000, 6000, 3, 1, "small", 448)
    assert needed_memory(4000, 6000, 3, 1, "small", 448, mask=(24_000_000, 4)) - need == 24e6
    large = needed_memory(4000, 6000, 3, 1, "small", 448, mask=(200_000_000, 3))
    assert large > 200e6 * 32 + 9 * 24e6, "reading a large mask needs more than fusing"


def test_writing_counts_where_it_takes_more_than_fusing():
    need = [
        needed_memory(10000, 10000, 3, 1, "small", 448, suffix=suffix) for suffix in (".exr", ".dng", ".jpg", ".avif")
    ]
    assert need[0] == need[1] == need[2]
    assert need[3] - need[0] == pytest.approx(72e8 - 24e8 - 1.25 * GIB, abs=1)
    assert needed_memory(1000, 1000, 3, 1, "small", 448, suffix=".avif") == needed_memory(
        1000, 1000, 3, 1, "small", 448
    )


@pytest.mark.parametrize("name", ["r.avif", "r.dng"])
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_writers_need_no_more_than_is_said(tmp_path, name):
    """Of what is held beside the radiance while it is written, in a process that has only that."""
    code = (
        PEAK
        + """
from pathlib import Path
import imagecodecs, numpy as np, torch
import safnet.dng, safnet.pipeline
from safnet.avif import write_avif
from safnet.images import write_radiance
light = np.random.default_rng(0).random((2000, 3000, 3), np.float32)
light **= 8
path = Path(sys.argv[1])
write = write_avif if path.suffix == ".avif" else write_radiance
write(path, light[:64, :64].copy(), exposure=1.0)  # once, for what libraries set up
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
write(path, light, exposure=1.0)
print((peak() - before) / 6e6)
"""
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < WRITING_BYTES.get(Path(name).suffix, RESULT_BYTES - RADIANCE_BYTES)


def test_a_large_mask_is_refused_before_it_is_read(frames, tmp_path):
    """Of 36 times the pixels of the frames, reading it takes more than all else."""
    side = (6 * HEIGHT, 6 * WIDTH)
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((*side, 3), np.uint8))
    needed = needed_memory(HEIGHT, WIDTH, 3, 1, "small", TILE, mask=(side[0] * side[1], 3))
    assert needed > needed_memory(HEIGHT, WIDTH, 3, 1, "small", TILE) + 3e8
    arguments = "--mask", str(tmp_path / "mask.png"), "--memory"
    code, error, small = fuse(frames, tmp_path / "r.exr", *arguments, str(needed - 1000))
    assert code == 1
    assert "is too little" in error
    code, error, peak = fuse(frames, tmp_path / "r.exr", *arguments, str(needed))
    assert code == 0, error
    assert needed * 0.8 < peak < needed
    assert small < peak / 2


@pytest.mark.parametrize(("text", "size"), [("4GB", 4e9), ("1.5 GiB", 1.5 * GIB), ("800mb", 8e8), ("12345", 12345)])
def test_sizes_are_understood(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "4 G", "-1GB", "lots", "4GBs"])
def test_what_is_no_size_is_named(text):
    with pytest.raises(ValueError, match=f"--memory must be a size like 4GB or 800MB, got {text!r}"):
        parse_size(text)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again():
    program = """
import resource, sys, torch
from safnet.memory import reuse_freed_memory
if sys.argv[1] == "reuse":
    reuse_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(12 * 2**20) + 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""

    def faults(way):
        done = subprocess.run([sys.executable, "-c", program, way], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("reuse") < faults("plain") / 10
