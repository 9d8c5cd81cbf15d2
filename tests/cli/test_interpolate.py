"""`mftctl interpolate` as typed, after a fine-tuning and as a stage, and the commands that follow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from mftctl.experiments.run_folder import list_runs, load_run
from mftctl.reporting.reproduction import reproduction
from tests.cli.running import CommandLine

STEPS = ("--max-steps", 4, "--val-steps", 2, "--batch-size", 4, "--lr", "3e-3")


@pytest.mark.slow
def test_1_everything_comes_from_the_latest_fft_run(here: CommandLine, workspace: Path) -> None:
    data = ("-d", workspace / "train.jsonl", "--val-data", workspace / "val.jsonl")
    assert here("fft", "-m", workspace / "tiny", *data, *STEPS).code == 0
    outcome = here("interpolate", "--shares", "0.5,1", "--json")
    assert outcome.code == 0, outcome.stderr
    assert "from 001-fft" in outcome.stderr
    document = json.loads(outcome.stdout)
    tuned, run = (load_run(here.folder / "runs" / name) for name in ("001-fft", "002-interpolate"))
    assert document["base"] == str(workspace / "tiny")
    assert [entry["share"] for entry in document["losses"]] == [0.5, 1.0]
    assert document["losses"][1]["loss"] == pytest.approx(tuned.record.result["best_loss"], abs=1e-6)
    assert run.record.inputs["digests"] == tuned.record.inputs["digests"]
    assert (here.folder / "runs" / "002-interpolate" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_2_eval_measures_it_with_its_origins(here: CommandLine, workspace: Path) -> None:
    outcome = here("eval", "-d", workspace / "test.jsonl", "--no-generate", "--json")
    assert outcome.code == 0, outcome.stderr
    states = [item["state"] for item in json.loads(outcome.stdout)["evaluations"]]
    assert states == ["pre-trained", "FFT", "interpolated"]


@pytest.mark.slow
def test_3_an_average_of_both_models_is_measured_too(here: CommandLine, workspace: Path) -> None:
    runs = here.folder / "runs"
    assert here("average", runs / "001-fft/model", runs / "002-interpolate/model").code == 0
    outcome = here("eval", "-d", workspace / "test.jsonl", "--no-generate", "--json")
    states = [item["state"] for item in json.loads(outcome.stdout)["evaluations"]]
    assert states == ["pre-trained", "FFT", "interpolated", "averaged"]
    averaged = next(run for run in list_runs(runs)[0] if run.record.command == "average")
    assert averaged.record.inputs["parents"] == ["001-fft", "002-interpolate"]


@pytest.mark.slow
def test_4_a_mask_can_be_learned_on_it(here: CommandLine) -> None:
    model = here.folder / "runs" / "002-interpolate" / "model"
    outcome = here("mask-train", "-m", model, "--layers", "1", "--max-steps", 2, "--val-steps", 1, "--json")
    assert outcome.code == 0, outcome.stderr
    record = load_run(Path(json.loads(outcome.stdout)["run"])).record
    assert record.inputs["parents"] == ["001-fft", "002-interpolate"]
    assert record.inputs["state"] == "interpolated"


@pytest.mark.slow
def test_5_the_report_has_all_states_and_how_to_make_them(here: CommandLine) -> None:
    outcome = here("report", "--json")
    assert outcome.code == 0, outcome.stderr
    document = json.loads(outcome.stdout)
    assert document["problems"] == []
    states = {row["state"] for table in document["tables"] for row in table["rows"]}
    assert states == {"pre-trained", "FFT", "interpolated", "averaged"}


@pytest.mark.slow
def test_6_the_printed_command_makes_the_same_model_again(here: CommandLine) -> None:
    import shlex

    for run in list_runs(here.folder / "runs")[0]:
        if run.record.command in ("interpolate", "average"):
            outcome = here(*shlex.split(reproduction(run))[1:], "--json")
            assert outcome.code == 0, outcome.stderr
            again = Path(json.loads(outcome.stdout)["model"])
            assert again != Path(run.record.result["model"])
            for file in Path(run.record.result["model"]).glob("*.safetensors"):
                assert (again / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_as_a_stage_of_a_recipe(mftctl: CommandLine, workspace: Path) -> None:
    recipe = {
        "model": str(workspace / "tiny"),
        "data": str(workspace / "train.jsonl"),
        "val_data": str(workspace / "val.jsonl"),
        "test_data": str(workspace / "test.jsonl"),
        "fft": {"max_steps": 2, "val_steps": 1, "batch_size": 4, "learning_rate": 3e-3},
        "interpolate": {"shares": [0.5, 1]},
        "eval": {"generate": False},
        "stages": {
            "fft": {"command": "fft"},
            "between": {"command": "interpolate", "after": "fft"},
            "results": {"command": "eval", "of": ["fft", "between"]},
        },
    }
    (mftctl.folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert mftctl("validate", "recipe.yaml").code == 0
    assert mftctl("run", "recipe.yaml").code == 0
    names = ["001-fft", "002-interpolate", "003-eval", "004-eval"]
    assert [run.name for run in list_runs(mftctl.folder / "runs")[0]] == names
    again = mftctl("run", "recipe.yaml")
    assert "between: already done in 002-interpolate" in again.stderr
    changed = mftctl("run", "recipe.yaml", "--set", "interpolate.shares=[0.75,1]", "--dry-run")
    assert "interpolate.shares" in changed.stdout + changed.stderr


def test_without_a_base_it_is_one_message(mftctl: CommandLine, workspace: Path) -> None:
    outcome = mftctl("interpolate", "-m", workspace / "tiny", "-d", workspace / "train.jsonl")
    assert outcome.code == 2
    assert "needs the model before fine-tuning" in outcome.stderr
    assert "--base MODEL" in outcome.stderr


def test_without_data_it_names_the_option(mftctl: CommandLine, workspace: Path) -> None:
    outcome = mftctl("interpolate", "-m", workspace / "tiny", "--base", workspace / "tiny")
    assert outcome.code == 2
    assert "--data" in outcome.stderr


@pytest.mark.parametrize("shares", ["1,1", "x", "nan"])
def test_shares_must_be_different_finite_numbers(mftctl: CommandLine, workspace: Path, shares: str) -> None:
    model = workspace / "tiny"
    assert mftctl("interpolate", "-m", model, "-d", workspace / "train.jsonl", "--shares", shares).code == 2
    assert not (mftctl.folder / "runs").exists()
