"""Fine-tuning, masks, answers and checkpoints of vision-language models on questions with images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, PreTrainedModel

from mftctl.data.batching import LengthGroupedSampler
from mftctl.data.encoding import Encoder, encode_all
from mftctl.data.examples import Example
from mftctl.data.prepared.load import load_examples
from mftctl.data.record_issues import RecordIssues
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError, DataError, Interrupted
from mftctl.evaluation.answer_room import AnswerRoom
from mftctl.evaluation.data_file import evaluate_examples
from mftctl.evaluation.generation import generate_answers
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.evaluation.suite import encode_test_data, prepare_suite, require_local_images
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import load_encoder
from mftctl.experiments.run_folder import Run
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.outlines import StoredWeights, build_outline
from mftctl.masking.mask import load_mask
from mftctl.masking.targets import find_targets
from mftctl.masking.towers import beside_language_model
from mftctl.progress import Silence
from mftctl.workflows.fft import fine_tune
from mftctl.workflows.generate import generate, prompt_examples
from mftctl.workflows.mask_train import mask_train
from mftctl.workflows.probe import probe
from tests.vision_models import families, families_with_images, made_image, write_image_records
from tests.workflow_fixtures import Interrupter, make_recipe, open_run


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about images, and some without. Read-only."""
    return write_image_records(tmp_path_factory.mktemp("questions"), [1, 0, 2, 1])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions without images. Read-only."""
    return write_image_records(tmp_path_factory.mktemp("texts"), [0] * 4)


def recipe_of(model: Path, data: Path, **changes: Any) -> Recipe:
    training = {"max_steps": 2, "batch_size": 2, "val_steps": 1, "max_length_tokens": 256}
    sections = {"fft": {**training, "learning_rate": 1e-3}, "mask_train": {**training, "learning_rate": 0.02}}
    given: dict[str, Any] = {
        "model": str(model),
        "data": [str(data)],
        "val_data": [str(data)],
        "test_data": [str(data)],
        "fft": sections["fft"],
        "mask_train": sections["mask_train"],
        "probe": {"groups": [1], "data_fraction": 1.0},
    }
    return make_recipe(model.parent, **given, **changes)


def fine_tuned(root: Path, recipe: Recipe) -> Path:
    run, source = open_run(root, "fft", recipe)
    fine_tune(recipe, source, run, Silence())
    return run.folder / "model"


def learn(root: Path, recipe: Recipe, listener: Any = None) -> Run:
    run, source = open_run(root, "mask-train", recipe)
    run.finish(mask_train(recipe, source, run, listener or Silence()))
    return run


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForImageTextToText.from_pretrained(folder).named_parameters())


def examples_of(path: Path) -> list[Example]:
    return list(load_examples([DataSource(str(path))]))


def prompt_inputs(encoder: Encoder, example: Example, *, with_answer: bool = False) -> dict[str, Any]:
    """What transformers alone makes of the question of a record, or of the whole record."""
    assert encoder.images is not None
    parts = [*({"type": "image"} for _ in example.images), {"type": "text", "text": example.messages[0].content}]
    turns = [{"role": "user", "content": parts}]
    turns += [{"role": "assistant", "content": example.answer}] if with_answer else []
    text = encoder.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not with_answer)
    settings = {"return_tensors": "pt", "add_special_tokens": False}
    if not example.images:
        return dict(encoder.tokenizer([text], return_token_type_ids=False, **settings))
    pixels = [image.pixels("") for image in example.images]
    return dict(encoder.images.processor(text=[text], images=[pixels], **settings))


def plain_loop(model: PreTrainedModel, encoder: Encoder, examples: list[Example], steps: int) -> PreTrainedModel:
    """AdamW on the mean loss of the answer tokens of two records a step, each computed on its own."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    lengths = [prompt_inputs(encoder, one, with_answer=True)["input_ids"].shape[1] for one in examples]
    order = list(LengthGroupedSampler(lengths, 2, 0))
    for step in range(steps):
        batch = [examples[index] for index in order[2 * step : 2 * step + 2]]
        tokens = sum(len(example.answer) + 1 for example in batch)
        for example in batch:
            inputs = prompt_inputs(encoder, example, with_answer=True)
            answer = len(example.answer) + 1
            logits = model(**inputs).logits[0, -answer - 1 : -1]
            (F.cross_entropy(logits, inputs["input_ids"][0, -answer:], reduction="sum") / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (0.0 if step == 0 else (steps - step) / (steps - 1))  # a step of warmup, then linear
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.slow
@families_with_images
def test_fine_tuning_equals_a_plain_loop(
    family: str, vision_checkpoints: dict[str, Path], questions: Path, tmp_path: Path
) -> None:
    folder = vision_checkpoints[family]
    found = fine_tuned(tmp_path, recipe_of(folder, questions, fft__keep="last"))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    plain = plain_loop(model, load_encoder(folder, Recipe()), examples_of(questions), 2)
    wanted, before = dict(plain.named_parameters()), parameters(folder)
    moved = 0
    for name, tensor in parameters(found).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=5e-5)
        moved += not torch.equal(tensor, before[name])
    assert moved > len(wanted) / 2
    assert any("vision" in name or "visual" in name for name in wanted if not torch.equal(wanted[name], before[name]))


@pytest.mark.slow
@families_with_images
def test_kept_model_is_that_of_the_best_step(
    family: str, vision_checkpoints: dict[str, Path], questions: Path, tmp_path: Path
) -> None:
    """The first step only warms up, and the rate of the others is far too high."""
    recipe = recipe_of(vision_checkpoints[family], questions, fft__max_steps=3)
    recipe = recipe.model_copy(update={"fft": recipe.fft.model_copy(update={"learning_rate": 1.0})})
    run, source = open_run(tmp_path, "fft", recipe)
    assert fine_tune(recipe, source, run, Silence()).best_step == 1
    before = parameters(vision_checkpoints[family])
    assert all(torch.equal(before[name], tensor) for name, tensor in parameters(run.folder / "model").items())


@pytest.mark.slow
@families_with_images
def test_resuming_gives_the_identical_model(
    family: str, vision_checkpoints: dict[str, Path], questions: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(vision_checkpoints[family], questions, fft__max_steps=4)
    whole = parameters(fine_tuned(tmp_path, recipe))
    run, source = open_run(tmp_path, "fft", recipe)
    with pytest.raises(Interrupted):
        fine_tune(recipe, source, run, Interrupter(2))
    fine_tune(recipe, source, run, Silence(), resume=True)
    assert all(torch.equal(whole[name], tensor) for name, tensor in parameters(run.folder / "model").items())


@pytest.mark.slow
@families_with_images
def test_fine_tuned_checkpoint_keeps_its_processor(
    family: str, vision_checkpoints: dict[str, Path], questions: Path, tmp_path: Path
) -> None:
    folder = vision_checkpoints[family]
    found = fine_tuned(tmp_path, recipe_of(folder, questions, fft__max_steps=1))
    before, after = load_encoder(folder, Recipe()), load_encoder(found, Recipe())
    assert before.images is not None
    assert after.images is not None
    assert after.images.digest == before.images.digest
    assert after.tokenizer.chat_template == before.tokenizer.chat_template
    example = examples_of(questions)[2]
    assert after.encode(example, 256).input_ids == before.encode(example, 256).input_ids


@pytest.mark.slow
@families_with_images
def test_learned_mask_changes_only_its_targets(
    family: str, vision_checkpoints: dict[str, Path], questions: Path, tmp_path: Path
) -> None:
    folder = vision_checkpoints[family]
    run = learn(tmp_path, recipe_of(folder, questions, mask_train__target="all", mask_train__threshold=0.02))
    result, mask = run.record.result, load_mask(Path(run.record.result["mask"]))
    assert result["layers"] == "projector,0-1"
    assert set(result["layer_ratios"]) == {"projector", "0", "1"}
    apply_to_checkpoint(folder, mask, tmp_path / "out", mask_path=None, base_model=str(folder))
    before, after = parameters(folder), parameters(tmp_path / "out")
    model = load_model(folder, dtype=torch.float32)
    targets = {target.weight_name for target in find_targets(model, target="all")}
    assert {name for name in before if not torch.equal(before[name], after[name])} == targets
    encoder = load_encoder(tmp_path / "out", Recipe())
    records = encode_all(examples_of(questions), encoder, 256, RecordIssues()).records
    loss = mean_loss(sample_losses(load_model(tmp_path / "out", dtype=torch.float32), records, pad_token_id=0))
    assert loss == pytest.approx(result["best_loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_masks_without_training(
    method: str, vision_checkpoints: dict[str, Path], questions: Path, tmp_path: Path
) -> None:
    changes = {"mask_train__method": method, "mask_train__target": "projector", "mask_train__ratio": 0.25}
    run = learn(tmp_path, recipe_of(vision_checkpoints["llava"], questions, **changes))
    mask = load_mask(Path(run.record.result["mask"]))
    assert mask.names() == [f"multi_modal_projector.linear_{number}.weight" for number in (1, 2)]
    assert mask.metadata.layers == "projector"
    assert run.record.result["ratio"] == 0.25


@pytest.mark.slow
def test_hidden_states_are_reused_for_text_only(
    vision_checkpoints: dict[str, Path], questions: Path, texts: Path, tmp_path: Path
) -> None:
    """On text, reuse changes nothing; with images it is off, and the user is told."""
    folder = vision_checkpoints["qwen2_vl"]
    changes = {"mask_train__layers": "1", "mask_train__epochs": 2.0, "mask_train__max_steps": None}
    found = [
        learn(tmp_path, recipe_of(folder, texts, **changes, mask_train__prefix_cache_gb=size)).record.result
        for size in (None, 0)
    ]
    assert [result["prefix_reuse"]["reused"] > 0 for result in found] == [True, False]
    first, second = (load_mask(Path(result["mask"])) for result in found)
    assert all(torch.equal(first[name], second[name]) for name in first.names())
    listener = Interrupter(-1)
    result = learn(tmp_path, recipe_of(folder, questions, **changes), listener).record.result
    assert result["prefix_reuse"]["reused"] == 0
    assert any("Hidden states are not reused: they depend on the images" in note for note in listener.notes)


@pytest.mark.slow
def test_batches_by_tokens_give_the_same_step(
    vision_checkpoints: dict[str, Path], questions: Path, tmp_path: Path
) -> None:
    folder = vision_checkpoints["qwen2_vl"]
    shared = {"fft__max_steps": 2, "fft__batch_size": 4, "fft__keep": "last"}
    whole = parameters(fine_tuned(tmp_path, recipe_of(folder, questions, **shared)))
    split = parameters(fine_tuned(tmp_path, recipe_of(folder, questions, **shared, fft__batch_tokens=70)))
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=1e-4, atol=5e-5)


@pytest.mark.slow
def test_probe_ranks_layers_by_images(vision_checkpoints: dict[str, Path], questions: Path, tmp_path: Path) -> None:
    recipe = recipe_of(vision_checkpoints["qwen2_vl"], questions)
    run, source = open_run(tmp_path, "probe", recipe)
    found = probe(recipe, source, run, Silence())
    assert sorted(group.layers for group in found.groups) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "shira", "supertuning"])
def test_adapters_change_the_language_model(
    method: str, vision_checkpoints: dict[str, Path], questions: Path, tmp_path: Path
) -> None:
    folder = vision_checkpoints["llava"]
    ratio = {"fft__ratio": 0.5} if method == "supertuning" else {"fft__lora_rank": 2}
    recipe = recipe_of(folder, questions, fft__method=method, fft__merge=True, fft__keep="last", **ratio)
    before, after = parameters(folder), parameters(fine_tuned(tmp_path, recipe))
    targets = {target.weight_name for target in find_targets(load_model(folder, dtype=torch.float32))}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert set() < changed <= targets


@pytest.mark.slow
def test_text_leaves_the_vision_tower_as_it_is(
    vision_checkpoints: dict[str, Path], texts: Path, tmp_path: Path
) -> None:
    folder = vision_checkpoints["llava"]
    before, after = (
        parameters(folder),
        parameters(fine_tuned(tmp_path, recipe_of(folder, texts, fft__weight_decay=0.1))),
    )
    model = load_model(folder, dtype=torch.float32)
    beside = {id(parameter) for parameter in beside_language_model(model)}
    kept = {name for name, parameter in model.named_parameters() if id(parameter) in beside}
    assert {name for name in before if torch.equal(before[name], after[name])} == kept


@families_with_images
def test_answers_are_those_of_transformers(family: str, vision_checkpoints: dict[str, Path], questions: Path) -> None:
    """Also in a batch of prompts with different numbers of images."""
    folder, examples = vision_checkpoints[family], examples_of(questions)
    encoder, model = load_encoder(folder, Recipe()), load_model(folder, dtype=torch.float32)
    room = AnswerRoom(lambda *_: 1, most_tokens=10_000)
    together = generate_answers(model, encoder, examples, max_new_tokens=6, room=room)
    for example, answer in zip(examples, together, strict=True):
        inputs = prompt_inputs(encoder, example)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == encoder.tokenizer.decode(ids, skip_special_tokens=True)


def test_exact_match_and_loss_on_a_data_file(vision_checkpoints: dict[str, Path], questions: Path) -> None:
    folder, examples = vision_checkpoints["llava"], examples_of(questions)
    encoder, model = load_encoder(folder, Recipe()), load_model(folder, dtype=torch.float32)
    records = encode_all(examples, encoder, 256, RecordIssues())
    found = evaluate_examples(model, encoder, records)
    assert found.max_new_tokens is not None
    answers = generate_answers(model, encoder, examples, max_new_tokens=found.max_new_tokens)
    assert [row.prediction for row in found.rows] == answers
    assert found.exact_match == 0.0
    assert found.loss == mean_loss(sample_losses(model, records.records, pad_token_id=0))


def test_generate_shows_images_before_a_prompt(vision_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(vision_checkpoints["llava"], tmp_path, eval__max_new_tokens=4)
    source = open_run(tmp_path, "generate", recipe)[1]
    made_image(1).save(tmp_path / "a.png")
    made_image(2).save(tmp_path / "b.png")
    [example] = prompt_examples(["What?"], [], 5, [tmp_path / "a.png", tmp_path / "b.png"])
    assert [len(message.image_places) for message in example.messages] == [2, 0]
    [answered] = generate(recipe, source, [example], Silence(), texts=1)
    streamed: list[str] = []
    [other] = generate(recipe, source, [example], Silence(), texts=1, on_text=streamed.append)
    assert answered.answer == other.answer != ""
    with pytest.raises(ConfigError, match="Images belong to prompts"):
        prompt_examples([], [str(tmp_path)], 5, [tmp_path / "a.png"])
    with pytest.raises(DataError, match="cannot be read"):
        prompt_examples(["What?"], [], 5, [tmp_path / "c.png"])


@families
def test_parts_of_the_weights_are_those_of_the_whole_model(family: str, vision_checkpoints: dict[str, Path]) -> None:
    folder = vision_checkpoints[family]
    stored = StoredWeights(folder, build_outline(folder, torch.float32))
    for name, parameter in parameters(folder).items():
        assert torch.equal(stored.rows(name), parameter), name


def _refused(root: Path, recipe: Recipe, command: str = "mask-train") -> ConfigError:
    run, source = open_run(root, command, recipe)
    work: Any = {"mask-train": mask_train, "fft": fine_tune, "probe": probe}[command]
    with pytest.raises(ConfigError) as caught:
        work(recipe, source, run, Silence())
    return caught.value


@pytest.mark.parametrize("command", ["fft", "mask-train"])
def test_processes_that_share_parameters_are_refused(
    vision_checkpoints: dict[str, Path],
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr("mftctl.training.image_support.world_size", lambda: 2)
    monkeypatch.setattr("mftctl.training.image_support.spreads_parameters", lambda: True)
    error = _refused(tmp_path, recipe_of(vision_checkpoints["llava"], questions), command)
    assert error.message == "Training with images runs in one process, or under DDP."
    assert error.actual == "2 processes under DeepSpeed or FSDP"


@pytest.mark.parametrize("part", ["data", "retain_data"])
def test_data_to_retain_is_refused(
    part: str, vision_checkpoints: dict[str, Path], texts: Path, tmp_path: Path, questions: Path
) -> None:
    many = write_image_records(tmp_path / "many", [1] * 12) if part == "retain_data" else None
    retained = many or write_image_records(tmp_path / "many", [0] * 12)
    records = [json.loads(line) for line in retained.read_text().splitlines()]
    retained.write_text("".join(json.dumps({**one, "prompt": f"R{one['prompt']}"}) + "\n" for one in records))
    recipe = recipe_of(vision_checkpoints["llava"], questions if part == "data" else texts, retain_data=[str(retained)])
    assert "cannot have images" in _refused(tmp_path, recipe, "fft").message


def test_projector_needs_images(vision_checkpoints: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    recipe = recipe_of(vision_checkpoints["llava"], texts, mask_train__target="projector", mask_train__layers=None)
    assert _refused(tmp_path, recipe).message == "A mask of the projector is learned from images."


def test_probe_has_no_projector(vision_checkpoints: dict[str, Path], questions: Path, tmp_path: Path) -> None:
    recipe = recipe_of(vision_checkpoints["llava"], questions, mask_train__target="all")
    assert "projector belongs to none" in _refused(tmp_path, recipe, "probe").message


def test_other_engines_are_refused(vision_checkpoints: dict[str, Path], questions: Path) -> None:
    recipe = recipe_of(vision_checkpoints["llava"], questions)
    encoder = load_encoder(vision_checkpoints["llava"], recipe)
    test = encode_test_data(prepare_suite(recipe, Silence()), recipe, encoder, Silence())
    require_local_images(recipe, test)
    served = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"engine": "openai"})})
    with pytest.raises(ConfigError, match="measured only by the model in this process"):
        require_local_images(served, test)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MFTCTL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
