"""Evaluation during training: what is measured, that it changes nothing, and that interruptions lose no result."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mftctl.errors import ConfigError, EvaluationError, Interrupted
from mftctl.experiments.deciding_keys import deciding_keys
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_folder import Run
from mftctl.masking.mask import load_mask
from mftctl.progress import Progress, Silence
from mftctl.workflows.eval import evaluate
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from tests.workflow_fixtures import make_recipe, open_run

QUESTIONS = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(6)]


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("problems") / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in QUESTIONS))
    return str(path)


def measuring(workspace: Path, section: str, problems: str, **changes: Any) -> Recipe:
    """A recipe with 12 steps that measures four samples of everything every 5 steps."""
    every = {f"{section}__benchmark_every": 5, f"{section}__benchmark_limit": 4}
    tasks = {"tasks": ["gsm8k_0shot"], "task_data": {"gsm8k_0shot": problems}, "max_new_tokens": 4}
    return make_recipe(workspace, eval=tasks, **every, **changes)


@pytest.fixture(scope="module")
def measured(workspace: Path, problems: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fine-tuning that keeps its last state."""
    recipe = measuring(workspace, "fft", problems, fft__keep="last")
    run, source = open_run(tmp_path_factory.mktemp("measured"), "fft", recipe)
    run.finish(fine_tune(recipe, source, run, Silence()))
    return run


@pytest.mark.slow
def test_measures_at_the_start_every_n_steps_and_at_the_end(measured: Run) -> None:
    found = measured.record.result["evaluations"]
    assert [(line["step"], line["dataset"]) for line in found] == [
        (step, name) for step in (0, 5, 10, 12) for name in ("test.jsonl", "gsm8k_0shot")
    ]
    for line in found:
        assert {metric["samples"] for metric in line["metrics"]} == {4}
    samples = measured.folder / "evaluations" / "step-12" / "gsm8k_0shot.jsonl"
    assert [json.loads(line)["id"] for line in samples.read_text().splitlines()] == ["0", "1", "2", "3"]


@pytest.mark.slow
def test_the_last_results_equal_an_evaluation_of_the_model(measured: Run, problems: str, tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "model": measured.record.result["model"],
            "test_data": measured.record.config["test_data"],
            "eval": {**measured.record.config["eval"], "limit": 4},
        }
    )
    run, source = open_run(tmp_path, "eval", recipe)
    datasets = evaluate(recipe, source, run, Silence()).document()["datasets"]
    last = [line for line in measured.record.result["evaluations"] if line["step"] == 12]
    for dataset, line in zip(datasets, last, strict=True):
        assert dataset["digest"] == line["digest"]
        for mine, its in zip(dataset["metrics"], line["metrics"], strict=True):
            assert mine["value"] == pytest.approx(its["value"], abs=1e-5)


@pytest.mark.slow
def test_measuring_changes_no_weight(measured: Run, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__keep="last")
    run, source = open_run(tmp_path, "fft", recipe)
    fine_tune(recipe, source, run, Silence())
    mine = load_file(measured.folder / "model" / "model.safetensors")
    for name, tensor in load_file(run.folder / "model" / "model.safetensors").items():
        assert torch.equal(tensor, mine[name])


@pytest.mark.slow
def test_measuring_changes_no_dropout(workspace: Path, problems: str, tmp_path: Path) -> None:
    lora = {"fft__method": "lora", "fft__lora_dropout": 0.5, "fft__max_steps": 6}
    adapters = []
    for recipe in (make_recipe(workspace, **lora), measuring(workspace, "fft", problems, **lora)):
        run, source = open_run(tmp_path, "fft", recipe)
        fine_tune(recipe, source, run, Silence())
        adapters.append(load_file(run.folder / "model" / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


@pytest.mark.slow
def test_measuring_during_mask_training_changes_no_mask(workspace: Path, problems: str, tmp_path: Path) -> None:
    masks = []
    for recipe in (make_recipe(workspace), measuring(workspace, "mask_train", problems)):
        run, source = open_run(tmp_path, "mask-train", recipe)
        result = mask_train(recipe, source, run, Silence()).document()
        masks.append(load_mask(Path(result["mask"])))
    assert [line["step"] for line in result["evaluations"]] == [0, 0, 5, 5, 10, 10, 12, 12]
    losses = [line["metrics"][0]["value"] for line in result["evaluations"] if line["dataset"] == "test.jsonl"]
    assert len(set(losses)) == 4
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0].names())


class StopWhileMeasuring(Silence):
    """Presses Ctrl-C in the middle of a measurement, after a given number of completed ones."""

    def __init__(self, measurement: int) -> None:
        self._left = measurement

    def progress(self, state: Progress) -> None:
        if state.task == "evaluating gsm8k_0shot" and self._left >= 0:
            self._left -= 1
            if self._left < 0:
                signal.raise_signal(signal.SIGINT)
        elif state.task == "evaluating test.jsonl" and self._left < 0:
            pytest.fail("a measurement went on after the stop")


@pytest.mark.slow
@pytest.mark.parametrize(("measurement", "step"), [(0, 0), (1, 5)])
def test_an_interrupted_measurement_is_resumed_to_the_same_results(
    measured: Run, workspace: Path, problems: str, tmp_path: Path, measurement: int, step: int
) -> None:
    recipe = measuring(workspace, "fft", problems, fft__keep="last", eval__batch_size=1)
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted, match=f"step {step} of 12"):
        fine_tune(recipe, source, run, StopWhileMeasuring(4 * measurement))
    result = fine_tune(recipe, source, run, Silence(), resume=True).document()
    assert result["evaluations"] == measured.record.result["evaluations"]


def test_nothing_to_measure(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__benchmark_every=5, test_data=[])
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        fine_tune(recipe, source, run, Silence())


@pytest.mark.slow
def test_a_benchmark_file_with_wrong_fields_is_found_before_the_first_step(workspace: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text('{"question": "1+1?"}\n')
    recipe = measuring(workspace, "fft", str(path))
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(EvaluationError) as caught:
        fine_tune(recipe, source, run, Silence())
    assert caught.value.path == f"{path}:1"
    assert run.training.metrics() == []


def test_measurement_settings_are_deciding_keys_only_during_training(workspace: Path) -> None:
    plain, other = (make_recipe(workspace, eval={"limit": limit}) for limit in (1, 2))
    assert deciding_keys(plain, "fft") == deciding_keys(other, "fft")
    plain, other = (make_recipe(workspace, eval={"limit": limit}, fft__benchmark_every=5) for limit in (1, 2))
    assert deciding_keys(plain, "fft") != deciding_keys(other, "fft")
