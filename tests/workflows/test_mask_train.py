"""Mask training: reported values, kept masks, resumption and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel, get_scheduler

from mftctl.data.prepared.load import load_examples
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError, Interrupted, MaskingError
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.apply_in_memory import apply_mask
from mftctl.masking.checkpoints.load import load_model, load_tokenizer
from mftctl.masking.checkpoints.tensors import tensor_digest, tensor_index
from mftctl.masking.mask import Mask, load_mask
from mftctl.masking.selection import removed_count
from mftctl.progress import Silence
from mftctl.training import loop
from mftctl.training.schedule import schedule_factors, warmup_steps
from mftctl.training.score_start import auto_learning_rate
from mftctl.training.score_trainer import ScoreTrainer
from mftctl.workflows.mask_train import mask_train
from tests.conftest import build_tokenizer
from tests.masking.test_selection import keep_by_sorting
from tests.workflow_fixtures import Interrupter, encode_records, make_recipe, open_run

DECIDING = slice(0, None, 2)
CONFIRMING = slice(1, None, 2)
ALL = slice(None)


def validation_loss(workspace: Path, checkpoint: Path, mask: Mask | None, part: slice = DECIDING) -> float:
    """Computed independently of the training: a fresh model with the mask applied to its weights."""
    model = load_model(checkpoint, dtype=torch.float32)
    if mask is not None:
        apply_mask(model, mask)
    examples = load_examples([DataSource(str(workspace / "val.jsonl"))])[part]
    encoded = encode_records(examples, load_tokenizer(checkpoint)).records
    return mean_loss(sample_losses(model, encoded, pad_token_id=0))


def learn(workspace: Path, root: Path, **changes: Any) -> tuple[Run, dict[str, Any], Mask]:
    recipe = make_recipe(workspace, **changes)
    run, source = open_run(root, "mask-train", recipe)
    run.finish(mask_train(recipe, source, run, Silence()))
    result = run.record.result
    return run, result, load_mask(Path(result["mask"]))


def spread(check: Callable[[ScoreTrainer], None]) -> Callable[[ScoreTrainer], None]:
    """A check of a trainer as it is created under DeepSpeed."""

    def check_spread(trainer: ScoreTrainer) -> None:
        trainer.is_deepspeed_enabled = True
        check(trainer)

    return check_spread


@pytest.fixture(scope="module")
def undisturbed(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any], Mask]:
    return learn(workspace, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.slow
def test_reports_what_an_independent_evaluation_measures(
    undisturbed: tuple[Run, dict[str, Any], Mask], workspace: Path
) -> None:
    _, result, mask = undisturbed
    tiny = workspace / "tiny"
    assert validation_loss(workspace, tiny, None) == pytest.approx(result["unmasked_loss"], abs=1e-6)
    assert validation_loss(workspace, tiny, mask) == pytest.approx(result["best_loss"], abs=1e-6)
    assert result["best_loss"] < result["start_loss"]
    assert result["helps"] == (result["best_loss"] < result["unmasked_loss"])


def test_removes_exactly_the_ratio_of_the_chosen_layers(
    undisturbed: tuple[Run, dict[str, Any], Mask], workspace: Path
) -> None:
    _, result, mask = undisturbed
    assert {name.split(".")[2] for name in mask.names()} == {"1", "2"}
    assert len(mask) == result["tensors"] == 14
    for name in mask.names():
        assert mask.records[name].removed == removed_count(mask[name].numel(), 0.1)
    index = tensor_index(workspace / "tiny")
    assert all(mask.records[name].sha256 == tensor_digest(index[name]) for name in mask.names())
    assert mask.metadata.method == "learned"
    assert mask.metadata.layers == "1-2"


def test_the_best_validation_is_kept(undisturbed: tuple[Run, dict[str, Any], Mask]) -> None:
    run, result, _ = undisturbed
    logged = {line.step: line.eval_loss for line in run.training.metrics() if line.eval_loss is not None}
    assert set(logged) == {0, 4, 8, 12}
    assert result["start_loss"] == logged[0]
    assert result["best_loss"] == min(logged.values()) == logged[result["best_step"]]


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8])
def test_resuming_gives_the_identical_mask(
    undisturbed: tuple[Run, dict[str, Any], Mask], workspace: Path, tmp_path: Path, step: int
) -> None:
    _, expected, mask = undisturbed
    recipe = make_recipe(workspace)
    run, source = open_run(tmp_path, "mask-train", recipe)
    with pytest.raises(Interrupted) as caught:
        mask_train(recipe, source, run, Interrupter(step))
    assert str(caught.value.hint).startswith("mftctl mask-train --resume --runs ")
    result = mask_train(recipe, source, run, Silence(), resume=True).document()
    resumed = load_mask(Path(result["mask"]))
    assert all(torch.equal(resumed[name], mask[name]) for name in mask.names())
    for key in ("unmasked_loss", "start_loss", "best_loss", "best_step", "steps", "tokens", "flips"):
        assert result[key] == expected[key], key


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["2-3", "1"])
def test_hidden_states_of_the_frozen_layers_change_no_bit(workspace: Path, tmp_path: Path, layers: str) -> None:
    results = []
    for number, limit_gb in enumerate((0.0, None, 2e-5)):  # 12 steps use each of 12 batches once, 24 use each twice
        changes = {"mask_train__layers": layers, "mask_train__prefix_cache_gb": limit_gb, "mask_train__max_steps": 24}
        results.append(learn(workspace, tmp_path / str(number), **changes))
    for run, result, mask in results[1:]:
        assert mask.metadata.run_id == run.name
        assert all(torch.equal(mask[name], results[0][2][name]) for name in mask.names())
        for key in ("unmasked_loss", "start_loss", "best_loss", "best_step", "confirmation", "flips"):
            assert result[key] == results[0][1][key], key
        losses = [line.loss for line in run.training.metrics()]
        assert losses == [line.loss for line in results[0][0].training.metrics()]
    none, all_of_them, some = (result["prefix_reuse"] for _, result, _ in results)
    assert none == {"batches": 0, "size_bytes": 0, "reused": 0}
    assert all_of_them["batches"] == 12 + 2  # training batches, one of deciding and one of confirming records
    assert all_of_them["reused"] == 12 + 7 + 1  # second epoch, validations after the unmasked one, and confirmation
    assert 0 < some["size_bytes"] <= 2e4 < all_of_them["size_bytes"]


def test_batches_that_do_not_repeat_are_not_kept(undisturbed: tuple[Run, dict[str, Any], Mask]) -> None:
    _, result, _ = undisturbed
    assert result["prefix_reuse"]["batches"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_low_memory_learns_about_the_same_in_bf16_and_is_resumed(workspace: Path, tmp_path: Path, preset: str) -> None:
    changes: dict[str, Any] = {"mask_train__preset": preset, "fft__learning_rate": 3e-3}
    _, usual, _ = learn(workspace, tmp_path / "usual", **changes)
    changes["mask_train__low_memory"] = True
    _, low, mask = learn(workspace, tmp_path / "low", **changes)
    gain = usual["start_loss"] - usual["best_loss"]
    assert gain > 0.01
    assert low["start_loss"] == pytest.approx(
        usual["start_loss"], abs=0.1 * gain
    )  # ties in bf16 are broken differently
    assert low["best_loss"] == pytest.approx(usual["best_loss"], abs=0.3 * gain)

    recipe = make_recipe(workspace, **changes)
    run, source = open_run(tmp_path / "resumed", "mask-train", recipe)
    with pytest.raises(Interrupted):
        mask_train(recipe, source, run, Interrupter(5))
    with safe_open(run.training.checkpoints / "checkpoint-5" / "scores.safetensors", "pt") as file:
        scores = [file.get_slice(name).get_dtype() for name in file.keys() if not name.startswith("counted.")]
    assert scores == ["BF16"] * 14
    resumed = load_mask(Path(mask_train(recipe, source, run, Silence(), resume=True).document()["mask"]))
    assert all(torch.equal(resumed[name], mask[name]) for name in mask.names())


@pytest.mark.slow
def test_low_memory_is_refused_for_sharded_scores(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScoreTrainer, "_require_whole", spread(ScoreTrainer._require_whole))
    with pytest.raises(ConfigError, match="Training scores in bf16 requires all scores in each process") as caught:
        learn(workspace, tmp_path, mask_train__low_memory=True)
    assert caught.value.key == "mask_train.low_memory"


def test_flips_are_counted_between_validations(undisturbed: tuple[Run, dict[str, Any], Mask]) -> None:
    run, result, _ = undisturbed
    losses = [line.eval_loss for line in run.training.metrics() if line.eval_loss is not None]
    told = result["flips"]
    assert [line["step"] for line in told["rounds"]] == [4, 8, 12]
    assert [line["measured"] for line in told["rounds"]] == pytest.approx([a - b for a, b in pairwise(losses)])
    assert all(line["removed"] == line["restored"] > 0 for line in told["rounds"])  # the ratio is kept
    assert told["turned"] == sum(2 * line["removed"] for line in told["rounds"])
    assert 0 <= told["undone_share"] < 1
    # In a training that lowers the loss, the first-order estimate is a decrease.
    assert told["promised"] > 0


@pytest.mark.slow
def test_a_checkpoint_holds_scores_and_no_weights(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace)
    run, source = open_run(tmp_path, "mask-train", recipe)
    with pytest.raises(Interrupted):
        mask_train(recipe, source, run, Interrupter(5))
    newest = run.training.checkpoints / "checkpoint-5"
    with safe_open(newest / "scores.safetensors", "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    shapes = {name: shape for name, shape in stored.items() if not name.startswith("counted.")}
    assert len(shapes) == 14
    assert set(stored) == {*shapes, *(f"counted.{name}" for name in shapes)}
    assert all(name.split(".")[2] in ("1", "2") for name in shapes)
    assert not list(newest.glob("model*.safetensors"))
    weights = sum(int(np.prod(shape)) for shape in shapes.values())
    size_bytes = sum(path.stat().st_size for path in newest.iterdir())
    # Scores and two moments in fp32, mask bits of the last validation, and the training state.
    assert size_bytes < 12.125 * weights + 60_000


@pytest.mark.slow
def test_the_start_is_a_candidate(workspace: Path, tmp_path: Path) -> None:
    """Scores that hardly move keep the identity mask of the start, which no later state beats."""
    _, result, mask = learn(
        workspace,
        tmp_path,
        mask_train__start="constant",
        mask_train__start_value=1.0,
        mask_train__threshold=0.0,
        mask_train__learning_rate=1e-6,
    )
    assert result["best_step"] == 0
    assert result["best_loss"] == result["start_loss"] == pytest.approx(result["unmasked_loss"], abs=1e-6)
    assert mask.removed == 0


@pytest.mark.slow
def test_after_a_ruinous_training_the_start_is_kept(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = count(100)
    monkeypatch.setattr(loop, "mean_loss", lambda _: float(next(losses)))
    _, result, mask = learn(
        workspace,
        tmp_path,
        mask_train__start="constant",
        mask_train__start_value=0.01,
        mask_train__threshold=0.0,
        mask_train__learning_rate=1.0,
    )
    assert (result["start_loss"], result["best_loss"], result["best_step"]) == (result["unmasked_loss"],) * 2 + (0,)
    assert result["flips"]["turned"] > 1000
    assert mask.removed == 0


@pytest.mark.slow
def test_a_threshold_removes_what_falls_below_it(workspace: Path, tmp_path: Path) -> None:
    _, result, mask = learn(workspace, tmp_path, mask_train__threshold=-0.035, mask_train__layers="all")
    assert mask.metadata.threshold == -0.035
    assert mask.metadata.ratio is None
    assert 0.041 < result["ratio"] < 0.3  # N(0, 0.02) starts with 0.040 below the threshold
    assert result["layers"] == "0-3"


@pytest.mark.slow
@pytest.mark.parametrize(("method", "state"), [("random", "random mask"), ("magnitude", "L1 mask")])
def test_masks_without_training(workspace: Path, tmp_path: Path, method: str, state: str) -> None:
    _, result, mask = learn(workspace, tmp_path, mask_train__method=method, mask_train__ratio=0.2)
    assert (result["state"], result["steps"], mask.metadata.method) == (state, 0, method)
    assert validation_loss(workspace, workspace / "tiny", mask, ALL) == pytest.approx(result["best_loss"], abs=1e-6)
    assert all(mask.records[name].removed == removed_count(mask[name].numel(), 0.2) for name in mask.names())
    if method == "magnitude":
        weights = load_model(workspace / "tiny", dtype=torch.float32).state_dict()
        assert all(
            np.array_equal(mask[name], keep_by_sorting(weights[name].abs().numpy(), 0.2)) for name in mask.names()
        )


@pytest.mark.slow
def test_a_mask_of_rows(workspace: Path, tmp_path: Path) -> None:
    _, result, mask = learn(
        workspace, tmp_path, mask_train__method="magnitude", mask_train__unit="row", mask_train__ratio=0.2
    )
    assert (result["state"], result["steps"], mask.metadata.method) == ("L1 row mask", 0, "magnitude")
    assert validation_loss(workspace, workspace / "tiny", mask, ALL) == pytest.approx(result["best_loss"], abs=1e-6)
    for name in mask.names():
        rows = mask[name]
        assert (rows == rows[:, :1]).all()
        assert int((~rows[:, 0]).sum()) == removed_count(len(rows), 0.2)


@pytest.mark.slow
def test_reports_that_no_mask_helps(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, mask_train__method="magnitude", mask_train__ratio=0.9, mask_train__layers="all")
    run, source = open_run(tmp_path, "mask-train", recipe)
    listener = Interrupter(-1)
    result = mask_train(recipe, source, run, listener)
    said = any("No mask beat" in note for note in listener.notes)
    assert said is not result.document()["helps"]


@pytest.mark.slow
def test_attention_only(workspace: Path, tmp_path: Path) -> None:
    _, _, mask = learn(workspace, tmp_path, mask_train__target="attn", mask_train__method="random")
    assert {name.split(".")[3] for name in mask.names()} == {"self_attn"}


@pytest.mark.slow
def test_bf16_and_gradient_checkpointing(workspace: Path, tmp_path: Path) -> None:
    _, result, mask = learn(workspace, tmp_path, mask_train__precision="bf16", mask_train__gradient_checkpointing=True)
    assert result["best_loss"] <= result["start_loss"]
    assert mask.records[mask.names()[0]].dtype == "F32"  # dtype of the checkpoint, not of the training


@pytest.mark.slow
def test_gpt2_under_the_names_of_its_checkpoint(workspace: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=102, n_embd=32, n_layer=2, n_head=4, n_positions=128, eos_token_id=1, pad_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    build_tokenizer().save_pretrained(tmp_path / "gpt2")
    _, result, mask = learn(workspace, tmp_path, model=str(tmp_path / "gpt2"), mask_train__layers="all")
    assert set(mask.names()) <= set(tensor_index(tmp_path / "gpt2"))
    assert len(mask) == 8
    assert validation_loss(workspace, tmp_path / "gpt2", mask) == pytest.approx(result["best_loss"], abs=1e-6)


@pytest.mark.slow
def test_the_same_run_gives_the_same_mask(
    undisturbed: tuple[Run, dict[str, Any], Mask], workspace: Path, tmp_path: Path
) -> None:
    _, _, again = learn(workspace, tmp_path)
    _, _, other = learn(workspace, tmp_path, seed=7)
    mask = undisturbed[2]
    assert all(torch.equal(again[name], mask[name]) for name in mask.names())
    assert any(not torch.equal(other[name], mask[name]) for name in mask.names())


@pytest.mark.slow
def test_layers_beyond_the_model(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(MaskingError, match="does not have that many"):
        learn(workspace, tmp_path, mask_train__layers="2-4")


@pytest.mark.slow
def test_auto_cannot_scale_to_nothing(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start away from the threshold") as caught:
        learn(
            workspace,
            tmp_path,
            mask_train__start="constant",
            mask_train__start_value=0.5,
            mask_train__threshold=0.5,
        )
    assert caught.value.key == "mask_train.learning_rate"


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 12, 500])
def test_auto_learning_rate_sums_to_the_travel(steps: int, schedule: Any) -> None:
    """The sum of the scheduler's own learning rates, divided by the scale of the scores."""
    options = MaskTrainOptions(schedule=schedule)
    rate = auto_learning_rate(1.6, 0.04, schedule_factors(steps, options))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = get_scheduler(schedule, optimizer, warmup_steps(steps, options), steps)
    total = 0.0
    for _ in range(steps):
        total += optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    assert total / 0.04 == pytest.approx(1.6)
