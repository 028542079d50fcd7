"""Planted bugs in CUDA kernels: each must be reported at its place, and the correct twin must pass clean."""

import re

import numpy as np
import pytest

import ptxsim
from ptxsim.tests.ptx_support import KERNELS, entry, marker_line, needs_nvcc

F = np.float32


def arrays(kernel):
    """Launch configuration and arguments of each kernel of bugs.cu."""
    x = np.arange(256, dtype=F)
    return {
        "reverse": (1, 128, (x[:128], ptxsim.empty(128))),
        "reuse": (1, 64, (x[:192], ptxsim.empty(192))),
        "off_by_one": (1, 128, (ptxsim.empty(100), 100)),
        "uninit_shared": (1, 64, (ptxsim.empty(64),)),
        "accumulate": (1, 64, (ptxsim.empty(64), x[:64])),
        "async_copy": (1, 64, (x, ptxsim.empty(256))),
        "async_no_barrier": (1, 64, (x, ptxsim.empty(256))),
        "write_race": (1, 64, (np.zeros(1, F), x)),
        "block_race": (4, 1, (np.zeros(4, F),)),
        "in_place": (1, 64, (x[:64].copy(), x)),
        "shuffle_mask": (1, 32, (ptxsim.empty(32),)),
        "divergent_barrier": (1, 64, (np.zeros(64, F), 32)),
        "endless": (1, 32, (np.zeros(1, np.int32),)),
        "misaligned": (1, 16, (x[:32].copy(), ptxsim.empty(32))),
        "never": (1, 64, (0,)),
        "warp_private": (1, 64, (ptxsim.empty(64),)),
    }[kernel]


EXPECTED = {
    "reverse": (ptxsim.SharedRace, "y[threadIdx.x] = s[127"),
    "reuse": (ptxsim.SharedRace, "s[threadIdx.x] = x[64 * k"),
    "off_by_one": (ptxsim.OutOfBounds, "i <= n"),
    "uninit_shared": (ptxsim.Uninitialised, "s[threadIdx.x ^ 32]"),
    "accumulate": (ptxsim.Uninitialised, "float v = IF_BUG(y[threadIdx.x]"),
    "async_copy": (ptxsim.AsyncNotReady, None),
    "async_no_barrier": (ptxsim.SharedRace, None),
    "write_race": (ptxsim.GlobalRace, "IF_BUG(y[0]"),
    "block_race": (ptxsim.GlobalRace, "y[IF_BUG(blockIdx.x / 2"),
    "in_place": (ptxsim.GlobalRace, None),
    "shuffle_mask": (ptxsim.InactiveLane, "__shfl_down_sync(IF_BUG"),
    "divergent_barrier": (ptxsim.BarrierDivergence, None),
    "endless": (ptxsim.BudgetExceeded, "void endless"),
    "misaligned": (ptxsim.Misaligned, "void misaligned"),
    "never": (ptxsim.Deadlock, "bar.sync 1"),
    "warp_private": (ptxsim.SharedRace, "y[threadIdx.x] = s[threadIdx.x ^ 1]"),
}


def launch(kernel, bug, **kw):
    module = ptxsim.nvcc(KERNELS / "bugs.cu", defines={"BUG": 1} if bug else {})
    grid, block, args = arrays(kernel)
    module.kernel(kernel)[grid, block](*args, budget=20000, **kw)
    return args


@needs_nvcc
@pytest.mark.parametrize("kernel", EXPECTED)
def test_bug_is_reported(kernel):
    error, marker = EXPECTED[kernel]
    with pytest.raises(error) as e:
        launch(kernel, True)
    where = e.value.where
    assert where.kernel == kernel and where.ptx_line > 0 and where.block is not None and where.thread is not None
    assert where.source.startswith("bugs.cu:")
    if marker:
        assert abs(int(where.source.split(":")[1]) - marker_line(KERNELS / "bugs.cu", marker)) <= 1


@needs_nvcc
@pytest.mark.parametrize("kernel", EXPECTED)
@pytest.mark.parametrize("seed", [None, 1])
def test_correct_twin_is_clean(kernel, seed):
    launch(kernel, False, seed=seed)


@needs_nvcc
@pytest.mark.parametrize(
    "kernel,error",
    [
        ("off_by_one", ptxsim.OutOfBounds),
        ("misaligned", ptxsim.Misaligned),
        ("divergent_barrier", ptxsim.BarrierDivergence),
        ("never", ptxsim.Deadlock),
    ],
)
def test_always_on_checks(kernel, error):
    with pytest.raises(error):
        launch(kernel, True, checks=False)


@needs_nvcc
def test_unchecked_missing_wait_reads_poison():
    _, y = launch("async_copy", True, checks=False)
    assert np.isnan(y).all()


@needs_nvcc
def test_message_is_complete():
    with pytest.raises(ptxsim.OutOfBounds) as e:
        launch("off_by_one", True)
    text = str(e.value)
    assert re.search(
        r"4-byte write out of bounds: 0 bytes past the end of off_by_one_param_0 float32\(100,\) \(400 bytes\)", text
    )
    assert re.search(r"bugs\.cu:\d+", text) and "PTX line" in text and "thread (100, 0, 0)" in text and "0x" in text


@needs_nvcc
def test_checks_can_be_chosen():
    launch("warp_private", True, checks=ptxsim.Checks(shared_races=False))
    launch("accumulate", True, checks=ptxsim.Checks(uninitialised=False))


def test_host_writes_after_poison_count():
    y = ptxsim.empty(32)
    y[:] = 1
    entry("ld.global.f32 %f1, [%o]; st.global.f32 [%o], %f1;").kernel("k")[1, 32](y)


def test_poison_lasts_until_written():
    k = entry("setp.lt.u32 %p1, %i, 16; @%p1 st.global.f32 [%o], 0f3F800000;").kernel("k")
    read = entry("ld.global.f32 %f1, [%o];").kernel("k")
    y = ptxsim.empty(32)
    k[1, 32](y)
    read[1, 16](y)
    with pytest.raises(ptxsim.Uninitialised, match=r"\+ 64 bytes"):
        read[1, 32](y)


@pytest.mark.parametrize(
    "load,store,clean",
    [("ld", "st", False), ("ld.acquire.gpu", "st.release.gpu", True), ("ld.volatile", "st.volatile", False)],
)
def test_flag_between_blocks(load, store, clean):
    """Block 0 writes data, then a flag that block 1 waits for to read the data.  Only release/acquire orders the data."""
    m = entry(f"""mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; @%p1 bra WRITE;
      SPIN: {load}.global.u32 %r2, [%base+4]; setp.eq.u32 %p2, %r2, 0; @%p2 bra SPIN;
      ld.global.u32 %r3, [%base]; st.global.u32 [%base+8], %r3; bra END;
      WRITE: st.global.u32 [%base], 42; {store}.global.u32 [%base+4], 1; END:""")
    y = np.zeros(3, np.uint32)
    if clean:
        m.kernel("k")[2, 1](y)
        assert y.tolist() == [42, 1, 42]
    else:
        with pytest.raises(ptxsim.GlobalRace):
            m.kernel("k")[2, 1](y)


def test_same_value_stores_are_no_race():
    y = np.zeros(1, F)
    entry("st.global.f32 [%base], 0f3F800000;").kernel("k")[4, 64](y)
    assert y[0] == 1


def test_shared_atomics_are_no_race_but_mixing_is():
    body = """.shared .align 4 .b8 s[4]; mov.u32 %r1, s; setp.eq.u32 %p1, %i, 0; @%p1 st.shared.u32 [%r1], 0; {}
      atom.shared.add.u32 %r2, [%r1], 1; {} ld.shared.u32 %r3, [%r1]; st.global.u32 [%o], %r3;"""
    y = np.zeros(64, np.uint32)
    entry(body.format("bar.sync 0;", "bar.sync 0;")).kernel("k")[1, 64](y)
    assert (y == 64).all()
    for first, second in (("", "bar.sync 0;"), ("bar.sync 0;", "")):
        with pytest.raises(ptxsim.SharedRace):
            entry(body.format(first, second)).kernel("k")[1, 64](y)


def test_byte_granular_shared_accesses_do_not_clash():
    y = np.zeros(32, np.uint32)
    entry(
        """.shared .align 4 .b8 s[32]; mov.u32 %r1, s; add.u32 %r1, %r1, %i; cvt.u16.u32 %h, %i; st.shared.u8 [%r1], %h;
      ld.shared.u8 %h, [%r1]; cvt.u32.u16 %r2, %h; st.global.u32 [%o], %r2;""".replace("%h", "%r9")
        .replace("cvt.u16.u32 %r9, %i", "mov.u32 %r9, %i")
        .replace("cvt.u32.u16 %r2, %r9", "mov.u32 %r2, %r9")
    ).kernel("k")[1, 32](y)
    assert y.tolist() == list(range(32))


def test_exited_lanes_in_a_member_mask():
    body = "setp.ge.u32 %p1, %i, 16; {} shfl.sync.down.b32 %r1, %i, 1, 31, {}; st.global.u32 [%o], %r1;"
    y = np.zeros(32, np.uint32)
    with pytest.raises(ptxsim.InactiveLane, match="exited"):
        entry(body.format("@%p1 exit;", "-1")).kernel("k")[1, 32](y)
    with pytest.raises(ptxsim.InactiveLane, match="lane 15 reads from lane 16"):
        entry(body.format("@%p1 exit;", "0xffff")).kernel("k")[1, 32](y)
    with pytest.raises(ptxsim.InactiveLane, match="not in its member mask"):
        entry(body.format("", "0xffff")).kernel("k")[1, 32](y)


def test_trap():
    with pytest.raises(ptxsim.DeviceTrap):
        entry("setp.eq.u32 %p1, %i, 3; @%p1 trap;").kernel("k")[1, 32](np.zeros(1, F))
