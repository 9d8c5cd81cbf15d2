"""Whole experiments: order, skipping, re-running stages affected by a change, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import ConfigError, Interrupted
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.results import FftResult
from mftctl.experiments.run_folder import Run, list_runs
from mftctl.progress import Listener, Progress, Silence
from mftctl.workflows.run import Planned, plan_experiment, run_experiment
from tests.reporting.run_folders import compare_runs
from tests.workflow_fixtures import Interrupter, make_recipe, make_workspace

STAGES: dict[str, Any] = {
    "pretrained": {"command": "eval"},
    "fft": {"command": "fft"},
    "probe": {"command": "probe", "after": "fft"},
    "random": {"command": "mask-train", "after": "fft", "layers_from": "probe", "set": {"mask_train.method": "random"}},
    "mft": {"command": "mask-train", "after": "fft", "layers_from": "probe"},
    "apply": {"command": "apply", "after": "mft"},
    "results": {"command": "eval", "of": ["fft", "random", "apply"]},
}


def experiment(workspace: Path, **changes: Any) -> Recipe:
    short = {"max_steps": 3, "val_steps": 3, "batch_size": 4}
    return make_recipe(
        workspace,
        **{
            "stages": STAGES,
            "fft": {**short, "learning_rate": 3e-3},
            "mask_train": short,
            "eval__generate": False,
            "controls": [],
            **changes,
        },
    )


def run_all(recipe: Recipe, root: Path, listener: Listener | None = None) -> list[Run]:
    return run_experiment(plan_experiment(recipe, "test", root), "test", root, listener or Silence())


@pytest.fixture(scope="module")
def own_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def finished(own_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experiment") / "runs"
    run_all(experiment(own_workspace, seeds=[0, 1]), root)
    return root


def names(root: Path) -> list[str]:
    return [run.name for run in list_runs(root)[0]]


@pytest.mark.slow
def test_runs_every_stage_for_every_seed(finished: Path) -> None:
    commands = ["eval", "fft", "probe", "mask-train", "mask-train", "apply", "eval", "eval", "eval"]
    runs = list_runs(finished)[0]
    assert [run.record.command for run in runs] == commands * 2
    assert [run.record.config["seed"] for run in runs] == [0] * 9 + [1] * 9
    assert all(run.record.status == "finished" for run in runs)


@pytest.mark.slow
def test_stages_build_on_each_other(finished: Path) -> None:
    by_name = {run.name: run.record for run in list_runs(finished)[0]}
    recommended = by_name["003-probe"].result["recommended_layers"]
    assert by_name["004-mask-train"].result["layers"] == by_name["005-mask-train"].result["layers"] == recommended
    assert by_name["005-mask-train"].inputs["model"] == by_name["002-fft"].result["model"]
    assert by_name["009-eval"].inputs["parents"] == ["002-fft", "005-mask-train", "006-apply"]
    assert [by_name[name].result["state"] for name in ("001-eval", "007-eval", "008-eval", "009-eval")] == [
        "pre-trained",
        "FFT",
        "random mask",
        "MFT",
    ]


def test_the_report_averages_over_seeds(finished: Path) -> None:
    (table,), problems = compare_runs(finished)
    assert not problems
    assert [row.state for row in table.rows] == ["pre-trained", "FFT", "random mask", "MFT"]
    assert all(row.seeds == (0, 1) for row in table.rows)
    assert all(row.change is not None for row in table.rows if row.state != "FFT")


def test_a_second_time_nothing_is_done_again(finished: Path, own_workspace: Path) -> None:
    before = names(finished)
    runs = run_all(experiment(own_workspace, seeds=[0, 1]), finished)
    assert names(finished) == before
    assert [run.name for run in runs] == before


@pytest.mark.slow
def test_of_the_controls_the_one_with_the_lowest_validation_loss_is_measured(
    own_workspace: Path, tmp_path: Path
) -> None:
    stages = {"fft": STAGES["fft"], "mft": {"command": "mask-train", "after": "fft"}}
    recipe = experiment(
        own_workspace,
        stages={**stages, "results": {"command": "eval", "of": ["fft", "mft"]}},
        controls=["averaged", "interpolated"],
    )
    run_all(recipe, tmp_path / "runs")
    runs = list_runs(tmp_path / "runs")[0]
    commands = [run.record.command for run in runs]
    assert commands == ["fft", "mask-train", "eval", "eval", "fft", "fft", "interpolate", "eval", "eval"]
    rates, between, (measured, last) = runs[4:6], runs[6], runs[7:]
    assert len({run.record.config["fft"]["learning_rate"] for run in rates}) == 2
    best = min(rates, key=lambda run: run.result(FftResult).best_loss)
    assert measured.record.stage == "fft averaged"
    assert measured.record.inputs["model"] == best.result(FftResult).model
    assert {run.name for run in rates} & set(measured.record.inputs["parents"]) == {best.name}
    assert (last.record.stage, last.record.result["state"]) == ("fft interpolated", "interpolated")
    assert between.name in last.record.inputs["parents"]
    (table,), problems = compare_runs(tmp_path / "runs")
    assert not problems
    [mask] = [row for row in table.rows if row.state == "MFT"]
    assert mask.against_control is not None
    run_all(recipe, tmp_path / "runs")
    assert len(list_runs(tmp_path / "runs")[0]) == len(runs)


@pytest.mark.slow
def test_a_stop_in_the_last_step_of_a_job_ends_the_experiment_after_it(own_workspace: Path, tmp_path: Path) -> None:
    stages = {"fft": STAGES["fft"], "mft": {"command": "mask-train", "after": "fft"}}
    recipe, root = experiment(own_workspace, stages=stages), tmp_path / "runs"
    with pytest.raises(Interrupted, match="Stopped after Seed 0, fft") as caught:
        run_all(recipe, root, Interrupter(3))
    assert caught.value.hint == "the same mftctl run command continues"
    assert [(run.record.command, run.record.status) for run in list_runs(root)[0]] == [("fft", "finished")]
    assert [run.record.command for run in run_all(recipe, root)] == ["fft", "mask-train"]
    # With nothing left to do, there is nothing to stop.
    run_all(recipe, tmp_path / "other", StopsInLastJob(3))


class StopsInLastJob(Interrupter):
    def progress(self, state: Progress) -> None:
        if any("mft: new" in note for note in self.notes):
            super().progress(state)


@pytest.mark.slow
def test_a_change_runs_only_what_depends_on_it(own_workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run_all(experiment(own_workspace), root)
    before = names(root)
    changed = {name: {**stage} for name, stage in STAGES.items()}
    changed["mft"]["set"] = {"mask_train.ratio": 0.3}
    run_all(experiment(own_workspace, stages=changed), root)
    assert [name.partition("-")[2] for name in names(root)[len(before) :]] == ["mask-train", "apply", "eval"]


@pytest.mark.slow
def test_changed_data_is_noticed(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    stages = {"pretrained": STAGES["pretrained"]}
    run_all(experiment(workspace, stages=stages), tmp_path / "runs")
    with (workspace / "test.jsonl").open("a") as stream:
        stream.write('{"question": "1+1?", "answer": "#### 2"}\n')
    run_all(experiment(workspace, stages=stages), tmp_path / "runs")
    assert names(tmp_path / "runs") == ["001-eval", "002-eval"]


@pytest.mark.slow
def test_changed_problems_of_a_benchmark_are_noticed(tmp_path: Path) -> None:
    workspace, problems = make_workspace(tmp_path / "workspace"), tmp_path / "gsm8k.jsonl"
    measured = {"tasks": ["gsm8k_0shot"], "task_data": {"gsm8k_0shot": str(problems)}, "max_new_tokens": 2}
    recipe = make_recipe(workspace, stages={"pretrained": STAGES["pretrained"]}, test_data=[], eval=measured)
    for answer in (2, 2, 3):
        problems.write_text(f'{{"question": "1+1?", "answer": "#### {answer}"}}\n')
        run_all(recipe, tmp_path / "runs")
    assert names(tmp_path / "runs") == ["001-eval", "002-eval"]


@pytest.mark.slow
def test_an_interrupted_experiment_resumes_where_it_stopped(
    finished: Path, own_workspace: Path, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    with pytest.raises(Interrupted) as caught:
        run_all(experiment(own_workspace), root, Interrupter(2))
    assert caught.value.hint == "the same mftctl run command resumes it"
    assert [run.record.status for run in list_runs(root)[0]] == ["finished", "interrupted"]
    run_all(experiment(own_workspace), root)
    resumed = {run.name: run.record.result for run in list_runs(root)[0]}
    expected = {run.name: run.record.result for run in list_runs(finished)[0]}
    assert list(resumed) == list(expected)[:9]
    for name in ("005-mask-train", "009-eval"):
        for key in ("best_loss", "removed", "datasets"):
            assert resumed[name].get(key) == expected[name].get(key), (name, key)


@pytest.mark.slow
def test_a_missing_output_is_recreated(own_workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    stages = {"fft": STAGES["fft"]}
    run_all(experiment(own_workspace, stages=stages), root)
    (root / "001-fft" / "model").rename(root / "elsewhere")
    run_all(experiment(own_workspace, stages=stages), root)
    assert names(root) == ["001-fft", "002-fft"]


def test_a_recipe_without_stages(own_workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stages"):
        run_all(experiment(own_workspace, stages={}), tmp_path)


def test_a_recipe_without_a_model(own_workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not name a model"):
        run_all(experiment(own_workspace, model=None), tmp_path)


@pytest.mark.slow
def test_a_plan_states_what_would_be_done_and_why(own_workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    stages = {name: STAGES[name] for name in ("fft", "random")} | {"random": {**STAGES["random"], "layers_from": None}}
    assert [planned.state for planned in plan_experiment(experiment(own_workspace, stages=stages), "test", root)] == [
        "new",
        "new",
    ]
    run_all(experiment(own_workspace, stages=stages), root)
    again = plan_experiment(experiment(own_workspace, stages=stages), "test", root)
    assert [(planned.state, planned.run and planned.run.name) for planned in again] == [
        ("done", "001-fft"),
        ("done", "002-mask-train"),
    ]
    slower = {"max_steps": 3, "val_steps": 3, "batch_size": 4, "learning_rate": 1e-3}
    changed = plan_experiment(experiment(own_workspace, stages=stages, fft=slower), "test", root)
    assert [planned.state for planned in changed] == ["changed", "changed"]
    assert changed[0].why == "since 001-fft: fft.learning_rate 0.003 -> 0.001"
    assert changed[1].why == "since 002-mask-train: the stage before changed"


@pytest.mark.slow
def test_changed_weights_of_the_model_are_noticed(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    stages = {"fft": STAGES["fft"]}
    run_all(experiment(workspace, stages=stages), tmp_path / "runs")
    weights = workspace / "tiny" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    (planned,) = plan_experiment(experiment(workspace, stages=stages), "test", tmp_path / "runs")
    assert (planned.state, planned.why) == ("changed", "since 001-fft: the model's weights changed")


@pytest.mark.slow
def test_a_failed_task_resumes_where_it_stopped(own_workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    stages = {"fft": STAGES["fft"]}
    with pytest.raises(Interrupted):
        run_all(experiment(own_workspace, stages=stages), root, Interrupter(2))
    (run,) = list_runs(root)[0]
    run.update(status="failed", error="the disk was full")
    (planned,) = plan_experiment(experiment(own_workspace, stages=stages), "test", root)
    assert (planned.state, planned.run and planned.run.name) == ("resumed", "001-fft")
    run_all(experiment(own_workspace, stages=stages), root)
    assert names(root) == ["001-fft"]


@pytest.mark.slow
def test_status_changes_are_reported(own_workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    seen: list[tuple[str, str]] = []
    plan = plan_experiment(experiment(own_workspace, stages={"fft": STAGES["fft"]}), "test", root)

    def remember(planned: Planned) -> None:
        seen.append((planned.job.name, planned.state))

    run_experiment(plan, "test", root, Silence(), remember)
    assert seen == [("fft", "running"), ("fft", "done")]
    interrupted = plan_experiment(experiment(own_workspace, stages={"fft": STAGES["fft"]}, seed=1), "test", root)
    with pytest.raises(Interrupted):
        run_experiment(interrupted, "test", root, Interrupter(2), remember)
    assert seen[2:] == [("fft", "running"), ("fft", "failed")]


@pytest.mark.slow
def test_a_sweep_is_measured_value_by_value(own_workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    stages = {
        "fft": STAGES["fft"],
        "random": {
            "command": "mask-train",
            "after": "fft",
            "set": {"mask_train.method": "random", "mask_train.layers": "all"},
            "sweep": {"mask_train.ratio": [0.1, 0.5]},
        },
        "results": {"command": "eval", "of": ["fft", "random"]},
    }
    run_all(experiment(own_workspace, stages=stages), root)
    masks = [run.record for run in list_runs(root)[0] if run.record.command == "mask-train"]
    assert [record.result["ratio"] for record in masks] == pytest.approx([0.1, 0.5], abs=1e-3)
    (table,), problems = compare_runs(root)
    assert not problems
    assert [row.state for row in table.rows] == [
        "FFT",
        "random mask (random[ratio=0.1])",
        "random mask (random[ratio=0.5])",
    ]


def test_what_decides_an_interpolation(workspace: Path, tmp_path: Path) -> None:
    def digest(**settings: Any) -> str:
        between = {"command": "interpolate", "after": "fft", "set": settings}
        recipe = experiment(workspace, stages={"fft": {"command": "fft"}, "between": between})
        return plan_experiment(recipe, "test", tmp_path)[1].digest

    plain = digest()
    assert digest(**{"interpolate.shares": [0.5]}) != plain
    assert digest(**{"fft.max_length_tokens": 64}) != plain
    assert digest(**{"fft.learning_rate": 0.5}) == digest(**{"mask_train.max_steps": 9}) == plain
