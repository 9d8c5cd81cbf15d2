"""Learned delta masks: what training measured is what the applied checkpoint gives, and errors come before training."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from mftctl.data.prepared.load import load_examples
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError, Interrupted, MaskMismatchError, ModelError
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.experiments.mask_results import MaskTrainResult, MeasuredMask
from mftctl.experiments.model_source import ModelSource, source_of_run
from mftctl.experiments.results import Score
from mftctl.experiments.run_config import to_document
from mftctl.experiments.run_folder import Run, create_run
from mftctl.masking.checkpoints.apply_in_memory import apply_mask, base_folder
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from mftctl.masking.checkpoints.tensors import tensor_digest, tensor_index
from mftctl.masking.mask import Mask, load_mask
from mftctl.masking.selection import removed_count
from mftctl.progress import Silence
from mftctl.training.validation_scores import ValidationScorer
from mftctl.workflows import model_before
from mftctl.workflows.apply import apply
from mftctl.workflows.eval import evaluate
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from tests.conftest import build_tokenizer
from tests.masking.built_checkpoints import stored_tensors, write_tuned
from tests.masking.test_selection import keep_by_sorting
from tests.workflow_fixtures import Interrupter, encode_records, make_recipe, open_run, tuned

DEFAULT: dict[str, Any] = {
    "mask_train__kind": "delta",
    "mask_train__preset": "default",
    "mask_train__layers": "all",
    "mask_train__learning_rate": 5e-3,
}
Learned = tuple[Run, MeasuredMask, Mask]


def exact_loss(workspace: Path, model: Any, checkpoint: Path, part: slice) -> float:
    """The loss of a loaded model on validation records, in the batches of a validation."""
    examples = load_examples([DataSource(str(workspace / "val.jsonl"))])[part]
    encoded = encode_records(examples, load_tokenizer(checkpoint)).records
    return mean_loss(sample_losses(model, encoded, pad_token_id=0, together=True))


def start(workspace: Path, root: Path, source: ModelSource, command: str = "mask-train", **changes: Any) -> Any:
    recipe = make_recipe(workspace, **{**DEFAULT, "model": source.model, **changes})
    return recipe, create_run(root, command, to_document(recipe), inputs=source.as_inputs())


def learn(workspace: Path, root: Path, source: ModelSource, **changes: Any) -> Learned:
    recipe, run = start(workspace, root, source, **changes)
    run.finish(mask_train(recipe, source, run, Silence()))
    result = run.result(MaskTrainResult)
    assert isinstance(result, MeasuredMask)
    return run, result, load_mask(Path(result.mask))


@pytest.fixture(scope="module")
def fft(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A fine-tuned model, so that the masks find the model before fine-tuning by themselves."""
    return tuned(workspace, tmp_path_factory.mktemp("fft"))


@pytest.fixture(scope="module")
def source(fft: Run) -> ModelSource:
    return source_of_run(fft)


@pytest.fixture(scope="module")
def learned(workspace: Path, source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    return learn(workspace, tmp_path_factory.mktemp("learned"), source)


def applied(learned: Learned, source: ModelSource, root: Path, **options: Any) -> Path:
    run = create_run(root, "apply", learned[0].record.config, inputs=source.as_inputs())
    masked = source_of_run(learned[0])
    run.finish(apply(masked, run, Silence(), **options))
    assert run.record.result["state"] == learned[1].state
    return Path(run.record.result["model"])


@pytest.mark.slow
def test_training_measures_exactly_what_the_applied_checkpoint_gives(
    learned: Learned, source: ModelSource, workspace: Path, tmp_path: Path
) -> None:
    run, result, mask = learned
    assert (result.state, result.base, mask.metadata.kind) == ("MFT delta", str(workspace / "tiny"), "delta")
    assert result.start_loss == result.unmasked_loss
    assert result.best_loss < result.unmasked_loss
    assert 0 < mask.removed == result.removed < result.weights
    checkpoint = applied(learned, source, tmp_path)
    model = load_model(checkpoint, dtype=torch.float32)
    assert exact_loss(workspace, model, checkpoint, slice(0, None, 2)) == result.best_loss
    assert result.confirmation is not None
    assert exact_loss(workspace, model, checkpoint, slice(1, None, 2)) == result.confirmation.masked_loss
    tuned_model = load_model(Path(source.model), dtype=torch.float32)
    assert exact_loss(workspace, tuned_model, checkpoint, slice(0, None, 2)) == result.unmasked_loss
    apply_mask(tuned_model, mask, base_folder(mask))
    state = tuned_model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    losses = {line.step: line.eval_loss for line in run.training.metrics() if line.eval_loss is not None}
    assert losses[result.best_step] == result.best_loss


@pytest.mark.slow
def test_a_mask_whose_base_is_gone_says_what_is_missing(learned: Learned, tmp_path: Path) -> None:
    mask = learned[2]
    metadata = dataclasses.replace(mask.metadata, base_model=str(tmp_path / "gone"))
    moved = Mask({name: mask[name] for name in mask.names()}, mask.records, metadata)
    with pytest.raises(ModelError, match="needs the model before fine-tuning, which is missing") as caught:
        base_folder(moved)
    assert caught.value.key == str(tmp_path / "gone")


@pytest.mark.slow
def test_a_base_without_effect_is_told(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, mask_train__base=str(workspace / "tiny"), mask_train__method="random")
    run, source = open_run(tmp_path, "mask-train", recipe)
    listener = Interrupter(-1)
    mask_train(recipe, source, run, listener)
    assert any("has no effect on a mask of kind weight" in note for note in listener.notes)


@pytest.mark.slow
def test_the_checkpoint_has_the_bits_of_the_tuned_model_or_of_the_base(
    learned: Learned, source: ModelSource, workspace: Path, tmp_path: Path
) -> None:
    _, _, mask = learned
    before, after = stored_tensors(workspace / "tiny"), stored_tensors(Path(source.model))
    for name, tensor in stored_tensors(applied(learned, source, tmp_path, base=str(workspace / "tiny"))).items():
        keep = mask[name] if name in mask else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(tensor, torch.where(keep, after[name], before[name]))
    indexes = tensor_index(workspace / "tiny"), tensor_index(Path(source.model))
    for name, record in mask.records.items():
        digests = tuple(tensor_digest(index[name]) for index in indexes)
        assert (record.sha256, record.tuned_sha256) == digests


@pytest.mark.slow
def test_an_evaluation_under_the_mask_equals_one_of_the_applied_checkpoint(
    learned: Learned, source: ModelSource, workspace: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(workspace, eval__generate=False)
    losses = []
    for evaluated in (source_of_run(learned[0]), ModelSource(str(applied(learned, source, tmp_path)))):
        run = create_run(tmp_path, "eval", to_document(recipe), inputs=evaluated.as_inputs())
        losses.append(evaluate(recipe, evaluated, run, Silence()).datasets[0].metrics[0].value)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_the_smallest_changes_are_removed_first(learned: Learned, source: ModelSource, workspace: Path) -> None:
    before, after = stored_tensors(workspace / "tiny"), stored_tensors(Path(source.model))
    mask = learned[2]
    sizes = torch.cat([(after[name] - before[name]).abs()[~mask[name]] for name in mask.names()])
    kept = torch.cat([(after[name] - before[name]).abs()[mask[name]] for name in mask.names()])
    assert sizes.max() < 12 * 5e-3  # Adam moves a score by about one learning rate per step
    assert 0 < sizes.min()  # an unchanged weight gets no gradient and stays at the threshold
    assert sizes.mean() < kept.mean()


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8])
def test_resuming_gives_the_identical_mask(
    learned: Learned, source: ModelSource, workspace: Path, tmp_path: Path, step: int
) -> None:
    recipe, run = start(workspace, tmp_path, source)
    with pytest.raises(Interrupted):
        mask_train(recipe, source, run, Interrupter(step))
    result = mask_train(recipe, source, run, Silence(), resume=True)
    resumed = load_mask(Path(result.mask))
    assert all(torch.equal(resumed[name], learned[2][name]) for name in learned[2].names())
    assert isinstance(result, MeasuredMask)
    for key in ("unmasked_loss", "start_loss", "best_loss", "best_step", "steps", "tokens", "flips", "confirmation"):
        assert getattr(result, key) == getattr(learned[1], key), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"mask_train__preset": "paper", "mask_train__learning_rate": "auto"}, "MFT delta, paper"),
        ({"mask_train__ratio": 0.25}, "MFT delta"),
        ({"mask_train__preset": "paper", "mask_train__threshold": -0.01}, "MFT delta threshold"),
        ({"mask_train__low_memory": True}, "MFT delta"),
        ({"mask_train__precision": "bf16", "mask_train__gradient_checkpointing": True}, "MFT delta"),
        (
            {"mask_train__target": "attn", "mask_train__layers": "1-2", "mask_train__ratio": {"q_proj": 0.3}},
            "MFT delta",
        ),
    ],
    ids=lambda value: str(value),
)
def test_options_work_as_for_weight_masks(
    workspace: Path, source: ModelSource, tmp_path: Path, changes: dict[str, Any], state: str
) -> None:
    _, result, mask = learn(workspace, tmp_path, source, **changes)
    assert (result.state, mask.metadata.kind, result.steps) == (state, "delta", 12)
    assert result.flips is not None
    assert result.flips.turned > 0
    dtype = torch.bfloat16 if changes.get("mask_train__precision") == "bf16" else torch.float32
    model = load_model(Path(source.model), dtype=dtype)
    apply_mask(model, mask, base_folder(mask))
    assert exact_loss(workspace, model, Path(source.model), slice(0, None, 2)) == result.best_loss
    ratio = changes.get("mask_train__ratio", 0.1)
    if mask.metadata.threshold is None:
        for name in mask.names():
            share = ratio["q_proj"] if isinstance(ratio, dict) else ratio
            assert mask.records[name].removed == removed_count(mask[name].numel(), share)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "state"), [("random", "random mask delta"), ("magnitude", "L1 mask delta")])
def test_delta_masks_without_training(
    workspace: Path, source: ModelSource, tmp_path: Path, method: str, state: str
) -> None:
    changes = {"mask_train__method": method, "mask_train__ratio": 0.2}
    _, result, mask = learn(workspace, tmp_path, source, **changes)
    assert (result.state, result.steps, mask.metadata.method, mask.metadata.kind) == (state, 0, method, "delta")
    model = load_model(Path(source.model), dtype=torch.float32)
    apply_mask(model, mask, base_folder(mask))
    assert exact_loss(workspace, model, Path(source.model), slice(None)) == result.best_loss
    before, after = stored_tensors(workspace / "tiny"), stored_tensors(Path(source.model))
    for name in mask.names():
        assert mask.records[name].removed == removed_count(mask[name].numel(), 0.2)
        if method == "magnitude":
            sizes = (after[name] - before[name]).abs().numpy()
            assert np.array_equal(mask[name], keep_by_sorting(sizes, 0.2))


@pytest.mark.slow
def test_conv1d_under_the_names_of_its_checkpoint(workspace: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=102, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=1, pad_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    build_tokenizer().save_pretrained(tmp_path / "gpt2")
    source = ModelSource(str(write_tuned(tmp_path / "gpt2", tmp_path / "tuned")))
    _, result, mask = learn(workspace, tmp_path / "runs", source, mask_train__base=str(tmp_path / "gpt2"))
    assert set(mask.names()) <= set(tensor_index(tmp_path / "gpt2"))
    model = load_model(Path(source.model), dtype=torch.float32)
    apply_mask(model, mask, tmp_path / "gpt2")
    assert exact_loss(workspace, model, Path(source.model), slice(0, None, 2)) == result.best_loss


@pytest.mark.slow
def test_a_probed_group_is_what_mask_train_learns(workspace: Path, source: ModelSource, tmp_path: Path) -> None:
    changes = {"probe__data_fraction": 1.0, "mask_train__layers": "2-3"}
    recipe, run = start(workspace, tmp_path, source, "probe", **changes)
    found = {group.layers: group for group in probe(recipe, source, run, Silence()).groups}
    _, result, _ = learn(workspace, tmp_path, source, **changes)
    assert found["2-3"].document()["best_loss"] == result.best_loss
    assert result.best_loss < result.unmasked_loss


@pytest.mark.slow
def test_a_group_is_scored_with_removed_weights_reset(
    workspace: Path, source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[dict[str, torch.Tensor]] = []
    original = ValidationScorer.score

    def noting(self: ValidationScorer, model: PreTrainedModel, folder: Path) -> Score:
        scored.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return original(self, model, folder)

    monkeypatch.setattr(ValidationScorer, "score", noting)
    changes = {"probe__by": "exact_match", "probe__groups": [4], "eval__max_new_tokens": 2, "mask_train__ratio": 0.3}
    recipe, run = start(workspace, tmp_path, source, "probe", **changes)
    assert probe(recipe, source, run, Silence()).document()["groups"][0]["score"] is not None
    before, after = stored_tensors(workspace / "tiny"), stored_tensors(Path(source.model))
    unmasked, masked = scored
    assert all(torch.equal(unmasked[name], tensor) for name, tensor in after.items())
    for name in (name for name in after if "_proj" in name):
        reset = masked[name] != after[name]
        assert 0.2 < reset.float().mean() <= 0.31
        assert torch.equal(masked[name][reset], before[name][reset])


def refused(workspace: Path, root: Path, source: ModelSource, command: str = "mask-train", **changes: Any) -> Any:
    """The error of a command, which comes before any training."""
    recipe, run = start(workspace, root, source, command, **changes)
    with pytest.raises((ConfigError, MaskMismatchError, ModelError)) as caught:
        {"mask-train": mask_train, "probe": probe}[command](recipe, source, run, Silence())
    assert not run.training.checkpoints.exists()
    assert not (run.folder / "metrics.jsonl").exists()
    return caught.value


def test_a_delta_mask_without_its_base(workspace: Path, tmp_path: Path) -> None:
    error = refused(workspace, tmp_path, ModelSource(str(workspace / "tiny")))
    assert error.message == "A delta mask needs the model before fine-tuning."
    assert (error.key, error.hint) == ("mask_train.base", "--base MODEL")


@pytest.mark.parametrize("command", ["mask-train", "probe"])
def test_weights_shared_by_processes(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(model_before, "shares_weights", lambda: True)
    source = ModelSource(str(workspace / "tiny"))
    error = refused(workspace, tmp_path, source, command, mask_train__base="anything")
    assert error.message == "A delta mask needs whole weights in each process."
    assert error.key == "mask_train.kind"


def test_a_fast_probe_of_delta_masks(workspace: Path, tmp_path: Path) -> None:
    source = ModelSource(str(workspace / "tiny"))
    error = refused(workspace, tmp_path, source, "probe", probe__fast=True, mask_train__base="anything")
    assert error.message == "A fast probe predicts weight masks only."


@pytest.mark.parametrize("command", ["mask-train", "probe"])
def test_a_base_with_the_same_weights(workspace: Path, tmp_path: Path, command: str) -> None:
    shutil.copytree(workspace / "tiny", tmp_path / "copy")
    source = ModelSource(str(workspace / "tiny"))
    error = refused(workspace, tmp_path, source, command, mask_train__base=str(tmp_path / "copy"))
    assert "the same weights, so there is nothing to reset" in error.message


def test_a_base_of_another_shape(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "tiny", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:5].clone()
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    source = ModelSource(str(workspace / "tiny"))
    error = refused(workspace, tmp_path, source, mask_train__base=str(tmp_path / "other"))
    assert error.message == "The base and the tuned checkpoint do not have the same tensors."
    assert error.key == name


def test_a_base_that_does_not_exist(workspace: Path, tmp_path: Path) -> None:
    error = refused(
        workspace, tmp_path, ModelSource(str(workspace / "tiny")), mask_train__base=str(tmp_path / "no-such")
    )
    assert isinstance(error, ModelError)
