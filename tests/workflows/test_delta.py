"""Delta files as stages of an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import ConfigError
from mftctl.experiments.combined_results import DeltaResult
from mftctl.experiments.results import EvalResult
from mftctl.experiments.run_folder import Run
from mftctl.progress import Silence
from mftctl.reporting.report import make_report
from mftctl.workflows.run import plan_experiment, run_experiment
from tests.workflow_fixtures import make_recipe

SHARES = {"delta.ratio": [0.5, 0.9]}
STAGES: dict[str, Any] = {
    "fft": {"command": "fft"},
    "whole": {"command": "delta", "after": "fft"},
    "half": {"command": "mask-train", "after": "fft", "set": {"mask_train.method": "drop", "mask_train.ratio": 0.5}},
    "masked": {"command": "delta", "after": "half"},
    "small": {"command": "delta", "after": "fft", "set": {"delta.values": "int8"}, "sweep": SHARES},
    "applied": {"command": "apply", "after": "whole"},
    "results": {"command": "eval", "of": ["fft", "whole", "half", "masked", "small", "applied"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All runs by stage; those of `eval` by the evaluated stage with the prefix `eval `."""
    root = tmp_path_factory.mktemp("experiment") / "runs"
    recipe = make_recipe(workspace, stages=STAGES, eval={"generate": False})
    found = run_experiment(plan_experiment(recipe, "r", root), "r", root, Silence())
    return {("eval " if run.record.command == "eval" else "") + str(run.record.stage): run for run in found}


def loss(run: Run) -> float:
    return next(one.value for one in run.result(EvalResult).datasets[0].metrics if one.name == "loss")


@pytest.mark.slow
def test_a_delta_stage_changes_the_base_to_the_model_of_the_stage_before(runs: dict[str, Run]) -> None:
    whole = runs["whole"].result(DeltaResult)
    assert (whole.model, whole.state) == (runs["fft"].record.inputs["model"], "delta exact")
    assert loss(runs["eval whole"]) == loss(runs["eval fft"]) == loss(runs["eval applied"])
    assert loss(runs["eval masked"]) == loss(runs["eval half"]) != loss(runs["eval fft"])
    sizes = [runs[name].result(DeltaResult).file_bytes for name in ("whole", "small[ratio=0.5]", "small[ratio=0.9]")]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.slow
def test_the_report_compares_delta_files_with_the_fine_tuning(runs: dict[str, Run]) -> None:
    report = make_report(runs["fft"].folder.parent, Silence())
    states = [row.state for table in report.tables for row in table.rows]
    assert any("small[ratio=0.9]" in state for state in states)


@pytest.mark.slow
def test_finished_stages_are_recognised(runs: dict[str, Run], workspace: Path) -> None:
    recipe = make_recipe(workspace, stages=STAGES, eval={"generate": False})
    plan = plan_experiment(recipe, "r", runs["fft"].folder.parent)
    assert {planned.state for planned in plan} == {"done"}


def test_a_delta_stage_needs_a_base_and_a_whole_model(workspace: Path, tmp_path: Path) -> None:
    alone: dict[str, Any] = {"small": {"command": "delta"}}
    with pytest.raises(ConfigError) as caught:
        run_experiment(plan_experiment(make_recipe(workspace, stages=alone), "r", tmp_path), "r", tmp_path, Silence())
    assert "put it after an fft stage, or set delta.base" in str(caught.value)
    adapter: dict[str, Any] = {
        "lora": {"command": "fft", "set": {"fft.method": "lora"}},
        "small": {"command": "delta", "after": "lora"},
    }
    with pytest.raises(ConfigError) as caught:
        run_experiment(plan_experiment(make_recipe(workspace, stages=adapter), "r", tmp_path), "r", tmp_path, Silence())
    assert "delta needs a full model, but lora writes an adapter" in str(caught.value)
