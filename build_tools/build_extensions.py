"""The build_ext command: compiles csrc/ with ninja, in parallel, and writes down what it decided.

csrc/cpu/*.cpp is compiled once per instruction set (csrc/cpu/kernel.h says how that fits together), csrc/cuda/*.cu for a
list of GPUs (cuda_toolkit.py). Environment: CXX, MAX_JOBS, SAFNET_OPS_BUILD=0 (install without kernels),
SAFNET_OPS_SANITIZE=1 (AddressSanitizer and UBSan); CUDA_HOME, FORCE_CUDA, TORCH_CUDA_ARCH_LIST.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from build_tools import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
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
            self._write_report({"_C": reason})
            return
        modules = {extension.name: extension for extension in self.extensions}
        self._build_cpu(modules["safnet_ops._C"])
        reason = self._why_not_cuda()
        if reason:
            self._decide(f"not building the CUDA kernels: {reason}")
            self.extensions = [modules["safnet_ops._C"]]
        else:
            self._build_cuda(modules["safnet_ops._C_cuda"])
        self._write_report({"_C_cuda": reason} if reason else {})

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
        """For `python -m safnet_ops.info`, beside the modules: what was decided, and why a module was not built."""
        report = Path(self.get_ext_fullpath("safnet_ops._C")).with_name("build_report.json")
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({"decisions": self.decisions, "missing": missing}, indent=1) + "\n")

    def _decide(self, decision: str) -> None:
        self.decisions.append(decision)
        print(f"safnet-ops build: {decision}", file=sys.stderr, flush=True)

    def _build_cpu(self, extension: Extension) -> None:
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
        link_flags = ["-shared"] if sys.platform != "darwin" else ["-bundle", "-undefined", "dynamic_lookup"]
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
            flags, link_flags = [*flags, *sanitizers], [*link_flags, *sanitizers]
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
        objects = [ninja.compile(CSRC / "module.cpp", "module", flags)]
        # The baseline's objects come first: of a header's function that several of them hold, the linker keeps the first.
        for name, extra in variants.items():
            for source in sorted((CSRC / "cpu").glob("*.cpp")):
                host = f"-DSAFNET_HOST={int(name == 'baseline')}"
                objects.append(
                    ninja.compile(source, f"{source.stem}.{name}", [*flags, *extra, f"-DSAFNET_ISA={name}", host])
                )
        library_dir = Path(torch.__file__).parent / "lib"
        libraries = (
            [f"-L{library_dir}", "-Wl,--no-as-needed", "-ltorch_cpu", "-ltorch"] if sys.platform != "darwin" else []
        )
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        ninja.link(objects, output, [*link_flags, *libraries])
        jobs = os.environ.get("MAX_JOBS")
        self._decide(
            f"building {output.name} from {len(objects)} objects" + (f" in {jobs} jobs (MAX_JOBS)" if jobs else "")
        )
        self._ninja(ninja)

    def _why_not_cuda(self) -> str | None:
        import torch

        self.toolkit = cuda_toolkit.find_toolkit()
        return cuda_toolkit.why_not(self.toolkit, torch.version.cuda)

    def _build_cuda(self, extension: Extension) -> None:
        import torch

        assert self.toolkit is not None
        architectures = cuda_toolkit.architectures(self.toolkit)
        origin = "TORCH_CUDA_ARCH_LIST" if os.environ.get("TORCH_CUDA_ARCH_LIST") else "default"
        version = ".".join(map(str, self.toolkit.version))
        self._decide(f"nvcc {self.toolkit.nvcc} of CUDA {version}, torch of CUDA {torch.version.cuda}")
        self._decide(f"CUDA kernels for {' '.join(architectures)} ({origin})")
        includes = [f"-I{CSRC}", *(f"-isystem{path}" for path in self._include_dirs())]
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
        names = f"-DSAFNET_ARCHITECTURES={_quote(' '.join(architectures))}"
        module_flags = ["-O2", "-fPIC", "-fvisibility=hidden", names, *includes]
        objects = [ninja.compile(CSRC / "cuda" / "module.cpp", "module", module_flags)]
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            objects.append(ninja.compile_cuda(source, source.stem, flags, self.toolkit.nvcc))
        library_dirs = [Path(torch.__file__).parent / "lib", *self.toolkit.library_dirs]
        libraries = [
            *(f"-L{path}" for path in library_dirs),
            "-Wl,--no-as-needed",
            "-ltorch_cpu",
            "-ltorch",
            "-lcudart",
        ]
        if torch.version.cuda is not None:
            libraries.append("-ltorch_cuda")
        output = Path(self.get_ext_fullpath(extension.name)).resolve()
        ninja.link(objects, output, ["-shared", *libraries])
        jobs = os.environ.get("MAX_JOBS")
        self._decide(
            f"building {output.name} from {len(objects)} objects" + (f" in {jobs} jobs (MAX_JOBS)" if jobs else "")
        )
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

    def link(self, objects: list[str], output: Path, flags: list[str]) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.writer.build([str(output)], "link", objects, variables={"flags": " ".join(map(_shell, flags))})

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


def _quote(text: str) -> str:
    """A C string literal."""
    return json.dumps(text)


def _shell(flag: str) -> str:
    import shlex

    return shlex.quote(flag).replace("$", "$$")
