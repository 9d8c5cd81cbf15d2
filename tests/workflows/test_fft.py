"""Fine-tuning compared with a plain torch loop, its resumption, and the states that it keeps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftctl.data.batching import LengthGroupedSampler
from mftctl.data.encoding import Encoded
from mftctl.data.prepared.load import load_examples
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError, DataError, Interrupted, StorageError, TrainingError
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.experiments.model_origin import origin_of
from mftctl.experiments.recording import recorded
from mftctl.experiments.run_folder import Run, load_run
from mftctl.masking.checkpoints.load import load_model
from mftctl.progress import Silence
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.tuned_model import GoesWith, save_model
from tests.conftest import build_llama
from tests.workflow_fixtures import Interrupter, encode_records, make_recipe, open_run


def encoded(path: Path, model: Path) -> list[Encoded]:
    return encode_records(load_examples([DataSource(str(path))]), AutoTokenizer.from_pretrained(model)).records


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def plain_loop(records: list[Encoded], *, steps: int, batch_size: int, accumulate: int, lr: float) -> torch.nn.Module:
    """AdamW on the sum of answer-token losses divided by the answer tokens of the whole optimizer step."""
    model = build_llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    sampler = LengthGroupedSampler([len(record.input_ids) for record in records], batch_size, 0)
    order = list(sampler)
    warmup = 1
    for step in range(steps):
        micro = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        micro = micro[step * accumulate : (step + 1) * accumulate]
        tokens = sum(label != -100 for batch in micro for index in batch for label in records[index].labels[1:])
        for batch in micro:
            for index in batch:
                ids, labels = torch.tensor(records[index].input_ids), torch.tensor(records[index].labels)
                logits = model(input_ids=ids[None]).logits[0]
                (F.cross_entropy(logits[:-1], labels[1:], reduction="sum") / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        factor = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.slow
def test_equals_a_plain_loop_over_accumulated_batches(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__max_steps=4, fft__grad_accum_steps=3, fft__val_steps=4, fft__keep="last")
    run, source = open_run(tmp_path, "fft", recipe)
    fine_tune(recipe, source, run, Silence())
    records = encoded(workspace / "train.jsonl", workspace / "tiny")
    expected = plain_loop(records, steps=4, batch_size=4, accumulate=3, lr=3e-3).state_dict()
    for name, tensor in weights(run.folder / "model").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def undisturbed(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = make_recipe(workspace)
    run, source = open_run(tmp_path_factory.mktemp("undisturbed"), "fft", recipe)
    run.finish(fine_tune(recipe, source, run, Silence()))
    return run


@pytest.mark.slow
def test_learns_and_keeps_the_best_state(undisturbed: Run, workspace: Path) -> None:
    result = undisturbed.record.result
    logged = {line.step: line.eval_loss for line in undisturbed.training.metrics() if line.eval_loss is not None}
    assert set(logged) == {0, 4, 8, 12}
    assert result["start_loss"] == logged[0]
    assert result["best_loss"] == min(logged[step] for step in (4, 8, 12)) < logged[0]
    model = load_model(undisturbed.folder / "model", dtype=torch.float32)
    losses = sample_losses(model, encoded(workspace / "val.jsonl", workspace / "tiny"), pad_token_id=0)
    assert mean_loss(losses) == pytest.approx(result["best_loss"], abs=1e-6)


def test_a_finished_run_keeps_no_training_state(undisturbed: Run) -> None:
    assert not undisturbed.training.checkpoints.exists()
    assert load_run(undisturbed.folder).record.status == "finished"
    assert (undisturbed.folder / "model" / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 4, 10])
def test_resuming_gives_the_identical_model(undisturbed: Run, workspace: Path, tmp_path: Path, step: int) -> None:
    recipe = make_recipe(workspace)
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted, match=f"after step {step} of 12") as caught:
        fine_tune(recipe, source, run, Interrupter(step))
    assert str(caught.value.hint).startswith("mftctl fft --resume --runs ")
    assert caught.value.exit_code == 130
    assert not (run.folder / "model").exists()
    listener = Interrupter(step=-1)
    result = fine_tune(recipe, source, run, listener, resume=True).document()
    assert f"Resuming after step {step} of 12" in listener.notes
    expected = undisturbed.record.result
    for key in ("start_loss", "best_loss", "last_loss", "best_step", "steps", "tokens"):
        assert result[key] == expected[key], key
    before, after = weights(undisturbed.folder / "model"), weights(run.folder / "model")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert _losses(run) == _losses(undisturbed)


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    undisturbed: Run, workspace: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(workspace)
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(2))
    shutil.rmtree(run.training.checkpoints)
    listener = Interrupter(step=-1)
    fine_tune(recipe, source, run, listener, resume=True)
    assert "Nothing was saved before the run ended: training restarts at step 1" in listener.notes
    assert _losses(run) == _losses(undisturbed)


@pytest.mark.slow
def test_resuming_skips_a_half_written_checkpoint(undisturbed: Run, workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace)
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(6))
    broken = run.training.checkpoints / "checkpoint-7"
    broken.mkdir()
    (broken / "model.safetensors").write_bytes(b"half")
    (broken / "trainer_state.json").write_text('{"global_step": 7')
    fine_tune(recipe, source, run, Silence(), resume=True)
    before, after = weights(undisturbed.folder / "model"), weights(run.folder / "model")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"fft__keep": "last"}, {}, {"fft__learning_rate": 0.5, "fft__patience": 1}],
    ids=["last", "best", "out of patience"],
)
def test_resuming_after_the_last_step_takes_none(workspace: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """As after a kill while the model was being written."""
    recipe = make_recipe(workspace, **changes)
    run, source = open_run(tmp_path, "fft", recipe)
    before = fine_tune(recipe, source, run, Silence()).document()
    expected, metrics = weights(run.folder / "model"), run.training.metrics()
    shutil.rmtree(run.folder / "model")
    after = fine_tune(recipe, source, run, Silence(), resume=True).document()
    assert {**after, "peak_memory_bytes": 0} == {**before, "peak_memory_bytes": 0}
    assert run.training.metrics() == metrics
    found = weights(run.folder / "model")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.slow
def test_a_checkpoint_on_a_full_disk(
    undisturbed: Run, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch reports a full disk like other failures; training resumes from what was saved before."""
    recipe = make_recipe(workspace)
    run, source = open_run(tmp_path, "fft", recipe)
    save = torch.save

    def save_until_full(content: object, path: str, **options: Any) -> None:
        if "checkpoint-8" in path:
            raise RuntimeError("unexpected pos 64 vs 0")
        save(content, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_until_full)
        with pytest.raises(StorageError, match="step 8 could not") as caught, recorded(run):
            fine_tune(recipe, source, run, Silence())
    assert caught.value.actual == "unexpected pos 64 vs 0"
    assert [path.name for path in run.training.checkpoints.iterdir()] == ["checkpoint-4"]
    assert load_run(run.folder).record.status == "interrupted"
    fine_tune(recipe, source, run, Silence(), resume=True)
    found = weights(run.folder / "model")
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(undisturbed.folder / "model").items())


def test_a_model_on_a_full_disk(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.txt").write_text("old")

    def fill(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    model = build_llama()
    monkeypatch.setattr(model, "save_pretrained", fill)
    goes_with = GoesWith({}, origin_of("FFT", "base", ""), tmp_path / "base", ())
    with pytest.raises(StorageError, match="model could not be written") as caught:
        save_model(model, tokenizer, tmp_path / "model", goes_with)
    assert "No space left" in str(caught.value)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old.txt"]


@pytest.mark.slow
def test_keep_last_keeps_the_last_state(workspace: Path, tmp_path: Path) -> None:
    few = [f"{workspace / 'train.jsonl'}=4"]  # to be memorised
    recipe = make_recipe(workspace, data=few, fft__keep="last", fft__learning_rate=2e-2, fft__max_steps=48)
    run, source = open_run(tmp_path, "fft", recipe)
    result = fine_tune(recipe, source, run, Silence()).document()
    model = load_model(run.folder / "model", dtype=torch.float32)
    losses = sample_losses(model, encoded(workspace / "val.jsonl", workspace / "tiny"), pad_token_id=0)
    assert mean_loss(losses) == pytest.approx(result["last_loss"], abs=1e-6)
    assert result["last_loss"] != result["best_loss"]


@pytest.mark.slow
def test_patience_ends_the_training(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__max_steps=40, fft__val_steps=2, fft__learning_rate=0.5, fft__patience=2)
    run, source = open_run(tmp_path, "fft", recipe)
    result = fine_tune(recipe, source, run, Silence()).document()
    assert result["steps"] == result["best_step"] + 4 < 40


@pytest.mark.slow
def test_epochs_give_the_steps(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__max_steps=None, fft__epochs=1.5, fft__batch_size=5, fft__grad_accum_steps=3)
    run, source = open_run(tmp_path, "fft", recipe)
    assert (
        fine_tune(recipe, source, run, Silence()).document()["steps"] == 6
    )  # 48 records: 10 batches, 4 steps per epoch


@pytest.mark.slow
def test_bf16_and_gradient_checkpointing_train(workspace: Path, tmp_path: Path, undisturbed: Run) -> None:
    recipe = make_recipe(workspace, fft__precision="bf16", fft__gradient_checkpointing=True)
    run, source = open_run(tmp_path, "fft", recipe)
    result = fine_tune(recipe, source, run, Silence()).document()
    assert result["best_loss"] == pytest.approx(undisturbed.record.result["best_loss"], abs=0.05)


@pytest.mark.slow
def test_a_loss_that_is_not_finite(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, fft__learning_rate=1e30, fft__max_grad_norm=0)
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(TrainingError, match="no longer finite") as caught:
        fine_tune(recipe, source, run, Silence())
    assert caught.value.hint == "use a lower --lr"


def test_a_recipe_without_data(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, data=[])
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(ConfigError, match="needs data"):
        fine_tune(recipe, source, run, Silence())


def test_a_bad_record_stops_before_any_training(workspace: Path, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n" + json.dumps({"query": "1"}) + "\n")
    recipe = make_recipe(workspace, data=[str(data)])
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(DataError, match="format") as caught:
        fine_tune(recipe, source, run, Silence())
    assert caught.value.path == f"{data}:2" or caught.value.path.endswith("bad.jsonl:2")
    assert not run.training.checkpoints.exists()


def _losses(run: Run) -> list[tuple[int, float | None, float | None]]:
    """Logged values of each step, without times; a line at the end of training has neither loss."""
    lines = [(line.step, line.loss, line.eval_loss) for line in run.training.metrics()]
    return [line for line in lines if line[1:] != (None, None)]
