"""`mftctl validate`: its output, streams and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from rich.console import Console
from typer.testing import CliRunner, Result

from mftctl.cli import validate as command
from mftctl.cli import validate_view
from mftctl.data.rendering import Segment
from mftctl.errors import ConfigError
from mftctl.experiments.run_config import to_document
from mftctl.workflows.validate import Sample
from tests.workflow_fixtures import make_recipe


@pytest.fixture
def recipe(workspace: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    document = {**to_document(make_recipe(workspace)), "stages": {"mft": {"command": "mask-train"}}}
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


def _run(*arguments: object) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command.validate)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_a_sound_recipe(recipe: Path) -> None:
    result = _run(recipe)
    assert result.exit_code == 0
    for text in (
        "48 records",
        "<|assistant|>»",
        "<|end|>«",
        "Mask of mft; layers: 1-2",
        "q_proj",
        "peak",
    ):
        assert text in result.stdout
    assert f"Next: mftctl run {recipe}" in result.stderr


@pytest.mark.slow
def test_without_a_recipe_the_options_are_checked(workspace: Path) -> None:
    result = _run("--model", workspace / "tiny", "--data", workspace / "train.jsonl", "--bad-records", "skip")
    assert result.exit_code == 0
    assert "<|assistant|>»" in result.stdout
    assert "Next:" not in result.stderr


@pytest.mark.slow
def test_as_json(recipe: Path) -> None:
    result = _run(recipe, "--json")
    document = json.loads(result.stdout)
    assert document["problems"] == []
    assert {row["stage"] for row in document["memory"]} == {"mft"}


@pytest.mark.slow
def test_problems_give_exit_code_2_after_all_other_output(recipe: Path) -> None:
    result = _run(recipe, "--set", "mask_train.layers='9'", "--set", "eval.tasks=[gsm9k]")
    assert isinstance(result.exception, ConfigError)
    assert result.exception.exit_code == 2
    assert "The recipe has 2 problems." in str(result.exception)
    assert "gsm9k" in str(result.exception)
    assert "48 records" in result.stdout


def test_an_unknown_key_names_the_nearest(recipe: Path) -> None:
    result = _run(recipe, "--set", "fft.epoch=1", "--set", "mask_train.layer=9")
    assert "did you mean epochs?" in str(result.exception)
    assert "did you mean layers?" in str(result.exception)


def test_colours_instead_of_marks_on_a_terminal() -> None:
    sample = Sample("train.jsonl:1", 3, 1, [Segment("1 + [b]1", False), Segment("2", True)])
    console = Console(force_terminal=True, color_system="standard", no_color=False, width=80)
    with console.capture() as capture:
        console.print(validate_view._sample(sample, marked=False))
    assert "\x1b[2m1 + [b]1\x1b[0m\x1b[32m2\x1b[0m" in capture.get()
    assert "»2«" in validate_view._sample(sample, marked=True).plain
