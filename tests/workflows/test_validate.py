"""The `validate` workflow: its output for valid recipes, and all problems it finds at once."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from mftctl.data.encoding import EncodedRecords
from mftctl.data.prepared.examples import Examples
from mftctl.data.prepared.load import load_examples
from mftctl.data.retained import split_retained, without_training_records
from mftctl.data.sources import DataSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.training.inputs import prepare_training
from mftctl.training.schedule import total_steps
from mftctl.workflows.planning import training_data
from mftctl.workflows.validate import PartCounts, validate
from tests.conftest import build_llama
from tests.workflow_fixtures import make_recipe, write_additions

_TRAINED = ("method", "records", "trainings", "steps", "records_per_step", "tokens_per_step", "tokens")


def _one(texts: list[str], part: str) -> str:
    found = [text for text in texts if part in text]
    assert len(found) == 1, texts
    return found[0]


@pytest.mark.slow
def test_a_sound_recipe(workspace: Path) -> None:
    recipe = make_recipe(workspace, fft__max_steps=None, fft__epochs=1.5, fft__grad_accum_steps=5)
    found = validate(recipe, "mine")
    document = found.document()
    assert json.loads(json.dumps(document)) == document
    assert list(document) == [field.name for field in fields(found)]
    assert document["data"]["test"] == {"records": 16}
    assert list(document["stages"][1]) == ["stage", "command", *_TRAINED, "layers"]
    mask_tensor = document["masks"]["mask-train"]["tensors"][0]
    assert (list(document["masks"]["mask-train"])[:3], mask_tensor["shape"]) == (
        ["layers", "tensors", "weights"],
        [32, 32],
    )
    assert list(document["device"]) == ["kind", "free_bytes"]
    assert (found.problems, found.not_checked, found.recipe) == ([], [], "mine")
    assert found.data["train"].records == 48
    assert found.data["test"] == PartCounts(16)
    fft, mask = found.stages
    assert (fft.stage, mask.stage) == ("fft", "mask-train")
    inputs = prepare_training(recipe, str(recipe.model), max_length_tokens=recipe.fft.max_length_tokens)
    assert fft.steps == total_steps(48, recipe.fft)
    tokens = sum(len(record.input_ids) for record in inputs.train)
    assert (fft.tokens_per_step, fft.tokens) == (round(tokens * 20 / 48), round(tokens * 1.5))
    assert (mask.steps, mask.layers) == (12, "1-2")
    assert [row.stage for row in found.memory] == ["fft", "mask-train"]


@pytest.mark.slow
def test_samples_are_the_first_training_records(workspace: Path) -> None:
    samples = validate(make_recipe(workspace, stages=_EVAL_ONLY), None).samples
    assert [Path(sample.where).name for sample in samples] == ["train.jsonl:1", "train.jsonl:2"]
    prompt, answer = samples[0].segments
    assert prompt.text.startswith("<|user|>")
    assert prompt.text.endswith("<|assistant|>")
    assert answer.text.endswith("<|end|>")
    assert (prompt.is_answer, answer.is_answer) == (False, True)


@pytest.mark.slow
def test_evaluations_of_the_same_records_have_them_tokenised_once(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    real = training_data.tokenize

    def tokenize(key: str, examples: Examples, *rest: Any) -> EncodedRecords:
        if key == "test_data":
            counted.append(len(examples))
        return real(key, examples, *rest)

    monkeypatch.setattr(training_data, "tokenize", tokenize)
    limits = {"first": 5, "second": 7, "third": 5}
    stages = {name: {"command": "eval", "set": {"eval.limit": limit}} for name, limit in limits.items()}
    found = validate(make_recipe(workspace, stages=stages), None)
    assert counted == [5, 7]
    assert [row.stage for row in found.memory] == list(limits)


@pytest.mark.slow
def test_masks_by_stage(workspace: Path) -> None:
    recipe = make_recipe(workspace, mask_train__ratio=0.25, stages={"mft": {"command": "mask-train"}})
    masks = validate(recipe, None).masks["mft"]
    assert len(masks.tensors) == 14
    assert masks.removed == masks.weights // 4
    assert masks.packed_bytes == masks.weights // 8


_EVAL_ONLY = {"scores": {"command": "eval"}}


def _staged(workspace: Path, **stages: Any) -> Recipe:
    return make_recipe(workspace, stages=stages)


@pytest.mark.slow
def test_stages_with_their_own_settings(workspace: Path) -> None:
    recipe = _staged(
        workspace,
        before={"command": "eval"},
        fft={"command": "fft", "sweep": {"fft.data_fraction": [0.5, 1.0]}, "set": {"fft.max_steps": None}},
        probe={"command": "probe", "after": "fft"},
        mft={"command": "mask-train", "after": "fft", "layers_from": "probe", "set": {"mask_train.method": "random"}},
        scores={"command": "eval", "of": ["mft"]},
    )
    found = validate(recipe, None)
    assert found.problems == []
    rows = {row.stage: row for row in found.stages}
    assert [rows[f"fft[data_fraction={share}]"].steps for share in ("0.5", "1.0")] == [6, 12]
    probe = rows["probe[data_fraction=1.0]"]
    assert (probe.records, probe.trainings, probe.steps) == (24, 2, 24)
    assert rows["mft[data_fraction=1.0]"].steps == 0
    assert rows["scores[data_fraction=1.0]"].of == "mft[data_fraction=1.0]"


@pytest.mark.slow
def test_a_probe_of_projections_and_a_budget(workspace: Path) -> None:
    recipe = _staged(
        workspace,
        probe={"command": "probe", "set": {"probe": {"unit": "projection"}}},
        mft={"command": "mask-train", "layers_from": "probe"},
        auto={"command": "mask-train", "set": {"mask_train.ratio": "auto"}},
    )
    found = validate(recipe, None)
    assert found.problems == []
    rows = {row.stage: row for row in found.stages}
    assert (rows["probe"].trainings, rows["probe"].steps) == (7, 84)
    assert {name: mask.weights for name, mask in found.masks.items()} == {
        "probe": 4 * 64 * 32,
        "mft": 4 * 64 * 32,
        "auto": 2 * 9216,
    }
    assert found.masks["auto"].removed is None


@pytest.mark.slow
def test_several_problems_appear_together(workspace: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"question": "1?"}\n', encoding="utf-8")
    recipe = make_recipe(
        workspace,
        data=[str(workspace / "train.jsonl"), str(tmp_path / "missing.jsonl"), str(broken)],
        model_type="mistral",
        mask_train__layers="2-9",
        fft__max_length_tokens=8,
        eval={"tasks": ["gsm9k"], "task_data": {"mmlu": str(tmp_path / "mmlu.jsonl")}},
    )
    found = validate(recipe, None)
    problems = found.problems
    assert "does not exist" in _one(problems, "missing.jsonl")
    assert "unknown format" in _one(problems, "broken.jsonl")
    assert "expected: mistral; got: llama" in _one(problems, "model_type")
    assert "layers 0 to 3" in _one(problems, "that many layers")
    assert "gsm8k" in _one(problems, "benchmark named")
    assert "eval.task_data.mmlu" in _one(problems, "not run")
    assert "mmlu.jsonl" in _one(problems, "local file does not exist")
    assert "data: no record can be used at --max-length 8" in problems
    assert "48 of 48 records skipped" in next(text for text in found.warnings if text.startswith("data: "))


@pytest.mark.slow
def test_incompatible_settings_of_stages(workspace: Path) -> None:
    recipe = _staged(
        workspace,
        mft={"command": "mask-train", "sweep": {"mask_train.layers": ["0-1", "3-4"]}},
        drop={"command": "mask-train", "set": {"mask_train.method": "drop"}},
        delta={"command": "mask-train", "set": {"mask_train.kind": "delta"}},
        named={"command": "mask-train", "set": {"mask_train.ratio": {"c_attn": 0.1}}},
    )
    problems = validate(recipe, None).problems
    assert len(problems) == 4
    assert "got: 3-4" in _one(problems, "mft[layers=3-4]")
    assert "drop needs the model before fine-tuning" in _one(problems, "drop:")
    assert "kind delta needs the model before fine-tuning" in _one(problems, "delta:")
    assert "c_attn" in _one(problems, "named:")


@pytest.mark.slow
def test_the_metric_a_probe_ranks_by(workspace: Path) -> None:
    recipe = _staged(
        workspace,
        known={"command": "probe", "set": {"probe.by": "gsm8k"}},
        unknown={"command": "probe", "set": {"probe.by": "gsm9k"}},
        several={"command": "probe", "set": {"probe.by": "coding"}},
    )
    problems = validate(recipe, None).problems
    assert len(problems) == 2
    assert "gsm8k" in _one(problems, "unknown:")
    assert "humaneval" in _one(problems, "several:")


@pytest.mark.slow
def test_a_file_for_the_problems_that_a_probe_ranks_by(workspace: Path, tmp_path: Path) -> None:
    problems = tmp_path / "gsm8k.jsonl"
    problems.write_text('{"question": "1+1?", "answer": "#### 2"}\n', encoding="utf-8")
    recipe = make_recipe(workspace, probe__by="gsm8k", eval__task_data={"gsm8k": str(problems)})
    assert validate(recipe, None).problems == []
    problems.write_text('{"question": "1+1?"}\n', encoding="utf-8")
    assert "answer" in _one(validate(recipe, None).problems, "eval.task_data.gsm8k")


def test_stages_in_a_circle(workspace: Path) -> None:
    recipe = _staged(workspace, a={"command": "fft", "after": "b"}, b={"command": "fft", "after": "a"})
    assert "cycle" in _one(validate(recipe, None).problems, "stages")


def test_no_model_and_no_data() -> None:
    problems = validate(parse_recipe({}), None).problems
    assert "names no model" in _one(problems, "model:")
    assert "needs data" in _one(problems, "fft:")


def test_an_eval_stage_with_nothing_to_measure(workspace: Path) -> None:
    recipe = make_recipe(workspace, test_data=[], stages=_EVAL_ONLY)
    assert "nothing to evaluate" in _one(validate(recipe, None).problems, "scores")


def test_a_missing_model(workspace: Path) -> None:
    problems = validate(make_recipe(workspace, model="nobody/nothing"), None).problems
    assert "configuration cannot be read" in _one(problems, "model:")


@pytest.mark.slow
def test_data_to_retain_is_counted_by_half_and_measured(workspace: Path, tmp_path: Path) -> None:
    retained = write_additions(tmp_path / "retained.jsonl", 20, seed=5)
    recipe = make_recipe(workspace, test_data=[], retain_data=[str(retained)], stages=_EVAL_ONLY)
    found = validate(recipe, None)
    known = load_examples([DataSource(str(workspace / "train.jsonl"))])
    examples = load_examples([DataSource(str(retained))])
    held_out, to_train = split_retained(without_training_records(examples, known.digests))
    assert found.problems == []
    assert found.data["retained_held_out"] == PartCounts(len(held_out))
    assert found.data["retained_to_train"] == PartCounts(len(to_train))
    [memory] = found.memory
    assert memory.estimate.validation_bytes > 0
    assert memory.estimate.generation_bytes == 0


def test_data_to_retain_that_is_in_the_training_data(workspace: Path) -> None:
    recipe = make_recipe(workspace, retain_data=[str(workspace / "train.jsonl") + "=5"], stages=_EVAL_ONLY)
    found = validate(recipe, None)
    assert "5 of 5 records" in _one(found.warnings, "retain_data")
    assert "is the training data" in _one(found.problems, "retain_data")


def test_bad_data_to_retain_is_a_problem(workspace: Path, tmp_path: Path) -> None:
    retained = write_additions(tmp_path / "retained.jsonl", 20, seed=5)
    with retained.open("a") as file:
        file.write('{"question": 3}\n')
    recipe = make_recipe(workspace, retain_data=[str(retained)], stages=_EVAL_ONLY)
    assert "unknown format" in _one(validate(recipe, None).problems, "retain_data")
    recipe = make_recipe(workspace, retain_data=[str(tmp_path / "missing.jsonl")], stages=_EVAL_ONLY)
    assert "does not exist" in _one(validate(recipe, None).problems, "retain_data")


def test_questions_of_the_test_data_in_the_training_data(workspace: Path) -> None:
    recipe = make_recipe(workspace, test_data=[str(workspace / "train.jsonl") + "=5"], stages=_EVAL_ONLY)
    assert "5 of 5 records" in _one(validate(recipe, None).warnings, "test_data")


@pytest.mark.slow
def test_max_length_beyond_the_models_context(workspace: Path) -> None:
    recipe = make_recipe(workspace, fft__max_length_tokens=513, stages={"fft": {"command": "fft"}})
    warnings = validate(recipe, None).warnings
    assert "at most 512; got: 513" in _one(
        warnings, "max_length_tokens: exceeds the model's context length (expected: at most 512; got: 513)"
    )


@pytest.mark.slow
def test_a_tokenizer_larger_than_the_model(workspace: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(workspace / "tiny", tmp_path / "tiny")
    build_llama(vocab_size=50).save_pretrained(folder)
    problems = validate(make_recipe(workspace, model=str(folder), stages=_EVAL_ONLY), None).problems
    assert "at most 50; got: 102" in _one(problems, "more tokens than the model")


@pytest.mark.slow
def test_a_missing_shard(workspace: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(workspace / "tiny", tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"cut off")
    assert "not a complete safetensors" in _one(
        validate(make_recipe(workspace, model=str(folder), stages=_EVAL_ONLY), None).problems, "model:"
    )


_LARGE_PARAMETERS = 68_976_648_192


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with only the configuration of a 70-billion-parameter model."""
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32_000,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    ).save_pretrained(tmp_path / "large")
    return tmp_path / "large"


@pytest.mark.slow
def test_a_table_of_seventy_billion_parameters_without_weights(workspace: Path, large: Path) -> None:
    training = {"batch_size": 1, "grad_accum_steps": 8, "gradient_checkpointing": True, "precision": "bf16"}
    recipe = make_recipe(
        workspace,
        model=str(large),
        stages={
            "lora": {"command": "fft", "set": {"fft.method": "lora"}},
            "fft": {"command": "fft"},
            "l1": {"command": "mask-train", "set": {"mask_train.method": "magnitude"}},
            "mft": {"command": "mask-train"},
        },
        mask_train__layers="4-7",
        **{f"{section}__{key}": value for section in ("fft", "mask_train") for key, value in training.items()},
    )
    start = time.process_time()
    found = validate(recipe, None)
    assert time.process_time() - start < 40
    assert found.problems == []
    assert "weights" in _one(found.not_checked, "has none")
    assert "chat template" in _one(found.not_checked, "no tokenizer")
    assert found.model.parameters == _LARGE_PARAMETERS
    assert found.model.chat_template is None
    lora, fft, l1, mft = found.memory
    assert {memory.length_tokens for memory in found.memory} == {1024}
    assert fft.estimate.weights_bytes == pytest.approx(4 * _LARGE_PARAMETERS, rel=1e-6)
    assert mft.estimate.weights_bytes == pytest.approx(2 * _LARGE_PARAMETERS, rel=1e-6)
    assert fft.estimate.gradients_bytes == 4 * _LARGE_PARAMETERS
    # Inputs of 80 layers of 1024 tokens and 8192 numbers of 2 bytes are kept.
    assert fft.estimate.activations_bytes > 80 * 1024 * 8192 * 2
    assert lora.estimate.gradients_bytes < 0.01 * fft.estimate.gradients_bytes
    assert (l1.estimate.gradients_bytes, l1.estimate.optimizer_bytes) == (0, 0)
    assert mft.estimate.scores_bytes == 4 * found.masks["mft"].weights
    assert found.stages[-1].steps == 12


@pytest.mark.slow
def test_an_interpolation_is_planned_like_its_validations(workspace: Path) -> None:
    stages = {"fft": {"command": "fft"}, "between": {"command": "interpolate", "after": "fft"}}
    found = validate(make_recipe(workspace, stages=stages), None)
    assert found.problems == []
    stage = found.stages[1]
    assert (stage.command, stage.of, stage.steps) == ("interpolate", "fft", None)
    memory = found.memory[1]
    assert memory.stage == "between"
    assert 0 < memory.estimate.validation_bytes < found.memory[0].estimate.peak_bytes
    assert memory.estimate.generation_bytes == 0


def test_an_interpolation_without_a_base_is_a_problem(workspace: Path) -> None:
    found = validate(make_recipe(workspace, stages={"between": {"command": "interpolate"}}), None)
    assert "needs the model before fine-tuning" in _one(found.problems, "between")
