"""Measuring another domain, and the divergence from the model before fine-tuning on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from mftctl.data.encoding import Encoded
from mftctl.data.prepared.load import load_examples
from mftctl.data.retained import split_retained
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError, DataError, Interrupted, ModelError
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_results import MeasuredMask
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.results import FftResult, RetainedLosses
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.load import load_model
from mftctl.progress import Silence
from mftctl.training import retention as module
from mftctl.training.inputs import prepare_training
from mftctl.training.loop import SftTrainer
from mftctl.training.retained_data import RetainedData
from mftctl.training.retention import Retention, summed_divergence
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from tests.conftest import build_llama
from tests.workflow_fixtures import Interrupter, encode_records, make_recipe, open_run


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of another domain: words to spell."""
    path = tmp_path_factory.mktemp("retained") / "spell.jsonl"
    words = [f"{first}{second}x" for first in "abcdef" for second in "ghijkl"]
    records = [{"question": f"spell {word}", "answer": " ".join(word)} for word in words]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def held_out(path: Path, model: Path, *, rest: bool = False) -> list[Encoded]:
    part = split_retained(load_examples([DataSource(str(path))]))[rest]
    return encode_records(part, AutoTokenizer.from_pretrained(model)).records


def test_every_seed_retains_and_measures_the_same_sample(workspace: Path, other: Path) -> None:
    digests = set()
    for seed in range(3):
        recipe = make_recipe(workspace, seed=seed, retain_data=[f"{other}=20"])
        inputs = prepare_training(recipe, str(recipe.model), max_length_tokens=64, retain_weight=1.0)
        digests.add(inputs.digests.retained)
    assert len(digests) == 1


def losses(run: Run, kind: type[FftResult | MeasuredMask]) -> RetainedLosses:
    found = run.result(kind).retained
    assert found is not None
    return found


def tune(workspace: Path, root: Path, other: Path, **changes: Any) -> Run:
    recipe = make_recipe(workspace, retain_data=[str(other)], **changes)
    run, source = open_run(root, "fft", recipe)
    run.finish(fine_tune(recipe, source, run, Silence()))
    return run


@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_divergence_equals_its_definition(positions: int, vocabulary: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    ours, theirs = generator.normal(0, 3, (2, positions, vocabulary)).astype(np.float32)
    expected = 0.0
    for mine, wanted in zip(ours.astype(float), theirs.astype(float), strict=True):
        p, q = (np.exp(row) / np.exp(row).sum() for row in (wanted, mine))
        expected += float((p * np.log(p / q)).sum())
    found = summed_divergence(torch.from_numpy(ours), torch.from_numpy(theirs))
    assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def record(number: int, tokens: int) -> Encoded:
    return Encoded([number] * tokens, [-100, *[number] * (tokens - 1)], "here")


def retention(records: list[Encoded], **options: Any) -> Retention:
    data = RetainedData(records, records, "", None)  # type: ignore[arg-type]
    chosen = FftOptions(retain_weight=1.0, **options)
    return Retention(data, chosen, seed=3, pad_token_id=0, listener=Silence(), reference=None)


@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 3))
def test_each_pass_over_the_records_has_every_one_once(records: int, batch: int, accumulated: int) -> None:
    lengths = [record(number + 1, 3 + number % 4) for number in range(records)]
    found = retention(lengths, batch_size=batch, grad_accum_steps=accumulated)
    seen: list[int] = []
    while len(seen) < 2 * records:
        step = found.step(len(seen) // (batch * accumulated), 10**6)
        assert all(len(group) <= batch for group in step.passes)
        seen += [index for group in step.passes for index in group]
    counts = np.bincount(seen, minlength=records)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_records_of_a_step(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(n + 1, 3 + n % 5) for n in range(20)]
    whole = retention(records, global_batch_size=6, batch_size=1).step(4, 100)
    parts = []
    for rank in range(processes):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(module, "world_size", lambda: processes)
        part = retention(records, global_batch_size=6, batch_size=1).step(4, 100)
        assert part.answer_tokens == whole.answer_tokens
        parts += [index for group in part.passes for index in group]
    assert sorted(parts) == sorted(index for group in whole.passes for index in group)


def test_passes_stay_within_their_limits() -> None:
    records = [record(n + 1, 3 + n % 5) for n in range(40)]
    for group in retention(records, batch_size=16).step(0, 12).passes:
        assert sum(records[index].answer_tokens for index in group) <= 12
    for group in retention(records, batch_size=16, batch_tokens=20).step(0, 10**6).passes:
        assert max(len(records[index].input_ids) for index in group) * len(group) <= 20


def first_gradients(workspace: Path, root: Path, **changes: Any) -> tuple[dict[str, torch.Tensor], Run]:
    """The gradients of the first step of a model with other weights than its checkpoint, and the run."""
    gradients: dict[str, torch.Tensor] = {}

    def keep(trainer: SftTrainer, model: torch.nn.Module, *rest: Any) -> None:
        gradients.update({name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None})

    settings = {"max_steps": 1, "val_steps": 1, "max_grad_norm": 0.0}
    recipe = make_recipe(workspace, **{f"fft__{key}": value for key, value in settings.items()}, **changes)
    run, source = open_run(root, "fft", recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SftTrainer, "_get_grad_norm", keep)
        patch.setattr("mftctl.workflows.fft._trainable_model", lambda *_: build_llama(seed=5))
        run.finish(fine_tune(recipe, source, run, Silence()))
    return gradients, run


@pytest.mark.parametrize(
    "batch",
    [
        {},
        pytest.param({"fft__batch_size": 2, "fft__grad_accum_steps": 2}, marks=pytest.mark.slow),
        pytest.param({"fft__batch_tokens": 40}, marks=pytest.mark.slow),
    ],
)
def test_a_step_adds_the_gradient_of_the_weighted_divergence(
    workspace: Path, tmp_path: Path, other: Path, batch: dict[str, Any]
) -> None:
    """Compared with a plain computation, record by record."""
    plain, _ = first_gradients(workspace, tmp_path / "plain", **batch)
    data = {"retain_data": [str(other)], "fft__retain_weight": 0.7}
    gradients, run = first_gradients(workspace, tmp_path / "retaining", **data, **batch)
    model, reference = build_llama(seed=5), build_llama()
    records = held_out(other, workspace / "tiny", rest=True)
    chosen = [records[index] for index in module._order(0, 0, len(records))[:4]]
    divergence = torch.zeros(())
    for ids, labels in ((torch.tensor(one.input_ids), torch.tensor(one.labels)) for one in chosen):
        where = (labels[1:] != -100).nonzero().squeeze(1)
        ours, theirs = (F.log_softmax(one(input_ids=ids[None]).logits[0][where], dim=-1) for one in (model, reference))
        divergence = divergence + (theirs.detach().exp() * (theirs.detach() - ours)).sum()
    divergence = divergence / sum(one.answer_tokens for one in chosen)
    [line] = [line for line in run.training.metrics() if line.divergence is not None]
    assert line.divergence == pytest.approx(float(divergence.detach()), rel=1e-4)
    (0.7 * divergence).backward()
    for name, item in model.named_parameters():
        assert item.grad is not None
        torch.testing.assert_close(gradients[name], plain[name] + item.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_without_a_weight_the_loss_is_only_measured(workspace: Path, tmp_path: Path, other: Path) -> None:
    run = tune(workspace, tmp_path / "measured", other, fft__keep="last")
    recipe = make_recipe(workspace, fft__keep="last")
    plain, source = open_run(tmp_path / "plain", "fft", recipe)
    plain.finish(fine_tune(recipe, source, plain, Silence()))
    same = [AutoModelForCausalLM.from_pretrained(one.folder / "model").state_dict() for one in (run, plain)]
    assert all(torch.equal(tensor, same[1][name]) for name, tensor in same[0].items())
    records = held_out(other, workspace / "tiny")[:12]  # as many as there are validation records
    found = losses(run, FftResult)
    assert found.records == len(records) == 12
    for folder, loss in ((workspace / "tiny", found.start_loss), (run.folder / "model", found.kept_loss)):
        model = load_model(folder, dtype=torch.float32)
        assert loss == pytest.approx(mean_loss(sample_losses(model, records, pad_token_id=0)), rel=1e-6)
    assert plain.result(FftResult).retained is None
    assert run.record.inputs["digests"].keys() - plain.record.inputs["digests"].keys() == {"retained"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "gmt", "lora", "supertuning"])
def test_a_larger_weight_keeps_the_model_closer(workspace: Path, tmp_path: Path, other: Path, method: str) -> None:
    rate = 3e-2 if method in ("lora", "supertuning") else 3e-3
    settings = {"fft__method": method, "fft__keep": "last", "fft__learning_rate": rate}

    def divergences(weight: float) -> list[float]:
        run = tune(workspace, tmp_path / str(weight), other, **settings, fft__retain_weight=weight)
        return [line.divergence for line in run.training.metrics() if line.divergence is not None]

    weak, strong = divergences(0.01), divergences(30.0)
    assert len(weak) == len(strong) == 3
    assert strong[-1] < 0.7 * weak[-1]


@pytest.mark.slow
def test_a_resumed_training_continues_with_the_same_records(workspace: Path, tmp_path: Path, other: Path) -> None:
    settings = {"fft__retain_weight": 1.0, "fft__average": "ema"}
    whole = tune(workspace, tmp_path / "whole", other, **settings)
    recipe = make_recipe(workspace, retain_data=[str(other)], **settings)
    run, source = open_run(tmp_path / "stopped", "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(6))
    run.finish(fine_tune(recipe, source, run, Silence(), resume=True))
    assert losses(run, FftResult) == losses(whole, FftResult)
    kept = [[line.document() for line in one.training.metrics() if line.eval_loss is not None] for one in (run, whole)]
    assert kept[0] == kept[1]
    assert kept[0][-1]["average_retained_losses"].keys() == {"0.1", "0.3", "1.0"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["weight", "delta"])
def test_a_mask_can_be_held_to_the_model_before_fine_tuning(
    workspace: Path, tmp_path: Path, other: Path, kind: str
) -> None:
    model = tune(workspace, tmp_path / "fft", other, fft__learning_rate=1e-2).folder / "model"

    def mask(weight: float) -> tuple[RetainedLosses, MeasuredMask]:
        recipe = make_recipe(
            workspace,
            retain_data=[str(other)],
            model=str(model),
            mask_train__kind=kind,
            mask_train__base=str(workspace / "tiny"),
            mask_train__ratio=0.3,
            mask_train__keep="last",
            mask_train__retain_weight=weight,
        )
        run, source = open_run(tmp_path / f"mask-{weight}", "mask-train", recipe)
        run.finish(mask_train(recipe, source, run, Silence()))
        return losses(run, MeasuredMask), run.result(MeasuredMask)

    free, held = mask(0.0), mask(30.0)
    unmasked = mean_loss(
        sample_losses(load_model(model, dtype=torch.float32), held_out(other, workspace / "tiny")[:12], pad_token_id=0)
    )
    assert free[0].start_loss == held[0].start_loss == pytest.approx(unmasked, rel=1e-6)
    assert held[0].kept_loss < free[0].kept_loss


def test_a_random_mask_is_measured(workspace: Path, tmp_path: Path, other: Path) -> None:
    recipe = make_recipe(workspace, retain_data=[str(other)], mask_train__method="random", mask_train__ratio=0.5)
    run, source = open_run(tmp_path, "mask-train", recipe)
    run.finish(mask_train(recipe, source, run, Silence()))
    found = losses(run, MeasuredMask)
    assert found.start_loss != found.kept_loss


def test_data_that_is_the_training_data(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is the training data") as caught:
        tune(workspace, tmp_path, workspace / "train.jsonl")
    assert caught.value.key == "retain_data"


def test_records_that_are_also_trained_on_are_left_out(workspace: Path, tmp_path: Path, other: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text((workspace / "train.jsonl").read_text() + other.read_text())
    heard = Interrupter(-1)
    recipe = make_recipe(workspace, retain_data=[str(mixed)], fft__max_steps=1, fft__val_steps=1)
    run, source = open_run(tmp_path / "runs", "fft", recipe)
    fine_tune(recipe, source, run, heard)
    assert "Retained data: left out because they are training records: 48" in heard.notes


def test_a_weight_without_data() -> None:
    with pytest.raises(ConfigError, match="retain_weight needs retain_data"):
        parse_recipe({"fft": {"retain_weight": 1.0}})


def test_a_weight_without_training(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="retain_weight applies only to learned masks"):
        make_recipe(workspace, retain_data=["a"], mask_train__method="random", mask_train__retain_weight=1.0)


def test_a_mask_without_the_model_before_fine_tuning(workspace: Path, tmp_path: Path, other: Path) -> None:
    recipe = make_recipe(workspace, retain_data=[str(other)], mask_train__retain_weight=1.0)
    run, source = open_run(tmp_path, "mask-train", recipe)
    with pytest.raises(ConfigError, match="--retain-weight needs the model before fine-tuning") as caught:
        mask_train(recipe, source, run, Silence())
    assert caught.value.key == "mask_train.base"


def test_a_model_before_fine_tuning_with_another_vocabulary(workspace: Path, tmp_path: Path, other: Path) -> None:
    build_llama(vocab_size=110).save_pretrained(tmp_path / "larger")
    settings = {"mask_train__retain_weight": 1.0, "mask_train__base": str(tmp_path / "larger")}
    recipe = make_recipe(workspace, retain_data=[str(other)], **settings)
    run, source = open_run(tmp_path / "runs", "mask-train", recipe)
    with pytest.raises(ModelError, match="different vocabulary") as caught:
        mask_train(recipe, source, run, Silence())
    assert (caught.value.expected, caught.value.actual) == (102, 110)


def test_a_weight_under_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="whole parameters") as caught:
        module._require_whole_parameters()
    assert caught.value.key == "retain_weight"
