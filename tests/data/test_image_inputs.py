"""Tokens and inputs of records with images, compared with the processors of three families used on their own."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.data.batching import PaddingCollator, any_images, model_inputs
from mftctl.data.encoding import Encoded, Encoder, PromptTooLongError, encode_all
from mftctl.data.examples import IGNORED_LABEL, Example, Message
from mftctl.data.image_reference import ImageReference
from mftctl.data.record_issues import RecordIssues
from mftctl.errors import DataError, ModelError
from mftctl.evaluation.losses import sample_losses
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import load_encoder
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.vision_language import load_processor
from tests.vision_models import families_with_images, made_image


@pytest.fixture(scope="module")
def encoders(vision_checkpoints: dict[str, Path]) -> dict[str, Encoder]:
    return {family: load_encoder(folder, Recipe()) for family, folder in vision_checkpoints.items()}


def image(folder: Path, seed: int, width: int = 24, height: int = 16) -> ImageReference:
    path = folder / f"{seed}.png"
    made_image(seed, width, height).save(path)
    return ImageReference("", str(path))


def question(images: Sequence[ImageReference], text: str = "What?", places: Sequence[int] | None = None) -> Example:
    shown = tuple([0] * len(images) if places is None else places)
    turns = (Message("user", text, image_places=shown), Message("assistant", "That."))
    return Example("chat", turns, "train.jsonl:1", images=tuple(images))


@pytest.fixture
def examples(tmp_path: Path) -> list[Example]:
    """Records with one, no, two and one images of different sizes."""
    images = [image(tmp_path, 0), image(tmp_path, 1, 16, 32), image(tmp_path, 2, 40, 16), image(tmp_path, 3, 16, 16)]
    return [
        question(images[:1]),
        question([]),
        question(images[1:3], "Left or right?", [4, 14]),
        question(images[3:], "And this one, which is asked about at greater length?"),
    ]


def encoded(encoder: Encoder, examples: Sequence[Example]) -> Sequence[Encoded]:
    issues = RecordIssues()
    found = encode_all(examples, encoder, 512, issues).records
    issues.settle("error")
    return found


def plain_inputs(encoder: Encoder, example: Example) -> dict[str, Any]:
    """Tokens, pixels and labels of a record as transformers alone makes them."""
    assert encoder.images is not None
    first, *others = example.messages[0].texts
    parts = [{"type": "text", "text": first}] if first else []
    for text in others:
        parts += [{"type": "image"}, {"type": "text", "text": text}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": example.answer}]
    text = encoder.tokenizer.apply_chat_template(turns, tokenize=False)
    settings = {"return_tensors": "pt", "add_special_tokens": False}
    if example.images:
        pixels = [image.pixels("") for image in example.images]
        inputs = dict(encoder.images.processor(text=[text], images=[pixels], **settings))
    else:
        inputs = dict(encoder.tokenizer([text], return_token_type_ids=False, **settings))
    labels = inputs["input_ids"].clone()
    labels[:, : -len(example.answer) - 1] = IGNORED_LABEL  # a token for each character and one for the end
    return {**inputs, "labels": labels}


@families_with_images
def test_tokens_and_labels_are_those_of_transformers(
    family: str, encoders: dict[str, Encoder], examples: list[Example]
) -> None:
    encoder = encoders[family]
    for example, record in zip(examples, encoded(encoder, examples), strict=True):
        wanted = plain_inputs(encoder, example)
        assert record.input_ids == wanted["input_ids"][0].tolist()
        assert record.labels == wanted["labels"][0].tolist()
        assert record.images == example.images
        prompt_tokens = len(record.labels) - len(example.answer) - 1
        assert encoder.prompt(example) == record.input_ids[:prompt_tokens]


@families_with_images
def test_losses_are_those_of_transformers_alone_and_together(
    family: str, encoders: dict[str, Encoder], examples: list[Example], vision_checkpoints: dict[str, Path]
) -> None:
    encoder, model = encoders[family], load_model(vision_checkpoints[family], dtype=torch.float32)
    records = encoded(encoder, examples)
    together = sample_losses(model, records, pad_token_id=0)
    for example, record, loss in zip(examples, records, together, strict=True):
        wanted = plain_inputs(encoder, example)
        with torch.no_grad():
            plain = model(**wanted).loss.item() * loss.answer_tokens
        [alone] = sample_losses(model, [record], pad_token_id=0)
        assert loss.nll == pytest.approx(plain, abs=1e-3)
        assert loss.nll == pytest.approx(alone.nll, abs=1e-4)


@families_with_images
def test_another_image_gives_another_loss(
    family: str,
    encoders: dict[str, Encoder],
    tmp_path: Path,
    vision_checkpoints: dict[str, Path],
) -> None:
    model = load_model(vision_checkpoints[family], dtype=torch.float32)
    pair = [question([image(tmp_path, seed)]) for seed in (5, 6)]
    first, second = sample_losses(model, encoded(encoders[family], pair), pad_token_id=0)
    assert first.nll != second.nll


@families_with_images
def test_model_in_bf16_takes_the_pixels(
    family: str, encoders: dict[str, Encoder], examples: list[Example], vision_checkpoints: dict[str, Path]
) -> None:
    records = encoded(encoders[family], examples)
    losses = [
        sample_losses(load_model(vision_checkpoints[family], dtype=dtype), records, pad_token_id=0)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for wide, narrow in zip(*losses, strict=True):
        assert narrow.nll == pytest.approx(wide.nll, rel=0.01)


@families_with_images
def test_batch_without_images_has_no_pixels(family: str, encoders: dict[str, Encoder], examples: list[Example]) -> None:
    records = encoded(encoders[family], examples)
    batch = PaddingCollator(0)([records[1]])
    assert not any("pixel" in name or "grid" in name for name in batch)
    assert set(model_inputs(batch, torch.device("cpu"))) == set(batch) - {"labels"}
    assert any_images(records)
    assert not any_images(encoded(encoders[family], examples[1:2]))


def test_kinds_of_tokens_are_those_of_the_processor(encoders: dict[str, Encoder], examples: list[Example]) -> None:
    encoder = encoders["qwen2_vl"]
    records = encoded(encoder, examples)
    batch = PaddingCollator(0)(records)
    for row, example, record in zip(batch["mm_token_type_ids"], examples, records, strict=True):
        wanted = plain_inputs(encoder, example).get("mm_token_type_ids", torch.zeros(1, len(record.input_ids)))
        assert row[: len(record.input_ids)].tolist() == wanted[0].tolist()
        assert not row[len(record.input_ids) :].any()


def test_images_as_bytes_equal_images_as_paths(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    by_path = image(tmp_path, 7)
    by_bytes = ImageReference("", content=Path(by_path.path).read_bytes())
    one, other = (PaddingCollator(0)(encoded(encoders["llava"], [question([one])])) for one in (by_path, by_bytes))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@families_with_images
def test_image_is_never_truncated(family: str, encoders: dict[str, Encoder], examples: list[Example]) -> None:
    encoder = encoders[family]
    whole = encoder.encode(examples[0], 512)
    answer_tokens = len(examples[0].answer) + 1
    cut = encoder.encode(examples[0], len(whole.input_ids) - 2)
    assert cut.input_ids == whole.input_ids[:-2]
    with pytest.raises(PromptTooLongError, match="images are never truncated"):
        encoder.encode(examples[0], len(whole.input_ids) - answer_tokens - 1)


def test_later_image_is_not_truncated_either(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    first = question([])
    second = (Message("user", "And this?", image_places=(0,)), Message("assistant", "Too."))
    example = replace(first, messages=(*first.messages, *second), images=(image(tmp_path, 0),))
    whole = encoders["llava"].encode(example, 512)
    begin = next(place for place, token in enumerate(whole.input_ids) if token in encoders["llava"].images.token_ids)
    with pytest.raises(PromptTooLongError, match="images are never truncated"):
        encoders["llava"].encode(example, begin + 2)


def test_model_of_text_refuses_images(tmp_path: Path, tiny_checkpoint: Path) -> None:
    encoder = load_encoder(tiny_checkpoint, Recipe())
    with pytest.raises(DataError, match="takes only text"):
        encoder.encode(question([image(tmp_path, 0)]), 512)
    with pytest.raises(DataError, match="takes only text"):
        encoder.prompt(question([image(tmp_path, 0)]))


@families_with_images
def test_placeholder_in_the_text_is_refused(family: str, encoders: dict[str, Encoder], tmp_path: Path) -> None:
    encoder = encoders[family]
    assert encoder.images is not None
    text = f"What is {encoder.images.placeholder}?"
    with pytest.raises(DataError, match="placeholders in the text differs") as caught:
        encoder.encode(question([image(tmp_path, 0)], text), 512)
    assert caught.value.actual == "2 times"
    with pytest.raises(DataError, match="token for images"):
        encoder.encode(question([], text), 512)
    with pytest.raises(DataError, match="token for images"):
        encoder.prompt(question([], text))
    in_answer = replace(question([]), messages=(Message("user", "What?"), Message("assistant", text)))
    with pytest.raises(DataError, match="token for images"):
        encoder.encode(in_answer, 512)


def test_damaged_image_is_one_refused_record(encoders: dict[str, Encoder], examples: list[Example]) -> None:
    Path(examples[0].images[0].path).write_bytes(b"no image")
    issues = RecordIssues()
    found = encode_all(examples, encoders["llava"], 512, issues)
    assert len(found.records) == 3
    assert [error.message for error in issues.refused] == ["An image cannot be decoded."]


def test_template_that_leaves_out_images(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    tokenizer = pickle.loads(pickle.dumps(encoders["llava"].tokenizer))
    tokenizer.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{% if message['content'] is string %}"
        "{{ message['content'] }}{% else %}{{ message['content'][-1]['text'] }}{% endif %}<|end|>{% endfor %}"
    )
    with pytest.raises(DataError, match="placeholders in the text differs") as caught:
        Encoder(tokenizer, images=encoders["llava"].images).encode(question([image(tmp_path, 0)]), 512)
    assert caught.value.actual == "0 times"


def test_model_without_a_chat_template(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    tokenizer = pickle.loads(pickle.dumps(encoders["llava"].tokenizer))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        Encoder(tokenizer, images=encoders["llava"].images).encode(question([image(tmp_path, 0)]), 512)


@families_with_images
def test_another_process_loads_its_own_processor(
    family: str, encoders: dict[str, Encoder], examples: list[Example]
) -> None:
    encoder = encoders[family]
    copy = pickle.loads(pickle.dumps(encoder.images))
    assert copy.digest == encoder.images.digest
    again = Encoder(encoder.tokenizer, images=copy).encode(examples[2], 512)
    assert again.input_ids == encoder.encode(examples[2], 512).input_ids


def test_processor_leaves_the_tokenizer_alone(vision_checkpoints: dict[str, Path]) -> None:
    encoder = load_encoder(vision_checkpoints["llava"], Recipe())
    before = encoder.tokenizer.special_tokens_map
    assert load_processor(vision_checkpoints["llava"], encoder.tokenizer).tokenizer is not encoder.tokenizer
    assert encoder.tokenizer.special_tokens_map == before


def test_missing_package_is_named(vision_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    monkeypatch.setattr("mftctl.masking.checkpoints.vision_language.find_spec", lambda name: None)
    folder = vision_checkpoints["smolvlm"]
    with pytest.raises(ModelError, match="image processor cannot be loaded") as caught:
        load_processor(folder, load_encoder(folder, Recipe()).tokenizer)
    assert "num2words" in str(caught.value.actual)
    assert 'pip install "mftctl[vision]"' in str(caught.value.hint)


def test_missing_processor_is_reported(vision_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    for path in vision_checkpoints["llava"].iterdir():
        if "processor" not in path.name:
            (tmp_path / "m" / path.name).symlink_to(path)
    encoder = load_encoder(tmp_path / "m", Recipe())
    assert encoder.encode(question([]), 512).images == ()
    with pytest.raises(ModelError, match="image processor cannot be loaded") as caught:
        encoder.encode(question([image(tmp_path, 0)]), 512)
    assert "preprocessor_config.json" in str(caught.value.hint)
