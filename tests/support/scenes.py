"""Small scenes with known truth, written in the layouts of the public data sets."""

from pathlib import Path

import numpy as np
import OpenImageIO as oiio
import torch

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
