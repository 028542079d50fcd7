"""How a photograph looks that is made of radiance: the brightness of the reference exposure, an S-shaped curve as cameras have,
and, where the light spans more than that shows, a compression of large differences that leaves small ones.

The compression is that of Durand and Dorsey 2002, base and detail, with the guided filter (He et al. 2013) for the base, whose
coefficients are found on a small picture and interpolated (He and Sun 2015).
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from safnet.choices import Look
from safnet.images import FloatPicture

LUMINANCE = np.array([0.2126, 0.7152, 0.0722], np.float32)  # ITU-R BT.709
MIDDLE_GREY = 0.18  # of the light at which the reference clips
SHOWN_GREY = 0.22  # of display light, as which cameras show it
DARKEST = 2.0**-14  # of that light; below, nothing is told apart
BASE_PIXELS = 250_000  # of the picture whose large differences are looked for
BASE_RADIUS = 0.04  # of its longer side
BASE_EDGE = 0.5  # variance in stops squared, beyond which a difference is an edge and stays sharp
BASE_RANGE = 1.0, 99.5  # percentiles of the base that count
BRIGHT_STOPS, DARK_STOPS = 1.1, 3.2  # from middle grey, which the base may reach after compression
BEND = 1.5  # of the compression's change at middle grey, per stop
SAMPLE_ROWS = 512  # in which the brightest light is looked for
WHITE_PERCENTILE = 99.9  # a few specks brighter than that may clip


class _Character(NamedTuple):
    """The curve's power, and the least that compression leaves of large differences."""

    power: float
    least: float


LOOKS: dict[Look, _Character] = {
    "natural": _Character(1.75, 0.5),
    "neutral": _Character(1.5, 1.0),
    "flat": _Character(1.2, 0.4),
}

Shown = Callable[[FloatPicture, int], FloatPicture]


def photograph(radiance: FloatPicture, exposure: float, look: Look) -> Shown:
    """A function from radiance to display light in [0, 1], for a picture (H, W, 3) and others of its size.

    Args:
        radiance: linear Rec.709.
        exposure: by which radiance is multiplied so that 1 is where the reference exposure clips.
        look: "natural": as a camera would show it, if it saw so much. "neutral": the curve alone, the same for every picture.
            "flat": little contrast, to be worked on.

    The function takes some rows of a picture, and the number of the first.
    """
    character = LOOKS[look]
    compress = _compression(radiance, exposure, character.least)
    step = max(1, len(radiance) // SAMPLE_ROWS)
    sampled = [(row, radiance[row : row + 1]) for row in range(0, len(radiance), step)]
    brightest = np.concatenate([(row * compress(row, first)).max(2) for first, row in sampled]) * exposure
    film = _film(character.power, max(1.0, float(np.percentile(brightest, WHITE_PERCENTILE))))

    def show(rows: FloatPicture, first: int) -> FloatPicture:
        light = np.maximum(rows, 0) * (np.float32(exposure) * compress(rows, first))
        most, least = light.max(2, keepdims=True), light.min(2, keepdims=True)
        top, bottom = film(most), film(least)
        # The curve takes the largest and the smallest colour; that between stays where it is between them, which is its hue.
        share = (light - least) / np.maximum(most - least, np.float32(1e-9))
        return (bottom + (top - bottom) * share).clip(0, 1)

    return show


def _film(power: float, white: float) -> Callable[[FloatPicture], FloatPicture]:
    """A curve x^n / (x^n + h), as film and eyes respond, scaled to show white as 1 and middle grey as cameras do."""
    grey, most = MIDDLE_GREY**power, white**power
    half = np.float32(grey * most * (1 - SHOWN_GREY) / (SHOWN_GREY * most - grey))
    scale = np.float32((most + half) / most)

    def film(light: FloatPicture) -> FloatPicture:
        raised = light ** np.float32(power)
        return scale * raised / (raised + half)

    return film


def _compression(radiance: FloatPicture, exposure: float, least: float) -> Shown:
    """A function from rows of radiance, and the number of the first, to the factor (h, W, 1) that compresses them."""
    if least >= 1:
        return lambda rows, first: np.ones((*rows.shape[:2], 1), np.float32)
    height, width = radiance.shape[:2]
    factor = min(1.0, (BASE_PIXELS / (height * width)) ** 0.5)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    reduced = np.asarray(cv2.resize(radiance, size, interpolation=cv2.INTER_AREA), np.float32)
    small = _stops(reduced.reshape(size[1], size[0], 3), exposure)
    radius = max(2, round(BASE_RADIUS * max(size)))
    mean = _box(small, radius)
    variance = _box(small * small, radius) - mean * mean
    slope = variance / (variance + np.float32(BASE_EDGE))
    slope, offset = _box(slope, radius), _box(mean - slope * mean, radius)
    low, high = (float(stops) for stops in np.percentile(slope * small + offset, BASE_RANGE))
    bright = min(1.0, max(least, BRIGHT_STOPS / max(high, 1e-3)))
    dark = min(1.0, max(least, DARK_STOPS / max(-low, 1e-3)))

    def compress(rows: FloatPicture, first: int) -> FloatPicture:
        stops = _stops(rows, exposure)
        here = [_enlarged(values, stops.shape, first, (height, width)) for values in (slope, offset)]
        base = here[0] * stops + here[1]
        # dark * base below middle grey, bright * base above, with a soft bend between.
        bend = (np.logaddexp(0, BEND * base) - np.log(2)) / BEND
        return np.exp2((dark - 1) * base + (bright - dark) * bend).astype(np.float32)[:, :, None]

    return compress


def _stops(radiance: FloatPicture, exposure: float) -> FloatPicture:
    """Luminance in stops from middle grey."""
    luminance = np.maximum((radiance @ LUMINANCE) * np.float32(exposure), np.float32(DARKEST))
    return np.log2(luminance / np.float32(MIDDLE_GREY))


def _box(values: FloatPicture, radius: int) -> FloatPicture:
    side = 2 * radius + 1
    return np.asarray(cv2.boxFilter(values, -1, (side, side), borderType=cv2.BORDER_REFLECT), np.float32)


def _enlarged(values: FloatPicture, part: tuple[int, ...], first: int, size: tuple[int, int]) -> FloatPicture:
    """Some rows of what bilinear interpolation to a size gives."""
    down, across = values.shape[0] / size[0], values.shape[1] / size[1]
    place = np.array([[across, 0, 0.5 * across - 0.5], [0, down, (first + 0.5) * down - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(
        cv2.warpAffine(values, place, (part[1], part[0]), flags=flags, borderMode=cv2.BORDER_REPLICATE), np.float32
    )
