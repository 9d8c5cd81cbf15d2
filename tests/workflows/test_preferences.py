"""Training on preferences: all methods, masks and probes; resumption, and the cached reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from mftctl import load_mask
from mftctl.data.batching import LengthGroupedSampler
from mftctl.data.encoding import Encoded
from mftctl.data.formats import to_example
from mftctl.data.prepared.records import token_lengths
from mftctl.errors import ConfigError, DataError, Interrupted
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_results import MaskTrainResult, MeasuredMask
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.results import FftResult
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.load import load_model
from mftctl.progress import Silence
from mftctl.training.reference import turn_off_dropout
from mftctl.training.schedule import schedule_factors
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from mftctl.workflows.validate import validate
from tests.conftest import build_tokenizer
from tests.preference_records import preference_records, write_preferences
from tests.workflow_fixtures import Interrupter, encode_records, make_recipe, open_run

BEFORE = math.log(2)


class Notes(Silence):
    """Collects what a user is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)

    def warn(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with preferences to train and validate on."""
    folder = tmp_path_factory.mktemp("preferences")
    write_preferences(folder / "train.jsonl", 24, "turns", seed=1)
    write_preferences(folder / "val.jsonl", 16, "turns", seed=2)
    return folder


def options(files: Path, **changes: Any) -> dict[str, Any]:
    """Changes of a recipe for the workspace to one that trains on preferences."""
    training = {"objective": "dpo", "max_steps": 6, "batch_size": 4, "val_steps": 3}
    found = {"data": [str(files / "train.jsonl")], "val_data": [str(files / "val.jsonl")], "test_data": []}
    of_masks = {**training, "layers": "all", "learning_rate": 3e-3}
    return {**found, "fft": {**training, "learning_rate": 3e-3}, "mask_train": of_masks, **changes}


def tune(workspace: Path, root: Path, listener: Any = None, **changes: Any) -> tuple[Run, FftResult]:
    recipe = make_recipe(workspace, **changes)
    run, source = open_run(root, "fft", recipe)
    return run, fine_tune(recipe, source, run, listener or Silence())


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(workspace: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, FftResult]:
    return tune(workspace, tmp_path_factory.mktemp("undisturbed"), **options(files))


@pytest.mark.slow
def test_the_validation_loss_falls_and_chosen_answers_are_rewarded(undisturbed: tuple[Run, FftResult]) -> None:
    run, result = undisturbed
    assert result.state == "DPO"
    assert result.start_loss == pytest.approx(BEFORE, abs=1e-12)
    assert result.best_loss < BEFORE - 0.01
    assert result.rewards is not None
    assert result.rewards.accuracy > 0.8
    assert result.rewards.margin == pytest.approx(result.rewards.chosen - result.rewards.rejected)
    lines = {line.step: line for line in run.training.metrics() if line.eval_loss is not None}
    assert lines[0].rewards == {"chosen": 0.0, "rejected": 0.0, "accuracy": 0.0, "margin": 0.0}
    assert lines[result.best_step].rewards == result.rewards.document()
    # Per step, 4 preferences of two sequences.
    records = encoded(preference_records(24, "turns", seed=1))
    assert result.tokens == sum(record.tokens for record in records)


def encoded(records: list[dict[str, Any]]) -> list[Encoded]:
    examples = [to_example(record, f"train.jsonl:{number}") for number, record in enumerate(records)]
    return list(encode_records(examples, build_tokenizer()).records)


def summed(model: nn.Module, side: Encoded) -> torch.Tensor:
    """The log-probability of an answer, without batches or padding."""
    labels = torch.tensor(side.labels[1:])
    found = model(input_ids=torch.tensor([side.input_ids])).logits[0, :-1].log_softmax(-1)
    answer = (labels != -100).nonzero().squeeze(1)
    return found[answer, labels[answer]].sum()


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [{"batch_size": 2, "grad_accum_steps": 3}, {"batch_tokens": 80, "global_batch_size": 6}]
)
def test_equals_a_plain_loop(workspace: Path, files: Path, tmp_path: Path, size: dict[str, int]) -> None:
    """Accumulated micro-batches and those of a token budget are parts of one mean over the preferences of a step."""
    steps, rate = 3, 3e-3
    changes = options(files)
    changes["fft"] |= {
        "max_steps": steps,
        "keep": "last",
        "beta": 0.2,
        "length_normalized": True,
        "batch_size": 6,
        **size,
    }
    run, _ = tune(workspace, tmp_path, **changes)
    model = load_model(workspace / "tiny", dtype=torch.float32)
    reference = load_model(workspace / "tiny", dtype=torch.float32)
    records = encoded(preference_records(24, "turns", seed=1))
    order = list(LengthGroupedSampler(token_lengths(records), size.get("batch_size", 6), 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    factors = schedule_factors(steps, FftOptions(max_steps=steps))
    for step in range(steps):
        chosen = [records[index] for index in order[6 * step : 6 * step + 6]]
        losses = []
        for record in chosen:
            ratios = []
            for side in record.sides:
                with torch.no_grad():
                    before = summed(reference, side)
                ratios.append(0.2 * (summed(model, side) - before) / side.answer_tokens)
            losses.append(-nn.functional.logsigmoid(ratios[0] - ratios[1]))
        torch.stack(losses).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * factors[step]
        optimizer.step()
        optimizer.zero_grad()
    expected = model.state_dict()
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"method": "gmt"}, "GMT DPO"),
        ({"method": "random", "ratio": 0.5}, "random update DPO"),
        ({"method": "hft"}, "HFT DPO"),
        ({"method": "lora", "learning_rate": 2e-2, "merge": True}, "LoRA DPO"),
        ({"low_memory": True, "average": "ema", "average_horizons": [1.0]}, "DPO"),
        ({"length_normalized": True, "beta": 1.0, "gradient_checkpointing": True}, "DPO"),
    ],
    ids=["gmt", "random", "hft", "lora", "low memory and averages", "length-normalised"],
)
def test_every_method_learns_preferences(
    workspace: Path, files: Path, tmp_path: Path, changes: dict[str, Any], state: str
) -> None:
    given = options(files)
    given["fft"] |= changes
    run, result = tune(workspace, tmp_path, **given)
    assert result.state == state
    assert result.start_loss == pytest.approx(BEFORE, abs=1e-6)
    assert result.best_loss < BEFORE
    assert result.rewards is not None
    assert result.rewards.margin > 0
    if "average" in changes:
        last = [line for line in run.training.metrics() if line.eval_loss is not None][-1]
        assert last.average_rewards["1.0"].keys() == last.rewards.keys()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_resuming_gives_the_identical_model(
    undisturbed: tuple[Run, FftResult], workspace: Path, files: Path, tmp_path: Path, method: str
) -> None:
    changes = options(files)
    changes["fft"] |= {"method": method, "merge": True} if method == "lora" else {}
    run, expected = undisturbed if method == "full" else tune(workspace, tmp_path / "whole", **changes)
    recipe = make_recipe(workspace, **changes)
    resumed, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, resumed, Interrupter(4))
    result = fine_tune(recipe, source, resumed, Silence(), resume=True)
    assert (result.best_loss, result.best_step, result.rewards) == (
        expected.best_loss,
        expected.best_step,
        expected.rewards,
    )
    found = weights(resumed)
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights(run).items())


@pytest.mark.slow
def test_the_reference_is_measured_once(
    undisturbed: tuple[Run, FftResult], workspace: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = undisturbed
    again, without, other = Notes(), Notes(), Notes()
    found, _ = tune(workspace, tmp_path, again, **options(files))
    cached = [text for text in again.texts if text.endswith("from the cache")]
    assert [text.split()[3] for text in cached] == ["24", "16"]
    monkeypatch.setenv("MFTCTL_CACHE", "off")
    fresh, _ = tune(workspace, tmp_path, without, **options(files))
    assert not any(text.endswith("from the cache") for text in without.texts)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(found)[name])
        assert torch.equal(tensor, weights(fresh)[name])
    # Another model with the same records, as it is after the training.
    monkeypatch.undo()
    tune(workspace, tmp_path, other, **options(files, model=str(run.folder / "model")))
    assert not any(text.endswith("from the cache") for text in other.texts)


def learn(workspace: Path, root: Path, listener: Any = None, **changes: Any) -> tuple[Run, MaskTrainResult]:
    recipe = make_recipe(workspace, **changes)
    run, source = open_run(root, "mask-train", recipe)
    return run, mask_train(recipe, source, run, listener or Silence())


@pytest.mark.slow
def test_a_mask_lowers_the_validation_loss_and_is_resumed(workspace: Path, files: Path, tmp_path: Path) -> None:
    changes = options(files)
    changes["mask_train"] |= {"max_steps": 12, "val_steps": 4, "learning_rate": 1e-2}
    _, result = learn(workspace, tmp_path, **changes)
    assert isinstance(result, MeasuredMask)
    assert result.state == "MFT DPO"
    assert result.unmasked_loss == result.start_loss == pytest.approx(BEFORE, abs=1e-12)
    assert result.best_loss < BEFORE
    assert result.helps
    assert result.rewards is not None
    assert result.rewards.accuracy > 0.5
    assert result.confirmation is not None
    assert (result.confirmation.records, result.confirmation.unmasked_loss) == (8, pytest.approx(BEFORE))
    recipe = make_recipe(workspace, **changes)
    resumed, source = open_run(tmp_path, "mask-train", recipe)
    with pytest.raises(Interrupted):
        mask_train(recipe, source, resumed, Interrupter(6))
    again = mask_train(recipe, source, resumed, Silence(), resume=True)
    masks = [load_mask(Path(one.mask)) for one in (result, again)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0].names())
    assert isinstance(again, MeasuredMask)
    assert (again.best_loss, again.rewards) == (result.best_loss, result.rewards)


@pytest.mark.slow
def test_hidden_states_of_the_frozen_layers_change_nothing(workspace: Path, files: Path, tmp_path: Path) -> None:
    found = []
    for limit_gb in (0.0, None):
        changes = options(files)
        changes["mask_train"] |= {"layers": "2-3", "max_steps": 12, "prefix_cache_gb": limit_gb}
        found.append(learn(workspace, tmp_path, **changes)[1])
    masks = [load_mask(Path(result.mask)) for result in found]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0].names())
    assert isinstance(found[1], MeasuredMask)
    assert found[1].prefix_reuse.reused > 0


@pytest.mark.slow
def test_a_probe_ranks_layers_by_the_loss_of_preferences(workspace: Path, files: Path, tmp_path: Path) -> None:
    changes = options(files, probe={"groups": [2], "data_fraction": 0.5})
    changes["mask_train"] |= {"learning_rate": 1e-2}
    recipe = make_recipe(workspace, **changes)
    run, source = open_run(tmp_path, "probe", recipe)
    result = probe(recipe, source, run, Silence())
    assert [group.start_loss for group in result.groups] == pytest.approx([BEFORE] * 2)
    assert min(group.change for group in result.groups) < 0


@pytest.mark.slow
def test_other_data_can_be_retained(workspace: Path, files: Path, tmp_path: Path) -> None:
    words = [f"{first}{second}" for first in "abcd" for second in "efgh"]
    other = tmp_path / "other.jsonl"
    other.write_text(
        "".join(json.dumps({"question": f"spell {word}", "answer": " ".join(word)}) + "\n" for word in words)
    )
    changes = options(files, retain_data=[str(other)])
    changes["fft"] |= {"retain_weight": 0.5}
    _, result = tune(workspace, tmp_path / "runs", **changes)
    assert result.state == "DPO retaining"
    assert result.retained is not None
    assert result.best_loss < BEFORE


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("fft", {"objective": "sft", "beta": 0.1}, "beta applies only to the objective dpo"),
        ("fft", {"objective": "sft", "length_normalized": True}, "length_normalized applies only to the objective dpo"),
        ("fft", {"best_by": "exact_match"}, "exact_match needs reference answers"),
        ("fft", {"method": "lora", "lora_dropout": 0.1}, "without dropout"),
        ("fft", {"method": "supertuning"}, "dpo trains with full, lora, gmt, hft or random"),
        ("mask_train", {"ratio": "auto"}, "does not apply to objective dpo"),
        ("fft", {"beta": 0.0}, "greater than 0"),
        ("fft", {"objective": "kto"}, "objective"),
        ("mask_train", {"method": "magnitude"}, "mask_train.objective applies only to learned masks"),
        ("mask_train", {"method": "drop"}, "mask_train.objective applies only to learned masks"),
        ("mask_train", {"objective": "sft", "beta": 0.1}, "beta applies only to the objective dpo"),
    ],
)
def test_options_that_do_not_go_together(section: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValidationError), match=message):
        parse_recipe({section: {"objective": "dpo", **changes}})


def test_defaults_follow_the_objective() -> None:
    recipe = parse_recipe({"fft": {"objective": "dpo"}, "mask_train": {"objective": "dpo", "beta": 0.5}})
    assert (recipe.fft.beta, recipe.fft.learning_rate, recipe.mask_train.beta) == (0.1, 1e-6, 0.5)
    assert (FftOptions().beta, FftOptions().learning_rate) == (None, 2e-5)
    assert FftOptions(objective="dpo", learning_rate=2e-5).learning_rate == 2e-5


@pytest.mark.parametrize("command", ["fft", "mask-train"])
def test_data_of_the_other_kind(workspace: Path, files: Path, tmp_path: Path, command: str) -> None:
    work: Any = fine_tune if command == "fft" else mask_train
    answers = [str(workspace / "train.jsonl")]
    preferences = options(files, fft={}, mask_train={})
    for changes, message in (
        (preferences, "cannot be used as single answers"),
        (options(files, data=answers), "DPO needs preferences"),
        (options(files, val_data=answers), "DPO needs preferences"),
    ):
        recipe = make_recipe(workspace, **changes)
        run, source = open_run(tmp_path, command, recipe)
        with pytest.raises(DataError, match=message):
            work(recipe, source, run, Silence())


@pytest.mark.parametrize("command", ["fft", "mask-train", "probe"])
def test_shared_weights_are_refused_before_they_are_loaded(
    workspace: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("mftctl.training.reference.shares_weights", lambda: True)
    work: Any = {"fft": fine_tune, "mask-train": mask_train, "probe": probe}[command]
    recipe = make_recipe(workspace, **options(files))
    run, source = open_run(tmp_path, command, recipe)
    with pytest.raises(ConfigError, match="needs the whole model in each process") as caught:
        work(recipe, source, run, Silence())
    assert caught.value.key == "objective"


@pytest.mark.parametrize("changes", [{"fast": True}, {"by": "exact_match"}])
def test_probes_that_need_answers(workspace: Path, files: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = make_recipe(workspace, **options(files, probe=changes))
    run, source = open_run(tmp_path, "probe", recipe)
    with pytest.raises(ConfigError, match="does not work on preferences"):
        probe(recipe, source, run, Silence())


def test_dropout_is_turned_off() -> None:
    notes, model = Notes(), nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2), nn.Dropout(0.0))
    turn_off_dropout(model, notes)
    turn_off_dropout(model, notes)
    assert [layer.p for layer in model if isinstance(layer, nn.Dropout)] == [0.0, 0.0]
    assert notes.texts == ["Dropout is off: the objective is dpo."]


@pytest.mark.slow
def test_validate_counts_both_answers(workspace: Path, files: Path) -> None:
    recipe = make_recipe(workspace, **options(files))
    found = validate(recipe, None)
    records = encoded(preference_records(24, "turns", seed=1))
    tokens = found.data["train"].tokens
    assert found.problems == []
    assert tokens is not None
    assert (tokens.tokens, tokens.answer_tokens) == (
        sum(r.tokens for r in records),
        sum(r.answer_tokens for r in records),
    )
    stage = next(stage for stage in found.stages if stage.command == "fft")
    assert stage.tokens_per_step == round(tokens.tokens / 24 * 4)
    memory = {item.stage: item for item in found.memory}
    assert memory["fft"].records == 8
    # As many sequences of single answers need about as much.
    plain = validate(make_recipe(workspace, fft__batch_size=8), None)
    single = next(item for item in plain.memory if item.stage == "fft")
    both = [item.estimate.activations_bytes / item.length_tokens for item in (memory["fft"], single)]
    assert both[0] == pytest.approx(both[1], rel=0.2)


def test_validate_reports_data_of_the_other_kind(workspace: Path, files: Path) -> None:
    found = validate(make_recipe(workspace, **options(files, mask_train={})), None)
    [problem] = found.problems
    assert problem.startswith("mask-train: Preference data cannot be used as single answers")
