"""The `generate` workflow: answers of a model to a few prompts, without and with a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TextStreamer

from mftctl.data.batching import pad_token_id
from mftctl.data.encoding import Encoder
from mftctl.data.examples import Example, Message
from mftctl.data.image_reference import ImageReference
from mftctl.data.images import placed_images, read_images
from mftctl.data.prepared.load import load_examples
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError, DataError
from mftctl.evaluation.answer_stops import answer_stops
from mftctl.evaluation.generation import (
    PromptImages,
    context_tokens,
    continue_prompts,
    generate_answers,
    generation_settings,
)
from mftctl.evaluation.inference import evaluation_mode
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import load_encoder
from mftctl.masking.checkpoints.gpu_maps import gpu_map
from mftctl.masking.checkpoints.load import evaluation_dtype, load_model
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.checkpoints.remote_code import trusting_code
from mftctl.masking.delta.either import apply_in_memory, checkpoint_files, open_applicable
from mftctl.progress import Listener, Progress
from mftctl.runtime.devices import Use, find_device, using
from mftctl.runtime.torch_failures import gpu_failures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256
"""Maximum tokens per answer if the recipe sets none."""

OnText = Callable[[str], None]
"""Receives the text of an answer as it is generated."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and its answers.

    Attributes:
        prompt: The question: the text of the turn before the answer.
        reference: The answer in the data; None for a prompt given as text.
        answer: The model's answer.
        masked_answer: The answer with the mask; None without one.
    """

    prompt: str
    reference: str | None
    answer: str
    masked_answer: str | None = None


def prompt_examples(
    prompts: Sequence[str], data: Sequence[str], limit: int, images: Sequence[Path] = ()
) -> list[Example]:
    """The prompts given as text, then those of the records in the data.

    Args:
        prompts: Texts.
        data: Files or hub ids.
        limit: Maximum number of records.
        images: Image files, shown before each of the texts.

    Raises:
        ConfigError: There are images, but no texts.
        DataError: The data or an image cannot be read, or its records have no prompt.
    """
    if images and not prompts:
        raise ConfigError("Images belong to prompts.", key="--image", expected="--prompt as well", actual="no prompt")
    texts = [_asked(text, images, f"prompt {number}") for number, text in enumerate(prompts, start=1)]
    records = list(load_examples([DataSource.parse(source) for source in data])[:limit]) if data else []
    asked = [record for record in records if record.prompt]
    if records and not asked:
        raise DataError(
            "The records have no prompt to answer.",
            path=", ".join(data),
            expected="questions and answers",
            actual="plain text",
        )
    return [*texts, *asked]


def _asked(text: str, images: Sequence[Path], where: str) -> Example:
    """A prompt given as text, after images."""
    example = Example("chat", (Message("user", text), Message("assistant", "-")), where)
    shown = tuple(ImageReference("", path=str(image)) for image in images)
    return read_images(placed_images(example, shown, where), folder=None)


def generate(
    recipe: Recipe,
    source: ModelSource,
    examples: Sequence[Example],
    listener: Listener,
    *,
    texts: int = 0,
    on_text: OnText | None = None,
) -> list[Answered]:
    """Greedy answers of a model to each prompt and, if the source has a mask, also with the mask applied.

    Args:
        recipe: With the `eval` section, the chat template and the device.
        source: The model, optionally with a mask.
        examples: From `prompt_examples`.
        listener: Receives progress updates.
        texts: Number of examples at the start that are prompts given as text, without a reference.
        on_text: Receives the text while it is generated, one answer after another, with headings; without it, answers
            are generated in batches.

    Raises:
        DeviceMemoryError: The GPU runs out of memory.
        EvaluationError: A prompt does not fit the model's context.
        MaskFileError: The mask is damaged or does not match the model.
        ModelError: The checkpoint cannot be loaded.
    """
    with (
        trusting_code(recipe.trust_remote_code),
        using(Use(find_device(recipe.device), recipe.attention, "fp32", lambda attention: None)),
        gpu_failures("generating answers"),
    ):
        checkpoint = resolve_checkpoint(source.model, recipe.revision, adapters=True)
        encoder = load_encoder(checkpoint, recipe)
        dtype = evaluation_dtype(checkpoint)
        model = load_model(checkpoint, dtype=dtype, device_map=gpu_map(checkpoint, dtype))
        answers = _answers(model, encoder, examples, recipe, listener, on_text, source.state)
        masked: Sequence[str | None] = [None] * len(examples)
        with open_applicable(source.mask) as applied, checkpoint_files(checkpoint, applied) as changed:
            if applied is not None:
                if changed != checkpoint:  # a delta file has brought its own chat template or stop tokens
                    encoder = load_encoder(changed, recipe)
                    model = load_model(changed, dtype=dtype, device_map=gpu_map(changed, dtype))
                apply_in_memory(model, applied, checkpoint)
                masked = _answers(model, encoder, examples, recipe, listener, on_text, f"with {source.mask}")
    return [
        Answered(_question(example), None if number < texts else example.answer, answer, masked_answer)
        for number, (example, answer, masked_answer) in enumerate(zip(examples, answers, masked, strict=True))
    ]


def _answers(
    model: PreTrainedModel,
    encoder: Encoder,
    examples: Sequence[Example],
    recipe: Recipe,
    listener: Listener,
    on_text: OnText | None,
    heading: str,
) -> list[str]:
    max_new_tokens = _room(recipe, model, encoder, examples)
    if on_text is None:
        return generate_answers(
            model,
            encoder,
            examples,
            max_new_tokens=max_new_tokens,
            on_progress=lambda done, total: listener.progress(Progress(f"answering {heading}", done, total)),
        )
    on_text(f"[{heading}]\n")
    answers = []
    for example in examples:
        if len(examples) > 1:
            on_text(f"> {_question(example)}\n")
        answers += _streamed(model, encoder, example, max_new_tokens, on_text)
        on_text("\n")
    return answers


def _streamed(
    model: PreTrainedModel, encoder: Encoder, example: Example, max_new_tokens: int, on_text: OnText
) -> list[str]:
    """The answer to one prompt, which is also passed on as it is generated."""
    tokenizer = encoder.tokenizer
    stops, parts = answer_stops(model, tokenizer), list[str]()

    def take(text: str) -> None:
        parts.append(text)
        on_text(text)

    with (
        evaluation_mode(model),
        generation_settings(model, stops, pad_token_id(tokenizer), max_new_tokens),
    ):
        continue_prompts(
            model,
            tokenizer,
            [encoder.prompt(example)],
            pad_id=pad_token_id(tokenizer),
            stop_texts=stops.texts,
            streamer=_Streamer(tokenizer, take),
            asked=PromptImages.of(encoder, [example]),
        )
    return ["".join(parts)]


class _Streamer(TextStreamer):
    """Passes on the text of whole words instead of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: OnText) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Passes on a piece of text."""
        self._on_text(text)


def _room(recipe: Recipe, model: PreTrainedModel, encoder: Encoder, examples: Sequence[Example]) -> int:
    """Maximum tokens per answer: the recipe's, or the default as far as the longest prompt leaves room."""
    if recipe.eval.max_new_tokens is not None:
        return recipe.eval.max_new_tokens
    limit = context_tokens(model)
    longest = max(len(encoder.prompt(example)) for example in examples)
    return MAX_NEW_TOKENS if limit is None else max(1, min(MAX_NEW_TOKENS, limit - longest))


def _question(example: Example) -> str:
    return example.prompt[-1].content
