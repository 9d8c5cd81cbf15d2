"""`mftctl run`: the plan, the experiment and its progress tree."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mftctl.cli.run_view import experiment_tree, running_tree
from mftctl.experiments.recipe_files import load_recipe
from mftctl.experiments.run_folder import list_runs
from mftctl.workflows.run import Planned, plan_experiment
from tests.cli.running import CommandLine
from tests.forked_commands.commands import ForkedCommands

SHORT = {"max_steps": 2, "val_steps": 2, "batch_size": 4}
STAGES: dict[str, Any] = {
    "fft": {"command": "fft"},
    "removed": {
        "command": "mask-train",
        "after": "fft",
        "set": {"mask_train.method": "random"},
        "sweep": {"mask_train.ratio": [0.1, 0.3]},
    },
    "results": {"command": "eval", "of": ["fft", "removed"]},
}


@pytest.fixture
def recipe(workspace: Path, mftctl: CommandLine) -> Path:
    document = {
        "model": str(workspace / "tiny"),
        "data": str(workspace / "train.jsonl"),
        "val_data": str(workspace / "val.jsonl"),
        "test_data": str(workspace / "test.jsonl"),
        "fft": {**SHORT, "learning_rate": 3e-3},
        "mask_train": {**SHORT, "layers": "1-2"},
        "eval": {"generate": False},
        "stages": STAGES,
    }
    path = mftctl.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


def test_a_dry_run_shows_the_plan_and_does_nothing(mftctl: CommandLine, recipe: Path) -> None:
    outcome = mftctl("run", "recipe.yaml", "--dry-run")
    assert outcome.code == 0, outcome.stderr
    assert [line.rstrip() for line in outcome.stdout.splitlines()] == [
        "recipe.yaml  0 of 6 done",
        "└── seed 0",
        "    └── ○ fft",
        "        ├── ○ removed[ratio=0.1] (mask-train)",
        "        │   └── ○ results[ratio=0.1] (eval)",
        "        ├── ○ removed[ratio=0.3] (mask-train)",
        "        │   └── ○ results[ratio=0.3] (eval)",
        "        └── ○ results (eval)",
    ]
    assert not (mftctl.folder / "runs").exists()


@pytest.mark.slow
def test_an_experiment_is_run_reported_and_recognised(mftctl: CommandLine, recipe: Path) -> None:
    outcome = mftctl("run", "recipe.yaml", "--json")
    assert outcome.code == 0, outcome.stderr
    (table,) = json.loads(outcome.stdout)["tables"]
    assert [row["state"] for row in table["rows"]] == [
        "FFT",
        "random mask (removed[ratio=0.1])",
        "random mask (removed[ratio=0.3])",
    ]
    again = mftctl("run", "recipe.yaml", "--dry-run", "--json", "--set", "mask_train.target=mlp")
    tasks = {(task["name"], task["of"]): task for task in json.loads(again.stdout)["tasks"]}
    assert tasks["fft", "fft"]["state"] == "done"
    assert tasks["fft", "fft"]["run"] == "001-fft"
    changed = tasks["removed[ratio=0.1]", "removed[ratio=0.1]"]
    assert (changed["state"], changed["why"]) == ("changed", "since 002-mask-train: mask_train.target both -> mlp")
    assert tasks["results", "fft"]["state"] == "done"
    assert "Seed 0, results of fft: new" in outcome.stderr
    assert len(list_runs(mftctl.folder / "runs")[0]) == 6


def test_a_problem_is_reported_before_anything_is_run(mftctl: CommandLine, recipe: Path) -> None:
    outcome = mftctl("run", "recipe.yaml", "--set", "mask_train.layers=3-4")
    assert outcome.code == 2
    assert "removed[ratio=0.1]: The model does not have that many layers" in outcome.stderr
    assert not (mftctl.folder / "runs").exists()


def test_a_circle_of_stages_is_one_clear_error(mftctl: CommandLine, recipe: Path) -> None:
    outcome = mftctl("run", "recipe.yaml", "--set", "stages.fft.after=results", "--set", "stages.results.of=[fft]")
    assert outcome.code == 2
    assert "Stages depend on each other in a cycle." in outcome.stderr
    assert "fft" in outcome.stderr


def shown(view: Any) -> list[str]:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(view)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_live_tree_shows_the_current_seed(recipe: Path, tmp_path: Path) -> None:
    settled = load_recipe(str(recipe), sets=["seeds=[3,5]"])
    plan: list[Planned] = plan_experiment(settled, "x", tmp_path / "none")
    plan[1].state = "running"
    plan[2].state = "failed"
    plan[3].state, plan[3].why = "changed", "since 001-fft: seed 1 -> 3"
    assert shown(running_tree("x", plan)) == [
        "x  0 of 12 done",
        "├── seed 3",
        "│   └── ○ fft",
        "│       ├── ▸ removed[ratio=0.1] (mask-train)",
        "│       │   └── ○ results[ratio=0.1] (eval)",
        "│       ├── ✗ removed[ratio=0.3] (mask-train)",
        "│       │   └── ○ results[ratio=0.3] (eval)",
        "│       └── ○ results (eval)  since 001-fft: seed 1 -> 3",
        "└── seed 5  0 of 6 done",
    ]
    assert len(shown(experiment_tree("x", plan))) == 15


@pytest.mark.slow
def test_two_runs_of_one_recipe_do_each_stage_once(
    mftctl: CommandLine, recipe: Path, forked_commands: ForkedCommands
) -> None:
    both = [
        subprocess.Popen(
            [*start, "run", "recipe.yaml"], cwd=mftctl.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for start in ([sys.executable, "-m", "mftctl"], forked_commands.mftctl)
    ]
    ends = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    runs, problems = list_runs(mftctl.folder / "runs")
    assert problems == []
    assert sorted(run.record.command for run in runs) == ["eval", "eval", "eval", "fft", "mask-train", "mask-train"]
    assert {run.record.status for run in runs} == {"finished"}
    assert len({run.record.digest for run in runs}) == 6
    told = "".join(errors for _, errors in ends)
    assert "by another process" in told


@pytest.mark.slow
def test_stages_left_unfinished_by_another_process_are_resumed(
    mftctl: CommandLine, recipe: Path, forked_commands: ForkedCommands
) -> None:
    command = [*forked_commands.mftctl, "run", "recipe.yaml", "--set", "fft.max_steps=1000000"]
    first = subprocess.Popen(command, cwd=mftctl.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    metrics = mftctl.folder / "runs" / "001-fft" / "metrics.jsonl"
    deadline_seconds = time.monotonic() + 120
    while time.monotonic() < deadline_seconds and not metrics.exists():
        time.sleep(0.05)
    second = subprocess.Popen(command, cwd=mftctl.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert second.stderr is not None
    while "waiting for " not in (line := second.stderr.readline()):
        assert line
    first.kill()
    first.communicate()
    assert "resumed" in second.stderr.readline()
    steps_before = metrics.read_text().count("\n")
    while time.monotonic() < deadline_seconds and metrics.read_text().count("\n") <= steps_before:
        time.sleep(0.05)
    second.terminate()
    _, errors = second.communicate(timeout=100)
    assert second.returncode == 130, errors
    runs, _ = list_runs(mftctl.folder / "runs")
    assert [(run.name, run.record.status) for run in runs] == [("001-fft", "interrupted")], errors
