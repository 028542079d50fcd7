"""The operators as modules, to stand in a network beside those of torch.nn.

A module's parameters are those of torch.nn's own modules inside it, under their names, so that checkpoints, optimisers, hooks,
parametrizations, pruning and adapters find what they expect. Where the modules inside are plain, one operator computes what
they stand for; where one is not, they are called one after the other: slower, but nothing that was asked for is lost.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from safnet_ops import reference
from safnet_ops.backward_warp import backward_warp
from safnet_ops.census_loss import census_loss
from safnet_ops.group_conv_shuffle import group_conv_shuffle

__all__ = ["BackwardWarp", "CensusLoss", "GroupConvShuffle", "conv_prelu_shuffle", "is_plain"]


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether to call `module` is to call a `kind` of torch.nn and nothing else.

    It is not where its class is another (subclasses, parametrizations, adapters), where hooks are registered for it or for all
    modules (pruning and the older weight_norm and spectral_norm are hooks), or where its `forward` was replaced or compiled.
    """
    return (
        type(module) is kind
        and not (
            module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
        )
        and not torch_module._has_any_global_hook()
        and module._compiled_call_impl is None
        and "forward" not in module.__dict__
    )


def _is_plain_convolution(conv: nn.Module, groups: int) -> bool:
    """Whether a module is what group_conv_shuffle computes before its activation."""
    if not is_plain(conv, nn.Conv2d):
        return False
    conv = cast(nn.Conv2d, conv)
    return (
        conv.groups == groups
        and conv.kernel_size == (3, 3)
        and conv.padding == conv.dilation
        and conv.padding_mode == "zeros"
        and conv.stride[0] == conv.stride[1]
        and conv.dilation[0] == conv.dilation[1]
    )


def conv_prelu_shuffle(
    input: Tensor,
    conv: nn.Module,
    *activation: nn.Module,
    groups: int = 1,
    residual: Tensor | None = None,
    shuffle: bool = True,
) -> Tensor:
    """channel_shuffle(activation(conv(input) + residual), groups), in one pass where the modules are plain.

    They are where `conv` is an nn.Conv2d of 3x3 weights with `groups` groups and zero padding as wide as its dilation,
    `activation` is one nn.PReLU or none, and both are plain (`is_plain`). Otherwise they are called as modules.
    """
    if (
        len(activation) <= 1
        and _is_plain_convolution(conv, groups)
        and all(is_plain(module, nn.PReLU) for module in activation)
    ):
        plain, slopes = cast(nn.Conv2d, conv), cast(Tensor, activation[0].weight) if activation else None
        stride, dilation = plain.stride[0], plain.dilation[0]
        return group_conv_shuffle(
            input,
            plain.weight,
            plain.bias,
            slopes,
            groups,
            stride=stride,
            dilation=dilation,
            residual=residual,
            shuffle=shuffle,
        )
    out = conv(input) if residual is None else conv(input) + residual
    for module in activation:
        out = module(out)
    return out if groups == 1 or not shuffle else reference.channel_shuffle(out, groups)


class GroupConvShuffle(nn.Sequential):
    """A convolution, PReLU and channel shuffle: [`group_conv_shuffle`][safnet_ops.group_conv_shuffle.group_conv_shuffle].

    Its children are an nn.Conv2d, `0`, and with `prelu=True` an nn.PReLU of a slope a channel, `1`. Either may be replaced, or
    get hooks and parametrizations: then they are called as modules. The shuffle is this module's own, by its `groups`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int = 1,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        prelu: bool = True,
        shuffle: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        padding = dilation * (kernel_size // 2)
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, device=device, dtype=dtype
        )
        super().__init__(conv, *([nn.PReLU(out_channels, device=device, dtype=dtype)] if prelu else []))
        self.groups, self.shuffle = groups, shuffle

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, *activation = self
        return conv_prelu_shuffle(input, conv, *activation, groups=self.groups, residual=residual, shuffle=self.shuffle)


class BackwardWarp(nn.Module):
    """[`backward_warp`][safnet_ops.backward_warp.backward_warp] as a module: called with an image and a flow."""

    def forward(self, image: Tensor, flow: Tensor) -> Tensor:
        return backward_warp(image, flow)


class CensusLoss(nn.Module):
    """[`census_loss`][safnet_ops.census_loss.census_loss] as a module: called with a prediction and a target."""

    def __init__(self, patch_size: int = 7) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return census_loss(prediction, target, self.patch_size)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}"
