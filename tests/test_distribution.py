"""What a release holds: the sdist all that a build needs, the wheel the two packages and nothing else."""

import os
import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path, PurePosixPath
from zipfile import ZipFile

import pytest

import safnet
import safnet_ops

ROOT = Path(__file__).parents[1]
PACKAGES = ("safnet", "safnet_ops")
WITHOUT_KERNELS = {**os.environ, "SAFNET_OPS_BUILD": "0"}  # they take a minute: `make release-check` builds them


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, env=WITHOUT_KERNELS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The folder with an sdist of this checkout and the wheel built from that sdist alone."""
    folder = tmp_path_factory.mktemp("release")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def sources(release, tmp_path_factory):
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sources")
    with tarfile.open(next(release.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture(scope="module")
def wheel(release):
    with ZipFile(next(release.glob("*.whl"))) as archive:
        yield archive


def files_of(folder, *parts):
    """What lies in a part of a source folder and is no product of a build or a run, relative to the folder."""
    products = {".so", ".dylib", ".pyc"}
    found = (path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix()
        for path in found
        if path.suffix not in products and path.name != "build_report.json"
    }


def test_the_wheel_holds_both_packages_and_nothing_else(wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == files_of(ROOT, *PACKAGES) | {"safnet_ops/build_report.json"}
    for name in ("safnet/py.typed", "safnet_ops/py.typed", "safnet/pretrained/safnet-s.safetensors"):
        assert name in held


def test_the_wheel_says_what_it_is(wheel):
    folder = next(PurePosixPath(name).parent for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(f"{folder}/METADATA").decode())
    assert metadata["Name"] == "safnet-ops"
    assert metadata["Version"] == safnet_ops.__version__ == safnet.__version__
    assert metadata["License-Expression"] == "MIT"
    assert "safnet = safnet.cli:app" in wheel.read(f"{folder}/entry_points.txt").decode()


def test_the_citation_is_of_this_version():
    assert f"version: {safnet_ops.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_sdist_holds_all_that_a_build_needs(sources):
    needed = files_of(ROOT, "csrc", "build_tools", *PACKAGES)
    assert needed == files_of(sources, "csrc", "build_tools", *PACKAGES)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"):
        assert (sources / name).is_file()
    assert not any((sources / name).exists() for name in ("tests", "tools", "bench", "ptxsim", "simulated_gpu"))


def test_what_an_earlier_build_left_does_not_get_into_a_wheel(sources, tmp_path):
    stale = sources / "build/lib/safnet/deleted.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    shutil.copytree(stale.parents[1], sources / f"build/lib.linux-x86_64-{sys.implementation.cache_tag}")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), cwd=sources)
    with ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        assert "safnet/__init__.py" in archive.namelist()
        assert "safnet/deleted.py" not in archive.namelist()
