"""Inputs as they are stored and read back, among them those of format version 1."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from mftctl.cli.resumption import source_of_resumed
from mftctl.errors import RunError
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.run_contents import first_fault
from mftctl.experiments.run_folder import Run, create_run, list_runs
from mftctl.experiments.run_inputs import (
    AppliedMask,
    Corner,
    Digests,
    EvaluationData,
    KnownData,
    Lineage,
    MeasuredSurface,
    RunInputs,
    Source,
    StartingState,
    SurfaceInputs,
    SurfaceSize,
    TrainingData,
    TrainRecords,
)
from mftctl.experiments.value_types import Part

FOLDERS = Path(__file__).parent / "run_folders_v1"
RUNS = list_runs(FOLDERS)[0]
DATA: dict[str, type[Part]] = {"eval": EvaluationData, "apply": Part}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_inputs_of_version_1_are_read_typed_and_written_as_they_were(run: Run) -> None:
    source, data = run.inputs(Source), run.inputs(DATA.get(run.record.command, TrainingData))
    written = {**source.document(), **data.document()}
    assert list(written.items()) == list(run.record.inputs.items())
    assert source_of_resumed(run).as_inputs() | {"base": source.base} == {"base": None} | source.document()
    known = run.inputs(RunInputs)
    assert (known.model, known.mask, known.parents) == (source.model, source.mask, source.parents)
    if isinstance(data, TrainingData):
        assert known.of_part("train") == (data.digests.train, data.train_records)
        assert known.of_part("validation") == (data.digests.validation, data.validation_records)
        assert (known.chat_template, known.fft_learning_rate) == (data.chat_template, data.fft_learning_rate)


def test_an_empty_record_has_no_known_input() -> None:
    assert RunInputs.read({}).document() == {}
    assert RunInputs.read({"unheard of": 1}).of_part("train") == (None, None)


@pytest.mark.parametrize(
    ("kind", "key", "inputs"),
    [
        (Lineage, "parents", {}),
        (Lineage, "origin", {"parents": []}),
        (StartingState, "state", {"model": "m"}),
        (AppliedMask, "mask", {"model": "m"}),
        (Source, "mask", {"model": "m", "state": "FFT", "parents": [], "origin": "m"}),
        (TrainRecords, "train_records", {}),
        (KnownData, "digests", {"train_records": 1}),
        (SurfaceSize, "records", {"points": 7}),
        (MeasuredSurface, "corners", {"points": 7}),
    ],
)
def test_a_missing_input_is_named(tmp_path: Path, kind: type[Part], key: str, inputs: dict[str, object]) -> None:
    run = create_run(tmp_path, "eval", {}, inputs=inputs)
    with pytest.raises(ValidationError) as caught:
        kind.read(run.record.inputs)
    assert first_fault(caught.value) == f"{key} is missing"
    with pytest.raises(RunError, match=rf"incomplete: {key} is missing\.") as told:
        run.inputs(kind)
    assert told.value.path == str(run.folder / "run.json")


def test_a_resumed_run_without_its_source_is_named(tmp_path: Path) -> None:
    run = create_run(tmp_path, "fft", {}, inputs={"model": "m", "mask": None, "state": "FFT", "parents": []})
    with pytest.raises(RunError, match="origin is missing"):
        source_of_resumed(run)


def test_inputs_of_a_surface_in_their_order() -> None:
    corner = Corner(state="FFT", run="002-fft", model="m", mask=None, fingerprint="f", mask_digest=None)
    digests = Digests(train="t", test="u")
    surface = SurfaceInputs(digests=digests, corners=[corner], test_records=60, train_records=90, records=100, points=7)
    assert list(surface.document().items()) == [
        ("points", 7),
        ("records", 100),
        ("train_records", 90),
        ("test_records", 60),
        ("corners", [dict(state="FFT", run="002-fft", model="m", mask=None, fingerprint="f", mask_digest=None)]),
        ("digests", {"train": "t", "test": "u"}),
    ]
    assert list(surface.document()["corners"][0]) == ["state", "run", "model", "mask", "fingerprint", "mask_digest"]


def test_a_source_is_recorded_even_if_its_path_cannot_be() -> None:
    """The error for it comes from creating the run."""
    model = os.fsdecode(b"model-\xff")
    assert ModelSource(model).as_inputs() == {
        "model": model,
        "mask": None,
        "state": "pre-trained",
        "parents": [],
        "origin": model,
    }
