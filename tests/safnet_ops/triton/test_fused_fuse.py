"""fused_fuse in Triton: the library's own launches, executed from PTX by the simulator, against the float64
reference."""

import pytest
import torch

import safnet_ops
from operator_inputs import FUSION, fusion_inputs
from safnet_ops import reference
from tests.support.operators import KINDS, LAYOUTS, assert_close, channels_last, check_operator

pytestmark = pytest.mark.usefixtures("simulated")


def by_exposure(function, **options):
    return lambda *inputs: function(*inputs, **options)


def by_weights(function, **options):
    return lambda *inputs: function(*inputs[:7], weights=tuple(inputs[7:]), **options)


def make(size=(5, 7), n=2, channels=3, kind=(torch.float32, torch.float32), weights=False, logits=False):
    counts = (channels, 1, channels) if weights else ()
    return fusion_inputs(size, n=n, channels=channels, dtype=kind[0], geometry=kind[1], logits=logits, weights=counts)


def check(inputs, needed, wrap=by_exposure, **options):
    return check_operator(
        wrap(safnet_ops.fused_fuse, backend="triton", **options),
        wrap(reference.fused_fuse, **options),
        inputs,
        needed,
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_matches_reference(kind):
    inputs = make(kind=kind)
    out = check(inputs, (True,) * 8)
    assert out.dtype == kind[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (19, 70)], ids=str)
def test_layouts_and_odd_sizes(layout, size):
    inputs = [layout(x) for x in make(size)]
    out = check(inputs, (True,) * 8)
    if size == (19, 70):
        assert out.is_contiguous(memory_format=torch.channels_last) == (layout is channels_last)


def test_layouts_may_differ():
    inputs = [x if i % 2 else channels_last(x) for i, x in enumerate(make())]
    check(inputs, (True,) * 8)


@pytest.mark.parametrize("channels", [1, 6])
def test_other_numbers_of_channels(channels):
    check(make(channels=channels), (True,) * 8)


def test_explicit_weights_and_logits():
    check(make(weights=True, logits=True), (True,) * 10, by_weights, mask_logits=True)


@pytest.mark.parametrize(
    "wanted",
    [{"reference"}, {"short", "flow_long"}, {"flow_short", "mask_long"}, {"reference_ldr", "mask_short"}, {"long"}],
    ids=lambda names: "+".join(sorted(names)),
)
def test_only_needed_gradients(wanted):
    check(make(), tuple(name in wanted for name in FUSION))


def test_reference_at_the_kinks_of_its_weights():
    inputs = make()
    inputs[7] = torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, inputs[7].shape)]
    check(inputs, (False,) * 7 + (True,))


def test_deterministic_backward_repeats_to_the_bit(deterministic):
    import ptxsim

    inputs = make((5, 60), n=1)
    inputs[3][:, 0] = 3.3 - torch.arange(60.0)
    inputs[4][:, 0] = 50.7 - torch.arange(60.0)
    found = []
    for seed in (1, 2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with ptxsim.options(seed=seed):
            safnet_ops.fused_fuse(*leaves, backend="triton").sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    check(inputs, (True,) * 8)


def test_nan_flow_gives_nan_at_its_pixel():
    inputs = make()
    inputs[3][0, 0, 2, 3] = torch.nan
    out = safnet_ops.fused_fuse(*inputs, backend="triton")
    assert out.isnan().sum() == 3
    assert out[0, :, 2, 3].isnan().all()


def test_64bit_offsets_give_the_same_bits(wide):
    inputs = make()
    narrow = check(inputs, (True,) * 8)
    wide()
    assert torch.equal(check(inputs, (True,) * 8), narrow)


def test_empty_batch():
    inputs = [x.requires_grad_() for x in make(n=0)]
    out = safnet_ops.fused_fuse(*inputs, backend="triton")
    assert out.shape == (0, 3, 5, 7)
    out.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs)


def test_second_derivative():
    inputs = [x.double() for x in make((3, 4), n=1)]
    inputs[3].requires_grad_()
    inputs[0].requires_grad_()
    found = []
    for function in (by_exposure(safnet_ops.fused_fuse, backend="triton"), by_exposure(reference.fused_fuse)):
        (slope,) = torch.autograd.grad(function(*inputs).square().sum(), inputs[3], create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), inputs[0])[0])
    assert_close("second derivative", found[0], found[1])


def test_five_exposures():
    torch.manual_seed(0)
    shapes = [(1, 3, 3, 5)] * 10 + [(1, 2, 3, 5)] * 4 + [(1, 1, 3, 5)] * 4

    def fused(backend):
        def call(*values):
            images, flows, masks = values[:5], values[10:14], values[14:]
            return safnet_ops.fuse_frames(images[0], images[1:], flows, masks, ldr=values[5:10], backend=backend)

        return call

    check_operator(fused("triton"), fused("reference"), [torch.rand(shape) for shape in shapes], [True] * 18)
