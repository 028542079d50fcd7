"""Pictures for eyes: tone-mapped previews, flows as colours, masks, and one sheet with all steps of a fusion."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from safnet.choices import Look, ToneMap
from safnet.fuse import Result
from safnet.images import BytePicture, FloatPicture
from safnet.looks import LUMINANCE, MIDDLE_GREY, WHITE_PERCENTILE, photograph
from safnet.radiance import GAMMA, Frame, ldr_values, tone_map

Array = npt.NDArray[np.float32]

ROWS = 64  # that are shown at a time
SAMPLES = 1 << 20  # statistics look at about this many pixels
FLOW_PERCENTILE = 99.0
FLOW_FLOOR = 1.0  # pixels; a still scene shows white, not amplified noise

CELL_SIDE = 640
GAP, TITLE_HEIGHT, FONT_SIZE = 12, 30, 18
BACKGROUND, INK = (24, 24, 26), (235, 235, 235)
INSPECTION_FILES = tuple(
    f"{name}.png" for name in ("flow_short", "flow_long", "mask_short", "mask_long", "fused", "refined", "sheet")
)


def display_curve(
    radiance: FloatPicture, kind: ToneMap, *, exposure: float = 1.0, look: Look = "natural", brightness: float = 0.0
) -> Callable[[FloatPicture], BytePicture]:
    """A tone map for linear Rec.709 like `radiance` (H, W, 3), as a function from such pictures of its size to 8-bit sRGB.

    "photo" is a photograph of the look that is asked for (`safnet.looks`). "reinhard" is Reinhard et al. 2002, equation 4,
    fitted to the picture, with gamma 2.2. "mu-law" is that of the HDR literature (mu = 5000) as it stands, so that pictures
    compare with published ones; it lifts shadows a lot.

    Args:
        exposure: of "photo": that of the reference in terms of the short exposure, 2^(difference of their EVs).
        look: of "photo".
        brightness: in stops.
    """
    gain = np.float32(2**brightness)
    if kind == "photo":
        show = photograph(radiance, exposure * float(gain), look)
        return lambda picture: _by_rows(picture, lambda rows, first: _bytes(_srgb(show(rows, first))))
    if kind == "mu-law":
        return lambda picture: _by_rows(
            picture, lambda rows, first: _bytes(tone_map(torch.from_numpy((rows * gain).clip(0, 1))).numpy())
        )
    sample = radiance.reshape(-1, 3)[:: max(1, radiance.shape[0] * radiance.shape[1] // SAMPLES)]
    luminance = (sample @ LUMINANCE).clip(0)
    key = MIDDLE_GREY / float(np.exp(np.log(luminance + 1e-6).mean()))
    white = max(key * float(np.percentile(luminance, WHITE_PERCENTILE)), 1e-6)
    key *= float(gain)

    def reinhard(rows: FloatPicture, first: int) -> BytePicture:
        rows = np.maximum(rows, 0)
        scaled = key * (rows @ LUMINANCE)[:, :, None]
        scale = key * (1 + scaled / np.float32(white**2)) / (1 + scaled)
        return _bytes((rows * scale).clip(0, 1) ** np.float32(1 / GAMMA))

    return lambda picture: _by_rows(picture, reinhard)


def _by_rows(picture: FloatPicture, show: Callable[[FloatPicture, int], BytePicture]) -> BytePicture:
    """Show a picture some rows at a time, which keeps what is between small."""
    shown = np.empty(picture.shape, np.uint8)
    for first in range(0, len(picture), ROWS):
        shown[first : first + ROWS] = show(picture[first : first + ROWS], first)
    return shown


def _srgb(light: Array) -> Array:
    """Light in [0, 1] by sRGB's curve."""
    bent = np.float32(1.055) * light ** np.float32(1 / 2.4) - np.float32(0.055)
    return np.where(light <= 0.0031308, np.float32(12.92) * light, bent)


def flow_reach(flows: Sequence[Array]) -> float:
    """Length in pixels, at least 1, that is drawn in full colour: the 99th percentile over the flows (2, H, W)."""
    lengths = [np.hypot(*flow.reshape(2, -1)[:, :: max(1, flow[0].size // SAMPLES)]) for flow in flows]
    return max(FLOW_FLOOR, float(np.percentile(np.concatenate(lengths), FLOW_PERCENTILE)))


def flow_picture(flow: Array, reach: float) -> BytePicture:
    """Flow (2, H, W; x then y, in pixels) as (H, W, 3): hue is direction, saturation length, full at `reach` pixels."""
    length = np.hypot(flow[0], flow[1])
    hue = np.arctan2(flow[1], flow[0]) * np.float32(3 / np.pi)  # -3 .. 3, red to the right
    saturation = (length / np.float32(reach)).clip(0, 1)
    pure = [np.abs((hue + offset) % 6 - 3) - 1 for offset in (0, 4, 2)]
    return np.stack([_bytes(1 - saturation * (1 - channel.clip(0, 1))) for channel in pure], 2)


def draw_flow_wheel(picture: BytePicture) -> None:
    """Draw the legend of `flow_picture` into a corner: a disc of all directions' colours, full at the rim."""
    size = max(1, min(picture.shape[:2]) // 5)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    flow = np.stack(np.meshgrid(axis, axis))
    length = np.hypot(*flow)
    corner = picture[:size, -size:]
    corner[length <= 1] = flow_picture(flow, 0.9)[length <= 1]
    corner[(length > 0.94) & (length <= 1)] = BACKGROUND


def mask_picture(mask: Array) -> BytePicture:
    """Mask (H, W) in [0, 1] as grey (H, W, 3): white where the outer exposure is trusted."""
    return np.repeat(_bytes(mask)[:, :, None], 3, 2)


def inspection(
    frames: Sequence[Frame],
    labels: Sequence[str],
    result: Result,
    radiance: FloatPicture,
    curve: Callable[[FloatPicture], BytePicture],
) -> dict[str, BytePicture]:
    """The pictures of INSPECTION_FILES by file name, from the exposures (1, 3, H, W) as read, their names, the result, and its
    radiance (H, W, 3) as it is to be shown."""
    assert result.fusion is not None
    flow_short, flow_long, mask_short, mask_long = (part[0].cpu().numpy() for part in result.fusion.alignment)
    reach = flow_reach([flow_short, flow_long])
    pictures = {
        "flow_short.png": flow_picture(flow_short, reach),
        "flow_long.png": flow_picture(flow_long, reach),
        "mask_short.png": mask_picture(mask_short[0]),
        "mask_long.png": mask_picture(mask_long[0]),
        "fused.png": curve(to_picture(result.fusion.fused)),
        "refined.png": curve(radiance),
    }
    short, reference, long = (_thumbnail(_bytes(to_picture(ldr_values(frame)))) for frame in frames)
    steps = {name: _thumbnail(picture) for name, picture in pictures.items()}
    for name in ("flow_short.png", "flow_long.png"):
        draw_flow_wheel(steps[name])
    flow_title = f"flow to {{}}, full colour at {reach:.3g} px"
    pictures["sheet.png"] = sheet(
        [
            [(f"short: {labels[0]}", short), (f"reference: {labels[1]}", reference), (f"long: {labels[2]}", long)],
            [
                (flow_title.format("short"), steps["flow_short.png"]),
                ("explicit fusion", steps["fused.png"]),
                (flow_title.format("long"), steps["flow_long.png"]),
            ],
            [
                ("mask of short (white: used)", steps["mask_short.png"]),
                ("refined result", steps["refined.png"]),
                ("mask of long (white: used)", steps["mask_long.png"]),
            ],
        ]
    )
    return pictures


def sheet(rows: Sequence[Sequence[tuple[str, BytePicture]]]) -> BytePicture:
    """Titled pictures of one size in rows, as one picture."""
    height, width = rows[0][0][1].shape[:2]
    cell_width, cell_height = width + GAP, TITLE_HEIGHT + height + GAP
    page = Image.new("RGB", (len(rows[0]) * cell_width + GAP, len(rows) * cell_height + GAP), BACKGROUND)
    font = ImageFont.load_default(FONT_SIZE)
    for row, cells in enumerate(rows):
        for column, (title, picture) in enumerate(cells):
            cell = Image.new("RGB", (width, TITLE_HEIGHT + height), BACKGROUND)
            ImageDraw.Draw(cell).text((0, 0), title, INK, font)
            cell.paste(Image.fromarray(picture), (0, TITLE_HEIGHT))
            page.paste(cell, (GAP + column * cell_width, GAP + row * cell_height))
    return np.array(page)


def to_picture(tensor: torch.Tensor) -> FloatPicture:
    """(1, 3, H, W) on any device -> contiguous (H, W, 3)."""
    return np.ascontiguousarray(tensor[0].permute(1, 2, 0).float().cpu().numpy())


def _thumbnail(picture: BytePicture) -> BytePicture:
    """Scaled so that its longer side is CELL_SIDE pixels."""
    factor = CELL_SIDE / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor))
    return np.array(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS, reducing_gap=3))


def _bytes(values: Array) -> BytePicture:
    return (values * np.float32(255) + np.float32(0.5)).clip(0, 255).astype(np.uint8)
