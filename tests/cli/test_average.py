"""`mftctl average` as typed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mftctl.experiments.run_folder import list_runs
from tests.cli.running import CommandLine
from tests.masking.built_checkpoints import raw_tensors, write_tuned
from tests.masking.combined_numpy import combined


@pytest.fixture
def here(mftctl: CommandLine, tiny_checkpoint: Path) -> CommandLine:
    """A folder with the checkpoints `a` and `b`."""
    shutil.copytree(tiny_checkpoint, mftctl.folder / "a")
    write_tuned(mftctl.folder / "a", mftctl.folder / "b")
    return mftctl


def expected(folder: Path, *weights: float) -> dict[str, bytes]:
    first, second = (raw_tensors(folder / name / "model.safetensors") for name in ("a", "b"))
    return {name: combined([first[name], second[name]], weights, "F32") for name in first}


def test_writes_the_average(here: CommandLine) -> None:
    outcome = here("average", "a", "b", "-o", "out", "--weights", "3,1")
    assert outcome.code == 0, outcome.stderr
    assert raw_tensors(here.folder / "out" / "model.safetensors") == expected(here.folder, 0.75, 0.25)
    assert "0.75 * a" in outcome.stdout
    assert "Next: mftctl eval" in outcome.stderr
    [run] = list_runs(here.folder / "runs")[0]
    assert (run.record.command, run.record.status) == ("average", "finished")


def test_without_an_output_the_run_has_the_model(here: CommandLine) -> None:
    document = json.loads(here("average", "a", "b", "--json").stdout)
    assert Path(document["model"]) == here.folder / "runs" / "001-average" / "model"
    assert (document["state"], document["weights"]) == ("averaged", [0.5, 0.5])
    found = raw_tensors(Path(document["model"]) / "model.safetensors")
    assert found == expected(here.folder, 0.5, 0.5)


def test_a_negative_weight_extrapolates(here: CommandLine) -> None:
    assert here("average", "a", "b", "-o", "out", "--weights", "-0.5,1.5").code == 0
    assert raw_tensors(here.folder / "out" / "model.safetensors") == expected(here.folder, -0.5, 1.5)


def test_an_existing_result_is_replaced_only_with_yes(here: CommandLine) -> None:
    assert here("average", "a", "b", "-o", "out").code == 0
    refused = here("average", "b", "a", "-o", "out")
    assert refused.code == 2
    assert "A result already exists" in refused.stderr
    assert here("average", "b", "a", "-o", "out", "--yes", "--weights", "1,0").code == 0
    found = raw_tensors(here.folder / "out" / "model.safetensors")
    assert found == raw_tensors(here.folder / "b" / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a"], "at least two checkpoints"),
        (["a", "b", "--weights", "1"], "one weight per checkpoint"),
        (["a", "b", "--weights", "1,-1"], "must not be 0"),
        (["a", "b", "--weights", "nan,1"], "cannot be used"),
        (["a", "b", "--weights", "1;2"], "numbers with commas"),
        (["a", "b", "-o", "a"], "is or contains an input model"),
    ],
)
def test_wrong_usage_is_refused_before_a_run_is_made(here: CommandLine, arguments: list[str], message: str) -> None:
    outcome = here("average", *arguments)
    assert outcome.code == 2
    assert message in " ".join(outcome.stderr.split())
    assert not (here.folder / "runs").exists()


def test_checkpoints_that_do_not_match_are_one_message(here: CommandLine) -> None:
    (here.folder / "b" / "chat_template.jinja").write_text("{{ messages }}")
    outcome = here("average", "a", "b", "-o", "out")
    assert outcome.code == 1
    assert "different chat templates" in outcome.stderr
    assert not (here.folder / "out").exists()
    [run] = list_runs(here.folder / "runs")[0]
    assert run.record.status == "failed"
