"""SAFNet by PyTorch's own modules, every one of them called: what surgery on the model must come to."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = (1, 2, 4, 2, 1)  # dilations of the full model's residual blocks
SMALL = (1, 1, 2, 4, 2, 1)  # of the small model's refining convolutions


def layer(channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride, dilation, dilation, groups)
    return nn.Sequential(conv, nn.PReLU(channels_out))


def warp(image: Tensor, flow: Tensor) -> Tensor:
    height, width = image.shape[2:]
    x = (flow[:, 0] + torch.arange(width)) * 2 / (width - 1) - 1
    y = (flow[:, 1] + torch.arange(height)[:, None]) * 2 / (height - 1) - 1
    return F.grid_sample(image, torch.stack([x, y], -1), padding_mode="border", align_corners=True)


def up(value: Tensor) -> Tensor:
    return F.interpolate(value, scale_factor=2, mode="bilinear", align_corners=False)


class StockBlock(nn.Module):
    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.conv1 = layer(80, 80, 1, dilation)
        self.conv2 = nn.Conv2d(80, 80, 3, 1, dilation, dilation)
        self.prelu = nn.PReLU(80)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(x + self.conv2(self.conv1(x)))


class StockSAFNet(nn.Module):
    """Exposures (N, 6, H, W), sides multiples of 16 and at least 32, estimated at their own size; returns fused and refined."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.full = variant == "full"
        encoder, decoder, refine = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for level in (1, 2, 3, 4):
            encoder[f"pyramid{level}"] = nn.Sequential(layer(6 if level == 1 else 40, 40, 2), layer(40, 40))
        for number in range(1, 6):
            decoder[f"conv{number}"] = layer(126 if number == 1 else 120, 120, groups=3 if number in (2, 3, 4) else 1)
        decoder["conv6"] = nn.ConvTranspose2d(120, 6, 4, 2, 1)
        if self.full:
            for name, channels, features in (("conv0", 6, 20), ("conv1", 15, 40), ("conv2", 6, 20)):
                refine[name] = nn.Sequential(layer(channels, features), layer(features, features))
            for number, dilation in enumerate(BLOCKS, 1):
                refine[f"resblock{number}"] = StockBlock(dilation)
            refine["conv3"] = nn.Conv2d(80, 3, 3, 1, 1)
        else:
            for number, dilation in enumerate(SMALL, 1):
                refine[f"conv{number}"] = layer(27 if number == 1 else 32, 32, dilation=dilation)
            refine["conv7"] = nn.Conv2d(32, 3, 3, 1, 1)
        self.encoder, self.decoder, self.refinenet = encoder, decoder, refine
        self.shuffle = nn.ChannelShuffle(3)

    def estimate(self, exposures: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Flows (N, 4, H, W) and mask logits (N, 2, H, W)."""
        levels = [exposures]
        for pair in self.encoder.values():
            levels.append([pair(exposure) for exposure in levels[-1]])
        n, _, height, width = levels[-1][0].shape
        flows, masks = (levels[-1][0].new_zeros(n, channels, height, width) for channels in (4, 2))
        layers = self.decoder
        for short, reference, long in levels[:0:-1]:
            warped = warp(short, flows[:, :2]), reference, warp(long, flows[:, 2:])
            x = layers["conv1"](torch.cat([*warped, flows, masks], 1))
            for number in (2, 3, 4):
                x = self.shuffle(layers[f"conv{number}"](x))
            change = layers["conv6"](layers["conv5"](x))
            flows, masks = 2 * up(flows) + change[:, :4], up(masks) + change[:, 4:]
        return flows, masks

    def forward(self, *exposures: Tensor) -> tuple[Tensor, Tensor]:
        short, reference, long = exposures
        flows, logits = self.estimate(list(exposures))
        flow_short, flow_long, masks = flows[:, :2], flows[:, 2:], logits.sigmoid()
        z = reference[:, 3:6]
        base_short, base_long = (2 * z - 1).clamp(min=0), (1 - 2 * z).clamp(min=0)
        weight_short, weight_long = base_short * masks[:, :1], base_long * masks[:, 1:]
        weight_reference = 1 - (2 * z - 1).abs() + (base_short - weight_short) + (base_long - weight_long)
        total = weight_short * warp(short[:, :3], flow_short) + weight_long * warp(long[:, :3], flow_long)
        total = total + weight_reference * reference[:, :3]
        fused = total / (weight_short + weight_reference + weight_long + 1e-9)
        refine, given = self.refinenet, [flows / 20, masks, fused]
        if self.full:
            of_short, of_long = warp(refine["conv0"](short), flow_short), warp(refine["conv2"](long), flow_long)
            x = torch.cat([of_short, refine["conv1"](torch.cat([reference, *given], 1)), of_long], 1)
            for number in range(1, 6):
                x = refine[f"resblock{number}"](x)
            return fused, (fused + refine["conv3"](x)).clamp(0, 1)
        x = torch.cat([warp(short, flow_short), reference, warp(long, flow_long), *given], 1)
        for number in range(1, 7):
            x = refine[f"conv{number}"](x)
        return fused, (fused + refine["conv7"](x)).clamp(0, 1)
