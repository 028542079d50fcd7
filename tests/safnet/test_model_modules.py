"""Surgery on the model: hooks, parametrizations, adapters and replaced layers do what they do to PyTorch's own modules."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import safnet_ops
from safnet.model import SAFNet
from safnet.radiance import exposure_input, exposure_ratios
from tests.support.stock_model import StockSAFNet

SIZE = (32, 48)


@pytest.fixture(scope="module")
def exposures():
    torch.manual_seed(0)
    return [exposure_input(torch.rand(1, 3, *SIZE), ratio).double() for ratio in exposure_ratios([-2, 0, 2])]


def models(variant):
    """The model and the stock one with the same random weights, in float64 so that only rounding differs."""
    torch.manual_seed(1)
    model, stock = SAFNet(variant).double(), StockSAFNet(variant).double()
    stock.load_state_dict(model.state_dict())
    return model, stock


@pytest.fixture(params=["full", "small"])
def pair(request):
    return models(request.param)


def layers(model, *kinds):
    return {name: module for name, module in model.named_modules() if type(module) in (kinds or (nn.Conv2d, nn.PReLU))}


def replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


# ---- kinds of surgery: each is done to both models, and starts from the same random numbers ---------------------------


def nothing(model):
    pass


def for_convolutions(change):
    def operate(model):
        for conv in layers(model, nn.Conv2d).values():
            change(conv)

    return operate


def old_weight_norm(conv):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(conv)


class Damped(nn.Module):
    def forward(self, weight):
        return weight * 0.9


class LoraConv(nn.Conv2d):
    """A convolution by a class of one's own."""

    def __init__(self, conv, rank=2):
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            3,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            dtype=torch.double,
        )
        self.load_state_dict(conv.state_dict())
        self.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, self.weight[0].numel(), dtype=torch.double) * 0.1)
        self.up = nn.Parameter(torch.randn(conv.out_channels, rank, dtype=torch.double) * 0.1)

    def forward(self, x):
        return self._conv_forward(x, self.weight + (self.up @ self.down).view_as(self.weight), self.bias)


class Adapter(nn.Module):
    """A wrapper without a weight of its own name."""

    def __init__(self, conv):
        super().__init__()
        self.base = conv.requires_grad_(False)
        self.gain = nn.Parameter(torch.full((conv.out_channels, 1, 1), 1.1, dtype=torch.double))

    def forward(self, x):
        return self.base(x) * self.gain


def for_each_convolution(make):
    def operate(model):
        for name, conv in layers(model, nn.Conv2d).items():
            replace(model, name, make(conv))

    return operate


def other_activations(model):
    for name in list(layers(model, nn.PReLU))[::2]:
        replace(model, name, nn.LeakyReLU(0.3))


def one_slope(model):
    for name in layers(model, nn.PReLU):
        replace(model, name, nn.PReLU(dtype=torch.double))


def other_padding(model):
    for conv in layers(model, nn.Conv2d).values():
        conv.padding_mode = "replicate"
        conv._reversed_padding_repeated_twice = [side for side in reversed(conv.padding) for _ in range(2)]


def other_groups(model):
    """Convolutions across the groups, after which channels are shuffled as before."""
    for number in (2, 3, 4):
        replace(model, f"decoder.conv{number}.0", nn.Conv2d(120, 120, 3, 1, 1, dtype=torch.double))


def larger_windows(model):
    for name, conv in layers(model, nn.Conv2d).items():
        if conv.stride == (1, 1):
            groups, dilation = conv.groups, conv.dilation[0]
            wide = nn.Conv2d(
                conv.in_channels, conv.out_channels, 5, 1, 2 * dilation, dilation, groups, dtype=torch.double
            )
            replace(model, name, wide)


def own_forward(conv):
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 1.1


def appended(model):
    for module in list(model.modules()):
        if type(next(iter(module.children()), None)) is nn.Conv2d and isinstance(module, nn.Sequential):
            module.append(nn.Hardtanh(-0.2, 0.2))


SURGERY = {
    "nothing": nothing,
    "weight_norm": for_convolutions(old_weight_norm),
    "parametrized weight_norm": for_convolutions(parametrizations.weight_norm),
    "spectral_norm": for_convolutions(nn.utils.spectral_norm),
    "parametrized spectral_norm": for_convolutions(parametrizations.spectral_norm),
    "prune": for_convolutions(lambda conv: prune.l1_unstructured(conv, "weight", 0.5)),
    "parametrize": for_convolutions(lambda conv: parametrize.register_parametrization(conv, "weight", Damped())),
    "subclass": for_each_convolution(LoraConv),
    "wrapper": for_each_convolution(Adapter),
    "own forward": for_convolutions(own_forward),
    "other activations": other_activations,
    "one slope": one_slope,
    "other padding": other_padding,
    "other groups": other_groups,
    "larger windows": larger_windows,
    "appended": appended,
}


def train(model, exposures, steps=2):
    """Outputs before the first step and after the last."""
    before = run(model, exposures)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        fused, refined = run(model, exposures)
        ((fused - 0.3).square().mean() + (refined - 0.1).square().mean()).backward()
        optimizer.step()
    return *before, *run(model, exposures)


def run(model, exposures):
    return model(*exposures, scale_factor=1.0) if isinstance(model, SAFNet) else model(*exposures)


@pytest.mark.parametrize("surgery", SURGERY)
def test_two_steps_as_in_pytorchs_modules(pair, exposures, surgery):
    states = []
    for model in pair:
        torch.manual_seed(2)
        SURGERY[surgery](model)
        states.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    found, expected = (train(model, exposures) for model in pair)
    for value, exact in zip(found, expected, strict=True):
        assert (value - exact).abs().max() < 1e-9
    assert (found[1] - found[3]).abs().max() > 1e-5, "two steps changed too little to tell"
    model, stock = (model.state_dict() for model in pair)
    assert model.keys() == stock.keys()
    changed = {name for name in stock if not torch.equal(stock[name], states[1][name])}
    assert changed == {name for name in model if not torch.equal(model[name], states[0][name])}
    trained = {name for name, parameter in pair[1].named_parameters() if parameter.requires_grad}
    assert len(trained & changed) > 0.9 * len(trained)
    for name, value in model.items():
        assert (value - stock[name]).abs().max() < 1e-9, name


def test_hooks_fire_on_every_layer(pair, exposures):
    model, stock = pair
    calls = {}
    for side, network in enumerate(pair):
        fired = calls[side] = {kind: {} for kind in ("pre", "forward", "backward pre", "backward")}
        for name, module in layers(network, nn.Conv2d, nn.PReLU, nn.ConvTranspose2d).items():

            def note(kind, name=name, fired=fired):
                def hook(*_):
                    fired[kind][name] = fired[kind].get(name, 0) + 1

                return hook

            module.register_forward_pre_hook(note("pre"))
            module.register_forward_hook(note("forward"))
            module.register_full_backward_pre_hook(note("backward pre"))
            module.register_full_backward_hook(note("backward"))
    with torch.no_grad():
        plain = run(models(model.variant)[0], exposures)
    for found, expected in zip(run(model, exposures), plain, strict=True):
        assert (found - expected).abs().max() < 1e-12
        found.sum().backward(retain_graph=True)
    for output in run(stock, exposures):
        output.sum().backward(retain_graph=True)
    assert len(calls[0]["pre"]) == len(layers(model)) + 1
    assert calls[0] == calls[1]


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "global"])
def test_hooks_change_what_they_return(pair, exposures, kind):
    def double(network):
        conv, prelu = (network.get_submodule(f"decoder.conv3.{child}") for child in (0, 1))
        if kind == "forward":
            conv.register_forward_hook(lambda _module, _inputs, out: out * 2)
            prelu.register_forward_hook(lambda _module, _inputs, out: out - 0.1)
        elif kind == "pre":
            conv.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 2,))
        else:
            conv.register_full_backward_hook(lambda _module, inputs, _outs: (inputs[0] * 2,))

    results = []
    for network in pair:
        if kind == "global":
            handle = nn.modules.module.register_module_forward_hook(
                lambda module, _inputs, out: out * 1.1 if isinstance(module, nn.PReLU) else None
            )
            results.append(train(network, exposures, 1))
            handle.remove()
        else:
            double(network)
            results.append(train(network, exposures, 1))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() < 1e-9
    untouched = train(models(pair[0].variant)[0], exposures, 1)
    assert max((a - b).abs().max() for a, b in zip(untouched, results[0], strict=True)) > 1e-7


def test_hooks_on_the_parts(pair, exposures):
    model, fired = pair[0], []
    for name in ("encoder", "decoder", "refinenet", "decoder.conv2", "refinenet.conv1"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    run(model, exposures)
    assert {name: fired.count(name) for name in fired} == {
        **{"encoder": 3, "decoder": 4, "decoder.conv2": 4, "refinenet": 1, "refinenet.conv1": 1}
    }


def test_plain_layers_run_by_the_operator(exposures, monkeypatch):
    """Surgery on one layer leaves the others as fast as they were."""
    model, counted = models("full")[0], []
    real = safnet_ops.group_conv_shuffle
    monkeypatch.setattr("safnet_ops.nn.group_conv_shuffle", lambda *a, **k: counted.append(1) or real(*a, **k))
    run(model, exposures)
    every = len(counted)
    assert every == 3 * 8 + 4 * 5 + 6 + 10 + 1
    parametrizations.weight_norm(model.decoder.conv3[0])
    counted.clear()
    run(model, exposures)
    assert len(counted) == every - 4


@pytest.mark.parametrize("surgery", ["weight_norm", "parametrized weight_norm", "wrapper"])
def test_surgery_in_half_precision(exposures, surgery):
    """The dtype is that of the parameters that there are, of which the weight may be made later."""
    model = models("small")[0]
    SURGERY[surgery](model)
    exact = run(model, exposures)
    model.bfloat16()
    for found, expected in zip(run(model, exposures), exact, strict=True):
        assert (found - expected).abs().max() < 0.15
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, [exposure.float() for exposure in exposures])
    assert all((value - expected).abs().max() < 0.15 for value, expected in zip(found, exact, strict=True))


@pytest.mark.parametrize("surgery", ["nothing", "weight_norm", "parametrized weight_norm", "wrapper", "other padding"])
def test_surgery_compiles_and_exports(exposures, surgery):
    model = models("small")[0].eval()
    SURGERY[surgery](model)
    with torch.no_grad():
        expected = run(model, exposures)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*exposures, scale_factor=1.0)
        program = torch.export.export(model, tuple(exposures), {"scale_factor": 1.0}).module()
        exported = program(*exposures, scale_factor=1.0)
    for found in (compiled, exported):
        for value, exact in zip(found, expected, strict=True):
            assert (value - exact).abs().max() < 1e-9
