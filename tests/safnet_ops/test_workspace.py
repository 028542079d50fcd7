"""Results that lie in memory of others that are gone."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

import safnet_ops
from safnet.model import SAFNet
from safnet_ops import backends, group_conv_shuffle
from safnet_ops.workspace import concatenate

pytestmark = pytest.mark.skipif(not backends.serves("group_conv_shuffle", "cpp"), reason="no C++ kernels")

IS_SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")

torch.manual_seed(0)
WEIGHT = torch.randn(32, 32, 3, 3) / 17
PICTURE = torch.randn(1, 32, 160, 256)  # 5 MB


def convolve(x, **options):
    with torch.no_grad():
        return group_conv_shuffle(x, WEIGHT.to(x.dtype), backend="cpp", **options)


def places(count):
    """Where results lie that are each made of the one before."""
    x, found = PICTURE, []
    for _ in range(count):
        x = convolve(x)
        found.append(x.data_ptr())
    return found


def test_results_take_the_memory_of_those_that_are_gone():
    with safnet_ops.Workspace():
        assert len(set(places(6))) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_layouts_are_the_same(dtype, memory_format):
    picture = PICTURE.to(dtype).contiguous(memory_format=memory_format)
    expected = convolve(convolve(picture))
    with safnet_ops.Workspace():
        for _ in range(3):
            result = convolve(convolve(picture))
    assert torch.equal(result, expected)
    assert (result.stride(), result.dtype) == (expected.stride(), expected.dtype)


def test_a_result_outlives_its_block():
    with safnet_ops.Workspace():
        kept = convolve(PICTURE)
        places(3)
    places(3)
    with safnet_ops.Workspace():
        places(3)
    gc.collect()
    assert torch.equal(kept, convolve(PICTURE))


def test_memory_that_is_in_use_is_nobody_elses():
    with safnet_ops.Workspace():
        results = [convolve(PICTURE) for _ in range(4)]
        views = [result[:, :, 1:] for result in results]
        del results
        places(4)
        for view in views:
            assert torch.equal(view, convolve(PICTURE)[:, :, 1:])


def test_gradients_are_the_same():
    def gradients():
        weight = WEIGHT.clone().requires_grad_()
        x = PICTURE
        for _ in range(3):
            x = group_conv_shuffle(x, weight, prelu_weight=torch.full((32,), 0.2), backend="cpp")
        x.square().mean().backward()
        return weight.grad

    expected = gradients()
    with safnet_ops.Workspace():
        for _ in range(2):
            assert torch.equal(gradients(), expected)


def test_the_outermost_block_counts():
    with safnet_ops.Workspace():
        first = set(places(4))
        with safnet_ops.Workspace():
            assert set(places(4)) <= first
        assert set(places(4)) <= first


def test_threads_have_their_own():
    found = {}

    def work(name):
        with safnet_ops.Workspace():
            for _ in range(5):
                found[name] = convolve(convolve(PICTURE))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = convolve(convolve(PICTURE))
    assert len(found) == 4
    assert all(torch.equal(result, expected) for result in found.values())


def test_a_result_may_end_in_another_thread():
    with safnet_ops.Workspace():
        kept = [convolve(PICTURE)]
        place = kept[0].data_ptr()
        thread = threading.Thread(target=kept.clear)
        thread.start()
        thread.join()
        assert convolve(PICTURE).data_ptr() == place


def test_an_error_ends_the_block():
    with pytest.raises(ValueError, match="mine"), safnet_ops.Workspace():
        raise ValueError("mine")
    with safnet_ops.Workspace():
        assert len(set(places(6))) == 2


@pytest.fixture
def workspace():
    with safnet_ops.Workspace() as opened:
        yield opened


def result_of(megabytes):
    return convolve(torch.zeros(1, 32, 64, 128 * megabytes))


def test_it_holds_no_more_than_results_needed_at_one_time(workspace):
    results = [result_of(2) for _ in range(4)]
    needed = workspace.bytes
    assert 8 << 20 <= needed < 9 << 20
    del results
    for megabytes in (5, 1, 8, 3, 6, 2, 7):
        result_of(megabytes)
        assert megabytes << 20 <= workspace.bytes <= needed
    results = [result_of(8) for _ in range(2)]
    assert len(results) == 2
    assert 16 << 20 <= workspace.bytes < 17 << 20


def test_a_small_result_does_not_take_much_memory(workspace):
    first = result_of(8).data_ptr()
    assert result_of(3).data_ptr() != first


# What a process of its own needs, whose allocator nobody has set to keep what is freed.
ALONE = """
import importlib, re
from pathlib import Path
import torch
import safnet_ops

def convolve(picture):
    return safnet_ops.group_conv_shuffle(picture, torch.ones(32, 32, 3, 3), backend="cpp")

def in_use():
    return int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
"""


def run_alone(program):
    done = subprocess.run([sys.executable, "-c", ALONE + program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.skipif(IS_SANITIZED, reason="AddressSanitizer has an allocator of its own")
def test_nothing_is_held_after_its_end():
    """But by results that live on, which keep what is theirs."""
    run_alone("""
small, large = torch.zeros(1, 32, 512, 1024), torch.zeros(1, 32, 512, 1280)  # 64 and 80 MiB
convolve(small), convolve(large)
module = importlib.import_module("safnet_ops._C")
memory = module.Workspace()
before = in_use()
memory.enter()
kept = convolve(small)
convolve(large)
module.leave_workspace()
assert in_use() - before > 140 << 20
del memory
held = in_use() - before
assert 60 << 20 < held < 72 << 20, held
assert kept.sum() == 0
del kept
assert in_use() - before < 8 << 20, in_use() - before
""")


PARTS = [torch.randn(2, channels, 96, 128) for channels in (40, 6, 20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_concatenation(dtype, layout):
    parts = [PARTS[0].to(dtype), PARTS[1].contiguous(memory_format=torch.channels_last), PARTS[2].transpose(2, 3)]
    parts[2] = parts[2].contiguous().transpose(2, 3)
    expected = torch.cat([part.to(dtype) for part in parts], 1)
    with safnet_ops.Workspace() as memory:
        for _ in range(3):
            found = concatenate(parts, dtype, layout)
            assert torch.equal(found, expected)
            assert found.dtype == dtype
            assert found.is_contiguous(memory_format=layout)
        assert memory.bytes <= 2 * (expected.nbytes + (2 << 20))  # whole huge pages
    alone = concatenate(parts, dtype, layout)
    assert torch.equal(alone, expected)
    assert alone.is_contiguous(memory_format=layout)


def test_a_concatenation_takes_memory_that_is_there(workspace):
    first = concatenate(PARTS, torch.float32).data_ptr()
    assert concatenate(PARTS, torch.float32).data_ptr() == first
    kept = concatenate(PARTS, torch.float32)
    expected = kept.clone()
    assert concatenate([-part for part in PARTS], torch.float32).data_ptr() != kept.data_ptr()
    assert torch.equal(kept, expected)


def test_a_concatenation_is_differentiated(workspace):
    parts = [part.clone().requires_grad_() for part in PARTS]
    concatenate(parts, torch.float32).square().sum().backward()
    assert all(torch.equal(part.grad, 2 * part) for part in parts)
    _, tangent = torch.func.jvp(lambda part: concatenate([part, PARTS[1]], torch.float32), (PARTS[0],), (PARTS[0],))
    assert torch.equal(tangent[:, :40], PARTS[0])
    batched = torch.func.vmap(lambda part: concatenate([part, PARTS[1]], torch.float32))(PARTS[0][None])
    assert torch.equal(batched[0], torch.cat(PARTS[:2], 1))


def test_one_that_lives_on_keeps_its_memory():
    memory = safnet_ops.Workspace()
    with memory:
        place = result_of(4).data_ptr()
    outside = result_of(4)
    with memory:
        assert result_of(4).data_ptr() == place
    assert memory.bytes == 4 << 20
    assert outside.data_ptr() != place


def test_the_model_takes_memory_that_is_there():
    model = SAFNet("small").eval()
    exposures = [torch.rand(1, 6, 96, 128) for _ in range(3)]
    with torch.no_grad(), safnet_ops.Workspace() as memory:
        expected = model(*exposures)
        assert memory.bytes > 1 << 20
    with torch.no_grad():
        assert all(torch.equal(*pair) for pair in zip(model(*exposures), expected, strict=True))
