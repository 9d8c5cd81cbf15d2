"""The data of every seed and stage is checked before the first training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mftctl.data.prepared.load import load_examples
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe
from mftctl.progress import Progress, Silence
from mftctl.workflows.run import plan_experiment, run_experiment
from mftctl.workflows.run_data_checks import data_problems
from mftctl.workflows.validate import validate
from tests.workflow_fixtures import make_recipe, write_additions

STAGES: dict[str, Any] = {"fft": {"command": "fft"}, "results": {"command": "eval", "of": ["fft"]}}
LONG = "a long prompt "


@pytest.fixture
def seeds(workspace: Path, tmp_path: Path) -> tuple[Path, int, int]:
    """A file with one long prompt; a seed whose sample of 24 records lacks it, and one whose sample has it."""
    path = write_additions(tmp_path / "other.jsonl", 47, seed=5)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"question": LONG * 100, "answer": "1\n#### 1"}) + "\n")
    source = DataSource.parse(f"{path}=24")
    has_it = [
        any(LONG in example.prompt[0].content for example in load_examples([source], seed=seed)) for seed in range(16)
    ]
    return path, has_it.index(False), has_it.index(True)


def recipe_of(workspace: Path, seeds: tuple[int, ...], **changes: Any) -> Recipe:
    return make_recipe(workspace, stages=STAGES, seeds=seeds, fft__max_length_tokens=64, **changes)


def test_a_record_that_only_a_later_seed_draws(workspace: Path, tmp_path: Path, seeds: tuple[Path, int, int]) -> None:
    path, without, having = seeds
    recipe = recipe_of(workspace, (without, having), data=[f"{path}=24"])
    with pytest.raises(ConfigError, match="cannot be completed") as caught:
        run_experiment(plan_experiment(recipe, "r", tmp_path / "runs"), "r", tmp_path / "runs", Silence())
    (problem,) = caught.value.problems
    assert problem.startswith(f"seed {having}, fft: Training data: too many records cannot be used (where: {path}:48;")
    assert "got: 1 (4.2%) with a prompt longer than --max-length" in problem
    assert not (tmp_path / "runs").exists()
    (found,) = validate(recipe, None).problems
    assert found.startswith(f"seed {having}, data: Too many records cannot be used (where: {path}:48;")


@pytest.mark.parametrize(
    ("changes", "stage", "part"),
    [
        ({"key": "test_data", "eval__max_length_tokens": 64}, "results", "Test data"),
        ({"key": "retain_data", "fft__retain_weight": 1.0, "bad_records_max": 0.0}, "fft", "Retained data"),
    ],
)
def test_data_of_a_later_stage_and_data_to_retain(
    workspace: Path, seeds: tuple[Path, int, int], changes: dict[str, Any], stage: str, part: str
) -> None:
    key, path = changes["key"], seeds[0]
    recipe = recipe_of(workspace, (0, 1), **{key: [str(path)]}, **{k: v for k, v in changes.items() if k != "key"})
    problems = list(data_problems([planned.job for planned in plan_experiment(recipe, "r", path.parent)], Silence()))
    assert problems
    assert problems[0].startswith(f"seed 0, {stage}: {part}: too many records cannot be used (where: {path}:48;")
    (found,) = validate(recipe, None).problems
    assert found.startswith(f"{key}: Too many records cannot be used (where: {path}:48;")


def test_the_first_seed_listed_is_the_one_described(workspace: Path, seeds: tuple[Path, int, int]) -> None:
    path, without, having = seeds
    recipe = recipe_of(workspace, (without,), data=[f"{path}=24"], seed=having)
    assert not validate(recipe, None).problems


def test_jobs_with_the_same_data_are_checked_once_and_only_progress_is_shown(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    class Refusing(Silence):
        def note(self, text: str) -> None:
            raise ValueError(text)

        def progress(self, state: Progress) -> None:
            calls.append(state.done)

    def prepare(recipe: Recipe, *args: Any, listener: Refusing, **options: Any) -> None:
        listener.note("a note of the job")
        listener.progress(Progress("tokenising", recipe.seed, None))

    monkeypatch.setattr("mftctl.workflows.run_data_checks.prepare_training", prepare)
    mask = {"command": "mask-train", "after": "fft", "sweep": {"mask_train.ratio": [0.1, 0.2]}}
    recipe = make_recipe(workspace, stages={"fft": {"command": "fft"}, "mft": mask}, seeds=(3, 4))
    jobs = [planned.job for planned in plan_experiment(recipe, "r", workspace / "no-runs")]
    assert len(jobs) > 4
    assert not list(data_problems(jobs, Refusing()))
    assert calls == [3, 4]
