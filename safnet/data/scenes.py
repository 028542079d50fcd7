"""Synthetic bracketed scenes with known truth, made from HDR panoramas.

A scene is three wide views of one panorama, each turned a little (camera shake), with textured cut-outs that move
between the frames. Frames are exposed, clipped, noised, encoded and quantised like a camera's. What is true is known
exactly: the reference frame's radiance, the flow from it to the other two, and where it leads to the same surface.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import OpenImageIO as oiio
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor

from safnet.choices import PanoramaSplit
from safnet.files import written_whole
from safnet.radiance import GAMMA

VALIDATION_EVERY = 7  # every seventh panorama by name is held out
PANORAMA_EXTENSIONS = (".hdr", ".exr")
SMALLEST_SIDE = 32  # pixels
BRIGHTEST = 50.0  # panoramas are cut at this multiple of their 99th percentile: a sun pixel would ring when resampled
LONGEST_MOTION = 130.0  # pixels
TILE = 512  # side of the noise tile that gives surfaces detail finer than the panorama's pixels


class SceneError(ValueError):
    """A panorama folder or a setting from which no scene can be made."""


@dataclass(frozen=True)
class SceneSettings:
    """Ranges that every scene draws its own values from.

    Attributes:
        height, width: frame size in pixels.
        ev_step: stops between neighbouring exposures.
        ev_error: largest deviation in stops of the short and long frame's true exposure from the nominal one.
        response_spread: the camera's gamma is 2.2 +- this, and its S-curve at most this strong.
        motion: pixels that objects move between reference and each other frame.
        shake: pixels that the camera's turning moves the background.
        clipped: part of the reference frame's pixels that has a clipped channel.
        noise: scale on the noise, 0 for none; 1 spans clean to high ISO.
        eight_bit: part of the scenes whose frames are quantised to 8 bits before they are stored in 16.
    """

    height: int = 320
    width: int = 320
    ev_step: tuple[float, float] = (1.0, 3.0)
    ev_error: float = 0.15
    response_spread: float = 0.2
    motion: tuple[float, float] = (0.0, LONGEST_MOTION)
    shake: tuple[float, float] = (0.0, 40.0)
    clipped: tuple[float, float] = (0.0, 0.35)
    noise: float = 1.0
    eight_bit: float = 0.3

    def exact(self) -> "SceneSettings":
        """The same ranges for a camera that keeps the protocol: exact EVs, gamma 2.2, 16 bits, steps of 2 or 3."""
        return replace(self, ev_step=(2.0, 3.0), ev_error=0.0, response_spread=0.0, noise=0.3, eight_bit=0.0)


class Panorama(NamedTuple):
    """An equirectangular panorama: its log radiance (3, H, W + 2 * WRAP), the sides wrapped around."""

    name: str
    log_radiance: Tensor


class Scene(NamedTuple):
    """Frames short, reference, long with everything that is true about them.

    frames: (3, 3, H, W) LDR in [0, 1), multiples of 2^-16; frame, then RGB.
    evs: nominal exposure values in stops, ascending.
    truth: (3, H, W) radiance of the reference frame in the short exposure's units, clipped to [0, 1].
    flow: (2, 2, H, W) pixels, x then y, from the reference to the short and to the long frame.
    visible: (2, H, W) whether the flow leads into the frame, to the same surface.
    """

    frames: Tensor
    evs: tuple[float, float, float]
    truth: Tensor
    flow: Tensor
    visible: Tensor


FOLDERS: dict[PanoramaSplit, str] = {"train": "Training", "all": "Training", "validation": "Test"}  # as in Kalantari17
FRAME_NAMES = ("1_short.tif", "2_medium.tif", "3_long.tif")  # sorted by name is sorted by exposure
WRAP = 4  # columns repeated at either side of a panorama and rows and columns of a tile, for bicubic sampling


# ---- panoramas -------------------------------------------------------------------------------------------------------


def find_panoramas(folder: Path, split: PanoramaSplit = "all") -> list[Path]:
    """The panorama files of a folder by name, those of one split. Raises SceneError when there are none."""
    if not folder.is_dir():
        raise SceneError(f"panorama folder {folder} does not exist")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PANORAMA_EXTENSIONS)
    if not files:
        raise SceneError(f"panorama folder {folder} holds no {' or '.join(PANORAMA_EXTENSIONS)} file")
    held_out = files[::VALIDATION_EVERY]
    chosen = {"all": files, "validation": held_out, "train": [file for file in files if file not in held_out]}[split]
    if not chosen:
        raise SceneError(f"panorama folder {folder} holds too few panoramas for a {split} split, got {len(files)}")
    return chosen


def load_panorama(path: Path) -> Panorama:
    """Read a panorama (.hdr or .exr); negatives count as 0. Raises SceneError for a file that is none."""
    source = oiio.ImageInput.open(str(path))
    if source is None:
        raise SceneError(f"panorama {path} cannot be read: {oiio.geterror()}")
    pixels = source.read_image(0, 0, 0, 3, "float") if source.spec().nchannels >= 3 else None
    error = source.geterror() or "it must have three channels"
    source.close()
    if pixels is None:
        raise SceneError(f"panorama {path} cannot be read: {error}")
    if pixels.shape[1] != 2 * pixels.shape[0]:
        raise SceneError(f"panorama {path} must be twice as wide as high, got {pixels.shape[1]}x{pixels.shape[0]}")
    radiance = (
        torch.from_numpy(pixels).permute(2, 0, 1).nan_to_num(0.0, posinf=torch.finfo(torch.float32).max).clamp(min=0)
    )
    bright = float(np.quantile(radiance.amax(0).numpy(), 0.99))
    if not bright > 0:
        raise SceneError(f"panorama {path} is black")
    radiance = (radiance / bright).clamp(max=BRIGHTEST)
    # Interpolating logarithms keeps radiance positive and edges of bright lights free from dark rings.
    wrapped = F.pad((radiance + 1e-5).log()[None], (WRAP, WRAP, 0, 0), mode="circular")[0]
    return Panorama(path.stem, wrapped.contiguous())


def _look(panorama: Panorama, rays: Tensor) -> Tensor:
    """Log radiance (3, h, w) seen along rays (h, w, 3): x right, y down, z ahead."""
    height, width = panorama.log_radiance.shape[1], panorama.log_radiance.shape[2] - 2 * WRAP
    x, y, z = rays.unbind(-1)
    column = (torch.atan2(x, z) / (2 * math.pi) + 0.5) * width - 0.5
    row = (torch.atan2(y, torch.hypot(x, z)) / math.pi + 0.5) * height - 0.5
    return _sample(panorama.log_radiance, column % width + WRAP, row)


def _sample(picture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sample (C, H, W) bicubically at pixel coordinates x, y (h, w), clamped to the border."""
    size = picture.new_tensor([picture.shape[2] - 1, picture.shape[1] - 1])
    grid = torch.stack([x, y], -1) * (2 / size) - 1
    return F.grid_sample(picture[None], grid[None], mode="bicubic", padding_mode="border", align_corners=True)[0]


# ---- surfaces --------------------------------------------------------------------------------------------------------


class Detail(NamedTuple):
    """Fractal noise fixed to a surface: a relative change of radiance, tiled."""

    tile: Tensor
    amplitude: float

    def at(self, position: Tensor) -> Tensor:
        x, y = position.unbind(-1)
        return self.amplitude * _sample(self.tile, x % TILE + WRAP, y % TILE + WRAP)


def _draw_detail(random: Generator) -> Detail:
    frequency = np.hypot(*np.meshgrid(np.fft.rfftfreq(TILE), np.fft.fftfreq(TILE)))
    frequency[0, 0] = 1
    # Band-limited below the pixel grid's Nyquist frequency, so that bicubic sampling moves it without aliasing.
    spectrum = frequency ** -random.uniform(0.7, 1.5) * np.exp(-((frequency / 0.3) ** 4))
    spectrum[0, 0] = 0
    noise = np.fft.irfft2(np.fft.rfft2(random.standard_normal((TILE, TILE))) * spectrum)
    tile = torch.from_numpy((noise / noise.std()).astype(np.float32))
    wrapped = F.pad(tile[None, None], (WRAP,) * 4, mode="circular")[0]
    return Detail(wrapped, _log_uniform(random, 0.01, 0.2))


@dataclass(frozen=True)
class Background:
    """The panorama seen by a turning camera. Homographies lead from a frame's pixels to the reference frame's."""

    panorama: Panorama
    gaze: Tensor  # (3, 3), from the reference frame's pixels to rays
    homographies: Tensor  # (3, 3, 3): frame, then matrix
    detail: Detail

    def render(self, frame: int, height: int, width: int) -> Tensor:
        position = _project(self.homographies[frame], _pixels(height, width))
        return _look(self.panorama, _homogeneous(position) @ self.gaze.T) + self.detail.at(position)

    def move(self, frame: int, position: Tensor) -> Tensor:
        return _project(torch.linalg.inv(self.homographies[frame]), position)


@dataclass(frozen=True)
class Piece:
    """A rigid cut-out: capsules (a line and a radius) with a wavy soft edge, textured from a panorama."""

    capsules: Tensor  # (n, 5): start x, y, end x, y, radius; in the piece's own pixels
    waves: Tensor  # (k, 4): frequency x, y, phase, amplitude of the edge's waves
    softness: float  # pixels over which the edge fades
    affine: Tensor  # (3, 2, 3): frame; from the piece's pixels to the frame's
    panorama: Panorama
    gaze: Tensor  # (3, 3), from the piece's pixels to rays of the texture
    brightness: Tensor  # (3, 1, 1) log gain on the texture
    detail: Detail

    def box(self, frame: int, height: int, width: int) -> tuple[slice, slice]:
        """Rows and columns of the frame that the piece can touch."""
        reach = self.capsules[:, 4:5] + self.waves[:, 3].abs().sum() + self.softness
        ends = torch.cat([self.capsules[:, 0:2], self.capsules[:, 2:4]])
        scale = torch.linalg.matrix_norm(self.affine[frame, :, :2], 2)
        centres = ends @ self.affine[frame, :, :2].T + self.affine[frame, :, 2]
        margin = scale * reach.max() + 1
        low, high = (centres.amin(0) - margin).floor(), (centres.amax(0) + margin).ceil()
        x0, y0 = (int(v) for v in low.clamp(min=0))
        return slice(y0, max(y0, min(height, int(high[1])))), slice(x0, max(x0, min(width, int(high[0]))))

    def render(self, frame: int, position: Tensor) -> tuple[Tensor, Tensor]:
        """Log radiance (3, h, w) and opacity (h, w) at a frame's pixels (h, w, 2)."""
        matrix = torch.linalg.inv(self.affine[frame, :, :2])
        own = (position - self.affine[frame, :, 2]) @ matrix.T
        log_radiance = _look(self.panorama, _homogeneous(own) @ self.gaze.T) + self.brightness + self.detail.at(own)
        return log_radiance, (0.5 - self._distance(own) / self.softness).clamp(0, 1)

    def _distance(self, own: Tensor) -> Tensor:
        start, line, radius = self.capsules[:, 0:2], self.capsules[:, 2:4] - self.capsules[:, 0:2], self.capsules[:, 4]
        offset = own[..., None, :] - start
        along = ((offset * line).sum(-1) / line.square().sum(-1).clamp(min=1e-6)).clamp(0, 1)
        distance = ((offset - along[..., None] * line).norm(dim=-1) - radius).amin(-1)
        fx, fy, phase, amplitude = self.waves.unbind(1)
        return distance + (amplitude * torch.sin(own[..., 0:1] * fx + own[..., 1:2] * fy + phase)).sum(-1)

    def move(self, frame: int, position: Tensor) -> Tensor:
        """Where the surface seen in the reference frame at `position` (..., 2) is in another frame."""
        own = (position - self.affine[1, :, 2]) @ torch.linalg.inv(self.affine[1, :, :2]).T
        return own @ self.affine[frame, :, :2].T + self.affine[frame, :, 2]


def _pixels(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32), indexing="ij"
    )
    return torch.stack([x, y], -1)


def _homogeneous(position: Tensor) -> Tensor:
    return F.pad(position, (0, 1), value=1.0)


def _project(homography: Tensor, position: Tensor) -> Tensor:
    x = _homogeneous(position) @ homography.T
    return x[..., 0:2] / x[..., 2:3]


# ---- drawing a scene -------------------------------------------------------------------------------------------------


def synthesize_scene(
    panoramas: Sequence[Panorama], settings: SceneSettings, seed: int, index: int = 0, *, reverse: bool = False
) -> Scene:
    """Draw one scene; the same seed, index, settings and panoramas give the same scene.

    With `reverse` the exposures are taken in reversed order: the long one first, while everything moves the same way.
    """
    random = np.random.default_rng([seed, index])
    background = _draw_background(random, panoramas, settings)
    pieces = _draw_objects(random, panoramas, settings, background)
    moments = (2, 1, 0) if reverse else (0, 1, 2)  # of the short, reference and long exposure
    views = [_render(background, pieces, moment, settings) for moment in moments]
    cast = _draw_cast(random)
    radiance = [view * cast for view, _ in views]
    frames, evs, truth = _expose(random, radiance, settings)
    flow, visible = _true_flow(background, pieces, [labels for _, labels in views], moments)
    return Scene(frames, evs, truth, flow, visible)


def _draw_background(random: Generator, panoramas: Sequence[Panorama], settings: SceneSettings) -> Background:
    height, width = settings.height, settings.width
    panorama = panoramas[int(random.integers(len(panoramas)))]
    # Wide views: a panorama of 1024 pixels has only 256 for 90 degrees.
    focal = max(height, width) / 2 / math.tan(math.radians(random.uniform(75, 115)) / 2)
    camera = _camera(focal, (width - 1) / 2, (height - 1) / 2)
    turn = _rotation(random.uniform(-180, 180), random.normal(0, 14), random.normal(0, 5))
    gaze = turn @ torch.linalg.inv(camera)
    shake = (
        0.0 if random.random() < 0.2 else _log_uniform(random, max(settings.shake[0], 0.5), max(settings.shake[1], 0.5))
    )
    shake = min(shake, settings.shake[1])
    homographies = [torch.eye(3)] * 3
    if shake > 0:
        for frame in (0, 2):
            direction, size = random.uniform(0, 2 * math.pi), math.degrees(shake * random.uniform(0.3, 1) / focal)
            tilt = _rotation(
                size * math.cos(direction), size * math.sin(direction), random.normal(0, 0.05) * min(shake, 20)
            )
            homographies[frame] = camera @ tilt @ torch.linalg.inv(camera)
    return Background(panorama, gaze, torch.stack(homographies), _draw_detail(random))


def _draw_objects(
    random: Generator, panoramas: Sequence[Panorama], settings: SceneSettings, background: Background
) -> list[Piece]:
    pieces: list[Piece] = []
    ambient = background.render(1, settings.height, settings.width)[:, ::4, ::4].flatten(1).median(1).values
    for _ in range(random.choice([0, 1, 2, 3, 4], p=[0.1, 0.25, 0.3, 0.2, 0.15])):
        pieces += _draw_object(random, panoramas, settings, background, ambient)
    return pieces


def _draw_object(
    random: Generator, panoramas: Sequence[Panorama], settings: SceneSettings, background: Background, ambient: Tensor
) -> list[Piece]:
    """One moving object: a walking figure of six pieces, or a single blob or pole."""
    panorama = panoramas[int(random.integers(len(panoramas)))]
    gaze = _rotation(random.uniform(-180, 180), random.normal(0, 20), random.uniform(-180, 180))
    gaze = gaze @ torch.linalg.inv(_camera(random.uniform(90, 250), 0, 0))
    size = _log_uniform(random, 0.1, 0.5) * max(settings.height, settings.width)
    softness = _log_uniform(random, 0.7, 3.0)
    detail = _draw_detail(random)
    # Lit like the scene around it, give or take a stop, so that objects are neither all lamps nor all silhouettes.
    texture = _look(panorama, _homogeneous(_pixels(32, 32) / 16 * size - size) @ gaze.T).flatten(1).median(1).values
    gain = ambient.mean() - texture.mean() + random.normal(0, 1.0) + 0.5 * (ambient - ambient.mean())
    brightness = (gain - 0.5 * (texture - texture.mean())).view(3, 1, 1)
    placements = _draw_motion(random, settings, background, size)

    def piece(capsules: list[list[float]], waviness: float, swings: Sequence[float] = (0, 0, 0)) -> Piece:
        radius = min(capsule[4] for capsule in capsules)
        waves = np.stack([_draw_wave(random, radius, waviness) for _ in range(3)])
        hinge = torch.tensor(capsules[0][0:2])
        affine = torch.stack([_swing(place, swing, hinge) for place, swing in zip(placements, swings, strict=True)])
        shape = torch.tensor(capsules), torch.from_numpy(waves.astype(np.float32))
        return Piece(*shape, softness, affine, panorama, gaze, brightness, detail)

    kind = random.choice(["figure", "blob", "pole"], p=[0.45, 0.4, 0.15])
    if kind == "blob":
        spread = random.uniform(-0.5, 0.5, (random.integers(1, 4), 4)) * size
        return [piece([[*map(float, ends), float(random.uniform(0.2, 0.5) * size)] for ends in spread], 0.35)]
    if kind == "pole":
        return [piece([[0.0, -size, 0.0, size, float(random.uniform(0.02, 0.08) * size)]], 0.3)]
    return [piece(capsules, 0.08, swings) for capsules, swings in zip(_figure(size), _draw_gait(random), strict=True)]


def _figure(size: float) -> list[list[list[float]]]:
    """Capsules of a walking figure, 2 * size high: far arm, far leg, near leg, torso, head, near arm."""
    shapes = [
        [0.0, -0.52, 0.0, 0.08, 0.085],
        [0.0, 0.0, 0.0, 0.88, 0.11],
        [0.0, 0.0, 0.0, 0.88, 0.11],
        [0.0, -0.45, 0.0, 0.05, 0.2],
        [0.0, -0.86, 0.0, -0.82, 0.13],
        [0.0, -0.52, 0.0, 0.08, 0.085],
    ]
    return [[[value * size for value in shape]] for shape in shapes]


def _draw_gait(random: Generator) -> list[list[float]]:
    """Swing angles in degrees of a figure's six pieces in the three frames."""
    stride = random.uniform(0, 30) * np.sin(
        random.uniform(0, 2 * math.pi) + random.uniform(-1.5, 1.5) * np.arange(-1, 2)
    )
    lean = random.uniform(-8, 8)
    return [list(map(float, lean + part * stride)) for part in (0.9, -1, 1, 0, 0.1, -0.9)]


def _draw_wave(random: Generator, radius: float, waviness: float) -> np.ndarray:
    direction, turns = random.uniform(0, 2 * math.pi), random.uniform(0.6, 3) / radius
    amplitude = waviness * radius * random.uniform(0, 0.4)
    return np.array(
        [turns * math.cos(direction), turns * math.sin(direction), random.uniform(0, 2 * math.pi), amplitude]
    )


def _draw_motion(random: Generator, settings: SceneSettings, background: Background, size: float) -> list[Tensor]:
    """An object's placements (2, 3) in the frames: it moves on, more or less steadily, turns and grows a little."""
    low, high = settings.motion
    distance = (
        0.0 if low == 0 and random.random() < 0.1 else min(_log_uniform(random, max(low, 1.5), max(high, 1.5)), high)
    )
    heading = random.uniform(0, 2 * math.pi)
    step = distance * np.array([math.cos(heading), math.sin(heading) * 0.6])
    if random.random() < 0.75:
        steps = [-random.uniform(0.4, 1) * step, np.zeros(2), step]
    else:
        other = random.uniform(0, 2 * math.pi)
        steps = [random.uniform(0, 1) * distance * np.array([math.cos(other), math.sin(other)]), np.zeros(2), step]
    place = random.uniform(0.05, 0.95, 2) * [settings.width, settings.height]
    angle, lively = random.normal(0, 12), min(distance, 40) / 40
    centre = torch.tensor(place, dtype=torch.float32)
    placements = []
    for frame in range(3):
        turn = math.radians(angle + (random.normal(0, 5) * lively if frame != 1 else 0))
        growth = 1 + (random.normal(0, 0.04) * lively if frame != 1 else 0)
        linear = growth * torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        moved = background.move(frame, centre) + torch.from_numpy(steps[frame]).float()
        placements.append(torch.cat([linear, moved[:, None]], 1))
    return placements


def _swing(placement: Tensor, degrees: float, hinge: Tensor) -> Tensor:
    """`placement` (2, 3) after a turn of the piece's own pixels around its hinge."""
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = placement[:, :2] @ turn
    return torch.cat([linear, (placement[:, 2] + placement[:, :2] @ (hinge - turn @ hinge))[:, None]], 1)


def _draw_cast(random: Generator) -> Tensor:
    """Colour of the light (3, 1, 1): white in most scenes, tinted in some, nearly of one colour in a few."""
    strength = random.choice([0.0, 0.4, 1.5], p=[0.65, 0.27, 0.08])
    return torch.from_numpy(np.exp(random.normal(0, strength, 3)).astype(np.float32)).view(3, 1, 1)


def _camera(focal: float, x: float, y: float) -> Tensor:
    return torch.tensor([[focal, 0, x], [0, focal, y], [0, 0, 1]], dtype=torch.float32)


def _rotation(yaw: float, pitch: float, roll: float) -> Tensor:
    """Rotation by angles in degrees, yaw around y after pitch around x after roll around z."""
    (cy, sy), (cp, sp), (cr, sr) = ((math.cos(math.radians(a)), math.sin(math.radians(a))) for a in (yaw, pitch, roll))
    around_y = torch.tensor([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    around_x = torch.tensor([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    around_z = torch.tensor([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return around_y @ around_x @ around_z


def _log_uniform(random: Generator, low: float, high: float) -> float:
    return math.exp(random.uniform(math.log(low), math.log(high)))


# ---- rendering -------------------------------------------------------------------------------------------------------


def _render(
    background: Background, pieces: Sequence[Piece], frame: int, settings: SceneSettings
) -> tuple[Tensor, Tensor]:
    """Radiance (3, H, W) of a frame, and which surface each pixel shows (H, W): 0 the background, k the k-th piece."""
    height, width = settings.height, settings.width
    radiance = background.render(frame, height, width).exp()
    labels = torch.zeros(height, width, dtype=torch.long)
    position = _pixels(height, width)
    for label, piece in enumerate(pieces, 1):
        rows, columns = piece.box(frame, height, width)
        if rows.start >= rows.stop or columns.start >= columns.stop:
            continue
        log_radiance, opacity = piece.render(frame, position[rows, columns])
        radiance[:, rows, columns] += opacity * (log_radiance.exp() - radiance[:, rows, columns])
        labels[rows, columns][opacity > 0.5] = label
    return radiance, labels


def _true_flow(
    background: Background, pieces: Sequence[Piece], labels: Sequence[Tensor], moments: Sequence[int]
) -> tuple[Tensor, Tensor]:
    height, width = labels[1].shape
    position = _pixels(height, width)
    flows, visible = [], []
    for frame in (0, 2):
        target = background.move(moments[frame], position)
        for label, piece in enumerate(pieces, 1):
            shown = labels[1] == label
            target[shown] = piece.move(moments[frame], position[shown])
        x, y = target.unbind(-1)
        inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        seen = labels[frame][y.round().clamp(0, height - 1).long(), x.round().clamp(0, width - 1).long()]
        flows.append((target - position).permute(2, 0, 1))
        visible.append(inside & (seen == labels[1]))
    return torch.stack(flows), torch.stack(visible)


def _expose(
    random: Generator, radiance: Sequence[Tensor], settings: SceneSettings
) -> tuple[Tensor, tuple[float, float, float], Tensor]:
    """Photograph the three radiances: LDR frames (3, 3, H, W), nominal EVs, and the truth (3, H, W)."""
    evs = _draw_evs(random, settings)
    level = _clipping_level(random, radiance[1], settings)
    gamma, curve = GAMMA, 0.0
    if random.random() < 0.5:
        gamma += random.uniform(-1, 1) * settings.response_spread
        curve = random.uniform(0, 1) * settings.response_spread
    errors = random.uniform(-1, 1, 3) * settings.ev_error * (random.random() < 0.5)
    # The truth keeps the reference's exposure: errors belong to the other two frames.
    errors[1] = 0.0
    shot = settings.noise * _log_uniform(random, 1e-6, 1e-3)
    read = settings.noise * _log_uniform(random, 3e-5, 2e-3)
    levels = 255 if random.random() < settings.eight_bit else 0
    frames = []
    for frame in range(3):
        light = radiance[frame] / level * 2.0 ** (evs[frame] - evs[1] + errors[frame])
        noise = torch.from_numpy(random.standard_normal(light.shape, dtype=np.float32))
        light = (light + noise * (shot * light.clamp(max=1) + read**2).sqrt()).clamp(0, 1)
        ldr = _respond(light, gamma, curve)
        if levels:
            ldr = (ldr * levels).round() / levels
        frames.append((ldr * 2**16).floor().clamp(max=2**16 - 1) / 2**16)
    # What the protocol's gamma makes of the reference frame, had it neither noise nor a clipping point: with another
    # camera curve this is the scene as that camera's picture shows it, which is what a fusion should keep.
    truth = _respond(radiance[1] / level, gamma, curve).pow(GAMMA) / 2.0 ** (evs[1] - evs[0])
    return torch.stack(frames), evs, truth.clamp(0, 1)


def _respond(light: Tensor, gamma: float, curve: float) -> Tensor:
    """A camera's response: x^(1/gamma), bent by an S-curve; 0 -> 0, 1 -> 1, straight on above 1."""
    ldr = light.pow(1 / gamma)
    inside = ldr.clamp(max=1)
    bent = inside + curve * (3 * inside.square() - 2 * inside**3 - inside)
    return bent + (1 - curve) * (ldr - inside)


def _draw_evs(random: Generator, settings: SceneSettings) -> tuple[float, float, float]:
    low, high = settings.ev_step
    whole = [step for step in (2.0, 3.0) if low <= step <= high]
    if (whole and random.random() < 0.7) or (low == 2.0 and high == 3.0):
        first = second = float(random.choice(whole))
    else:
        first, second = random.uniform(low, high, 2).round(2)
    return 0.0, float(first), float(first + second)


def _clipping_level(random: Generator, radiance: Tensor, settings: SceneSettings) -> float:
    """Radiance at which the reference frame clips, from a drawn part of clipped pixels."""
    low, high = settings.clipped
    part, headroom = random.uniform(low, high), 1.0
    if low == 0 and random.random() < 0.2:
        part, headroom = 0.001, 2 ** random.uniform(0, 1.5)
    return max(float(np.quantile(radiance.amax(0).numpy(), 1 - part)), 1e-6) * headroom


# ---- files -----------------------------------------------------------------------------------------------------------


def synthesize(
    panorama_folder: Path,
    out: Path,
    count: int,
    settings: SceneSettings | None = None,
    *,
    split: PanoramaSplit = "all",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write `count` scenes in Kalantari17's layout and return their folder, OUT/Training or, for validation, OUT/Test.

    Scenes that are there already are kept, so that a stopped run goes on where it was.

    Args:
        panorama_folder: equirectangular HDR panoramas, .hdr or .exr.
        out: made where it is missing.
        settings: what scenes draw their values from; SceneSettings() by default.
        split: which panoramas: every seventh by name is for validation.
        seed: at least 0; the same one gives the same scenes.
        progress: called with the scenes done and in all.

    Raises:
        SceneError: a setting or the panorama folder is not usable.
    """
    settings = settings or SceneSettings()
    check_settings(settings, count)
    if out.exists() and not out.is_dir():
        raise SceneError(f"output {out} is not a folder")
    panoramas = [load_panorama(path) for path in find_panoramas(panorama_folder, split)]
    folder = out / FOLDERS[split]
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        progress(index, count)
        target = folder / f"{index:04d}"
        if not target.exists():
            scene = synthesize_scene(panoramas, settings, seed, index)
            try:
                write_scene(scene, target)
            except OSError:
                if not target.exists():  # else another process was faster
                    raise
    progress(count, count)
    return folder


def check_settings(settings: SceneSettings, count: int) -> None:
    """Raise SceneError for values of which no scene can be made."""
    if count < 1:
        raise SceneError(f"--count must be at least 1, got {count}")
    if min(settings.height, settings.width) < SMALLEST_SIDE:
        raise SceneError(f"--size must be at least {SMALLEST_SIDE}, got {settings.width}x{settings.height}")
    ranges = {"--ev-step": (settings.ev_step, 0.1, 8.0), "--clipped": (settings.clipped, 0.0, 0.95)}
    ranges["--motion"] = (settings.motion, 0.0, math.inf)
    for name, ((low, high), least, most) in ranges.items():
        if not least <= low <= high <= most:
            raise SceneError(f"{name} must be two ascending numbers from {least:g} to {most:g}, got {low:g} {high:g}")


def write_scene(scene: Scene, folder: Path) -> None:
    """Write a scene whole or not at all: three 16-bit TIFF, exposure.txt, HDRImg.hdr, and the true flow.

    flow.npy is (2, 2, H, W) float16 in pixels, visible.npy (2, H, W) bool; see Scene.
    """
    with written_whole(folder) as partial:
        partial.mkdir(parents=True)
        for name, frame in zip(FRAME_NAMES, scene.frames, strict=True):
            _write_pixels(partial / name, (frame * 2**16).permute(1, 2, 0).numpy().astype(np.uint16), "uint16")
        _write_pixels(partial / "HDRImg.hdr", _round_for_rgbe(scene.truth.permute(1, 2, 0).numpy()), "float")
        (partial / "exposure.txt").write_text("".join(f"{ev:g}\n" for ev in scene.evs))
        np.save(partial / "flow.npy", scene.flow.numpy().astype(np.float16))
        np.save(partial / "visible.npy", scene.visible.numpy())


def _round_for_rgbe(radiance: np.ndarray) -> np.ndarray:
    """Half a step more: .hdr files cut 8-bit mantissas off, which alone would darken every truth."""
    brightest = radiance.max(2, keepdims=True)
    step = np.ldexp(np.float32(1), np.frexp(brightest)[1] - 8)
    return np.where(brightest > 1e-30, radiance + step / 2, 0).astype(np.float32)


def _write_pixels(path: Path, pixels: np.ndarray, kind: str) -> None:
    spec = oiio.ImageSpec(pixels.shape[1], pixels.shape[0], pixels.shape[2], kind)
    if path.suffix == ".tif":
        spec.attribute("compression", "zip")
        spec.attribute("DateTime", "1970:01:01 00:00:00")  # else the same scene would not give the same file
    target = oiio.ImageOutput.create(path.name)
    if target is None:
        raise OSError(f"{path} cannot be written: {oiio.geterror()}")
    if not (target.open(str(path), spec) and target.write_image(np.ascontiguousarray(pixels)) and target.close()):
        raise OSError(f"{path} cannot be written: {target.geterror()}")
