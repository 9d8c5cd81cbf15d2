from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.catalog import BENCHMARKS
from mftctl.evaluation.benchmarks.lm_eval_tasks import other_config, task_config
from mftctl.evaluation.benchmarks.local_task import build_task, quiet_libraries
from mftctl.evaluation.benchmarks.problems import Problems

OFFLINE = sorted(set(BENCHMARKS) - {"ifeval"})
"""ifeval's checker, once imported, fetches data."""


def test_a_benchmark_is_lm_evals_task_with_the_changes_of_its_file() -> None:
    config = task_config("gsm8k")
    assert config["dataset_path"] == "openai/gsm8k"
    assert config["num_fewshot"] == len(config["fewshot_config"]["samples"]) == 8
    assert [entry["name"] for entry in config["filter_list"]] == ["strict-match", "flexible-extract", "marked-match"]
    assert {**task_config("gsm8k_0shot"), "task": "gsm8k", "num_fewshot": 8} == config


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFLINE)
def test_every_benchmark_has_a_task_with_its_data_and_shots(name: str) -> None:
    config = task_config(name)
    assert config["task"] == name
    assert config["test_split"]
    assert config["dataset_path"]
    in_the_prompt = {"bbh", "tydiqa"}  # their examples differ per problem and are part of it
    assert config["num_fewshot"] == (0 if name in in_the_prompt else BENCHMARKS[name].shots)


def test_changing_a_configuration_leaves_the_next_one_alone() -> None:
    task_config("gsm8k")["metric_list"].clear()
    assert task_config("gsm8k")["metric_list"]


@pytest.mark.slow
def test_a_task_of_lm_eval_and_the_nearest_to_a_wrong_name() -> None:
    assert other_config("arc_easy")["task"] == "arc_easy"
    with pytest.raises(EvaluationError, match="no benchmark named 'helaswag'") as caught:
        other_config("helaswag")
    assert "hellaswag" in str(caught.value.hint)


def test_a_local_file_without_the_examples_of_the_prompt_is_an_error() -> None:
    config = {"task": "few", "num_fewshot": 5, "fewshot_split": "train", "output_type": "generate_until"}
    with pytest.raises(EvaluationError, match="few-shot examples") as caught:
        build_task(config, Problems(({"a": "b"},), "a.jsonl", ""), is_local=True)
    assert caught.value.key == "task_data.few"


def test_levels_are_put_back_after_an_error() -> None:
    harness = logging.getLogger("lm_eval")
    before = (harness.level, transformers_logging.get_verbosity())
    inside = []

    def fail() -> None:
        inside.append((harness.level, transformers_logging.get_verbosity()))
        raise KeyError

    with pytest.raises(KeyError), quiet_libraries():
        fail()
    assert inside == [(logging.ERROR, logging.ERROR)]
    assert (harness.level, transformers_logging.get_verbosity()) == before


def test_every_task_file_belongs_to_a_benchmark() -> None:
    from mftctl.evaluation.benchmarks.catalog import TASKS_FOLDER

    assert {Path(path).stem for path in TASKS_FOLDER.iterdir() if path.suffix == ".yaml"} == set(BENCHMARKS)
    in_olmes = {name for name, benchmark in BENCHMARKS.items() if benchmark.in_olmes}
    assert {path.stem for path in (TASKS_FOLDER / "olmes").iterdir()} == in_olmes
