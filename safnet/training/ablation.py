"""The ablations of SAFNet's paper, as weights that are held at values under which a part has no effect.

A model trained without a part is thus an ordinary SAFNet: every command that takes weights evaluates it, and what is
left of it has as many channels as ever.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safnet.model import FEATURES, LEVELS, SAFNet
from safnet.training.settings import PARTS as PARTS

FULL_TRUST = 20.0  # a logit whose sigmoid is 1 in float32


class Held(NamedTuple):
    """Entries of a parameter, along one axis, that keep a value."""

    parameter: str
    axis: int
    entries: slice
    value: float


def held_weights(model: SAFNet, without: Iterable[str]) -> list[Held]:
    """What is to be held so that a model works without the given PARTS.

    mask: both outer exposures are trusted everywhere; flow: nothing is aligned; fused: the refine module does not see the
    explicit fusion, to which its residual is still added; refine: the result is the explicit fusion.
    """
    flows, masks = slice(0, 4), slice(4, 6)  # of the decoder's output, and after its features of its input
    mask_inputs = slice(3 * FEATURES + 4, 3 * FEATURES + 6)
    first, last = ("conv1.0.0", "conv3") if model.variant == "full" else ("conv1.0", "conv7")
    parts = {
        # The masks' logits add up over the levels; that they then are no longer 0 must not disturb the decoder.
        "mask": [
            Held("decoder.conv6.weight", 1, masks, 0.0),
            Held("decoder.conv6.bias", 0, masks, FULL_TRUST / LEVELS),
            Held("decoder.conv1.0.weight", 1, mask_inputs, 0.0),
        ],
        "flow": [Held("decoder.conv6.weight", 1, flows, 0.0), Held("decoder.conv6.bias", 0, flows, 0.0)],
        "fused": [Held(f"refinenet.{first}.weight", 1, slice(-3, None), 0.0)],
        "refine": [Held(f"refinenet.{last}.{name}", 0, slice(None), 0.0) for name in ("weight", "bias")],
    }
    return [held for part in without for held in parts[part]]


def ablate(model: SAFNet, without: Iterable[str]) -> None:
    """Set the weights that leave parts out, and keep training off them: their gradients become 0.

    Weight decay must not act on biases.
    """
    without = tuple(without)
    masks: dict[str, Tensor] = {}
    for name, axis, entries, value in held_weights(model, without):
        parameter = model.get_parameter(name)
        selection = (slice(None),) * axis + (entries,)
        with torch.no_grad():
            parameter[selection] = value
            masks.setdefault(name, torch.ones_like(parameter))[selection] = 0
    for name, mask in masks.items():
        _mask_gradient(model.get_parameter(name), mask)
    if "refine" in without:
        model.refinenet.requires_grad_(False)


def _mask_gradient(parameter: nn.Parameter, mask: Tensor) -> None:
    parameter.register_hook(lambda gradient: gradient * mask.to(gradient.device))
