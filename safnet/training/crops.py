"""What training steps see: augmented crops of a data set's scenes, or of scenes made from panoramas on the way.

Crop number k of a run depends on k and the seed alone, whichever process draws it, and whenever.
"""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from safnet.data.datasets import DatasetError, SceneFiles, find_scenes, in_all_orders, load_scene
from safnet.data.scenes import Panorama, Scene, SceneSettings, find_panoramas, load_panorama, synthesize_scene
from safnet.radiance import exposure_input, exposure_ratios
from safnet.training.settings import TrainingError, TrainSettings
from safnet.weights import write_tensors

POOL = 64  # scenes from which the crops of one moment come, so that a batch shows many
MARGIN = 1.25  # side of a rendered scene over that of its crops


class Crop(NamedTuple):
    """A training example, batched by the loader.

    exposures: (3, 6, h, w) network input; truth: (3, h, w); flow: (2, 2, h, w); visible: (2, h, w), nowhere true when
    the scene has no true flow; windows: (k,) numbers of the windows to refine, as `safnet.windows` counts them.
    """

    exposures: Tensor
    truth: Tensor
    flow: Tensor
    visible: Tensor
    windows: Tensor


# ---- where scenes come from ------------------------------------------------------------------------------------------


class Scenes(Protocol):
    """Scenes by number."""

    def choose(self, random: np.random.Generator, crop: int) -> int:
        """The scene from which crop number `crop` is taken."""

    def read(self, number: int) -> Scene: ...

    def key(self, number: int) -> str:
        """A file name for the scene, which tells it from all others."""


class FileScenes:
    """The scenes of a data set."""

    def __init__(self, files: Sequence[SceneFiles]) -> None:
        self.files = files

    def choose(self, random: np.random.Generator, crop: int) -> int:
        return int(random.integers(len(self.files)))

    def read(self, number: int) -> Scene:
        files = self.files[number]
        sample = load_scene(files)
        size = sample.truth.shape[1:]
        flow, visible = sample.flow, torch.ones(2, *size, dtype=torch.bool)
        if flow is None or files.flow is None:
            flow, visible = torch.zeros(2, 2, *size), ~visible
        elif (mask := files.flow.with_name("visible.npy")).is_file():
            visible = torch.from_numpy(np.load(mask))
        short, reference, long = sample.evs
        return Scene(sample.frames, (short, reference, long), sample.truth.clamp(0, 1), flow, visible)

    def key(self, number: int) -> str:
        files = self.files[number]
        return _digest(*(f"{path.resolve()} {path.stat().st_mtime_ns}" for path in files.paths()))


class PanoramaScenes:
    """Scenes made from panoramas, ever new ones: crops come from POOL of them, which move on as crops are taken."""

    def __init__(self, panoramas: Sequence[Panorama], settings: TrainSettings) -> None:
        side = int(MARGIN * settings.crop)
        self.panoramas, self.ranges = panoramas, SceneSettings(side, side)
        self.seed, self.reuse, self.both = settings.seed, settings.reuse, settings.orders == "all"
        self.digest = _digest(repr(self.ranges), f"{self.seed} {self.both}", *(picture.name for picture in panoramas))

    def choose(self, random: np.random.Generator, crop: int) -> int:
        return crop // self.reuse + int(random.integers(POOL))

    def read(self, number: int) -> Scene:
        reverse = self.both and number % 2 == 1
        return synthesize_scene(self.panoramas, self.ranges, self.seed, number, reverse=reverse)

    def key(self, number: int) -> str:
        return f"{self.digest}-{number}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


class CachedScenes:
    """Scenes kept in files that are mapped into memory: a crop is read without decoding or rendering the scene.

    Processes share the folder. Each file is written whole or not at all, so that no process waits for another.
    """

    def __init__(self, scenes: Scenes, folder: Path, keep: int | None = None) -> None:
        """With `keep`, only so many scenes up to the newest stay in the folder."""
        self.scenes, self.folder, self.keep = scenes, folder, keep

    def choose(self, random: np.random.Generator, crop: int) -> int:
        return self.scenes.choose(random, crop)

    def read(self, number: int) -> Scene:
        path = self._path(number)
        if path.exists():
            try:
                return _read_cached(path)
            except FileNotFoundError:  # another process has just thrown it away
                pass
        scene = self.scenes.read(number)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, _tensors(scene), {f"ev{i}": repr(ev) for i, ev in enumerate(scene.evs)})
        if self.keep is not None:
            self._path(number - self.keep).unlink(missing_ok=True)
        return scene

    def key(self, number: int) -> str:
        return self.scenes.key(number)

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.key(number)}.safetensors"


def _tensors(scene: Scene) -> dict[str, Tensor]:
    return {"frames": scene.frames, "truth": scene.truth, "flow": scene.flow, "visible": scene.visible}


def _read_cached(path: Path) -> Scene:
    with safe_open(path, "pt") as file:
        short, reference, long = (float(file.metadata()[f"ev{i}"]) for i in range(3))
        frames, truth, flow, visible = (file.get_tensor(name) for name in ("frames", "truth", "flow", "visible"))
    return Scene(frames, (short, reference, long), truth, flow, visible)


def open_scenes(settings: TrainSettings) -> Scenes:
    """The scenes that settings name, after a look at the first. Raises TrainingError, DatasetError or SceneError."""
    if settings.panoramas is not None:
        made = PanoramaScenes([load_panorama(path) for path in find_panoramas(settings.panoramas, "train")], settings)
        return CachedScenes(made, settings.cache or settings.out / "cache", keep=2 * POOL)
    assert settings.scenes is not None
    files = find_scenes(settings.dataset, settings.scenes, "Training")
    for scene in files:
        scene.check()
    if settings.dataset == "challenge123" and settings.orders == "all":
        files = in_all_orders(files)
        for scene in files:
            scene.check()
    read = FileScenes(files)
    height, width = read.read(0).truth.shape[1:]
    if min(height, width) < settings.crop:
        raise TrainingError(f"--crop must fit the scenes, which are {width}x{height}, got {settings.crop}")
    return CachedScenes(read, settings.cache) if settings.cache else read


# ---- crops -----------------------------------------------------------------------------------------------------------


class Crops(Dataset[Crop]):
    """Augmented crops by number."""

    def __init__(self, scenes: Scenes, settings: TrainSettings) -> None:
        self.scenes, self.settings = scenes, settings

    def __getitem__(self, number: int) -> Crop:
        side = self.settings.crop
        random = np.random.default_rng([self.settings.seed, number])
        scene = self.scenes.read(self.scenes.choose(random, number))
        height, width = scene.truth.shape[1:]
        if min(height, width) < side:
            raise DatasetError(f"all scenes must hold a crop of {side}, one is {width}x{height}")
        corner = [int(random.integers(size - side + 1)) for size in (height, width)]
        shifts = draw_shifts(random, corner, (height - side, width - side), self.settings.shift)
        parts = augment(random, *cut(scene, side, corner, shifts))
        frames, truth, flow, visible = (part.contiguous() for part in parts)
        ratios = exposure_ratios(scene.evs)
        exposures = [exposure_input(frame[None], ratio)[0] for frame, ratio in zip(frames, ratios, strict=True)]
        return Crop(torch.stack(exposures), truth, flow, visible, self._draw_windows(random))

    def _draw_windows(self, random: np.random.Generator) -> Tensor:
        count = (self.settings.crop // self.settings.window) ** 2
        drawn = random.permutation(count)[: self.settings.windows or count]
        return torch.from_numpy(np.sort(drawn))


def draw_shifts(
    random: np.random.Generator, corner: Sequence[int], last: Sequence[int], longest: float
) -> list[tuple[int, ...]]:
    """How far (y, x) a crop at `corner` is moved in the short and the long frame, up to the `last` corner that there is.

    At most `longest` pixels along each axis; most are far shorter, as a shaking camera's are.
    """
    reach = longest * random.random() ** 2 if longest else 0.0
    if reach < 0.5:
        return [(0, 0), (0, 0)]
    wanted = np.rint(random.uniform(-reach, reach, (2, 2))).astype(int)
    return [tuple(int(v) for v in np.clip(shift, np.negative(corner), np.subtract(last, corner))) for shift in wanted]


def cut(scene: Scene, side: int, corner: Sequence[int], shifts: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Frames, truth, flow and visibility of a crop whose outer frames are moved; flow that leaves the crop counts as hidden."""

    def area(shift: Sequence[int]) -> tuple[Any, ...]:
        return (..., *(slice(first + moved, first + moved + side) for first, moved in zip(corner, shift, strict=True)))

    here = area((0, 0))
    short, long = (scene.frames[number][area(shift)] for number, shift in zip((0, 2), shifts, strict=True))
    flow = scene.flow[here] - torch.tensor(shifts).flip(1)[:, :, None, None]
    grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"))
    target = flow + grid
    inside = ((target >= 0) & (target <= side - 1)).all(1)
    return [torch.stack([short, scene.frames[1][here], long]), scene.truth[here], flow, scene.visible[here] & inside]


def augment(random: np.random.Generator, frames: Tensor, truth: Tensor, flow: Tensor, visible: Tensor) -> list[Tensor]:
    """Flips, transposition and permuted colours, at random; the flow's components follow."""
    colours = torch.from_numpy(random.permutation(3))
    parts = [frames[:, colours], truth[colours], flow, visible]
    for axis in (-1, -2):
        if random.random() < 0.5:
            sign = torch.tensor([-1.0, 1.0] if axis == -1 else [1.0, -1.0]).view(1, 2, 1, 1)
            parts = [part.flip(axis) for part in parts]
            parts[2] = parts[2] * sign
    if random.random() < 0.5:
        parts = [part.transpose(-1, -2) for part in parts]
        parts[2] = parts[2].flip(1)
    return parts


class Batches(Sampler[list[int]]):
    """Numbers of the crops that one process sees in the steps from `first` on; all processes together see them all."""

    def __init__(self, settings: TrainSettings, first: int, rank: int, processes: int) -> None:
        self.batch, self.steps, self.first, self.rank, self.processes = (
            *(settings.batch, settings.steps, first, rank, processes),
        )

    # No __len__: Lightning would otherwise count a resumed run's steps against it.
    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps):
            yield list(range(step * self.batch + self.rank, (step + 1) * self.batch, self.processes))


def load_crops(scenes: Scenes, settings: TrainSettings, first: int, rank: int, processes: int) -> DataLoader[Crop]:
    """Batches of the steps from `first` on, for one of several processes."""
    return DataLoader(
        Crops(scenes, settings),
        batch_sampler=Batches(settings, first, rank, processes),
        num_workers=settings.workers,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )


def _ignore_signals(worker: int) -> None:
    """A signal to the whole group must not end the workers before the run has saved itself; it ends them then."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Whole(Dataset[tuple[Tensor, Tensor]]):
    """Validation scenes whole: network input (3, 6, H, W) and truth (3, H, W)."""

    def __init__(self, files: Sequence[SceneFiles]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = load_scene(self.files[index])
        pairs = zip(sample.frames, exposure_ratios(sample.evs), strict=True)
        return torch.stack([exposure_input(frame[None], ratio)[0] for frame, ratio in pairs]), sample.truth.clamp(0, 1)
