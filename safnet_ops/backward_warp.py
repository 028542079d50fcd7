"""backward_warp: sample an image at pixel + flow."""

from functools import partial

from torch import Tensor

from safnet_ops import reference
from safnet_ops.autocast import is_autocast, promote, register_autocast
from safnet_ops.autograd import Forward, differentiate, kernel
from safnet_ops.backends import choose, define
from safnet_ops.checks import check_shape, check_tensor, empty_gradient, empty_image, unify_geometry
from safnet_ops.operators import is_needed

GEOMETRY = range(1, 2)  # the flow's place among the arguments


def backward_warp(image: Tensor, flow: Tensor, *, backend: str | None = None) -> Tensor:
    """Sample `image` bilinearly at every pixel's own position plus `flow`, clamped to the border.

    out[n, c, y, x] = image[n, c] at (x + flow[n, 0, y, x], y + flow[n, 1, y, x]): what grid_sample with
    padding_mode="border", align_corners=True gives for an absolute grid, without that grid's rounding error. Coordinates and
    sums are float32 (float64 for float64 images). Infinite or huge flow gives the border; the gradient of a flow component is
    zero where it points out of the picture. Where a flow component is NaN, so is the result, as a constant: neither image nor
    flow receives a gradient from that pixel, and a loss may mask it out. Under autocast, float64 and others become float64.

    Args:
        image: (N, C, H, W), float32, float64, float16 or bfloat16, any strides.
        flow: (N, 2, H, W), x then y, in pixels; the image's dtype or float32 (float64 for float64 images).
        backend: "reference", "cpp", "cuda" or "triton" instead of the one that the device suggests.

    Returns:
        (N, C, H, W) of the image's dtype, channels_last if the image is.

    Raises:
        TypeError, ValueError: an argument has another type, dtype, shape or device than stated.
        RuntimeError: the backend asked for is not available.
    """
    if is_autocast(image):
        image, flow = promote((image, flow), GEOMETRY)
    check_tensor("backward_warp", "image", image)
    check_tensor("backward_warp", "flow", flow)
    n, _, height, width = image.shape
    check_shape("backward_warp", "flow", flow, "(N, 2, H, W)", (n, 2, height, width))
    (flow,) = unify_geometry("backward_warp", image, {"flow": flow})
    backend = choose("backward_warp", image.device, backend)
    if backend == "reference":
        return reference.backward_warp(image, flow)
    return kernel(backend, "backward_warp")(image, flow)


def _fake_forward(image: Tensor, flow: Tensor) -> Tensor:
    return empty_image(image)


def _fake_backward(grad: Tensor, image: Tensor, flow: Tensor, needs: int, deterministic: bool) -> tuple[Tensor, Tensor]:
    return empty_gradient(image, is_needed(needs, 0)), empty_gradient(flow, is_needed(needs, 1))


define("backward_warp(Tensor image, Tensor flow) -> Tensor", _fake_forward)
define(
    "backward_warp_backward(Tensor grad, Tensor image, Tensor flow, int needs, bool deterministic) -> (Tensor, Tensor)",
    _fake_backward,
)
differentiate("backward_warp", Forward, reference.backward_warp)
register_autocast("backward_warp", partial(promote, geometry=GEOMETRY))
