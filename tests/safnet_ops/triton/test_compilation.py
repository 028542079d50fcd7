"""What is compiled and tuned, and when: nothing for a new size; and that torch.compile keeps every operator in one graph."""

import pytest
import torch

import safnet_ops
from operator_inputs import positional_inputs
from safnet_ops import reference
from safnet_ops.operators import OPERATORS
from tests.support import golden
from tests.support.operators import assert_close, check_operator

triton = pytest.importorskip("triton")

import ptxsim  # noqa: E402
from simulated_gpu import triton_costs  # noqa: E402

FIRST = ((16, 16), (401, 333))  # a small picture and a large one, the two kinds that tuning tells apart
OTHERS = ((1, 1), (1, 16), (5, 7), (2, 2), (31, 64), (48, 128), (363, 362))


CALLS = [
    call
    for call in triton_costs.CALLS
    if call.is_usual and call.dtype == torch.float32 and call.exact == (call.operator != "group_conv_shuffle")
]


def test_every_operator_is_called():
    assert {call.operator for call in CALLS} == set(OPERATORS)


@pytest.fixture
def compilations(monkeypatch):
    """The names of the kernels that Triton compiles, in order."""
    names = []

    def note(*, fn, **_):
        names.append(fn.name)  # and return None: something true would stop the compilation

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    return names


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_new_sizes_compile_and_tune_nothing(call, compilations):
    """Odd sizes, multiples of 16 and 1 among them: values for which Triton would specialise."""
    with triton_costs.recording(all_configurations=False):
        call(FIRST[0])
        first = len(compilations)
        assert first > 0
        call(FIRST[1])
        tuned = [len(tuner.cache) for tuner in triton_costs.tuners()]
        for size in OTHERS:
            call(size)
        assert compilations[first:] == []
        assert [len(tuner.cache) for tuner in triton_costs.tuners()] == tuned


def test_batches_and_unaligned_pictures_compile_nothing(compilations):
    def warp(image, flow):
        safnet_ops.backward_warp(image, flow, backend="triton")

    with triton_costs.recording(all_configurations=False):
        warp(torch.zeros(1, 3, 16, 16), torch.zeros(1, 2, 16, 16))
        first = len(compilations)
        assert first == 1
        warp(torch.zeros(16, 3, 16, 16), torch.zeros(16, 2, 16, 16))
        warp(torch.zeros(1, 3, 16, 17)[..., 1:], torch.zeros(1, 2, 16, 17)[..., 1:])
        warp(torch.zeros(1, 64, 16, 16)[:, 1:4], torch.zeros(1, 2, 16, 16).expand(1, 2, 16, 16))
        assert len(compilations) == first


def test_lists_of_configurations_are_short():
    """Each is tried for some tenths of a second at an operator's first call."""
    tuners = triton_costs.tuners()
    assert len(tuners) == 11
    assert all(2 <= len(tuner.configs) <= 3 for tuner in tuners)


@pytest.fixture
def trying(monkeypatch):
    """Tuning runs every configuration, as on a GPU, and prefers the last."""

    def benchmarker(self):
        times = iter(range(100, 0, -1))

        def run_twice(call, quantiles=None, **_):
            call()
            call()
            return [float(next(times))] * len(quantiles or (0,))

        return run_twice

    monkeypatch.setattr(ptxsim.triton_bridge.SimulatedDriver, "get_benchmarker", benchmarker)
    triton_costs.forget_tuning()
    yield
    triton_costs.forget_tuning()


@pytest.mark.parametrize("operator", ["backward_warp", "fused_fuse"])
def test_tuning_leaves_nothing_in_the_sums(operator, trying):
    """Gradients are added to: what the trials added must be gone when the result is computed."""
    inputs = positional_inputs(operator, (5, 9))
    function, expected = getattr(safnet_ops, operator), getattr(reference, operator)
    with ptxsim.triton_on_cpu(poison_empty=True):
        check_operator(lambda *tensors: function(*tensors, backend="triton"), expected, inputs, (True,) * len(inputs))


def test_deterministic_algorithms_do_not_depend_on_tuning(deterministic):
    """Tiles of another size sum in another order, and a program that runs again may be tuned otherwise."""
    picture = torch.rand(1, 3, 9, 9)
    triton_costs.forget_tuning()  # or there would be nothing left to try
    with triton_costs.recording() as kernels:
        safnet_ops.census_loss(picture, picture, backend="triton")
    configurations = {kernel.configuration for kernel in kernels.values() if kernel.name == "census_loss.forward"}
    assert configurations == {"BLOCK 256, 4 warps"}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_into_one_graph(operator, backend, float32_products):
    """Forward and backward under torch.compile, without a break."""
    case = next(case for case in golden.CASES if case.operator == operator)
    differentiable = operator != "upsample_fuse"

    def call(first, *others):
        inputs = dict(zip(case.inputs, (first * 2, *others), strict=True))
        found = getattr(safnet_ops, operator)(**inputs, **case.options, backend="triton")
        return [2 * result for result in (found if isinstance(found, tuple) else (found,))]

    def run(function):
        leaves = [value.float().requires_grad_(differentiable) for value in case.inputs.values()]
        results = function(*leaves)
        if differentiable:
            results[0].square().sum().backward()
        return [*results, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    torch.compiler.reset()
    with ptxsim.triton_on_cpu():
        expected, found = run(call), run(torch.compile(call, backend=backend, fullgraph=True))
    assert len(found) == (1 + len(case.inputs) if differentiable else 5)
    for position, (actual, value) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"{operator}: {position}", actual, value)
