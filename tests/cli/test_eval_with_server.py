"""`eval --engine openai` on the command line: resuming, and what is refused."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mftctl.experiments.run_folder import list_runs
from mftctl.experiments.run_record import RunStatus
from mftctl.masking.checkpoints.load import load_tokenizer
from tests.cli.running import CommandLine
from tests.completions_stand_in import Completions, serving
from tests.conftest import build_llama

PROBLEMS = 6
SERVER = ("--engine", "openai")


@pytest.fixture
def server(workspace: Path) -> Iterator[Completions]:
    with serving(build_llama(), load_tokenizer(workspace / "tiny")) as server:
        yield server


@pytest.fixture
def task(tmp_path: Path) -> tuple[object, ...]:
    records = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(PROBLEMS)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ("--tasks", "gsm8k_0shot", "--task-data", "gsm8k_0shot=problems.jsonl", "--max-new-tokens", 4)


@pytest.mark.slow
def test_an_evaluation_goes_on_when_its_server_is_back(
    mftctl: CommandLine, workspace: Path, server: Completions, task: tuple[object, ...]
) -> None:
    command = ("eval", workspace / "tiny", *SERVER, "--base-url", server.url, "--concurrent-requests", 1, *task)
    server.behaviour.failing_from = 5  # two requests find out what it understands
    stopped = mftctl(*command)
    assert stopped.code == 1
    assert "The server failed." in stopped.stderr
    assert "--resume" in stopped.stderr
    [run], _ = list_runs(mftctl.folder / "runs")
    assert run.record.status == RunStatus.INTERRUPTED

    server.behaviour.failing_from = None
    before = len(server.answered)
    resumed = mftctl(*command, "--resume", "--json")
    assert resumed.code == 0, resumed.stderr
    assert len(list_runs(mftctl.folder / "runs")[0]) == 1
    assert len(server.answered) - before == PROBLEMS - 3

    again = mftctl(*command, "--json", "--runs", "other")
    metrics = [json.loads(outcome.stdout)["datasets"][0]["metrics"] for outcome in (resumed, again)]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_ctrl_c_ends_requests_that_get_no_answer(
    mftctl: CommandLine, workspace: Path, server: Completions, task: tuple[object, ...]
) -> None:
    command = ("eval", workspace / "tiny", *SERVER, "--base-url", server.url, "--concurrent-requests", 2, *task)
    server.behaviour.interrupting_at = 6
    start_seconds = time.monotonic()
    stopped = mftctl(*command)
    assert stopped.code == 130
    assert "--resume" in stopped.stderr
    assert time.monotonic() - start_seconds < 60  # the client waits for an answer much longer than this
    [run], _ = list_runs(mftctl.folder / "runs")
    assert run.record.status == RunStatus.INTERRUPTED

    server.behaviour.interrupting_at = math.inf
    before = len(server.answered)
    assert mftctl(*command, "--resume").code == 0
    assert 0 < len(server.answered) - before < PROBLEMS


def test_the_served_model_must_be_named(mftctl: CommandLine) -> None:
    outcome = mftctl("eval", *SERVER, "--base-url", "http://127.0.0.1:9/v1", "--tasks", "gsm8k_0shot")
    assert outcome.code == 2
    assert "mftctl eval MODEL --engine openai" in outcome.stderr


def test_a_url_without_the_engine_is_refused(mftctl: CommandLine, workspace: Path, task: tuple[object, ...]) -> None:
    outcome = mftctl("eval", workspace / "tiny", "--base-url", "http://127.0.0.1:9/v1", *task)
    assert outcome.code == 2
    assert "add --engine openai" in outcome.stderr


def test_a_password_in_the_url_is_refused_and_not_shown(
    mftctl: CommandLine, workspace: Path, task: tuple[object, ...]
) -> None:
    url = "http://me:a-password@127.0.0.1:9/v1"
    for options in (("--base-url", url), ("--set", f"eval.base_url={url}")):
        outcome = mftctl("eval", workspace / "tiny", *SERVER, *options, *task)
        assert outcome.code == 2
        assert "OPENAI_API_KEY" in outcome.stderr
        assert "a-password" not in outcome.stdout + outcome.stderr
    assert not (mftctl.folder / "runs").exists()
