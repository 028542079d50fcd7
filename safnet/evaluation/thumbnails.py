"""Small pictures of a scene and its results as data URIs, for a report in one file."""

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from safnet.data.datasets import Sample
from safnet.fuse import Result
from safnet.images import BytePicture, FloatPicture
from safnet.pictures import display_curve, draw_flow_wheel, flow_picture, flow_reach, mask_picture
from safnet.radiance import tone_map

SMALL = 0.4  # width of inputs, flows and masks relative to the large pictures
WEBP_QUALITY = 80
ERROR_WHITE = 0.1  # tone-mapped error that is drawn brightest
# Black, purple, red, orange, pale yellow: brightness grows evenly, so that it reads in grey too.
ERROR_COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float32)


def scene_pictures(sample: Sample, width: int) -> dict[str, str]:
    """Inputs "short", "reference", "long", of a series its ends and its middle, and the tone-mapped "truth", at most `width`
    pixels wide."""
    truth = _picture(sample.truth)
    pictures = {"truth": data_uri(display_curve(truth, "mu-law")(truth), width)}
    for name, number in (("short", 0), ("reference", sample.reference), ("long", -1)):
        pictures[name] = data_uri(_bytes(_picture(sample.frames[number])), _small(width))
    return pictures


def result_pictures(radiance: Tensor, truth: Tensor, result: Result | None, width: int) -> dict[str, str]:
    """The tone-mapped "result" and "error", and of a fusion its flows and masks, at most `width` pixels wide.

    Args:
        radiance, truth: (3, H, W); both are shown under the truth's tone map.
    """
    curve = display_curve(_picture(truth), "mu-law")
    pictures = {
        "result": data_uri(curve(_picture(radiance)), width),
        "error": data_uri(error_picture(radiance, truth), width),
    }
    if result is not None and result.fusion is not None:
        flow_short, flow_long, mask_short, mask_long = (
            part[0].float().cpu().numpy() for part in result.fusion.alignment
        )
        reach = flow_reach([flow_short, flow_long])
        for name, flow in (("flow_short", flow_short), ("flow_long", flow_long)):
            picture = flow_picture(flow, reach)
            draw_flow_wheel(picture)
            pictures[name] = data_uri(picture, _small(width))
        for name, mask in (("mask_short", mask_short), ("mask_long", mask_long)):
            pictures[name] = data_uri(mask_picture(mask[0]), _small(width))
        pictures["flow_reach"] = f"{reach:.3g}"
    return pictures


def error_picture(radiance: Tensor, truth: Tensor) -> BytePicture:
    """Largest difference of the channels after the mu-law tone map, as colour (H, W, 3); 0.1 and more is brightest."""
    error = (tone_map(radiance.clamp(min=0)) - tone_map(truth.clamp(min=0))).abs().amax(0)
    level = (error / ERROR_WHITE).nan_to_num(1.0).clamp(0, 1).numpy()
    steps = np.linspace(0, 1, len(ERROR_COLOURS))
    channels = [np.interp(level, steps, ERROR_COLOURS[:, channel]) for channel in range(3)]
    return np.round(np.stack(channels, 2)).astype(np.uint8)


def data_uri(picture: BytePicture, width: int) -> str:
    """A picture (H, W, 3), reduced to `width` pixels if it is wider, as a WebP data URI."""
    image = Image.fromarray(picture)
    if image.width > width:
        image = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", quality=WEBP_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _small(width: int) -> int:
    return max(1, round(width * SMALL))


def _picture(planes: Tensor) -> FloatPicture:
    return np.ascontiguousarray(planes.permute(1, 2, 0).float().cpu().numpy())


def _bytes(values: npt.NDArray[np.float32]) -> BytePicture:
    return np.round(values.clip(0, 1) * 255).astype(np.uint8)
