"""Interpolation between a model and the one fine-tuned from it: losses, the choice, the written model, errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.data.prepared.examples import data_digest
from mftctl.data.prepared.load import load_examples
from mftctl.data.retained import split_retained
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError, DataError, MaskMismatchError, ModelError, TrainingError
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.experiments.combined_results import InterpolateResult
from mftctl.experiments.model_origin import told_origin
from mftctl.experiments.model_source import ModelSource, source_of_model, source_of_run
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.state_names import FFT, INTERPOLATED
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from mftctl.progress import Silence
from mftctl.workflows import interpolate as workflow
from mftctl.workflows.interpolate import interpolate
from tests.conftest import build_llama, build_tokenizer
from tests.masking.built_checkpoints import raw_tensors, write_tuned
from tests.workflow_fixtures import encode_records, make_recipe


@pytest.fixture(scope="module")
def tuned_model(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace's model with small changes."""
    return write_tuned(workspace / "tiny", tmp_path_factory.mktemp("made") / "tuned")


@pytest.fixture
def source(workspace: Path, tuned_model: Path) -> ModelSource:
    return ModelSource(str(tuned_model), state=FFT, origin=str(workspace / "tiny"))


def open_run(root: Path, recipe: Recipe, source: ModelSource, output: Path | None = None) -> Run:
    return create_run(root, "interpolate", to_document(recipe), inputs=source.as_inputs(), output=output)


def run_it(
    root: Path, recipe: Recipe, source: ModelSource, output: Path | None = None
) -> tuple[Run, InterpolateResult]:
    run = open_run(root, recipe, source, output)
    run.finish(interpolate(recipe, source, run, Silence()))
    return run, run.result(InterpolateResult)


def recipe_of(workspace: Path, *shares: float, **changes: Any) -> Recipe:
    return make_recipe(workspace, interpolate__shares=list(shares or (1.0,)), **changes)


def loss_of(workspace: Path, checkpoint: Path) -> float:
    """Computed independently: a fresh model on the encoded validation file."""
    model = load_model(checkpoint, dtype=torch.float32)
    examples = load_examples([DataSource(str(workspace / "val.jsonl"))])
    encoded = encode_records(examples, load_tokenizer(checkpoint)).records
    return mean_loss(sample_losses(model, encoded, pad_token_id=0))


def with_losses(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Makes the validations return these losses."""
    coming: Iterator[float] = iter(losses)
    monkeypatch.setattr(workflow, "validation_loss", lambda *_: next(coming))


def test_losses_are_those_of_the_models_and_the_best_is_written(
    workspace: Path, tuned_model: Path, source: ModelSource, tmp_path: Path
) -> None:
    run, result = run_it(tmp_path, recipe_of(workspace, 0.0, 0.5, 1.0, 1.5), source)
    losses = {entry.share: entry.loss for entry in result.losses}
    assert list(losses) == [0.0, 0.5, 1.0, 1.5]
    assert losses[0.0] == loss_of(workspace, workspace / "tiny")
    assert losses[1.0] == result.tuned_loss == loss_of(workspace, tuned_model)
    assert result.best_loss == min(losses.values()) == losses[result.share] == loss_of(workspace, Path(result.model))
    assert (result.state, result.base) == (INTERPOLATED, str(workspace / "tiny"))
    assert result.model == str(run.folder / "model")
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": number, "share": share, "eval_loss": loss} for number, (share, loss) in enumerate(losses.items())
    ]


def test_the_loss_on_data_to_retain_is_measured_at_every_share_and_does_not_decide(
    workspace: Path, tuned_model: Path, source: ModelSource, tmp_path: Path
) -> None:
    retained = tmp_path / "retained.jsonl"
    words = [
        {"question": f"spell {word}", "answer": word} for word in ("red", "green", "blue", "black", "white", "grey")
    ]
    retained.write_text("".join(json.dumps(record) + "\n" for record in words))
    recipe = recipe_of(workspace, 0.0, 1.0, 1.5)
    _, without = run_it(tmp_path / "without", recipe, source)
    assert "retained_loss" not in without.document()["losses"][0]
    run, result = run_it(tmp_path / "with", with_changes(recipe, {"retain_data": [str(retained)]}), source)
    assert [entry.loss for entry in result.losses] == [entry.loss for entry in without.losses]
    assert result.share == without.share
    model = load_model(tuned_model, dtype=torch.float32)
    held_out, _ = split_retained(load_examples([DataSource(str(retained))]))
    encoded = encode_records(held_out, load_tokenizer(tuned_model)).records
    losses = [entry.retained_loss for entry in result.losses]
    assert losses[1] == mean_loss(sample_losses(model, encoded, pad_token_id=0))
    assert len(set(losses)) == 3
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["retained_loss"] for line in lines] == losses
    assert run.record.inputs["digests"]["retained"] == data_digest(held_out)


def test_a_kept_share_of_1_is_the_tuned_model_bit_for_bit(
    workspace: Path, tuned_model: Path, source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_losses(monkeypatch, 0.7, 0.6, 0.8)
    _, result = run_it(tmp_path, recipe_of(workspace, 0.5, 1, 1.5), source)
    written = raw_tensors(Path(result.model) / "model.safetensors")
    assert written == raw_tensors(tuned_model / "model.safetensors")


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ((0.6, 0.6, 0.6, 0.6), 1.0),
        ((0.6, 0.6, 0.7, 0.6), 1.25),
        ((0.5, 0.6, 0.6, 0.6), 0.5),
        ((float("nan"), 0.6, float("nan"), float("inf")), 0.75),
    ],
)
def test_of_equal_losses_the_share_closest_to_1_is_kept_then_the_larger(
    losses: tuple[float, ...],
    kept: float,
    workspace: Path,
    source: ModelSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_losses(monkeypatch, *losses)
    _, result = run_it(tmp_path, recipe_of(workspace, 0.5, 0.75, 1.0, 1.25), source)
    assert (result.share, result.best_loss) == (kept, losses[(0.5, 0.75, 1.0, 1.25).index(kept)])


def test_the_model_is_known_to_later_commands(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    of_a_run = replace(source, parents=("001-fft",))
    create_run(tmp_path, "fft", {})
    run, result = run_it(tmp_path, recipe_of(workspace, 0.5), of_a_run)
    made = source_of_run(run)
    assert made == source_of_model(result.model, tmp_path)
    assert (made.state, made.parents, made.origin) == (INTERPOLATED, ("001-fft", run.name), source.origin)
    told = told_origin(Path(result.model))
    assert told is not None
    assert (told.state, told.base, told.origin) == (INTERPOLATED, source.model, source.origin)
    inputs = RunInputs.read(run.record.inputs)
    assert (inputs.model, inputs.state, inputs.validation_records) == (source.model, FFT, 12)


def test_a_run_started_again_repeats_no_line(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    recipe = recipe_of(workspace, 0.5, 1.0)
    run = open_run(tmp_path, recipe, source)
    run.training.log({"step": 0, "share": 0.5, "eval_loss": 9.0})
    run.finish(interpolate(recipe, source, run, Silence()))
    assert [line.share for line in run.training.metrics()] == [0.5, 1.0]


def test_an_output_that_has_been_taken_leaves_the_model_in_the_run(
    workspace: Path, source: ModelSource, tmp_path: Path
) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    run, result = run_it(tmp_path / "runs", recipe_of(workspace, 1.0), source, output=taken)
    assert result.model == str(run.folder / "model")
    assert "not written by mftctl" in str(result.output_refused)
    assert [path.name for path in taken.iterdir()] == ["mine"]


def test_an_output_gets_the_model(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    run, result = run_it(tmp_path / "runs", recipe_of(workspace, 1.0), source, output=tmp_path / "out")
    assert (result.model, result.output_refused) == (str(tmp_path / "out"), None)
    assert not (run.folder / "model").exists()


def refused(kind: type[Exception], message: str, root: Path, recipe: Recipe, source: ModelSource) -> Any:
    run = open_run(root, recipe, source)
    with pytest.raises(kind, match=message) as caught:
        interpolate(recipe, source, run, Silence())
    assert not (run.folder / "model").exists()
    return caught.value


def test_an_unknown_base_is_refused(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    error = refused(
        ConfigError, "needs the model before fine-tuning", tmp_path, recipe_of(workspace), replace(source, origin="")
    )
    assert (error.key, error.hint) == ("interpolate.base", "--base MODEL")


def test_a_given_base_counts(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    recipe = recipe_of(workspace, 1.0, interpolate__base=str(workspace / "tiny"))
    _, result = run_it(tmp_path, recipe, replace(source, origin=""))
    assert result.base == str(workspace / "tiny")


def test_a_model_with_a_separate_mask_is_refused(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    masked = replace(source, mask="mask.bits")
    assert refused(ConfigError, "without a separate mask", tmp_path, recipe_of(workspace), masked).actual == "mask.bits"


def test_no_data_is_refused(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    assert refused(ConfigError, "needs data", tmp_path, recipe_of(workspace, data=[]), source).key == "--data"


def test_too_few_records_to_validate_are_refused(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    recipe = recipe_of(workspace, data=[f"{workspace / 'train.jsonl'}=1"], val_data=[])
    refused(DataError, "records", tmp_path, recipe, source)


def test_an_adapter_is_refused(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": source.origin}))
    adapted = replace(source, model=str(adapter))
    refused(ModelError, "holds an adapter", tmp_path / "runs", recipe_of(workspace), adapted)
    recipe = recipe_of(workspace, interpolate__base=str(adapter))
    refused(ModelError, "holds an adapter", tmp_path / "runs", recipe, source)


def test_a_base_of_other_shapes_is_refused(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    build_llama(hidden_size=64).save_pretrained(tmp_path / "wide")
    build_tokenizer().save_pretrained(tmp_path / "wide")
    recipe = recipe_of(workspace, interpolate__base=str(tmp_path / "wide"))
    refused(MaskMismatchError, "do not have the same tensors", tmp_path / "runs", recipe, source)


def test_the_same_model_twice_is_refused(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    copy = shutil.copytree(source.model, tmp_path / "copy")
    recipe = recipe_of(workspace, interpolate__base=str(copy))
    refused(ModelError, "same weights", tmp_path / "runs", recipe, source)


def test_losses_that_are_all_infinite_are_refused(
    workspace: Path, source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_losses(monkeypatch, float("nan"), float("inf"))
    error = refused(TrainingError, "No share gives a finite", tmp_path, recipe_of(workspace, 0.5, 1.0), source)
    assert (error.key, error.actual) == ("interpolate.shares", "0.5: nan, 1: inf")
