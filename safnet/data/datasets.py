"""The public data sets of multi-exposure HDR fusion, read from the folders that their authors ship.

Frames come as LDR values in [0, 1], RGB, short to long; the truth as linear radiance in the short exposure's units,
where 1 is its clipping point. Scenes are listed first and read one at a time, so that a broken one hides no other.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import OpenImageIO as oiio
import torch
from torch import Tensor

from safnet.choices import FEWEST_FRAMES, MOST_FRAMES, DatasetName, Split
from safnet.exposures import TRUTH_NAMES, find_evs
from safnet.images import FLOAT_TYPES, FloatPicture, ImageError, find_frames, read_header, read_ldr
from safnet.radiance import GAMMA

NTIRE_GAMMA = 2.24  # camera curve of NTIRE 2021, by its organisers
RADIANCE_EXTENSIONS = (".hdr", ".exr", ".tif", ".tiff")


class DatasetError(ValueError):
    """A data set folder or a scene of it that is not what its layout says."""


@dataclass(frozen=True)
class SceneFiles:
    """Where a scene's parts lie. The files need not exist: `load_scene` says which one is missing.

    Attributes:
        name: the scene's folder, or what the layout calls it.
        frames: the exposures in the order in which `exposures` lists their EVs.
        exposures: text file of EVs, or NTIRE 2021's .npy; None to ask the frames' EXIF data.
        truth: radiance of the reference frame.
        scale: NTIRE 2021's alignratio.npy, else None.
        flow: true flow from the reference to the other two frames, where a data set has it, else None.
        any_number: of frames, two to nine, is what the layout allows; else three.
    """

    name: str
    frames: tuple[Path, ...]
    exposures: Path | None
    truth: Path
    scale: Path | None = None
    flow: Path | None = None
    any_number: bool = False

    def paths(self) -> list[Path]:
        """All files that `load_scene` reads."""
        return [path for path in (*self.frames, self.exposures, self.truth, self.scale, self.flow) if path is not None]

    def check(self, series: bool = False) -> None:
        """Raise DatasetError, naming the file, when one is missing, or there are not three frames, or with `series` not as many
        as the layout allows."""
        for path in self.paths():
            if not path.is_file():
                raise DatasetError(f"scene {self.name}: {path} does not exist")
        fewest, most, words = 3, 3, "three"
        if series and self.any_number:
            fewest, most, words = FEWEST_FRAMES, MOST_FRAMES, f"{FEWEST_FRAMES} to {MOST_FRAMES}"
        if not fewest <= len(self.frames) <= most:
            raise DatasetError(f"scene {self.name} must have {words} frames, got {len(self.frames)}")


class Sample(NamedTuple):
    """A scene in memory.

    frames: (3, 3, H, W) float32 LDR in [0, 1]; frame (short, reference, long), then RGB. Of a series (N, 3, H, W).
    evs: exposure values in stops, ascending.
    truth: (3, H, W) float32 linear radiance in the short exposure's units.
    flow: (2, 2, H, W) pixels, x then y, from the reference to short and long; None where unknown.
    """

    frames: Tensor
    evs: tuple[float, ...]
    truth: Tensor
    flow: Tensor | None = None

    @property
    def reference(self) -> int:
        """Number of the frame that the truth belongs to."""
        return middle_frame(len(self.frames))


def middle_frame(count: int) -> int:
    """Of frames by exposure; of an even number the darker one of two."""
    return (count - 1) // 2


def find_scenes(dataset: DatasetName, root: Path, split: Split = "Test") -> list[SceneFiles]:
    """List the scenes of a data set by name.

    Args:
        root: the data set's folder, whose subfolder for the split is taken if there is one, or the folder of scenes.

    Raises:
        DatasetError: `root` is no folder, or holds no scene of the layout.
    """
    if dataset not in LAYOUTS:
        raise DatasetError(f"data set must be one of {', '.join(LAYOUTS)}, got {dataset!r}")
    if not root.is_dir():
        raise DatasetError(f"data set folder {root} does not exist")
    folder = next((path for path in _folders(root) if path.name.lower() == split.lower()), root)
    scenes = LAYOUTS[dataset](_folders(folder))
    if not scenes:
        raise DatasetError(f"{folder} holds no scene of the {dataset} layout, which is {EXPECTED[dataset]}")
    return scenes


def in_all_orders(scenes: Sequence[SceneFiles]) -> list[SceneFiles]:
    """Each scene of Challenge123 in all six orders of exposure: every exposure was taken at each of three moments.

    Truth and exposures are those of the moment at which the reference is taken.
    """
    orders = []
    for scene in scenes:
        moments = [path.parent for path in scene.frames]
        for order in permutations(range(3)):
            frames = tuple(moments[k] / path.name for k, path in zip(order, scene.frames, strict=True))
            reference = moments[order[1]]
            assert scene.exposures is not None
            files = reference / scene.exposures.name, reference / scene.truth.name
            orders.append(SceneFiles(f"{scene.name} {''.join(str(k + 1) for k in order)}", frames, *files))
    return orders


def load_scene(files: SceneFiles, series: bool = False) -> Sample:
    """Read one scene, with `series` of as many frames as its layout allows, else of three.

    Raises DatasetError, naming the file, for one that is missing, unreadable, misfit or NaN.
    """
    files.check(series)
    try:
        evs = _read_evs(files)
        pictures = [read_ldr(path) for path in files.frames]
        truth = read_radiance(files.truth, integers=files.scale is not None)
    except (ValueError, OSError) as error:
        raise DatasetError(f"scene {files.name}: {error}") from error
    for path, picture in zip(files.frames, pictures, strict=True):
        if picture.shape != truth.shape:
            sizes = f"{path.name} is {_size(picture)}, but its truth {files.truth.name} is {_size(truth)}"
            raise DatasetError(f"scene {files.name}: {sizes}")
    # By exposure: the network's reference is the middle one, in whatever order the files come.
    order = sorted(range(len(evs)), key=evs.__getitem__)
    ascending = tuple(evs[index] for index in order)
    frames = np.stack([pictures[index] for index in order])
    try:
        if files.scale is not None:
            frames, truth = _from_ntire(frames, truth, float(np.load(files.scale)), ascending[1] - ascending[0])
        flow = None if files.flow is None else _read_flow(files.flow, truth)
    except (ValueError, OSError, EOFError, TypeError) as error:
        raise DatasetError(f"scene {files.name}: {error}") from error
    if bad := int(truth.size - np.isfinite(truth).sum()):
        raise DatasetError(f"scene {files.name}: {files.truth} must hold finite numbers, but {bad} are not")
    return Sample(_planar(frames), ascending, _planar(truth), flow)


def read_radiance(path: Path, *, integers: bool = False) -> FloatPicture:
    """Read radiance (H, W, 3), RGB, as stored: .hdr, .exr, float .tif; with `integers` also integer files, unscaled.

    Raises:
        ImageError: the file is missing, unreadable, has fewer than three channels, or integers where none are expected.
    """
    if not path.is_file():
        raise ImageError(f"{path} does not exist")
    source = oiio.ImageInput.open(str(path))
    if source is None:
        raise ImageError(f"{path} cannot be read: {oiio.geterror().strip()}")
    try:
        spec = source.spec()
        if spec.nchannels < 3:
            raise ImageError(f"{path} must have three channels, got {spec.nchannels}")
        if not integers and str(spec.format) not in FLOAT_TYPES:
            raise ImageError(f"{path} must hold floating-point radiance, got {spec.format}")
        names = list(spec.channelnames)
        # EXR stores channels by alphabet, so RGB must be looked up by name.
        channels = [names.index(name) for name in "RGB"] if {"R", "G", "B"} <= set(names) else [0, 1, 2]
        pixels = source.read_image(0, 0, 0, spec.nchannels, spec.format)
        if pixels is None or source.has_error:
            raise ImageError(f"{path} cannot be read, it may be truncated: {source.geterror().strip()}")
    finally:
        source.close()
    return np.ascontiguousarray(pixels[:, :, channels], np.float32)


def ntire_encode(radiance: Tensor, ev_step: float) -> Tensor:
    """Radiance in the short exposure's units -> NTIRE 2021's gamma-encoded values in units of the middle exposure."""
    return (radiance * 2.0**ev_step).pow(1 / NTIRE_GAMMA)


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.name.startswith("."))


# ---- layouts ---------------------------------------------------------------------------------------------------------

EXPECTED = {
    "kalantari17": "SCENE/{three .tif, exposure.txt, HDRImg.hdr}",
    "challenge123": "SCENE_{1,2,3}/{ldr_img_1.tif, ldr_img_2.tif, ldr_img_3.tif, exposure.txt, hdr_img.hdr}",
    "tel23": "SCENE/{input_1.tif, input_2.tif, input_3.tif, exposure.txt, HDRImg.hdr}",
    "ntire21": "SCENE/{0.png, 1.png, 2.png, gt.png, alignratio.npy, exposures.npy}",
    "folder": "SCENE/{two to nine frames, exposure.txt unless EXIF tells, truth.exr or .hdr}",
}


def _kalantari17(folders: Sequence[Path]) -> list[SceneFiles]:
    scenes = [_scene(folder, tuple(sorted(folder.glob("*.tif"))), "HDRImg.hdr") for folder in folders]
    return [scene for scene in scenes if scene.frames or scene.truth.exists()]


def _challenge123(folders: Sequence[Path]) -> list[SceneFiles]:
    """Frame k of a scene lies in its k-th folder; truth and exposures belong to the second, where the reference is."""
    scenes = []
    for folder in folders:
        if match := re.fullmatch(r"(.+)_2", folder.name):
            frames = tuple(folder.with_name(f"{match[1]}_{k}") / f"ldr_img_{k}.tif" for k in (1, 2, 3))
            scenes.append(SceneFiles(match[1], frames, folder / "exposure.txt", folder / "hdr_img.hdr"))
    return scenes


def _tel23(folders: Sequence[Path]) -> list[SceneFiles]:
    names = tuple(f"input_{k}.tif" for k in (1, 2, 3))
    chosen = (folder for folder in folders if any((folder / name).exists() for name in names))
    return [_scene(folder, tuple(folder / name for name in names), "HDRImg.hdr") for folder in chosen]


def _ntire21(folders: Sequence[Path]) -> list[SceneFiles]:
    scenes = []
    for folder in folders:
        frames = tuple(folder / f"{k}.png" for k in (0, 1, 2))
        if any(frame.exists() for frame in frames):
            files = folder / "exposures.npy", folder / "gt.png", folder / "alignratio.npy"
            scenes.append(SceneFiles(folder.name, frames, *files))
    return scenes


def _folder(folders: Sequence[Path]) -> list[SceneFiles]:
    scenes = []
    for folder in folders:
        candidates = (folder / f"{name}{extension}" for name in TRUTH_NAMES for extension in RADIANCE_EXTENSIONS)
        truth = next((path for path in candidates if path.is_file()), folder / "truth.exr")
        frames = tuple(find_frames(folder, besides=[truth]))
        if frames:
            exposures = folder / "exposure.txt"
            given = exposures if exposures.exists() else None
            scenes.append(SceneFiles(folder.name, frames, given, truth, any_number=True))
    return scenes


def _scene(folder: Path, frames: tuple[Path, ...], truth: str) -> SceneFiles:
    flow = folder / "flow.npy"  # `safnet synthesize` writes it
    return SceneFiles(
        folder.name, frames, folder / "exposure.txt", folder / truth, flow=flow if flow.is_file() else None
    )


LAYOUTS: dict[str, Callable[[Sequence[Path]], list[SceneFiles]]] = {
    "kalantari17": _kalantari17,
    "challenge123": _challenge123,
    "tel23": _tel23,
    "ntire21": _ntire21,
    "folder": _folder,
}


# ---- parts of a scene ------------------------------------------------------------------------------------------------


def _read_evs(files: SceneFiles) -> list[float]:
    if files.exposures is None:
        return find_evs([read_header(path) for path in files.frames])
    if files.exposures.suffix == ".npy":
        values = [float(value) for value in np.load(files.exposures).reshape(-1)]
    else:
        values = [float(word) for word in re.split(r"[\s,;]+", files.exposures.read_text("utf-8-sig")) if word]
    count = len(files.frames)
    if len(values) != count or not np.isfinite(values).all() or len(set(values)) != count:
        number = "three" if count == 3 else count
        raise DatasetError(f"{files.exposures} must hold {number} different EVs, got {', '.join(map(str, values))}")
    return values


def _from_ntire(
    frames: FloatPicture, truth: FloatPicture, scale: float, ev_step: float
) -> tuple[FloatPicture, FloatPicture]:
    """NTIRE 2021 to the protocol. Its truth is gamma-encoded, in the middle exposure's units, scaled to fill 16 bits.

    Frames are encoded anew for gamma 2.2, so that everything after reads the same radiance from them as from the truth.
    """
    if not scale > 0:
        raise DatasetError(f"alignratio.npy must be positive, got {scale}")
    radiance = (truth / np.float32(scale)) ** np.float32(NTIRE_GAMMA) / np.float32(2.0**ev_step)
    return frames ** np.float32(NTIRE_GAMMA / GAMMA), radiance


def _read_flow(path: Path, truth: FloatPicture) -> Tensor:
    flow = np.load(path)
    expected = (2, 2, *truth.shape[:2])
    if flow.shape != expected:
        raise DatasetError(f"{path} must be {expected}, got {flow.shape}")
    return torch.from_numpy(flow.astype(np.float32))


def _planar(pictures: FloatPicture) -> Tensor:
    """(..., H, W, 3) -> (..., 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pictures, -1, -3), np.float32))


def _size(picture: FloatPicture) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
