"""The model against an independent reading of its definition, written with torch.nn.functional alone."""

import pytest
import torch
import torch.nn.functional as F

import safnet
import safnet_ops
from safnet.model import Alignment, FullRefine, Fusion, SAFNet, SmallRefine, network_size, upsample_twice
from safnet.radiance import exposure_input, exposure_ratios, linearize, tone_map


@pytest.fixture
def exposures():
    torch.manual_seed(0)
    return [exposure_input(torch.rand(1, 3, 70, 90), ratio) for ratio in exposure_ratios([-2, 0, 2])]


@pytest.fixture(params=["full", "small"])
def model(request):
    """Random weights, large enough for flows of some pixels, so that no stage is trivial."""
    torch.manual_seed(1)
    model = SAFNet(request.param).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("decoder.conv6"):
                parameter.mul_(8)
    return model


# ---- an independent reading ------------------------------------------------------------------------------------------


def conv(state, name, x, stride=1, dilation=1, groups=1):
    weight, bias = state[f"{name}.0.weight"], state[f"{name}.0.bias"]
    out = F.conv2d(x, weight, bias, stride, dilation, dilation, groups)
    return F.prelu(out, state[f"{name}.1.weight"])


def plain_conv(state, name, x, dilation=1):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], 1, dilation, dilation)


def warp(image, flow):
    height, width = image.shape[2:]
    x = (flow[:, 0] + torch.arange(width)) * 2 / (width - 1) - 1
    y = (flow[:, 1] + torch.arange(height)[:, None]) * 2 / (height - 1) - 1
    return F.grid_sample(image, torch.stack([x, y], -1), padding_mode="border", align_corners=True)


def up(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def shuffle(x, groups):
    n, c, h, w = x.shape
    return x.reshape(n, groups, c // groups, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


def decoder(state, features, flow0, flow2, mask0, mask2):
    x = torch.cat([warp(features[0], flow0), features[1], warp(features[2], flow2), flow0, flow2, mask0, mask2], 1)
    assert x.shape[1] == 126
    x = conv(state, "decoder.conv1", x)
    for number in (2, 3, 4):
        x = shuffle(conv(state, f"decoder.conv{number}", x, groups=3), 3)
    x = conv(state, "decoder.conv5", x)
    out = F.conv_transpose2d(x, state["decoder.conv6.weight"], state["decoder.conv6.bias"], 2, 1)
    size = out.shape[2:]
    flows = 2 * up(flow0, size) + out[:, 0:2], 2 * up(flow2, size) + out[:, 2:4]
    return *flows, up(mask0, size) + out[:, 4:5], up(mask2, size) + out[:, 5:6]


def stages(state, exposures, full):
    """All stages of the model in float64: flows and masks at full size, explicit fusion, refined result."""
    state = {key: value.double() for key, value in state.items()}
    exposures = [x.double() for x in exposures]
    height, width = exposures[0].shape[2:]
    small = [up(x, (48, 48)) for x in exposures]  # 35 x 45, each side rounded up to a multiple of 16
    levels = [small]
    for level in range(1, 5):
        name = f"encoder.pyramid{level}"
        levels.append([conv(state, f"{name}.1", conv(state, f"{name}.0", x, stride=2)) for x in levels[-1]])
    parts = [torch.zeros(1, c, 3, 3, dtype=torch.float64) for c in (2, 2, 1, 1)]
    for level in (4, 3, 2, 1):
        parts = decoder(state, levels[level], *parts)
    scale = torch.tensor([90 / 48, 70 / 48], dtype=torch.float64).view(1, 2, 1, 1)
    flow0, flow2 = (up(flow, (height, width)) * scale for flow in parts[:2])
    m1, m3 = (up(mask, (height, width)).sigmoid() for mask in parts[2:])

    z = exposures[1][:, 3:6]
    l1, l3, l2 = (z - 0.5).clamp(min=0) / 0.5, (0.5 - z).clamp(min=0) / 0.5, 1 - (2 * z - 1).abs()
    w1, w3, w2 = l1 * m1, l3 * m3, l2 + l1 * (1 - m1) + l3 * (1 - m3)
    lin0, lin1, lin2 = (x[:, :3] for x in exposures)
    fused = (w1 * warp(lin0, flow0) + w2 * lin1 + w3 * warp(lin2, flow2)) / (w1 + w2 + w3 + 1e-9)

    extra = [flow0 / 20, flow2 / 20, m1, m3, fused]
    if full:

        def pair(name, x):
            return conv(state, f"refinenet.{name}.1", conv(state, f"refinenet.{name}.0", x))

        feat0, feat2 = warp(pair("conv0", exposures[0]), flow0), warp(pair("conv2", exposures[2]), flow2)
        x = torch.cat([feat0, pair("conv1", torch.cat([exposures[1], *extra], 1)), feat2], 1)
        for number, dilation in enumerate((1, 2, 4, 2, 1), 1):
            block = f"refinenet.resblock{number}"
            inner = plain_conv(state, f"{block}.conv2", conv(state, f"{block}.conv1", x, dilation=dilation), dilation)
            x = F.prelu(x + inner, state[f"{block}.prelu.weight"])
        residual = plain_conv(state, "refinenet.conv3", x)
    else:
        x = torch.cat([warp(exposures[0], flow0), exposures[1], warp(exposures[2], flow2), *extra], 1)
        for number, dilation in enumerate((1, 1, 2, 4, 2, 1), 1):
            x = conv(state, f"refinenet.conv{number}", x, dilation=dilation)
        residual = plain_conv(state, "refinenet.conv7", x)
    return flow0, flow2, m1, m3, fused, (fused + residual).clamp(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_every_stage(model, exposures, backend):
    expected = stages(model.state_dict(), exposures, model.variant == "full")
    with safnet_ops.use_backend(backend):
        fusion = model.fuse(*exposures, model.estimate(*exposures))
        fused, refined = model(*exposures)
        assert torch.equal(model(*exposures, refine=False)[1], fused)
    names = ("flow_short", "flow_long", "mask_short", "mask_long", "fused", "refined")
    for name, value, exact in zip(names, (*fusion.alignment, fused, refined), expected, strict=True):
        assert value.shape == exact.shape
        assert (value - exact).abs().max() <= 2e-4 * max(1, exact.abs().max()), name
    assert expected[0].abs().max() > 1, "flows too small to test a warp"
    assert expected[2].std() > 0.005, "masks too flat to test a fusion"


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_parameter_counts():
    counts = {variant: sum(p.numel() for p in SAFNet(variant).parameters()) for variant in ("full", "small")}
    assert counts == {"full": 1_120_849, "small": 566_713}


def test_state_dict_names_are_the_published_ones():
    pairs = [f"encoder.pyramid{k}.{i}.{j}" for k in (1, 2, 3, 4) for i in (0, 1) for j in (0, 1)]
    decoder_names = [f"decoder.conv{k}.{j}" for k in range(1, 6) for j in (0, 1)] + ["decoder.conv6"]
    blocks = [f"refinenet.resblock{k}.{part}" for k in range(1, 6) for part in ("conv1.0", "conv1.1", "conv2", "prelu")]
    full = (
        [f"refinenet.conv{k}.{i}.{j}" for k in (0, 1, 2) for i in (0, 1) for j in (0, 1)] + blocks + ["refinenet.conv3"]
    )
    small = [f"refinenet.conv{k}.{j}" for k in range(1, 7) for j in (0, 1)] + ["refinenet.conv7"]
    for variant, refine in (("full", full), ("small", small)):
        names = {key.rsplit(".", 1)[0] for key in SAFNet(variant).state_dict()}
        assert names == set(pairs + decoder_names + refine)


def test_gradients_reach_every_parameter(model, exposures):
    fused, refined = model(*exposures)
    (tone_map(fused).mean() + (tone_map(refined) - 0.1).square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "conv" in name and "weight" in name)


def test_radius_is_what_the_refine_module_sees():
    """In float64: convolutions of float32 leave traces of rounding some pixels further."""
    for module in (FullRefine().double(), SmallRefine().double()):
        torch.manual_seed(0)
        side = 2 * module.RADIUS + 21
        centre = side // 2
        full = isinstance(module, FullRefine)

        def picture(channels, side=side):
            return torch.rand(1, channels, side, side, dtype=torch.float64)

        warped = picture(20 if full else 6), picture(20 if full else 6)
        fusion = Fusion(picture(3), Alignment(*map(picture, (2, 2, 1, 1))))
        reference = picture(6).requires_grad_()
        module(warped, reference, fusion)[0, :, centre, centre].sum().backward()
        touched = reference.grad.abs().sum((0, 1)).nonzero()
        reach = (touched - centre).abs().max().item()
        assert reach == module.RADIUS


def test_network_size_rounds_up():
    assert network_size(1000, 1500, 0.5) == (512, 752)
    assert network_size(1, 1, 0.5) == (16, 16)
    assert network_size(64, 96, 0.5) == (32, 48)
    with pytest.raises(ValueError, match="scale_factor must be positive, got -1"):
        network_size(10, 10, -1)


def test_bad_input_is_named():
    model = SAFNet("small")
    good, bad = torch.rand(1, 6, 32, 32), torch.rand(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"SAFNet: long must be \(N, 6, H, W\).* got \(1, 3, 32, 32\)"):
        model(good, good, bad)
    with pytest.raises(ValueError, match="variant must be 'full' or 'small', got 'tiny'"):
        SAFNet("tiny")


def test_compiles_without_graph_breaks(exposures):
    model = SAFNet("small").eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for result, expected in zip(compiled(*exposures), model(*exposures), strict=True):
            assert torch.allclose(result, expected, atol=1e-4)


def test_exports(exposures):
    model = SAFNet("small").eval()
    program = torch.export.export(model, tuple(exposures))
    with torch.no_grad():
        assert torch.allclose(program.module()(*exposures)[1], model(*exposures)[1], atol=1e-4)


def test_linear_values_are_in_the_short_exposures_units():
    assert exposure_ratios([3, -1, 1]) == [16, 1, 4]
    assert linearize(torch.tensor([0.5]), 4.0).item() == pytest.approx(0.5**2.2 / 4)
    assert tone_map(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0, 1])


def test_package_exports_what_the_readme_uses():
    assert {"SAFNet", "load_model", "save_model"} <= set(safnet.__all__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_upsampling_is_the_transposed_convolution(dtype):
    torch.manual_seed(0)
    conv = torch.nn.ConvTranspose2d(24, 6, 4, 2, 1).to(dtype)
    x = torch.randn(2, 24, 13, 18, dtype=dtype, requires_grad=True)
    expected, found = conv(x), upsample_twice(x, conv)
    assert found.shape == (2, 6, 26, 36)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12)
    grad = torch.randn_like(expected)
    inputs = (x, conv.weight, conv.bias)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-10)


def test_upsampling_by_other_modules_is_theirs():
    x = torch.randn(1, 24, 8, 8)
    for conv in (torch.nn.ConvTranspose2d(24, 6, 4, 2, 1, groups=2), torch.nn.ConvTranspose2d(24, 6, 2, 2)):
        assert torch.equal(upsample_twice(x, conv), conv(x))
    conv, calls = torch.nn.ConvTranspose2d(24, 6, 4, 2, 1), []
    conv.register_forward_hook(lambda *_: calls.append(1))
    upsample_twice(x, conv)
    assert calls
