"""Perceptual distance (Johnson et al. 2016): how far apart two pictures are in features of VGG16."""

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from safnet.weights import WeightsError, read_state

# VGG16 (Simonyan and Zisserman 2015), configuration D, up to its tenth convolution: channels, and P for a 2x2 maximum.
LAYERS = (64, 64, "P", 128, 128, "P", 256, 256, 256, "P", 512, 512, 512)
COMPARED = (2, 4, 7, 10)  # after so many convolutions: relu1_2, relu2_2, relu3_3, relu4_3
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's RGB values, as VGG16 was trained
DOWNLOADED = "hub/checkpoints/vgg16-397923af.pth"  # where torchvision keeps the file, below TORCH_HOME


class VGG16(nn.Module):
    """VGG16's features at COMPARED of pictures (N, 3, H, W) in [0, 1]; parameters are named as in torchvision."""

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for layer in LAYERS:
            if layer == "P":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, int(layer), 3, padding=1), nn.ReLU()]
                channels = int(layer)
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        x, results, convolutions = (pictures - self.mean) / self.deviation, [], 0
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                convolutions += 1
                if convolutions in COMPARED:
                    results.append(x)
        return results


def load_vgg16(path: Path | None = None) -> VGG16:
    """VGG16 from a state dict in torchvision's layout (.pth or .safetensors), without gradients.

    Args:
        path: the weights file; None for the place where torchvision keeps its download.

    Raises:
        WeightsError: there is no such file, or it does not hold VGG16's convolutions.
    """
    file = path or Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / DOWNLOADED
    if not file.is_file():
        place = f"--vgg16 {path} does not exist" if path else f"there is none at {file}"
        raise WeightsError(
            f"the perceptual loss needs VGG16's weights, and {place}; give torchvision's "
            "vgg16-397923af.pth (https://download.pytorch.org/models/vgg16-397923af.pth) by --vgg16 FILE, "
            "or leave the term out by --perceptual-weight 0"
        )
    state, network = read_state(file), VGG16()
    for name, parameter in network.state_dict().items():
        if name not in state or state[name].shape != parameter.shape:
            found = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
            raise WeightsError(f"--vgg16 {file}: {name} must have shape {tuple(parameter.shape)}, it is {found}")
    network.load_state_dict({name: state[name] for name in network.state_dict()})
    return network.eval().requires_grad_(False)


def perceptual_loss(network: VGG16, prediction: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute differences of VGG16's features, summed over the four layers; (N, 3, H, W) display values in [0, 1].

    No gradient goes to the truth.
    """
    with torch.no_grad():
        expected = network(truth)
    return torch.stack([F.l1_loss(*pair) for pair in zip(network(prediction), expected, strict=True)]).sum()
