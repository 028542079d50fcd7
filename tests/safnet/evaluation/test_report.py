"""The report in a real browser, and what is in the files beside it."""

import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from safnet.evaluation.methods import BaselineMethod
from safnet.evaluation.report import (
    PUBLISHED,
    Run,
    describe_timing,
    now,
    print_tables,
    write_csv,
    write_html,
    write_json,
)
from safnet.evaluation.run import Evaluation, Scene, Score, Settings
from safnet.evaluation.thumbnails import data_uri, error_picture
from safnet.evaluation.timing import Timing
from safnet.metrics import SCORES
from tests.support.scenes import make_radiance

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=4000",
)
METHODS = ("dis+mask", "unaligned")
WIDTH, HEIGHT = 1500, 1150


def picture(seed, width=480):
    grey = make_radiance(seed, height=64, width=96)
    return data_uri(np.asarray(Image.fromarray((grey * 255).astype(np.uint8)).resize((width, width * 2 // 3))), width)


def make_evaluation(count, width=480):
    """Scores that rise with the scene's number for one method and fall for the other."""
    shown = [picture(seed, width) for seed in range(6)]
    small = [picture(seed, width * 2 // 5) for seed in range(6)]
    scenes, scores = [], {method: {} for method in METHODS}
    for number in range(count):
        name = f"{number + 1:03d}"
        inputs = dict(zip(("short", "reference", "long"), small, strict=False))
        groups = {"clipped": 0.03 * (number % 9), "motion": 4.0 * (number % 11), "motion_source": "true flow"}
        scenes.append(Scene(name, None, 1000, 1500, (-2, 0, 2), **groups, pictures={"truth": shown[0], **inputs}))
        for sign, method in zip((1, -1), METHODS, strict=True):
            values = {"psnr_mu": 40 + sign * number / 10, "psnr_l": 38.0, "ssim_mu": 0.99, "ssim_l": 0.98}
            parts = dict(zip(("flow_short", "flow_long", "mask_short", "mask_long"), small, strict=False))
            pictures = {"result": shown[1], "error": shown[2], **parts, "flow_reach": "12"}
            scores[method][name] = Score(values, None, 0.1, pictures)
    return Evaluation(Settings("kalantari17"), [BaselineMethod(method) for method in METHODS], scenes, scores)


@pytest.fixture
def run_facts():
    timing = Timing(1000, 1500, (0.5, 0.4, 0.6), 300 * 2**20, 566713, 141_596_167_680, "a processor", 2, "float32")
    environment = {
        "device": "a processor",
        "threads": 2,
        "python": "3",
        "platform": "Linux",
        "versions": {"torch": "2"},
    }
    return Run("safnet evaluate --root 'my scenes'", "my scenes", "Test", now(), 3.0, {"dis+mask": timing}, environment)


def browse(page, tmp_path, *options, timeout=120):
    """Run a headless browser on a page, in an empty profile."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser to show the report: none of {', '.join(BROWSERS)} is installed")
    profile = tmp_path / "profile"
    command = [browser, *BROWSER_OPTIONS, f"--user-data-dir={profile}", *options, page]
    result = subprocess.run(command, capture_output=True, timeout=timeout, check=False)
    shutil.rmtree(profile, ignore_errors=True)
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    return result.stdout.decode()


class Tags(HTMLParser):
    """All start tags with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def visible_rows(dom):
    """Names of the scenes in the list, from top to bottom."""
    body = dom.split('id="list"')[1].split("</tbody>")[0].split("<tbody>")[1]
    return re.findall(r"<tr[^>]*><td>([^<]+)</td>", body)


# ---- in a browser ----------------------------------------------------------------------------------------------------


def test_the_report_of_150_scenes_in_a_browser(run_facts, tmp_path):
    path = tmp_path / "report.html"
    write_html(path, make_evaluation(150), run_facts)
    shot = tmp_path / "report.png"
    view = "#scene=017&sort=psnr_mu&order=descending&b=error: unaligned".replace(" ", "%20")
    dom = browse(
        path.as_uri() + view, tmp_path, f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}", "--dump-dom"
    )
    # The script ran: it sorted the list, chose the scene, and put its pictures in place.
    assert visible_rows(dom)[:2] == ["150", "149"]
    assert re.search(r'<tr class="chosen"[^>]*><td>017</td>', dom)
    tags = Tags(dom).found
    sources = {attributes["id"]: attributes["src"] for tag, attributes in tags if tag == "img" and "id" in attributes}
    assert all(sources[name].startswith("data:image/webp;base64,") for name in ("picture-a", "picture-b"))
    assert sources["picture-a"] != sources["picture-b"]
    # Only the open scene's pictures became elements, so that 150 scenes stay light.
    assert sum(tag == "img" for tag, _ in tags) < 20
    check_screenshot(shot)


def check_screenshot(path):
    """The list at the left and the pictures at the right are there: neither side is an empty page."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(float)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    left, right = pixels[500:, : WIDTH * 2 // 5], pixels[500:, WIDTH // 2 :]
    assert left.std() > 10
    assert right.std() > 10
    # Photographs have colours that the page itself lacks.
    saturation = right.max(2) - right.min(2)
    assert (saturation > 40).mean() > 0.05


def test_a_broken_scene_in_a_browser(run_facts, tmp_path):
    evaluation = make_evaluation(3)
    evaluation.scenes[1] = Scene("002", error="scene 002: HDRImg.hdr does not exist")
    for results in evaluation.scores.values():
        results["002"] = Score(error="scene 002: HDRImg.hdr does not exist")
    path = tmp_path / "report.html"
    write_html(path, evaluation, run_facts)
    dom = browse(path.as_uri() + "#scene=002", tmp_path, "--dump-dom")
    assert "002 (left out)" in dom
    assert "Left out of 3 scenes: dis+mask 1, unaligned 1" in dom
    assert '<p id="facts" class="dim">scene 002: HDRImg.hdr does not exist</p>' in dom


# ---- without one -----------------------------------------------------------------------------------------------------


def test_the_report_needs_no_network_and_survives_hostile_names(run_facts, tmp_path):
    evaluation = make_evaluation(2)
    name = "</script><script>alert(1)</script>"
    evaluation.scenes[0].name = name
    for results in evaluation.scores.values():
        results[name] = results.pop("001")
    path = tmp_path / "report.html"
    write_html(path, evaluation, run_facts)
    text = path.read_text()
    assert "<script>alert" not in text
    for tag, attributes in Tags(text).found:
        for attribute in ("src", "href", "data", "action"):
            assert not re.match("https?:|//", attributes.get(attribute) or ""), (tag, attributes)
    index = re.search(r'id="index">(.*?)</script>', text, re.DOTALL)
    assert json.loads(index[1])["scenes"][0]["name"] == name


def test_the_report_grows_by_its_pictures_alone(run_facts, tmp_path):
    sizes = []
    for count in (10, 20):
        path = tmp_path / f"{count}.html"
        evaluation = make_evaluation(count)
        write_html(path, evaluation, run_facts)
        pictures = sum(len(uri) for scene in evaluation.scenes for uri in scene.pictures.values())
        pictures += sum(
            len(uri)
            for results in evaluation.scores.values()
            for result in results.values()
            for uri in result.pictures.values()
        )
        sizes.append(path.stat().st_size - pictures)
    assert sizes[1] - sizes[0] < 10 * 2500


def test_published_numbers_stand_beside_the_means(run_facts, tmp_path):
    path = tmp_path / "report.html"
    write_html(path, make_evaluation(3), run_facts)
    table = path.read_text().split('id="means"')[1].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("<tr>")]
    rows = {row[0]: row[1:] for row in rows if row}
    assert rows["SAFNet"] == ["", "44.66", "43.18", "0.9932", "0.9917", "0.151", "1.12", ""]
    assert rows["dis+mask"] == ["3", "40.100", "38.000", "0.9900", "0.9800", "0.500", "0.567", "0.1416"]
    assert 'class="best">40.100' in table
    assert set(PUBLISHED) == {"kalantari17", "challenge123"}


@pytest.mark.parametrize(
    ("dataset", "note"), [("kalantari17", "Comparable only if"), ("tel23", "For orientation only")]
)
def test_terminal_tables(run_facts, dataset, note):
    evaluation = make_evaluation(3)
    evaluation.settings = Settings(dataset)
    stream = io.StringIO()
    print_tables(evaluation, run_facts, Console(file=stream, width=160))
    text = stream.getvalue()
    assert re.search(r"dis\+mask\W+3\W+40\.100\W+38\.000\W+0\.9900\W+0\.9800", text)
    assert re.search(r"SAFNet\W+44\.66\W+43\.18", text)
    assert "median 0.500 s (0.400 to 0.600, 3 runs after a warm-up) at 1500x1000, float32, 2 threads" in text
    assert note in text
    assert "left out" not in text


def test_files_hold_full_precision_and_no_infinity(run_facts, tmp_path):
    evaluation = make_evaluation(2)
    evaluation.scores["unaligned"]["001"].scores["psnr_mu"] = math.inf
    evaluation.scores["unaligned"]["002"].scores["psnr_mu"] = 40.123456789
    write_json(tmp_path / "scores.json", evaluation, run_facts)
    data = json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    assert data["scores"]["unaligned"]["001"]["scores"]["psnr_mu"] == "Infinity"
    assert data["scores"]["unaligned"]["002"]["scores"]["psnr_mu"] == 40.123456789
    assert data["command"] == "safnet evaluate --root 'my scenes'"
    assert data["methods"][0]["timing"]["median"] == 0.5
    write_csv(tmp_path / "scores.csv", evaluation)
    assert (
        "002,unaligned,1500,1000,-2 0 2,4.0,0.03,0.1,40.123456789,38.0,0.99,0.98,"
        in (tmp_path / "scores.csv").read_text()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv", "scores.json"]


def test_error_picture_is_dark_where_right_and_bright_where_wrong():
    truth = np.full((3, 8, 10), 0.2, np.float32)
    import torch

    wrong = torch.from_numpy(truth.copy())
    wrong[1, :, 5:] = 0.9
    shown = error_picture(wrong, torch.from_numpy(truth)).astype(int)
    assert shown[:, :5].max() <= 4
    assert shown[:, 5:].min() >= 160


def test_every_score_is_described():
    assert all(kind.label and kind.meaning and kind.decimals > 0 for kind in SCORES.values())
    timing = Timing(10, 10, (1.0,), None, 1, 1, "a processor", 1, "float32")
    assert "peak memory" not in describe_timing(timing)
