"""The settings of a training run: one place for their names, defaults, explanations and limits.

`safnet train` has an option for each; a YAML file holds them under the same names.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from safnet.choices import DatasetName, Precision, Variant
from safnet.files import write_text

PARTS = (
    "mask",
    "flow",
    "fused",
    "refine",
)  # of the model, which training can do without: see `safnet.training.ablation`
CROP_MULTIPLE = 32  # so that the halved crop has whole cells at every level
CONFIGURATIONS = Path(__file__).parent / "configs"
CONFIGURATION = "config.yaml"  # of a run, in its folder
# What a resumed run may change: where and how it runs, but not what it learns.
CHANGEABLE = (
    *("out", "steps", "scenes", "panoramas", "validation", "vgg16", "cache", "validate_every", "checkpoint_minutes"),
    *("device", "devices", "nodes", "strategy", "precision", "threads", "workers"),
)


class TrainingError(ValueError):
    """A setting, or a folder, with which no training can start."""


class Explained(NamedTuple):
    """A setting's explanation, and the group in which it is listed."""

    text: str
    group: str


DATA, MODEL, LOSS, SCHEDULE, MACHINE = "Data", "Model", "Loss", "Schedule", "Machine"


@dataclass(frozen=True)
class TrainSettings:
    """How a model is trained; the defaults are the paper's recipe where it tells."""

    out: Annotated[Path, Explained("Folder of the run; one that is there already is gone on with.", DATA)]
    scenes: Annotated[Path | None, Explained("Data set, or folder of scenes in its layout.", DATA)] = None
    dataset: Annotated[
        DatasetName,
        Explained("Layout of --scenes and --validation.", DATA),
    ] = "kalantari17"
    panoramas: Annotated[
        Path | None, Explained("HDR panoramas to make scenes from while training, instead of --scenes.", DATA)
    ] = None
    reuse: Annotated[int, Explained("Crops that are taken of each scene made from panoramas, in the mean.", DATA)] = 4
    cache: Annotated[
        Path | None,
        Explained("Folder for decoded or rendered scenes; for --panoramas OUT/cache unless given.", DATA),
    ] = None
    validation: Annotated[Path | None, Explained("Held-out scenes to score.", DATA)] = None
    crop: Annotated[int, Explained("Side of the crops, a multiple of 32.", DATA)] = 512
    shift: Annotated[
        float, Explained("Pixels by which crops of the outer frames are moved at random, at most.", DATA)
    ] = 0.0
    orders: Annotated[
        Literal["all", "given"],
        Explained("Orders of exposure, where the data has others: all six of challenge123, both of panoramas.", DATA),
    ] = "all"

    model: Annotated[Variant, Explained("SAFNet or SAFNet-S.", MODEL)] = "full"
    without: Annotated[str, Explained(f"Parts to leave out, with commas: {', '.join(PARTS)}.", MODEL)] = ""
    start: Annotated[Path | None, Explained("Weights to start from, where names and shapes fit.", MODEL)] = None
    initialisation: Annotated[
        Literal["matching", "kaiming", "torch"],
        Explained(
            "Weights of a fresh model: comparing the frames, Kaiming's, or torch's, which lose the signal.", MODEL
        ),
    ] = "kaiming"
    window: Annotated[int, Explained("Side of the windows that are refined; divides --crop.", MODEL)] = 128
    windows: Annotated[int, Explained("Windows of each crop that are refined, drawn at random; 0 for all.", MODEL)] = 0
    warp: Annotated[
        Literal["window", "crop"],
        Explained("Where the refine module's inputs are warped: within each window, or before it is cut.", MODEL),
    ] = "window"

    fused_weight: Annotated[float, Explained("Of the explicit fusion's loss beside the refined result's.", LOSS)] = 0.1
    census_weight: Annotated[float, Explained("Of the census loss of the explicit fusion.", LOSS)] = 1.0
    psnr_weight: Annotated[float, Explained("Of the logarithm of the result's squared error.", LOSS)] = 0.0
    perceptual_weight: Annotated[float, Explained("Of the perceptual loss of the refined result.", LOSS)] = 0.01
    vgg16: Annotated[Path | None, Explained("VGG16's weights (torchvision's .pth) for the perceptual loss.", LOSS)] = (
        None
    )
    flow_weight: Annotated[float, Explained("Of the true flow, where scenes have it.", LOSS)] = 0.01

    steps: Annotated[int, Explained("Steps in all.", SCHEDULE)] = 200000
    batch: Annotated[int, Explained("Crops a step, over all processes.", SCHEDULE)] = 8
    learning_rate: Annotated[float, Explained("Of Adam, after the warm-up.", SCHEDULE)] = 2e-4
    last_learning_rate: Annotated[float, Explained("At the last step; in between it falls on a cosine.", SCHEDULE)] = (
        1e-5
    )
    warm_up: Annotated[int, Explained("Steps until the learning rate is reached.", SCHEDULE)] = 100
    refine_last_rate: Annotated[
        float, Explained("Learning rate of the refine module's last layer, relative to the others'.", SCHEDULE)
    ] = 0.03
    encoder_rate: Annotated[
        float,
        Explained("Learning rate of the encoder, relative to the others'; below 1 keeps given weights.", SCHEDULE),
    ] = 1.0
    weight_decay: Annotated[float, Explained("Of AdamW, on the convolutions' weights; 0 is Adam.", SCHEDULE)] = 0.0
    gradient_clip: Annotated[float, Explained("Largest norm of the gradient, 0 for any.", SCHEDULE)] = 0.5
    ema_decay: Annotated[
        float, Explained("Of the moving average that is kept as the model; 0 keeps the last weights.", SCHEDULE)
    ] = 0.998
    validate_every: Annotated[int, Explained("Steps between validations.", SCHEDULE)] = 1000
    checkpoint_minutes: Annotated[
        float, Explained("Minutes between checkpoints: what a killed run loses at most.", SCHEDULE)
    ] = 5.0
    seed: Annotated[int, Explained("Of weights, scenes, crops and augmentation.", SCHEDULE)] = 0

    device: Annotated[Literal["auto", "cpu", "cuda"], Explained("auto: GPUs if there are any.", MACHINE)] = "auto"
    devices: Annotated[int, Explained("Processes, or GPUs, on each machine.", MACHINE)] = 1
    nodes: Annotated[int, Explained("Machines.", MACHINE)] = 1
    strategy: Annotated[str, Explained("Lightning's name of how processes work together: auto, ddp, ...", MACHINE)] = (
        "auto"
    )
    precision: Annotated[Precision, Explained("Arithmetic of the convolutions.", MACHINE)] = "float32"
    threads: Annotated[int, Explained("CPU threads, 0 for all cores.", MACHINE)] = 0
    workers: Annotated[int, Explained("Processes that prepare crops, for each training process.", MACHINE)] = 1

    @property
    def left_out(self) -> tuple[str, ...]:
        """The parts of the model that `without` names."""
        return tuple(part.strip() for part in self.without.split(",") if part.strip())

    @property
    def processes(self) -> int:
        return self.devices * self.nodes


def check_values(settings: TrainSettings) -> None:
    """Raise TrainingError for a value that cannot be, naming its option."""
    for name, least in LEAST.items():
        value = getattr(settings, name)
        if not value >= least:  # NaN too
            raise TrainingError(f"{option(name)} must be at least {least}, got {value}")
    if settings.crop % CROP_MULTIPLE:
        raise TrainingError(f"--crop must be a multiple of {CROP_MULTIPLE}, got {settings.crop}")
    if settings.crop % settings.window:
        raise TrainingError(f"--window must divide --crop {settings.crop}, got {settings.window}")
    if settings.windows > (count := (settings.crop // settings.window) ** 2):
        raise TrainingError(f"--windows must be at most the {count} of a crop, got {settings.windows}")
    if not 0 < settings.learning_rate < 1:
        raise TrainingError(f"--learning-rate must be between 0 and 1, got {settings.learning_rate}")
    if settings.last_learning_rate > settings.learning_rate:
        limit = f"--learning-rate {settings.learning_rate}"
        raise TrainingError(f"--last-learning-rate must be at most {limit}, got {settings.last_learning_rate}")
    if not settings.ema_decay < 1:
        raise TrainingError(f"--ema-decay must be below 1, got {settings.ema_decay}")
    if unknown := [part for part in settings.left_out if part not in PARTS]:
        raise TrainingError(f"--without must name parts of {', '.join(PARTS)}, got {unknown[0]!r}")
    if settings.batch % settings.processes:
        share = f"{settings.devices} devices x {settings.nodes} nodes"
        raise TrainingError(f"--batch must be a multiple of {share}, got {settings.batch}")
    if (settings.scenes is None) == (settings.panoramas is None):
        given = "both" if settings.scenes else "neither"
        raise TrainingError(f"either --scenes or --panoramas must be given, got {given}")
    if settings.out.exists() and not settings.out.is_dir():
        raise TrainingError(f"--out {settings.out} is not a folder")


LEAST = {
    **dict.fromkeys(("steps", "batch", "reuse", "validate_every", "devices", "nodes", "window"), 1),
    **dict.fromkeys(("fused_weight", "census_weight", "psnr_weight", "perceptual_weight", "flow_weight"), 0),
    **dict.fromkeys(
        ("windows", "warm_up", "refine_last_rate", "encoder_rate", "gradient_clip", "ema_decay", "checkpoint_minutes"),
        0,
    ),
    **dict.fromkeys(("last_learning_rate", "weight_decay", "shift", "threads", "workers", "seed"), 0),
    "crop": CROP_MULTIPLE,
}


def option(name: str) -> str:
    """The command line's name of a setting."""
    return f"--{name.replace('_', '-')}"


# ---- configuration files ---------------------------------------------------------------------------------------------


def read_configuration(name: str) -> dict[str, Any]:
    """Settings by name from a YAML file; null counts as not given.

    Args:
        name: a file, or the name of one of the shipped configurations, such as "ablation/no-mask".

    Raises:
        TrainingError: no such file, no YAML mapping, an unknown setting, or a value of another type.
    """
    import yaml  # only the extra `train` has it

    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIGURATIONS / f"{name}.yaml"
        if not path.is_file():
            shipped = sorted(str(p.relative_to(CONFIGURATIONS).with_suffix("")) for p in CONFIGURATIONS.rglob("*.yaml"))
            raise TrainingError(f"--config must be a .yaml file or one of {', '.join(shipped)}, got {name!r}")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TrainingError(f"--config {path} must hold settings, such as 'steps: 1000', got {content!r}")
    hints = get_type_hints(TrainSettings)
    values = {}
    for key, value in content.items():
        setting = str(key).replace("-", "_")
        if setting not in hints:
            raise TrainingError(f"--config {path}: unknown setting {key!r} (value {value!r})")
        if value is not None:
            try:
                values[setting] = _convert(value, hints[setting])
            except (TypeError, ValueError) as error:
                raise TrainingError(f"--config {path}: {key} must be {error}, got {value!r}") from None
    return values


def _convert(value: Any, kind: Any) -> Any:
    """A YAML value as a setting's type; the error says what it must be."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"one of {', '.join(get_args(kind))}")
        return value
    kind = next((part for part in get_args(kind) if part is not type(None)), kind)
    if kind is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML takes 2e-4 for text
        except (TypeError, ValueError):
            raise TypeError("a number") from None
    if kind in (str, Path) and isinstance(value, str):
        return kind(value)
    if type(value) is not kind:
        raise TypeError({int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text"))
    return value


def write_configuration(settings: TrainSettings, path: Path) -> None:
    """Write all settings so that `read_configuration` reads them, whole or not at all."""
    import yaml

    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()}
    write_text(path, yaml.safe_dump({name.replace("_", "-"): v for name, v in plain.items()}, sort_keys=False))
