"""Small scenes with known truth, written in the layouts of the public data sets."""

from pathlib import Path

import numpy as np
import OpenImageIO as oiio
import torch
from PIL import Image

from safnet.data.scenes import Scene

HEIGHT, WIDTH = 64, 96
EVS = (-2.0, 0.0, 2.0)
NTIRE_GAMMA = 2.24
SCENE = 64  # side of what make_scene makes


def make_radiance(seed=0, shift=0, height=HEIGHT, width=WIDTH):
    """Smooth random texture (H, W, 3) in [0.002, 1], moved to the right by `shift` pixels."""
    random = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(width) - shift, np.arange(height))
    log = np.zeros((height, width, 3))
    for _ in range(24):
        fx, fy = random.uniform(-0.45, 0.45, 2)
        log += random.normal(0, 0.35, 3) * np.sin(fx * x + fy * y + random.uniform(0, 6.3))[..., None]
    return np.clip(0.12 * np.exp(log), 0.002, 1).astype(np.float32)


def smooth_radiance(height, width, stops, colours):
    """Smooth radiance (height, width, 3) whose stops lie in one range, and those of its colours beside them in another."""
    random = np.random.default_rng(4)
    coarse = random.uniform(*stops, (5, 6, 1)) + random.uniform(*colours, (5, 6, 3))
    channels = [
        Image.fromarray(channel.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        for channel in coarse.transpose(2, 0, 1)
    ]
    return (2.0 ** np.stack(channels, 2)).astype(np.float32)


def expose(radiance, ratio, levels=65535, gamma=2.2):
    """What a camera stores of radiance: integers from 0 to `levels`, each the floor of its share of levels + 1."""
    ldr = np.clip(radiance * ratio, 0, 1) ** (1 / gamma)
    return np.minimum(np.floor(ldr * (levels + 1)), levels).astype(np.uint16 if levels > 255 else np.uint8)


def write(path: Path, pixels):
    """Write (H, W, 3) as it is: uint8, uint16 or float."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"uint8": "uint8", "uint16": "uint16", "float32": "float"}[str(pixels.dtype)]
    target = oiio.ImageOutput.create(str(path))
    assert target is not None
    assert target.open(str(path), oiio.ImageSpec(pixels.shape[1], pixels.shape[0], 3, kind))
    assert target.write_image(np.ascontiguousarray(pixels))
    target.close()


def write_frames(paths, seed, shift=0, evs=EVS):
    """The three exposures of a scene whose outer frames are moved by -shift and +shift; returns the truth."""
    for path, ev, moved in zip(paths, evs, (-shift, 0, shift), strict=True):
        write(path, expose(make_radiance(seed, moved), 2.0 ** (ev - min(evs))))
    return make_radiance(seed)


def write_kalantari17(root: Path, names, shift=0, evs=EVS):
    """Test/NAME/{three .tif, exposure.txt, HDRImg.hdr}; returns the truths by name."""
    truths = {}
    for seed, name in enumerate(names):
        folder = root / "Test" / name
        truths[name] = write_frames([folder / f"262A{k}.tif" for k in range(3)], seed, shift, evs)
        write(folder / "HDRImg.hdr", truths[name])
        (folder / "exposure.txt").write_text("".join(f"{ev}\n" for ev in evs))
    return truths


def write_challenge123(root: Path, name, seed=0):
    """NAME_{1,2,3}, each with all three frames; those of a sample come from three folders."""
    truth = make_radiance(seed)
    for k in (1, 2, 3):
        folder = root / "Test" / f"{name}_{k}"
        # Frames that do not belong to the sample differ from those that do.
        write_frames([folder / f"ldr_img_{j}.tif" for j in (1, 2, 3)], seed + 10 * k)
        write(folder / f"ldr_img_{k}.tif", expose(truth, 2.0 ** (EVS[k - 1] - EVS[0])))
        write(folder / "hdr_img.hdr", truth if k == 2 else make_radiance(seed + 10 * k))
        (folder / "exposure.txt").write_text("".join(f"{ev}\n" for ev in (EVS if k == 2 else (0.0, 1.0, 2.0))))
    return truth


def write_tel23(root: Path, name, seed=0):
    folder = root / "Test" / name
    truth = write_frames([folder / f"input_{k}.tif" for k in (1, 2, 3)], seed)
    write(folder / "HDRImg.hdr", truth)
    (folder / "exposure.txt").write_text("0\n2\n4\n")
    return truth


def write_ntire21(root: Path, name, seed=0):
    """8-bit PNG frames, gamma 2.24; the truth as gamma-encoded 16-bit PNG in units of the middle exposure."""
    folder, truth = root / name, make_radiance(seed)
    for k, ev in enumerate(EVS):
        write(folder / f"{k}.png", expose(truth, 2.0 ** (ev - EVS[0]), 255, NTIRE_GAMMA))
    encoded = (truth * 2.0 ** (EVS[1] - EVS[0])) ** (1 / NTIRE_GAMMA)
    ratio = 65535 / encoded.max()
    write(folder / "gt.png", np.round(encoded * ratio).astype(np.uint16))
    np.save(folder / "alignratio.npy", ratio)
    np.save(folder / "exposures.npy", np.array(EVS))
    return truth


def make_scene(seed: int) -> Scene:
    """A texture that shifts by whole pixels between the frames, exposed 0, 2 and 4 EV."""
    random = np.random.default_rng(seed)
    texture = torch.from_numpy(random.uniform(0.05, 1.0, (3, SCENE // 4 + 8, SCENE // 4 + 8)).astype(np.float32))
    texture = torch.nn.functional.interpolate(texture[None], scale_factor=4, mode="bicubic")[0].clamp(0, 1)
    dx, dy = (int(v) for v in random.integers(-6, 7, 2))
    views = [texture[:, 12 - k * dy : 12 - k * dy + SCENE, 12 - k * dx : 12 - k * dx + SCENE] for k in (-1, 0, 1)]
    frames = [(view * 2**ev / 4).clamp(0, 1) ** (1 / 2.2) for view, ev in zip(views, (0, 2, 4), strict=True)]
    flow = torch.tensor([[-dx, -dy], [dx, dy]], dtype=torch.float32).view(2, 2, 1, 1).expand(2, 2, SCENE, SCENE)
    truth = views[1] / 4
    return Scene(
        torch.stack(frames).mul(65535).floor() / 65536, (0.0, 2.0, 4.0), truth, flow, torch.ones(2, SCENE, SCENE).bool()
    )


def skyline(x, y, height=320):
    """Radiance (..., 3) at pixels x, y of a plane: textured houses before a sky that is ten times as bright."""
    random = np.random.default_rng(11)
    log = np.zeros((*np.shape(x), 3))
    for scale in (0.02, 0.06, 0.15, 0.4):
        for _ in range(8):
            fx, fy = random.normal(0, scale, 2)
            log += random.normal(0, 0.16, 3) * np.sin(fx * x + fy * y + random.uniform(0, 6.3))[..., None]
    # A house every 40 pixels, each with its own height and colour, looked up by a number of its own.
    house = np.floor(np.asarray(x) / 40).astype(int)
    noise = np.random.default_rng(12).uniform(size=(997, 4))[house % 997]
    is_house = y > height * (0.25 + 0.35 * noise[..., 0])
    walls = 0.012 * (1 + 4 * noise[..., 1:]) * np.exp(log)
    windows = (np.mod(x, 10) < 4) & (np.mod(y, 14) < 6)
    walls = np.where(windows[..., None], 0.3 * walls, walls)
    sky = np.array([0.45, 0.55, 0.7]) * np.exp(0.4 * log)
    return np.clip(np.where(is_house[..., None], walls, sky), 1e-3, 1).astype(np.float32)


def handheld(
    shift=(0.0, 0.0),
    roll=0.0,
    height=320,
    width=480,
    scale=1,
    noise=0.0,
    levels=2**16 - 1,
    light=(1.0, 1.0, 1.0),
    evs=EVS,
):
    """What a camera makes of `skyline` under a light, if it shifts (pixels) and rolls (degrees) with every two stops.

    Returns frames (1, 3, H, W), the radiance (1, 3, H, W) that the one of EV 0 sees, and the flow (2, H, W) from it to EV -2.
    """
    random = np.random.default_rng(13)
    y, x = np.mgrid[0 : height * scale, 0 : width * scale]
    x, y = (x + 0.5) / scale - 0.5, (y + 0.5) / scale - 0.5  # in pixels of scale 1
    middle_x, middle_y = (width - 1) / 2, (height - 1) / 2
    frames, truth = [], None
    for ev in evs:
        way, ratio = ev / 2, 2 ** (ev - evs[0])
        angle = np.deg2rad(way * roll)
        along, down = x - middle_x + way * shift[0], y - middle_y + way * shift[1]
        turned_x = np.cos(angle) * along - np.sin(angle) * down + middle_x
        turned_y = np.sin(angle) * along + np.cos(angle) * down + middle_y
        seen = skyline(turned_x, turned_y, height) * np.array(light, np.float32)
        truth = seen if way == 0 else truth
        caught = seen * ratio
        caught = caught + random.normal(size=seen.shape) * noise * np.sqrt(np.clip(caught, 0, 1) + noise)
        frames.append(torch.from_numpy(expose(np.clip(caught, 0, 1).astype(np.float32), 1, levels) / (levels + 1)))
    to_short = _turned(x, y, (middle_x, middle_y), shift, np.deg2rad(roll))
    flow = torch.from_numpy(np.stack([to_short[0] - x, to_short[1] - y]) * scale).float()
    pictures = [frame.float().permute(2, 0, 1)[None] for frame in frames]
    return pictures, torch.from_numpy(truth).permute(2, 0, 1)[None], flow


def passers_by(step=0.0, height=320, width=480, noise=0.0, levels=2**16 - 1, evs=EVS):
    """What a resting camera makes of `skyline` when people pass by, `step` pixels with every stop.

    Returns frames (1, 3, H, W), the radiance (1, 3, H, W) that the one of EV 0 sees, and where (H, W) people are in any frame.
    """
    random = np.random.default_rng(14)
    y, x = np.mgrid[0:height, 0:width]
    still = skyline(x, y, height)
    frames, truth, touched = [], None, np.zeros((height, width), bool)
    for ev in evs:
        seen = still.copy()
        for place, middle, light in ((0.2, 0.3, 0.03), (0.5, 0.75, 0.2), (0.75, 0.45, 0.008)):
            along, down = (x - place * width - ev * step) / (0.05 * width), (y - middle * height) / (0.2 * height)
            body = along**2 + down**2 < 1
            cloth = light * (1 + 0.4 * np.sin(9 * along) * np.sin(14 * down))
            seen[body] = (cloth[..., None] * np.array([1.0, 0.7, 0.5]))[body]
            touched |= body
        truth = seen if ev == 0 else truth
        caught = seen * 2 ** (ev - evs[0])
        caught = caught + random.normal(size=seen.shape) * noise * np.sqrt(np.clip(caught, 0, 1) + noise)
        frames.append(torch.from_numpy(expose(np.clip(caught, 0, 1).astype(np.float32), 1, levels) / (levels + 1)))
    pictures = [frame.float().permute(2, 0, 1)[None] for frame in frames]
    return pictures, torch.from_numpy(truth).permute(2, 0, 1)[None], torch.from_numpy(touched)


def _turned(x, y, middle, shift, angle):
    """Where a point of the reference lies in the short frame."""
    along, down = x - middle[0], y - middle[1]
    back_x, back_y = np.cos(angle) * along - np.sin(angle) * down, np.sin(angle) * along + np.cos(angle) * down
    return back_x + middle[0] + shift[0], back_y + middle[1] + shift[1]
