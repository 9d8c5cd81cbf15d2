"""The tokens of text that shows images, and of text that must not."""

from __future__ import annotations

from collections.abc import Sequence

from mftctl.data.image_inputs import ImageInputs
from mftctl.data.image_reference import ImageReference
from mftctl.data.rendering import Segment
from mftctl.errors import DataError


def image_segment_ids(
    segments: Sequence[Segment],
    references: Sequence[ImageReference],
    images: ImageInputs,
    line_end: Sequence[int],
    where: str,
) -> dict[int, list[int]]:
    """The token ids of the segments that show images, by their number.

    Like other segments, they are tokenised on their own; see `TextTokens` for the newline before one that continues.

    Args:
        segments: The rendered text.
        references: The images in order.
        images: The image side of the model.
        line_end: The tokens of a newline.
        where: Origin of the record, for errors.

    Raises:
        DataError: The text has more or fewer placeholders than images, an answer has one, or an image cannot be used.
    """
    counts = [segment.text.count(images.placeholder) for segment in segments]
    in_answers = any(count and segment.is_answer for count, segment in zip(counts, segments, strict=True))
    if sum(counts) != len(references) or in_answers:
        raise DataError(
            "The number of image placeholders in the text differs from the number of images.",
            path=where,
            key="images",
            expected=f"{len(references)} times {images.placeholder}, before the answer",
            actual=f"{sum(counts)} times",
            hint="remove the placeholder from the text, or choose a chat template for images",
        )
    left, found = iter(references), {}
    for number, (segment, count) in enumerate(zip(segments, counts, strict=True)):
        if count:
            shown = [next(left) for _ in range(count)]
            found[number] = _ids(segment.text, shown, images, line_end if number else (), where)
    return found


def require_vision(references: Sequence[ImageReference], images: ImageInputs | None, where: str) -> None:
    """Checks that a model takes images if a record has some.

    Args:
        references: The images of the record.
        images: The image side of the model; None for a model that takes only text.
        where: Origin of the record, for errors.

    Raises:
        DataError: It takes only text.
    """
    if references and images is None:
        raise DataError(
            "The record has images, but the model takes only text.",
            path=where,
            key="images",
            expected="a vision-language model, such as LLaVA, Qwen2-VL or SmolVLM",
            hint="use such a model (one of the hub as a folder), or remove the field if the text works without it",
        )


def require_no_image_token(input_ids: Sequence[int], images: ImageInputs | None, where: str) -> None:
    """Checks that a record without images has no token that stands for a part of one.

    Args:
        input_ids: Its tokens.
        images: The image side of the model; None for a model that takes only text.
        where: Origin of the record, for errors.

    Raises:
        DataError: It has.
    """
    if images is not None and not images.token_ids.isdisjoint(input_ids):
        raise DataError(
            "The text contains the model's token for images, but the record has no images.",
            path=where,
            expected="images in the field images",
            actual="none",
            hint="remove the placeholder from the text, or add the images",
        )


def _ids(
    text: str, shown: Sequence[ImageReference], images: ImageInputs, line_end: Sequence[int], where: str
) -> list[int]:
    """The tokens of a segment; with `line_end`, as the continuation of other text."""
    if line_end:
        ids = images.expanded(f"\n{text}", shown, where)
        if ids[: len(line_end)] == list(line_end):
            return ids[len(line_end) :]
    return images.expanded(text, shown, where)
