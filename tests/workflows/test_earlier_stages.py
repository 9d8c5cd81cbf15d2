"""Stages finished by earlier versions: `earlier_stages.json` holds what such a version planned for `STUDY`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mftctl.experiments.recipe_files import parse_recipe
from mftctl.workflows.run import plan_experiment, stage_runs

EARLIER: list[dict[str, Any]] = json.loads((Path(__file__).parent / "earlier_stages.json").read_text())
SHORT = {"max_steps": 3, "val_steps": 3, "batch_size": 4}
STUDY: dict[str, Any] = {
    "model": "quickstart",
    "data": "quickstart=500",
    "seed": 7,
    "fft": {**SHORT, "learning_rate": 1e-3},
    "mask_train": SHORT,
    "stages": {
        "gmt": {"command": "fft", "set": {"fft.method": "gmt"}},
        "probe": {"command": "probe", "after": "gmt", "set": {"mask_train.preset": "paper"}},
        "mft": {
            "command": "mask-train",
            "after": "gmt",
            "layers_from": "probe",
            "set": {"mask_train.keep": "best", "mask_train.start": "weights"},
        },
        "reference": {
            "command": "mask-train",
            "after": "gmt",
            "set": {
                "mask_train.preset": "reference",
                "mask_train.ranking": "absolute",
                "mask_train.layers": "all",
                "mask_train.benchmark_every": 2,
            },
        },
        "random": {
            "command": "mask-train",
            "after": "gmt",
            "set": {"mask_train.method": "random", "mask_train.layers": "all"},
        },
    },
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A runs folder with the finished stages."""
    for number, stage in enumerate(EARLIER, start=1):
        folder = tmp_path / f"{number:03d}-{stage['command']}"
        folder.mkdir()
        record = {**stage, "status": "finished", "started": "2026-01-01T00:00:00+00:00"}
        (folder / "run.json").write_text(json.dumps(record))
    return tmp_path


def test_stages_of_an_earlier_version_are_done(root: Path) -> None:
    plan = plan_experiment(parse_recipe(STUDY), "study", root)
    assert [(planned.job.name, planned.state, planned.why) for planned in plan] == [
        (name, "done", "") for name in ("gmt", "probe", "mft", "reference", "random")
    ]
    assert all(planned.digest != stage["digest"] for planned, stage in zip(plan, EARLIER, strict=True))


def test_a_change_is_reported_under_current_names(root: Path) -> None:
    changed = {**STUDY, "mask_train": {**SHORT, "val_steps": 1}}
    plan = {planned.job.name: planned for planned in plan_experiment(parse_recipe(changed), "study", root)}
    assert plan["gmt"].state == "done"
    assert (plan["random"].state, plan["random"].why) == (
        "changed",
        "since 005-mask-train: mask_train.val_steps 3 -> 1",
    )


def test_the_records_of_this_version_keep_their_digests(root: Path) -> None:
    today = {planned.job.label: planned for planned in plan_experiment(parse_recipe(STUDY), "study", root)}
    for path in root.glob("*/run.json"):
        record = json.loads(path.read_text())
        planned = today[record["stage"]]
        path.write_text(json.dumps({**record, "digest": planned.digest, "decides": planned.decides}))
    assert {run.record.digest for run in stage_runs(root)} == {planned.digest for planned in today.values()}
    assert {planned.state for planned in plan_experiment(parse_recipe(STUDY), "study", root)} == {"done"}


def test_a_run_without_a_stage_is_ignored(root: Path) -> None:
    path = root / "001-fft" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": None}))
    assert next(run.name for run in stage_runs(root)) == "002-probe"
