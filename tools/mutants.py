"""Planted faults that the tests must find: `python -m tools.mutants [--only NAME ...] [--list]`. To be run by hand.

Each fault breaks one promise of the operators. It is planted in a copy of the checkout (build/mutants-...), never in the
checkout itself; what it touches is built anew there, and its tests must fail with it and pass without it. A fault that
survives, does not build, or whose text is no longer in the source ends the run with status 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS_FAILED = 1  # pytest's exit status


@dataclass(frozen=True)
class Mutant:
    """`text` in `file` becomes `replacement`: breaks `promise`; `tests` are arguments of pytest that must notice."""

    name: str
    promise: str
    file: str
    text: str
    replacement: str
    tests: str

    @property
    def builds(self) -> tuple[str, ...]:
        """The command that compiles what the tests run."""
        if self.file.startswith("csrc/cuda/") or "/cuda/" in self.tests:
            return (sys.executable, "-c", "from simulated_gpu import device; device.build()")
        if self.file.startswith("csrc/"):
            return (sys.executable, "setup.py", "--quiet", "build_ext", "--inplace")
        return (sys.executable, "-c", "")


MUTANTS = (
    Mutant(
        "cuda-alignment",
        "any storage offset: vector accesses only where addresses allow them",
        "csrc/cuda/tensors.h",
        "if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % bytes != 0) return false;",
        "",
        "tests/safnet_ops/cuda/test_placement.py -k odd_offsets_in_storage",
    ),
    Mutant(
        "cuda-32bit",
        "more than 2^31 elements: 64-bit offsets where the largest needs them",
        "csrc/cuda/tensors.h",
        "if (tensor != nullptr && largest_offset(*tensor) > std::numeric_limits<int32_t>::max() - (1 << 20)) return true;",
        "(void)tensor;",
        "tests/safnet_ops/cuda/test_placement.py -k beyond_31_bits",
    ),
    Mutant(
        "cpu-32bit",
        "more than 2^31 elements: 64-bit offsets where the largest needs them",
        "csrc/cpu/sampling.h",
        "return reach > INT32_MAX || force_64bit_offsets();",
        "return (void)reach, force_64bit_offsets();",
        "tests/safnet_ops/test_placement.py -k beyond_31_bits",
    ),
    Mutant(
        "cuda-scale-of-nothing",
        "each gradient only when needed: nothing is read for the others",
        "csrc/cuda/scatter.cuh",
        "measuring || arguments.largest == nullptr ? 0",
        "measuring ? 0",
        "tests/safnet_ops/cuda/test_subsets_of_gradients.py -m 'not slow'",
    ),
    Mutant(
        "cpu-gradient-of-nothing",
        "each gradient only when needed: a tensor of no elements for the others",
        "csrc/cpu/group_conv_shuffle.cpp",
        "is_needed(needs, ConvInput::kPreluWeight) && prelu_weight.has_value();",
        "is_needed(needs, ConvInput::kPreluWeight);",
        "tests/safnet_ops/test_subsets_of_gradients.py",
    ),
    Mutant(
        "order-of-gradient-bits",
        "gradients are asked for in the order of the list of operators",
        "csrc/math/gradients.h",
        "  kFlowShort,\n  kFlowLong,\n",
        "  kFlowLong,\n  kFlowShort,\n",
        "tests/safnet_ops/test_gradient_bits.py",
    ),
    Mutant(
        "cuda-shared-memory-by-launch",
        "any number of host threads: the limit of shared memory is set once",
        "csrc/cuda/tensors.h",
        "  allowed.insert({kernel, device});\n",
        "",
        "tests/safnet_ops/cuda/test_launches.py -k shared_memory",
    ),
    Mutant(
        "cuda-groups-on-z",
        "any number of groups",
        "csrc/cuda/plans.h",
        "static_cast<uint32_t>(blocks * g.groups);",
        "static_cast<uint32_t>(blocks), p.plan.grid[2] = static_cast<uint32_t>(g.groups);",
        "tests/safnet_ops/cuda/test_launches.py -k groups",
    ),
    Mutant(
        "cuda-atomics-in-floating-point",
        "a backward that repeats bit for bit where determinism is asked for",
        "csrc/cuda/fused_fuse.cu",
        "if (deterministic && (need(FuseInput::kShort) || need(FuseInput::kLong))) {",
        "if (deterministic && needs < 0) {",
        "tests/safnet_ops/cuda/test_fused_fuse.py -k 'deterministic or order'",
    ),
    Mutant(
        "nan-flow-clamps",
        "NaN flow gives NaN at that pixel",
        "csrc/math/bilinear.h",
        "return {index, position - static_cast<Real>(index), inside};",
        "return {index, position >= 0 ? position - static_cast<Real>(index) : Real(0), inside};",
        "tests/safnet_ops/test_fused_fuse.py tests/safnet_ops/test_backward_warp.py -k 'nan_flow or special_flows'",
    ),
    Mutant(
        "slope-beyond-the-border",
        "the gradient at the clamped border is zero",
        "csrc/math/bilinear.h",
        "position >= last ? Real(0) : Real(1);",
        "position > last ? Real(0) : Real(1);",
        "tests/safnet_ops/test_backward_warp.py tests/safnet_ops/test_fused_fuse.py -k 'not compile and not export'",
    ),
    Mutant(
        "weights-of-zero",
        "explicit weights that sum to zero stay finite",
        "csrc/math/fusion.h",
        "kFusionEpsilon = 1e-9;",
        "kFusionEpsilon = 0;",
        "tests/safnet_ops/test_fused_fuse.py -k weights_of_zero",
    ),
    Mutant(
        "cpu-layout",
        "channels_last in, channels_last out",
        "csrc/cpu/tensors.h",
        "return tensor.size(1) > 1 && tensor.stride(1) == 1 && tensor.stride(3) >= tensor.size(1);",
        "return tensor.size(1) > 1 && tensor.stride(1) == 1 && tensor.stride(3) > tensor.size(1);",
        "tests/safnet_ops/test_backward_warp.py -k 'channels_last and not opcheck'",
    ),
    Mutant(
        "unchecked-shape",
        "errors name the operator, the argument, what was expected and what came",
        "safnet_ops/checks.py",
        "if tuple(value.shape) != shape:",
        "if len(value.shape) != len(shape):",
        "tests/safnet_ops/test_backward_warp.py tests/safnet_ops/test_fused_fuse.py -k errors",
    ),
    Mutant(
        "swapped-exposures-of-the-reference",
        "the reference computes the paper's fusion",
        "safnet_ops/reference.py",
        "base_short * mask_short, base_long",
        "base_short * mask_long, base_long",
        "tests/safnet_ops/test_fused_fuse.py -k reference_equals_the_formula",
    ),
    Mutant(
        "triton-weight-strides",
        "any strides: of a convolution's weights, too",
        "safnet_ops/triton/group_conv_shuffle.py",
        "parts = weight.reshape(",
        "parts = weight.view(",
        "tests/safnet_ops/triton/test_group_conv_shuffle.py -k any_strides",
    ),
)


@contextmanager
def working_copy() -> Iterator[Path]:
    """A copy of the checkout's files with its compiled modules; simulated builds are shared by hard links."""
    (ROOT / "build").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="mutants-", dir=ROOT / "build"))
    try:
        listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        modules = [str(path.relative_to(ROOT)) for path in (ROOT / "safnet_ops").glob("*.so")]
        for name in filter(None, [*files, *modules]):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        with suppress(FileNotFoundError):
            shutil.copytree(
                (ROOT / "build" / "simulated").resolve(), folder / "build" / "simulated", copy_function=_link
            )
        yield folder
    finally:
        shutil.rmtree(folder)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def verdict(mutant: Mutant, folder: Path, passing: set[str]) -> str | None:
    """What is wrong with this mutant or its tests; None if the tests find it."""
    original = (folder / mutant.file).read_text()
    if original.count(mutant.text) != 1:
        return f"its text is {original.count(mutant.text)} times in {mutant.file}, expected once"
    environment = {**os.environ, "FORCE_CUDA": "0"}
    run = partial(
        subprocess.run, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    pytest = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {mutant.tests}"
    target = folder / mutant.file
    try:
        if mutant.tests not in passing:
            run(mutant.builds, check=True)
            if run(pytest, shell=True).returncode != 0:
                return f"its tests do not pass without it: {mutant.tests}"
            passing.add(mutant.tests)
        target.write_text(original.replace(mutant.text, mutant.replacement))
        built = run(mutant.builds)
        if built.returncode != 0:
            return f"does not build: {built.stderr[-2000:]}"
        status = run(pytest, shell=True).returncode
    finally:
        target.write_text(original)
    if status == 0:
        return f"SURVIVED: no test of {mutant.tests} noticed"
    crashed = status < 0 or status > 128  # by a signal: a 32-bit offset may well point nowhere
    return None if status == TESTS_FAILED or crashed else f"pytest ended with {status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[mutant.name for mutant in MUTANTS])
    parser.add_argument("--list", action="store_true", help="print the faults and the promises they break")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if options.only is None or mutant.name in options.only]
    if options.list:
        print("\n".join(f"{mutant.name:36} {mutant.promise}" for mutant in chosen))
        return 0
    wrong = 0
    with working_copy() as folder:
        passing: set[str] = set()
        for mutant in chosen:
            problem = verdict(mutant, folder, passing)
            wrong += problem is not None
            print(f"{mutant.name:36} {problem or 'found'}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} planted faults found")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
