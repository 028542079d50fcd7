"""Writes docs/measured/features.md, what of PyTorch works with every operator on every backend, by trying each cell.

    python -m tools.features                                        # the whole page; needs nvcc, Triton and no GPU
    python -m tools.features --backend cpp --feature vmap --operator backward_warp  # print some cells, write nothing

A cell *works* where values and gradients are those of PyTorch's own functions (`tools/definitions.py`); it is *refused* where
the call ends with an error that names operator and argument. All else *fails*, a silent wrong value above all, and ends the
command with status 1. The CUDA kernels are executed on the CPU by `simulated_gpu`, in the place of the C++ kernels, so that the
dispatcher, torch.compile and torch.export lead to them; the Triton kernels run on CPU tensors by `ptxsim`.
"""

import argparse
import contextlib
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import ptxsim
import safnet_ops
from operator_inputs import census_inputs, conv_inputs, fusion_inputs, random_flow, upsample_inputs, warp_inputs
from safnet_ops.operators import OPERATORS
from tools import definitions

PAGE = Path(__file__).resolve().parent.parent / "docs" / "measured" / "features.md"
SIZE, OTHER_SIZES = (4, 6), ((5, 9), (7, 4))  # height, width: traced, and what a traced program must also take
# Largest error, as a share of the largest value. float64 would not hold if anything were computed in float32.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
DIFFERENCES = 1e-6  # of derivatives beside central differences
WORKS, REFUSED, FAILS, NOT_TRIED = "works", "refused", "fails", "not tried"
BY_PYTORCH = "without a kernel: by PyTorch's own functions, or by ONNX's"

Function = Callable[..., Any]
Pair = tuple[Any, Any, float]  # found, expected, tolerance


class NotTried(Exception):
    """Why a cell cannot be tried."""


class WrongValueError(Exception):
    """A call gave something else than it must."""


# Operators


@dataclass(frozen=True)
class Call:
    """An operator as a function of tensors, all of which can have gradients, and the same by PyTorch's own functions."""

    operator: str
    ours: Function
    stock: Function
    make: Callable[..., list[Tensor]]  # of (size, n=, dtype=)
    registered: Callable[..., tuple[Any, ...]] | None = None  # the registered operator's arguments
    parameters: tuple[int, ...] = ()  # places of what is no picture

    def inputs(
        self, dtype: torch.dtype = torch.float64, size: tuple[int, int] = SIZE, n: int = 2, seed: int = 0
    ) -> list:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make(size, n=n, dtype=dtype)

    def of_operator(self, backend: "Backend") -> Function:
        """The registered operator, of the same inputs."""
        if self.registered is None:
            raise NotTried(f"{self.operator} is made of other operators and is not registered")
        if backend.namespace is None:
            raise NotTried("the reference backend has no registered operators")
        operator, arguments = getattr(getattr(torch.ops, backend.namespace), self.operator), self.registered
        convolution = self.operator == "group_conv_shuffle"  # whose second result is for the backward operator
        return lambda *x: operator(*arguments(*x))[0] if convolution else operator(*arguments(*x))


def make_conv(size: tuple[int, int], n: int, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    return conv_inputs(size, (4, 6), 2, n=n, dtype=dtype, exact=True, **options)


def make_frames(
    size: tuple[int, int], n: int, dtype: torch.dtype, frames: int = 3, mask_channels: int = 1, ldr: bool = False
) -> list[Tensor]:
    """Reference, frames, flows, masks, then base weights (or LDR values) of all."""

    def pictures(count: int, channels: int = 3, least: float = 0.1) -> list[Tensor]:
        return [
            (least + (1 - least) * torch.rand(n, channels, *size, dtype=torch.float64)).to(dtype) for _ in range(count)
        ]

    flows = [random_flow(n, size, 2.0, dtype) for _ in range(frames)]
    return [*pictures(frames + 1), *flows, *pictures(frames, mask_channels), *pictures(frames + 1)]


def split_frames(values: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    count = (len(values) - 2) // 4
    reference, *others = values
    frames, flows, masks = (others[place * count : (place + 1) * count] for place in range(3))
    return reference, frames, flows, masks, others[3 * count :]


def fuse_frames(*inputs: Tensor, **options: Any) -> Tensor:
    reference, frames, flows, masks, base = split_frames(inputs)
    given: dict[str, Any] = {"ldr": base} if options else {"weights": base}
    return safnet_ops.fuse_frames(reference, frames, flows, masks, **given, **options)


def stock_frames(*inputs: Tensor, table: Function | None = None, weigh_aligned: bool = True) -> Tensor:
    reference, frames, flows, masks, base = split_frames(inputs)
    if table is not None:
        others = [definitions.warp(*pair) for pair in zip(base[1:], flows, strict=True)] if weigh_aligned else base[1:]
        base = [table(base[0]).clamp(min=1e-4), *map(table, others)]
    return definitions.merge(reference, frames, flows, masks, base)


def convolve(
    input: Tensor, weight: Tensor, bias: Any = None, slopes: Any = None, residual: Any = None, **options: Any
) -> Any:
    groups = options.pop("groups", 2)
    return safnet_ops.group_conv_shuffle(input, weight, bias, slopes, groups, residual=residual, **options)


CALLS = [
    Call("backward_warp", safnet_ops.backward_warp, definitions.warp, partial(warp_inputs, pixels=2), lambda *x: x),
    Call(
        "fused_fuse",
        safnet_ops.fused_fuse,
        definitions.fuse,
        partial(fusion_inputs, pixels=2),
        lambda *x: (*x, None, None, None, False),
    ),
    Call("fuse_frames", fuse_frames, stock_frames, make_frames),
    Call(
        "upsample_fuse",
        safnet_ops.upsample_fuse,
        definitions.upsample_and_fuse,
        partial(upsample_inputs, pixels=1),
        lambda *x: x,
    ),
    Call(
        "census_loss",
        lambda *x: safnet_ops.census_loss(x[0], x[1], 3),
        lambda *x: definitions.census(*x).mean(),
        census_inputs,
        lambda *x: (*x, 3, False),
    ),
    Call(
        "group_conv_shuffle",
        convolve,
        partial(definitions.convolve, groups=2),
        make_conv,
        lambda *x: (*x, 2, 1, 1, False),
        parameters=(1, 2, 3),
    ),
]


# Backends


@dataclass(frozen=True)
class Backend:
    """A backend, its name for `use_backend` here, where its registered operators are, and what lets it run here."""

    name: str
    title: str
    chosen: str
    namespace: str | None
    running: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext


@contextlib.contextmanager
def cuda_for_cpp() -> Iterator[None]:
    """The C++ kernels' places are taken by the CUDA kernels, executed on CPU tensors."""
    from simulated_gpu import device

    simulated = device.device()
    library = torch.library.Library("safnet_ops", "IMPL")
    try:
        for name in (name for operator in OPERATORS.values() for name in operator.registered):
            library.impl(name, partial(simulated.call, name), "CPU")
        yield
    finally:
        library._destroy()


BACKENDS = [
    Backend("reference", "Reference backend", "reference", None),
    Backend("cpp", "C++", "cpp", "safnet_ops"),
    Backend("cuda", "CUDA, simulated", "cpp", "safnet_ops", cuda_for_cpp),
    Backend("triton", "Triton, simulated", "triton", "safnet_ops_triton", ptxsim.triton_on_cpu),
]


# Comparing


def loss(out: Any) -> Tensor:
    """Of all results; its slopes are exact in half precision and differ from value to value."""
    leaves = pytree.tree_leaves(out)
    return sum((leaf.double() * (torch.arange(leaf.numel()).view(leaf.shape) % 5 - 1.5)).sum() for leaf in leaves)


def gradients(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = [value.detach().requires_grad_() for value in inputs]
    return torch.autograd.grad(loss(function(*leaves)), leaves)


def both_ways(function: Function, inputs: Sequence[Tensor]) -> tuple[Any, tuple[Tensor, ...]]:
    """Results and gradients."""
    with torch.no_grad():
        out = function(*inputs)
    return out, gradients(function, inputs)


def against_stock(call: Call, function: Function, inputs: Sequence[Tensor], slack: float = 1.0) -> Pair:
    """Of any dtype, against float64."""
    exact = [value.detach().double().contiguous() for value in inputs]
    tolerance = slack * max(TOLERANCE[value.dtype] for value in inputs)
    return both_ways(function, inputs), both_ways(call.stock, exact), tolerance


def compare(found: Any, expected: Any, tolerance: float) -> None:
    """Every tensor against the largest value of the expected one; anything else must be equal."""
    founds, expecteds = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    if len(founds) != len(expecteds):
        raise WrongValueError(f"{len(founds)} results, expected {len(expecteds)}")
    if all(isinstance(value, Tensor) and not value.any() for value in expecteds):
        raise WrongValueError("only zeros are expected, which finds no fault")
    for value, exact in zip(founds, expecteds, strict=True):
        if not isinstance(exact, Tensor):
            if value != exact:
                raise WrongValueError(f"{value}, expected {exact}")
            continue
        if value.shape != exact.shape:
            raise WrongValueError(f"shape {tuple(value.shape)}, expected {tuple(exact.shape)}")
        value, exact = value.detach().double(), exact.detach().double()
        error = ((value - exact).abs().max() / exact.abs().max().clamp(min=1e-9)).item()
        if not error <= tolerance:  # NaN is wrong, too
            raise WrongValueError(f"off by {error:.1e} of the largest value, allowed {tolerance:.0e}")


# Features


@dataclass(frozen=True)
class Feature:
    title: str
    run: Callable[[Call, Backend], Iterator[Pair]]
    refusal: str | None = None  # a pattern of PyTorch's own clear error


FEATURES: list[Feature] = []


def feature(title: str, refusal: str | None = None) -> Callable[[Function], Function]:
    def register(run: Function) -> Function:
        FEATURES.append(Feature(title, run, refusal))
        return run

    return register


@feature("gradients, against stock and finite differences")
def _gradients(call: Call, backend: Backend) -> Iterator[Pair]:
    inputs = call.inputs()
    yield against_stock(call, call.ours, inputs)
    torch.autograd.gradcheck(call.ours, [value.requires_grad_() for value in inputs], fast_mode=True)


@feature("forward mode: `torch.func.jvp`, dual tensors")
def _forward_mode(call: Call, backend: Backend) -> Iterator[Pair]:
    inputs, tangents = call.inputs(), call.inputs(seed=1)
    step = 1e-6
    after, before = (
        call.stock(*(value + sign * step * tangent for value, tangent in zip(inputs, tangents, strict=True)))
        for sign in (1, -1)
    )
    slope = pytree.tree_map(lambda one, other: (one - other) / (2 * step), after, before)
    yield torch.func.jvp(call.ours, tuple(inputs), tuple(tangents))[1], slope, DIFFERENCES
    with torch.autograd.forward_ad.dual_level():
        out = call.ours(*map(torch.autograd.forward_ad.make_dual, inputs, tangents))
        tangent = pytree.tree_map(lambda value: torch.autograd.forward_ad.unpack_dual(value).tangent, out)
        yield tangent, slope, DIFFERENCES


@feature("`torch.func.vmap`")
def _vmap(call: Call, backend: Backend) -> Iterator[Pair]:
    samples = [call.inputs(seed=seed) for seed in range(3)]
    found = torch.func.vmap(call.ours)(*map(torch.stack, zip(*samples, strict=True)))
    expected = [call.stock(*sample) for sample in samples]
    yield found, pytree.tree_map(lambda *values: torch.stack(values), *expected), TOLERANCE[torch.float64]


@feature("`torch.func.grad`")
def _func_grad(call: Call, backend: Backend) -> Iterator[Pair]:
    inputs = call.inputs()
    found = torch.func.grad(lambda *x: loss(call.ours(*x)), tuple(range(len(inputs))))(*inputs)
    yield found, gradients(call.stock, inputs), TOLERANCE[torch.float64]


@feature("`vmap(grad)`: gradients of every sample")
def _vmap_grad(call: Call, backend: Backend) -> Iterator[Pair]:
    samples = [call.inputs(seed=seed) for seed in range(2)]
    function = torch.func.grad(lambda *x: loss(call.ours(*x)), tuple(range(len(samples[0]))))
    found = torch.func.vmap(function)(*map(torch.stack, zip(*samples, strict=True)))
    expected = [torch.stack(values) for values in zip(*(gradients(call.stock, x) for x in samples), strict=True)]
    yield found, expected, TOLERANCE[torch.float64]


@feature("double backward, against finite differences")
def _double_backward(call: Call, backend: Backend) -> Iterator[Pair]:
    inputs = [value.requires_grad_() for value in call.inputs(n=1)]
    torch.autograd.gradgradcheck(call.ours, inputs, fast_mode=True)
    yield from ()


def _compiled(compiler: str, call: Call, backend: Backend) -> Iterator[Pair]:
    yield against_stock(call, torch.compile(call.ours, fullgraph=True, backend=compiler), call.inputs())


for name in ("inductor", "aot_eager"):
    feature(f"`torch.compile(fullgraph=True)`, both ways, by {name}")(partial(_compiled, name))


@feature(
    "double backward of a compiled function", "does not currently support double backward|requires create_graph=False"
)
def _compiled_double_backward(call: Call, backend: Backend) -> Iterator[Pair]:
    inputs = [value.requires_grad_() for value in call.inputs(n=1)]
    torch.autograd.gradgradcheck(torch.compile(call.ours, fullgraph=True, backend="aot_eager"), inputs, fast_mode=True)
    yield from ()


class Program(torch.nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call.ours(*inputs)


def export(call: Call, inputs: Sequence[Tensor]) -> torch.export.ExportedProgram:
    """With any height and width of pictures."""
    auto = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    dynamic = tuple(None if place in call.parameters else auto for place in range(len(inputs)))
    with torch.no_grad():
        return torch.export.export(Program(call), tuple(inputs), dynamic_shapes=(dynamic,))


@feature("`torch.export`, run at sizes that were not traced")
def _export(call: Call, backend: Backend) -> Iterator[Pair]:
    program = export(call, call.inputs()).module()
    for size in OTHER_SIZES:
        inputs = call.inputs(size=size)
        yield program(*inputs), call.stock(*inputs), TOLERANCE[torch.float64]


@feature("gradients of an exported program's parameters")
def _export_gradient(call: Call, backend: Backend) -> Iterator[Pair]:
    inputs = call.inputs()

    class Trained(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = torch.nn.ParameterList(inputs)

        def forward(self, scale: Tensor) -> Any:
            return call.ours(*(part * scale for part in self.parts))

    program = torch.export.export(Trained(), (torch.ones((), dtype=torch.float64),)).module()
    loss(program(torch.ones((), dtype=torch.float64))).backward()
    yield [value.grad for value in program.parameters()], gradients(call.stock, inputs), TOLERANCE[torch.float64]


@feature("`torch.ops`, both ways")
def _registered(call: Call, backend: Backend) -> Iterator[Pair]:
    yield against_stock(call, call.of_operator(backend), call.inputs())


@feature("`torch.library.opcheck` with gradients")
def _opcheck(call: Call, backend: Backend) -> Iterator[Pair]:
    call.of_operator(backend)
    assert call.registered is not None
    operator = getattr(getattr(torch.ops, str(backend.namespace)), call.operator)
    arguments = call.registered(*(value.requires_grad_() for value in call.inputs(n=1)))
    torch.library.opcheck(operator.default, arguments)
    yield from ()


@feature("autocast with mixed dtypes, both ways")
def _autocast(call: Call, backend: Backend) -> Iterator[Pair]:
    inputs = [value.to((torch.float32, torch.bfloat16)[place % 2]) for place, value in enumerate(call.inputs())]

    def function(*values: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return call.ours(*values)

    yield against_stock(call, function, inputs)


def _in_dtype(dtype: torch.dtype, call: Call, backend: Backend) -> Iterator[Pair]:
    yield against_stock(call, call.ours, call.inputs(dtype))


for kind in TOLERANCE:
    feature(str(kind).removeprefix("torch."))(partial(_in_dtype, kind))


@feature("channels_last, kept")
def _channels_last(call: Call, backend: Backend) -> Iterator[Pair]:
    inputs = [
        value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value for value in call.inputs()
    ]
    yield against_stock(call, call.ours, inputs)
    (out, *_) = pytree.tree_leaves(call.ours(*inputs))
    yield out.dim() == 0 or out.is_contiguous(memory_format=torch.channels_last), True, 0.0


@feature("any strides and storage offset")
def _strides(call: Call, backend: Backend) -> Iterator[Pair]:
    def window(value: Tensor) -> Tensor:
        """Of a larger tensor, whose rows and columns are exchanged and which holds NaN elsewhere."""
        n, channels, height, width = value.shape
        larger = torch.full((n + 1, channels + 3, width + 5, height + 2), torch.nan, dtype=value.dtype)
        return larger[1:, 2 : channels + 2, 3 : width + 3, 1 : height + 1].transpose(2, 3).copy_(value)

    yield against_stock(call, call.ours, [window(value) if value.dim() == 4 else value for value in call.inputs()])


@feature("`use_deterministic_algorithms`: the same bits again")
def _deterministic(call: Call, backend: Backend) -> Iterator[Pair]:
    inputs = call.inputs(torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for seed in (1, 2):
            with ptxsim.options(seed=seed):  # another order of a simulated GPU's blocks and warps
                found.append(both_ways(call.ours, inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    yield found[0], both_ways(call.stock, [value.double() for value in inputs]), TOLERANCE[torch.float32]
    yield found[0], found[1], 0.0


@feature("fake tensors: shapes, strides and dtypes, both ways")
def _fake(call: Call, backend: Backend) -> Iterator[Pair]:
    def described(values: Any) -> list[tuple[Any, ...]]:
        return [(tuple(x.shape), x.stride(), x.dtype) for x in pytree.tree_leaves(values)]

    inputs = call.inputs(torch.float32)
    with FakeTensorMode() as mode:
        fake = both_ways(call.ours, [mode.from_tensor(value) for value in inputs])
    yield described(fake), described(both_ways(call.ours, inputs)), 0.0


@feature("`FlopCounterMode`: twice as many for two pictures; a convolution as PyTorch's")
def _flops(call: Call, backend: Backend) -> Iterator[Pair]:
    if backend.namespace is None:
        raise NotTried("PyTorch counts its own convolutions and nothing else of the definition")

    def count(function: Function, n: int) -> int:
        with FlopCounterMode(display=False) as counter:
            gradients(function, call.inputs(n=n))
        return counter.get_total_flops()

    one = count(call.ours, 1)
    yield (one > 0, count(call.ours, 2)), (True, 2 * one), 0.0
    if call.operator == "group_conv_shuffle":
        with FlopCounterMode(display=False) as ours, torch.no_grad():
            call.ours(*call.inputs())
        with FlopCounterMode(display=False) as stock, torch.no_grad():
            call.stock(*call.inputs())
        yield ours.get_total_flops(), stock.get_total_flops(), 0.0


@feature("ONNX, run by onnxruntime at sizes that were not traced")
def _onnx(call: Call, backend: Backend) -> Iterator[Pair]:
    if call.operator == "census_loss":
        raise NotTried("a loss is not for inference: it has no translation")
    if backend.name == "cuda":
        raise NotTried("the file is that of the C++ kernels' operators")
    import onnxruntime

    from safnet_ops.onnx import OPSET, translation_table

    program = export(call, call.inputs(torch.float32))
    table = translation_table()
    file = torch.onnx.export(program, custom_translation_table=table, opset_version=OPSET, verbose=False)
    assert file is not None
    content = file.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for size in OTHER_SIZES:
        inputs = call.inputs(torch.float32, size)
        found = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})
        yield [torch.from_numpy(value) for value in found], call.stock(*inputs), 1e-4


# Options


@dataclass(frozen=True)
class Option:
    """An operator with arguments other than the usual, tried as one cell of a backend."""

    title: str
    calls: tuple[Call, ...]
    has_gradients: bool = True

    def run(self, backend: Backend) -> Iterator[Pair]:
        for call in self.calls:
            inputs = call.inputs()
            yield (
                against_stock(call, call.ours, inputs)
                if self.has_gradients
                else (call.ours(*inputs), call.stock(*inputs), TOLERANCE[torch.float64])
            )


def warp_option(
    title: str, *, image_n: int = 2, flow_n: int = 2, side: int = 0, valid: bool = False, **options: Any
) -> Option:
    """For a flow that is so much lower and wider than the image."""

    def make(size: tuple[int, int], n: int, dtype: torch.dtype) -> list[Tensor]:
        image, _ = warp_inputs(size, n=image_n, dtype=dtype)
        return [image, random_flow(flow_n, (size[0] - side, size[1] + side), 2.0, dtype)]

    def stock(image: Tensor, flow: Tensor) -> Any:
        out = definitions.warp(image, flow, **options)
        return (out, definitions.is_inside(image, flow)) if valid else out

    given = options | ({"return_valid": True} if valid else {})
    call = Call("backward_warp", partial(safnet_ops.backward_warp, **given), stock, make)
    return Option(title, (call,), has_gradients=not valid)


def weighted(operator: Function) -> Function:
    """The three base weights by position."""
    return lambda *x, **options: operator(*x[:7], weights=x[7:], **options)


def frames_option(title: str, counts: Sequence[int] = (3,), mask_channels: int = 1, **options: Any) -> Option:
    make = partial(make_frames, mask_channels=mask_channels)
    stock = partial(stock_frames, **options | ({"table": TABLES[options["table"]]} if options else {}))
    ours = partial(fuse_frames, **options)
    return Option(title, tuple(Call("fuse_frames", ours, stock, partial(make, frames=count)) for count in counts))


TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "triangle": lambda z: 1 - (2 * z - 1).abs(),
    "hat": lambda z: 1 - (2 * z - 1) ** 12,
    "gaussian": lambda z: torch.exp(-((z - 0.5) ** 2) / 0.08),
}


def census_option(
    title: str, reduce: Function = torch.mean, patch: int = 3, mask: bool = False, **options: Any
) -> Option:
    given: dict[str, Any] = {"grey": definitions.REC601 if "grey" in options else None, "border": options.get("border")}

    def visible(picture: Tensor) -> Tensor:
        rows = torch.arange(picture.shape[2])[:, None] + torch.arange(picture.shape[3])
        return (rows % 3 > 0).expand(len(picture), 1, -1, -1)

    def ours(first: Tensor, second: Tensor) -> Tensor:
        return safnet_ops.census_loss(first, second, patch, mask=visible(first) if mask else None, **options)

    def stock(first: Tensor, second: Tensor) -> Tensor:
        distance = definitions.census(first, second, patch, **given)
        return reduce(distance * visible(first) if mask else distance)

    make = lambda size, **kinds: census_inputs((9, 10), **kinds)  # noqa: E731
    return Option(title, (Call("census_loss", ours, stock, make),))


def conv_option(title: str, kernel: int = 3, slopes: bool = True, **options: Any) -> Option:
    def make(size: tuple[int, int], n: int, dtype: torch.dtype) -> list[Tensor]:
        stride = 2 if "stride" in options else 1
        input, weight, *others = make_conv(size, n, dtype, stride=stride)
        first = (5 - kernel) // 2
        weight = torch.cat([weight, weight], 3).repeat(1, 1, 2, 1)[:, :, first : first + kernel, first : first + kernel]
        return [input, weight, others[0], *others[1 if slopes else 2 :]]

    def arguments(values: Sequence[Tensor]) -> list[Any]:
        return list(values) if slopes else [*values[:3], None, *values[3:]]

    stock = {"groups": 2} | {name: value for name, value in options.items() if name != "activation"}
    stock |= {"relu": True} if "activation" in options else {}
    return Option(
        title,
        (
            Call(
                "group_conv_shuffle",
                lambda *x: convolve(*arguments(x), **options),
                lambda *x: definitions.convolve(*arguments(x), **stock),
                make,
            ),
        ),
    )


OPTIONS = [
    warp_option('`padding="zeros"`', padding="zeros"),
    warp_option("a flow of another size than the image", side=1),
    warp_option("the same with zeros", side=1, padding="zeros"),
    warp_option("one flow for many images", flow_n=1),
    warp_option("one image for many flows", image_n=1),
    warp_option("`return_valid=True`", valid=True),
    *(
        Option(
            f"`weights=`, one {'for all colours' if channels == 1 else 'a colour'}",
            (
                Call(
                    "fused_fuse",
                    weighted(safnet_ops.fused_fuse),
                    definitions.fuse,
                    partial(fusion_inputs, weights=(channels,) * 3),
                ),
            ),
        )
        for channels in (1, 3)
    ),
    Option(
        "`mask_logits=True`",
        (
            Call(
                "fused_fuse",
                partial(safnet_ops.fused_fuse, mask_logits=True),
                partial(definitions.fuse, mask_logits=True),
                partial(fusion_inputs, logits=True),
            ),
        ),
    ),
    frames_option("2 to 9 exposures by `weights=`", range(1, 9)),
    frames_option("masks, one a colour", mask_channels=3),
    *(
        frames_option(
            f'`table="{table}"`, of {"aligned" if aligned else "unaligned"} values', table=table, weigh_aligned=aligned
        )
        for table in TABLES
        for aligned in (True, False)
    ),
    Option(
        "`weights=`",
        (
            Call(
                "upsample_fuse",
                weighted(safnet_ops.upsample_fuse),
                definitions.upsample_and_fuse,
                lambda size, **kinds: fusion_inputs(size, low=(2, 3), logits=True, weights=(3, 3, 3), **kinds),
            ),
        ),
    ),
    census_option("`patch_size=7`", patch=7),
    census_option('`reduction="sum"`', torch.sum, reduction="sum"),
    census_option('`reduction="none"`', lambda distance: distance, reduction="none"),
    census_option("`mask=` of bool", mask=True),
    census_option('`grey="rec601"`', grey="rec601"),
    census_option("`border=0`", border=0),
    conv_option("`shuffle=False`", shuffle=False),
    conv_option("1x1 weights", kernel=1),
    conv_option("5x5 weights", kernel=5),
    conv_option('`activation="relu"`', slopes=False, activation="relu"),
    conv_option("`stride=2`", stride=2),
    conv_option("`dilation=2`", dilation=2),
    conv_option("no shuffle, no activation, stride 2", slopes=False, shuffle=False, stride=2),
]


# Trying


@dataclass(frozen=True)
class Cell:
    mark: str
    reason: str = ""


def try_cell(
    operator: str, run: Callable[[], Iterator[Pair]], refusal: str | None = None, simulated: bool = False
) -> Cell:
    """Of a simulated GPU, a cell that works also says where no kernel was launched for it."""
    torch.compiler.reset()  # or PyTorch would give up to compile the same lines again
    try:
        with ptxsim.options() as launches:
            for found, expected, tolerance in run():
                compare(found, expected, tolerance)
    except NotTried as reason:
        return Cell(NOT_TRIED, str(reason))
    except Exception as error:
        message = " ".join(str(error).split())
        # The library's own errors begin by the operator and name an argument.
        clear = re.search(rf"{operator}: \w+ (must|needs)|{operator}: give ", message) or (
            refusal and re.search(refusal, message)
        )
        return Cell(REFUSED if clear else FAILS, f"{type(error).__name__}: {message[:300]}")
    return Cell(WORKS, BY_PYTORCH if simulated and not launches else "")


Results = dict[tuple[str, str, str], Cell]  # (backend, row, operator) -> cell


def try_all(backends: Sequence[Backend], operator: str, text: str) -> Results:
    """Cells of the operators and rows with these in their names."""
    found: Results = {}
    warnings.simplefilter("ignore")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.backends.cudnn.allow_tf32 = False  # float32 products as the C++ kernels multiply

    def note(
        backend: Backend, row: str, call: Call, run: Callable[[], Iterator[Pair]], refusal: str | None = None
    ) -> None:
        began = time.perf_counter()
        cell = found[backend.name, row, call.operator] = try_cell(
            call.operator, run, refusal, simulated=backend.running is not contextlib.nullcontext
        )
        took = f"{time.perf_counter() - began:.1f} s"
        print(
            f"{backend.name}, {call.operator}, {row}: {cell.mark} {cell.reason} ({took})", file=sys.stderr, flush=True
        )

    for backend in backends:
        with backend.running(), safnet_ops.use_backend(backend.chosen):
            for entry in FEATURES:
                for call in CALLS:
                    if operator in call.operator and text in entry.title:
                        note(backend, entry.title, call, partial(entry.run, call, backend), entry.refusal)
            for option in OPTIONS:
                call = option.calls[0]
                if operator in call.operator and text in option.title:
                    note(backend, option.title, call, partial(option.run, backend))
    return found


# The page


class Notes:
    """Reasons, numbered as they first appear."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, cell: Cell | None) -> str:
        if cell is None:
            return ""
        if not cell.reason:
            return cell.mark
        return f"{cell.mark} ({self.numbers.setdefault(cell.reason, len(self.numbers) + 1)})"

    def lines(self) -> list[str]:
        return [f"{number}. {reason}" for reason, number in self.numbers.items()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)] + [""]


def tables(found: Results) -> list[str]:
    notes, lines = Notes(), []
    backends = [backend for backend in BACKENDS if any(key[0] == backend.name for key in found)]
    operators = [call.operator for call in CALLS if any(key[2] == call.operator for key in found)]
    for backend in backends:
        rows = [
            [entry.title, *(notes.mark(found.get((backend.name, entry.title, name))) for name in operators)]
            for entry in FEATURES
            if any(key[:2] == (backend.name, entry.title) for key in found)
        ]
        lines += [f"## {backend.title}", "", *table(["", *operators], rows)] if rows else []
    rows = [
        [name, option.title, *(notes.mark(found.get((backend.name, option.title, name))) for backend in backends)]
        for option in OPTIONS
        for name in [option.calls[0].operator]
        if any(key[1:] == (option.title, name) for key in found)
    ]
    if rows:
        lines += ["## Options, both ways", "", *table(["operator", "option", *(b.title for b in backends)], rows)]
    return [*lines, *(["## Notes", "", *notes.lines(), ""] if notes.numbers else [])]


def page(found: Results) -> str:
    counts = {mark: sum(cell.mark == mark for cell in found.values()) for mark in (WORKS, REFUSED, FAILS, NOT_TRIED)}
    errors = ", ".join(f"{error:.0e} in {str(kind).removeprefix('torch.')}" for kind, error in TOLERANCE.items())
    head = f"""\
# What works with PyTorch

Written by `python -m tools.features` with torch {torch.__version__}, which tried each cell; no GPU was used.
{", ".join(f"{mark}: {count}" for mark, count in counts.items())}; [notes](#notes) say why.

- *works*: results and gradients, of all inputs where there are any, are those of PyTorch's own functions in float64
  (`tools/definitions.py`: grid_sample, conv2d, unfold), and derivatives that these do not have are those of finite differences.
  Largest errors, as a share of the largest value: {errors};
  {DIFFERENCES:.0e} beside finite differences.
- *refused*: an error that names operator and argument, or PyTorch's own that says what it does not do.
- *fails*: anything else, a silent wrong value above all. The command then ends with status 1.

Pictures are of {SIZE[0]} x {SIZE[1]} pixels, in float64 unless a row says otherwise. The CUDA kernels, with their host code,
are executed on CPU tensors in the place of the C++ kernels, so that dispatcher, torch.compile and torch.export lead to
them; the Triton kernels are launched on CPU tensors ([how](../../ptxsim/README.md)). Autocast is the CPU's, whose rule is
CUDA's, too.
"""
    return "\n".join([head, *tables(found)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Try every feature with every operator on every backend.")
    names = [backend.name for backend in BACKENDS]
    parser.add_argument("--backend", action="append", choices=names, help="this backend alone; may be repeated")
    parser.add_argument("--operator", default="", metavar="TEXT", help="operators with this in their name alone")
    parser.add_argument(
        "--feature", default="", metavar="TEXT", help="features and options with this in their name alone"
    )
    options = parser.parse_args(arguments)
    chosen = [backend for backend in BACKENDS if backend.name in (options.backend or names)]
    found = try_all(chosen, options.operator, options.feature)
    if not found:
        parser.error("no cell has these names")
    if options.backend or options.operator or options.feature:
        print("\n".join(tables(found)))
    else:
        partial_page = PAGE.with_suffix(".partial")
        partial_page.write_text(page(found))
        partial_page.replace(PAGE)
        print(f"wrote {PAGE}", file=sys.stderr)
    return 1 if any(cell.mark == FAILS for cell in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
