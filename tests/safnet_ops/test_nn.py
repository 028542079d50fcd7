"""Modules of the operators: values, names, and when the operator runs instead of the modules inside."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import safnet_ops
from safnet_ops.nn import BackwardWarp, CensusLoss, GroupConvShuffle, conv_prelu_shuffle, is_plain


def stock(layer, x, residual=None):
    """The layer's modules, called, and PyTorch's own shuffle."""
    conv, *activation = layer
    out = nn.Conv2d.__call__(conv, x)
    out = out if residual is None else out + residual
    for module in activation:
        out = module(out)
    return F.channel_shuffle(out, layer.groups)


@pytest.fixture
def counted(monkeypatch):
    calls = []
    real = safnet_ops.group_conv_shuffle
    monkeypatch.setattr("safnet_ops.nn.group_conv_shuffle", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


@pytest.mark.parametrize(
    "options", [{}, {"groups": 3}, {"groups": 2, "stride": 2, "bias": False}, {"dilation": 2, "prelu": False}]
)
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_group_conv_shuffle(options, backend, counted):
    torch.manual_seed(0)
    layer = GroupConvShuffle(6, 12, **options, dtype=torch.float64)
    x = torch.rand(2, 6, 9, 11, dtype=torch.float64, requires_grad=True)
    residual = torch.rand_like(stock(layer, x))
    with safnet_ops.use_backend(backend):
        found = layer(x), layer(x, residual)
    assert len(counted) == 2
    for value, exact in zip(found, (stock(layer, x), stock(layer, x, residual)), strict=True):
        assert torch.allclose(value, exact, atol=1e-12)
        given = [x, *layer.parameters()]
        grads = [torch.autograd.grad(out.square().sum(), given, retain_graph=True) for out in (value, exact)]
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads, strict=True))
    names = ["0.weight"] + ["0.bias"] * options.get("bias", True) + ["1.weight"] * options.get("prelu", True)
    assert list(layer.state_dict()) == names


def test_survives_pickle_and_copies_states():
    layer = GroupConvShuffle(6, 6, 3)
    again = pickle.loads(pickle.dumps(layer))
    x = torch.rand(1, 6, 5, 5)
    assert torch.equal(layer(x), again(x))
    other = GroupConvShuffle(6, 6, 3)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


class Own(nn.Conv2d):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer[0].register_forward_hook(lambda *_: None),
        lambda layer: layer[1].register_forward_pre_hook(lambda *_: None),
        lambda layer: layer[0].register_full_backward_hook(lambda *_: None),
        lambda layer: layer[1].register_full_backward_pre_hook(lambda *_: None),
        lambda layer: layer[0].compile(backend="eager"),
        lambda layer: setattr(layer[1], "forward", nn.ReLU().forward),
        lambda layer: nn.utils.parametrizations.weight_norm(layer[0]),
        lambda layer: layer.__setitem__(0, Own(6, 6, 3, 1, 1, groups=3)),
        lambda layer: layer.__setitem__(0, nn.Conv2d(6, 6, 5, 1, 2, groups=3)),
        lambda layer: layer.__setitem__(0, nn.Conv2d(6, 6, 3, 1, 1, groups=1)),
        lambda layer: layer.__setitem__(0, nn.Conv2d(6, 6, 3, 1, "same", groups=3)),
        lambda layer: layer.__setitem__(0, nn.Conv2d(6, 6, 3, 1, 1, groups=3, padding_mode="circular")),
        lambda layer: layer.__setitem__(0, nn.Conv2d(6, 6, 3, (1, 2), 1, groups=3)),
        lambda layer: layer.__setitem__(0, nn.Conv2d(6, 6, 3, 1, (1, 2), (1, 2), groups=3)),
        lambda layer: layer.__setitem__(1, nn.GELU()),
        lambda layer: layer.append(nn.Tanh()),
    ],
    ids=range(16),
)
def test_calls_modules_that_are_not_plain(change, counted):
    torch.manual_seed(0)
    layer = GroupConvShuffle(6, 6, 3)
    change(layer)
    x = torch.rand(1, 6, 8, 9)
    assert torch.equal(layer(x), stock(layer, x))
    assert not counted


def test_hooks_of_all_modules_fire(counted):
    layer, fired = GroupConvShuffle(6, 6, 3), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: fired.append(type(module)))
    layer(torch.rand(1, 6, 8, 9))
    handle.remove()
    assert fired == [nn.Conv2d, nn.PReLU, GroupConvShuffle]
    layer(torch.rand(1, 6, 8, 9))
    assert len(counted) == 1


def test_removed_surgery_makes_it_plain_again(counted):
    layer = GroupConvShuffle(6, 6, 3)
    handle = layer[0].register_forward_hook(lambda *_: None)
    assert not is_plain(layer[0], nn.Conv2d)
    handle.remove()
    nn.utils.parametrizations.weight_norm(layer[0])
    assert not is_plain(layer[0], nn.Conv2d)
    nn.utils.parametrize.remove_parametrizations(layer[0], "weight")
    assert is_plain(layer[0], nn.Conv2d)
    layer(torch.rand(1, 6, 8, 9))
    assert len(counted) == 1


def test_modules_of_others(counted):
    conv, prelu = nn.Conv2d(4, 8, 3, 2, 1), nn.PReLU()
    x = torch.rand(1, 4, 8, 8)
    assert torch.allclose(conv_prelu_shuffle(x, conv, prelu), prelu(conv(x)), atol=1e-6)
    assert len(counted) == 1


def test_warp_and_loss():
    torch.manual_seed(0)
    image, flow, other = torch.rand(1, 3, 12, 13), torch.randn(1, 2, 12, 13), torch.rand(1, 3, 12, 13)
    assert torch.equal(BackwardWarp()(image, flow), safnet_ops.backward_warp(image, flow))
    assert torch.equal(CensusLoss(5)(image, other), safnet_ops.census_loss(image, other, 5))


def test_compiles():
    layer = GroupConvShuffle(6, 6, 3)
    x = torch.rand(1, 6, 8, 9)
    assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), atol=1e-6)
