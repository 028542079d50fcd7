"""`use_backend` in several threads and tasks, in compiled functions, and in threads that run backward."""

import asyncio
import threading

import pytest
import torch

import safnet_ops
from safnet_ops import backends

IMAGE, FLOW = torch.rand(1, 3, 4, 5), torch.zeros(1, 2, 4, 5)


def chosen():
    return backends.choose("backward_warp", torch.device("cpu"), None)


def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_threads_that_leave_in_another_order_keep_their_own():
    entered, left = threading.Event(), threading.Event()

    def other():
        with safnet_ops.use_backend("triton"):
            entered.set()
            left.wait()
            inside = chosen_name()
        return inside, chosen()

    def chosen_name():
        return backends.forced_backend()

    found = []
    thread = threading.Thread(target=lambda: found.append(other()))
    with safnet_ops.use_backend("reference"):
        thread.start()
        entered.wait()
        seen = [chosen()]
    seen.append(chosen())
    left.set()
    thread.join()
    assert seen == ["reference", "cpp"]  # not what the other thread entered last
    assert found == [("triton", "cpp")]
    assert not backends._blocks


def test_a_new_thread_starts_without_it():
    with safnet_ops.use_backend("reference"):
        assert in_thread(chosen) == "cpp"


def test_tasks_keep_their_own():
    async def task(backend):
        with safnet_ops.use_backend(backend):
            for _ in range(3):
                await asyncio.sleep(0)
                assert chosen() == backend

    async def both():
        await asyncio.gather(task("reference"), task("cpp"))

    asyncio.run(both())


def test_an_error_inside_restores_what_was_before():
    with pytest.raises(KeyError), safnet_ops.use_backend("reference"):
        raise KeyError
    assert chosen() == "cpp"
    assert not backends._blocks


def test_gradients_come_from_the_backend_of_the_result():
    """Also where backward runs in another thread, under another choice."""
    leaf = IMAGE.clone().requires_grad_()
    with safnet_ops.use_backend("cpp"):
        out = safnet_ops.backward_warp(leaf, FLOW)

    def backward():
        with safnet_ops.use_backend("reference"), torch.profiler.profile() as profile:
            out.sum().backward()
        return [event.name for event in profile.events()]

    assert "safnet_ops::backward_warp_backward" in in_thread(backward)


def test_compiled_functions_follow_it():
    graphs = []

    def record(graph, inputs):
        graphs.append(any("safnet_ops" in str(node.target) for node in graph.graph.nodes))
        return graph

    compiled = torch.compile(lambda image: safnet_ops.backward_warp(image, FLOW), fullgraph=True, backend=record)
    compiled(IMAGE)
    with safnet_ops.use_backend("reference"):
        compiled(IMAGE)
        with safnet_ops.use_backend("cpp"):
            compiled(IMAGE)
    compiled(IMAGE)
    assert graphs == [True, False, True]  # compiled anew for each nesting, and none of them anew at the end


def test_it_can_be_entered_in_a_compiled_function():
    def warp(image):
        with safnet_ops.use_backend("reference"):
            return safnet_ops.backward_warp(image, FLOW), chosen()

    out, name = torch.compile(warp, fullgraph=True, backend="eager")(IMAGE)
    assert name == "reference"
    assert torch.equal(out, IMAGE)
    assert chosen() == "cpp"
    assert not backends._blocks
