"""backward_warp: sample an image at pixel + flow."""

from functools import partial
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from safnet_ops import reference
from safnet_ops.autocast import is_autocast, promote, register_autocast
from safnet_ops.autograd import Forward, Operation, differentiate, kernel
from safnet_ops.backends import choose, define
from safnet_ops.checks import (
    check_shape,
    check_tensor,
    empty_gradient,
    empty_image,
    in_layout,
    is_channels_last,
    unify_geometry,
)
from safnet_ops.operators import is_needed

GEOMETRY = range(1, 2)  # the flow's place among the arguments
PADDINGS = ("border", "zeros")


@overload
def backward_warp(
    image: Tensor,
    flow: Tensor,
    *,
    padding: str = ...,
    return_valid: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def backward_warp(
    image: Tensor, flow: Tensor, *, padding: str = ..., return_valid: Literal[True], backend: str | None = ...
) -> tuple[Tensor, Tensor]: ...


def backward_warp(
    image: Tensor,
    flow: Tensor,
    *,
    padding: str = "border",
    return_valid: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sample `image` bilinearly at every pixel's own position plus `flow`, clamped to the border.

    out[n, c, y, x] = image[n, c] at (x + flow[n, 0, y, x], y + flow[n, 1, y, x]): what grid_sample with
    padding_mode="border", align_corners=True gives for an absolute grid, without that grid's rounding error. Coordinates and
    sums are float32 (float64 for float64 images). Infinite or huge flow gives the border; the gradient of a flow component is
    zero where it points out of the picture. Where a flow component is NaN, so is the result, as a constant: neither image nor
    flow receives a gradient from that pixel, and a loss may mask it out. Under autocast, float64 and others become float64.

    The kernels are of flows as large as the image, clamped to the border. With padding="zeros" the image gets a frame of zeros,
    and where sizes differ the smaller is extended: copies that such calls take beside the kernel.

    Args:
        image: (N, C, H, W), float32, float64, float16 or bfloat16, any strides.
        flow: (N, 2, h, w), x then y, in pixels of the image; the image's dtype or float32 (float64 for float64 images). Of
            image and flow, one may have a batch of 1 for all of the other.
        padding: "border", or "zeros" for pixels of zero around the image, into which it fades over one pixel.
        return_valid: return (result, valid) with valid (N, 1, h, w) of bool: whether a position lies in the picture, from the
            centre of its first to that of its last pixel in both directions.
        backend: "reference", "cpp", "cuda" or "triton" instead of the one that the device suggests.

    Returns:
        (N, C, h, w) of the image's dtype, channels_last if the image is.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape, value or device than stated.
        RuntimeError: the backend asked for is not available.
    """
    if is_autocast(image):
        image, flow = promote((image, flow), GEOMETRY)
    check_tensor("backward_warp", "image", image)
    check_tensor("backward_warp", "flow", flow)
    if padding not in PADDINGS:
        raise ValueError(f"backward_warp: padding must be 'border' or 'zeros', got {padding!r}")
    image, flow = _with_one_batch(image, flow)
    (flow,) = unify_geometry("backward_warp", image, {"flow": flow})
    backend = choose("backward_warp", image.device, backend)
    warp = reference.backward_warp if backend == "reference" else kernel(backend, "backward_warp")
    same = flow.shape[2:] == image.shape[2:]
    out = warp(image, flow) if padding == "border" and same else _warp_extended(warp, image, flow, padding)
    out = in_layout(out, image) if backend == "reference" else out
    return (out, _is_inside(image, flow)) if return_valid else out


def _with_one_batch(image: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    n, *_ = image.shape
    if flow.shape[1] != 2 or (flow.shape[0] != n and 1 not in (flow.shape[0], n)):
        expected = (n, 2, *flow.shape[2:])
        check_shape("backward_warp", "flow", flow, "(N, 2, h, w) or (1, 2, h, w)", expected)
    if flow.shape[0] == n:
        return image, flow
    return (image.expand(flow.shape[0], -1, -1, -1), flow) if n == 1 else (image, flow.expand(n, -1, -1, -1))


def _warp_extended(warp: Operation, image: Tensor, flow: Tensor, padding: str) -> Tensor:
    """By a kernel that clamps to the border and wants a flow of the image's size.

    A frame of zeros is the border that positions outside are clamped to; a border repeated is the border.
    """
    (height, width), (out_height, out_width) = image.shape[2:], flow.shape[2:]
    if height == 0 or width == 0:
        if out_height and out_width:
            raise ValueError(f"backward_warp: image must have pixels to sample, got {tuple(image.shape)}")
        return image.new_empty(*image.shape[:2], out_height, out_width)
    frame = 1 if padding == "zeros" else 0
    right, below = max(out_width - width, 0), max(out_height - height, 0)
    layout = torch.channels_last if is_channels_last(image) else torch.contiguous_format
    if frame:
        image = F.pad(image, [1, 1 + right, 1, 1 + below])
    elif right or below:
        image = F.pad(image, [0, right, 0, below], mode="replicate")
    image = image.contiguous(memory_format=layout)
    height, width = image.shape[2:]
    flow = F.pad(flow, [frame, width - out_width - frame, frame, height - out_height - frame])
    out = warp(image, flow)[:, :, frame : frame + out_height, frame : frame + out_width]
    return out.contiguous(memory_format=layout)


def _is_inside(image: Tensor, flow: Tensor) -> Tensor:
    """Whether positions lie in the picture: (N, 1, h, w); those of NaN do not."""
    kind = reference.compute_type(image)
    x, y = flow.detach().to(kind).split(1, 1)
    x = x + torch.arange(flow.shape[3], device=flow.device, dtype=kind)
    y = y + torch.arange(flow.shape[2], device=flow.device, dtype=kind)[:, None]
    return (x >= 0) & (x <= image.shape[3] - 1) & (y >= 0) & (y <= image.shape[2] - 1)


def _fake_forward(image: Tensor, flow: Tensor) -> Tensor:
    return empty_image(image)


def _fake_backward(grad: Tensor, image: Tensor, flow: Tensor, needs: int, deterministic: bool) -> tuple[Tensor, Tensor]:
    return empty_gradient(image, is_needed(needs, 0)), empty_gradient(flow, is_needed(needs, 1))


define("backward_warp", _fake_forward)
define("backward_warp_backward", _fake_backward)
differentiate("backward_warp", Forward, reference.backward_warp)
register_autocast("backward_warp", partial(promote, geometry=GEOMETRY))
