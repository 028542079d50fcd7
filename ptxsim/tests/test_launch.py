"""Launch interface: arguments, names, options, parser errors."""

import ctypes

import numpy as np
import pytest

import ptxsim
from ptxsim import ArgumentError, Module, ParseError, PtxSimError, Unsupported
from ptxsim.tests.ptx_support import HEADER, entry

SCALE = entry(
    "ld.param.f32 %f1, [a]; ld.global.f32 %f2, [%o]; mul.f32 %f2, %f2, %f1; st.global.f32 [%o], %f2;",
    ".param .u64 out, .param .f32 a",
).kernel("k")


def test_scalars_follow_the_declaration():
    x = np.ones(32, np.float32)
    SCALE[1, 32](x, 3)  # an int for a .f32
    assert (x == 3).all()


def test_addresses_and_buffers():
    x = np.ones(64, np.float32)
    SCALE[1, 32](x.ctypes.data + 128, 2.0, buffers=[x])
    assert x.tolist() == [1] * 32 + [2] * 32
    with pytest.raises(ptxsim.OutOfBounds, match="kernel parameters"):
        SCALE[1, 32](x.ctypes.data, 2.0)


def test_torch_tensors_are_used_in_place():
    torch = pytest.importorskip("torch")
    x = torch.ones(4, 32)
    SCALE[1, 32](x[2], 5.0)
    assert x.sum(1).tolist() == [32, 32, 160, 32]
    SCALE[1, 32](x[1].data_ptr(), 2.0, buffers=[x])
    assert x.sum(1).tolist() == [32, 64, 160, 32]
    with pytest.raises(ArgumentError, match="not contiguous"):
        SCALE[1, 4](x[:, 0], 2.0)


@pytest.mark.parametrize(
    "args,message",
    [
        ((np.ones(32, np.float32),), "takes 2 arguments, got 1"),
        ((np.ones((8, 8), np.float32)[:, 0], 1.0), "not contiguous"),
        ((np.ones(4, np.float32), np.ones(4)), "got an array"),
        ((np.ones(4, np.float32), "x"), "cannot pass str"),
        ((np.ones(4, np.float32), b"abc"), "got 3 bytes"),
    ],
)
def test_bad_arguments(args, message):
    with pytest.raises(ArgumentError, match=message):
        SCALE[1, 4](*args)


def test_read_only_arrays_cannot_be_stored_to():
    x = np.ones(32, np.float32)
    x.flags.writeable = False
    with pytest.raises(ptxsim.OutOfBounds, match="read-only"):
        SCALE[1, 32](x, 2.0)


def test_narrow_parameters_extend():
    m = entry(
        "ld.param.s8 %r1, [s]; ld.param.u8 %r2, [s]; sub.s32 %r1, %r2, %r1; st.global.u32 [%o], %r1;",
        ".param .u64 out, .param .u8 s",
    )
    x = np.zeros(4, np.int32)
    m.kernel("k")[1, 4](x, -3)
    assert (x == 256).all()


def test_structs_by_bytes():
    class Pair(ctypes.Structure):
        _fields_ = [("a", ctypes.c_int32), ("b", ctypes.c_float)]

    m = entry(
        "ld.param.u32 %r1, [s]; ld.param.f32 %f1, [s+4]; cvt.rn.f32.s32 %f2, %r1; add.f32 %f1, %f1, %f2; "
        "st.global.f32 [%o], %f1;",
        ".param .u64 out, .param .align 4 .b8 s[8]",
    )
    x = np.zeros(4, np.float32)
    m.kernel("k")[1, 4](x, Pair(3, 0.5))
    assert (x == 3.5).all()


def test_kernel_names():
    m = Module.from_source(
        HEADER
        + "\n".join(
            f".visible .entry {n}() {{ ret; }}" for n in ("plain", "_Z5scalePff", "_ZN2ns6kernelIfEEvPT_", "plain_two")
        )
    )
    assert m.kernel("plain").name == "plain"
    assert m.kernel("scale").name == "_Z5scalePff"
    assert m.kernel("ns::kernel").name == m.kernel("kern").name == "_ZN2ns6kernelIfEEvPT_"
    with pytest.raises(PtxSimError, match="ambiguous"):
        m.kernel("pla")
    with pytest.raises(PtxSimError, match="not in the module"):
        m.kernel("nothing")


def test_options_context_collects_launches():
    x = np.ones(32, np.float32)
    with ptxsim.options(stats=True, checks=False) as log:
        SCALE[1, 32](x, 2.0)
        SCALE[1, 32](x, 2.0)
    assert [r.kernel for r in log] == ["k", "k"] and log[0].stats.flops["fp32"] == 32


def test_block_not_a_multiple_of_the_warp():
    x = np.ones(100, np.float32)
    SCALE[1, 50](x, 2.0)
    assert x[:50].sum() == 100 and x[50:].sum() == 50


def test_batches_do_not_change_results(rng):
    m = entry(
        """mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 48, %i; mad.wide.u32 %d1, %r2, 4, %base; st.global.u32 [%d1], %r2;"""
    )
    for batch in (1, 200, 10000):
        y = ptxsim.empty(48 * 37, np.uint32)
        m.kernel("k")[37, 48](y, batch=batch)
        np.testing.assert_array_equal(y, np.arange(48 * 37))


@pytest.mark.parametrize(
    "text,error",
    [
        ("wgmma.fence.sync.aligned;", Unsupported),
        ("cp.async.bulk.commit_group;", Unsupported),
        ("mbarrier.init.shared.b64 [%d1], 1;", Unsupported),
        ("add.s32 %r1, %r2, ?;", ParseError),
        ("add.s32 %r1, %r2, nowhere;", Unsupported),
        ("bra NOWHERE;", ParseError),
        ("frobnicate.b32 %r1, %r2;", Unsupported),
        ("min.xorsign.abs.f32 %f1, %f2, %f3;", Unsupported),
        ("mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1}, {%r1}, {%r2}, {%f1}, %r3, 0;", Unsupported),
    ],
)
def test_errors_name_the_instruction(text, error):
    with pytest.raises(error, match="PTX line|unknown label") as e:
        entry(text).kernel("k")[1, 32](np.zeros(32, np.float32))
    if "wgmma" in text:
        assert "compute_80" in str(e.value) and isinstance(e.value, NotImplementedError)
