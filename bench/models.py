"""The two models end to end: on this library's operators, on the reference, on stock PyTorch, and through compilers."""

import contextlib
import copy
import importlib.util
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._inductor.config
from torch import Tensor

import safnet
import safnet_ops
from bench.baselines import stock_operators
from bench.case import WrongResult
from bench.measure import CPU, Times, in_turns
from safnet.choices import Variant
from safnet.evaluation.timing import peak_memory_of
from safnet.exposures import open_bracket
from safnet.images import read_ldr
from safnet.model import SAFNet
from safnet.radiance import exposure_input, exposure_ratios, tone_map

HEIGHT, WIDTH = 500, 752
VARIANTS: tuple[Variant, ...] = ("full", "small")
TOLERANCE = 2e-3  # of float32 results, which lie in [0, 1], beside the reference operators
LONGEST = 30.0  # seconds of one run; what takes longer is not measured further
LEAST_PSNR = 30.0  # dB of bfloat16 results beside float32: below, the run is wrong rather than coarse
BRACKET = Path(__file__).resolve().parent.parent / "examples" / "bracket"

Run = Callable[[], Tensor]
OURS = "C++ operators"
REFERENCE = "reference operators"


class Unavailable(Exception):
    """A contender that cannot run here, and why."""


@dataclass(frozen=True)
class Contender:
    """A way to run a model.

    Attributes:
        build: makes the run from a model and its three exposures; compiles where it must.
        precision: of the convolutions.
    """

    name: str
    build: Callable[[SAFNet, list[Tensor]], Run]
    precision: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.name}, {str(self.precision).removeprefix('torch.')}"

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """Inference in its precision."""
        with torch.no_grad(), torch.autocast("cpu", self.precision, enabled=self.precision != torch.float32):
            yield


@dataclass(frozen=True)
class Score:
    """A contender's measurement.

    Attributes:
        error: largest difference from the reference operators' result, which lies in [0, 1].
        psnr: the same as PSNR of tone-mapped results, in dB.
        memory: peak bytes beyond what was in use.
    """

    name: str
    precision: torch.dtype
    times: Times
    error: float
    psnr: float
    memory: int | None


def plain(model: SAFNet, exposures: list[Tensor]) -> Run:
    return lambda: model(*exposures)[1]


def keeping_memory(model: SAFNet, exposures: list[Tensor]) -> Run:
    memory = safnet_ops.Workspace()

    def run() -> Tensor:
        with memory:
            return model(*exposures)[1]

    return run


def on_reference(model: SAFNet, exposures: list[Tensor]) -> Run:
    def run() -> Tensor:
        with safnet_ops.use_backend("reference"):
            return model(*exposures)[1]

    return run


def stock(model: SAFNet, exposures: list[Tensor]) -> Run:
    def run() -> Tensor:
        with stock_operators():
            return model(*exposures)[1]

    return run


def stock_channels_last(model: SAFNet, exposures: list[Tensor]) -> Run:
    layout = torch.channels_last
    model = copy.deepcopy(model).to(memory_format=layout)  # type: ignore[call-overload]
    return stock(model, [exposure.contiguous(memory_format=layout) for exposure in exposures])


def compiled(build: Callable[[SAFNet, list[Tensor]], Run]) -> Callable[[SAFNet, list[Tensor]], Run]:
    """torch.compile with freezing: weights become constants, laid out and fused as inductor likes them best."""

    def build_compiled(model: SAFNet, exposures: list[Tensor]) -> Run:
        torch._dynamo.reset()
        fast = torch.compile(copy.deepcopy(model))
        run = build(fast, exposures)  # type: ignore[arg-type]
        with torch._inductor.config.patch(freezing=True):
            run()
        return run

    return build_compiled


def openvino(precision: str) -> Callable[[SAFNet, list[Tensor]], Run]:
    def build(model: SAFNet, exposures: list[Tensor]) -> Run:
        if importlib.util.find_spec("openvino") is None:
            raise Unavailable("the package openvino is not installed (pip install openvino)")
        import openvino as ov

        with stock_operators():
            exported = torch.export.export(copy.deepcopy(model), tuple(exposures))
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        network = ov.compile_model(ov.convert_model(exported), "CPU", options)
        request = network.create_infer_request()
        arrays = [exposure.numpy() for exposure in exposures]

        def run() -> Tensor:
            request.infer(arrays, share_inputs=True)
            return torch.from_numpy(request.get_output_tensor(1).data)

        return run

    return build


def contenders() -> list[Contender]:
    found = [
        Contender(OURS, plain),
        Contender(f"{OURS}, in one Workspace", keeping_memory),
        Contender(OURS, plain, torch.bfloat16),
        Contender(f"{OURS}, in one Workspace", keeping_memory, torch.bfloat16),
        Contender(REFERENCE, on_reference),
        Contender("stock PyTorch", stock),
        Contender("stock PyTorch, channels_last", stock_channels_last),
        Contender("torch.compile + freezing, stock PyTorch", compiled(stock)),
        Contender("torch.compile + freezing, C++ operators", compiled(plain)),
        Contender("OpenVINO, from stock PyTorch", openvino("f32")),
    ]
    if has_fast_bfloat16():
        found += [
            Contender("torch.compile + freezing, stock PyTorch", compiled(stock), torch.bfloat16),
            Contender("OpenVINO, from stock PyTorch", openvino("bf16"), torch.bfloat16),
        ]
    return found


def has_fast_bfloat16() -> bool:
    """Whether this processor has bfloat16 arithmetic; without, the libraries' bfloat16 convolutions take many times longer."""
    return torch.cpu._is_avx512_bf16_supported()


def load(variant: Variant) -> SAFNet:
    """The shipped small model; the full one, for which none are shipped, with random weights: they do not change its time."""
    if variant == "small":
        return safnet.load_model("safnet-s").eval()
    torch.manual_seed(0)
    return SAFNet("full").eval()


def example_exposures() -> list[Tensor]:
    """The example bracket, resized."""
    bracket = open_bracket([BRACKET])
    frames = [torch.from_numpy(read_ldr(frame.path)).movedim(2, 0)[None] for frame in bracket.frames]
    resized = [torch.nn.functional.interpolate(frame, (HEIGHT, WIDTH), mode="bilinear") for frame in frames]
    ratios = exposure_ratios(bracket.evs)
    return [exposure_input(ldr, ratio) for ldr, ratio in zip(resized, ratios, strict=True)]


def compare(variant: Variant, say: Callable[[str], None]) -> tuple[list[Score], dict[str, str]]:
    """Scores of all contenders, each checked against the reference operators, and why others are missing.

    Raises:
        WrongResult: a contender's result is wrong.
    """
    model, exposures = load(variant), example_exposures()
    with torch.no_grad():
        expected = on_reference(model, exposures)()
    runs: dict[Contender, Run] = {}
    checked: dict[Contender, tuple[float, float, int | None]] = {}
    missing = {}
    for contender in contenders():
        say(f"{variant} model: preparing {contender}")
        try:
            with contender.context():
                run = contender.build(model, exposures)
        except Unavailable as reason:
            missing[str(contender)] = str(reason)
            continue
        began = time.perf_counter()
        found = check(contender, run, expected)
        seconds = time.perf_counter() - began
        if seconds > LONGEST:
            missing[str(contender)] = f"one run took {seconds:.0f} s"
            continue
        runs[contender], checked[contender] = run, found
    say(f"{variant} model: measuring {len(runs)} ways by turns")
    works = {str(contender): _timed(contender, run) for contender, run in runs.items()}
    times = in_turns(works, budget=40.0, least=3, most=7)
    scores = [
        Score(contender.name, contender.precision, times[str(contender)], *checked[contender]) for contender in runs
    ]
    return scores, missing


def check(contender: Contender, run: Run, expected: Tensor) -> tuple[float, float, int | None]:
    """Error, PSNR and peak memory of one run; WrongResult where it is not the expected one."""
    result = torch.empty_like(expected)

    def once() -> None:
        with contender.context():
            result.copy_(run())

    memory = peak_memory_of(once, CPU)
    error = (result - expected).abs().max().item()
    squared = (tone_map(result) - tone_map(expected)).square().mean().item()
    psnr = math.inf if squared == 0 else -10 * math.log10(squared)
    right = error < TOLERANCE if contender.precision == torch.float32 else psnr > LEAST_PSNR
    if not right:
        raise WrongResult(f"{contender}: off by {error:.1e}, {psnr:.1f} dB: its speed does not matter")
    return error, psnr, memory


def _timed(contender: Contender, run: Run) -> Callable[[], Callable[[], object]]:
    def timed() -> None:
        with contender.context():
            run()

    def prepare() -> Callable[[], object]:
        # Whoever comes after a long run finds caches cold and the system's free pages handed back: that is no steady state.
        timed()
        return timed

    return prepare
