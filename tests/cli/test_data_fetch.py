"""`mftctl data fetch` against a stand-in of the hub: what later commands find without a network."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.cli.running import CommandLine
from tests.hub_stand_in import hub_with

PARTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
QUESTIONS = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(3)]


def parquet_file(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def card(*parts: str) -> bytes:
    lines = [f"- config_name: {part}\n  data_files:\n  - split: test\n    path: {part}/test-*\n" for part in parts]
    return "".join(["---\nconfigs:\n", *lines, "---\n"]).encode()


DATASETS = {
    "openai/gsm8k": {"README.md": card("main"), "main/test-00000-of-00001.parquet": parquet_file(QUESTIONS)},
    "EleutherAI/hendrycks_math": {
        "README.md": card(*PARTS),
        **{
            f"{part}/test-00000-of-00001.parquet": parquet_file(
                [{"problem": "1 + 1?", "type": part, "solution": r"\boxed{2}"}]
            )
            for part in PARTS
        },
    },
    "tatsu-lab/alpaca_eval": {
        "alpaca_eval_gpt4_baseline.json": json.dumps([{"instruction": "Do.", "output": "Done."}]).encode()
    },
}


def run(folder: Path, home: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mftctl", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
    )


def table(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, int | None]]:
    return {data["benchmark"]: (data["state"], data["records"]) for data in json.loads(done.stdout)["data"]}


@pytest.mark.slow
def test_fetched_data_is_found_without_a_network(tmp_path: Path) -> None:
    names = ("gsm8k", "humaneval", "math", "alpaca_eval")
    home, moved = tmp_path / "home", tmp_path / "moved"
    with hub_with(DATASETS) as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        first = run(tmp_path, home, "data", "fetch", *names, "--json", **online)
        assert first.returncode == 0, first.stderr
        assert table(first) == {
            "gsm8k": ("fetched", 3),
            "humaneval": ("shipped", 164),
            "math": ("fetched", 7),
            "alpaca_eval": ("fetched", 1),
        }
        assert "gsm8k: downloading openai/gsm8k/main:test" in first.stderr
        hub.asked.clear()
        second = run(tmp_path, home, "data", "fetch", *names, "--json", **online)
        assert {state for state, _ in table(second).values()} == {"already there", "shipped"}
        assert not [path for path in hub.asked if "/datasets/" in path]
    shutil.move(home, moved)  # as if copied to a machine without a network
    third = run(tmp_path, moved, "data", "fetch", *names)
    assert third.returncode == 0, third.stderr
    assert "gsm8k         openai/gsm8k/main:test" in third.stdout
    written = tmp_path / "written.jsonl"
    written.write_text("".join(json.dumps({"id": n, "output": f"#### {n + 1}"}) + "\n" for n in range(3)))
    measured = run(tmp_path, moved, "eval", "--tasks", "gsm8k", "--predictions", written, "--json")
    assert measured.returncode == 0, measured.stderr
    [dataset] = json.loads(measured.stdout)["datasets"]
    assert dataset["data"] == "openai/gsm8k/main:test"
    assert {metric["name"]: metric["value"] for metric in dataset["metrics"]}["exact_match,marked-match"] == 1.0


@pytest.mark.slow
def test_without_a_network_the_command_fails_after_its_table(mftctl: CommandLine) -> None:
    outcome = mftctl("data", "fetch", "humaneval", "mmlu")
    assert outcome.code == 1
    assert "164   shipped" in outcome.stdout
    assert "missing" in outcome.stdout
    assert "Error: The data of mmlu cannot be downloaded." in outcome.stderr
    assert "https://huggingface.co/datasets/cais/mmlu, revision main, split test of all" in outcome.stderr
    assert "--task-data mmlu=FILE" in outcome.stderr


@pytest.mark.slow
def test_an_evaluation_without_its_data_names_the_command(mftctl: CommandLine) -> None:
    (mftctl.folder / "written.jsonl").write_text('{"id": 0, "output": "1"}\n')
    outcome = mftctl("eval", "--tasks", "mbpp", "--predictions", "written.jsonl")
    assert outcome.code == 1
    assert "try: with a network, mftctl data fetch mbpp; without one, --task-data mbpp=FILE" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "No benchmark is named."), (("--all", "gsm8k"), "--all and benchmark names are mutually exclusive")],
)
def test_names_or_all(mftctl: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    outcome = mftctl("data", "fetch", *arguments)
    assert outcome.code == 2
    assert message in outcome.stderr


@pytest.mark.slow
def test_all_are_the_named_benchmarks(mftctl: CommandLine) -> None:
    from mftctl.evaluation.benchmarks.catalog import BENCHMARKS

    outcome = mftctl("data", "fetch", "--all", "--json")
    found = json.loads(outcome.stdout)["data"]
    assert list(dict.fromkeys(data["benchmark"] for data in found)) == list(BENCHMARKS)
