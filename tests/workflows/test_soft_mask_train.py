"""`mask-train --mask soft`: reported values, resumption, rounding, hardening, and what else may go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.data.prepared.load import load_examples
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError, Interrupted
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from mftctl.masking.delta.apply import apply_delta_to_checkpoint
from mftctl.masking.delta.delta import open_delta
from mftctl.masking.mask import load_mask
from mftctl.progress import Silence
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from tests.conftest import build_llama, build_tokenizer
from tests.masking.built_checkpoints import stored_tensors
from tests.workflow_fixtures import Interrupter, encode_records, make_recipe, open_run
from tests.workflows.test_mask_train import CONFIRMING, DECIDING
from tests.workflows.test_mask_train import validation_loss as hard_validation_loss

SOFT: dict[str, Any] = {"mask_train__preset": "default", "mask_train__mask": "soft", "mask_train__travel": 0.5}


def learn(workspace: Path, root: Path, **changes: Any) -> tuple[Run, dict[str, Any]]:
    recipe = make_recipe(workspace, **{**SOFT, **changes})
    run, source = open_run(root, "mask-train", recipe)
    run.finish(mask_train(recipe, source, run, Silence()))
    return run, run.record.result


def applied(result: dict[str, Any], base: Path, output: Path) -> Path:
    """The checkpoint with the mask of a result."""
    with open_delta(result["mask"]) as opened:
        apply_delta_to_checkpoint(base, opened, output, base_model="base")
    return output


def loss_of(workspace: Path, checkpoint: Path, part: slice = DECIDING) -> float:
    model = load_model(checkpoint, dtype=torch.float32)
    examples = load_examples([DataSource(str(workspace / "val.jsonl"))])[part]
    encoded = encode_records(examples, load_tokenizer(workspace / "tiny")).records
    return mean_loss(sample_losses(model, encoded, pad_token_id=0))


@pytest.fixture(scope="module")
def undisturbed(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    return learn(workspace, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.slow
def test_reports_what_the_applied_checkpoint_measures(
    undisturbed: tuple[Run, dict[str, Any]], workspace: Path, tmp_path: Path
) -> None:
    _, result = undisturbed
    model = applied(result, workspace / "tiny", tmp_path / "model")
    assert result["state"] == "MFT soft"
    assert result["best_loss"] < result["unmasked_loss"] == result["start_loss"]
    assert loss_of(workspace, model) == pytest.approx(result["best_loss"], abs=1e-6)
    assert loss_of(workspace, model, CONFIRMING) == pytest.approx(result["confirmation"]["masked_loss"], abs=1e-6)


def test_the_summary_is_that_of_the_file(
    undisturbed: tuple[Run, dict[str, Any]], workspace: Path, tmp_path: Path
) -> None:
    _, result = undisturbed
    before = stored_tensors(workspace / "tiny")
    after = stored_tensors(applied(result, workspace / "tiny", tmp_path / "model"))
    with open_delta(result["mask"]) as opened:
        names = set(opened.contents.tensors)
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    factors = torch.cat([(after[name] / before[name]).flatten() for name in names]).double()
    assert result["weights"] == factors.numel()
    assert result["soft"]["changed"] == int((factors - 1).abs().gt(1e-3).sum())
    assert result["soft"]["mean"] == pytest.approx(factors.mean().item(), abs=1e-5)
    assert result["soft"]["mean_change"] == pytest.approx((1 - factors).abs().mean().item(), abs=1e-5)
    assert result["removed"] == int((factors == 0).sum())
    assert result["soft"]["file_bytes"] == Path(result["mask"]).stat().st_size
    assert all(torch.equal(before[name], after[name]) for name in before if name not in names)


@pytest.mark.slow
def test_resuming_gives_the_identical_mask(
    undisturbed: tuple[Run, dict[str, Any]], workspace: Path, tmp_path: Path
) -> None:
    _, expected = undisturbed
    recipe = make_recipe(workspace, **SOFT)
    run, source = open_run(tmp_path, "mask-train", recipe)
    with pytest.raises(Interrupted):
        mask_train(recipe, source, run, Interrupter(5))
    result = mask_train(recipe, source, run, Silence(), resume=True).document()
    for key in ("start_loss", "best_loss", "best_step", "soft", "flips", "removed"):
        assert result[key] == expected[key], key


@pytest.mark.slow
def test_a_checkpoint_in_bf16_computes_as_in_training(workspace: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    build_llama().to(torch.bfloat16).save_pretrained(base)
    build_tokenizer().save_pretrained(base)
    _, result = learn(workspace, tmp_path / "runs", model=str(base), mask_train__max_multiplier=2)
    assert loss_of(workspace, applied(result, base, tmp_path / "model")) == pytest.approx(result["best_loss"], abs=1e-6)


@pytest.mark.slow
def test_hardening_keeps_a_hard_mask(workspace: Path, tmp_path: Path) -> None:
    changes = {"mask_train__harden": True, "mask_train__travel": 2.0, "mask_train__keep": "last"}
    run, result = learn(workspace, tmp_path, **changes)
    mask = load_mask(Path(result["mask"]))
    assert (result["state"], result.get("soft")) == ("MFT hardened", None)
    assert result["removed"] == mask.removed > 0
    last = [line.eval_loss for line in run.training.metrics() if line.eval_loss is not None][-1]
    assert hard_validation_loss(workspace, workspace / "tiny", mask) == pytest.approx(last, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mask_train__low_memory": True},
        {"mask_train__average": "ema"},
        {"mask_train__best_by": "exact_match"},
        {"mask_train__gradient_checkpointing": True},
    ],
    ids=str,
)
def test_other_options_go_with_it(workspace: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    _, result = learn(workspace, tmp_path, **changes)
    assert result["best_loss"] <= result["unmasked_loss"]
    assert loss_of(workspace, applied(result, workspace / "tiny", tmp_path / "model")) == pytest.approx(
        result["best_loss"], abs=1e-6
    )


@pytest.mark.slow
def test_a_training_that_changes_no_multiplier_keeps_the_model_as_it_is(workspace: Path, tmp_path: Path) -> None:
    recipe, listener = make_recipe(workspace, **SOFT, mask_train__learning_rate=1e-9), Interrupter(-1)
    run, source = open_run(tmp_path, "mask-train", recipe)
    result = mask_train(recipe, source, run, listener).document()
    assert "or try other layers (mftctl probe), fewer layers or more data." in listener.notes[-1]
    assert (result["best_step"], result["soft"]["changed"], result["helps"]) == (0, 0, False)
    model = applied(result, workspace / "tiny", tmp_path / "model")
    before = stored_tensors(workspace / "tiny")
    assert all(torch.equal(before[name], tensor) for name, tensor in stored_tensors(model).items())


@pytest.mark.parametrize("fast", [False, True])
def test_a_probe_of_soft_masks_is_refused(workspace: Path, tmp_path: Path, fast: bool) -> None:
    recipe = make_recipe(workspace, **SOFT, probe__fast=fast)
    run, source = open_run(tmp_path, "probe", recipe)
    with pytest.raises(ConfigError, match="A probe compares hard masks") as error:
        probe(recipe, source, run, Silence())
    assert error.value.key == "mask_train.mask"
