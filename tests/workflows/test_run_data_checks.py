"""The data of every seed and stage is checked before the first training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from mftctl.data.prepared.load import load_examples
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe
from mftctl.masking.checkpoints.remote_code import trusts_code
from mftctl.progress import Progress, Silence
from mftctl.workflows.run import plan_experiment, run_experiment
from mftctl.workflows.run_data_checks import data_problems
from mftctl.workflows.validate import validate
from tests.conftest import build_llama, build_tokenizer
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


def problems_of(recipe: Recipe, listener: Silence | None = None) -> list[str]:
    plan = plan_experiment(recipe, "r", Path("no-runs"))
    return list(data_problems([planned.job for planned in plan], listener or Silence()))


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
    (problem,) = problems_of(recipe)
    assert problem.startswith(f"seed 0, {stage}: {part}: too many records cannot be used (where: {path}:48;")
    (found,) = validate(recipe, None).problems
    assert found.startswith(f"{key}: Too many records cannot be used (where: {path}:48;")


def test_a_long_record_to_retain_within_the_limit(workspace: Path, seeds: tuple[Path, int, int]) -> None:
    changes = {"retain_data": [str(seeds[0])], "bad_records_max": 0.2, "eval__max_length_tokens": 64}
    recipe = recipe_of(workspace, (0, 1), **changes)
    assert not problems_of(recipe)
    assert not validate(recipe, None).problems


def test_a_file_for_a_benchmark_beside_test_data(workspace: Path) -> None:
    stages = {"results": {"command": "eval", "set": {"eval.tasks": ["gsm8k"], "eval.task_data": {"gsm8k": "g.jsonl"}}}}
    assert not problems_of(make_recipe(workspace, stages=stages))


def test_the_template_that_fine_tuning_saved(workspace: Path, tmp_path: Path) -> None:
    build_llama().save_pretrained(tmp_path / "plain")
    build_tokenizer(chat_template=None).save_pretrained(tmp_path / "plain")
    data = tmp_path / "turns.jsonl"
    turns = [{"role": role, "content": text} for role, text in (("user", "1"), ("assistant", "2")) * 2]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 40)
    tune: dict[str, Any] = {"command": "fft", "set": {"chat_template": "chatml"}}
    mask = {"command": "mask-train", "after": "fft"}
    changes = {"model": str(tmp_path / "plain"), "data": [str(data)], "val_data": [str(data)], "test_data": [str(data)]}
    stages = {"fft": tune, "mft": mask, "results": {"command": "eval", "of": ["mft"]}}
    assert not problems_of(make_recipe(workspace, stages=stages, **changes))
    without = {**stages, "fft": {"command": "fft"}}
    (problem,) = problems_of(make_recipe(workspace, stages=without, **changes))
    assert problem.startswith("fft: ")
    assert "chat template" in problem


def test_test_data_longer_than_the_models_positions(workspace: Path, tmp_path: Path) -> None:
    small = GPT2Config(vocab_size=102, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "gpt2")
    build_tokenizer().save_pretrained(tmp_path / "gpt2")
    recipe = make_recipe(workspace, stages={"results": {"command": "eval"}}, model=str(tmp_path / "gpt2"))
    (problem,) = problems_of(recipe)
    assert problem.startswith("results: A record is longer than the model's learned positions")


def test_the_first_seed_listed_is_the_one_described(workspace: Path, seeds: tuple[Path, int, int]) -> None:
    path, without, having = seeds
    recipe = recipe_of(workspace, (without,), data=[f"{path}=24"], seed=having)
    assert not validate(recipe, None).problems


def test_jobs_prepare_their_data_once_as_they_use_it(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, float]] = []
    shown: list[str] = []

    class Listening(Silence):
        def note(self, text: str) -> None:
            raise ValueError(text)

        def progress(self, state: Progress) -> None:
            shown.append(state.task)

    def prepare(recipe: Recipe, *args: Any, data_fraction: float, listener: Silence, **options: Any) -> None:
        assert trusts_code()
        listener.note("a note of the job")
        listener.progress(Progress("tokenising", 0, None))
        calls.append((recipe.seed, data_fraction))

    monkeypatch.setattr("mftctl.workflows.run_data_checks.prepare_training", prepare)
    mask = {"command": "mask-train", "after": "fft", "sweep": {"mask_train.ratio": [0.1, 0.2]}}
    stages = {"fft": {"command": "fft"}, "mft": mask, "probe": {"command": "probe", "after": "fft"}}
    recipe = make_recipe(workspace, stages=stages, seeds=(3, 4), trust_remote_code=True)
    assert not problems_of(recipe, Listening())
    assert calls == [(3, 1.0), (3, 0.5), (4, 1.0), (4, 0.5)]
    assert shown == ["tokenising"] * 4
