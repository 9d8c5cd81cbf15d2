"""Micro-batches by token budget: their contents, and the same training result as with any other split."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from mftctl.data.batching import LengthGroupedSampler, PaddingCollator, ProcessBatches
from mftctl.data.encoding import Encoded
from mftctl.errors import Interrupted
from mftctl.experiments.run_folder import Run
from mftctl.masking.mask import load_mask
from mftctl.progress import Silence
from mftctl.training.step_trainer import StepTrainer
from mftctl.training.token_batches import (
    MICRO_BATCHES,
    StepBatches,
    StepCollator,
    StepRecords,
    StepSize,
    packed,
    shared_out,
)
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from tests.workflow_fixtures import Interrupter, make_recipe, make_workspace, open_run

lengths_of_records = st.lists(st.integers(1, 60), min_size=1, max_size=40)
processes = st.integers(1, 5)
budgets = st.integers(1, 200)


@given(lengths_of_records, budgets, processes)
def test_every_record_is_in_one_micro_batch_within_the_budget(lengths: list[int], budget: int, world_size: int) -> None:
    shares = shared_out(range(len(lengths)), lengths, budget, world_size)
    batches = [batch for share in shares for batch in share]
    assert sorted(index for batch in batches for index in batch if index >= 0) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    for batch in batches:
        assert batch[0] >= 0 or len(batch) == 1  # a padding record is alone
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget


@pytest.mark.slow
@given(lengths_of_records, budgets, processes, st.randoms())
def test_the_same_records_give_the_same_micro_batches(
    lengths: list[int], budget: int, world_size: int, random: Any
) -> None:
    shuffled = list(range(len(lengths)))
    random.shuffle(shuffled)
    assert shared_out(shuffled, lengths, budget, world_size) == shared_out(
        range(len(lengths)), lengths, budget, world_size
    )


def test_records_of_similar_length_are_batched_together() -> None:
    lengths = [100, 95, 300, 94, 290, 700]
    (share,) = shared_out(range(6), lengths, 640, 1)
    assert share == [[5], [2, 4], [0, 1, 3]]
    assert packed([5, 2, 4, 0, 1, 3], lengths, 2100) == [
        [5],
        [2, 4],
        [0, 1, 3],
    ]  # padding costs more than additional passes
    assert packed([0, 1, 3], lengths, 2100) == [[0, 1, 3]]


@given(lengths_of_records, budgets)
def test_splits_minimise_the_cost_of_passes_and_padding(lengths: list[int], budget: int) -> None:
    """Compared with every possible split of the first records."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])[:8]

    def cost(batches: list[list[int]]) -> float:
        return sum(len(batch) * lengths[batch[0]] + budget / 16 for batch in batches)

    ways = []
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        batches = [[order[0]]]
        for index, cut in zip(order[1:], cuts, strict=True):
            if cut:
                batches.append([])
            batches[-1].append(index)
        if all(len(batch) == 1 or len(batch) * lengths[batch[0]] <= budget for batch in batches):
            ways.append(cost(batches))
    assert cost(packed(order, lengths, budget)) == pytest.approx(min(ways))


def test_processes_without_a_micro_batch_get_a_record_with_nothing_to_learn() -> None:
    lengths = [10, 3]
    assert shared_out([0, 1], lengths, 5, 3) == [[[0]], [[1]], [[-2]]]
    records = [Encoded([5] * length, [-100, *[5] * (length - 1)], "f") for length in lengths]
    (filler,) = StepRecords(records)[[-2]]
    assert len(filler.input_ids) == 3
    assert set(filler.labels) == {-100}


@pytest.mark.slow
@given(lengths_of_records, st.integers(1, 4), st.integers(1, 4), processes, budgets)
def test_a_step_has_the_records_of_a_fixed_batch_size(
    lengths: list[int], batch_size: int, accumulation: int, world_size: int, budget: int
) -> None:
    order = LengthGroupedSampler(lengths, batch_size, 3)
    size = StepSize(batch_size * accumulation * world_size, budget)
    by_tokens = [list(StepBatches(order, size, rank, world_size)) for rank in range(world_size)]
    by_records = [list(ProcessBatches(order, batch_size, rank, world_size)) for rank in range(world_size)]
    steps = -(-len(by_records[0]) // accumulation)
    assert len(StepBatches(order, size, 0, world_size)) == steps
    for step in range(steps):
        mine = [batch for share in by_tokens for batch in share[step]]
        part = slice(step * accumulation, (step + 1) * accumulation)
        theirs = [batch for share in by_records for batch in share[part]]
        found = [sorted(i for i in itertools.chain(*batches) if i >= 0) for batches in (mine, theirs)]
        assert found[0] == found[1]


def test_a_step_is_collated_micro_batch_by_micro_batch() -> None:
    records = [Encoded([5] * length, [5] * length, "f") for length in (4, 2, 1)]
    step = StepCollator(PaddingCollator(0))([records[:2], records[2:]])
    assert [batch["input_ids"].shape for batch in step[MICRO_BATCHES]] == [(2, 4), (1, 1)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def fine_tuned(workspace: Path, folder: Path, **changes: Any) -> tuple[Run, dict[str, Any]]:
    settings = {"fft__max_steps": None, "fft__epochs": 2, "fft__keep": "last", "fft__val_steps": 2, **changes}
    run, source = open_run(folder, "fft", recipe := make_recipe(workspace, **settings))
    return run, fine_tune(recipe, source, run, Silence()).document()


def weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(run.folder / "model").state_dict())


@pytest.mark.slow
def test_fine_tuning_equals_that_with_a_fixed_batch_size(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """48 records in steps of 20: the last step of an epoch has 8."""
    run, expected = fine_tuned(workspace, tmp_path / "a", fft__batch_size=4, fft__grad_accum_steps=5)
    shapes = counted_passes(monkeypatch)
    other, result = fine_tuned(
        workspace, tmp_path / "b", fft__batch_size=4, fft__global_batch_size=20, fft__batch_tokens=150
    )
    assert result["steps"] == expected["steps"] == 6
    assert result["tokens"] == expected["tokens"]
    assert all(rows * length <= 150 for rows, length in shapes)
    assert len(shapes) < 2 * 12  # forward passes of 4 records
    assert result["last_loss"] == pytest.approx(expected["last_loss"], abs=2e-5)
    losses = [[line.loss for line in item.training.metrics() if line.loss is not None] for item in (run, other)]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)
    theirs = weights(run)
    for name, tensor in weights(other).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-4)


def counted_passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes of all later training batches."""
    shapes: list[tuple[int, int]] = []
    call = nn.Module.__call__

    def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if module.training and hasattr(module, "get_output_embeddings") and "input_ids" in kwargs:
            if hasattr(module, "lm_head"):
                shapes.append(tuple(kwargs["input_ids"].shape))
        return call(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", counting)
    return shapes


@pytest.mark.slow
def test_a_resumed_training_by_tokens_is_identical(workspace: Path, tmp_path: Path) -> None:
    changes = {"fft__global_batch_size": 20, "fft__batch_tokens": 150}
    run, expected = fine_tuned(workspace, tmp_path / "whole", **changes)
    settings = {"fft__max_steps": None, "fft__epochs": 2, "fft__keep": "last", "fft__val_steps": 2, **changes}
    other, source = open_run(tmp_path / "stopped", "fft", recipe := make_recipe(workspace, **settings))
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, other, Interrupter(4))
    result = fine_tune(recipe, source, other, Silence(), resume=True).document()
    for key in ("start_loss", "best_loss", "last_loss", "steps", "tokens"):
        assert result[key] == expected[key], key
    theirs = weights(run)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(other).items())


@pytest.mark.slow
@pytest.mark.parametrize(("records", "reused"), [(20, 0), (48, 1)])
def test_hidden_states_are_reused_where_micro_batches_repeat(
    workspace: Path, tmp_path: Path, records: int, reused: int
) -> None:
    """With all records in one step, micro-batches repeat every epoch; otherwise only those of validation do."""
    changes: dict[str, Any] = {"max_steps": None, "epochs": 2, "global_batch_size": records, "batch_tokens": 150}
    changes |= {"val_steps": 1, "patience": 100}
    recipe = make_recipe(workspace, **{f"mask_train__{key}": value for key, value in changes.items()})
    found = {}
    for gigabytes in (0.0, 1.0):
        section = recipe.mask_train.model_copy(update={"prefix_cache_gb": gigabytes})
        settled = recipe.model_copy(update={"mask_train": section})
        listener = Remembering()
        run, source = open_run(tmp_path / str(gigabytes), "mask-train", settled)
        result = mask_train(settled, source, run, listener).document()
        found[gigabytes] = (result["best_loss"], load_mask(run.folder / "mask.bits"), result["prefix_reuse"])
        said = any("reused only in validation" in note for note in listener.notes)
        assert said == (gigabytes > 0 and not reused)
    assert found[0.0][0] == found[1.0][0]
    masks = [found[gigabytes][1] for gigabytes in (0.0, 1.0)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0].names())
    kept = found[1.0][2]["batches"]
    validations = 2  # one batch of deciding records, and one of confirming records
    assert (kept > validations) == bool(reused)


class Remembering(Silence):
    """A listener that records notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.slow
def test_token_counts_are_read_from_the_device_once_per_step(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    track = StepTrainer._track_num_input_tokens

    def counting(trainer: Any, inputs: dict[str, Any]) -> None:
        asked.append(len(inputs[MICRO_BATCHES]))
        track(trainer, inputs)

    monkeypatch.setattr(StepTrainer, "_track_num_input_tokens", counting)
    run, result = fine_tuned(workspace, tmp_path, fft__global_batch_size=20, fft__batch_tokens=60)
    assert len(asked) == result["steps"]
    assert max(asked) > 2
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == result["steps"]
