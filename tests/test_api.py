"""The commands as functions: the same results as on the command line, and nothing printed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import mftctl
from mftctl import Finished, Recipe, evaluate, fine_tune, learn_mask, load_mask, load_recipe
from mftctl.errors import ConfigError, OutputError
from mftctl.experiments.mask_results import MeasuredMask
from mftctl.experiments.results import FftResult
from mftctl.progress import Progress
from tests.cli.running import CommandLine
from tests.workflow_fixtures import make_recipe


@pytest.fixture(scope="module")
def tuned(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished[FftResult]:
    return fine_tune(make_recipe(workspace), runs=tmp_path_factory.mktemp("api") / "runs")


@pytest.mark.slow
def test_results_are_those_of_the_command_line(
    workspace: Path,
    tuned: Finished[FftResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_recipe(workspace, model=tuned.result.model)
    seen: list[Progress] = []
    capsys.readouterr()
    masked = learn_mask(recipe, output=tmp_path / "mask.bits", runs=tmp_path / "api", on_progress=seen.append)
    assert "training" in {state.task for state in seen}
    assert capsys.readouterr().out == ""
    data = ("--data", workspace / "train.jsonl", "--val-data", workspace / "val.jsonl", "--batch-size", 4)
    settings = ("--max-steps", 12, "--val-steps", 4, "--layers", "1-2", "--preset", "paper")
    shell = CommandLine(tmp_path, monkeypatch, capsys)
    outcome = shell("mask-train", "--model", tuned.result.model, *data, *settings, "-o", "cli.bits", "--runs", "cli")
    assert outcome.code == 0, outcome.stderr
    mine, theirs = load_mask(tmp_path / "mask.bits"), load_mask(tmp_path / "cli.bits")
    assert mine.names() == theirs.names()
    assert all(bool((mine[name] == theirs[name]).all()) for name in mine.names())
    assert isinstance(masked.result, MeasuredMask)
    measured = evaluate(recipe, mask=tmp_path / "mask.bits", runs=tmp_path / "api")
    assert measured.result.state == "MFT, paper"
    assert [metric.name for metric in measured.result.datasets[0].metrics] == ["loss", "exact_match"]


def test_the_latest_model_is_taken(workspace: Path, tuned: Finished[FftResult]) -> None:
    recipe = make_recipe(workspace, model=None, eval__generate=False)
    measured = evaluate(recipe, runs=tuned.folder.parent)
    assert measured.result.state == "FFT"


def test_messages_are_logged(workspace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = make_recipe(workspace, mask_train__method="random", mask_train__base="anything")
    with caplog.at_level(logging.INFO, "mftctl"):
        learn_mask(recipe, runs=tmp_path)
    assert "no effect on a mask of kind weight" in caplog.text


def test_an_output_that_is_in_use(workspace: Path, tmp_path: Path) -> None:
    (tmp_path / "mask.bits").write_text("mine")
    recipe = make_recipe(workspace, mask_train__method="random")
    with pytest.raises(OutputError):
        learn_mask(recipe, output=tmp_path / "mask.bits", replace=True, runs=tmp_path / "runs")
    assert (tmp_path / "mask.bits").read_text() == "mine"
    assert not (tmp_path / "runs").exists()


def test_nothing_to_measure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="evaluate needs a model"):
        evaluate(Recipe(), runs=tmp_path / "runs")


def test_a_recipe_by_name() -> None:
    recipe = load_recipe("quickstart", options={"fft.max_steps": 2})
    assert (recipe.model, recipe.fft.max_steps) == ("quickstart", 2)
    assert mftctl.Recipe is Recipe
