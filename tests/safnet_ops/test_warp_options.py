"""backward_warp's options, and the recipes of docs/operators/recipes.md, against grid_sample as others call it."""

import pytest
import torch
import torch.nn.functional as F

import safnet_ops
from safnet_ops import backward_warp
from tests.support.operators import assert_close, channels_last, contiguous

SIZES = {
    "same": ((9, 11), (9, 11)),
    "smaller": ((9, 11), (5, 4)),
    "larger": ((6, 5), (9, 12)),
    "mixed": ((5, 12), (9, 7)),
}


def make(image_size, flow_size, n=2, flows=None, scale=4.0, dtype=torch.float64):
    torch.manual_seed(0)
    image = torch.rand(n, 3, *image_size, dtype=dtype)
    return image, scale * torch.randn(flows or n, 2, *flow_size, dtype=dtype)


def positions(flow):
    """Where a flow points: x and y (N, h, w)."""
    x = torch.arange(flow.shape[3], dtype=flow.dtype) + flow[:, 0]
    return x, torch.arange(flow.shape[2], dtype=flow.dtype)[:, None] + flow[:, 1]


def grid_of(x, y, height, width):
    """For align_corners=True."""
    return torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], -1)


def stock(image, flow, padding):
    n = max(len(image), len(flow))
    grid = grid_of(*positions(flow), *image.shape[2:]).expand(n, -1, -1, -1)
    return F.grid_sample(image.expand(n, -1, -1, -1), grid, padding_mode=padding, align_corners=True)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("n", "flows"), [(2, 2), (1, 3), (3, 1)])
def test_values_and_gradients(backend, padding, size, n, flows):
    inputs = [value.requires_grad_() for value in make(*SIZES[size], n, flows)]
    with safnet_ops.use_backend(backend):
        found = backward_warp(*inputs, padding=padding)
    expected = stock(*inputs, padding)
    assert_close("result", found, expected)
    grad = torch.randn_like(found)
    gradients = [torch.autograd.grad(out, inputs, grad) for out in (found, expected)]
    for value, exact in zip(*gradients, strict=True):
        assert_close("gradient", value, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("size", SIZES)
def test_types_and_layouts(dtype, layout, padding, size):
    image, flow = make(*SIZES[size], dtype=torch.float32)
    image = layout(image.to(dtype))
    found = backward_warp(image, flow, padding=padding)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last) == (layout is channels_last)
    assert_close("result", found, stock(image.double(), flow.double(), padding))


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("size", SIZES)
def test_derivatives(padding, size):
    image, flow = (value.requires_grad_() for value in make(*SIZES[size], n=1))

    def function(image, flow):
        return backward_warp(image, flow, padding=padding)

    assert torch.autograd.gradcheck(function, (image, flow), check_forward_ad=True)
    tangents = torch.randn_like(image), torch.randn_like(flow)
    found = torch.func.jvp(function, (image, flow), tangents)[1]
    step = 1e-6
    moved = [stock(image + s * tangents[0], flow + s * tangents[1], padding) for s in (step, -step)]
    assert torch.allclose(found, (moved[0] - moved[1]) / (2 * step), atol=1e-6)
    batch = torch.stack([image, 2 * image])
    assert torch.allclose(torch.func.vmap(lambda picture: function(picture, flow))(batch)[1], function(2 * image, flow))


@pytest.mark.parametrize("size", SIZES)
def test_valid(size):
    image, flow = make(*SIZES[size])
    flow[:, :, 0, 0], flow[:, :, 0, 1] = torch.nan, 0
    flow[0, 0, 1, 2], flow[0, 1, 1, 2] = -2, -1  # the first pixel, which is inside
    flow[0, 0, 1, 3] = torch.inf
    out, valid = backward_warp(image, flow, return_valid=True)
    assert torch.equal(out.nan_to_num(), backward_warp(image, flow).nan_to_num())
    x, y = positions(flow)
    height, width = image.shape[2:]
    expected = [
        [
            [0 <= px <= width - 1 and 0 <= py <= height - 1 for px, py in zip(*row, strict=True)]
            for row in zip(*pair, strict=True)
        ]
        for pair in zip(x.tolist(), y.tolist(), strict=True)
    ]
    assert valid.shape == (2, 1, *flow.shape[2:])
    assert torch.equal(valid[:, 0], torch.tensor(expected))
    assert valid[0, 0, 1, 2]
    assert not valid[0, 0, 0, 0]
    assert not valid[0, 0, 1, 3]


def test_lost_and_far_positions_of_zeros():
    image, flow = make((5, 6), (5, 6), n=1)
    image.requires_grad_()
    flow[0, 0, 0, 0], flow[0, 0, 0, 1], flow[0, 1, 0, 2] = torch.nan, torch.inf, -1e30
    out = backward_warp(image, flow, padding="zeros")
    assert out[0, :, 0, 0].isnan().all()
    assert (out[0, :, 0, 1:3] == 0).all()
    out.nansum().backward()
    assert image.grad.isfinite().all()


def test_compiles_and_exports():
    class Warp(torch.nn.Module):
        def forward(self, image, flow):
            return backward_warp(image, flow, padding="zeros", return_valid=True)

    image, flow = make(*SIZES["mixed"], dtype=torch.float32)
    expected = Warp()(image, flow)
    compiled = torch.compile(Warp(), fullgraph=True, backend="aot_eager")
    program = torch.export.export(Warp(), (image, flow)).module()
    for function in (compiled, program):
        out, valid = function(image, flow)
        assert torch.equal(out, expected[0])
        assert torch.equal(valid, expected[1])


def test_errors():
    image, flow = make((5, 6), (5, 6))
    with pytest.raises(ValueError, match="backward_warp: padding must be 'border' or 'zeros', got 'reflection'"):
        backward_warp(image, flow, padding="reflection")
    with pytest.raises(
        ValueError, match=r"flow must be \(N, 2, h, w\) or \(1, 2, h, w\) = \(2, 2, 5, 6\), got \(3, 2, 5, 6\)"
    ):
        backward_warp(image, flow[:1].expand(3, -1, -1, -1))
    with pytest.raises(ValueError, match=r"image must have pixels to sample, got \(2, 3, 0, 6\)"):
        backward_warp(image[:, :, :0], flow)


# ---- recipes: each beside the code that it takes the place of ---------------------------------------------------------


def normalised_grid(align_corners):
    torch.manual_seed(1)
    image = torch.rand(2, 3, 8, 9, dtype=torch.float64)
    return image, torch.rand(2, 5, 7, 2, dtype=torch.float64) * 2.6 - 1.3, align_corners


def pixel_grid(height, width):
    """(1, 2, h, w): every pixel's own position."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([x, y])[None].double()


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("align_corners", [True, False])
def test_grid_sample(align_corners, padding):
    image, grid, _ = normalised_grid(align_corners)
    expected = F.grid_sample(image, grid, padding_mode=padding, align_corners=align_corners)
    size = torch.tensor([image.shape[3], image.shape[2]])
    position = (grid + 1) / 2 * (size - 1) if align_corners else ((grid + 1) * size - 1) / 2
    flow = position.permute(0, 3, 1, 2) - pixel_grid(*grid.shape[1:3])
    assert_close("grid_sample", backward_warp(image, flow, padding=padding), expected)


def test_flow_with_channels_last():
    """As of mmcv's and BasicSR's flow_warp: (N, H, W, 2), zeros, align_corners=True."""
    image, flow = make((9, 11), (9, 11))
    flow = flow.permute(0, 2, 3, 1).contiguous()
    position = pixel_grid(9, 11).permute(0, 2, 3, 1) + flow
    grid = torch.stack([2 * position[..., 0] / 10 - 1, 2 * position[..., 1] / 8 - 1], 3)
    expected = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    assert_close("flow_warp", backward_warp(image, flow.permute(0, 3, 1, 2), padding="zeros"), expected)


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_remap(padding):
    """As of kornia's and OpenCV's remap: maps of absolute positions, of any size."""
    image = make((9, 11), (1, 1))[0]
    map_x, map_y = torch.rand(2, 6, 5, dtype=torch.float64) * 13 - 1, torch.rand(2, 6, 5, dtype=torch.float64) * 11 - 1
    expected = F.grid_sample(image, grid_of(map_x, map_y, 9, 11), padding_mode=padding, align_corners=True)
    flow = torch.stack([map_x, map_y], 1) - pixel_grid(6, 5)
    assert_close("remap", backward_warp(image, flow, padding=padding), expected)


def test_interpolation_of_frames():
    """As of RIFE's and IFRNet's warp: a flow in pixels, added in normalised units to linspace(-1, 1)."""
    image, flow = make((9, 11), (9, 11))
    across, down = torch.linspace(-1, 1, 11, dtype=torch.float64), torch.linspace(-1, 1, 9, dtype=torch.float64)
    own = torch.stack(torch.meshgrid(across, down, indexing="xy"))[None]
    scaled = torch.cat([flow[:, 0:1] / ((11 - 1) / 2), flow[:, 1:2] / ((9 - 1) / 2)], 1)
    grid = (own + scaled).permute(0, 2, 3, 1)
    expected = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)
    assert_close("RIFE", backward_warp(image, flow), expected)


def test_pwc_net():
    """Normalised by W - 1, sampled with align_corners=False, and masked where a warped picture of ones is below 0.9999."""
    image, flow = make((9, 11), (9, 11), scale=2.0)
    x, y = positions(flow)
    grid = grid_of(x, y, 9, 11)
    ones = torch.ones_like(image)
    mask = F.grid_sample(ones, grid, align_corners=False) >= 0.9999
    expected = F.grid_sample(image, grid, align_corners=False) * mask
    position = torch.stack([x * 11 / 10, y * 9 / 8], 1) - 0.5
    out, valid = backward_warp(image, position - pixel_grid(9, 11), padding="zeros", return_valid=True)
    assert_close("PWC-Net", out * valid, expected)


def test_lookup_with_radius():
    """As of RAFT: a window of (2r + 1)^2 correlations around each pixel's position, in one picture a pixel."""
    torch.manual_seed(0)
    correlation, centres = (
        torch.rand(12, 1, 8, 9, dtype=torch.float64),
        torch.rand(12, 2, 1, 1, dtype=torch.float64) * 8,
    )
    steps = torch.arange(-2, 3).double()
    window = torch.stack(torch.meshgrid(steps, steps, indexing="xy"))[None]
    position = centres + window
    expected = F.grid_sample(correlation, grid_of(position[:, 0], position[:, 1], 8, 9), align_corners=True)
    assert_close("lookup", backward_warp(correlation, position - pixel_grid(5, 5), padding="zeros"), expected)
