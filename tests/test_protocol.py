"""Whole experiments: order, skipping, re-running what a change touches, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mftctl.config import Recipe
from mftctl.errors import ConfigError, Interrupted
from mftctl.progress import Silence
from mftctl.protocol import run_experiment
from mftctl.reporting.comparison import compare_runs
from mftctl.runs import list_runs
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
    short = {"max_steps": 3, "eval_steps": 3, "batch_size": 4}
    return make_recipe(
        workspace,
        **{
            "stages": STAGES,
            "fft": {**short, "learning_rate": 3e-3},
            "mask_train": short,
            "eval__generate": False,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def own_workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def finished(own_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experiment") / "runs"
    run_experiment(experiment(own_workspace, seeds=[0, 1]), "test", root, Silence())
    return root


def names(root: Path) -> list[str]:
    return [run.name for run in list_runs(root)[0]]


def test_runs_every_stage_for_every_seed(finished: Path) -> None:
    commands = ["eval", "fft", "probe", "mask-train", "mask-train", "apply", "eval", "eval", "eval"]
    runs = list_runs(finished)[0]
    assert [run.record.command for run in runs] == commands * 2
    assert [run.record.config["seed"] for run in runs] == [0] * 9 + [1] * 9
    assert all(run.record.status == "finished" for run in runs)


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
    runs = run_experiment(experiment(own_workspace, seeds=[0, 1]), "test", finished, Silence())
    assert names(finished) == before
    assert [run.name for run in runs] == before


def test_a_change_runs_only_what_depends_on_it(own_workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run_experiment(experiment(own_workspace), "test", root, Silence())
    before = names(root)
    changed = {name: {**stage} for name, stage in STAGES.items()}
    changed["mft"]["set"] = {"mask_train.ratio": 0.3}
    run_experiment(experiment(own_workspace, stages=changed), "test", root, Silence())
    assert [name.partition("-")[2] for name in names(root)[len(before) :]] == ["mask-train", "apply", "eval"]


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace")
    stages = {"pretrained": STAGES["pretrained"]}
    run_experiment(experiment(workspace, stages=stages), "test", tmp_path / "runs", Silence())
    with (workspace / "test.jsonl").open("a") as stream:
        stream.write('{"question": "1+1?", "answer": "#### 2"}\n')
    run_experiment(experiment(workspace, stages=stages), "test", tmp_path / "runs", Silence())
    assert names(tmp_path / "runs") == ["001-eval", "002-eval"]


def test_an_interrupted_experiment_goes_on_where_it_was(finished: Path, own_workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with pytest.raises(Interrupted):
        run_experiment(experiment(own_workspace), "test", root, Interrupter(2))
    assert [run.record.status for run in list_runs(root)[0]] == ["finished", "interrupted"]
    run_experiment(experiment(own_workspace), "test", root, Silence())
    resumed = {run.name: run.record.result for run in list_runs(root)[0]}
    expected = {run.name: run.record.result for run in list_runs(finished)[0]}
    assert list(resumed) == list(expected)[:9]
    for name in ("005-mask-train", "009-eval"):
        for key in ("best_loss", "removed", "datasets"):
            assert resumed[name].get(key) == expected[name].get(key), (name, key)


def test_a_lost_output_is_made_again(own_workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    stages = {"fft": STAGES["fft"]}
    run_experiment(experiment(own_workspace, stages=stages), "test", root, Silence())
    (root / "001-fft" / "model").rename(root / "elsewhere")
    run_experiment(experiment(own_workspace, stages=stages), "test", root, Silence())
    assert names(root) == ["001-fft", "002-fft"]


def test_a_recipe_without_stages(own_workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no stages"):
        run_experiment(experiment(own_workspace, stages={}), "test", tmp_path, Silence())


def test_a_recipe_without_a_model(own_workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no model"):
        run_experiment(experiment(own_workspace, model=None), "test", tmp_path, Silence())
