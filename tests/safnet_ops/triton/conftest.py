import pytest


@pytest.fixture
def simulated():
    """Triton kernels launched on CPU tensors run on the simulator of device code, which checks every access they make.

    What a kernel allocates uninitialised is poisoned: reading it before it is written is an error.
    """
    pytest.importorskip("triton")
    import ptxsim

    with ptxsim.triton_on_cpu(poison_empty=True):
        yield


@pytest.fixture
def wide(monkeypatch):
    """Call it, and kernels compute offsets in 64 bits however small the pictures are."""
    launching = pytest.importorskip("safnet_ops.triton.launching")
    return lambda: monkeypatch.setattr(launching, "WIDE_FROM", 0)
