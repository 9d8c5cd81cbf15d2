"""The images of records: their fields, their places in the turns, their bytes, and what is refused."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.examples import Example, Message
from mftctl.data.formats import to_example, unused_fields
from mftctl.data.image_reference import ImageReference
from mftctl.data.images import read_images
from mftctl.data.overlap import question_keys
from mftctl.data.prepared.load import load_examples
from mftctl.data.sources import DataSource
from mftctl.errors import DataError
from tests.vision_models import made_image


def png(seed: int = 0) -> bytes:
    stream = io.BytesIO()
    made_image(seed).save(stream, "PNG")
    return stream.getvalue()


def record(**fields: Any) -> Example:
    return to_example({"prompt": "What?", "completion": "That.", **fields}, "train.jsonl:1")


def refused(**fields: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        record(**fields)
    return caught.value


def test_images_without_parts_come_before_the_first_question() -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "No."},
    ]
    example = to_example({"messages": turns, "images": ["a.png", "b.png"]}, "train.jsonl:1")
    assert [message.image_places for message in example.messages] == [(), (0, 0), (), (), ()]
    assert [image.path for image in example.images] == ["a.png", "b.png"]
    assert example.messages[1].texts == ["", "", "One?"]


def test_image_parts_keep_their_places() -> None:
    parts = [{"type": "text", "text": "Left: "}, {"type": "image"}, {"type": "text", "text": " right: ", "image": None}]
    turns = [
        {"role": "user", "content": [*parts, {"type": "image", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Alike."}]},
    ]
    example = to_example({"messages": turns, "images": ["a.png", "b.png"]}, "train.jsonl:1")
    assert example.messages[0].content == "Left:  right: "
    assert example.messages[0].image_places == (6, 14)
    assert example.messages[0].texts == ["Left: ", " right: ", ""]


def test_marks_in_questions_are_places() -> None:
    turns = [
        {"from": "human", "value": "<image>\nLike <image>?"},
        {"from": "gpt", "value": "No."},
        {"from": "human", "value": "And <image>"},
        {"from": "gpt", "value": "An <image> too."},
    ]
    example = to_example({"conversations": turns, "images": ["a.png", "b.png", "c.png"]}, "train.jsonl:1")
    assert [message.texts for message in example.messages[::2]] == [["", "\nLike ", "?"], ["And ", ""]]
    assert example.messages[3].content == "An <image> too."
    alone = to_example({"conversations": turns[:2]}, "train.jsonl:1")  # a plain text, whatever it means to a model
    assert (alone.messages[0].content, alone.messages[0].image_places) == ("<image>\nLike <image>?", ())


@pytest.mark.parametrize(
    "image", ["a.png", {"path": "a.png"}, {"path": "a.png", "bytes": None}, {"path": None, "bytes": b"x"}, b"x"]
)
@pytest.mark.parametrize("key", ["images", "image"])
def test_forms_of_an_image(image: Any, key: str) -> None:
    example = record(**{key: [image]})
    (found,) = example.images
    assert (found.path, found.content) in [("a.png", b""), ("", b"x")]
    assert unused_fields({"prompt": "", "completion": "", key: [image]}) == set()
    assert record(image=image).images == example.images


def test_two_fields_of_images() -> None:
    assert refused(images=["a.png"], image="b.png").message == "The record names images in two places."


def test_no_images_where_the_field_is_empty() -> None:
    assert record(images=[]) == record(images=None) == record()


@pytest.mark.parametrize("image", [3, "", {}, {"path": None, "bytes": None}, None])
def test_image_of_the_wrong_type(image: Any) -> None:
    assert refused(images=["a.png", image]).key == "images[1]"


@pytest.mark.parametrize("image", ["https://a.org/b.png", "data:image/png;base64,AAAA", {"path": "s3://a/b.png"}])
def test_image_elsewhere(image: Any) -> None:
    assert refused(images=[image]).message == "An image is not on this machine."


def test_other_number_of_parts_than_images() -> None:
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    completion = [{"role": "assistant", "content": "That."}]
    error = refused(prompt=prompt, completion=completion, images=["a.png", "b.png"])
    assert "number of places for images differs" in error.message
    assert error.actual == 1
    assert "number of places for images differs" in refused(prompt=prompt, completion=completion).message
    assert refused(prompt="<image>", images=["a.png", "b.png"]).actual == 1


@pytest.mark.parametrize(
    "part", [{"image": "a.png"}, {"path": "a.png", "url": None}, {"url": "file://a.png"}, {"image": {"path": "a.png"}}]
)
def test_parts_that_name_their_image(part: dict[str, Any]) -> None:
    prompt = [{"role": "user", "content": [{"type": "text", "text": "See "}, {"type": "image", **part}]}]
    completion = [{"role": "assistant", "content": "That."}]
    example = record(prompt=prompt, completion=completion)
    assert (example.messages[0].image_places, example.images[0].path) == ((4,), "a.png")
    assert "in two places" in refused(prompt=prompt, completion=completion, images=["b.png"]).message
    twice = [{"role": "user", "content": [{"type": "image", **part}, {"type": "image"}]}]
    assert "number of places for images differs" in refused(prompt=twice, completion=completion).message


def test_part_with_an_unknown_field() -> None:
    prompt = [{"role": "user", "content": [{"type": "image", "base64": "AAAA"}]}]
    completion = [{"role": "assistant", "content": "That."}]
    assert refused(prompt=prompt, completion=completion).key == "prompt[0].content[0].base64"
    remote = [{"role": "user", "content": [{"type": "image", "url": "https://a.org/b.png"}]}]
    error = refused(prompt=remote, completion=completion)
    assert (error.message, error.key) == ("An image is not on this machine.", "prompt[0].content[0].url")


@pytest.mark.parametrize(
    ("fields", "actual"),
    [
        ({"text": "Once."}, "text without turns"),
        ({"input_ids": [1, 2]}, "tokens without turns"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a preference"),
        (
            {
                "messages": [
                    {"role": "user", "content": "What?"},
                    {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "This."}]},
                ]
            },
            "an answer that contains an image",
        ),
    ],
)
def test_records_that_cannot_have_images(fields: dict[str, Any], actual: str) -> None:
    with pytest.raises(DataError, match="cannot have images") as caught:
        to_example({**fields, "images": ["a.png"]}, "train.jsonl:1")
    assert caught.value.actual == actual


def test_digest_is_of_the_bytes_wherever_they_lie(tmp_path: Path) -> None:
    content = png()
    (tmp_path / "a.png").write_bytes(content)
    by_path = read_images(record(images=["a.png"]), tmp_path)
    by_bytes = read_images(record(images=[content]), None)
    absolute = read_images(record(images=[str(tmp_path / "a.png")]), None)
    assert by_path.images[0].sha256 == hashlib.sha256(content).hexdigest()
    assert by_path.canonical() == by_bytes.canonical() == absolute.canonical()
    assert by_path.prompt_content() == by_bytes.prompt_content()
    other = read_images(record(images=[png(1)]), None)
    assert other.canonical() != by_path.canonical()
    assert other.prompt_content() != by_path.prompt_content()


@given(places=st.lists(st.integers(0, 5), max_size=4), count=st.integers(0, 2))
def test_canonical_form_keeps_the_places(places: list[int], count: int) -> None:
    images = tuple(ImageReference(str(number)) for number in range(count))
    question = Message("user", "What?", image_places=tuple(sorted(places)))
    example = Example("chat", (question, Message("assistant", "That.")), "x", images=images)
    assert Example.from_canonical(example.canonical(), "x", has_turns=False, images=images) == example


def test_same_question_about_another_image_is_another_question(tmp_path: Path) -> None:
    for seed in (0, 1):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    lines = [json.dumps({"prompt": "What?", "completion": "It.", "images": [f"{seed}.png"]}) for seed in (0, 1, 0)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    examples = load_examples([DataSource(str(tmp_path / "train.jsonl"))])
    first, second, third = question_keys(examples)
    assert first == third != second
    first, second, third = examples.prompt_keys.tolist()
    assert first == third != second


def test_text_alone_keeps_its_canonical_form() -> None:
    assert record().canonical() == b'["completion", [["user", "What?"], ["assistant", "That."]]]'


def test_missing_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image cannot be read") as caught:
        read_images(record(images=["a.png"]), tmp_path)
    assert caught.value.key == str(tmp_path / "a.png")
    assert caught.value.path == "train.jsonl:1"


def test_image_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png()[:100])
    (image,) = read_images(record(images=["a.png"]), tmp_path).images
    with pytest.raises(DataError, match="cannot be decoded"):
        ImageReference(image.sha256, str(tmp_path / "a.png")).pixels("train.jsonl:1")


def test_image_that_changed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    image = ImageReference(hashlib.sha256(png(1)).hexdigest(), str(tmp_path / "a.png"))
    with pytest.raises(DataError, match="has changed since"):
        image.pixels("train.jsonl:1")


def test_pixels_are_turned_as_the_metadata_asks_for(tmp_path: Path) -> None:
    image = made_image(0, 24, 16)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    assert ImageReference("", str(tmp_path / "a.png")).pixels("x").size == (16, 24)
    made_image(0).convert("L").save(tmp_path / "grey.png")
    assert ImageReference("", str(tmp_path / "grey.png")).pixels("x").mode == "RGB"
