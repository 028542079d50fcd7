"""The `safnet` command."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

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
    depth: Annotated[
        Literal["half", "float", "uint16"] | None,
        typer.Option(help="Numbers in the result: .exr half or float, .tif float or uint16.", show_default="the first"),
    ] = None,
    preview: Annotated[Path | None, typer.Option(help="Also write a tone-mapped picture: .png or .jpg.")] = None,
    tonemap: Annotated[
        Literal["mu-law", "reinhard"], typer.Option(help="Tone map of preview and inspection.")
    ] = "mu-law",
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
        with _progress_bar() as progress:
            pictures = []
            for number, frame in enumerate(bracket.frames):
                progress("reading", number, len(bracket.frames))
                pictures.append(read_ldr(frame.path))
            tensors = [torch.from_numpy(picture).permute(2, 0, 1)[None] for picture in pictures]
            result = fuse_exposures(
                network, tensors, bracket.evs, tile=tile, precision=getattr(torch, precision), progress=progress
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
    typer.echo(
        f"{width} x {height}, EV {format_evs(bracket.evs)}, {seconds:.1f} s, peak memory {_peak_memory()}: {output}"
    )


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
