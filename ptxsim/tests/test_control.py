"""Control flow: branches, scopes, calls, barriers, schedules."""

import numpy as np
import pytest

import ptxsim
from ptxsim import Module
from ptxsim.tests.ptx_support import HEADER, entry


def run(body, n=64, **kw):
    y = np.zeros(n, np.uint32)
    entry(body).kernel("k")[1, n](y, **kw)
    return y


def test_divergent_loop_and_predication():
    y = run("""mov.u32 %r1, 0; mov.u32 %r2, %i;
      LOOP: setp.eq.u32 %p1, %r2, 0; @%p1 bra DONE; add.u32 %r1, %r1, %r2; sub.u32 %r2, %r2, 1; bra.uni LOOP;
      DONE: and.b32 %r3, %i, 1; setp.ne.u32 %p2, %r3, 0; @%p2 add.u32 %r1, %r1, 1000; @!%p2 mul.lo.u32 %r1, %r1, 2;
      st.global.u32 [%o], %r1;""")
    i = np.arange(64)
    t = i * (i + 1) // 2
    np.testing.assert_array_equal(y, np.where(i % 2, t + 1000, t * 2))


def test_sparse_and_early_exit():
    y = run("mov.u32 %r1, 1; setp.gt.u32 %p1, %i, 2; @%p1 exit; mov.u32 %r1, 5; st.global.u32 [%o], %r1;", 128)
    assert y.tolist() == [5, 5, 5] + [0] * 125


def test_branch_table():
    y = run("""T: .branchtargets A, B, C; and.b32 %r1, %i, 3; min.u32 %r1, %r1, 2; brx.idx %r1, T;
      A: mov.u32 %r2, 10; bra E; B: mov.u32 %r2, 20; bra E; C: mov.u32 %r2, 30; E: st.global.u32 [%o], %r2;""")
    np.testing.assert_array_equal(y, np.tile([10, 20, 30, 30], 16))


def test_scopes_shadow_names():
    y = run(
        """{ .reg .b32 t; mov.u32 t, 1; { .reg .b32 t; mov.u32 t, 5; bra L; mov.u32 t, 9; L: add.u32 %r1, t, 0; }
      { .reg .b32 t; mov.u32 t, 7; bra L; mov.u32 t, 9; L: add.u32 %r1, %r1, t; } add.u32 %r1, %r1, t; }
      st.global.u32 [%o], %r1;""",
        32,
    )
    assert (y == 13).all()


def test_calls_are_inlined_with_divergent_returns():
    m = Module.from_source(
        HEADER
        + """
.func (.param .b32 res) twice(.param .b32 x) {
 .reg .b32 %a; ld.param.b32 %a, [x]; shl.b32 %a, %a, 1; st.param.b32 [res], %a; ret; }
.func (.param .b32 res) f(.param .b32 x) {
 .reg .b32 %a<3>; .reg .pred %p; ld.param.b32 %a0, [x]; setp.lt.u32 %p, %a0, 8; @%p bra SMALL;
 st.param.b32 [res], 0; ret;
 SMALL: { .param .b32 q; st.param.b32 [q], %a0; .param .b32 r; call.uni (r), twice, (q); ld.param.b32 %a1, [r]; }
 st.param.b32 [res], %a1; ret; }
.visible .entry k(.param .u64 out) {
 .reg .b64 %a; .reg .b32 %r<4>; mov.u32 %r0, %tid.x; ld.param.u64 %a, [out]; mad.wide.u32 %a, %r0, 4, %a;
 { .param .b32 q; st.param.b32 [q], %r0; .param .b32 r; call.uni (r), f, (q); ld.param.b32 %r1, [r]; }
 { .param .b32 q; st.param.b32 [q], %r1; .param .b32 r; call.uni (r), f, (q); ld.param.b32 %r2, [r]; }
 st.global.u32 [%a], %r2; ret; }"""
    )
    y = np.zeros(32, np.uint32)
    m.kernel("k")[1, 32](y)
    assert y.tolist() == [0, 4, 8, 12] + [0] * 28


def test_recursion_is_refused():
    m = Module.from_source(HEADER + ".func f() { call.uni f; ret; }\n.visible .entry k() { call.uni f; ret; }")
    with pytest.raises(ptxsim.Unsupported, match="recursion"):
        m.kernel("k")


def test_special_registers_in_a_3d_launch():
    m = entry("""
      mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.x; mov.u32 %r5, %nctaid.y;
      mov.u32 %r6, %tid.y; mov.u32 %r7, %tid.z; mov.u32 %r8, %ntid.x; mov.u32 %r9, %ntid.y; mov.u32 %r10, %ntid.z;
      mad.lo.u32 %r11, %r3, %r5, %r2; mad.lo.u32 %r11, %r11, %r4, %r1; mul.lo.u32 %r12, %r8, %r9; mul.lo.u32 %r13, %r12, %r10;
      mad.lo.u32 %r14, %r11, %r13, %i; mad.lo.u32 %r14, %r6, %r8, %r14; mad.lo.u32 %r14, %r7, %r12, %r14;
      mad.wide.u32 %d1, %r14, 4, %base; st.global.u32 [%d1], %r14;""")
    y = ptxsim.empty(2 * 3 * 4 * 5 * 3 * 2, np.uint32)
    m.kernel("k")[(2, 3, 4), (5, 3, 2)](y)
    np.testing.assert_array_equal(y, np.arange(y.size))


BARRIER = """
 .shared .align 4 .b8 s[512]; mov.u32 %r1, s; mad.lo.u32 %r2, %i, 4, %r1; mov.u32 %r5, %i; mov.u32 %n, 0;
 LOOP: st.shared.u32 [%r2], %r5; bar.sync 0; xor.b32 %r3, %i, 127; mad.lo.u32 %r3, %r3, 4, %r1; ld.shared.u32 %r4, [%r3];
 add.u32 %r5, %r5, %r4; bar.sync 0; add.u32 %n, %n, 1; setp.lt.u32 %p1, %n, 5; @%p1 bra LOOP; st.global.u32 [%o], %r5;"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_barriers_in_any_order(seed):
    assert (run(BARRIER, 128, seed=seed) == 127 * 16).all()


def test_a_seed_exposes_order_dependence():
    body = BARRIER.replace("bar.sync 0;", "", 1)
    results = {run(body, 128, seed=s, checks=False).tobytes() for s in range(6)}
    assert len(results) > 1


def test_barrier_reduction():
    y = run("setp.lt.u32 %p1, %i, 37; bar.red.popc.u32 %r1, 0, %p1; st.global.u32 [%o], %r1;", 96)
    assert (y == 37).all()


def test_named_barriers_pair_producer_and_consumer():
    y = run("""
      .shared .align 4 .b8 s[128]; mov.u32 %r1, s; and.b32 %r2, %i, 31; mad.lo.u32 %r1, %r2, 4, %r1; setp.lt.u32 %p1, %i, 32;
      @%p1 bra CONSUMER; st.shared.u32 [%r1], %i; bar.arrive 1, 64; bra END;
      CONSUMER: bar.sync 1, 64; ld.shared.u32 %r3, [%r1]; st.global.u32 [%o], %r3; END:""")
    assert y[:32].tolist() == list(range(32, 64))


def test_spin_lock_within_a_warp_makes_progress():
    m = entry("""
      SPIN: atom.global.cas.b32 %r1, [%base], 0, 1; setp.ne.u32 %p1, %r1, 0; @%p1 bra SPIN;
      membar.gl; ld.volatile.global.u32 %r2, [%base+4]; add.u32 %r2, %r2, 1; st.volatile.global.u32 [%base+4], %r2; membar.gl;
      atom.global.exch.b32 %r3, [%base], 0;""")
    y = np.zeros(2, np.uint32)
    m.kernel("k")[2, 32](y)
    assert y.tolist() == [0, 64]
