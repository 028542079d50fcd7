"""Backward operators on the CPU, asked for every subset of their gradients."""

import torch

import safnet_ops  # noqa: F401  # registers the operators
from tests.support import subsets


def test_every_subset_of_gradients(poisoned):
    def call(operator, *arguments):
        return getattr(torch.ops.safnet_ops, operator)(*arguments)

    for what, backward, exist in subsets.backwards(call):
        subsets.check(what, backward, exist, range(1 << len(exist)))
