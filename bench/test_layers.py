"""The account of layers: hooks leave the fast path as it is, and every convolution is counted."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.layers import Layer, account, table
from bench.measure import Peaks
from safnet.model import SAFNet


def exposures() -> list[torch.Tensor]:
    return [torch.rand(1, 6, 96, 128) for _ in range(3)]


def test_every_convolution_is_ours_and_counted() -> None:
    model, frames = SAFNet("small").eval(), exposures()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*frames)
    layers = account(model, frames, 2)
    assert {key[1] for key in layers if "conv" in key[1]} == {"group_conv_shuffle"}
    assert ("refinenet.conv2", "group_conv_shuffle", "1x32x96x128") in layers
    # PyTorch counts modules; the decoder's upsampling is a convolution here, of which five in nine weights are zero.
    assert 1 <= sum(layer.flops for layer in layers.values()) / counter.get_total_flops() < 1.02
    assert all(layer.calls and len(layer.seconds) == 2 for layer in layers.values() if layer.flops)


def test_a_table_has_shares_of_bounds() -> None:
    layer = Layer(calls=2, seconds=[0.5, 0.25], flops=4e9, multiply_flops=1e9, moved=10**8)
    text = table("small", {("decoder.conv1", "group_conv_shuffle", "1x2x3x4"): layer}, Peaks(float32=1e10, copy=1e10))
    assert "| decoder.conv1 | group_conv_shuffle | 1x2x3x4 | 2 | 250.00 | 100.0% | 16 | 100.00 | 40% |" in text
