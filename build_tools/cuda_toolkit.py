"""What the build asks of a CUDA toolkit: where nvcc is, whether it fits torch, and for which GPUs to compile.

Nothing here asks for a GPU: CUDA_HOME, FORCE_CUDA, TORCH_CUDA_ARCH_LIST and the installed torch decide.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Turing to Blackwell; the newest also as PTX, for GPUs to come. nvcc 13.0 is the newest checked (2026-11).
DEFAULT_ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
OLDEST_ARCHITECTURE = (7, 5)
OLDEST_SPECIFIC_ARCHITECTURE = (9, 0)  # "9.0a": all that this GPU has and no other


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its compiler and version."""

    nvcc: str
    version: tuple[int, int]

    @property
    def library_dirs(self) -> list[Path]:
        """Where libcudart is: beside the compiler's own folder, or, where nvcc is a script, in the usual place."""
        homes = [Path(self.nvcc).resolve().parent.parent, Path("/usr/local/cuda")]
        folders = [home / name for home in homes for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
        return [folder for folder in folders if any(folder.glob("libcudart.*"))]

    def architectures(self) -> frozenset[str]:
        """What this nvcc can compile for, as "8.6"."""
        listing = subprocess.run([self.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
        return frozenset(f"{number[:-1]}.{number[-1]}" for number in re.findall(r"compute_(\d+)", listing))


def find_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME or CUDA_PATH, else the nvcc on the PATH, else /usr/local/cuda."""
    candidates = [f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for candidate in candidates or ["nvcc", "/usr/local/cuda/bin/nvcc"]:
        nvcc = shutil.which(candidate)
        if nvcc is None:
            continue
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"release (\d+)\.(\d+)", text)
        if found:
            return Toolkit(nvcc, (int(found[1]), int(found[2])))
    return None


def why_not(toolkit: Toolkit | None, torch_cuda: str | None) -> str | None:
    """Why the CUDA kernels are not built with this toolkit for a torch of this CUDA version; None if they are.

    Raises:
        SystemExit: FORCE_CUDA=1 is set, and they cannot be built.
    """
    force = os.environ.get("FORCE_CUDA")
    if force == "0":
        return "FORCE_CUDA=0 is set"
    if torch_cuda is None and force != "1":
        return "this torch is built without CUDA (FORCE_CUDA=1 builds the CUDA kernels all the same)"
    reason = None
    if toolkit is None:
        reason = "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME"
    elif torch_cuda is not None and int(torch_cuda.split(".")[0]) != toolkit.version[0]:
        major, minor = toolkit.version
        reason = (
            f"nvcc is of CUDA {major}.{minor} ({toolkit.nvcc}), but torch is built with CUDA {torch_cuda}:"
            " the major versions must be the same; set CUDA_HOME to such a toolkit, or install a torch for this one"
        )
    if reason and force == "1":
        raise SystemExit(f"safnet-ops build: FORCE_CUDA=1 is set, but {reason}")
    return reason


def architectures(toolkit: Toolkit) -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), or every default one that the toolkit knows, the newest with PTX.

    Raises:
        SystemExit: an entry of TORCH_CUDA_ARCH_LIST is none, is too old, or is unknown to the toolkit.
    """
    known = toolkit.architectures()
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wish:
        default = [name for name in DEFAULT_ARCHITECTURES if name in known]
        return [*default[:-1], f"{default[-1]}+PTX"]
    for entry in wish:
        found = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", entry)
        if found is None:
            raise SystemExit(
                f"safnet-ops build: TORCH_CUDA_ARCH_LIST: expected entries such as 8.6 or 9.0+PTX, got {entry!r}"
            )
        if (int(found[1]), int(found[2])) < OLDEST_ARCHITECTURE:
            raise SystemExit(f"safnet-ops build: TORCH_CUDA_ARCH_LIST: the kernels need 7.5 or newer, got {entry!r}")
        if found[3] and (int(found[1]), int(found[2])) < OLDEST_SPECIFIC_ARCHITECTURE:
            raise SystemExit(
                f"safnet-ops build: TORCH_CUDA_ARCH_LIST: there is no {entry!r}: only 9.0 and newer have an 'a'"
            )
        if f"{found[1]}.{found[2]}" not in known:
            raise SystemExit(f"safnet-ops build: TORCH_CUDA_ARCH_LIST: {toolkit.nvcc} does not compile for {entry!r}")
    return wish


def architecture_flags(wanted: list[str]) -> list[str]:
    """The -gencode flags of entries such as "8.6" and "9.0+PTX".

    The kernels use nothing newer than sm_80 has, so that one PTX, compiled once, becomes machine code for all GPUs from
    there on. An entry such as "9.0a" is compiled for that GPU alone.
    """
    flags = []
    for entry in wanted:
        number = entry.removesuffix("+PTX").replace(".", "")
        virtual = number if number.endswith("a") else "75" if int(number) < 80 else "80"
        flags.append(f"-gencode=arch=compute_{virtual},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{virtual},code=compute_{virtual}")
    return flags
