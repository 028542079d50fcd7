"""SAFNet: selective alignment fusion network (Kong et al., ECCV 2024, arXiv 2407.16308), full and small.

One encoder, shared by the three exposures, and one decoder, shared by four pyramid levels, estimate flows and masks coarse to
fine at half size. The explicit fusion merges the exposures from them, and a refine module restores detail at full size.
Module names are those of the published checkpoints.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import safnet_ops
from safnet.choices import Variant
from safnet_ops.autocast import is_autocast
from safnet_ops.group_conv_shuffle import prefers_channels_last
from safnet_ops.nn import GroupConvShuffle, conv_prelu_shuffle, is_plain
from safnet_ops.workspace import concatenate

LEVELS = 4
FEATURES = 40  # channels of every encoder level
DECODER_CHANNELS = 120
DECODER_GROUPS = 3
SIZE_MULTIPLE = 2**LEVELS  # the network's input sides are rounded up to this
SIMPLE_FRACTION = 1024  # up to this denominator a scale factor is taken as the fraction it is, such as 1/2
FLOW_SCALE = 20.0  # flows enter the refine module in units of 20 pixels


class Alignment(NamedTuple):
    """Flows (N, 2, h, w) from reference to short / long in pixels of their own size, and masks (N, 1, h, w).

    The masks are logits as `SAFNet.estimate` returns them, and probabilities in `Fusion`.
    """

    flow_short: Tensor
    flow_long: Tensor
    mask_short: Tensor
    mask_long: Tensor


class Fusion(NamedTuple):
    """The explicit fusion (N, 3, H, W) in the short exposure's units, and the full-size alignment it was made with."""

    fused: Tensor
    alignment: Alignment


# Devices on which an ordinary convolution (groups=1) is faster by our operator than by the library's.
BEATS_LIBRARY = ("cpu",)


def describe_convolutions() -> str:
    """A sentence on which of the model's layers run by our operators, for people."""
    devices = ", ".join({"cpu": "CPU", "cuda": "CUDA"}.get(kind, kind) for kind in BEATS_LIBRARY) or "no device"
    return (
        "SAFNet runs its warps, fusion and grouped convolutions by these operators everywhere, its other 3x3 convolutions "
        f"on {devices} only: elsewhere the library's are taken to be faster"
    )


def computing_dtype(layer: nn.Module, x: Tensor) -> torch.dtype:
    """In which a layer computes: its weights', or autocast's, which leaves float64 alone; that of `x` if it has no weights."""
    # Not the attribute, which is out of date where a hook makes the weight of others.
    weight: Tensor | None = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        weight = next((parameter for parameter in layer.parameters() if parameter.is_floating_point()), x)
    if weight.dtype == torch.float64 or not is_autocast(weight):
        return weight.dtype
    return torch.get_autocast_dtype(weight.device.type)


def geometry_dtype(pictures: Tensor) -> torch.dtype:
    """Of flows and masks beside pictures: flows of half precision would be wrong by up to half a pixel."""
    return torch.promote_types(pictures.dtype, torch.float32)


def convolve(
    x: Tensor, conv: nn.Module, *activation: nn.Module, groups: int = 1, residual: Tensor | None = None
) -> Tensor:
    """channel_shuffle(activation(conv(x) + residual), groups): in one pass where our operator may and is faster."""
    x = x.to(computing_dtype(conv, x))
    if groups > 1 or x.device.type in BEATS_LIBRARY:
        if prefers_channels_last(x.dtype, x.device):
            x = x.contiguous(memory_format=torch.channels_last)
            residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
        return conv_prelu_shuffle(x, conv, *activation, groups=groups, residual=residual)
    x = conv(x) if residual is None else conv(x) + residual
    for module in activation:
        x = module(x)
    return x


def upsample_twice(x: Tensor, conv: nn.Module) -> Tensor:
    """The decoder's transposed convolution, of 4x4 weights, stride 2 and padding 1: (N, C, H, W) -> (N, 6, 2H, 2W).

    Of each 2x2 results every one has 2x2 of the weights. So it is a 3x3 convolution to four times the channels, of whose
    weights five in nine are zero, and still several times as fast as the library's on devices where our convolution is fast.
    An input that is not finite spoils results beside those that read it, too: zero weights make NaN of it.
    """
    x = x.to(computing_dtype(conv, x))
    if x.device.type not in BEATS_LIBRARY or torch.compiler.is_compiling() or not _is_plain_upsampling(conv):
        return conv(x)
    conv = cast(nn.ConvTranspose2d, conv)
    # Results 2y and 2y + 1 take inputs y - 1, y and y + 1 by these weights, of which the last, added here, is zero.
    taps = torch.tensor([[3, 1, 4], [4, 2, 0]], device=x.device)
    weight = F.pad(conv.weight, (0, 1, 0, 1))[:, :, taps[:, None, :, None], taps[None, :, None, :]]
    weight = weight.permute(1, 2, 3, 0, 4, 5).flatten(0, 2)  # from (in, out, 2, 2, 3, 3)
    bias = None if conv.bias is None else conv.bias.repeat_interleave(4)
    return F.pixel_shuffle(safnet_ops.group_conv_shuffle(x, weight, bias), 2)


def _is_plain_upsampling(conv: nn.Module) -> bool:
    """Whether a module is the one that `upsample_twice` knows."""
    if not is_plain(conv, nn.ConvTranspose2d):
        return False
    conv = cast(nn.ConvTranspose2d, conv)
    settings = conv.kernel_size, conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.groups
    return settings == ((4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 1)


class ConvPReLU(GroupConvShuffle):
    """3x3 convolution and PReLU, named as in the published checkpoints, 0 and 1, and a shuffle where there are groups."""

    def __init__(
        self, channels_in: int, channels_out: int, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__(channels_in, channels_out, groups, stride=stride, dilation=dilation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return convolve(x, *self, groups=self.groups, residual=residual)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The channels of all parts, in the dtype that this layer computes in."""
        dtype = computing_dtype(self[0], parts[0])
        layout = torch.channels_last if prefers_channels_last(dtype, parts[0].device) else torch.contiguous_format
        return concatenate(parts, dtype, layout)


class Encoder(nn.Module):
    """Exposure (N, 6, H, W) -> features (N, 40, H / 2^k, W / 2^k) for the levels k = 1..4."""

    def __init__(self) -> None:
        super().__init__()
        channels = 6
        for level in range(1, LEVELS + 1):
            pair = nn.Sequential(ConvPReLU(channels, FEATURES, stride=2), ConvPReLU(FEATURES, FEATURES))
            self.add_module(f"pyramid{level}", pair)
            channels = FEATURES

    def forward(self, exposure: Tensor) -> list[Tensor]:
        features = []
        for pair in self.children():
            exposure = pair(exposure)
            features.append(exposure)
        return features


class Decoder(nn.Module):
    """Refines flows and mask logits of one level and returns them at twice its size."""

    def __init__(self) -> None:
        super().__init__()
        alignment_channels = 6  # two flows and two masks
        self.conv1 = ConvPReLU(3 * FEATURES + alignment_channels, DECODER_CHANNELS)
        self.conv2 = ConvPReLU(DECODER_CHANNELS, DECODER_CHANNELS, groups=DECODER_GROUPS)
        self.conv3 = ConvPReLU(DECODER_CHANNELS, DECODER_CHANNELS, groups=DECODER_GROUPS)
        self.conv4 = ConvPReLU(DECODER_CHANNELS, DECODER_CHANNELS, groups=DECODER_GROUPS)
        self.conv5 = ConvPReLU(DECODER_CHANNELS, DECODER_CHANNELS)
        self.conv6 = nn.ConvTranspose2d(DECODER_CHANNELS, alignment_channels, 4, 2, 1)

    def forward(self, short: Tensor, reference: Tensor, long: Tensor, alignment: Alignment) -> Alignment:
        warped_short = safnet_ops.backward_warp(short, alignment.flow_short)
        warped_long = safnet_ops.backward_warp(long, alignment.flow_long)
        x = self.conv1(self.conv1.join([warped_short, reference, warped_long, *alignment]))
        x = self.conv4(self.conv3(self.conv2(x)))  # grouped, with a channel shuffle after each
        change = upsample_twice(self.conv5(x), self.conv6)
        upsampled = [F.interpolate(part, scale_factor=2.0, mode="bilinear", align_corners=False) for part in alignment]
        flow_short, flow_long, mask_short, mask_long = upsampled
        return Alignment(
            2.0 * flow_short + change[:, 0:2],
            2.0 * flow_long + change[:, 2:4],
            mask_short + change[:, 4:5],
            mask_long + change[:, 5:6],
        )


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = ConvPReLU(channels, channels, dilation=dilation)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, dilation, dilation)
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.conv1(x), self.conv2, self.prelu, residual=x)


class FullRefine(nn.Module):
    """Refine module of the full model: features of the outer exposures are warped, then five residual blocks."""

    DILATIONS = (1, 2, 4, 2, 1)

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(ConvPReLU(6, 20), ConvPReLU(20, 20))
        self.conv1 = nn.Sequential(ConvPReLU(15, 40), ConvPReLU(40, 40))
        self.conv2 = nn.Sequential(ConvPReLU(6, 20), ConvPReLU(20, 20))
        for number, dilation in enumerate(self.DILATIONS, 1):
            self.add_module(f"resblock{number}", ResidualBlock(80, dilation))
        self.conv3 = nn.Conv2d(80, 3, 3, 1, 1)

    def short_features(self, short: Tensor) -> Tensor:
        """What is warped of the short exposure (N, 6, H, W): (N, 20, H, W), seeing FEATURE_RADIUS pixels to each side."""
        return self.conv0(short)

    def long_features(self, long: Tensor) -> Tensor:
        """As `short_features`, of the long exposure."""
        return self.conv2(long)

    def forward(self, warped: tuple[Tensor, Tensor], reference: Tensor, fusion: Fusion) -> Tensor:
        """Residual (N, 3, H, W) to add to the explicit fusion from warped features; sees RADIUS pixels to each side."""
        return convolve(self.features(warped, reference, fusion), self.residual_layer)

    @property
    def residual_layer(self) -> nn.Conv2d:
        return self.conv3

    def features(self, warped: tuple[Tensor, Tensor], reference: Tensor, fusion: Fusion) -> Tensor:
        """What the last layer makes the residual of: (N, 80, H, W)."""
        first = cast(ConvPReLU, self.conv1[0])
        x = self.conv1(first.join([reference, *_refine_inputs(fusion)]))
        x = first.join([warped[0], x, warped[1]])
        for number in range(1, len(self.DILATIONS) + 1):
            x = self.get_submodule(f"resblock{number}")(x)
        return x

    FEATURE_RADIUS = 2
    RADIUS = 2 + 2 * sum(DILATIONS) + 1


class SmallRefine(nn.Module):
    """Refine module of SAFNet-S: the outer exposures themselves are warped, then seven convolutions."""

    DILATIONS = (1, 1, 2, 4, 2, 1)

    def __init__(self) -> None:
        super().__init__()
        for number, dilation in enumerate(self.DILATIONS, 1):
            self.add_module(f"conv{number}", ConvPReLU(27 if number == 1 else 32, 32, dilation=dilation))
        self.conv7 = nn.Conv2d(32, 3, 3, 1, 1)

    def short_features(self, short: Tensor) -> Tensor:
        """What is warped of the short exposure (N, 6, H, W): the exposure itself."""
        return short

    def long_features(self, long: Tensor) -> Tensor:
        """As `short_features`, of the long exposure."""
        return long

    def forward(self, warped: tuple[Tensor, Tensor], reference: Tensor, fusion: Fusion) -> Tensor:
        """Residual (N, 3, H, W) to add to the explicit fusion from warped features; sees RADIUS pixels to each side."""
        return convolve(self.features(warped, reference, fusion), self.residual_layer)

    @property
    def residual_layer(self) -> nn.Conv2d:
        return self.conv7

    def features(self, warped: tuple[Tensor, Tensor], reference: Tensor, fusion: Fusion) -> Tensor:
        """What the last layer makes the residual of: (N, 32, H, W)."""
        first = cast(ConvPReLU, self.get_submodule("conv1"))
        x = first.join([warped[0], reference, warped[1], *_refine_inputs(fusion)])
        for number in range(1, len(self.DILATIONS) + 1):
            x = self.get_submodule(f"conv{number}")(x)
        return x

    FEATURE_RADIUS = 0
    RADIUS = sum(DILATIONS) + 1


def _refine_inputs(fusion: Fusion) -> list[Tensor]:
    flow_short, flow_long, mask_short, mask_long = fusion.alignment
    return [flow_short / FLOW_SCALE, flow_long / FLOW_SCALE, mask_short, mask_long, fusion.fused]


class SAFNet(nn.Module):
    """Three exposures of a moving scene -> linear HDR radiance.

    Exposures are (N, 6, H, W) as `safnet.radiance.exposure_input` makes them: linear RGB in the short exposure's units, then
    LDR RGB, all in [0, 1]. Results are linear radiance (N, 3, H, W) in [0, 1] in the same units, aligned to the reference.

    Exposures, weights and autocast may differ in dtype. Features have the weights' dtype, or autocast's; flows and masks are
    float32, or float64; results have the exposures' dtype.
    """

    def __init__(self, variant: Variant = "full") -> None:
        super().__init__()
        if variant not in ("full", "small"):
            raise ValueError(f"SAFNet: variant must be 'full' or 'small', got {variant!r}")
        self.variant = variant
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.refinenet = FullRefine() if variant == "full" else SmallRefine()

    def forward(
        self, short: Tensor, reference: Tensor, long: Tensor, scale_factor: float = 0.5, refine: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Returns (fused, refined): the explicit fusion Hm and the refined result Hr; with refine=False both are Hm."""
        with safnet_ops.Workspace():
            fusion = self.fuse(short, reference, long, self.estimate(short, reference, long, scale_factor))
            return fusion.fused, self.refine(short, reference, long, fusion) if refine else fusion.fused

    def estimate(self, short: Tensor, reference: Tensor, long: Tensor, scale_factor: float = 0.5) -> Alignment:
        """Flows and mask LOGITS at the network's size: sides times scale_factor, rounded up to a multiple of 16."""
        return self.estimate_levels(short, reference, long, scale_factor)[-1]

    def estimate_levels(
        self, short: Tensor, reference: Tensor, long: Tensor, scale_factor: float = 0.5
    ) -> list[Alignment]:
        """What the decoder makes of every level, coarse to fine; the last is `estimate`'s result."""
        _check_exposures(short, reference, long)
        size = network_size(short.shape[2], short.shape[3], scale_factor)
        return self._decode([_resize(exposure, size) for exposure in (short, reference, long)])

    def refine_alignment(self, short: Tensor, reference: Tensor, long: Tensor, alignment: Alignment) -> Alignment:
        """One more level: the alignment at twice the size of `alignment`, which the exposures (N, 6, H, W) must have.

        Encoder and decoder are shared by all levels, so that finer ones can be added to the four of `estimate`.
        """
        _check_exposures(short, reference, long)
        height, width = alignment.flow_short.shape[2:]
        if tuple(short.shape[2:]) != (2 * height, 2 * width):
            raise ValueError(
                f"SAFNet: exposures must be twice the alignment's {height} x {width} high and wide, "
                f"got {tuple(short.shape)}"
            )
        finest = self.encoder.get_submodule("pyramid1")
        features = [finest(exposure) for exposure in (short, reference, long)]
        return self.decoder(*features, _with_dtype(alignment, geometry_dtype(features[0])))

    def _decode(self, exposures: list[Tensor]) -> list[Alignment]:
        pyramids = [self.encoder(exposure) for exposure in exposures]
        coarsest = pyramids[0][-1]
        n, _, height, width = coarsest.shape
        dtype = geometry_dtype(coarsest)
        alignment = Alignment(
            *(coarsest.new_zeros(n, channels, height, width, dtype=dtype) for channels in (2, 2, 1, 1))
        )
        levels = []
        for level in reversed(range(LEVELS)):
            alignment = self.decoder(*(pyramid[level] for pyramid in pyramids), alignment)
            levels.append(alignment)
        return levels

    def fuse(self, short: Tensor, reference: Tensor, long: Tensor, alignment: Alignment) -> Fusion:
        """The explicit fusion from `estimate`'s alignment, and that alignment resized to the full size."""
        images = short[:, 0:3], reference[:, 0:3], long[:, 0:3]
        low = _with_dtype(alignment, geometry_dtype(short))
        fused, *aligned = safnet_ops.upsample_fuse(*images, *low, reference[:, 3:6])
        return Fusion(fused, Alignment(*aligned))

    def refine(self, short: Tensor, reference: Tensor, long: Tensor, fusion: Fusion) -> Tensor:
        """The refined result from the explicit fusion."""
        warped = self.warp_features(short, long, fusion.alignment)
        refined = fusion.fused + self.refinenet(warped, reference, fusion)
        return refined.clamp(0, 1).to(fusion.fused.dtype)

    def warp_features(self, short: Tensor, long: Tensor, alignment: Alignment) -> tuple[Tensor, Tensor]:
        """The refine module's features of the outer exposures, aligned to the reference."""
        of_short, of_long = self.refinenet.short_features(short), self.refinenet.long_features(long)
        flow_short, flow_long, _, _ = _with_dtype(alignment, geometry_dtype(of_short))
        return safnet_ops.backward_warp(of_short, flow_short), safnet_ops.backward_warp(of_long, flow_long)


def _with_dtype(alignment: Alignment, dtype: torch.dtype) -> Alignment:
    return Alignment(*(part.to(dtype) for part in alignment))


def network_size(height: int, width: int, scale_factor: float) -> tuple[int, int]:
    """Sides at which flow and mask are estimated."""
    if not scale_factor > 0:
        raise ValueError(f"SAFNet: scale_factor must be positive, got {scale_factor}")
    return _round_up(height, scale_factor), _round_up(width, scale_factor)


def _round_up(side: int, scale_factor: float) -> int:
    numerator, denominator = float(scale_factor).as_integer_ratio()
    if denominator <= SIMPLE_FRACTION:
        # Of integers alone, which stays a formula of the side where a program for any size is traced, and can be saved with it;
        # of positive ones, as ONNX's division truncates.
        divisor = denominator * SIZE_MULTIPLE
        steps = (side * numerator + divisor - 1) // divisor
    else:
        steps = math.ceil(side * scale_factor / SIZE_MULTIPLE)
    return torch.sym_max(1, steps) * SIZE_MULTIPLE


def _resize(exposure: Tensor, size: tuple[int, int]) -> Tensor:
    # Traced, the comparison would make a program for this size alone.
    if not torch.compiler.is_compiling() and exposure.shape[2:] == size:
        return exposure
    return F.interpolate(exposure, size, mode="bilinear", align_corners=False)


def _check_exposures(short: Tensor, reference: Tensor, long: Tensor) -> None:
    expected = reference.shape
    for name, exposure in (("reference", reference), ("short", short), ("long", long)):
        if exposure.dim() != 4 or exposure.shape[1] != 6 or exposure.shape != expected:
            raise ValueError(
                f"SAFNet: {name} must be (N, 6, H, W), the same for all exposures, got {tuple(exposure.shape)} "
                f"beside a reference of {tuple(expected)}"
            )
        if 0 in exposure.shape[2:]:
            raise ValueError(f"SAFNet: {name} must not be empty, got {tuple(exposure.shape)}")
