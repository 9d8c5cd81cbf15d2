from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mftctl.errors import OutputError, StorageError
from mftctl.experiments.outputs import Input, check_output, inputs_of
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, set as the current one, with a base, data and a runs folder."""
    work = tmp_path / "work"
    for folder in ("base", "runs/001-fft", "repository/.git", "other"):
        (work / folder).mkdir(parents=True)
    for file in ("data.jsonl", "base/config.json"):
        (work / file).write_text("mine")
    (work / "to-base").symlink_to("base")
    (work / "circle").symlink_to("circle")
    os.link(work / "data.jsonl", work / "hard-link")
    monkeypatch.chdir(work)
    return work


def check(output: str) -> Path:
    inputs = [Input(Path("base"), "the model"), Input(Path("data.jsonl"), "the data")]
    return check_output(Path(output), inputs, Path("runs"))


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ("", "the current folder"),
        (".", "the current folder"),
        ("..", "the current folder"),
        ("/", "the current folder"),
        ("missing/..", "the current folder"),
        ("../work/", "the current folder"),
        ("base", "the model"),
        ("base/", "the model"),
        ("./base/.", "the model"),
        ("base/out", "the model"),
        ("to-base", "the model"),
        ("to-base/new/out", "the model"),
        ("data.jsonl", "the data"),
        ("other/../data.jsonl", "the data"),
        ("hard-link", "the data"),
        ("runs", "the runs folder"),
        ("runs/001-fft", "the runs folder"),
        ("runs/new", "the runs folder"),
        ("repository", "a repository"),
    ],
)
def test_output_that_touches_what_is_read_is_refused(place: Path, output: str, what: str) -> None:
    with pytest.raises(OutputError, match=what):
        check(output)


def test_output_elsewhere_is_accepted_with_links_resolved(place: Path) -> None:
    assert check("new") == place / "new"
    assert check("other/a/b") == place / "other" / "a" / "b"
    assert check("base2") == place / "base2"
    (place / "link").symlink_to("other")
    assert check("link") == place / "other"


def test_circle_of_links_is_refused(place: Path) -> None:
    with pytest.raises(OutputError, match="broken or circular link"):
        check("circle")


def test_output_in_a_file_is_refused(place: Path) -> None:
    (place / "file").touch()
    with pytest.raises(OutputError, match="A parent folder of the output is a file"):
        check("file/out")


def test_name_that_is_too_long_is_refused(place: Path) -> None:
    with pytest.raises(StorageError, match="name of the result is too long"):
        check("a" * 256)


def test_longest_name_is_accepted(place: Path) -> None:
    assert check("a" * 255) == place / ("a" * 255)


def test_folder_that_is_read_only_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(StorageError, match="cannot be written there"):
        check("new")


def test_all_that_a_recipe_reads_is_an_input(place: Path) -> None:
    (place / "other" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base"}))
    for name in ("val.jsonl", "test.jsonl", "gsm8k.jsonl", "outputs.jsonl", "recipe.yaml", "below.yaml"):
        (place / name).touch()
    (place / "recipe.yaml").write_text("extends: below.yaml\n")
    (place / "below.yaml").write_text("seed: 1\n")
    recipe = parse_recipe(
        {
            "model": "other",
            "data": ["data.jsonl", "owner/on-the-hub"],
            "val_data": ["val.jsonl"],
            "test_data": ["test.jsonl"],
            "eval": {"task_data": {"gsm8k": "gsm8k.jsonl"}, "predictions": "outputs.jsonl"},
        }
    )
    found = {str(item.path) for item in inputs_of(recipe, models=[None, "runs/001-fft"], recipe_name="recipe.yaml")}
    files = {f"{name}.jsonl" for name in ("data", "val", "test", "gsm8k", "outputs")}
    assert found == files | {"other", "base", "runs/001-fft", "recipe.yaml", "below.yaml"}


def test_recipe_that_reads_nothing_has_no_inputs(place: Path) -> None:
    assert inputs_of(Recipe(model="quickstart")) == []
