"""`--track` on the command line: what every command sends, and that nothing else changes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mftctl.errors import Interrupted
from mftctl.experiments.recording import recorded
from mftctl.experiments.run_folder import load_run
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.tracking.names import DISTRIBUTIONS
from mftctl.experiments.tracking.values import line_values
from mftctl.workflows.multi_process.dispatch import work
from mftctl.workflows.multi_process.process_count import Launch
from tests.cli.running import CommandLine
from tests.experiments.tracking.fake_trackers import FakeLibraries, FakeTracker
from tests.workflow_fixtures import Interrupter, make_recipe, open_run

TIMES = ("step_seconds", "train_runtime", "train_tokens_per_second")
SHORT = ("--max-steps", "4", "--val-steps", "2", "--batch-size", "4")


def on_the_workspace(workspace: Path) -> list[object]:
    data, validation = workspace / "train.jsonl", workspace / "val.jsonl"
    return ["-m", workspace / "tiny", "-d", data, "--val-data", validation]


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The lines that a run logged, without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def sent_by(run: Path) -> list[tuple[int, dict[str, float]]]:
    """What a tracker gets of a run, without times."""
    return [(line["step"], line_values(line)) for line in lines_of(run)]


def received(tracker: FakeTracker, training: str = "") -> list[tuple[int, dict[str, float]]]:
    """What a tracker received of a training, without times."""
    return [
        (step, {name: value for name, value in values.items() if name not in TIMES})
        for step, values, name in tracker.lines
        if name == training
    ]


def test_a_tracked_training_is_the_same_even_if_a_tracker_fails(
    mftctl: CommandLine, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["fft", *on_the_workspace(workspace), *SHORT, "--average", "ema"]
    plain = mftctl(*options, "--runs", "plain")
    libraries = FakeLibraries(monkeypatch)
    libraries.options = {"fails_at": 3}
    failing = mftctl(*options, "--runs", "failing", "--track", "wandb")
    libraries.options = {}
    tracked = mftctl(*options, "--runs", "tracked", "--track", "mlflow", "--track", "trackio")
    assert (plain.code, failing.code, tracked.code) == (0, 0, 0), failing.stderr + tracked.stderr
    runs = [mftctl.folder / name / "001-fft" for name in ("plain", "failing", "tracked")]
    models = [(run / "model" / "model.safetensors").read_bytes() for run in runs]
    assert models[0] == models[1] == models[2]
    assert lines_of(runs[0]) == lines_of(runs[1]) == lines_of(runs[2])
    assert failing.stderr.count("--track wandb") == 1
    for name in ("mlflow", "trackio"):
        (tracker,) = libraries.opened[name]
        assert received(tracker) == sent_by(runs[2])
        ((status, figures),) = tracker.closed
        assert status is RunStatus.FINISHED
        assert figures["result/best_loss"] == load_run(runs[2]).record.result["best_loss"]


def test_a_stopped_and_resumed_run_is_tracked_as_one(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = FakeLibraries(monkeypatch)
    recipe = make_recipe(workspace, track=["wandb"], fft__keep="last")
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted), recorded(run):
        work(recipe, source, run, Interrupter(step=6), Launch())
    first = libraries.opened["wandb"][0]
    assert [status for status, _ in first.closed] == [RunStatus.INTERRUPTED]
    run.go_on()
    with recorded(run):
        run.finish(work(recipe, source, run, Interrupter(step=-1), Launch(), resume=True))
    second = libraries.opened["wandb"][1]
    assert second.known == "wandb-id"
    assert received(first) + received(second) == sent_by(run.folder)
    assert second.closed[0][0] is RunStatus.FINISHED


def test_mask_training_sends_flips_and_shares_by_layer(
    mftctl: CommandLine, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = FakeLibraries(monkeypatch)
    outcome = mftctl("mask-train", *on_the_workspace(workspace), *SHORT, "--layers", "1-2", "--track", "wandb")
    assert outcome.code == 0, outcome.stderr
    (tracker,) = libraries.opened["wandb"]
    names = {name for _, values, _ in tracker.lines for name in values}
    assert {"loss", "learning_rate", "eval_loss", "removed", "restored", "promised", "measured"} <= names
    figures = tracker.closed[0][1]
    assert {"result/layer_ratios/1", "result/layer_ratios/2", "result/best_loss", "result/flips/turned"} <= set(figures)
    assert tracker.run.config["mask_train"]["layers"] == "1-2"
    assert (tracker.run.project, tracker.run.name) == ("mftctl", "001-mask-train")


def test_a_probe_sends_each_group(mftctl: CommandLine, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = FakeLibraries(monkeypatch)
    options = ["--set", "mask_train.max_steps=2", "--set", "mask_train.batch_size=4", "--groups", "2"]
    outcome = mftctl("probe", *on_the_workspace(workspace), *options, "--track", "tensorboard")
    assert outcome.code == 0, outcome.stderr
    (tracker,) = libraries.opened["tensorboard"]
    for layers in ("0-1", "2-3"):
        folder = mftctl.folder / "runs" / "001-probe" / "groups" / layers
        assert received(tracker, f"layers {layers}") == sent_by(folder)
        assert f"result/groups/{layers}/change" in tracker.closed[0][1]


@pytest.mark.slow
def test_each_stage_of_an_experiment_is_a_run_of_its_own(
    mftctl: CommandLine, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = FakeLibraries(monkeypatch, missing=("mlflow",))
    short = {"max_steps": 2, "val_steps": 2, "batch_size": 4, "benchmark_every": 2}
    document = {
        "name": "study",
        "model": str(workspace / "tiny"),
        "data": str(workspace / "train.jsonl"),
        "val_data": str(workspace / "val.jsonl"),
        "test_data": str(workspace / "test.jsonl"),
        "fft": {**short, "learning_rate": 3e-3},
        "eval": {"generate": False},
        "track": ["wandb", "mlflow"],
        "stages": {"fft": {"command": "fft"}, "results": {"command": "eval", "of": ["fft"]}},
        "seeds": [0, 1],
    }
    (mftctl.folder / "recipe.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    outcome = mftctl("run", "recipe.yaml")
    assert outcome.code == 0, outcome.stderr
    shown = [(tracker.run.project, tracker.run.name) for tracker in libraries.opened["wandb"]]
    assert shown == [("study", f"fft {command} seed {seed}") for seed in (0, 1) for command in ("fft", "eval")]
    fft, evaluation = libraries.opened["wandb"][:2]
    on_the_way = [values for _, values, _ in fft.lines if "test.jsonl/loss" in values]
    assert len(on_the_way) == 2
    assert evaluation.closed[0][1]["test.jsonl/loss"] == pytest.approx(on_the_way[-1]["test.jsonl/loss"], rel=1e-5)
    assert outcome.stderr.count("--track mlflow: it is not installed") == 1
    again = mftctl("run", "recipe.yaml", "--track", "none")
    assert again.code == 0, again.stderr
    assert again.stderr.count("already done") == 4


def test_a_tracker_that_is_not_installed_is_one_line_before_training(
    mftctl: CommandLine, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries = FakeLibraries(monkeypatch, missing=("trackio",))
    outcome = mftctl("fft", *on_the_workspace(workspace), *SHORT, "--track", "trackio")
    assert outcome.code == 0, outcome.stderr
    warning = "Warning: --track trackio: it is not installed, so nothing is sent to it; pip install 'mftctl[trackio]'\n"
    assert outcome.stderr.count("trackio") == 2
    assert outcome.stderr.index(warning) < outcome.stderr.index("training 1/4")
    assert libraries.opened == {}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--track", "tensorbord"], "'wandb', 'tensorboard', 'trackio', 'mlflow' or 'none'"),
        (["--track", "wandb", "--track", "wandb"], "has one twice"),
        (["--track", "none", "--track", "wandb"], "track is none or the names of trackers"),
    ],
)
def test_a_choice_that_cannot_be_meant(mftctl: CommandLine, workspace: Path, options: list[str], told: str) -> None:
    outcome = mftctl("fft", *on_the_workspace(workspace), *options)
    assert outcome.code == 2
    assert told in " ".join(outcome.stderr.split())
    assert not (mftctl.folder / "runs").exists()


def test_env_lists_the_trackers(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeLibraries(monkeypatch, missing=("trackio", "mlflow"))
    facts = json.loads(mftctl("env", "--json").stdout)
    assert facts["trackers"] == "wandb 1.0, tensorboard 1.0, trackio not installed, mlflow not installed"


LOADED = """
import sys
from mftctl.cli.app import main
try:
    main()
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules} & {"wandb", "tensorboard", "trackio", "mlflow"}))
"""


def in_a_process(folder: Path, *arguments: object) -> tuple[dict[str, Any], set[str]]:
    """The JSON result of a command, and the trackers that it has imported."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *map(str, arguments), "--json"],
        cwd=folder,
        env={
            **environment,
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(folder),
            "TRACKIO_DIR": str(folder / "trackio"),
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    result, modules = done.stdout.rsplit("\n", 2)[:2]
    return json.loads(result), set(modules.split())


@pytest.mark.slow
def test_the_real_trackers_change_nothing_and_are_imported_only_when_wanted(workspace: Path, tmp_path: Path) -> None:
    installed = [name for name in DISTRIBUTIONS if importlib.util.find_spec(name) is not None]
    if not installed:
        pytest.skip("needs pip install 'mftctl[tracking]', or one of its trackers")
    options = ["fft", *on_the_workspace(workspace), *SHORT]
    plain, modules = in_a_process(tmp_path, *options, "--runs", "plain")
    assert modules <= {"mlflow"}  # which deepspeed imports
    wanted = [word for name in installed for word in ("--track", name)]
    tracked, modules = in_a_process(tmp_path, *options, "--runs", "tracked", *wanted)
    assert modules >= set(installed)
    assert tracked["best_loss"] == plain["best_loss"]  # of a result that trackers have not printed into
    runs = [tmp_path / name / "001-fft" for name in ("plain", "tracked")]
    models = [(run / "model" / "model.safetensors").read_bytes() for run in runs]
    assert models[0] == models[1]
    assert lines_of(runs[0]) == lines_of(runs[1])
    for name in installed:
        state = json.loads((runs[1] / "tracking" / f"{name}.json").read_text())
        assert state["sent"] == {"": len(lines_of(runs[1]))}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs pip install 'mftctl[tensorboard]'")
@pytest.mark.usefixtures("forked_workers")
def test_only_the_first_of_several_processes_tracks(mftctl: CommandLine, workspace: Path) -> None:
    options = ["fft", *on_the_workspace(workspace), *SHORT, "--processes", "2"]
    outcome = mftctl(*options, "--track", "tensorboard")
    assert outcome.code == 0, outcome.stderr
    run = mftctl.folder / "runs" / "001-fft"
    assert len(list((run / "tensorboard").glob("events.out.tfevents.*"))) == 1
    assert json.loads((run / "tracking" / "tensorboard.json").read_text())["sent"] == {"": len(lines_of(run))}
    assert outcome.stderr.count("Tracking: tensorboard") == 1
