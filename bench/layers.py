"""`python -m bench.layers` writes docs/measured/layers.md: where the models' time goes, and how far from its bound it is.

Every operator that a forward calls is timed as the dispatcher calls it, in a workspace, the fastest of several runs.
"""

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import safnet_ops
from bench.measure import OtherLoad, Peaks, machine, measure_peaks, set_threads
from bench.models import HEIGHT, VARIANTS, WIDTH, example_exposures, load
from safnet.files import write_text
from safnet.model import SAFNet

PAGE = Path(__file__).resolve().parent.parent / "docs" / "measured" / "layers.md"
LEAST_SHARE = 0.01  # of the time: shorter calls stand in one row
# Multiplications of a 3x3 convolution by definition for one by F(4x4, 3x3).
SAVED = 4.0
HEAD = """\
# Where the models' time goes

{date}, {facts}.

Both models on pictures of {width}x{height}, float32, all operators of one forward as the dispatcher calls them, the fastest of
{rounds} runs. *GFLOP/s* counts convolutions by definition, two a multiply-add. *bound* is modelled: the time that the
machine would need at least, for moving what is
read and written at {copy:.1f} GB/s (a copy), or for the multiplications at {peak:.0f} GFLOP/s (a
product of matrices), a quarter of those by definition for 3x3 convolutions of stride 1, which
[F(4x4, 3x3)](../operators/group_conv_shuffle.md) leaves; its transforms are not counted. *of bound* is that over the time that
was taken. Other programs took {load} of the processors meanwhile. Made by `python -m bench.layers`.
"""
TABLE = """
## The {variant} model: {milliseconds:.0f} ms

| module | operator | result | calls | ms | share | GFLOP/s | bound | of bound |
|---|---|---|---|---|---|---|---|---|
"""

console = Console(stderr=True, log_path=False)


@dataclass
class Layer:
    """Calls of one operator in one module with results of one shape.

    Attributes:
        seconds: of all calls, in every run.
        multiply_flops: operations that a kernel cannot do without, as far as they are counted.
        moved: bytes read and written.
    """

    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    flops: float = 0.0
    multiply_flops: float = 0.0
    moved: int = 0

    def bound(self, peaks: Peaks) -> float:
        return max(self.moved / peaks.copy, self.multiply_flops / peaks.float32)


Key = tuple[str, str, str]  # module, operator, shape of the result


class Account(TorchDispatchMode):
    """Times what the dispatcher calls, by the module that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.modules: list[str] = []
        self.layers: dict[Key, Layer] = {}

    def watch(self, model: nn.Module) -> None:
        """Keep account of which module is running. Hooks on what holds plain convolutions leave the fast path as it is."""
        for name, module in model.named_modules():
            if not name or isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.PReLU):
                continue
            module.register_forward_pre_hook(lambda _module, _inputs, name=name: self.modules.append(name))
            module.register_forward_hook(lambda _module, _inputs, _result: self._leave())

    def _leave(self) -> None:
        self.modules.pop()

    def begin_run(self) -> None:
        for layer in self.layers.values():
            layer.calls, layer.flops, layer.multiply_flops, layer.moved = 0, 0.0, 0.0, 0
            layer.seconds.append(0.0)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        began = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - began
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.numel()]
        if not results or func.is_view:
            return result
        name = func.overloadpacket.__name__
        key = self.modules[-1] if self.modules else "", name, "x".join(map(str, results[0].shape))
        layer = self.layers.setdefault(key, Layer(seconds=[0.0]))
        layer.calls += 1
        layer.seconds[-1] += seconds
        formula = flop_registry.get(func.overloadpacket)
        flops = float(formula(*args, **(kwargs or {}), out_val=result)) if formula else 0.0
        layer.flops += flops
        layer.multiply_flops += flops / (SAVED if _is_3x3_of_stride_1(name, args) else 1.0)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        layer.moved += sum(tensor.nbytes for tensor in (*read, *results))
        return result


def _is_3x3_of_stride_1(name: str, args: tuple[Any, ...]) -> bool:
    """Of group_conv_shuffle's arguments, as schemas.txt has them."""
    return name == "group_conv_shuffle" and tuple(args[1].shape[2:]) == (3, 3) and args[6] == 1


def account(model: SAFNet, exposures: list[Tensor], rounds: int) -> dict[Key, Layer]:
    """Of `rounds` forwards, after one that warms up."""
    found, memory = Account(), safnet_ops.Workspace()
    found.watch(model)
    with torch.no_grad(), memory:
        model(*exposures)
        for _ in range(rounds):
            found.begin_run()
            with found:
                model(*exposures)
    return found.layers


def table(variant: str, layers: dict[Key, Layer], peaks: Peaks) -> str:
    """Of the layers in the order in which they run; what takes little time in one row."""
    fastest = {key: min(layer.seconds) for key, layer in layers.items()}
    total = sum(fastest.values())
    text = TABLE.format(variant=variant, milliseconds=1e3 * total)
    for key, layer in layers.items():
        if fastest[key] < LEAST_SHARE * total:
            continue
        module, operator, shape = key
        bound = layer.bound(peaks)
        speed = f"{layer.flops / fastest[key] / 1e9:.0f}" if operator == "group_conv_shuffle" else ""
        text += (
            f"| {module} | {operator} | {shape} | {layer.calls} | {1e3 * fastest[key]:.2f} | {fastest[key] / total:.1%} "
            f"| {speed} | {1e3 * bound:.2f} | {bound / fastest[key]:.0%} |\n"
        )
    if small := [key for key in layers if fastest[key] < LEAST_SHARE * total]:
        seconds, bound = sum(fastest[key] for key in small), sum(layers[key].bound(peaks) for key in small)
        calls = sum(layers[key].calls for key in small)
        text += f"| | {len(small)} others | | {calls} | {1e3 * seconds:.2f} | {seconds / total:.1%} "
        text += f"| | {1e3 * bound:.2f} | {bound / seconds:.0%} |\n"
    bound = sum(layer.bound(peaks) for layer in layers.values())
    return text + f"| | all | | | {1e3 * total:.2f} | | | {1e3 * bound:.2f} | {bound / total:.0%} |\n"


def main(
    rounds: Annotated[
        int, typer.Option(min=1, help="Runs of each model, of which each operator's fastest counts.")
    ] = 7,
    output: Annotated[Path, typer.Option(help="The page.")] = PAGE,
) -> None:
    """Write an account of the models' layers."""
    set_threads()
    load_of_others = OtherLoad()
    peaks = measure_peaks()
    exposures = example_exposures()
    tables = []
    for variant in VARIANTS:
        console.log(f"{variant} model")
        tables.append(table(variant, account(load(variant), exposures, rounds), peaks))
    share = load_of_others.share()
    head = HEAD.format(
        date=datetime.date.today(),
        facts=", ".join(f"{key} {value}" for key, value in machine().items()),
        width=WIDTH,
        height=HEIGHT,
        rounds=rounds,
        copy=peaks.copy / 1e9,
        peak=peaks.float32 / 1e9,
        load="an unknown share" if share is None else f"{share:.0%}",
    )
    write_text(output, head + "".join(tables))


if __name__ == "__main__":
    typer.run(main)
