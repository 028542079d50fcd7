"""What the build decides about CUDA: whether, and for which GPUs."""

import pytest

from build_tools import cuda_toolkit
from build_tools.cuda_toolkit import Toolkit

CUDA_13 = Toolkit("/opt/cuda/bin/nvcc", (13, 0))


@pytest.fixture(autouse=True)
def _no_wishes(monkeypatch):
    for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nvcc(tmp_path):
    """A compiler that knows some GPUs, or a toolkit around it."""

    def make(release="13.0", known=(75, 80, 86, 87, 88, 89, 90, 100, 103, 120)):
        folder = tmp_path / release / "bin"
        folder.mkdir(parents=True)
        script = folder / "nvcc"
        listing = "\n".join(f"compute_{number}" for number in known)
        script.write_text(
            f"#!/bin/sh\ncase $1 in --version) echo 'Cuda compilation tools, release {release}, V{release}.1';;\n"
            f"*) echo '{listing}';; esac\n"
        )
        script.chmod(0o755)
        return script

    return make


def test_same_major_version_is_built():
    assert cuda_toolkit.why_not(CUDA_13, "13.2") is None


def test_other_major_version_is_refused_with_both_versions():
    reason = cuda_toolkit.why_not(CUDA_13, "12.8")
    for part in ("nvcc is of CUDA 13.0 (/opt/cuda/bin/nvcc)", "torch is built with CUDA 12.8", "CUDA_HOME"):
        assert part in reason


def test_forced_build_with_another_major_version_stops(monkeypatch):
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(
        SystemExit, match=r"FORCE_CUDA=1 is set, but nvcc is of CUDA 13\.0 .* torch is built with CUDA 12\.8"
    ):
        cuda_toolkit.why_not(CUDA_13, "12.8")


def test_torch_without_cuda(monkeypatch):
    assert "built without CUDA" in cuda_toolkit.why_not(CUDA_13, None)
    monkeypatch.setenv("FORCE_CUDA", "1")
    assert cuda_toolkit.why_not(CUDA_13, None) is None
    with pytest.raises(SystemExit, match="nvcc was not found"):
        cuda_toolkit.why_not(None, None)
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert cuda_toolkit.why_not(CUDA_13, "13.0") == "FORCE_CUDA=0 is set"


def test_cuda_home_comes_before_the_path(monkeypatch, nvcc):
    old, new = nvcc("12.4"), nvcc("13.1")
    monkeypatch.setenv("PATH", f"{new.parent}:/usr/bin:/bin")
    assert cuda_toolkit.find_toolkit() == Toolkit(str(new), (13, 1))
    monkeypatch.setenv("CUDA_HOME", str(old.parents[1]))
    assert cuda_toolkit.find_toolkit() == Toolkit(str(old), (12, 4))


def test_default_architectures_are_those_that_nvcc_knows(nvcc):
    assert cuda_toolkit.architectures(Toolkit(str(nvcc()), (13, 0))) == [
        "7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX",
    ]  # fmt: skip
    older = Toolkit(str(nvcc("12.4", (50, 70, 75, 80, 86, 89, 90))), (12, 4))
    assert cuda_toolkit.architectures(older) == ["7.5", "8.0", "8.6", "8.9", "9.0+PTX"]


def test_architecture_list_is_honoured(monkeypatch, nvcc):
    toolkit = Toolkit(str(nvcc()), (13, 0))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.6 9.0+PTX")
    wanted = cuda_toolkit.architectures(toolkit)
    assert wanted == ["7.5", "8.6", "9.0+PTX"]
    assert cuda_toolkit.architecture_flags(wanted) == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_80,code=sm_90",
        "-gencode=arch=compute_80,code=compute_80",
    ]


@pytest.mark.parametrize(
    ("wish", "message"),
    [("Hopper", "expected entries such as"), ("7.0", "7.5 or newer"), ("9.9", "does not compile for")],
)
def test_impossible_architectures_are_named(monkeypatch, nvcc, wish, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{wish}")
    with pytest.raises(SystemExit, match=f"{message}.*'{wish}'"):
        cuda_toolkit.architectures(Toolkit(str(nvcc()), (13, 0)))


def test_specific_architectures_are_compiled_for_themselves(monkeypatch, nvcc):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a 10.0a+PTX")
    assert cuda_toolkit.architecture_flags(cuda_toolkit.architectures(Toolkit(str(nvcc()), (13, 0)))) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100a,code=sm_100a",
        "-gencode=arch=compute_100a,code=compute_100a",
    ]


def test_specific_architectures_that_do_not_exist_are_named(monkeypatch, nvcc):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6a")
    with pytest.raises(SystemExit, match=r"there is no '8\.6a': only 9\.0 and newer"):
        cuda_toolkit.architectures(Toolkit(str(nvcc()), (13, 0)))
