"""Turns images into the inputs of a vision-language model, with the model's own processor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from mftctl.data.image_reference import ImageReference
from mftctl.errors import DataError, ModelError
from mftctl.text import first_line

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import ProcessorMixin

_TEXT_INPUTS = ("input_ids", "attention_mask")
_TOKEN_TYPES = "token_type_ids"
_BLANK_PIXELS = 64
_OTHER_TEXT = "and a text of some length"
_FAILURES = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, ArithmeticError, OSError)
"""What processors raise for images or text that they cannot use."""

LoadProcessor = Callable[[], "ProcessorMixin"]
"""Loads the processor; called once, when the first image is seen."""


class ImageInputs:
    """The image side of a vision-language model.

    The pixels are computed whenever a batch is made; nothing but tokens and references is stored.

    Args:
        load: Loads the processor.
        token_ids: The ids that stand for parts of an image.

    Attributes:
        token_ids: The ids that stand for parts of an image.
    """

    def __init__(self, load: LoadProcessor, token_ids: frozenset[int]) -> None:
        self._load = load
        self.token_ids = token_ids

    def __reduce__(self) -> tuple[object, ...]:
        return ImageInputs, (self._load, self.token_ids)  # another process loads its own processor

    @cached_property
    def processor(self) -> ProcessorMixin:
        """The processor.

        Raises:
            ModelError: It cannot be loaded, or its model is of an unsupported kind.
        """
        return self._load()

    @cached_property
    def placeholder(self) -> str:
        """The text that a chat template writes for an image.

        Raises:
            ModelError: The processor has no such text.
        """
        text = getattr(self.processor, "image_token", None)
        if not isinstance(text, str) or not text:
            raise ModelError(
                "The model's processor does not mark images in the text.",
                expected="a processor with image_token",
                actual=type(self.processor).__name__,
            )
        return text

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the processor's settings and of the libraries that apply them."""
        digest = hashlib.sha256()
        for library in ("transformers", "pillow"):
            digest.update(f"{library} {version(library)}\n".encode())
        for part in (self.processor, self.processor.image_processor):
            digest.update(f"{type(part).__qualname__}\n{part.to_json_string()}\n".encode())
        return digest.hexdigest()

    def expanded(self, text: str, images: Sequence[ImageReference], where: str) -> list[int]:
        """The token ids of a text, with as many tokens for each image as the model's vision tower makes of it.

        Args:
            text: With one placeholder for each image.
            images: The images in order.
            where: Origin of the record, for errors.

        Raises:
            DataError: An image cannot be read, or the processor cannot use the text or an image.
        """
        pixels = [image.pixels(where) for image in images]
        try:
            made = self.processor(text=[text], images=[pixels], add_special_tokens=False)
        except _FAILURES as error:
            raise _unusable(where, error) from error
        ids: list[int] = list(made["input_ids"][0])
        return ids

    def of_batch(
        self, records: Sequence[Sequence[ImageReference]], input_ids: torch.Tensor, where: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """The inputs of a batch beside tokens and attention mask, by the name of the model's argument.

        Args:
            records: The images of each record; the images of all records together follow the order of the tokens.
            input_ids: The padded tokens, int64 `(records, tokens)`.
            where: Origin of each record, for errors.

        Raises:
            DataError: An image cannot be read, has changed since the data was read, or cannot be processed.
        """
        batch = self._pixels(records, where)
        for name, types in self._token_types.items():
            values = torch.zeros_like(input_ids)
            for token, kind in types.items():
                values[input_ids == token] = kind
            batch[name] = values
        return batch

    def _pixels(self, records: Sequence[Sequence[ImageReference]], where: Sequence[str]) -> dict[str, torch.Tensor]:
        shown = [
            [image.pixels(place) for image in images] for images, place in zip(records, where, strict=True) if images
        ]
        if not shown:
            return {}
        try:
            made = self._made([self.placeholder * len(images) for images in shown], shown)
        except _FAILURES as error:
            raise _unusable(", ".join(where), error) from error
        return {name: made[name] for name in self._image_inputs}

    def _made(self, texts: list[str], images: list[list[Image]]) -> dict[str, torch.Tensor]:
        """What the processor makes of texts with a placeholder for each image; some processors need text as well."""
        made = self.processor(text=texts, images=images, return_tensors="pt", padding=True, add_special_tokens=False)
        return {name: value for name, value in made.items() if isinstance(value, torch.Tensor)}

    def _of_blank(self, text: str) -> dict[str, torch.Tensor]:
        """What the processor makes of a blank image in a text."""
        from PIL import Image

        try:
            return self._made([text], [[Image.new("RGB", (_BLANK_PIXELS, _BLANK_PIXELS))]])
        except _FAILURES as error:
            raise ModelError(
                "The model's processor cannot process an image.",
                key=type(self.processor).__name__,
                actual=first_line(error),
            ) from error

    @cached_property
    def _blank(self) -> dict[str, torch.Tensor]:
        return self._of_blank(self.placeholder)

    @cached_property
    def _token_types(self) -> dict[str, dict[int, int]]:
        """For each input that tells kinds of tokens apart, the kind of each token that is not plain text."""
        ids = self._blank["input_ids"].flatten().tolist()
        found: dict[str, dict[int, int]] = {}
        for name, values in self._blank.items():
            if name.endswith(_TOKEN_TYPES):
                pairs = set(zip(ids, values.flatten().tolist(), strict=True))
                if len(pairs) != len(set(ids)):
                    raise self._unsupported(name)
                found[name] = {token: kind for token, kind in pairs if kind}
        return found

    @cached_property
    def _image_inputs(self) -> list[str]:
        """The names of the inputs that follow from the images, whatever the text."""
        other = self._of_blank(f"{self.placeholder} {_OTHER_TEXT}")
        names = [name for name in self._blank if name not in _TEXT_INPUTS and not name.endswith(_TOKEN_TYPES)]
        for name in names:
            if name not in other or not torch.equal(self._blank[name], other[name]):
                raise self._unsupported(name)
        return names

    def _unsupported(self, name: str) -> ModelError:
        return ModelError(
            "The model needs an input that depends on text and images together.",
            key=name,
            expected="a model whose language model reads images as tokens, such as LLaVA, Qwen2-VL or SmolVLM",
            actual=type(self.processor).__name__,
        )


def _unusable(where: str, error: Exception) -> DataError:
    return DataError(
        "The model's processor cannot use the images of a record.",
        path=where,
        key="images",
        actual=first_line(error),
        hint="remove the record, or the text of a placeholder from it",
    )
