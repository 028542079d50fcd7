"""Cost counters on access patterns whose cost is known."""

import numpy as np
import pytest

import ptxsim
from ptxsim.sass import expand
from ptxsim.tests.ptx_support import entry


def count(body, n=32, size=4096, grid=1):
    y = np.zeros(size, np.float32)
    return entry(body).kernel("k")[grid, n](y, stats=True).stats


@pytest.mark.parametrize("stride,sectors", [(1, 4), (2, 8), (8, 32), (32, 32), (0, 1)])
def test_global_sectors(stride, sectors):
    s = count(
        f"mul.lo.u32 %r1, %i, {4 * stride}; cvt.u64.u32 %d1, %r1; add.u64 %d1, %d1, %base; ld.global.f32 %f1, [%d1];"
    )
    d = s.memory("load global")
    assert (d["requests"], d["bytes"], d["sectors"]) == (1, 128, sectors)
    assert s.compulsory_bytes == 32 * sectors


def test_vector_sectors_and_reuse():
    s = count(
        "mad.wide.u32 %d1, %i, 16, %base; ld.global.v4.f32 {%f1,%f2,%f3,%f4}, [%d1]; ld.global.v4.f32 {%f1,%f2,%f3,%f4}, [%d1];"
    )
    assert s.memory("load global")["sectors"] == 32 and s.compulsory_bytes == 512


@pytest.mark.parametrize("stride,ways", [(4, 1), (8, 2), (128, 32), (132, 1), (0, 1), (64, 16)])
def test_bank_conflicts(stride, ways):
    s = count(
        f".shared .align 16 .b8 s[8192]; mov.u32 %r1, s; mad.lo.u32 %r1, %i, {stride}, %r1; st.shared.u32 [%r1], 7;"
    )
    d = s.memory("store shared")
    assert (d["passes"], d["wavefronts"]) == (1, ways)


@pytest.mark.parametrize(
    "width,stride,passes,wavefronts", [(2, 8, 2, 2), (4, 16, 4, 4), (4, 128, 4, 32), (4, 32, 4, 8)]
)
def test_vector_bank_phases(width, stride, passes, wavefronts):
    regs = ",".join(["%r2"] * width)
    s = count(
        f".shared .align 16 .b8 s[8192]; mov.u32 %r2, 1; mov.u32 %r1, s; mad.lo.u32 %r1, %i, {stride}, %r1; "
        f"st.shared.v{width}.b32 [%r1], {{{regs}}};"
    )
    d = s.memory("store shared")
    assert (d["passes"], d["wavefronts"]) == (passes, wavefronts)


def test_divergence_and_classes():
    s = count("setp.lt.u32 %p1, %i, 8; @%p1 fma.rn.f32 %f1, %f2, %f2, %f2; ex2.approx.f32 %f3, %f1;", 64)
    assert s.by_class()["fp32"] == 1 and s.by_class()["sfu"] == 2  # the second warp has no active lane
    assert s.flops == {"fp32": 16, "sfu": 64}
    assert s.active_fraction < 1


def test_local_memory_and_barriers():
    s = count(
        ".local .align 4 .b8 l[16]; mov.u64 %d1, l; st.local.f32 [%d1], 0f00000000; bar.sync 0; ld.local.f32 %f1, [%d1];",
        64,
    )
    assert s.local_bytes == 2 * 64 * 4 and s.barriers == 2


def test_roofline_names_the_limit():
    copy = entry("ld.global.f32 %f1, [%o]; st.global.f32 [%o], %f1;").kernel("k")
    stats = copy[1, 1024](np.zeros(1024, np.float32), stats=True).stats
    r = ptxsim.roofline(stats, "A100")
    assert r.floor == pytest.approx(8192 / 2.039e12) and "MODELLED" in str(r)
    s = count("mov.f32 %f1, 0f3F800000;" + "fma.rn.f32 %f1, %f1, %f1, %f1;" * 200 + "st.global.f32 [%o], %f1;", 1024)
    h = ptxsim.roofline(s, "RTX4090")
    assert h.bound in ("FP32", "issue") and h.ratio > 1 and h.seconds == max(h.limits.values())
    assert set(ptxsim.GPUS) == {"H100", "A100", "A30", "B200", "L4", "RTX4090"}


@pytest.mark.parametrize(("gpu", "rate"), [("A100", 312e12), ("A30", 165e12), ("H100", 0.629 * 989e12)])
def test_tensor_cores_work_at_the_rate_of_the_warps_instruction(gpu, rate):
    sums, a, b = "{%f1,%f2,%f3,%f4}", "{%r1,%r2,%r3,%r4}", "{%r5,%r6}"
    stats = count(f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {sums}, {a}, {b}, {sums};" * 50, 32)
    assert stats.tensor_flops == {"f16": 50 * 2 * 16 * 8 * 16}
    of_one_sm = rate / ptxsim.GPUS[gpu].sms
    assert ptxsim.roofline(stats, gpu).limits["tensor"] == pytest.approx(50 * 2 * 16 * 8 * 16 / of_one_sm)


def test_no_gpu_is_taken_to_do_more_than_its_registers_feed():
    """mma.sync reads its factors from registers: no GPU's is faster an SM and clock than the fastest one measured, Hopper's."""
    fastest = 0.629 * 989e12 / (132 * 1.98e9)
    for gpu in ptxsim.GPUS.values():
        assert gpu.tensor["f16"] * gpu.mma / (gpu.sms * gpu.clock) <= fastest * 1.01


@pytest.mark.parametrize(
    "text,want",
    [
        ("mov.u32 %r1, %r2;", {}),
        ("mov.u32 %r1, %tid.x;", {"int": 1}),
        ("add.s32 %r1, %r1, 1;", {"int": 1}),
        ("add.s64 %d1, %d1, 1;", {"int": 2}),
        ("div.rn.f32 %f1, %f1, %f2;", {"sfu": 1, "fp32": 6, "control": 1}),
        ("ex2.approx.ftz.f32 %f1, %f1;", {"sfu": 1}),
        ("cvt.s64.s32 %d1, %r1;", {"int": 1}),
        ("cvt.u64.u32 %d1, %r1;", {}),
        ("cvt.rn.f32.s32 %f1, %r1;", {"convert": 1}),
        ("mul.wide.s32 %d1, %r1, 4;", {"int": 1}),
        ("ld.param.u64 %d1, [out];", {}),
        ("ld.global.f32 %f1, [%o];", {"load global": 1}),
    ],
)
def test_machine_instructions(text, want):
    code = entry(text).kernel("k").program.code
    assert expand(next(i for i in code if i.text == text[:-1])) == want


def test_summary_mentions_the_essentials():
    text = count("ld.global.f32 %f1, [%o]; st.global.f32 [%o], %f1;").summary()
    assert all(w in text for w in ("warp instructions", "sectors", "compulsory", "hot spots"))
