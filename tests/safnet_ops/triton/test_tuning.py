"""Tuning: every configuration that it may choose computes what the reference does, and its zeroing allows for absent sums."""

import pytest
import torch

import safnet_ops
from operator_inputs import census_inputs, conv_inputs, fusion_inputs, upsample_inputs, warp_inputs
from safnet_ops import reference
from safnet_ops.operators import OPERATORS
from tests.support.operators import assert_close, channels_last, check_operator

triton = pytest.importorskip("triton")

from safnet_ops.triton import fused_fuse  # noqa: E402
from simulated_gpu import triton_costs  # noqa: E402

TUNED = [(tuner, config) for tuner in triton_costs.tuners() for config in tuner.configs]
SIZE = (9, 12)


def operator_of(tuner):
    return tuner.base_fn.__module__.rpartition(".")[2]


def name_of(value):
    if isinstance(value, triton.Config):
        sizes = " ".join(f"{name} {size}" for name, size in value.kwargs.items())
        return f"{sizes}, {value.num_warps} warps, {value.num_stages} stages"
    return f"{operator_of(value)}{value.base_fn.__name__}"


def check(operator, inputs, needed, **options):
    check_operator(
        lambda *tensors: getattr(safnet_ops, operator)(*tensors, backend="triton", **options),
        lambda *tensors: getattr(reference, operator)(*tensors, **options),
        inputs,
        needed,
    )


def check_warp():
    """Contiguous pictures and those of dense channels have tuners of their own."""
    image, flow = warp_inputs(SIZE, channels=8)
    for picture in (image, channels_last(image)):
        check("backward_warp", (picture, flow), (True, True))


def check_fusion():
    check("fused_fuse", fusion_inputs(SIZE), (True,) * 8)


def check_upsampling():
    inputs = upsample_inputs(SIZE)
    found = safnet_ops.upsample_fuse(*inputs, backend="triton")
    expected = reference.upsample_fuse(*(value.double() for value in inputs))
    for name, actual, exact in zip(("fused", "flow", "flow", "mask", "mask"), found, expected, strict=True):
        assert_close(name, actual, exact)


def check_convolution():
    """Exact products and tensor cores' have tuners of their own."""
    for dtype in (torch.float32, torch.float16):
        inputs = conv_inputs(SIZE, (16, 16), 2, dtype=dtype, exact=True)[:4]
        check("group_conv_shuffle", inputs, (True,) * 4, groups=2)


def check_census():
    check("census_loss", census_inputs(SIZE), (True, False))


CHECKS = {
    "backward_warp": check_warp,
    "fused_fuse": check_fusion,
    "upsample_fuse": check_upsampling,
    "group_conv_shuffle": check_convolution,
    "census_loss": check_census,
}


def test_every_operator_is_tuned():
    assert {operator_of(tuner) for tuner, _ in TUNED} == set(CHECKS) == set(OPERATORS)


@pytest.mark.parametrize(("tuner", "config"), TUNED, ids=name_of)
def test_every_configuration_matches_the_reference(tuner, config, simulated, float32_products, monkeypatch):
    """All are equally fast to the simulated device, so that other tests run the first."""
    monkeypatch.setattr(tuner, "configs", [config])
    monkeypatch.setattr(tuner, "best_config", None, raising=False)
    CHECKS[operator_of(tuner)]()
    assert tuner.best_config is config, "no call reached this tuner"


def test_zeroing_before_trials_allows_for_absent_sums():
    """Triton's own, `reset_to_zero`, does not before 3.8; and the sums of a gradient that is not needed are None."""
    for tuner, _ in TUNED:
        assert not tuner.reset_to_zero
        tuner.pre_hook(dict.fromkeys(tuner.arg_names), reset_only=True)
    given = dict.fromkeys(fused_fuse._tuned_backward.arg_names)
    given |= {"grad_out": torch.ones(3), "grad_long": torch.ones(3)}
    fused_fuse._tuned_backward.pre_hook(given)
    assert given["grad_out"].all()
    assert not given["grad_long"].any()
