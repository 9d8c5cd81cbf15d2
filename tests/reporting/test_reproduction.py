"""Runs the printed command and compares its result with that of the run it was printed for."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mftctl.errors import RunError
from mftctl.experiments.run_folder import Run, list_runs, load_run
from mftctl.experiments.run_record import RunRecord
from mftctl.reporting.reproduction import reproduction
from tests.cli.running import CommandLine

TRAINING = ("--max-steps", 4, "--val-steps", 2, "--batch-size", 4)
MEASURED_ANEW = ("peak_memory_bytes", "model", "mask", "output", "prefix_reuse")
"""Keys of a result that differ between two makings: memory, times and paths."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a name that must be quoted."""
    return tmp_path_factory.mktemp("it's a folder")


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(folder, monkeypatch, capsys)


def make(here: CommandLine, *arguments: object) -> Run:
    outcome = here(*arguments)
    assert outcome.code == 0, outcome.stderr
    return list_runs(here.folder / "runs")[0][-1]


def make_again(here: CommandLine, run: Run) -> Run:
    """The run of the printed command, which must be new."""
    program, *arguments = shlex.split(reproduction(run))
    assert program == "mftctl"
    again = make(here, *arguments)
    assert again.name > run.name
    assert again.record.command == run.record.command
    assert (again.record.inputs, result(again)) == (run.record.inputs, result(run))
    return again


def result(run: Run) -> dict[str, object]:
    return {key: value for key, value in run.record.result.items() if key not in MEASURED_ANEW}


def same_weights(one: str, other: str) -> bool:
    first, second = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_1_fft(here: CommandLine, workspace: Path) -> None:
    data = ("-d", f"{workspace / 'train.jsonl'}=40", "--val-data", workspace / "val.jsonl")
    run = make(here, "fft", "-m", workspace / "tiny", *data, *TRAINING, "--lr", "3e-3", "--seed", 3)
    again = make_again(here, run)
    assert same_weights(run.record.result["model"], again.record.result["model"])


@pytest.mark.slow
def test_2_probe_of_an_older_model_than_the_newest(here: CommandLine) -> None:
    model = load_run(here.folder / "runs" / "001-fft").record.result["model"]
    run = make(here, "probe", "-m", model, "--groups", 2, "--data-fraction", 0.5)
    make_again(here, run)


@pytest.mark.slow
def test_3_mask_train_with_the_layers_of_a_probe_that_has_been_repeated(here: CommandLine) -> None:
    model = load_run(here.folder / "runs" / "001-fft").record.result["model"]
    run = make(here, "mask-train", "-m", model, "--epochs", 1, "--ratio", 0.1)
    (here.folder / "mask.bits").rename(here.folder / "kept.bits")
    again = make_again(here, run)
    files = [here.folder / "mask.bits", *(item.folder / "mask.bits" for item in (run, again))]
    masks = [json.loads(here("mask", "diff", here.folder / "kept.bits", file, "--json").stdout) for file in files]
    assert [mask["tensors"]["all"]["jaccard"] for mask in masks] == [1.0, 1.0, 1.0]


@pytest.mark.slow
def test_4_an_existing_mask_is_not_replaced(here: CommandLine) -> None:
    run = load_run(here.folder / "runs" / "005-mask-train")
    before = (here.folder / "mask.bits").read_bytes()
    outcome = here(*shlex.split(reproduction(run))[1:])
    assert outcome.code == 2
    assert "A result already exists" in outcome.stderr
    assert (here.folder / "mask.bits").read_bytes() == before


@pytest.mark.slow
def test_5_apply_to_a_folder_and_into_the_run(here: CommandLine) -> None:
    masked = load_run(here.folder / "runs" / "005-mask-train").record.result
    into_run = make(here, "apply", masked["model"], masked["mask"])
    make_again(here, into_run)
    elsewhere = make(here, "apply", masked["model"], masked["mask"], "-o", "out put")
    (here.folder / "out put").rename(here.folder / "kept")
    make_again(here, elsewhere)
    assert same_weights(str(here.folder / "kept"), elsewhere.record.result["model"])
    assert same_weights(str(here.folder / "kept"), into_run.record.result["model"])


@pytest.mark.slow
def test_6_eval_of_a_model_under_a_mask_and_of_one_applied(here: CommandLine, workspace: Path) -> None:
    masked = load_run(here.folder / "runs" / "005-mask-train").record.result
    data = ("-d", workspace / "test.jsonl", "--limit", 7)
    run = make(here, "eval", masked["model"], "--mask", masked["mask"], *data)
    assert run.record.result["state"] == "MFT"
    again = make_again(here, run)
    assert (again.folder / "samples.jsonl").read_bytes() == (run.folder / "samples.jsonl").read_bytes()
    applied = load_run(here.folder / "runs" / "007-apply").record.result["model"]
    make_again(here, make(here, "eval", applied, *data, "--no-generate"))


@pytest.mark.slow
def test_7_drop_its_apply_and_its_eval(here: CommandLine, workspace: Path) -> None:
    model = load_run(here.folder / "runs" / "001-fft").record.result["model"]
    run = make(here, "mask-train", "-m", model, "--method", "drop", "--ratio", 0.3, "-o", "drop.bits")
    (here.folder / "drop.bits").unlink()
    make_again(here, run)
    applied = make(here, "apply", workspace / "tiny", here.folder / "drop.bits")
    assert applied.record.inputs["model"] == model
    again = make_again(here, applied)
    assert same_weights(applied.record.result["model"], again.record.result["model"])
    of_an_earlier_version = Run(applied.folder, replace(applied.record, result={}))
    assert reproduction(of_an_earlier_version) == reproduction(applied)
    make_again(here, make(here, "eval", model, "--mask", here.folder / "drop.bits", "-d", workspace / "test.jsonl"))


@pytest.mark.slow
def test_8_a_learned_delta_mask_and_its_apply(here: CommandLine, workspace: Path) -> None:
    model = load_run(here.folder / "runs" / "001-fft").record.result["model"]
    run = make(here, "mask-train", "-m", model, "--kind", "delta", "--max-steps", 2, "-o", "delta.bits")
    assert run.record.result["state"] == "MFT delta"
    (here.folder / "delta.bits").unlink()
    again = make_again(here, run)
    assert again.record.result["best_loss"] == run.record.result["best_loss"]
    applied = make(here, "apply", workspace / "tiny", here.folder / "delta.bits")
    assert (applied.record.inputs["model"], applied.record.result["base"]) == (model, str(workspace / "tiny"))
    assert same_weights(applied.record.result["model"], make_again(here, applied).record.result["model"])
    unfinished = Run(applied.folder, replace(applied.record, result={}))
    assert reproduction(unfinished) == reproduction(applied)


@pytest.mark.slow
def test_saved_outputs_are_scored_again_without_a_model(tmp_path: Path) -> None:
    record = RunRecord("eval", "finished", "", {"eval": {"predictions": "out.jsonl"}}, inputs={"model": "out.jsonl"})
    run = Run(tmp_path / "runs" / "001-eval", record)
    assert reproduction(run) == f"mftctl eval --recipe {run.folder / 'config.yaml'} --runs {tmp_path / 'runs'}"


@pytest.mark.slow
def test_mask_of_an_experiment_gets_a_separate_file_and_multi_gpu_runs_are_launched(tmp_path: Path) -> None:
    run = Run(tmp_path / "006-mask-train", RunRecord("mask-train", "finished", "", {}, processes=4))
    assert reproduction(run) == (
        f"torchrun --nproc-per-node 4 -m mftctl mask-train --recipe {run.folder / 'config.yaml'} "
        f"-o 006-mask-train.bits --runs {tmp_path}"
    )


@pytest.mark.parametrize(("weights", "option"), [(None, ""), ([1.5, -0.5], "--weights=1.5,-0.5 ")])
def test_an_average_names_its_checkpoints_and_weights(weights: list[float] | None, option: str, tmp_path: Path) -> None:
    inputs = {"model": "a", "checkpoints": ["a", "b c"], "weights": weights}
    run = Run(tmp_path / "001-average", RunRecord("average", "finished", "", {}, inputs=inputs, output="out"))
    assert reproduction(run) == f"mftctl average a 'b c' {option}-o out --runs {tmp_path}"


def test_an_average_without_its_checkpoints_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path / "001-average", RunRecord("average", "finished", "", {}, inputs={"model": "a"}))
    with pytest.raises(RunError, match="lacks its checkpoints"):
        reproduction(run)
