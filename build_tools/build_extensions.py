"""The build_ext command: compiles csrc/ with ninja, in parallel, and writes down what it decided.

csrc/cpu/*.cpp is compiled once per instruction set (csrc/cpu/kernel.h says how that fits together) into libsafnet_ops,
csrc/cuda/*.cu for a list of GPUs (cuda_toolkit.py) into libsafnet_ops_cuda. Neither knows Python; the module safnet_ops._C
does. Environment: CXX, MAX_JOBS, SAFNET_OPS_BUILD=0 (install without kernels), SAFNET_OPS_SANITIZE=1 (AddressSanitizer and
UBSan); CUDA_HOME, FORCE_CUDA, TORCH_CUDA_ARCH_LIST.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from build_tools import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
SCHEMAS = ROOT / "safnet_ops" / "schemas.txt"
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
CPU_LIBRARY, CUDA_LIBRARY = f"libsafnet_ops{SUFFIX}", f"libsafnet_ops_cuda{SUFFIX}"
OLDEST_TORCH = "2.11"
TARGET_VERSION = "0x020b000000000000"  # TORCH_TARGET_VERSION of OLDEST_TORCH: use nothing newer from its stable ABI

# Neither changes a value: they let loops with floor, select and comparison vectorise. -ffast-math is not used.
VECTOR_FLAGS = ["-fno-math-errno", "-fno-trapping-math"]
X86_VARIANTS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ],
}


class BuildExtensions(build_ext):
    """Replaces setuptools' compilation by one ninja run over all modules."""

    def run(self) -> None:
        self.decisions: list[str] = []
        reason = self._why_not()
        if reason:
            self._decide(f"not building the C++ kernels: {reason}; the PyTorch reference will serve all operators")
            self.extensions: list[Extension] = []
            self._write_report({CPU_LIBRARY: reason})
            return
        self._build_cpu()
        reason = self._why_not_cuda()
        if reason:
            self._decide(f"not building the CUDA kernels: {reason}")
        else:
            self._build_cuda()
        self._write_report({CUDA_LIBRARY: reason} if reason else {})

    def _output(self, name: str | None = None) -> Path:
        """Where a library goes, or the module."""
        module = Path(self.get_ext_fullpath("safnet_ops._C")).resolve()
        return module.with_name(name) if name else module

    def _ninja(self, file: "NinjaFile") -> None:
        file.run(os.environ.get("MAX_JOBS"))

    def _why_not(self) -> str | None:
        if os.environ.get("SAFNET_OPS_BUILD") == "0":
            return "SAFNET_OPS_BUILD=0 is set"
        if sys.platform == "win32":
            return "they are written for GCC and Clang on Linux and macOS, and nobody has ported their build to Windows"
        self.compiler_path = (
            shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++") or ""
        )
        if not self.compiler_path:
            return "no C++ compiler found (install g++ or clang++, or set CXX), then run pip install again"
        return None

    def _write_report(self, missing: dict[str, str]) -> None:
        """For `python -m safnet_ops.info`, beside the libraries: what was decided, and why one was not built."""
        report = self._output("build_report.json")
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({"decisions": self.decisions, "missing": missing}, indent=1) + "\n")

    def _decide(self, decision: str) -> None:
        self.decisions.append(decision)
        print(f"safnet-ops build: {decision}", file=sys.stderr, flush=True)

    def _build_cpu(self) -> None:
        import torch

        compiler = subprocess.run(
            [self.compiler_path, "--version"], capture_output=True, text=True
        ).stdout.splitlines()[0]
        variants = self._instruction_sets()
        flags = [
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unknown-pragmas",
            *VECTOR_FLAGS,
        ]
        link_flags: list[str] = []
        folder = f"cpu-{sys.implementation.cache_tag}"
        if os.environ.get("SAFNET_OPS_SANITIZE") == "1":
            folder += "-sanitized"
            sanitizers = [
                "-O1",  # the last one wins; at -O3 the convolution alone compiles for minutes
                "-g",
                "-fsanitize=address,undefined,float-cast-overflow",
                "-fno-sanitize-recover=all",
                "-fno-omit-frame-pointer",
            ]
            flags, link_flags = [*flags, *sanitizers], sanitizers
            self._decide("with AddressSanitizer and UndefinedBehaviorSanitizer")
        self._decide(f"compiler {self.compiler_path} ({compiler}), flags {' '.join(flags)}")
        self._decide(f"headers of torch {torch.__version__}, stable ABI of torch {OLDEST_TORCH} and later")
        self._decide(f"instruction sets {', '.join(variants)}; the best one is chosen when the operators run")

        defines = {
            "TORCH_TARGET_VERSION": TARGET_VERSION,
            "SAFNET_COMPILER": _quote(compiler),
            "SAFNET_OLDEST_TORCH": _quote(OLDEST_TORCH),
            "SAFNET_INSTRUCTION_SETS": _quote(", ".join(variants)),
            "SAFNET_FLAGS": _quote(" ".join(flags)),
        }
        flags += [f"-D{name}={value}" for name, value in defines.items()]
        if len(variants) > 1:
            flags.append("-DSAFNET_X86_VARIANTS=1")
        flags += [f"-I{CSRC}", *(f"-isystem{path}" for path in self._include_dirs())]

        ninja = NinjaFile(ROOT / "build" / folder, self.compiler_path)
        schemas = [line for line in SCHEMAS.read_text().splitlines() if not line.startswith("#")]
        definition = f"-DSAFNET_SCHEMAS={', '.join(map(_quote, schemas))}"
        objects = [ninja.compile(CSRC / f"{name}.cpp", name, [*flags, definition]) for name in ("library", "workspace")]
        # The baseline's objects come first: of a header's function that several of them hold, the linker keeps the first.
        for name, extra in variants.items():
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                host = f"-DSAFNET_HOST={int(name == 'baseline')}"
                objects.append(
                    ninja.compile(source, f"{source.stem}.{name}", [*flags, *extra, f"-DSAFNET_ISA={name}", host])
                )
        library, module = self._output(CPU_LIBRARY), self._output()
        ninja.link(objects, library, [*link_flags, *_library_flags(library), *_torch_libraries("torch_cpu", "torch")])
        module_object = ninja.compile(CSRC / "module.cpp", "module", flags)
        ninja.link([module_object], module, [*link_flags, *_module_flags(library)], after=[library])
        self._decide_output([library, module], len(objects) + 1)
        self._ninja(ninja)

    def _decide_output(self, outputs: list[Path], objects: int) -> None:
        jobs = os.environ.get("MAX_JOBS")
        names = " and ".join(output.name for output in outputs)
        self._decide(f"building {names} from {objects} objects" + (f" in {jobs} jobs (MAX_JOBS)" if jobs else ""))

    def _why_not_cuda(self) -> str | None:
        import torch

        self.toolkit = cuda_toolkit.find_toolkit()
        return cuda_toolkit.why_not(self.toolkit, torch.version.cuda)

    def _build_cuda(self) -> None:
        import torch

        assert self.toolkit is not None
        architectures = cuda_toolkit.architectures(self.toolkit)
        origin = "TORCH_CUDA_ARCH_LIST" if os.environ.get("TORCH_CUDA_ARCH_LIST") else "default"
        version = ".".join(map(str, self.toolkit.version))
        self._decide(f"nvcc {self.toolkit.nvcc} of CUDA {version}, torch of CUDA {torch.version.cuda}")
        self._decide(f"CUDA kernels for {' '.join(architectures)} ({origin})")
        defines = [f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", "-DUSE_CUDA"]
        flags = [
            "-std=c++17",
            "-O3",
            "-lineinfo",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
            f"-ccbin={self.compiler_path}",
        ]
        headers = [f"-isystem={path}" for path in self._include_dirs()]
        flags += [*cuda_toolkit.architecture_flags(architectures), *defines, f"-I{CSRC}", *headers]

        ninja = NinjaFile(ROOT / "build" / f"cuda-{sys.implementation.cache_tag}", self.compiler_path)
        objects = [
            ninja.compile_cuda(source, source.stem, flags, self.toolkit.nvcc)
            for source in sorted((CSRC / "cuda").glob("*.cu"))
        ]
        libraries = _torch_libraries("torch_cpu", "torch", *(["torch_cuda"] if torch.version.cuda else []))
        toolkit = [f"-L{path}" for path in self.toolkit.library_dirs]
        library = self._output(CUDA_LIBRARY)
        ninja.link(objects, library, [*_library_flags(library), *toolkit, *libraries, "-lcudart"])
        self._decide_output([library], len(objects))
        self._ninja(ninja)

    def _instruction_sets(self) -> dict[str, list[str]]:
        variants: dict[str, list[str]] = {"baseline": []}
        if platform.machine().lower() in ("x86_64", "amd64"):
            probe = [self.compiler_path, "-x", "c++", "-fsyntax-only", "-"]
            variants |= {
                name: flags
                for name, flags in X86_VARIANTS.items()
                if subprocess.run([*probe, *flags], input="", capture_output=True, text=True).returncode == 0
            }
            if len(variants) != 1 + len(X86_VARIANTS):
                self._decide("the compiler does not know AVX2 and AVX-512: baseline kernels only")
                variants = {"baseline": []}
        return variants

    def _include_dirs(self) -> list[str]:
        import sysconfig

        import pybind11
        import torch

        return [sysconfig.get_path("include"), pybind11.get_include(), str(Path(torch.__file__).parent / "include")]


class CompileCommands(BuildExtensions):
    """Writes compile_commands.json for editors and clang tools: all of csrc/, CUDA where nvcc is, and compiles nothing."""

    description = "write compile_commands.json"

    def run(self) -> None:
        self.commands: list[dict[str, str]] = []
        super().run()
        if not self.commands:
            raise SystemExit(f"compile_commands: nothing to compile: {self.decisions[-1]}")
        partial = ROOT / "compile_commands.json.partial"
        partial.write_text(json.dumps(self.commands, indent=1) + "\n")
        partial.replace(ROOT / "compile_commands.json")

    def _decide(self, decision: str) -> None:
        self.decisions.append(decision)

    def _ninja(self, file: "NinjaFile") -> None:
        self.commands += file.compilations()

    def _why_not_cuda(self) -> str | None:
        self.toolkit = cuda_toolkit.find_toolkit()
        return None if self.toolkit else "nvcc was not found"

    def _write_report(self, missing: dict[str, str]) -> None:
        """Nothing was built: the report of what was stays."""


class NinjaFile:
    """A build.ninja of compilations and links, in a folder that is kept, so that a second build compiles only what changed."""

    def __init__(self, folder: Path, compiler: str) -> None:
        from ninja import ninja_syntax

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.knows_cuda = False
        self.file = (folder / "build.ninja").open("w")
        self.writer = ninja_syntax.Writer(self.file, width=120)  # type: ignore[arg-type]  # its stub says str
        self.writer.rule("compile", f"{compiler} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        self.writer.rule("link", f"{compiler} $in -o $out.partial $flags && mv $out.partial $out")

    def compile(self, source: Path, name: str, flags: list[str]) -> str:
        self.writer.build([f"{name}.o"], "compile", [str(source)], variables={"flags": " ".join(map(_shell, flags))})
        return f"{name}.o"

    def compile_cuda(self, source: Path, name: str, flags: list[str], nvcc: str) -> str:
        if not self.knows_cuda:
            self.writer.rule(
                "compile_cuda", f"{nvcc} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc"
            )
            self.knows_cuda = True
        self.writer.build(
            [f"{name}.cu.o"], "compile_cuda", [str(source)], variables={"flags": " ".join(map(_shell, flags))}
        )
        return f"{name}.cu.o"

    def link(self, objects: list[str], output: Path, flags: list[str], after: Sequence[Path] = ()) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        variables = {"flags": " ".join(map(_shell, flags))}
        self.writer.build([str(output)], "link", objects, implicit=list(map(str, after)), variables=variables)

    def run(self, jobs: str | None) -> None:
        self.file.close()
        ninja = [sys.executable, "-m", "ninja", "-C", str(self.folder)]
        subprocess.run([*ninja, "-j", jobs] if jobs else ninja, check=True)

    def compilations(self) -> list[dict[str, str]]:
        """What `run` would compile, as entries of a compile_commands.json."""
        self.file.close()
        rules = ["compile", "compile_cuda"] if self.knows_cuda else ["compile"]
        ninja = [sys.executable, "-m", "ninja", "-C", str(self.folder), "--quiet", "-t", "compdb", *rules]
        return json.loads(subprocess.run(ninja, capture_output=True, text=True, check=True).stdout)


def _library_flags(library: Path) -> list[str]:
    """A shared library that others find by its name, in whatever folder it lies then."""
    if sys.platform == "darwin":
        return ["-dynamiclib", f"-Wl,-install_name,@rpath/{library.name}"]
    return ["-shared", f"-Wl,-soname,{library.name}"]


def _module_flags(library: Path) -> list[str]:
    """A Python module that uses the library beside it."""
    if sys.platform == "darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", "-Wl,-rpath,@loader_path", str(library)]
    return ["-shared", "-Wl,-rpath,$ORIGIN", str(library)]


def _torch_libraries(*names: str) -> list[str]:
    import torch

    folder = Path(torch.__file__).parent / "lib"
    needed = [] if sys.platform == "darwin" else ["-Wl,--no-as-needed"]
    return [f"-L{folder}", *needed, *(f"-l{name}" for name in names)]


def _quote(text: str) -> str:
    """A C string literal."""
    return json.dumps(text)


def _shell(flag: str) -> str:
    import shlex

    return shlex.quote(flag).replace("$", "$$")
