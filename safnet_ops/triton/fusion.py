"""What fused_fuse and upsample_fuse share on the device: the mask-reweighted average (SAFNet, equations 3 to 5)."""

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-9)  # keeps the fusion finite where explicit weights sum to zero


@triton.jit
def triangle_weights(z):
    """Base weights of short, reference and long exposure from the reference's LDR value."""
    return tl.maximum(z - 0.5, 0.0) * 2, 1 - tl.abs(2 * z - 1), tl.maximum(0.5 - z, 0.0) * 2


@triton.jit
def reweigh(base_short, base_reference, base_long, mask_short, mask_long):
    """(weights of short, reference and long, their sum): what a mask takes from an exposure goes to the reference."""
    weight_short, weight_long = base_short * mask_short, base_long * mask_long
    weight_reference = base_reference + base_short * (1 - mask_short) + base_long * (1 - mask_long)
    return weight_short, weight_reference, weight_long, weight_short + weight_reference + weight_long + EPSILON


@triton.jit
def fuse(warped_short, reference, warped_long, base_short, base_reference, base_long, mask_short, mask_long):
    weight_s, weight_r, weight_l, total = reweigh(base_short, base_reference, base_long, mask_short, mask_long)
    return (weight_s * warped_short + weight_r * reference + weight_l * warped_long) / total
