import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from safnet.training.perceptual import VGG16, load_vgg16, perceptual_loss
from safnet.weights import WeightsError

# Of torchvision's vgg16: index of each convolution in `features`, and its channels.
CONVOLUTIONS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512}


@pytest.fixture(scope="module")
def state():
    """A vgg16 as torchvision stores it, with what comes after relu4_3 too."""
    random = torch.Generator().manual_seed(0)
    weights, before = {}, 3
    for index, channels in CONVOLUTIONS.items():
        weights[f"features.{index}.weight"] = torch.randn(channels, before, 3, 3, generator=random) / (3 * before**0.5)
        weights[f"features.{index}.bias"] = torch.randn(channels, generator=random) * 0.1
        before = channels
    weights["features.24.weight"] = torch.zeros(1)
    weights["classifier.0.bias"] = torch.zeros(4)
    return weights


def expected_features(state, picture):
    """relu1_2, relu2_2, relu3_3, relu4_3, written out."""
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x, results = (picture - mean) / deviation, []
    for index in CONVOLUTIONS:
        if index in (5, 10, 17):
            x = F.max_pool2d(x, 2, 2)
        x = F.relu(F.conv2d(x, state[f"features.{index}.weight"], state[f"features.{index}.bias"], padding=1))
        if index in (2, 7, 14, 21):
            results.append(x)
    return results


@pytest.mark.parametrize("extension", [".pth", ".safetensors"])
def test_features_are_vgg16s(state, tmp_path, extension):
    path = tmp_path / f"vgg16{extension}"
    torch.save(state, path) if extension == ".pth" else save_file(state, path)
    network = load_vgg16(path)
    picture = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    features = network(picture)
    assert [tuple(f.shape[1:]) for f in features] == [(64, 32, 48), (128, 16, 24), (256, 8, 12), (512, 4, 6)]
    for one, other in zip(features, expected_features(state, picture), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_the_loss_sums_the_layers_mean_differences(state, tmp_path):
    torch.save(state, tmp_path / "vgg16.pth")
    network = load_vgg16(tmp_path / "vgg16.pth")
    random = torch.Generator().manual_seed(2)
    one, other = (torch.rand(1, 3, 32, 32, generator=random).requires_grad_() for _ in range(2))
    loss = perceptual_loss(network, one, other)
    pairs = zip(expected_features(state, one), expected_features(state, other), strict=True)
    assert loss.item() == pytest.approx(sum((a - b).abs().mean().item() for a, b in pairs), rel=1e-5)
    loss.backward()
    assert one.grad.abs().max() > 0
    assert other.grad is None
    assert perceptual_loss(network, one, one).item() == 0


def test_weights_are_looked_for_where_torchvision_keeps_them(state, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        WeightsError, match=r"none at .*vgg16-397923af\.pth; give .* --vgg16 FILE, .* --perceptual-weight 0"
    ):
        load_vgg16()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub/checkpoints/vgg16-397923af.pth")
    assert torch.equal(load_vgg16().features[0].bias, state["features.0.bias"])


def test_files_that_are_no_vgg16(state, tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, path)
    with pytest.raises(WeightsError, match=r"other.pth: features\.0\.bias must have shape \(64,\), it is missing"):
        load_vgg16(path)
    torch.save({**state, "features.5.weight": torch.zeros(128, 1, 3, 3)}, path)
    with pytest.raises(WeightsError, match=r"features\.5\.weight must have shape .* it is of shape \(128, 1, 3, 3\)"):
        load_vgg16(path)
    path.write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_vgg16(path)


def test_names_are_torchvisions():
    assert {name.split(".")[1] for name in VGG16().state_dict()} == {str(index) for index in CONVOLUTIONS}
