"""The images of records: read from their fields, and placed in their turns."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from mftctl.data.examples import Example, Message
from mftctl.data.image_reference import ImageReference, read_image
from mftctl.data.turns import IMAGE_KEYS, Fields, wrong_type
from mftctl.errors import DataError

IMAGES = ("images", "image")
"""Fields of a record with its images."""

_TURNS = ("messages", "conversations", "prompt", "completion")
"""Fields of a record with turns that may have image parts, in their order."""

_MARK = "<image>"
"""Stands for an image in the text of the data of LLaVA and others."""

_FORMS = "a path, bytes, or an object with path or bytes"


def given_images(fields: Fields, where: str) -> tuple[ImageReference, ...]:
    """The images of a record, not yet read.

    Args:
        fields: The record: a list in `images`, one image in `image`, or images named by the image parts of its turns.
        where: Its origin, for errors.

    Raises:
        DataError: A field has the wrong type, or there are two of them.
    """
    keys, named = [name for name in IMAGES if fields.get(name)], list(_in_parts(fields))
    if len(keys) + bool(named) > 1:
        raise DataError(
            "The record names images in two places.",
            path=where,
            key=named[0][0] if named else keys[1],
            expected=f"only {keys[0]}",
            hint="put all images of a record into the list images",
        )
    if not keys:
        return tuple(_given(image, where, key) for key, image in named)
    key = keys[0]
    value = fields[key]
    images = value if isinstance(value, list) else [value]
    return tuple(_given(image, where, f"{key}[{index}]") for index, image in enumerate(images))


def placed_images(example: Example, images: tuple[ImageReference, ...], where: str) -> Example:
    """The example with its images: at its image parts, at `<image>` in its questions, or before the first question.

    Args:
        example: Without images.
        images: From `given_images`.
        where: Origin of the record, for errors.

    Raises:
        DataError: The numbers of parts and images differ, an answer has an image, or the record has no question.

    Source: TRL, `prepare_multimodal_messages`, for images without places; LLaVA's data for `<image>`.
    """
    places = sum(len(message.image_places) for message in example.messages)
    if not images and not places:
        return example
    if example.rejected or example.kind in ("text", "tokens"):
        raise _unsupported("a preference" if example.rejected else f"{example.kind} without turns", where)
    if any(message.image_places for message in example.messages if message.role == "assistant"):
        raise _unsupported("an answer that contains an image", where)
    messages = list(example.messages)
    if not places:
        messages = [_marked(message) for message in messages]
        places = sum(len(message.image_places) for message in messages)
    if not places:
        first = next((index for index, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise _unsupported("no user turn", where)
        messages[first] = replace(messages[first], image_places=(0,) * len(images))
        places = len(images)
    if places != len(images):
        raise DataError(
            "The number of places for images differs from the number of images.",
            path=where,
            key=IMAGES[0],
            expected=f"{len(images)} parts of type image or marks {_MARK}, or none",
            actual=places,
        )
    return replace(example, messages=tuple(messages), images=images)


def _in_parts(fields: Fields) -> Iterator[tuple[str, Any]]:
    """Yields the place and the value of each image that an image part names, in the order of the turns."""
    for field in _TURNS:
        turns = fields.get(field)
        for number, turn in enumerate(turns if isinstance(turns, list) else ()):
            content = turn.get("content") if isinstance(turn, Mapping) else None
            for index, part in enumerate(content if isinstance(content, list) else ()):
                if isinstance(part, Mapping) and part.get("type") == "image":
                    named = (key for key in IMAGE_KEYS if part.get(key) is not None)
                    yield from ((f"{field}[{number}].content[{index}].{key}", part[key]) for key in named)


def _marked(message: Message) -> Message:
    """A question with places instead of the marks in its text."""
    if message.role != "user" or _MARK not in message.content:
        return message
    first, *others = message.content.split(_MARK)
    places = accumulate((len(text) for text in others[:-1]), initial=len(first))
    return replace(message, content="".join([first, *others]), image_places=tuple(places))


def read_images(example: Example, folder: Path | None) -> Example:
    """The example with the digests of its images; relative paths are looked up in the folder of the data file.

    Args:
        example: With images as given.
        folder: The folder; None for a dataset that is not in a local file.

    Raises:
        DataError: An image file is missing.
    """
    return replace(example, images=tuple(_with_digest(image, folder, example.where) for image in example.images))


def located(path: str, folder: Path | None) -> Path:
    """The place of an image file.

    Args:
        path: As given in a record.
        folder: The folder of the data file; None if there is none.
    """
    place = Path(path).expanduser()
    return place if folder is None else folder / place


def _with_digest(image: ImageReference, folder: Path | None, where: str) -> ImageReference:
    content = image.content or read_image(located(image.path, folder), where)
    return replace(image, sha256=hashlib.sha256(content).hexdigest())


def _given(image: Any, where: str, key: str) -> ImageReference:
    if isinstance(image, bytes) and image:
        return ImageReference("", content=image)
    if isinstance(image, Mapping):
        content, path = image.get("bytes"), image.get("path")
        if isinstance(content, bytes) and content:
            return ImageReference("", content=content)
        image = path
    if not isinstance(image, str) or not image:
        raise wrong_type(where, key, _FORMS, image)
    image = image.removeprefix("file://")
    if "://" in image or image.startswith("data:"):
        raise DataError(
            "An image is not on this machine.",
            path=where,
            key=key,
            expected=_FORMS,
            actual=f"{image[:60]}",
            hint="download it, and give its path",
        )
    return ImageReference("", path=image)


def _unsupported(actual: str, where: str) -> DataError:
    return DataError(
        "The record cannot have images.",
        path=where,
        key=IMAGES[0],
        expected="questions with images, and answers in text",
        actual=actual,
    )
