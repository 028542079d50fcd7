"""Every subset of an operator's gradients: what is asked for has the values it has when all are asked for."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

Backward = Callable[[int, bool], Sequence[Tensor]]


def _fusion(dtype: torch.dtype, explicit_weights: bool) -> tuple[list[Tensor | None], list[bool]]:
    """The arguments of fused_fuse's backward before the flags, and which gradients exist."""
    image, flow, mask = (1, 2, 3, 5), (1, 2, 3, 5), (1, 1, 3, 5)
    fixed: list[Tensor | None] = [torch.rand(image, dtype=dtype) for _ in range(4)]
    fixed += [torch.randn(flow, dtype=dtype) for _ in range(2)] + [torch.rand(mask, dtype=dtype) for _ in range(2)]
    weights: list[Tensor | None] = [torch.rand(image, dtype=dtype) for _ in range(3)]
    ldr = torch.rand(image, dtype=dtype)
    fixed += [None, *weights] if explicit_weights else [ldr, None, None, None]
    return fixed, [value is not None for value in fixed[1:]]


def backwards(
    call: Callable[..., Sequence[Tensor]], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Backward, list[bool]]]:
    """(what it is, backward(needs, deterministic), which gradients exist) for every operator whose backward takes `needs`.

    `call(operator, *arguments)` runs a registered operator.
    """
    for channels_last in (False, True):
        image = torch.rand(1, 8, 3, 5, dtype=dtype)
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        warp = (torch.rand_like(image), image, torch.randn(1, 2, 3, 5, dtype=dtype))
        yield (
            f"backward_warp, channels_last {channels_last}",
            partial(call, "backward_warp_backward", *warp),
            [True, True],
        )
    for explicit_weights in (False, True):
        fusion, exist = _fusion(dtype, explicit_weights)
        yield (
            f"fused_fuse, explicit weights {explicit_weights}",
            partial(call, "fused_fuse_backward", *fusion, True),
            exist,
        )
    for groups, prelu in ((1, None), (2, torch.rand(4, dtype=dtype))):
        grad, preactivation = torch.rand(1, 4, 3, 5, dtype=dtype), torch.randn(1, 4, 3, 5, dtype=dtype)
        inputs = torch.rand(1, 2 * groups, 3, 5, dtype=dtype), torch.rand(4, 2, 3, 3, dtype=dtype)
        convolution = (grad, preactivation, *inputs, prelu, groups, 1, 1)
        yield (
            f"group_conv_shuffle, {groups} groups",
            partial(call, "group_conv_shuffle_backward", *convolution),
            [True, True, True, prelu is not None, True],
        )


def check(what: str, backward: Backward, exist: Sequence[bool], wanted: Sequence[int]) -> None:
    """Compare each subset in `wanted` with all gradients; what is not asked for has no elements."""
    for deterministic in (False, True):
        everything = backward((1 << len(exist)) - 1, deterministic)
        for needs in wanted:
            found = backward(needs, deterministic)
            for position, (one, whole) in enumerate(zip(found, everything, strict=True)):
                case = f"{what}: needs {needs:#b}, deterministic {deterministic}, gradient {position}"
                if needs >> position & 1 and exist[position]:
                    exact = 0.0 if deterministic else None
                    torch.testing.assert_close(one, whole, rtol=exact, atol=exact, msg=partial("{}: {}".format, case))
                else:
                    assert one.numel() == 0, f"{case}: not asked for, but has {one.numel()} elements"
