import math

import numpy as np
import OpenImageIO as oiio
import pytest
import torch

from safnet.data.datasets import find_scenes, load_scene
from safnet.data.scenes import (
    Panorama,
    SceneError,
    SceneSettings,
    find_panoramas,
    load_panorama,
    synthesize,
    synthesize_scene,
)
from safnet.radiance import GAMMA
from safnet_ops.reference import backward_warp

EXACT = SceneSettings(height=96, width=128, noise=0.0).exact()


def write_panorama(path, radiance):
    pixels = np.ascontiguousarray(radiance, np.float32)
    target = oiio.ImageOutput.create(path.name)
    assert target.open(str(path), oiio.ImageSpec(pixels.shape[1], pixels.shape[0], 3, "float"))
    assert target.write_image(pixels)
    target.close()


def smooth_radiance(seed, height=64):
    """Light that varies slowly over the sphere, by a factor of a hundred."""
    random = np.random.default_rng(seed)
    row, column = np.mgrid[0:height, 0 : 2 * height] / height
    waves = sum(
        random.normal(size=3)
        * np.cos(math.pi * (random.integers(0, 5) * column + random.integers(0, 4) * row))[..., None]
        for _ in range(8)
    )
    return np.exp(waves)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("panoramas")
    for number in range(9):
        write_panorama(path / f"sky_{number}.{'exr' if number % 2 else 'hdr'}", smooth_radiance(number))
    return path


@pytest.fixture(scope="module")
def panoramas(folder) -> list[Panorama]:
    return [load_panorama(path) for path in find_panoramas(folder)]


def test_every_seventh_panorama_is_held_out(folder):
    validation, training = find_panoramas(folder, "validation"), find_panoramas(folder, "train")
    assert [path.stem for path in validation] == ["sky_0", "sky_7"]
    assert sorted(validation + training) == find_panoramas(folder)


def test_panorama_folders_that_are_none(tmp_path):
    with pytest.raises(SceneError, match=r"nowhere does not exist"):
        find_panoramas(tmp_path / "nowhere")
    with pytest.raises(SceneError, match=r"holds no \.hdr or \.exr"):
        find_panoramas(tmp_path)
    (tmp_path / "broken.hdr").write_bytes(b"not a picture")
    with pytest.raises(SceneError, match=r"broken\.hdr cannot be read"):
        load_panorama(tmp_path / "broken.hdr")
    write_panorama(tmp_path / "square.exr", np.ones((16, 16, 3)))
    with pytest.raises(SceneError, match=r"twice as wide as high, got 16x16"):
        load_panorama(tmp_path / "square.exr")
    write_panorama(tmp_path / "black.exr", np.zeros((16, 32, 3)))
    with pytest.raises(SceneError, match=r"is black"):
        load_panorama(tmp_path / "black.exr")


def test_negative_and_extreme_panorama_values_give_finite_scenes(tmp_path):
    radiance = smooth_radiance(0)
    radiance[3, 5] = 3.5e5
    radiance[10, 10] = -1e-4
    radiance[20, 7] = np.inf
    write_panorama(tmp_path / "sun.exr", radiance)
    scene = synthesize_scene([load_panorama(tmp_path / "sun.exr")], SceneSettings(64, 64), seed=0)
    for part in (scene.frames, scene.truth, scene.flow):
        assert part.isfinite().all()
    assert scene.truth.min() >= 0
    assert scene.truth.max() <= 1


def test_a_scene_depends_on_seed_and_index_only(panoramas):
    settings = SceneSettings(height=48, width=64)
    first, again = (synthesize_scene(panoramas, settings, seed=3, index=5) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert one == other if isinstance(one, tuple) else torch.equal(one, other)
    assert not torch.equal(first.frames, synthesize_scene(panoramas, settings, 3, 6).frames)
    assert not torch.equal(first.frames, synthesize_scene(panoramas, settings, 4, 5).frames)


@pytest.mark.parametrize("index", range(4))
def test_frames_are_the_exposed_truth(panoramas, index):
    scene = synthesize_scene(panoramas, EXACT, seed=1, index=index)
    assert scene.frames.shape == (3, 3, 96, 128)
    assert scene.truth.shape == (3, 96, 128)
    assert scene.evs == tuple(sorted(scene.evs))
    steps = scene.frames * 2**16
    assert torch.equal(steps, steps.round())
    assert scene.frames.min() >= 0
    assert scene.frames.max() < 1
    reference = scene.frames[1]
    shown = reference < 0.99
    linear = reference.pow(GAMMA) / 2 ** (scene.evs[1] - scene.evs[0])
    noise = 0.01 / 2 ** (scene.evs[1] - scene.evs[0])
    assert (linear - scene.truth)[shown].abs().mean() < noise


@pytest.mark.parametrize("index", range(4))
def test_the_flow_leads_to_the_same_surface(panoramas, index):
    """Frames warped by the true flow agree with the reference; without it they do not, where there is motion."""
    settings = SceneSettings(96, 128, (2.0, 2.0), 0.0, 0.0, (10.0, 30.0), (2.0, 6.0), noise=0.0, eight_bit=0.0)
    scene = synthesize_scene(panoramas, settings, seed=2, index=index)
    linear = [frame.pow(GAMMA) / 2**ev for frame, ev in zip(scene.frames, scene.evs, strict=True)]
    for number, frame in ((0, 0), (1, 2)):
        warped = backward_warp(linear[frame][None], scene.flow[number][None])[0]
        unclipped = backward_warp(scene.frames[frame][None], scene.flow[number][None])[0].amax(0) < 0.97
        usable = scene.visible[number] & unclipped & (scene.frames[1].amax(0) < 0.97)
        assert usable.float().mean() > 0.1
        aligned = (warped - linear[1]).abs().amax(0)[usable]
        unaligned = (linear[frame] - linear[1]).abs().amax(0)[usable]
        assert aligned.median() < 0.4 * unaligned.median()


def test_motion_stays_within_the_asked_limit(panoramas):
    settings = SceneSettings(96, 128, motion=(0.0, 0.0), shake=(0.0, 0.0))
    for index in range(4):
        still = synthesize_scene(panoramas, settings, seed=0, index=index)
        background = still.flow.abs().amax((0, 1)).median()
        assert background < 1e-3


def test_the_asked_part_of_the_reference_is_clipped(panoramas):
    settings = SceneSettings(96, 128, clipped=(0.2, 0.2), noise=0.0).exact()
    for index in range(4):
        scene = synthesize_scene(panoramas, settings, seed=0, index=index)
        part = (scene.frames[1].amax(0) > 0.999).float().mean()
        assert 0.15 < part < 0.25


def test_wrong_exposures_keep_the_truth(panoramas):
    """Errors of EV and camera curve belong to the frames; the truth stays what the reference frame shows."""
    settings = SceneSettings(64, 64, ev_error=0.15, response_spread=0.2, noise=0.0, eight_bit=0.0)
    for index in range(6):
        scene = synthesize_scene(panoramas, settings, seed=5, index=index)
        shown = scene.frames[1] < 0.99
        linear = scene.frames[1].pow(GAMMA) / 2 ** (scene.evs[1] - scene.evs[0])
        assert (linear - scene.truth)[shown].abs().max() < 1e-3


def test_synthesize_writes_what_load_scene_reads(folder, tmp_path):
    settings = SceneSettings(48, 64)
    written = synthesize(folder, tmp_path, 2, settings, split="validation", seed=7)
    assert written == tmp_path / "Test"
    assert sorted(path.name for path in written.iterdir()) == ["0000", "0001"]
    held_out = [load_panorama(path) for path in find_panoramas(folder, "validation")]
    for index, files in enumerate(find_scenes("kalantari17", tmp_path, "Test")):
        scene, sample = synthesize_scene(held_out, settings, 7, index), load_scene(files)
        assert torch.equal(sample.frames, scene.frames)
        assert sample.evs == pytest.approx(scene.evs)
        # RGBE has 8 bits for the brightest channel, and the same steps for the others.
        error = (sample.truth - scene.truth).abs() / scene.truth.amax(0)
        assert error.max() < 1 / 127
        assert abs(float(sample.truth.mean() / scene.truth.mean() - 1)) < 2e-3
        assert sample.flow is not None
        assert torch.allclose(sample.flow, scene.flow, atol=0.04, rtol=1e-3)
        assert torch.equal(torch.from_numpy(np.load(files.flow.with_name("visible.npy"))), scene.visible)


def test_synthesize_goes_on_where_it_was(folder, tmp_path):
    settings = SceneSettings(32, 32)
    synthesize(folder, tmp_path / "once", 3, settings)
    synthesize(folder, tmp_path / "twice", 1, settings)
    kept = tmp_path / "twice/Training/0000/HDRImg.hdr"
    before = kept.stat().st_mtime_ns
    synthesize(folder, tmp_path / "twice", 3, settings)
    assert kept.stat().st_mtime_ns == before
    for path in (tmp_path / "once").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "twice" / path.relative_to(tmp_path / "once")).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "--count must be at least 1, got 0"),
        ({"settings": SceneSettings(16, 64)}, "--size must be at least 32, got 64x16"),
        ({"settings": SceneSettings(ev_step=(3.0, 1.0))}, r"--ev-step must be two ascending numbers .* got 3 1"),
        ({"settings": SceneSettings(clipped=(0.0, 1.0))}, r"--clipped .* got 0 1"),
        ({"settings": SceneSettings(motion=(-1.0, 5.0))}, r"--motion .* got -1 5"),
    ],
)
def test_settings_that_cannot_be(folder, tmp_path, change, message):
    with pytest.raises(SceneError, match=message):
        synthesize(**{"panorama_folder": folder, "out": tmp_path / "out", "count": 1, **change})
    assert not (tmp_path / "out").exists()
