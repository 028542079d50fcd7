"""Evaluate models, baselines and other methods' predictions on a data set, scene by scene.

A scene that cannot be scored is reported and left out of the means. With a cache folder every result is kept as soon as
it is there, under a key of all that it depends on, so that an interrupted run resumes and a changed one computes anew.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safnet.choices import DatasetName
from safnet.data.datasets import NTIRE_GAMMA, Sample, SceneFiles, load_scene, ntire_encode
from safnet.evaluation.baselines import dis_flow
from safnet.evaluation.methods import EvaluationError, Method, stamp
from safnet.evaluation.thumbnails import result_pictures, scene_pictures
from safnet.files import write_text
from safnet.metrics import PEAK_LUMINANCE, ColorVideoVDP, mean, ntire_scores, psnr_l, psnr_mu, score, through_rgbe
from safnet.radiance import exposure_ratios

CACHE_VERSION = 1  # raise it when scores or pictures of the same inputs change
CLIPPED_LEVEL = 0.98  # LDR value from which a channel counts as clipped
MOVING_PIXELS = 2.0
MOTION_PERCENTILE = 99.0
# Scenes by their motion in pixels and by the clipped part of the reference: name and upper limit.
MOTION_GROUPS = (("still, < 5 px", 5.0), ("motion 5 to 30 px", 30.0), ("motion >= 30 px", float("inf")))
CLIPPED_GROUPS = (("clipped < 5 %", 0.05), ("clipped 5 to 20 %", 0.2), ("clipped >= 20 %", float("inf")))


@dataclass(frozen=True)
class Settings:
    """What is the same for all methods of an evaluation.

    Attributes:
        ev_error: stops by which the EVs given to the methods are wrong, apart on even scenes and together on odd ones.
        measure: models and baselines measure exposures and camera curve instead of trusting the EVs.
        rgbe: score results as a .hdr file would return them.
        cvvdp: score with ColorVideoVDP too.
        picture_width: of the report's pictures, in pixels.
    """

    dataset: DatasetName
    ev_error: float = 0.0
    measure: bool = False
    rgbe: bool = False
    cvvdp: bool = False
    peak_luminance: float = PEAK_LUMINANCE
    picture_width: int = 720


@dataclass
class Scene:
    """What is known of a scene whatever the method; `error` where it cannot be read."""

    name: str
    error: str | None = None
    height: int = 0
    width: int = 0
    evs: tuple[float, ...] = ()
    clipped: float = 0.0  # part of the reference's pixels with a clipped channel
    motion: float | None = None  # 99th percentile in pixels, None where unknown
    motion_source: str = ""
    pictures: dict[str, str] = field(default_factory=dict)  # data URIs

    @property
    def groups(self) -> list[str]:
        named = [_group(self.clipped, CLIPPED_GROUPS)]
        return named if self.motion is None else [_group(self.motion, MOTION_GROUPS), *named]


@dataclass
class Score:
    """A method's result on one scene; `error` where there is none."""

    scores: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    seconds: float | None = None
    pictures: dict[str, str] = field(default_factory=dict)  # data URIs


@dataclass
class Mean:
    """Means over the scenes that could be scored."""

    used: int
    left_out: int
    scores: dict[str, float]


@dataclass
class Evaluation:
    """Scores by method and scene name."""

    settings: Settings
    methods: Sequence[Method]
    scenes: list[Scene]
    scores: dict[str, dict[str, Score]]

    def mean(self, method: str, group: str | None = None) -> Mean:
        """Mean of each score over a group's scenes, or all; one that some scenes lack is averaged over the others."""
        members = [scene for scene in self.scenes if group is None or (not scene.error and group in scene.groups)]
        results = [self.scores[method][scene.name] for scene in members]
        good = [result for result in results if result.error is None]
        names = dict.fromkeys(name for result in good for name in result.scores)
        means = {name: mean(r.scores[name] for r in good if name in r.scores) for name in names}
        return Mean(
            len(good), len(results) - len(good), {name: value for name, value in means.items() if value is not None}
        )

    def any_scored(self) -> bool:
        """Whether there is a scene that some method could be scored on."""
        return any(self.mean(method.name).used for method in self.methods)

    def groups(self) -> list[str]:
        """The groups that have scenes, in order."""
        present = {group for scene in self.scenes if not scene.error for group in scene.groups}
        return [name for name, _ in (*MOTION_GROUPS, *CLIPPED_GROUPS) if name in present]

    def errors(self) -> list[tuple[str, str, str]]:
        """(scene, method, error) of all that was left out; the method is empty where the scene itself is broken."""
        broken = [(scene.name, "", scene.error) for scene in self.scenes if scene.error]
        for method in self.methods:
            scores = self.scores[method.name]
            broken += [
                (scene.name, method.name, error)
                for scene in self.scenes
                if not scene.error and (error := scores[scene.name].error)
            ]
        return broken


def evaluate(
    files: Sequence[SceneFiles],
    methods: Sequence[Method],
    settings: Settings,
    *,
    cache: Path | None = None,
    fresh: bool = False,
    strict: bool = False,
    export: Callable[[str, str, Tensor, Tensor], None] | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Evaluation:
    """Score each method on each scene.

    Args:
        cache: folder of results, made if missing; None to keep none.
        fresh: compute anew what the cache holds.
        strict: raise EvaluationError at the first scene that cannot be scored.
        export: called with scene, method, radiance and truth (3, H, W) of each result, of which none is cached then.
        progress: called before each step with its name, the number of scenes done and of all.

    Raises:
        EvaluationError: two methods have the same name, or see `strict`.
    """
    names = [method.name for method in methods]
    if len(set(names)) != len(names):
        raise EvaluationError(f"methods must have different names, got {', '.join(names)}")
    judge = ColorVideoVDP(settings.peak_luminance) if settings.cvvdp else None
    evaluation = Evaluation(settings, methods, [], {name: {} for name in names})
    store = _Cache(None if export else cache, fresh)
    for number, scene_files in enumerate(files):
        progress(scene_files.name, number, len(files))
        scene, scores = _evaluate_scene(number, scene_files, methods, settings, judge, store, export)
        failures = [f"{name}: {result.error}" for name, result in scores.items() if result.error]
        if strict and failures:
            raise EvaluationError(f"--strict: {scene.error or failures[0]}")
        evaluation.scenes.append(scene)
        for name, result in scores.items():
            evaluation.scores[name][scene.name] = result
    progress("", len(files), len(files))
    return evaluation


def _evaluate_scene(
    number: int,
    files: SceneFiles,
    methods: Sequence[Method],
    settings: Settings,
    judge: ColorVideoVDP | None,
    store: "_Cache",
    export: Callable[[str, str, Tensor, Tensor], None] | None,
) -> tuple[Scene, dict[str, Score]]:
    ev_error = settings.ev_error * (-1) ** number
    common = {
        "scene": [stamp(path) for path in files.paths()],
        "settings": {**asdict(settings), "ev_error": ev_error},
    }
    keys = {method.name: {**common, "method": method.identity} for method in methods}
    scene = store.load(Scene, common)
    scores = {name: store.load(Score, key) for name, key in keys.items()}
    if scene is not None and all(scores.values()):
        return scene, {name: result for name, result in scores.items() if result}
    try:
        sample = load_scene(files, series=True)
        regions, measured = _measure(files.name, sample)
    except (ValueError, OSError) as error:
        broken = Scene(files.name, error=str(error))
        return broken, {method.name: Score(error=str(error)) for method in methods}
    if scene is None:
        scene = replace(measured, pictures=scene_pictures(sample, settings.picture_width))
        store.save(scene, common)
    complete = {}
    for method in methods:
        result = scores[method.name]
        if result is None:
            try:
                result = _score(files, sample, method, settings, ev_error, regions, judge, export)
                store.save(result, keys[method.name])
            except (ValueError, OSError) as error:
                result = Score(error=f"scene {files.name}: {error}")
        complete[method.name] = result
    return scene, complete


def _score(
    files: SceneFiles,
    sample: Sample,
    method: Method,
    settings: Settings,
    ev_error: float,
    regions: dict[str, Tensor],
    judge: ColorVideoVDP | None,
    export: Callable[[str, str, Tensor, Tensor], None] | None,
) -> Score:
    evs = _mistaken(sample.evs, sample.reference, ev_error)
    started = time.perf_counter()
    outcome = method.fuse(files, sample.frames, evs, settings.measure)
    radiance = outcome.radiance[0].float().cpu()
    seconds = time.perf_counter() - started
    # The same radiance in units of the short frame's true exposure, which are the truth's.
    unit = 1.0 if outcome.result is None else 2.0 ** (sample.evs[0] - outcome.result.evs[0])
    radiance = radiance * unit
    if export is not None:
        export(files.name, method.name, radiance, sample.truth)
    judged = through_rgbe(radiance) if settings.rgbe else radiance
    scores = score(judged, sample.truth, regions, peak_luminance=settings.peak_luminance)
    if settings.dataset == "ntire21":
        step = sample.evs[1] - sample.evs[0]
        encoded, encoded_truth = (ntire_encode(picture.clamp(min=0), step) for picture in (judged, sample.truth))
        scores["ntire_psnr_mu"], scores["ntire_psnr"] = ntire_scores(encoded, encoded_truth, NTIRE_GAMMA)
    if judge is not None:
        scores["cvvdp"] = judge(judged.clamp(min=0), sample.truth)
    if method.kind == "model" and outcome.result is not None and outcome.result.fusion is not None:
        fused = outcome.result.fusion.fused[0].float().cpu() * unit
        scores["fused_psnr_mu"], scores["fused_psnr_l"] = psnr_mu(fused, sample.truth), psnr_l(fused, sample.truth)
    shown = result_pictures(radiance, sample.truth, outcome.result, settings.picture_width)
    return Score(scores, None, None if method.kind == "predictions" else seconds, shown)


def _measure(name: str, sample: Sample) -> tuple[dict[str, Tensor], Scene]:
    """Masks (H, W) of clipped and moving pixels, and the scene's measures, without pictures."""
    clipped = sample.frames[sample.reference].amax(0) >= CLIPPED_LEVEL
    regions = {"clipped": clipped}
    flow, source = _flow(sample)
    motion = None
    if flow is not None:
        length = torch.linalg.vector_norm(flow, dim=1).amax(0)
        regions["moving"] = length > MOVING_PIXELS
        motion = float(np.percentile(length.numpy(), MOTION_PERCENTILE))
    height, width = sample.frames.shape[2:]
    part = float(clipped.float().mean())
    return regions, Scene(name, None, height, width, sample.evs, part, motion, source)


def _flow(sample: Sample) -> tuple[Tensor | None, str]:
    """Flows (N, 2, H, W) from the reference to the darkest and the brightest other frame, and where they come from."""
    if sample.flow is not None:
        return sample.flow, "true flow"
    ratios, own = exposure_ratios(sample.evs), sample.reference
    others = [number for number in (0, len(ratios) - 1) if number != own]
    try:
        flows = [dis_flow(sample.frames[own], sample.frames[k], ratios[own], ratios[k]) for k in others]
    except ValueError:
        return None, "unknown: no true flow, and OpenCV cannot estimate it"
    return torch.cat(flows), "estimated by DIS"


def _mistaken(evs: tuple[float, ...], reference: int, error: float) -> tuple[float, ...]:
    """EVs whose darker and brighter frames are wrong by `error` stops, away from the reference if it is positive."""
    ways = (-(number < reference) + (number > reference) for number in range(len(evs)))
    return tuple(ev + way * error for ev, way in zip(evs, ways, strict=True))


def _group(value: float, groups: Iterable[tuple[str, float]]) -> str:
    return next(name for name, limit in groups if value < limit)


class _Cache:
    """Results as JSON files, named by a hash of all that they depend on."""

    def __init__(self, folder: Path | None, fresh: bool) -> None:
        self.folder = folder
        self.fresh = fresh
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, kind: type[Any], key: dict[str, Any]) -> Any:
        path = self._path(kind, key)
        if path is None or self.fresh or not path.is_file():
            return None
        try:
            return kind(**json.loads(path.read_text()))
        except (ValueError, TypeError):
            return None  # of another version, or damaged: computed anew

    def save(self, value: Any, key: dict[str, Any]) -> None:
        path = self._path(type(value), key)
        if path is not None:
            write_text(path, json.dumps(asdict(value)))

    def _path(self, kind: type[Any], key: dict[str, Any]) -> Path | None:
        if self.folder is None:
            return None
        text = json.dumps({"version": CACHE_VERSION, "torch": torch.__version__, **key}, sort_keys=True)
        return self.folder / f"{kind.__name__.lower()}-{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
