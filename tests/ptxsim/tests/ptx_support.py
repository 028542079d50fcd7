"""Shared test tools: single-instruction kernels, and skip marks for optional compilers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import ptxsim
import pytest
from ptxsim import Module

KERNELS = Path(__file__).parent / "kernels"
needs_nvcc = pytest.mark.skipif(ptxsim.find_nvcc() is None, reason="nvcc not found")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="triton and torch not installed",
)

_WIDTH = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}

HEADER = ".version 8.0\n.target sm_80\n.address_size 64\n"


def entry(body: str, params: str = ".param .u64 out", top: str = "") -> Module:
    """Module with one kernel ``k``; %i is the thread index, %o the address of 4 * %i bytes into parameter ``out``."""
    return Module.from_source(
        HEADER
        + top
        + f"""
.visible .entry k({params})
{{
 .reg .b64 %o, %base; .reg .b32 %i, %n; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .pred %p<10>; .reg .b64 %d<20>;
 mov.u32 %i, %tid.x;
 ld.param.u64 %base, [out];
 mad.wide.u32 %o, %i, 4, %base;
 {body}
 ret;
}}
"""
    )


def run_op(text: str, result, *inputs, threads: int | None = None) -> np.ndarray:
    """Run PTX ``text`` once per element.

    Inputs a, b, c, d (arrays) are loaded into registers %a, %b, ...; %z is stored as an array of dtype ``result``, or
    for ``bool`` the predicate %z as 0/1.  Threads form one block.
    """
    n = threads or max([len(x) for x in inputs] or [32])
    regs, loads = [], []
    arrays = [np.ascontiguousarray(np.broadcast_to(x, (n,))) for x in inputs]
    for name, x in zip("abcd", arrays):
        regs.append(f".reg .pred %{name};" if x.dtype == np.bool_ else f".reg .b{max(16, 8 * x.itemsize)} %{name};")
        address = f"ld.param.u64 %p, [p_{name}]; mad.wide.u32 %p, %i, {x.itemsize}, %p;"
        if x.dtype == np.bool_:
            loads.append(f"{address} ld.global.u8 %h, [%p]; setp.ne.u16 %{name}, %h, 0;")
        else:
            loads.append(f"{address} ld.global.{_WIDTH[x.itemsize]} %{name}, [%p];")
    flag = result is bool
    out = np.zeros(n, np.uint32 if flag else result)
    size = 4 if flag else out.itemsize
    regs.append(".reg .pred %z; .reg .b32 %zi;" if flag else f".reg .b{max(16, 8 * size)} %z;")
    params = ", ".join([f".param .u64 p_{c}" for c in "abcd"[: len(arrays)]] + [".param .u64 p_z"])
    store = "selp.u32 %zi, 1, 0, %z; st.global.b32 [%p], %zi;" if flag else f"st.global.{_WIDTH[size]} [%p], %z;"
    m = Module.from_source(
        HEADER
        + f"""
.visible .entry k({params})
{{
 .reg .b64 %p; .reg .b32 %i; .reg .b16 %h; {" ".join(regs)}
 mov.u32 %i, %tid.x;
 {" ".join(loads)}
 {text}
 ld.param.u64 %p, [p_z]; mad.wide.u32 %p, %i, {size}, %p;
 {store}
 ret;
}}
"""
    )
    m.kernel("k")[1, n](*arrays, out)
    return out.astype(bool) if flag else out


def source_line(error: Exception) -> str | None:
    """``file:line`` of a fault."""
    return error.where.source


def marker_line(path: Path, text: str) -> int:
    """1-based number of the first line of a file that contains ``text``."""
    return next(i for i, line in enumerate(path.read_text().split("\n"), 1) if re.search(re.escape(text), line))
