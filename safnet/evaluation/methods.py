"""What turns exposures into radiance in an evaluation: models, baselines, and other methods' files."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from safnet.choices import Precision
from safnet.data.datasets import RADIANCE_EXTENSIONS, SceneFiles, middle_frame, read_radiance
from safnet.evaluation.baselines import BASELINES, fuse_baseline
from safnet.fuse import Result, fuse_exposures
from safnet.model import SAFNet
from safnet.weights import load_model, weights_path

Kind = Literal["model", "baseline", "predictions"]


class EvaluationError(ValueError):
    """An evaluation that cannot start, or with `strict` a scene that cannot be scored."""


class Outcome(NamedTuple):
    """Radiance (1, 3, H, W) of one scene, and the fusion that it came from, where a method has one."""

    radiance: Tensor
    result: Result | None


class Method(Protocol):
    """Something that turns exposures into radiance. `identity` is all that its results depend on besides the scene."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def fuse(self, files: SceneFiles, frames: Tensor, evs: tuple[float, ...], measure: bool = False) -> Outcome: ...


@dataclass
class ModelMethod:
    """A SAFNet, on the device where it lies."""

    name: str
    model: SAFNet
    weights_hash: str
    precision: str = "float32"
    tile: int | None = None
    kind: Literal["model"] = "model"

    @property
    def identity(self) -> dict[str, Any]:
        return {"weights_sha256": self.weights_hash, "precision": self.precision, "variant": self.model.variant}

    def fuse(self, files: SceneFiles, frames: Tensor, evs: tuple[float, ...], measure: bool = False) -> Outcome:
        precision = getattr(torch, self.precision)
        pictures = [frame[None] for frame in frames]
        result = fuse_exposures(
            self.model,
            pictures,
            evs,
            reference=middle_frame(len(pictures)),
            measure=measure,
            alignment="paper",
            tile=self.tile,
            precision=precision,
        )
        return Outcome(result.radiance, result)


@dataclass
class BaselineMethod:
    """One of `safnet.evaluation.baselines.BASELINES`."""

    name: str
    kind: Literal["baseline"] = "baseline"

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            raise EvaluationError(f"--baseline must be one of {', '.join(BASELINES)}, got {self.name!r}")

    @property
    def identity(self) -> dict[str, Any]:
        return {"baseline": self.name}

    def fuse(self, files: SceneFiles, frames: Tensor, evs: tuple[float, ...], measure: bool = False) -> Outcome:
        result = fuse_baseline(self.name, frames, evs, measure)
        return Outcome(result.radiance, result)


@dataclass
class PredictionMethod:
    """Another method's results: a folder of SCENE.hdr, .exr or float .tif, linear, in the short exposure's units.

    Where no file has a scene's name, but there are as many files as scenes, they are taken in order, as the numbered
    results of SAFNet's authors are meant.
    """

    name: str
    folder: Path
    scenes: Sequence[SceneFiles]
    kind: Literal["predictions"] = "predictions"
    by_scene: dict[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise EvaluationError(f"--predictions {self.folder} does not exist")
        files = sorted(path for path in self.folder.iterdir() if path.suffix.lower() in RADIANCE_EXTENSIONS)
        names = [scene.name for scene in self.scenes]
        self.by_scene = {path.stem: path for path in files if path.stem in names}
        self.in_order = not self.by_scene and len(files) == len(names)
        if self.in_order:
            self.by_scene = dict(zip(names, files, strict=True))
        if not self.by_scene:
            raise EvaluationError(
                f"--predictions {self.folder} must hold SCENE{'|'.join(RADIANCE_EXTENSIONS)} files, such as "
                f"{names[0]}.hdr; got {', '.join(path.name for path in files[:3]) or 'none'}"
            )

    @property
    def identity(self) -> dict[str, Any]:
        return {"predictions": {name: stamp(path) for name, path in self.by_scene.items()}}

    def fuse(self, files: SceneFiles, frames: Tensor, evs: tuple[float, ...], measure: bool = False) -> Outcome:
        if files.name not in self.by_scene:
            raise EvaluationError(f"no prediction {files.name}.hdr in {self.folder}")
        path = self.by_scene[files.name]
        radiance = torch.from_numpy(read_radiance(path)).permute(2, 0, 1)[None]
        if radiance.shape[2:] != frames.shape[2:]:
            sizes = (f"{size[1]}x{size[0]}" for size in (radiance.shape[2:], frames.shape[2:]))
            raise EvaluationError(f"prediction {path} is {' but the scene is '.join(sizes)}")
        return Outcome(radiance, None)


def methods_for(
    scenes: Sequence[SceneFiles],
    models: Sequence[str | Path] = (),
    baselines: Sequence[str] = (),
    predictions: Sequence[Path] = (),
    *,
    device: str = "auto",
    precision: Precision = "float32",
    tile: int | None = None,
) -> list[Method]:
    """The methods of an evaluation by name: models first, then baselines, then predictions; safnet-s if none is named.

    Args:
        scenes: that predictions must fit by name or number.
        models: as of `safnet.load_model`.
        baselines: of BASELINES; "all" stands for each of them.
        predictions: folders, see `PredictionMethod`.
        device, precision, tile: of the models, see `safnet.fuse_files`.

    Raises:
        EvaluationError, WeightsError, ValueError: a name, folder, file or device that cannot be used.
    """
    if not (models or baselines or predictions):
        models = ("safnet-s",)
    networks = [
        ModelMethod(Path(name).stem, load_model(name, device), weights_hash(weights_path(name)), precision, tile)
        for name in models
    ]
    named = [part for name in baselines for part in (BASELINES if name == "all" else (name,))]
    files = [PredictionMethod(folder.name, folder, scenes) for folder in predictions]
    return [*networks, *map(BaselineMethod, named), *files]


def weights_hash(path: Path) -> str:
    """SHA-256 of a weights file, as sha256sum prints it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stamp(path: Path) -> list[Any]:
    """What tells a changed file: its path, size and time of change."""
    try:
        status = path.stat()
    except OSError:
        return [str(path.resolve())]
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]
