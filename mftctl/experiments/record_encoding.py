"""The encoder for a recipe, and the notes and warnings about its records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence, Sized
from datetime import datetime
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mftctl.data.encoding import EncodedRecords, Encoder, encode_all
from mftctl.data.examples import Example
from mftctl.data.image_inputs import ImageInputs
from mftctl.data.prepared.examples import any_begins_without_system
from mftctl.data.record_issues import RecordIssues
from mftctl.data.template_choice import TemplateChoice, choose_template
from mftctl.errors import DataError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_inputs import TemplateRecord
from mftctl.masking.checkpoints.load import load_tokenizer, model_tokenizer
from mftctl.masking.checkpoints.load_weights import whole_checkpoint
from mftctl.masking.checkpoints.locate import local_folder
from mftctl.masking.checkpoints.vision_language import image_token_ids, load_processor
from mftctl.progress import Listener, Progress

_FEW_RECORDS = 1_000
"""Fewer records are tokenised too quickly to need progress updates."""


def template_choice(recipe: Recipe) -> TemplateChoice:
    """The recipe's choice of chat template."""
    return TemplateChoice(recipe.chat_template, recipe.template_args, recipe.merge_system)


def load_encoder(checkpoint: Path, recipe: Recipe, now: datetime | None = None) -> Encoder:
    """The encoder for a checkpoint's tokenizer with the recipe's chat template.

    Args:
        checkpoint: Contains a tokenizer.
        recipe: Names the template and the answers to learn from.
        now: The current time as seen by a chat template; by default the clock's.

    Raises:
        ModelError: The tokenizer cannot be loaded.
        ConfigError: The template does not exist, or one must be chosen.
    """
    return _encoder(load_tokenizer(checkpoint), whole_checkpoint(checkpoint), recipe, now)


def load_model_encoder(model: str, recipe: Recipe) -> Encoder:
    """The encoder for a model's tokenizer with the recipe's chat template; needs no weights.

    Args:
        model: Checkpoint folder, hub id or `quickstart`.
        recipe: Names the revision, the template and the answers to learn from.

    Raises:
        ModelError: The tokenizer cannot be loaded.
        ConfigError: The template does not exist, or one must be chosen.
    """
    return _encoder(model_tokenizer(model, recipe.revision), local_folder(model), recipe)


def _encoder(
    tokenizer: PreTrainedTokenizerBase, folder: Path | None, recipe: Recipe, now: datetime | None = None
) -> Encoder:
    choose_template(tokenizer, template_choice(recipe))
    return Encoder(tokenizer, learn=recipe.learn, now=now, images=image_inputs(folder, tokenizer))


def image_inputs(folder: Path | None, tokenizer: PreTrainedTokenizerBase) -> ImageInputs | None:
    """The image side of the model in a folder, whose processor is loaded when the first image is seen.

    Args:
        folder: A checkpoint; None for a model that is not on this machine.
        tokenizer: Its tokenizer.

    Returns:
        None for a model that takes only text.
    """
    token_ids = None if folder is None else image_token_ids(folder)
    if folder is None or token_ids is None:
        return None
    return ImageInputs(partial(load_processor, folder, tokenizer), token_ids)


def template_record(encoder: Encoder, recipe: Recipe) -> TemplateRecord:
    """The chat template's entry in a run's record: how it was chosen, its SHA-256, and the time it may use."""
    template = encoder.tokenizer.chat_template
    if not template:
        return TemplateRecord(source=None)
    return TemplateRecord(
        source=recipe.chat_template or "the tokenizer's",
        args=recipe.template_args,
        merge_system=recipe.merge_system,
        digest=hashlib.sha256(str(template).encode()).hexdigest(),
        now=encoder.now.isoformat(timespec="seconds") if "strftime_now" in str(template) else None,
    )


def encode_part(
    examples: Sequence[Example], encoder: Encoder, max_length_tokens: int, issues: RecordIssues, listener: Listener
) -> EncodedRecords:
    """Every example that can be encoded, in order.

    Args:
        examples: What to encode.
        encoder: Encoder of the model's tokenizer.
        max_length_tokens: Longer examples are truncated at the end.
        issues: Collects issues with records and remarks on them.
        listener: Receives progress updates.
    """
    return encode_all(examples, encoder, max_length_tokens, issues, on_progress=_telling(listener, len(examples)))


def _telling(listener: Listener, records: int) -> Callable[[int, int], None] | None:
    if records < _FEW_RECORDS:
        return None
    return lambda done, total: listener.progress(Progress("tokenising", done, total))


def tell_issues(name: str, issues: RecordIssues, max_length_tokens: int, listener: Listener) -> None:
    """Shows the notes and warnings about a part of the data, once.

    Args:
        name: Name of the part, such as `Training data`.
        issues: Issues with its records.
        max_length_tokens: Length at which they were truncated.
        listener: Receives the notes and warnings.
    """
    for line in issues.lines(max_length_tokens):
        listener.note(f"{name}: {line}")
    if issues.learns_no_end:
        listener.warn(f"{name}: {no_end_text(max_length_tokens)}")


def no_end_text(max_length_tokens: int) -> str:
    """The warning shown if every answer is truncated."""
    return (
        f"every answer is truncated, so the model does not learn to stop; raise --max-length (now {max_length_tokens})"
    )


def added_system_text(encoder: Encoder, examples: Iterable[Example]) -> str | None:
    """The note on a system prompt that the chat template itself adds to some example; None if it adds none."""
    chat = encoder.renderer.chat
    if chat is None or not chat.added_system:
        return None
    if not any_begins_without_system(examples):
        return None
    return f"the chat template adds a system prompt of its own: {chat.added_system!r}"


def require_records(name: str, used: Sized, issues: RecordIssues, max_length_tokens: int) -> None:
    """Checks that at least one record can be used.

    Args:
        name: Name of the part, such as `Training data`.
        used: The encoded records.
        issues: Why records were left out.
        max_length_tokens: Length at which they were truncated.

    Raises:
        DataError: No record can be used.
    """
    if not len(used):
        raise DataError(
            f"{name}: no record can be used.",
            expected="at least one",
            actual="; ".join(issues.lines(max_length_tokens)) or "none",
            hint="raise --max-length, or use other data",
        )
