"""What host code asks of the runtime when it launches."""

import torch

import safnet_ops


def test_shared_memory_is_allowed_once_a_kernel_and_to_the_most_there_is(cuda):
    for channels in (24, 40, 24):  # two and three stages of 31 KiB
        image = torch.rand(1, channels, 6, 6, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
        weight = torch.rand(40, channels, 3, 3, dtype=torch.float16)
        safnet_ops.group_conv_shuffle(image, weight, groups=1)
    limits = cuda.shared_limits
    assert limits
    assert {size for _, size in limits} <= {64 << 10, 99 << 10, 227 << 10}  # of sm_75, sm_80 and sm_90
    assert set(limits.values()) == {1}


def test_plain_weight_gradient_of_more_groups_than_a_grid_has_layers(cuda):
    groups = 65537
    image, grad = torch.rand(1, groups, 1, 1), torch.rand(1, groups, 1, 1)
    weight = torch.rand(groups, 1, 3, 3)
    with cuda.checking_launches_only():
        found = cuda.call("group_conv_shuffle_backward", grad, grad[:0], image, weight, None, groups, 1, 1, 0b10, False)
    assert found[1].shape == weight.shape
