"""The `safnet` command."""

import inspect
import resource
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer

app = typer.Typer(help="Fuse three exposures of a moving scene into one HDR picture.", no_args_is_help=True)

BAD_INPUT = 2  # exit code


@app.callback()
def main() -> None:
    """SAFNet: three exposures of a moving scene become one HDR picture."""


@app.command()
def fuse(
    frames: Annotated[
        list[Path], typer.Argument(help="Three frames in any order (JPEG, PNG, TIFF, EXR), or their folder.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Linear HDR result: .exr, .hdr or .tif.")],
    ev: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Exposures in stops in the order of the frames (of a folder: by name), more light = higher."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure/--trust", help="Measure exposures and camera curve, or trust EVs and gamma 2.2."),
    ] = True,
    depth: Annotated[
        Literal["half", "float", "uint16"] | None,
        typer.Option(help="Numbers in the result: .exr half or float, .tif float or uint16.", show_default="the first"),
    ] = None,
    preview: Annotated[Path | None, typer.Option(help="Also write a tone-mapped picture: .png or .jpg.")] = None,
    tonemap: Annotated[
        Literal["mu-law", "reinhard"], typer.Option(help="Tone map of preview and inspection.")
    ] = "reinhard",
    inspect: Annotated[
        Path | None,
        typer.Option(help="Also write flows, masks, explicit fusion and a sheet of all steps to this folder."),
    ] = None,
    model: Annotated[str, typer.Option(help="safnet, safnet-s, or a .safetensors or .pth file.")] = "safnet-s",
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Arithmetic of the convolutions.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")] = None,
    tile: Annotated[
        int | None, typer.Option(min=0, help="Tile side in pixels, 0 for none.", show_default="1024 above 2 megapixels")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing results.")] = False,
) -> None:
    """Fuse three exposures of a moving scene into one linear HDR picture, aligned to the middle exposure.

    Exposures come from --ev, else from exposure.txt beside the frames (one EV a line, by file name), else from EXIF.
    """
    started = time.perf_counter()
    with _one_line_errors():
        import torch

        from safnet.exposures import format_evs, open_bracket
        from safnet.fuse import fuse_exposures
        from safnet.images import read_ldr, write_picture, write_radiance
        from safnet.pictures import display_curve, inspection, to_picture

        results = _check_destinations(frames, output, depth, preview, inspect, overwrite)
        bracket = open_bracket(frames, ev, results)
        network = _load(model, device)
        if threads is not None:
            torch.set_num_threads(threads)
        _note_slow_precision(network, precision)
        with _progress_bar() as progress:
            pictures = []
            for number, frame in enumerate(bracket.frames):
                progress("reading", number, len(bracket.frames))
                pictures.append(read_ldr(frame.path))
            tensors = [torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in pictures]
            result = fuse_exposures(
                network,
                tensors,
                bracket.evs,
                measure=measure,
                tile=tile,
                precision=getattr(torch, precision),
                progress=progress,
            )
            progress("writing", 0, 1)
            radiance = to_picture(result.radiance)
            write_radiance(output, radiance, depth)
            if preview or inspect:
                curve, profile = display_curve(radiance, tonemap), bracket.frames[1].profile
                if preview:
                    write_picture(preview, curve(radiance), profile)
                if inspect:
                    inspect.mkdir(exist_ok=True)
                    labels = [frame.path.name for frame in bracket.frames]
                    for name, picture in inspection(pictures, labels, result, curve).items():
                        write_picture(inspect / name, picture)
            progress("writing", 1, 1)
    width, height = bracket.size
    seconds = time.perf_counter() - started
    exposures, measured = f"EV {format_evs(bracket.evs)}", f"EV {format_evs(result.evs)}"
    if measured != exposures:
        exposures += f" (measured: {measured})"
    if result.curve is not None:
        exposures += ", camera curve measured"
    typer.echo(f"{width} x {height}, {exposures}, {seconds:.1f} s, peak memory {_peak_memory()}: {output}")


@app.command()
def evaluate(
    dataset: Annotated[
        Literal["kalantari17", "challenge123", "tel23", "ntire21", "folder"], typer.Option(help="Layout of the scenes.")
    ],
    root: Annotated[Path, typer.Option(help="Folder of the data set, or of its scenes.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="safnet, safnet-s, or a weights file; repeatable.", show_default="safnet-s if no method is given"
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="reference, unaligned, homography or dis, the last three also with +mask; or all; repeatable."
        ),
    ] = None,
    predictions: Annotated[
        list[Path] | None, typer.Option(help="Folder of another method's SCENE.hdr, .exr or float .tif; repeatable.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Folder for report.html, scores.csv, scores.json, and results to resume from.")
    ] = None,
    split: Annotated[
        Literal["Test", "Training"], typer.Option(help="Subfolder of the data set, if it has them.")
    ] = "Test",
    export_matlab: Annotated[
        Path | None,
        typer.Option(help="Folder for results and truths as .hdr files, and a MATLAB script that scores them."),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a scene that cannot be scored.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compute anew what an earlier run left in --save.")] = False,
    rgbe: Annotated[bool, typer.Option("--rgbe", help="Score results as .hdr files would hold them.")] = False,
    cvvdp: Annotated[bool, typer.Option("--cvvdp", help="Score with ColorVideoVDP too.")] = False,
    peak_luminance: Annotated[
        float, typer.Option(min=1.0, max=10000.0, help="cd/m2 of the value 1, for PU21 and ColorVideoVDP.")
    ] = 1000.0,
    ev_error: Annotated[
        float, typer.Option(min=-2.0, max=2.0, help="Give the methods EVs of the outer frames that are wrong by this.")
    ] = 0.0,
    measure: Annotated[
        bool, typer.Option("--measure", help="Let models and baselines measure exposures and camera curve.")
    ] = False,
    timing_runs: Annotated[int, typer.Option(min=0, help="Timed runs of each model, 0 for none.")] = 5,
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Arithmetic of the convolutions.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")] = None,
    tile: Annotated[
        int | None, typer.Option(min=0, help="Tile side in pixels, 0 for none.", show_default="1024 above 2 megapixels")
    ] = None,
) -> None:
    """Score models, baselines and other methods' results on a data set, and write a report."""
    with _one_line_errors():
        import torch
        from rich.console import Console

        from safnet.data.datasets import find_scenes
        from safnet.evaluation.baselines import BASELINES
        from safnet.evaluation.matlab import MatlabExport
        from safnet.evaluation.report import (
            Run,
            describe_environment,
            now,
            print_tables,
            write_csv,
            write_html,
            write_json,
        )
        from safnet.evaluation.run import BaselineMethod, Method, ModelMethod, PredictionMethod, Settings, weights_hash
        from safnet.evaluation.run import evaluate as score_methods
        from safnet.evaluation.timing import time_model
        from safnet.weights import weights_path

        started = now()
        if threads is not None:
            torch.set_num_threads(threads)
        scenes = find_scenes(dataset, root, split)
        if model is None and not baseline and not predictions:
            model = ["safnet-s"]
        models = [
            ModelMethod(Path(name).stem, _load(name, device), weights_hash(weights_path(name)), precision, tile)
            for name in model or []
        ]
        chosen = [part for name in baseline or [] for part in (BASELINES if name == "all" else [name])]
        methods: list[Method] = [*models, *(BaselineMethod(name) for name in chosen)]
        methods += [PredictionMethod(folder.name, folder, scenes) for folder in predictions or []]
        if save is not None:
            save.mkdir(parents=True, exist_ok=True)
        width = 720 if len(scenes) <= 40 else 480
        settings = Settings(dataset, ev_error, measure, rgbe, cvvdp, peak_luminance, width)
        with _progress_bar() as progress:
            evaluation = score_methods(
                scenes,
                methods,
                settings,
                cache=save / "cache" if save else None,
                fresh=fresh,
                strict=strict,
                export=MatlabExport(export_matlab) if export_matlab else None,
                progress=progress,
            )
            readable = [scene for scene in evaluation.scenes if not scene.error]
            timings = {}
            for number, method in enumerate(models if readable and timing_runs else []):
                progress(f"timing {method.name}", number, len(models))
                size = readable[0].height, readable[0].width
                timings[method.name] = time_model(
                    method.model, *size, runs=timing_runs, tile=tile, precision=getattr(torch, precision)
                )
        where = next(models[0].model.parameters()).device if models else torch.device("cpu")
        command = shlex.join(["safnet", *sys.argv[1:]])
        seconds = (now() - started).total_seconds()
        run = Run(command, str(root), split, started, seconds, timings, describe_environment(where))
        if save is not None:
            write_csv(save / "scores.csv", evaluation)
            write_json(save / "scores.json", evaluation, run)
            write_html(save / "report.html", evaluation, run)
        # A table that is piped into a file needs no line breaks at 80 characters.
        print_tables(evaluation, run, Console(width=None if sys.stdout.isatty() else 160))
        if not readable or not any(evaluation.mean(method.name).used for method in methods):
            raise ValueError(f"none of the {len(scenes)} scenes in {root} could be scored")
    if save is not None:
        typer.echo(f"{save / 'report.html'}, scores.csv, scores.json")


@app.command()
def synthesize(
    panoramas: Annotated[Path, typer.Argument(help="Folder of equirectangular HDR panoramas: .hdr, .exr.")],
    output: Annotated[Path, typer.Argument(help="Scenes go to its subfolder Training, or Test for validation.")],
    count: Annotated[int, typer.Option(help="Scenes to write.")] = 1000,
    size: Annotated[tuple[int, int], typer.Option(help="Width and height in pixels.")] = (320, 320),
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same scenes.")] = 0,
    split: Annotated[
        Literal["all", "train", "validation"], typer.Option(help="Every seventh panorama by name is for validation.")
    ] = "all",
    ev_step: Annotated[tuple[float, float], typer.Option(help="Least and most stops between frames.")] = (
        1.0,
        3.0,
    ),
    clipped: Annotated[tuple[float, float], typer.Option(help="Clipped part of the reference frame.")] = (0.0, 0.35),
    motion: Annotated[tuple[float, float], typer.Option(help="Pixels that objects move.")] = (0.0, 130.0),
    exact: Annotated[
        bool,
        typer.Option("--exact", help="A camera as the protocol assumes: exact EVs, gamma 2.2, low noise."),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")] = None,
) -> None:
    """Write training or validation scenes with known truth, made from HDR panoramas, in Kalantari17's layout."""
    with _one_line_errors():
        import torch

        from safnet.data.scenes import SceneSettings
        from safnet.data.scenes import synthesize as write_scenes

        if threads is not None:
            torch.set_num_threads(threads)
        ranges = SceneSettings(size[1], size[0], ev_step=ev_step, clipped=clipped, motion=motion)
        with _progress_bar() as progress:
            folder = write_scenes(
                panoramas,
                output,
                count,
                ranges.exact() if exact else ranges,
                split=split,
                seed=seed,
                progress=lambda done, total: progress("scenes", done, total),
            )
    typer.echo(f"{count} scenes of {size[0]} x {size[1]}: {folder}")


@app.command("fit-refine")
def fit_refine(
    scenes: Annotated[
        list[Path], typer.Argument(help="Folders of scenes with truth, or of data sets: their training scenes.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Weights file to write: .safetensors.")],
    model: Annotated[str, typer.Option(help="Model whose flows and masks are kept.")] = "safnet-s",
    variant: Annotated[
        Literal["full", "small"] | None, typer.Option(help="Kind of model to write.", show_default="the model's")
    ] = None,
    dataset: Annotated[
        Literal["kalantari17", "challenge123", "tel23", "ntire21", "folder"], typer.Option(help="Layout of the scenes.")
    ] = "kalantari17",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ... or auto: a GPU if there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Make a model's refine module a second merge that fits scenes best, by least squares: no training needed."""
    with _one_line_errors():
        import torch

        from safnet.data.datasets import find_scenes
        from safnet.model import SAFNet
        from safnet.training.crops import Whole
        from safnet.training.second_merge import fit_second_merge
        from safnet.weights import save_model, take_fitting

        if output.suffix != ".safetensors":
            raise ValueError(f"--output must end in .safetensors, got {str(output)!r}")
        if output.exists() and not overwrite:
            raise ValueError(f"--output {str(output)!r} exists; --overwrite replaces it")
        if not output.parent.is_dir():
            raise ValueError(f"--output {str(output)!r}: the folder {str(output.parent)!r} does not exist")
        if threads is not None:
            torch.set_num_threads(threads)
        files = [scene for folder in scenes for scene in find_scenes(dataset, folder, "Training")]
        for scene in files:
            scene.check()
        network = _load(model, device)
        network_device = next(network.parameters()).device
        if variant not in (None, network.variant):
            start, network = network, SAFNet(variant).to(network_device).eval()
            take_fitting(network, start)
        pictures = Whole(files)

        with _progress_bar() as progress:

            def read() -> Iterator[tuple[Any, Any]]:
                for number in range(len(pictures)):
                    progress("scenes", number, len(pictures))
                    exposures, truth = pictures[number]
                    yield exposures.to(network_device), truth.to(network_device)

            count = fit_second_merge(network, read())
        save_model(network, output)
    typer.echo(f"{output}: refine module fitted to {count} scenes")


def _read_settings(context: typer.Context, name: str | None) -> str | None:
    """Make a configuration file's values the defaults of the command's options."""
    if name is not None:
        from safnet.training.settings import read_configuration

        with _one_line_errors():
            context.default_map = read_configuration(name)
    return name


def train(config: str | None = None, **options: Any) -> None:
    """Train a model; a run that was stopped goes on with the same command.

    All options may also stand in a YAML file that --config names; those on the command line win.
    """
    with _one_line_errors():
        from safnet.training.settings import TrainSettings

        try:
            from safnet.training.run import train as run
        except ImportError as error:
            raise ValueError(f"training needs more packages ({error}); pip install 'safnet-ops[train]'") from error
        settings = TrainSettings(**options)
        finished = run(settings)
    if finished.signal:
        typer.echo(f"stopped and saved at step {finished.steps}; the same command goes on", err=True)
        raise typer.Exit(128 + finished.signal)
    typer.echo(f"{finished.steps} steps: {settings.out / 'model.safetensors'}")


def _offer_settings(command: Any) -> None:
    """Give a command `config` and an option for each training setting, and make it part of the app."""
    from safnet.training.settings import TrainSettings

    hints = get_type_hints(TrainSettings, include_extras=True)
    annotations: dict[str, Any] = {
        "config": Annotated[
            str | None,
            typer.Option(callback=_read_settings, is_eager=True, help="YAML file, or name of a shipped configuration."),
        ]
    }
    defaults: dict[str, Any] = {"config": None}
    for field in fields(TrainSettings):
        kind, explained = get_args(hints[field.name])
        annotations[field.name] = Annotated[kind, typer.Option(help=explained.text, rich_help_panel=explained.group)]
        defaults[field.name] = inspect.Parameter.empty if field.default is MISSING else field.default
    command.__annotations__ = annotations
    command.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=defaults[name])
            for name, kind in annotations.items()
        ]
    )
    app.command()(command)


_offer_settings(train)


def _check_destinations(
    frames: list[Path], output: Path, depth: Any, preview: Path | None, inspect: Path | None, overwrite: bool
) -> list[Path]:
    """All files that will be written, after making sure that they may."""
    from safnet.images import DEPTHS, PICTURE_EXTENSIONS, ImageError, check_destination
    from safnet.pictures import INSPECTION_FILES

    check_destination("--output", output, DEPTHS, overwrite)
    formats = DEPTHS[output.suffix.lower()]
    if depth is not None and depth not in formats:
        raise ImageError(f"--depth {depth} does not fit {output}: {output.suffix} holds {' or '.join(formats)}")
    results = {"--output": output}
    if preview is not None:
        check_destination("--preview", preview, PICTURE_EXTENSIONS, overwrite)
        results["--preview"] = preview
    if inspect is not None:
        if inspect.exists() and not inspect.is_dir():
            raise ImageError(f"--inspect {inspect} is not a folder")
        if not inspect.parent.is_dir():
            raise ImageError(f"--inspect {inspect}: the folder {inspect.parent} does not exist")
        for name in INSPECTION_FILES if inspect.is_dir() else ():
            check_destination("--inspect", inspect / name, PICTURE_EXTENSIONS, overwrite)
            results[f"--inspect {name}"] = inspect / name
    taken = {frame.resolve(): "a frame" for frame in frames}
    for option, path in results.items():
        if (other := taken.setdefault(path.resolve(), option)) != option:
            raise ImageError(f"{option} {path} is {other} too; give it another name")
    return list(results.values())


def _load(name: str, device: str) -> Any:
    import torch

    from safnet.weights import load_model

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(name)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used: {error}") from error


def _note_slow_precision(network: Any, precision: str) -> None:
    import torch

    on_cpu = next(network.parameters()).device.type == "cpu"
    if on_cpu and precision != "float32" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        typer.echo(
            f"note: this CPU has no {precision} arithmetic; emulating it takes far longer than float32", err=True
        )


@contextmanager
def _progress_bar() -> Iterator[Any]:
    """Yields a function (stage, steps done, steps in all) that moves a bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")
        yield lambda stage, done, total: bar.update(task, description=stage, completed=done, total=total)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Bad input ends the command with one line on stderr and exit code 2."""
    import torch

    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(BAD_INPUT) from error
    except torch.OutOfMemoryError as error:
        typer.echo("error: out of memory; try a smaller --tile, --precision bfloat16 or --model safnet-s", err=True)
        raise typer.Exit(1) from error


def _peak_memory() -> str:
    import torch

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, KiB on Linux
    text = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        text += f" + {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on the GPU"
    return text


if __name__ == "__main__":
    app()
