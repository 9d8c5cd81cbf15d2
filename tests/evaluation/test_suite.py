"""The eval workflow: its output files, and equality of a mask in memory with an applied one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mftctl.data.prepared.load import load_examples
from mftctl.data.record_issues import RecordIssues
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError, DataError, EvaluationError
from mftctl.evaluation.suite import prepare_suite
from mftctl.experiments.model_source import ModelSource
from mftctl.progress import Silence
from mftctl.workflows.apply import apply
from mftctl.workflows.eval import evaluate
from mftctl.workflows.mask_train import mask_train
from tests.workflow_fixtures import make_recipe, open_run, write_additions


@pytest.mark.slow
def test_writes_a_sample_file_that_gives_the_metrics(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace)
    run, source = open_run(tmp_path, "eval", recipe)
    result = evaluate(recipe, source, run, Silence()).document()
    (dataset,) = result["datasets"]
    rows = [json.loads(line) for line in (run.folder / dataset["samples"]).read_text().splitlines()]
    metrics = {metric["name"]: metric for metric in dataset["metrics"]}
    assert dataset["name"] == "test.jsonl"
    assert len(rows) == metrics["loss"]["samples"] == 16
    tokens = sum(row["weights"]["loss"] for row in rows)
    assert metrics["loss"]["value"] == pytest.approx(sum(row["scores"]["loss"] for row in rows) / tokens)
    assert metrics["exact_match"]["value"] == sum(row["scores"]["exact_match"] for row in rows) / 16
    assert [row["id"] for row in rows] == [str(number) for number in range(16)]
    assert rows[0]["where"].endswith("test.jsonl:1")
    assert result["state"] == "pre-trained"


def test_limit_and_no_generation(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, eval__limit=5, eval__generate=False)
    run, source = open_run(tmp_path, "eval", recipe)
    (dataset,) = evaluate(recipe, source, run, Silence()).document()["datasets"]
    assert [(metric["name"], metric["samples"]) for metric in dataset["metrics"]] == [("loss", 5)]


def test_every_seed_measures_the_same_sample(workspace: Path) -> None:
    data = {"test_data": [f"{workspace / 'test.jsonl'}=6"], "retain_data": [f"{workspace / 'val.jsonl'}=9"]}
    suites = [prepare_suite(make_recipe(workspace, seed=seed, **data), Silence()) for seed in range(4)]
    assert len(suites[0].examples) == 6
    assert len({tuple(example.where for example in suite.examples) for suite in suites}) == 1
    assert len({tuple(example.where for example in suite.retained) for suite in suites}) == 1


@pytest.mark.slow
def test_a_mask_in_memory_equals_the_applied_checkpoint(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, mask_train__method="random", mask_train__ratio=0.4)
    run, source = open_run(tmp_path, "mask-train", recipe)
    masked = replace(source, mask=mask_train(recipe, source, run, Silence()).document()["mask"], state="random mask")
    apply_run, _ = open_run(tmp_path, "apply", recipe)
    applied = ModelSource(apply(masked, apply_run, Silence()).document()["model"])
    losses = []
    for item in (source, masked, applied):
        eval_run, _ = open_run(tmp_path, "eval", recipe)
        (dataset,) = evaluate(recipe, item, eval_run, Silence()).document()["datasets"]
        losses.append(dataset["metrics"][0]["value"])
    assert losses[1] == losses[2] != losses[0]


@pytest.mark.slow
def test_gsm8k_from_a_local_file(workspace: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"question": f"{n}+1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(3))
    )
    recipe = make_recipe(
        workspace, test_data=[], eval__tasks=["gsm8k_0shot"], eval__task_data={"gsm8k_0shot": str(problems)}
    )
    run, source = open_run(tmp_path, "eval", recipe)
    (dataset,) = evaluate(recipe, source, run, Silence()).document()["datasets"]
    rows = [json.loads(line) for line in (run.folder / dataset["samples"]).read_text().splitlines()]
    assert dataset["name"] == "gsm8k_0shot"
    assert {metric["name"] for metric in dataset["metrics"]} == {
        "exact_match,strict-match",
        "exact_match,marked-match",
        "exact_match,flexible-extract",
    }
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    assert all(set(row["scores"]) == {metric["name"] for metric in dataset["metrics"]} for row in rows)


def test_nothing_to_measure(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, test_data=[])
    run, source = open_run(tmp_path, "eval", recipe)
    with pytest.raises(ConfigError, match="nothing to evaluate"):
        evaluate(recipe, source, run, Silence())


@pytest.mark.slow
def test_an_unknown_benchmark(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, eval__tasks=["gsm9k"])
    run, source = open_run(tmp_path, "eval", recipe)
    with pytest.raises(EvaluationError, match="no benchmark named") as caught:
        evaluate(recipe, source, run, Silence())
    assert "gsm8k" in str(caught.value.hint)


def test_a_benchmark_file_without_its_task(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, eval__task_data={"gsm8k": "x.jsonl"})
    run, source = open_run(tmp_path, "eval", recipe)
    with pytest.raises(ConfigError, match="not run"):
        evaluate(recipe, source, run, Silence())


def test_a_benchmark_file_that_is_missing(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, eval__tasks=["gsm8k"], eval__task_data={"gsm8k": "missing.jsonl"})
    run, source = open_run(tmp_path, "eval", recipe)
    with pytest.raises(EvaluationError, match="does not exist") as caught:
        evaluate(recipe, source, run, Silence())
    assert caught.value.path == "missing.jsonl"


def held_out_lines(path: Path) -> list[str]:
    """The places of the records whose prompt digest is even, in file order."""
    examples = load_examples([DataSource(str(path))], issues=RecordIssues())
    keys = [key.tobytes()[0] for key in examples.prompt_keys]
    return [examples.where(number) for number, first in enumerate(keys) if first % 2 == 0]


def test_the_held_out_half_is_a_dataset_with_its_own_samples(workspace: Path, tmp_path: Path) -> None:
    retained = write_additions(tmp_path / "retained.jsonl", 20, seed=5)
    recipe = make_recipe(workspace, retain_data=[str(retained)], eval__limit=5, eval__generate=False)
    run, source = open_run(tmp_path / "runs", "eval", recipe)
    test, other = evaluate(recipe, source, run, Silence()).datasets
    assert (test.name, test.samples) == ("test.jsonl", "samples.jsonl")
    assert (other.name, other.samples) == ("retained", "retained-samples.jsonl")
    assert test.digest != other.digest
    rows = [json.loads(line) for line in (run.folder / other.samples).read_text().splitlines()]
    expected = held_out_lines(retained)
    assert 5 < len(expected) < 20
    assert [row["where"] for row in rows] == expected[:5]
    [metric] = other.metrics
    tokens = sum(row["weights"]["loss"] for row in rows)
    assert (metric.name, metric.samples) == ("loss", 5)
    assert metric.standard_error is not None
    assert metric.value == pytest.approx(sum(row["scores"]["loss"] for row in rows) / tokens)


def test_data_to_retain_alone_is_something_to_measure(workspace: Path, tmp_path: Path) -> None:
    retained = write_additions(tmp_path / "retained.jsonl", 20, seed=5)
    with retained.open("a") as file:
        file.write('{"question": 3}\n')
    recipe = make_recipe(workspace, test_data=[], retain_data=[str(retained)], bad_records="skip", bad_records_max=0.05)
    run, source = open_run(tmp_path / "runs", "eval", recipe)
    [dataset] = evaluate(recipe, source, run, Silence()).datasets
    # No answers are generated although `eval.generate` is on.
    assert [metric.name for metric in dataset.metrics] == ["loss"]
    assert dataset.metrics[0].samples == len(held_out_lines(retained))
    assert run.record.inputs["record_issues"] == {"Retained data": {"refused": 1}}


def test_a_bad_record_of_the_data_to_retain_is_refused(workspace: Path, tmp_path: Path) -> None:
    retained = tmp_path / "retained.jsonl"
    retained.write_text('{"question": 3}\n')
    recipe = make_recipe(workspace, test_data=[], retain_data=[str(retained)])
    run, source = open_run(tmp_path / "runs", "eval", recipe)
    with pytest.raises(DataError, match="unknown format") as caught:
        evaluate(recipe, source, run, Silence())
    assert caught.value.path == f"{retained}:1"


def test_too_few_records_to_hold_any_out(workspace: Path, tmp_path: Path) -> None:
    retained = tmp_path / "retained.jsonl"
    records = [{"question": f"{number}?", "answer": "1"} for number in range(30)]
    retained.write_text("".join(json.dumps(record) + "\n" for record in records))
    held_out = held_out_lines(retained)
    kept = [record for number, record in enumerate(records, start=1) if f"{retained}:{number}" not in held_out]
    retained.write_text("".join(json.dumps(record) + "\n" for record in kept[:3]))
    recipe = make_recipe(workspace, test_data=[], retain_data=[str(retained)])
    run, source = open_run(tmp_path / "runs", "eval", recipe)
    with pytest.raises(DataError, match="too few records") as caught:
        evaluate(recipe, source, run, Silence())
    assert caught.value.key == "retain_data"
