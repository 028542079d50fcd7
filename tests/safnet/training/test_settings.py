"""Settings from files and from the command line."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("lightning", reason="training needs the extra `train`")

import safnet.training.run
from safnet.cli import app
from safnet.training.settings import (
    CONFIGURATIONS,
    TrainingError,
    TrainSettings,
    read_configuration,
    write_configuration,
)

SHIPPED = sorted(str(path.relative_to(CONFIGURATIONS).with_suffix("")) for path in CONFIGURATIONS.rglob("*.yaml"))


@pytest.fixture
def given(monkeypatch):
    """Runs `safnet train` with arguments and returns the settings that training would get."""
    received = []

    def pretend(settings):
        received.append(settings)
        return safnet.training.run.Finished(settings.steps, 0)

    monkeypatch.setattr(safnet.training.run, "train", pretend)

    def run(*arguments):
        received.clear()
        result = CliRunner().invoke(app, ["train", *map(str, arguments)])
        text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
        return received[0] if received else (result.exit_code, " ".join(text.replace("│", " ").split()))

    return run


def test_the_command_has_the_settings_defaults(given):
    assert given("--out", "run") == TrainSettings(Path("run"))


def test_options_win_over_the_file(given, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("out: runs/a\nmodel: small\nlearning-rate: 3e-4\nwarm_up: 7\nwarp: crop\nvalidation:\nbatch: 2\n")
    settings = given("--config", path, "--batch", 6, "--scenes", "data")
    assert settings == TrainSettings(
        Path("runs/a"), Path("data"), model="small", learning_rate=3e-4, warm_up=7, warp="crop", batch=6
    )


def test_a_stored_configuration_gives_the_same_settings(given, tmp_path):
    settings = TrainSettings(Path("a b"), Path("s"), without="mask,refine", last_learning_rate=1e-6, warp="crop")
    write_configuration(settings, tmp_path / "config.yaml")
    assert given("--config", tmp_path / "config.yaml") == settings


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_usable(given, name):
    settings = given("--config", name, "--out", "run", "--scenes", "data")
    safnet.training.run.check_values(settings)
    for key, value in yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text()).items():
        stored = getattr(settings, key.replace("-", "_"))
        assert stored == type(stored)(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: many", "steps must be a whole number, got 'many'"),
        ("steps: 1.5", "steps must be a whole number, got 1.5"),
        ("steps: true", "steps must be a whole number, got True"),
        ("learning-rate: fast", "learning-rate must be a number, got 'fast'"),
        ("flow_weight: true", "flow_weight must be a number, got True"),
        ("model: tiny", "model must be one of full, small, got 'tiny'"),
        ("warp: perhaps", "warp must be one of window, crop, got 'perhaps'"),
        ("scenes: 3", "scenes must be text, got 3"),
        ("speed: 3", "unknown setting 'speed' (value 3)"),
        ("steps: [1, 2]", "steps must be a whole number, got [1, 2]"),
        ("- steps", "must hold settings, such as 'steps: 1000', got ['steps']"),
        ("steps: {", "cannot be read"),
    ],
)
def test_files_that_cannot_be(given, tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    code, output = given("--config", path, "--out", tmp_path / "run", "--scenes", "data")
    assert code == 2
    assert output.startswith(f"error: --config {path}")
    assert message in output
    assert not (tmp_path / "run").exists()


def test_names_that_are_no_configuration():
    with pytest.raises(TrainingError, match=r"--config must be a \.yaml file or one of ablation/.* got 'magic'"):
        read_configuration("magic")
    with pytest.raises(TrainingError, match=r"none\.yaml cannot be read"):
        read_configuration("none.yaml")


def test_options_that_cannot_be(given):
    code, output = given("--out", "run", "--scenes", "data", "--batch", "two")
    assert code == 2
    assert "--batch" in output
