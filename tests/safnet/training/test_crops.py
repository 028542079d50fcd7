import os
import signal
from dataclasses import replace
from itertools import islice

import numpy as np
import OpenImageIO as oiio
import pytest
import torch

from safnet.data.datasets import DatasetError, find_scenes, in_all_orders, load_scene
from safnet.data.scenes import SceneError, SceneSettings, synthesize_scene, write_scene
from safnet.training.crops import (
    POOL,
    Batches,
    CachedScenes,
    Crops,
    FileScenes,
    PanoramaScenes,
    Whole,
    augment,
    draw_shifts,
    load_crops,
    open_scenes,
)
from safnet.training.settings import TrainSettings
from safnet_ops.reference import backward_warp
from tests.support import scenes as scene_folders

SIZE = scene_folders.SCENE
# So small scenes only wait for more threads on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def panoramas(tmp_path_factory):
    """Two panoramas, of which the second is for training."""
    folder = tmp_path_factory.mktemp("panoramas")
    for seed in range(2):
        pixels = np.random.default_rng(seed).uniform(0.01, 2.0, (16, 32, 3)).astype(np.float32)
        target = oiio.ImageOutput.create("sky.hdr")
        assert target.open(str(folder / f"sky_{seed}.hdr"), oiio.ImageSpec(32, 16, 3, "float"))
        assert target.write_image(pixels)
        target.close()
    return folder


@pytest.fixture
def settings(tmp_path):
    return TrainSettings(tmp_path / "run", crop=32, window=8, windows=3, batch=4, steps=6, workers=0, threads=1)


class Shifts:
    """Scenes without files."""

    def choose(self, random, crop):
        return int(random.integers(3))

    def read(self, number):
        return scene_folders.make_scene(number)

    def key(self, number):
        return str(number)


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True) if isinstance(a, torch.Tensor))


# ---- crops -----------------------------------------------------------------------------------------------------------


def test_crops_repeat_and_flow_follows_the_augmentation(settings):
    for number in range(8):
        crop = Crops(Shifts(), settings)[number]
        assert equal(crop, Crops(Shifts(), settings)[number])
        # The scenes move by whole pixels, so a frame warped by the true flow is the reference, up to its exposure.
        inner = (..., slice(8, -8), slice(8, -8))
        warped = backward_warp(crop.exposures[:1, :3], crop.flow[:1])
        assert torch.allclose(warped[inner], crop.exposures[1:2, :3][inner], atol=1e-3)
        assert crop.windows.shape == (3,)
        assert crop.windows.unique().numel() == 3
        assert 0 <= crop.windows.min() <= crop.windows.max() < 16


def test_flow_follows_frames_whose_crops_are_moved(settings):
    moved = replace(settings, shift=16.0)
    distances = []
    for number in range(8):
        crop, still = Crops(Shifts(), moved)[number], Crops(Shifts(), settings)[number]
        grid = torch.stack(torch.meshgrid(torch.arange(32), torch.arange(32), indexing="xy"))
        target = crop.flow + grid
        inside = ((target >= 0) & (target <= 31)).all(1)
        assert not crop.visible[~inside].any()
        for frame, outer in enumerate((0, 2)):
            warped = backward_warp(crop.exposures[outer, :3][None], crop.flow[frame][None])[0]
            unclipped = crop.truth < 0.9 * 2.0 ** (0, -2, -4)[outer]
            seen = crop.visible[frame].expand(3, -1, -1) & unclipped
            torch.testing.assert_close(warped[seen], crop.exposures[1, :3][seen], rtol=0, atol=1e-3)
        distances.append((crop.flow.mean((2, 3)) - still.flow.mean((2, 3))).abs().max().item())
    assert max(distances) > 2


def test_shifts_stay_inside_the_scene_and_reach_far():
    shifts = np.array([draw_shifts(np.random.default_rng(seed), (3, 0), (10, 20), 12.0) for seed in range(300)])
    assert shifts.shape == (300, 2, 2)
    assert (shifts.min((0, 1)) == (-3, 0)).all()
    assert shifts[..., 0].max() == 7
    assert 8 < shifts[..., 1].max() <= 12
    assert draw_shifts(np.random.default_rng(0), (3, 0), (10, 20), 0.0) == [(0, 0), (0, 0)]


def test_augmentation_permutes_frames_and_truth_alike():
    frames = torch.arange(27.0).view(3, 3, 1, 3).expand(3, 3, 3, 3)
    parts = augment(np.random.default_rng(1), frames, frames[1], torch.zeros(2, 2, 3, 3), torch.ones(2, 3, 3).bool())
    assert torch.equal(parts[0][1], parts[1])


def test_processes_share_the_batches_and_a_resumed_run_sees_the_rest(settings):
    whole = list(Batches(settings, 0, 0, 1))
    assert whole == [list(range(4 * step, 4 * step + 4)) for step in range(6)]
    shares = zip(Batches(settings, 2, 0, 2), Batches(settings, 2, 1, 2), strict=True)
    assert [sorted(one + other) for one, other in shares] == whole[2:]


def test_worker_processes_change_nothing(settings):
    alone = islice(load_crops(Shifts(), settings, 1, 0, 1), 4)
    for one, other in zip(alone, islice(load_crops(Shifts(), replace(settings, workers=2), 1, 0, 1), 4), strict=True):
        assert equal(one, other)


def test_workers_outlive_a_signal_to_the_whole_group(settings):
    """Ctrl-C and SLURM tell every process; the crops of the step at hand must still come."""
    batches = iter(load_crops(Shifts(), replace(settings, workers=1), 0, 0, 1))
    next(batches)
    worker = batches._workers[0].pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker, number)
    assert len(list(batches)) == 5


def test_scenes_smaller_than_the_crops(settings):
    with pytest.raises(DatasetError, match="all scenes must hold a crop of 128, one is 64x64"):
        Crops(Shifts(), replace(settings, crop=128))[0]


# ---- data sets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["kalantari17", "challenge123", "tel23", "ntire21"])
def test_every_data_set_gives_crops(settings, tmp_path, dataset):
    if dataset == "kalantari17":
        scene_folders.write_kalantari17(tmp_path, ["001"])
    else:
        getattr(scene_folders, f"write_{dataset}")(tmp_path, "001")
    if (tmp_path / "Test").exists():
        (tmp_path / "Test").rename(tmp_path / "Training")
    scenes = open_scenes(replace(settings, scenes=tmp_path, dataset=dataset))
    crop = Crops(scenes, settings)[5]
    assert crop.exposures.shape == (3, 6, 32, 32)
    assert not crop.visible.any()
    # Frames and truth are in the same units: unclipped parts of the reference frame show the truth.
    shown = (crop.exposures[1, 3:].amax(0) < 0.95).expand(3, -1, -1)
    if dataset != "challenge123":  # whose scenes were not written for other orders
        assert (crop.exposures[1, :3] - crop.truth)[shown].abs().max() < 0.02


def test_challenge123_in_all_six_orders(tmp_path):
    """Every moment shows another picture: frame k of an order must come from its moment, the truth from the reference's."""
    for moment in (1, 2, 3):
        folder = tmp_path / "Training" / f"007_{moment}"
        truth = scene_folders.make_radiance(moment)
        for k in (1, 2, 3):
            scene_folders.write(folder / f"ldr_img_{k}.tif", scene_folders.expose(truth, 4.0 ** (k - 1)))
        scene_folders.write(folder / "hdr_img.hdr", truth)
        (folder / "exposure.txt").write_text("-2\n0\n2\n")
    orders = in_all_orders(find_scenes("challenge123", tmp_path, "Training"))
    assert [files.name for files in orders] == [f"007 {o}" for o in ("123", "132", "213", "231", "312", "321")]
    for files in orders:
        sample = load_scene(files)
        for k, moment in enumerate(files.name[-3:]):
            radiance = scene_folders.make_radiance(int(moment))
            expected = scene_folders.expose(radiance, 4.0**k).transpose(2, 0, 1)
            assert np.allclose(sample.frames[k].numpy() * 65536, expected, atol=1)
        truth = scene_folders.make_radiance(int(files.name[-2])).transpose(2, 0, 1)
        assert np.allclose(sample.truth.numpy(), truth, rtol=0.02, atol=0.01)


def test_orders_are_an_option(settings, tmp_path):
    scene_folders.write_challenge123(tmp_path, "001")
    (tmp_path / "Test").rename(tmp_path / "Training")
    for orders, count in (("all", 6), ("given", 1)):
        scenes = open_scenes(replace(settings, scenes=tmp_path, dataset="challenge123", orders=orders))
        assert len(scenes.files) == count


def test_the_missing_file_is_named(settings, tmp_path):
    scene_folders.write_challenge123(tmp_path, "001")
    (tmp_path / "Test").rename(tmp_path / "Training")
    missing = tmp_path / "Training/001_3/hdr_img.hdr"  # only other orders than the given one need it
    missing.unlink()
    with pytest.raises(DatasetError, match=r"001_3/hdr_img\.hdr does not exist"):
        open_scenes(replace(settings, scenes=tmp_path, dataset="challenge123"))
    open_scenes(replace(settings, scenes=tmp_path, dataset="challenge123", orders="given"))


def test_validation_scenes_come_whole(tmp_path):
    write_scene(scene_folders.make_scene(0), tmp_path / "Test/0")
    exposures, truth = Whole(find_scenes("kalantari17", tmp_path, "Test"))[0]
    assert exposures.shape == (3, 6, SIZE, SIZE)
    assert truth.shape == (3, SIZE, SIZE)


# ---- scenes on the way -----------------------------------------------------------------------------------------------


def test_scenes_from_panoramas_are_the_same_for_a_seed(settings, panoramas):
    settings = replace(settings, panoramas=panoramas)
    crops = Crops(open_scenes(settings), settings)
    again = Crops(open_scenes(replace(settings, cache=settings.out / "elsewhere")), settings)
    for number in (0, 1, 40):
        assert equal(crops[number], again[number])
    other = Crops(open_scenes(replace(settings, seed=1)), replace(settings, seed=1))
    assert not torch.equal(crops[0].truth, other[0].truth)
    assert crops[0].visible.any()


def test_crops_move_on_through_ever_new_scenes(settings, panoramas):
    scenes = PanoramaScenes([], replace(settings, reuse=2))
    random = np.random.default_rng(0)
    chosen = [scenes.choose(random, crop) for crop in range(4000)]
    assert all(crop // 2 <= scene < crop // 2 + POOL for crop, scene in enumerate(chosen))
    uses = np.bincount(chosen)[POOL:-POOL]
    assert uses.mean() == pytest.approx(2, abs=0.05)


def test_the_cache_gives_what_it_was_given_and_keeps_little(tmp_path):
    class Counted(Shifts):
        made = 0

        def read(self, number):
            self.made += 1
            return super().read(number)

    source = Counted()
    scenes = CachedScenes(source, tmp_path / "cache", keep=2)
    for number in (0, 1, 0, 1):
        scene = scenes.read(number)
        assert equal(scene, scene_folders.make_scene(number))
        assert scene.evs == (0.0, 2.0, 4.0)
    assert source.made == 2
    scenes.read(2)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["1.safetensors", "2.safetensors"]
    assert equal(scenes.read(0), scene_folders.make_scene(0))  # thrown away, and made again


def test_a_cached_scene_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        CachedScenes(Shifts(), tmp_path).read(0)
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o640]


def test_a_data_sets_cache_knows_its_files(tmp_path):
    for number in range(2):
        write_scene(scene_folders.make_scene(number), tmp_path / f"{number}")
    scenes = FileScenes(find_scenes("kalantari17", tmp_path))
    before = scenes.key(0)
    assert before != scenes.key(1)
    os.utime(tmp_path / "0/exposure.txt", (1, 1))
    assert scenes.key(0) != before


def test_reversed_exposures_swap_the_moments(panoramas):
    """Short and long frame change places in time: so do flow and visibility, while the truth stays."""
    from safnet.data.scenes import find_panoramas, load_panorama

    loaded = [load_panorama(path) for path in find_panoramas(panoramas)]
    ranges = SceneSettings(48, 64, noise=0.0).exact()
    given, reverse = (synthesize_scene(loaded, ranges, 3, 1, reverse=r) for r in (False, True))
    assert torch.equal(given.truth, reverse.truth)
    assert torch.equal(given.flow, reverse.flow.flip(0))
    assert torch.equal(given.visible, reverse.visible.flip(0))
    assert given.evs == reverse.evs
    assert torch.equal(given.frames[1], reverse.frames[1])
    assert not torch.equal(given.frames[0], reverse.frames[0])


def test_panorama_folders_that_cannot_be(settings, tmp_path):
    with pytest.raises(SceneError, match="does not exist"):
        open_scenes(replace(settings, panoramas=tmp_path / "none"))
