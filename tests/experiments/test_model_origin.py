"""The origin of a model is recorded in the model's folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mftctl.experiments.fingerprints import model_fingerprint
from mftctl.experiments.model_origin import ModelOrigin, origin_of, told_origin, was_trained
from mftctl.experiments.model_source import ModelSource, source_of_mask, source_of_model
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_folder import create_run
from mftctl.experiments.state_names import CONTINUED_FFT, FFT, UNKNOWN, fine_tuned_state
from mftctl.files.ownership import MARKER, Kind, read_origin, strangers, write_marker
from mftctl.progress import Silence
from mftctl.workflows.apply import apply
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from tests.partial_results import partial_result
from tests.workflow_fixtures import make_recipe, open_run


@pytest.fixture(scope="module")
def tuned(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned model outside the runs folder that it was trained in."""
    folder = tmp_path_factory.mktemp("tuned")
    recipe = make_recipe(workspace, fft__max_steps=1)
    run, source = open_run(folder / "runs", "fft", recipe)
    fine_tune(recipe, source, run, Silence())
    shutil.copytree(run.folder / "model", folder / "model")
    return folder / "model"


@pytest.mark.slow
def test_fine_tuned_model_records_its_origin(tuned: Path, workspace: Path, tmp_path: Path) -> None:
    base = str((workspace / "tiny").resolve())
    assert told_origin(tuned) == ModelOrigin(FFT, base, base, str(model_fingerprint(base)))
    found = source_of_model(str(tuned), tmp_path / "other")
    assert found == ModelSource(str(tuned), state=FFT, origin=base, base=base)
    assert fine_tuned_state(found.state, Recipe().fft) == CONTINUED_FFT
    assert found.as_inputs()["base"] == base
    assert source_of_mask(str(tuned), "some.bits", tmp_path / "other") == replace(
        found, mask="some.bits", state="masked"
    )
    assert strangers(tuned, Kind.MODEL) == []


@pytest.mark.slow
def test_masked_model_records_its_origin(tuned: Path, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        workspace, model=str(tuned), mask_train__method="random", mask_train__preset="default", mask_train__ratio=0.1
    )
    source = source_of_model(str(tuned), tmp_path / "runs")
    run = create_run(tmp_path / "runs", "mask-train", {}, inputs=source.as_inputs())
    made = mask_train(recipe, source, run, Silence()).document()
    applying = create_run(tmp_path / "runs", "apply", {}, output=tmp_path / "masked")
    apply(replace(source, mask=made["mask"], state="random mask"), applying, Silence())
    found = source_of_model(str(tmp_path / "masked"), tmp_path / "other")
    assert (found.state, found.base, found.origin) == ("random mask", str(tuned), source.origin)


def test_run_takes_precedence_over_the_recorded_origin(tuned: Path, tmp_path: Path) -> None:
    run = create_run(tmp_path, "fft", {}, inputs=ModelSource("base").as_inputs())
    run.finish(partial_result({"state": "GMT", "model": str(tuned)}))
    assert source_of_model(str(tuned), tmp_path).state == "GMT"


def test_model_of_an_older_version_is_of_unknown_origin(tuned: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(tuned, old)
    marker = json.loads((old / MARKER).read_text())
    del marker["origin"]
    (old / MARKER).write_text(json.dumps(marker))
    assert told_origin(old) is None
    assert source_of_model(str(old), tmp_path / "runs") == ModelSource(str(old), state=UNKNOWN)


@pytest.mark.parametrize("trace", ["trainer_state.json", "adapter_config.json", "training_args.bin", "optimizer.pt"])
def test_model_that_another_tool_trained_is_of_unknown_origin(tmp_path: Path, trace: str) -> None:
    (tmp_path / "m").mkdir()
    assert not was_trained(tmp_path / "m")
    assert source_of_model(str(tmp_path / "m"), tmp_path).state == "pre-trained"
    (tmp_path / "m" / trace).touch()
    assert source_of_model(str(tmp_path / "m"), tmp_path).state == "unknown origin"


@pytest.mark.parametrize("origin", [{"state": "FFT"}, {"state": 1, "base": "", "origin": "", "digest": ""}, []])
def test_incomplete_origin_is_ignored(tmp_path: Path, origin: Any) -> None:
    (tmp_path / MARKER).write_text(
        json.dumps({"purpose": "result of mftctl", "kind": "model", "files": {}, "origin": origin})
    )
    assert told_origin(tmp_path) is None


def test_report_folder_has_no_origin(tmp_path: Path) -> None:
    write_marker(tmp_path, Kind.REPORT)
    assert read_origin(tmp_path) is None
    assert "origin" not in json.loads((tmp_path / MARKER).read_text())


def test_hub_model_is_identified_by_its_name() -> None:
    assert origin_of("FFT", "owner/name", "") == ModelOrigin("FFT", "owner/name", "owner/name", "")


def test_written_model_names_its_stops(tuned: Path, tokenizer: Any) -> None:
    settings = json.loads((tuned / "generation_config.json").read_text())
    assert settings["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|end|>")
