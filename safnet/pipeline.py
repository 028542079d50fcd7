"""From files to files: what `safnet fuse` does, as a function."""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from safnet.avif import BRIGHTEST, check_avif, write_avif
from safnet.choices import ColourSpace, Depth, Ghosts, Look, ToneMap
from safnet.colour import REC709, SPACES, Space, conversion, convert_, parse_curve
from safnet.exposures import Bracket, open_bracket
from safnet.fuse import TILE, Progress, Result, default_tile, fuse_exposures
from safnet.images import (
    AVIF_EXTENSIONS,
    DEPTHS,
    PICTURE_EXTENSIONS,
    RESULT_EXTENSIONS,
    SCREEN_DEPTHS,
    ULTRA_HDR_EXTENSIONS,
    BytePicture,
    FloatPicture,
    ImageError,
    check_destination,
    mask_numbers,
    read_frames,
    read_mask,
    write_picture,
    write_radiance,
)
from safnet.memory import gibibytes, is_out_of_memory, needed_memory
from safnet.model import SAFNet
from safnet.pictures import INSPECTION_FILES, display_curve, inspection, to_picture
from safnet.radiance import Frame, exposure_ratios
from safnet.ultrahdr import write_ultra_hdr
from safnet.weights import load_model

AnyPath = str | os.PathLike[str]


REC709_EXTENSIONS = (".hdr", *ULTRA_HDR_EXTENSIONS)


class FusionWarning(UserWarning):
    """Something that the one who asked for a fusion should know of it."""


def fuse_files(
    paths: AnyPath | Sequence[AnyPath],
    output: AnyPath | None = None,
    *,
    evs: Sequence[float] | None = None,
    reference: AnyPath | None = None,
    measure: bool = True,
    global_motion: bool = True,
    ghosts: Ghosts = "normal",
    fusion_only: bool = False,
    mask: AnyPath | None = None,
    model: SAFNet | AnyPath = "safnet-s",
    device: str = "auto",
    precision: torch.dtype = torch.float32,
    tile: int | None = None,
    memory: int | None = None,
    curve: str = "auto",
    space: ColourSpace = "rec709",
    depth: Depth | None = None,
    preview: AnyPath | None = None,
    tonemap: ToneMap = "photo",
    look: Look = "natural",
    brightness: float = 0.0,
    inspect: AnyPath | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """Fuse two to nine photographs into one linear HDR picture, aligned to one of them, and write what is asked for.

    Nothing is written unless all can be: frames, exposures and names are checked before. Each file appears whole or not at all.

    Args:
        paths: two to nine frames in any order (JPEG, PNG, TIFF, EXR, camera raw, HEIC), or their folder.
        output: .exr, .hdr, .tif or .dng for the linear result, .jpg for Ultra HDR, .avif for HDR screens; None to write none.
        evs: exposures in stops in the order of `paths` (of a folder: by name), more light being higher. None to take them from
            exposure.txt beside the frames, else from EXIF.
        reference: the frame to align to; None for the middle one of three, the best exposed one of others.
        measure: find out the true exposures and the camera's curve, instead of trusting `evs` and assuming gamma 2.2.
        global_motion: look for the motion of the whole camera first, as between handheld frames.
        ghosts, fusion_only: see `fuse_exposures`.
        mask: a painted picture: where it is white the reference alone serves, as it was exposed; greys blend.
        model: one in eval mode, which stays where it is, or what `load_model` takes.
        device: where a model that is loaded here shall run: one of torch's, or "auto" for a GPU if there is one.
        precision, tile, progress: see `fuse_exposures`; here there are the stages "reading" and "writing" too.
        memory: bytes; what would need more is refused before it is begun.
        curve: of the frames' values: "auto" for what each file states (else gamma 2.2), "srgb", "linear" or a gamma.
        space: primaries of the result: "rec709", "p3", "rec2020", or "input" for the frames' own.
        depth: numbers in `output`: "half" or "float" for .exr, "float" or "uint16" for .tif, "uint16" or "half" for .dng; the
            first of these by default.
        preview: .png or .jpg for a tone-mapped picture; None to write none.
        tonemap: of the preview and of the inspection's pictures: "photo", "reinhard" or "mu-law".
        look: of "photo": "natural", "neutral" or "flat".
        brightness: of these pictures, in stops.
        inspect: folder for pictures of flows, masks and all steps, made if missing; None to write none.
        overwrite: replace files that exist.

    Returns:
        Linear radiance (1, 3, H, W) float32 in `space`, on the CPU, where 1 is the short exposure's clipping point;
        colours that lie outside of the space have values outside of [0, 1]. With it exposures and what was noticed, and with
        `inspect` flows, masks and explicit fusion: see `Result`.

    Raises:
        ExposureError: not two to nine frames of one size, or exposures that are missing or equal.
        ImageError: a frame that cannot be read, or a name under which nothing can be written, or that is another file's.
        WeightsError: weights that are missing or do not fit.
        MemoryError: more memory is needed than there is, or than `memory`; the message says how much.
        ValueError: a device that cannot be used.
            All but MemoryError are ValueErrors; messages call arguments by the names of the command's options.

    Warns:
        FusionWarning: frames do not fit together, as `Result.advice` says; the processor lacks arithmetic of that precision.
    """
    frames = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    output, preview, inspect, mask, reference = (
        None if path is None else Path(path) for path in (output, preview, inspect, mask, reference)
    )
    check_look(tonemap, look)
    results = check_destinations(frames, output, depth, preview, inspect, overwrite, mask)
    bracket = open_bracket(frames, evs, results, parse_curve(curve), reference, mask)
    mask_size = None if mask is None else mask_numbers(mask, *bracket.size)
    target = SPACES.get(space, bracket.space)
    if output is not None and output.suffix.lower() in REC709_EXTENSIONS and conversion(target, REC709) is not None:
        raise ImageError(
            f"--space {space} does not fit {output}: {output.suffix} files are of Rec.709; write .exr or .tif"
        )
    network = model if isinstance(model, SAFNet) else load_model(model, device)
    _warn_of_slow_precision(network, precision)
    progress("reading", 0, 1)
    pictures = read_frames(bracket.frames)
    progress("reading", 1, 1)
    height, width = pictures[1].shape[2:]
    bytes_a_number, inspected = pictures[1].dtype.itemsize, inspect is not None
    side = default_tile(next(network.parameters()).device) if tile is None else tile
    suffix = "" if output is None else output.suffix.lower()
    need = needed_memory(
        height, width, len(pictures), bytes_a_number, network.variant, side, inspected, mask_size, suffix
    )
    if memory is not None and need > memory:
        raise MemoryError(
            f"--memory {gibibytes(memory)} is too little: {_say_need(height, width, need, side, inspected)}"
        )
    painted = None if mask is None else read_mask(mask, *bracket.size)
    try:
        result = fuse_exposures(
            network,
            pictures,
            bracket.evs,
            reference=bracket.reference,
            measure=measure,
            known_curve=bracket.has_known_curve,
            global_motion=global_motion,
            ghosts=ghosts,
            fusion_only=fusion_only,
            mask=painted,
            keep_fusion=inspected,
            tile=tile,
            precision=precision,
            progress=progress,
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"out of memory: {_say_need(height, width, need, side, inspected)}") from error
    for sentence in result.advice:
        warnings.warn(sentence, FusionWarning, stacklevel=2)
    convert_(result.radiance, bracket.space, target)
    if results:
        progress("writing", 0, 1)
        tone = partial(
            display_curve,
            kind=tonemap,
            exposure=exposure_ratios(result.evs)[result.reference],
            look=look,
            brightness=brightness,
        )
        _write(result, bracket, pictures, target, output, depth, preview, tone, inspect)
        progress("writing", 1, 1)
    return result


def check_look(tonemap: ToneMap, look: Look) -> None:
    if look != "natural" and tonemap != "photo":
        raise ValueError(f"--look {look} is one of --tonemap photo, got --tonemap {tonemap}")


def check_destinations(
    frames: Sequence[Path],
    output: Path | None,
    depth: Depth | None,
    preview: Path | None,
    inspect: Path | None,
    overwrite: bool,
    mask: Path | None = None,
) -> list[Path]:
    """All files that `fuse_files` will write. Raises ImageError where it may not, or where two are one file."""
    results = {}
    if output is not None:
        check_destination("--output", output, RESULT_EXTENSIONS, overwrite)
        kind = output.suffix.lower()
        if depth is not None and depth not in DEPTHS.get(kind, ()):
            held = SCREEN_DEPTHS.get(kind) or " or ".join(DEPTHS[kind])
            raise ImageError(f"--depth {depth} does not fit {output}: {output.suffix} holds {held}")
        if kind in AVIF_EXTENSIONS:
            check_avif("--output", output)
        results["--output"] = output
    if preview is not None:
        check_destination("--preview", preview, PICTURE_EXTENSIONS, overwrite)
        results["--preview"] = preview
    if inspect is not None:
        if inspect.exists() and not inspect.is_dir():
            raise ImageError(f"--inspect {inspect} is not a folder")
        if not inspect.parent.is_dir():
            raise ImageError(f"--inspect {inspect}: the folder {inspect.parent} does not exist")
        for name in INSPECTION_FILES:
            if inspect.is_dir():
                check_destination("--inspect", inspect / name, PICTURE_EXTENSIONS, overwrite)
            results[f"--inspect {name}"] = inspect / name
    taken = {frame.resolve(): "a frame" for frame in frames}
    read = {} if mask is None else {"--mask": mask}
    for option, path in {**read, **results}.items():
        if (other := taken.setdefault(path.resolve(), option)) != option:
            raise ImageError(f"{option} {path} is {other} too; give it another name")
    return list(results.values())


def _say_need(height: int, width: int, need: int, tile: int, inspected: bool) -> str:
    """How much memory is needed, and which option lowers that."""
    ways = ["without --inspect"] * inspected + [f"with --tile {TILE}"] * (not 0 < tile <= TILE)
    return f"frames of {width} x {height} need about {gibibytes(need)}" + (
        f", less {' or '.join(ways)}" if ways else ""
    )


def _write(
    result: Result,
    bracket: Bracket,
    pictures: Sequence[Frame],
    space: Space,
    output: Path | None,
    depth: Depth | None,
    preview: Path | None,
    tone: Callable[[FloatPicture], Callable[[FloatPicture], BytePicture]],
    inspect: Path | None,
) -> None:
    metadata = bracket.frames[result.reference].metadata
    exposure = exposure_ratios(result.evs)[result.reference]
    kind = "" if output is None else output.suffix.lower()
    if output is not None and kind in DEPTHS:
        write_radiance(output, to_picture(result.radiance), depth, space, metadata, exposure)
    elif output is not None and kind in AVIF_EXTENSIONS:
        _warn_of_clipped(write_avif(output, to_picture(result.radiance), exposure, space, metadata), output)
    if preview is None and inspect is None and kind not in ULTRA_HDR_EXTENSIONS:
        return
    shown = result.radiance
    if conversion(space, REC709) is not None:
        shown = shown.clone()
        convert_(shown, space, REC709)
    radiance = to_picture(shown)
    curve = tone(radiance)
    if output is not None and kind in ULTRA_HDR_EXTENSIONS:
        write_ultra_hdr(output, radiance, exposure, curve(radiance), metadata)
    if preview is not None:
        write_picture(preview, curve(radiance), metadata)
    if inspect is not None:
        assert result.fusion is not None
        convert_(result.fusion.fused, bracket.space, REC709)
        inspect.mkdir(exist_ok=True)
        shown_frames = [0, result.reference, len(pictures) - 1]
        labels = [bracket.frames[number].path.name for number in shown_frames]
        frames = [pictures[number] for number in shown_frames]
        for name, picture in inspection(frames, labels, result, radiance, curve).items():
            write_picture(inspect / name, picture, ())


def _warn_of_clipped(share: float, output: Path) -> None:
    if share:
        warnings.warn(
            f"{max(100 * share, 0.01):.2g} % of the pixels are brighter than {BRIGHTEST:g} cd/m2, which is as far as "
            f"{output.suffix} goes, and are clipped there; .exr holds them",
            FusionWarning,
            stacklevel=4,
        )


def _warn_of_slow_precision(model: SAFNet, precision: torch.dtype) -> None:
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and precision != torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2":
        name = str(precision).removeprefix("torch.")
        warnings.warn(
            f"this CPU has no {name} arithmetic; emulating it takes far longer than float32",
            FusionWarning,
            stacklevel=3,
        )
