"""The eval workflow with a server: the scores of the local engine, what is recorded, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import ConfigError, EvaluationError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.load import load_tokenizer
from mftctl.progress import Silence
from mftctl.workflows.eval import evaluate
from tests.completions_stand_in import Behaviour, Completions, serving
from tests.conftest import build_llama
from tests.workflow_fixtures import make_recipe, open_run

KEY = "sk-a-secret-of-this-test"


@pytest.fixture
def server(workspace: Path) -> Iterator[Completions]:
    with serving(build_llama(), load_tokenizer(workspace / "tiny"), Behaviour(context_tokens=512)) as server:
        yield server


@pytest.fixture
def task_data(tmp_path: Path) -> dict[str, str]:
    def write(name: str, records: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(tmp_path / name)

    questions = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(4)]
    choices = [
        {"subject": "sums", "question": f"{n}+1?", "choices": [str(n + m) for m in range(4)], "answer": n % 4}
        for n in range(6)
    ]
    return {"gsm8k_0shot": write("gsm8k.jsonl", questions), "mmlu": write("mmlu.jsonl", choices)}


def recipe(workspace: Path, task_data: dict[str, str], url: str | None, **options: Any) -> Recipe:
    engine = {} if url is None else {"engine": "openai", "base_url": url}
    measured = {"tasks": list(task_data), "task_data": task_data, "max_new_tokens": 6, "limit": 5}
    return make_recipe(workspace, eval={**measured, **engine, **options})


def evaluated(root: Path, recipe: Recipe) -> tuple[dict[str, dict[str, Any]], Run]:
    """The datasets by name, and the run."""
    run, source = open_run(root, "eval", recipe)
    result = evaluate(recipe, source, run, Silence())
    run.finish(result)
    return {dataset["name"]: dataset for dataset in result.document()["datasets"]}, run


def samples(run: Run, dataset: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / dataset["samples"]).read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("chat_template", [False, True])
def test_scores_are_those_of_the_local_engine(
    workspace: Path, tmp_path: Path, server: Completions, task_data: dict[str, str], chat_template: bool
) -> None:
    options = {"chat_template": chat_template, "save_samples": True}
    local, local_run = evaluated(tmp_path / "a", recipe(workspace, task_data, None, **options))
    served, served_run = evaluated(tmp_path / "b", recipe(workspace, task_data, server.url, **options))
    assert list(served) == list(local) == ["test.jsonl", "gsm8k_0shot", "mmlu"]
    for name, dataset in local.items():
        rows, expected = samples(served_run, served[name]), samples(local_run, dataset)
        assert [row.get("output") for row in rows] == [row.get("output") for row in expected]
        for row, other in zip(rows, expected, strict=True):
            assert row["scores"] == pytest.approx(other["scores"], abs=1e-4)
            assert {**row, "scores": 0} == {**other, "scores": 0}
        values = [{metric["name"]: metric["value"] for metric in found["metrics"]} for found in (served[name], dataset)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
        assert served[name]["digest"] == f"{dataset['digest']}:openai"  # so a report never pairs them
    assert served["gsm8k_0shot"]["generated_tokens"] == local["gsm8k_0shot"]["generated_tokens"]


@pytest.mark.slow
def test_the_server_is_recorded_without_the_key(
    workspace: Path, tmp_path: Path, server: Completions, task_data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.behaviour.key = KEY
    _, run = evaluated(tmp_path / "runs", recipe(workspace, task_data, f"{server.url}/"))
    record = json.loads((run.folder / "run.json").read_text())
    assert record["inputs"]["server"] == {"url": server.url, "model": "tiny", "owner": "vllm", "context_tokens": 512}
    assert record["config"]["eval"]["base_url"] == server.url
    assert "peak_memory_bytes" not in record["result"]
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


@pytest.mark.parametrize("echo", ["refused", "ignored"])
def test_missing_likelihoods_are_an_error_before_anything_is_asked(
    workspace: Path, tmp_path: Path, server: Completions, task_data: dict[str, str], echo: str
) -> None:
    server.behaviour.echo = echo
    with pytest.raises(EvaluationError, match="does not return the likelihoods") as caught:
        evaluated(tmp_path / "runs", recipe(workspace, task_data, server.url))
    assert "the loss on a data file, mmlu needs" in str(caught.value.expected)
    assert server.answered == []
    assert not list(tmp_path.rglob("*samples*"))


@pytest.mark.slow
def test_answers_alone_need_no_likelihoods(
    workspace: Path, tmp_path: Path, server: Completions, task_data: dict[str, str]
) -> None:
    server.behaviour.echo = "refused"
    asked = recipe(workspace, {"gsm8k_0shot": task_data["gsm8k_0shot"]}, server.url)
    datasets, _ = evaluated(tmp_path / "runs", asked.model_copy(update={"test_data": ()}))
    assert list(datasets) == ["gsm8k_0shot"]
    assert len(server.answered) == 4


def test_a_record_longer_than_the_servers_context_is_an_error(
    workspace: Path, tmp_path: Path, server: Completions
) -> None:
    server.behaviour.context_tokens = 20
    with pytest.raises(EvaluationError, match="does not fit the server's context") as caught:
        evaluated(tmp_path / "runs", recipe(workspace, {}, server.url))
    assert "test.jsonl:" in str(caught.value.path)


def test_a_mask_that_is_not_applied_cannot_be_served(
    workspace: Path, tmp_path: Path, server: Completions, task_data: dict[str, str]
) -> None:
    asked = recipe(workspace, task_data, server.url)
    run, source = open_run(tmp_path, "eval", asked)
    with pytest.raises(ConfigError, match="A server needs a complete checkpoint") as caught:
        evaluate(asked, replace(source, mask="mask.bits"), run, Silence())
    assert "mftctl apply MODEL MASK" in str(caught.value.hint)
    assert server.asked == []
