"""Samples a second of training, on this library's operators and on the reference, and where the time goes.

    python -m bench.training --config panoramas --panoramas PANORAMAS

A step is what `safnet train` does with the same options: loss, gradient, clipping, AdamW and the moving average, on one
batch that is there already. How long crops take to prepare is told apart, as other processes do it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import default_collate

import safnet_ops
from safnet.evaluation.timing import device_name
from safnet.memory import reuse_freed_memory
from safnet.training.crops import CachedScenes, Crop, Crops, open_scenes
from safnet.training.perceptual import VGG16
from safnet.training.run import Training
from safnet.training.settings import TrainSettings, read_configuration

ROUNDS = 5  # of a step on each kind of operators, by turns
# Names of the profiler's events, by what they belong to; the first that fits counts.
PARTS = {
    "group_conv_shuffle": ("group_conv_shuffle",),
    "backward_warp": ("backward_warp",),
    "census_loss": ("census_loss",),
    "convolutions, backward": ("convolution_backward",),
    "convolutions, forward": ("conv",),
    "PReLU": ("prelu",),
    "AdamW, moving average, clipping": ("Optimizer", "_foreach", "adam", "lerp", "norm"),
}


def make_step(module: Training, batch: Crop) -> Callable[[], None]:
    """One training step without Lightning around it."""
    optimizer = module.configure_optimizers()["optimizer"]

    def step() -> None:
        optimizer.zero_grad()
        module.total(module.losses(batch)).backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        module.averaged.update_parameters(module.model)

    return step


def shares(step: Callable[[], None]) -> dict[str, float]:
    """Part of a step's CPU time by what it belongs to."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for event in profiler.key_averages():
        name = next((part for part, words in PARTS.items() if any(word in event.key for word in words)), "the rest")
        seconds[name] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()}


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="panoramas", help="as of `safnet train`")
    parser.add_argument("--panoramas", type=Path, required=True)
    parser.add_argument("--batch", type=int, help="crops a step, instead of the configuration's")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    reuse_freed_memory()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        values = {**read_configuration(options.config), "out": Path(folder), "scenes": None}
        settings = TrainSettings(**{**values, "panoramas": options.panoramas})
        settings = replace(settings, batch=options.batch or settings.batch)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a worker has it
        scenes = open_scenes(settings)
        assert isinstance(scenes, CachedScenes)  # as rendered ones always are
        crops = Crops(scenes, settings)
        rendering = [seconds_of(partial(scenes.scenes.read, number)) for number in range(6)]
        examples = [crops[number] for number in range(settings.batch)]
        cutting = [seconds_of(partial(crops.__getitem__, number)) for number in range(settings.batch)]
        torch.set_num_threads(threads)
    batch: Crop = Crop(*default_collate([tuple(example) for example in examples]))

    # Random weights of the perceptual loss cost what trained ones do.
    vgg16 = VGG16().eval().requires_grad_(False) if settings.perceptual_weight else None
    steps = {name: make_step(Training(settings, None, vgg16=vgg16), batch) for name in ("this library", "reference")}

    def run(name: str) -> None:
        if name == "reference":
            with safnet_ops.use_backend("reference"):
                steps[name]()
        else:
            steps[name]()

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 1):
        for name in steps:
            taken = seconds_of(partial(run, name))
            if turn:  # the first warms up
                seconds[name].append(taken)
    print(f"{options.config}: {settings.model}, {settings.batch} crops of {settings.crop}, ", end="")
    count = settings.windows or (settings.crop // settings.window) ** 2
    refined = "not" if "refine" in settings.left_out else f"{count} windows of {settings.window} of each"
    print(f"{refined} refined; {device_name(torch.device('cpu'))}, {threads} threads")
    print("operators       seconds a step   samples a second")
    for name, times in seconds.items():
        median, quartiles = statistics.median(times), statistics.quantiles(times, n=4, method="inclusive")
        spread = f"{median:.2f} +- {(quartiles[2] - quartiles[0]) / 2:.2f}"
        print(f"{name:<14}  {spread:>14}   {settings.batch / median:.2f}")
    rendered, cut = statistics.median(rendering), statistics.median(cutting)
    print(f"a crop, on one thread: {rendered:.3f} s to render its scene, which {settings.reuse} crops share,")
    print(f"  {cut:.3f} s from a scene that is there")
    columns = {name: shares(partial(run, name)) for name in steps}
    print("share of a step                   " + "".join(f"{name:>14}" for name in columns))
    for part in columns["this library"]:
        print(f"{part:<34}" + "".join(f"{100 * column[part]:>12.1f} %" for column in columns.values()))


if __name__ == "__main__":
    main()
