"""`safnet evaluate` from folders to files: its numbers, what it leaves out, and how it resumes."""

import csv
import hashlib
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import safnet
from safnet.cli import app
from safnet.data.datasets import find_scenes, load_scene, read_radiance
from safnet.evaluation import methods as module
from safnet.evaluation.methods import BaselineMethod, EvaluationError, ModelMethod, PredictionMethod
from safnet.evaluation.run import Settings, evaluate
from safnet.evaluation.timing import count_multiply_adds, time_model
from safnet.metrics import psnr_l, psnr_mu, through_rgbe
from safnet.model import SAFNet
from safnet.weights import save_model
from tests.support.scenes import EVS, HEIGHT, WIDTH, handheld, write, write_kalantari17, write_ntire21

NAMES = ["001", "002", "003"]
SETTINGS = Settings("kalantari17", picture_width=96)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SAFNet("small").eval()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_model(model, path)
    return path


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    write_kalantari17(root, NAMES, shift=4)
    return root


@pytest.fixture
def scenes(root):
    return find_scenes("kalantari17", root)


@pytest.fixture
def baseline():
    return BaselineMethod("unaligned")


def predictions(folder, scenes, change=lambda truth: truth, names=NAMES):
    """A folder of results that are the truth, changed."""
    for files, name in zip(scenes, names, strict=False):
        truth = load_scene(files).truth.permute(1, 2, 0).numpy()
        write(folder / f"{name}.exr", change(truth.astype(np.float32)))
    return PredictionMethod(folder.name, folder, scenes)


def run(*options):
    return CliRunner().invoke(app, ["evaluate", *map(str, options)])


def strict_json(path):
    """Parse JSON as other languages do, which know no NaN or Infinity."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_the_command_from_scenes_to_files(root, weights, tmp_path):
    save = tmp_path / "results"
    options = ["--root", root, "--model", weights, "--baseline", "reference", "--save", save, "--timing-runs", 1]
    result = run("--dataset", "kalantari17", *options)
    assert result.exit_code == 0, result.output
    assert "Means on kalantari17" in result.output
    rows = list(csv.DictReader((save / "scores.csv").open()))
    assert [(row["scene"], row["method"]) for row in rows] == [(n, m) for n in NAMES for m in ("random", "reference")]
    # The reference baseline is the linearized middle frame: its scores follow from the files alone.
    for row in rows[1::2]:
        files = next(scene for scene in find_scenes("kalantari17", root) if scene.name == row["scene"])
        sample = load_scene(files)
        linear = sample.frames[1].double() ** 2.2 / 4
        assert float(row["psnr_l"]) == pytest.approx(psnr_l(linear, sample.truth), abs=1e-3)
        assert float(row["psnr_mu"]) == pytest.approx(psnr_mu(linear, sample.truth), abs=1e-3)
        assert float(row["clipped_part"]) == pytest.approx(float((sample.frames[1].amax(0) >= 0.98).float().mean()))
    data = strict_json(save / "scores.json")
    network, reference = data["methods"]
    assert network["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert network["timing"]["parameters"] == 566713
    assert len(network["timing"]["seconds"]) == 1
    assert reference["mean"]["scores"]["psnr_mu"] == pytest.approx(np.mean([float(r["psnr_mu"]) for r in rows[1::2]]))
    assert "fused_psnr_mu" in network["mean"]["scores"]
    assert data["environment"]["versions"]["torch"] == torch.__version__
    assert (save / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_perfect_predictions(scenes, tmp_path):
    result = evaluate(scenes, [predictions(tmp_path / "perfect", scenes)], SETTINGS)
    mean = result.mean("perfect")
    assert (mean.used, mean.left_out) == (3, 0)
    assert mean.scores["psnr_mu"] == math.inf
    assert mean.scores["ssim_l"] == pytest.approx(1, abs=1e-6)


def test_predictions_are_scored_as_they_are(scenes, tmp_path):
    method = predictions(tmp_path / "bright", scenes, lambda truth: truth + np.float32(0.01))
    result = evaluate(scenes, [method], SETTINGS)
    assert result.mean("bright").scores["psnr_l"] == pytest.approx(40, abs=0.01)


def test_numbered_predictions_are_taken_in_order(scenes, tmp_path):
    method = predictions(tmp_path / "numbered", scenes, names=["01", "02", "03"])
    assert method.in_order
    assert evaluate(scenes, [method], SETTINGS).mean("numbered").scores["psnr_l"] == math.inf


def test_the_model_is_scored_on_both_of_its_results(scenes, model):
    method = ModelMethod("random", model, "0")
    result = evaluate(scenes[:1], [method], SETTINGS).scores["random"]["001"]
    sample = load_scene(scenes[0])
    outcome = method.fuse(scenes[0], sample.frames, sample.evs)
    assert result.scores["psnr_mu"] == pytest.approx(psnr_mu(outcome.radiance[0], sample.truth), abs=1e-4)
    fused = outcome.result.fusion.fused[0]
    assert result.scores["fused_psnr_mu"] == pytest.approx(psnr_mu(fused, sample.truth), abs=1e-4)
    expected = {"result", "error", "flow_short", "flow_long", "mask_short", "mask_long", "flow_reach"}
    assert set(result.pictures) == expected


def test_offsets_of_all_evs_change_nothing(root, scenes, baseline):
    before = evaluate(scenes, [baseline], SETTINGS).mean("unaligned")
    for name in NAMES:
        (root / "Test" / name / "exposure.txt").write_text("".join(f"{ev + 5}\n" for ev in EVS))
    assert evaluate(scenes, [baseline], SETTINGS).mean("unaligned") == before


def test_wrong_evs_spare_the_reference_and_harm_the_merge(tmp_path):
    write_kalantari17(tmp_path, NAMES)
    scenes = find_scenes("kalantari17", tmp_path)
    methods = [BaselineMethod("reference"), BaselineMethod("unaligned")]
    exact = evaluate(scenes, methods, SETTINGS)
    wrong = evaluate(scenes, methods, Settings("kalantari17", ev_error=0.3, picture_width=96))
    measured = evaluate(scenes, methods, Settings("kalantari17", ev_error=0.3, measure=True, picture_width=96))

    def quality(result, method):
        return result.mean(method).scores["psnr_mu"]

    assert quality(wrong, "reference") == pytest.approx(quality(exact, "reference"), abs=1e-3)
    assert quality(wrong, "unaligned") < quality(exact, "unaligned") - 3
    assert quality(measured, "unaligned") > quality(exact, "unaligned") - 0.5


def test_rgbe_scores_what_a_hdr_file_would_hold(scenes, baseline):
    settings = Settings("kalantari17", rgbe=True, picture_width=96)
    result = evaluate(scenes[:1], [baseline], settings).scores["unaligned"]["001"]
    sample = load_scene(scenes[0])
    stored = through_rgbe(baseline.fuse(scenes[0], sample.frames, sample.evs).radiance[0])
    assert result.scores["psnr_mu"] == pytest.approx(psnr_mu(stored, sample.truth), abs=1e-6)


def test_ntire21_has_its_own_scores(tmp_path, baseline):
    write_ntire21(tmp_path, "0001")
    scenes = find_scenes("ntire21", tmp_path)
    scores = evaluate(scenes, [baseline], Settings("ntire21", picture_width=96)).mean("unaligned").scores
    assert scores["ntire_psnr_mu"] > 25
    assert scores["ntire_psnr"] > 25


def test_scenes_are_grouped_by_motion_and_clipping(root, scenes, baseline):
    for name, pixels in zip(NAMES, (0.0, 12.0, 80.0), strict=True):
        np.save(root / "Test" / name / "flow.npy", np.full((2, 2, HEIGHT, WIDTH), pixels / math.sqrt(2), np.float32))
    result = evaluate(find_scenes("kalantari17", root), [baseline], SETTINGS)
    assert result.groups()[:3] == ["still, < 5 px", "motion 5 to 30 px", "motion >= 30 px"]
    for name, group in zip(NAMES, result.groups(), strict=False):
        mean = result.mean("unaligned", group)
        assert mean.used == 1
        assert mean.scores["psnr_mu"] == result.scores["unaligned"][name].scores["psnr_mu"]
    assert [scene.motion for scene in result.scenes] == pytest.approx([0, 12, 80], rel=1e-5)
    still, moving = (result.scores["unaligned"][name].scores for name in ("001", "003"))
    assert "psnr_mu_moving" not in still
    assert moving["psnr_mu_moving"] == pytest.approx(moving["psnr_mu"])


def test_motion_is_estimated_where_it_is_not_known(scenes, baseline):
    pytest.importorskip("cv2")
    scene = evaluate(scenes[:1], [baseline], SETTINGS).scenes[0]
    assert scene.motion_source == "estimated by DIS"
    assert scene.motion == pytest.approx(4, abs=3)


# ---- broken scenes ---------------------------------------------------------------------------------------------------


def test_broken_scenes_are_left_out_and_counted(root, scenes, tmp_path):
    (root / "Test" / "002" / "HDRImg.hdr").unlink()
    (root / "Test" / "003" / "262A1.tif").write_text("nothing")
    result = evaluate(scenes, [BaselineMethod("unaligned")], SETTINGS)
    mean = result.mean("unaligned")
    assert (mean.used, mean.left_out) == (1, 2)
    assert mean.scores == result.scores["unaligned"]["001"].scores
    assert [(scene, method) for scene, method, _ in result.errors()] == [("002", ""), ("003", "")]
    save = tmp_path / "results"
    shown = run("--dataset", "kalantari17", "--root", root, "--baseline", "unaligned", "--save", save)
    assert shown.exit_code == 0
    assert "Left out of 3 scenes: unaligned 2" in shown.output
    assert "HDRImg.hdr does not exist" in " ".join(shown.output.split())
    assert strict_json(save / "scores.json")["methods"][0]["mean"]["left_out"] == 2


def test_strict_stops_at_a_broken_scene(root):
    (root / "Test" / "002" / "HDRImg.hdr").unlink()
    result = run("--dataset", "kalantari17", "--root", root, "--baseline", "unaligned", "--strict")
    assert result.exit_code == 2
    assert "error: --strict: scene 002: " in result.output


def test_predictions_that_miss_misfit_or_are_not_finite(scenes, tmp_path):
    folder = tmp_path / "other"
    predictions(folder, scenes)
    (folder / "001.exr").unlink()
    write(folder / "002.exr", np.zeros((HEIGHT, WIDTH - 1, 3), np.float32))
    write(folder / "003.exr", np.full((HEIGHT, WIDTH, 3), np.nan, np.float32))
    result = evaluate(scenes, [PredictionMethod("other", folder, scenes), BaselineMethod("reference")], SETTINGS)
    errors = [error for _, _, error in result.errors()]
    assert [method for _, method, _ in result.errors()] == ["other"] * 3
    assert "no prediction 001.hdr" in errors[0]
    assert "002.exr is 95x64 but the scene is 96x64" in errors[1]
    assert "prediction must hold finite numbers" in errors[2]
    assert result.mean("reference").used == 3
    with pytest.raises(EvaluationError, match="--strict: other: scene 001"):
        evaluate(scenes, [PredictionMethod("other", folder, scenes)], SETTINGS, strict=True)


def test_no_scene_at_all_is_an_error(root):
    for name in NAMES:
        (root / "Test" / name / "HDRImg.hdr").unlink()
    result = run("--dataset", "kalantari17", "--root", root, "--baseline", "unaligned")
    assert result.exit_code == 2
    assert "none of the 3 scenes" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--baseline", "magic"], "--baseline must be one of reference, .*, got 'magic'"),
        (["--predictions", "nowhere"], "--predictions nowhere does not exist"),
        (["--model", "nowhere.pth"], "weights file 'nowhere.pth' does not exist"),
        (["--baseline", "dis", "--baseline", "dis"], "methods must have different names, got dis, dis"),
    ],
)
def test_refusals(root, options, message):
    result = run("--dataset", "kalantari17", "--root", root, *options)
    assert result.exit_code == 2
    assert __import__("re").search(message, " ".join(result.output.split())), result.output


def test_predictions_of_nothing(scenes, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match=r"must hold SCENE.hdr\|.exr.* such as 001.hdr; got none"):
        PredictionMethod("empty", tmp_path / "empty", scenes)


# ---- resuming --------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """The names of baselines, each time one runs."""
    calls = []
    original = module.fuse_baseline

    def count(name, *arguments):
        calls.append(name)
        return original(name, *arguments)

    monkeypatch.setattr(module, "fuse_baseline", count)
    return calls


def test_an_interrupted_run_resumes(scenes, baseline, counted, tmp_path):
    class Stop(Exception):
        pass

    def stop(stage, done, total):
        if done == 2:
            raise Stop

    with pytest.raises(Stop):
        evaluate(scenes, [baseline], SETTINGS, cache=tmp_path / "cache", progress=stop)
    assert len(counted) == 2
    resumed = evaluate(scenes, [baseline], SETTINGS, cache=tmp_path / "cache")
    assert len(counted) == 3
    assert resumed.mean("unaligned").scores == evaluate(scenes, [baseline], SETTINGS).mean("unaligned").scores


def test_what_changed_is_computed_anew(root, scenes, baseline, counted, tmp_path):
    cache = tmp_path / "cache"
    evaluate(scenes, [baseline], SETTINGS, cache=cache)
    evaluate(scenes, [baseline], SETTINGS, cache=cache)
    assert len(counted) == 3
    shutil.copyfile(root / "Test" / "001" / "HDRImg.hdr", root / "Test" / "002" / "HDRImg.hdr")
    evaluate(scenes, [baseline], SETTINGS, cache=cache)
    assert len(counted) == 4
    evaluate(scenes, [baseline], Settings("kalantari17", rgbe=True, picture_width=96), cache=cache)
    assert len(counted) == 7
    evaluate(scenes, [BaselineMethod("reference")], SETTINGS, cache=cache)
    assert len(counted) == 10
    evaluate(scenes, [baseline], SETTINGS, cache=cache, fresh=True)
    assert len(counted) == 13


def test_other_weights_are_another_method(scenes, model, tmp_path):
    cache = tmp_path / "cache"
    for weights_hash in ("one", "one", "two"):
        evaluate(scenes[:1], [ModelMethod("net", model, weights_hash)], SETTINGS, cache=cache)
    assert len(list(cache.glob("score-*.json"))) == 2


def test_a_damaged_cache_is_computed_anew(scenes, baseline, tmp_path):
    cache = tmp_path / "cache"
    before = evaluate(scenes, [baseline], SETTINGS, cache=cache).mean("unaligned")
    for path in cache.iterdir():
        path.write_text(path.read_text()[:40])
    assert evaluate(scenes, [baseline], SETTINGS, cache=cache).mean("unaligned") == before


def test_errors_are_not_kept(root, scenes, baseline, tmp_path):
    truth = root / "Test" / "001" / "HDRImg.hdr"
    kept = truth.read_bytes()
    truth.unlink()
    assert evaluate(scenes, [baseline], SETTINGS, cache=tmp_path / "cache").mean("unaligned").left_out == 1
    truth.write_bytes(kept)
    assert evaluate(scenes, [baseline], SETTINGS, cache=tmp_path / "cache").mean("unaligned").left_out == 0


# ---- export and cost -------------------------------------------------------------------------------------------------


def test_export_for_matlab(root, scenes, tmp_path):
    folder = tmp_path / "matlab"
    result = run("--dataset", "kalantari17", "--root", root, "--baseline", "unaligned", "--export-matlab", folder)
    assert result.exit_code == 0, result.output
    assert "hdrvdp" in (folder / "evaluate.m").read_text()
    for files in scenes:
        sample = load_scene(files)
        exported = torch.from_numpy(read_radiance(folder / "truth" / f"{files.name}.hdr")).permute(2, 0, 1)
        assert torch.equal(exported, through_rgbe(sample.truth))
        radiance = BaselineMethod("unaligned").fuse(files, sample.frames, sample.evs).radiance[0]
        exported = torch.from_numpy(read_radiance(folder / "unaligned" / f"{files.name}.hdr")).permute(2, 0, 1)
        torch.testing.assert_close(exported, through_rgbe(radiance), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("variant", "counted", "published"), [("full", 970_496_167_680, 0.976), ("small", 141_596_167_680, 0.146)]
)
def test_multiply_adds_at_1500x1000(variant, counted, published):
    assert count_multiply_adds(SAFNet(variant), 1000, 1500) == counted
    # Published counts take a transposed convolution by its output's pixels, four times its input's, and one operation for
    # every value that passes a PReLU.
    decoder_pixels = sum(512 // 2**level * (752 // 2**level) for level in (1, 2, 3, 4))
    transposed = 3 * decoder_pixels * 16 * 120 * 6
    refine_channels = 160 + 5 * 160 if variant == "full" else 6 * 32
    prelu = decoder_pixels * (3 * 2 * 40 + 5 * 120) + 1500 * 1000 * refine_channels
    assert (counted + transposed + prelu) / 1e12 == pytest.approx(published, abs=5e-4)


def test_timing(model):
    timing = time_model(model, 48, 64, runs=3)
    assert len(timing.seconds) == 3
    assert timing.median == sorted(timing.seconds)[1]
    assert timing.multiply_adds == count_multiply_adds(model, 48, 64)
    assert (timing.precision, timing.threads) == ("float32", torch.get_num_threads())


def test_peak_memory_is_that_of_a_model_which_never_ran(model):
    """Whether it ran before, and what else the allocator keeps, changes nothing; the frames do."""
    height, width = 240, 320
    fresh = time_model(model, height, width, runs=1, tile=0).peak_memory
    if fresh is None:
        pytest.skip("this system does not tell a process its peak memory")
    again = time_model(model, height, width, runs=1, tile=0).peak_memory
    larger = time_model(model, 2 * height, 2 * width, runs=1, tile=0).peak_memory
    exposures = 3 * 6 * height * width * 4  # which the network is given
    assert exposures < fresh < 20 * exposures
    assert again == pytest.approx(fresh, rel=0.1)
    assert 3 < larger / fresh < 5


def test_peak_memory_sees_what_is_gone_again():
    # In a process of its own: what other tests leave behind may be freed at any time.
    program = """
import torch
from safnet.evaluation.timing import peak_memory_of
print(peak_memory_of(lambda: float(torch.ones(64 * 2**20 // 4).sum()), torch.device("cpu")))
"""
    peak = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()
    if peak == "None":
        pytest.skip("this system does not tell a process its peak memory")
    assert 60 * 2**20 < int(peak) < 200 * 2**20


def write_series(folder, evs):
    """Frames by exposure in a folder of the "folder" layout, whose names are in another order."""
    frames, truth, _ = handheld((4.0, 1.0), height=128, width=192, noise=0.004, evs=evs)
    for number, frame in enumerate(frames):
        pixels = (frame[0].permute(1, 2, 0).numpy() * 2**16).round().astype(np.uint16)
        write(folder / f"{'dbeacf'[number]}.tif", pixels)
    (folder / "exposure.txt").write_text(
        " ".join(str(evs[number]) for number in np.argsort(list("dbeacf"[: len(evs)])))
    )
    write(folder / "truth.exr", truth[0].permute(1, 2, 0).numpy())


def test_series_of_any_number_are_scored_as_they_are_fused(tmp_path):
    """Two and five frames beside three, whose reference, of EV 0, the truth belongs to."""
    series = {"two": (0.0, 2.0), "three": (-2.0, 0.0, 2.0), "five": (-2.0, -1.0, 0.0, 1.0, 2.0)}
    for name, evs in series.items():
        write_series(tmp_path / "data" / name, evs)
    files = find_scenes("folder", tmp_path / "data")
    model = safnet.load_model("safnet-s")
    methods = [ModelMethod("safnet-s", model, ""), *map(BaselineMethod, ("reference", "unaligned", "dis+mask"))]
    found = evaluate(files, methods, Settings("folder", picture_width=96))
    assert not found.errors()
    assert {scene.name: scene.evs for scene in found.scenes} == series
    scores = {name: {scene: one.scores["psnr_mu"] for scene, one in by.items()} for name, by in found.scores.items()}
    assert all(scores["safnet-s"][name] > scores["reference"][name] + 2 for name in series)
    assert scores["safnet-s"]["five"] > scores["safnet-s"]["three"]
    assert scores["dis+mask"]["five"] > scores["unaligned"]["five"]
    sample = load_scene(next(one for one in files if one.name == "five"), series=True)
    frames = [frame[None] for frame in sample.frames]
    result = safnet.fuse_exposures(model, frames, sample.evs, reference=2, alignment="paper")
    assert scores["safnet-s"]["five"] == pytest.approx(psnr_mu(result.radiance[0], sample.truth), abs=1e-3)


def test_wrong_evs_of_a_series_are_apart_and_measured(tmp_path):
    write_series(tmp_path / "five", (-2.0, -1.0, 0.0, 1.0, 2.0))
    files = find_scenes("folder", tmp_path)
    method = ModelMethod("safnet-s", safnet.load_model("safnet-s"), "")

    def score(**options):
        return (
            evaluate(files, [method], Settings("folder", picture_width=96, **options))
            .mean("safnet-s")
            .scores["psnr_mu"]
        )

    right, wrong, measured = score(), score(ev_error=0.3), score(ev_error=0.3, measure=True)
    assert wrong < right - 2
    assert measured > wrong + 1


def test_series_elsewhere_are_refused(tmp_path):
    write_series(tmp_path / "data" / "five", (-2.0, -1.0, 0.0, 1.0, 2.0))
    write_series(tmp_path / "data" / "one", (0.0,))
    one_scene, five = sorted(find_scenes("folder", tmp_path / "data"), key=lambda scene: len(scene.frames))
    with pytest.raises(ValueError, match="scene five must have three frames, got 5"):
        load_scene(five)
    with pytest.raises(ValueError, match="scene one must have 2 to 9 frames, got 1"):
        load_scene(one_scene, series=True)
