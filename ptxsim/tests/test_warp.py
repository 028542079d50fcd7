"""Warp-level instructions."""

import numpy as np
import pytest

from ptxsim.tests.ptx_support import run_op

LANE = np.arange(64) % 32
FIRST = np.arange(64) // 32 * 32


@pytest.mark.parametrize(
    "mode,clamp,delta",
    [
        ("up", 0, 3),
        ("down", 31, 5),
        ("bfly", 31, 9),
        ("idx", 31, 6),
        ("down", 0x1807, 2),
        ("up", 0x1800, 1),
        ("idx", 0x181F, 3),
        ("bfly", 0x181F, 4),
    ],
)
def test_shfl(rng, mode, clamp, delta):
    x = rng.integers(0, 2**32, 64, dtype=np.uint32)
    seg, c = clamp >> 8 & 31, clamp & 31
    low, high = LANE & seg, (LANE & seg) | (c & ~seg)
    j = {"up": LANE - delta, "down": LANE + delta, "bfly": LANE ^ delta, "idx": low | (delta & ~seg)}[mode]
    ok = j >= high if mode == "up" else j <= high
    text = f"{{.reg .b32 t; shfl.sync.{mode}.b32 t|%z, %a, {delta}, {clamp}, -1;}}"
    np.testing.assert_array_equal(run_op(text, bool, x), ok)
    got = run_op(f"shfl.sync.{mode}.b32 %z, %a, {delta}, {clamp}, 0xffffffff;", np.uint32, x)
    np.testing.assert_array_equal(got, x[FIRST + np.where(ok, j, LANE)])


def test_shfl_with_lane_dependent_index(rng):
    x, k = rng.integers(0, 2**32, 64, dtype=np.uint32), rng.integers(0, 32, 64).astype(np.uint32)
    np.testing.assert_array_equal(run_op("shfl.sync.idx.b32 %z, %a, %b, 31, -1;", np.uint32, x, k), x[FIRST + k])


def test_vote(rng):
    p = rng.random(64) < 0.5
    p[32:] = True
    ballot = run_op("vote.sync.ballot.b32 %z, %a, -1;", np.uint32, p)
    assert ballot[0] == sum(int(v) << i for i, v in enumerate(p[:32])) and (ballot[32:] == 0xFFFFFFFF).all()
    np.testing.assert_array_equal(run_op("vote.sync.all.pred %z, %a, -1;", bool, p), np.arange(64) >= 32)
    np.testing.assert_array_equal(run_op("vote.sync.any.pred %z, !%a, -1;", bool, p), np.arange(64) < 32)
    np.testing.assert_array_equal(run_op("vote.sync.uni.pred %z, %a, -1;", bool, p), np.arange(64) >= 32)


def test_vote_in_a_divergent_branch():
    x = np.arange(64, dtype=np.uint32)
    text = "{.reg .pred q, t; mov.u32 %z, 0; setp.lt.u32 q, %a, 40; setp.ge.u32 t, %a, 4; @q vote.sync.ballot.b32 %z, t, 0xff;}"
    got = run_op(text.replace("0xff", "%b"), np.uint32, x, np.where(x < 32, 0xFFFFFFFF, 0xFF).astype(np.uint32))
    assert got[0] == 0xFFFFFFF0 and got[39] == 0xFF and got[40] == 0


def test_match(rng):
    x = rng.integers(0, 4, 64).astype(np.uint32)
    want = [sum(1 << k for k in range(32) if x[f + k] == v) for f, v in zip(FIRST, x)]
    np.testing.assert_array_equal(run_op("match.any.sync.b32 %z, %a, -1;", np.uint32, x), np.array(want, np.uint32))
    x[32:] = 9
    np.testing.assert_array_equal(
        run_op("{.reg .b32 t; match.all.sync.b32 t|%z, %a, -1;}", bool, x), np.arange(64) >= 32
    )


@pytest.mark.parametrize("op,ty,f", [("add", "s32", np.sum), ("min", "s32", np.min), ("max", "u32", np.max)])
def test_redux(rng, op, ty, f):
    x = rng.integers(0, 1000, 64).astype(np.int32 if ty == "s32" else np.uint32)
    want = np.repeat([f(x[:32]), f(x[32:])], 32)
    np.testing.assert_array_equal(run_op(f"redux.sync.{op}.{ty} %z, %a, -1;", x.dtype, x), want)


def test_redux_bits(rng):
    x = rng.integers(0, 2**32, 64, dtype=np.uint32)
    want = np.repeat([np.bitwise_xor.reduce(x[:32]), np.bitwise_xor.reduce(x[32:])], 32)
    np.testing.assert_array_equal(run_op("redux.sync.xor.b32 %z, %a, -1;", np.uint32, x), want)


def test_activemask_and_lane_masks():
    x = np.arange(64, dtype=np.uint32)
    got = run_op("{.reg .pred q; mov.u32 %z, 0; setp.lt.u32 q, %a, 5; @q activemask.b32 %z;}", np.uint32, x)
    assert got.tolist() == [31] * 5 + [0] * 59
    np.testing.assert_array_equal(run_op("mov.u32 %z, %lanemask_lt;", np.uint32, x), (1 << LANE) - 1)


def test_elect():
    got = run_op("{.reg .b32 t; elect.sync t|%z, -1;}", bool, np.zeros(64, np.uint32))
    np.testing.assert_array_equal(got, LANE == 0)
