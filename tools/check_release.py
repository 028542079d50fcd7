"""Builds a release and tries it as a stranger would: `make release-check`.

    python -m tools.check_release [--out dist] [--torch "torch>=2.11,<2.14"]

The sdist is built from this checkout, the wheel from that sdist alone, with the torch and build tools of the environment that
runs this. The wheel is installed in a new virtual environment in another folder, where a bracket is fused. Only what passed
is left in the folder --out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BRACKET = ROOT / "examples" / "bracket"

# The installed packages, not this checkout's; each operator has a kernel for the CPU, unless the build said why there is none.
PROGRAM = """
import pathlib, sys
import safnet, safnet_ops
from safnet_ops import backends, operators
for package in (safnet, safnet_ops):
    home = pathlib.Path(package.__file__).resolve()
    assert home.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"{home} lies outside of {sys.prefix}"
    assert (home.parent / "py.typed").is_file(), f"{package.__name__} has no py.typed"
assert safnet.__version__ == safnet_ops.__version__
without = [name for name in operators.OPERATORS if not backends.serves(name, "cpp")]
assert not without or sys.platform == "win32", f"no C++ kernels for {without}"
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Build a release and try it in a new virtual environment.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "dist", help="where the files go that passed (default: dist)"
    )
    parser.add_argument("--torch", default="torch", help="the torch to install: a requirement as pip takes it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="release-") as folder:
        release, home = Path(folder) / "release", Path(folder) / "home"
        home.mkdir()
        try:
            with _step("sdist, and wheel from it"):
                _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", release, ROOT, cwd=home)
            with _step("new environment"):
                python = _environment(Path(folder) / "venv")
                _run(python, "-m", "pip", "install", "--quiet", options.torch, *release.glob("*.whl"), cwd=home)
            with _step("trial"):
                _try(python, home)
        except subprocess.CalledProcessError as error:
            print(f"release-check: failed: {' '.join(map(str, error.cmd))}", file=sys.stderr)
            return 1
        options.out.mkdir(parents=True, exist_ok=True)
        for file in sorted(release.iterdir()):
            _copy(file, options.out / file.name)
            print(f"{options.out / file.name}: {file.stat().st_size / 1e6:.1f} MB")
    return 0


def _try(python: Path, home: Path) -> None:
    safnet = python.with_name(f"safnet{python.suffix}")
    _run(python, "-c", PROGRAM, cwd=home)
    _run(python, "-m", "safnet_ops.info", cwd=home)
    _run(safnet, "--version", cwd=home)
    _run(safnet, "fuse", BRACKET, "-o", "fused.exr", "--preview", "preview.png", cwd=home)
    assert all((home / name).stat().st_size > 0 for name in ("fused.exr", "preview.png"))


def _environment(folder: Path) -> Path:
    """Makes a virtual environment; its Python."""
    venv.create(folder, with_pip=True)
    return next(path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists())


def _run(*command: str | Path, cwd: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(list(map(str, command)), cwd=cwd, env=inherited, check=True)


@contextmanager
def _step(name: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"release-check: {name}: {time.monotonic() - began:.0f} s", flush=True)


def _copy(source: Path, target: Path) -> None:
    """Whole or not at all."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.copyfile(source, partial)
    partial.replace(target)


if __name__ == "__main__":
    sys.exit(main())
