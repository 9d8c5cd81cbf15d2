"""Prepares training data: reads, splits, encodes and checks it before the model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mftctl.data.encoding import Encoded
from mftctl.data.examples import Example, RecordKind
from mftctl.data.image_inputs import ImageInputs
from mftctl.data.prepared.examples import Examples, data_digest
from mftctl.data.prepared.load import load_examples
from mftctl.data.prepared.records import PreparedRecords, answer_lengths, encode_prepared, token_lengths
from mftctl.data.record_issues import RecordIssues
from mftctl.data.seen_records import LearnFrom, records_to_learn_from
from mftctl.data.splits import sample_fraction, split_validation
from mftctl.errors import ChangedDataError, ConfigError, DataError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import (
    added_system_text,
    load_encoder,
    require_records,
    tell_issues,
    template_record,
)
from mftctl.experiments.retained_records import RETAINED_DATA
from mftctl.experiments.run_inputs import Digests, RunInputs, TemplateRecord, TrainingData
from mftctl.masking.checkpoints.check import CheckpointCheck, check_checkpoint, check_lengths, tell_remarks
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.progress import Listener, Silence
from mftctl.training.image_support import require_text, require_whole_weights
from mftctl.training.retained_data import RetainedData, prepare_retained

_DATA = "Data"
"""Name of training and validation data that come from the same files."""


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """The inputs of a training run other than the model's weights.

    Attributes:
        checkpoint: Folder of the model to start from.
        tokenizer: The model's tokenizer, with the recipe's chat template.
        train: Encoded training records.
        validation: Encoded validation records.
        digests: SHA-256 of the examples of both parts.
        records: The digest of each training record, uint64.
        left_out: Number of training records excluded from learning.
        template: The chat template's entry in the run's record.
        issues: Number of records in each part that were refused, truncated and so on.
        check: Facts about the checkpoint.
        validation_examples: The examples behind the validation records.
        retained: Records of another domain; None if the recipe names none, or the command does not use them.
        images: The image side of a vision-language model; None for a model that takes only text.
    """

    checkpoint: Path
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Encoded]
    validation: Sequence[Encoded]
    digests: Digests
    records: np.ndarray
    left_out: int
    template: TemplateRecord
    issues: dict[str, dict[str, int]]
    check: CheckpointCheck = field(default_factory=CheckpointCheck)
    validation_examples: Sequence[Example] = ()
    retained: RetainedData | None = None
    images: ImageInputs | None = None

    def template_text(self) -> str:
        """The chat template as described in a model card."""
        if self.template.source is None:
            return "none"
        args = [f"{name}={value}" for name, value in self.template.args.items()]
        merged = ["the system prompt merged into the first question"] if self.template.merge_system else []
        return ", ".join([self.template.source, *args, *merged])

    def summary(self, fft_learning_rate: float | None = None) -> dict[str, Any]:
        """Returns counts and digests for the run's record.

        Args:
            fft_learning_rate: Learning rate of the model's fine-tuning; None for `fft`.
        """
        return TrainingData(
            train_records=len(self.train),
            validation_records=len(self.validation),
            train_answer_tokens=sum(answer_lengths(self.train)),
            digests=self.digests,
            chat_template=self.template,
            record_issues=self.issues,
            model_remarks=list(self.check.remarks),
            fft_learning_rate=fft_learning_rate,
        ).document()


@dataclass(frozen=True, slots=True)
class Parts:
    """The records of a recipe as read.

    Attributes:
        train: Training records.
        validation: Validation records.
        train_issues: Issues with the records that the training part was read from.
        validation_issues: Issues with those of the validation part; the same object if the data was split.
    """

    train: Examples
    validation: Examples
    train_issues: RecordIssues
    validation_issues: RecordIssues

    def named_issues(self) -> dict[str, RecordIssues]:
        """The issues by the name of their part."""
        if self.train_issues is self.validation_issues:
            return {_DATA: self.train_issues}
        return {"Training data": self.train_issues, "Validation data": self.validation_issues}


def prepare_training(
    recipe: Recipe,
    model: str,
    *,
    max_length_tokens: int,
    data_fraction: float = 1.0,
    adapters: bool = False,
    seen: np.ndarray | None = None,
    learn_from: LearnFrom = "all",
    retain_weight: float | None = None,
    kind: RecordKind = "answers",
    now: datetime | None = None,
    listener: Listener | None = None,
) -> TrainingInputs:
    """The encoded training and validation data of a recipe.

    Args:
        recipe: Names the data, the split, the chat template and the seed.
        model: Checkpoint folder, hub id or `quickstart`.
        max_length_tokens: Longer records are truncated at the end.
        data_fraction: Share of the records to learn from that is used.
        adapters: Whether the model may be an adapter.
        seen: Digests of the records that the model was fine-tuned on, uint64; None for none.
        learn_from: How to treat those records; see `records_to_learn_from`.
        retain_weight: Weight of the divergence on the recipe's retained data; None if the command does not use it.
        kind: Kind of the training and validation records.
        now: The current time as seen by a chat template; by default the clock's.
        listener: Receives notes and warnings about the records.

    Raises:
        ConfigError: The recipe names no data, the chat template does not exist, or images cannot be used.
        DataError: A file or a record cannot be used.
        ModelError: The checkpoint does not match its configuration, its tokenizer cannot be loaded, or a record is
            longer than its learned positions.
    """
    if not recipe.data:
        raise ConfigError("Training needs data.", key="--data", expected="a file or a hub id", actual="none given")
    listener = listener or Silence()
    checkpoint = resolve_checkpoint(model, recipe.revision, adapters=adapters)
    encoder = load_encoder(checkpoint, recipe, now)
    check = check_checkpoint(checkpoint, encoder.tokenizer)
    tell_remarks(check, listener)
    parts = split_examples(recipe, listener, kind)
    chosen = parts.train if seen is None else records_to_learn_from(parts.train, seen, learn_from)
    left_out = len(parts.train) - len(chosen)
    chosen = sample_fraction(chosen, data_fraction, recipe.seed) if data_fraction < 1 else chosen
    train = encode_prepared(chosen, encoder, max_length_tokens, parts.train_issues, listener)
    validation = encode_prepared(parts.validation, encoder, max_length_tokens, parts.validation_issues, listener)
    _settle(recipe, parts, train, validation, max_length_tokens, listener)
    retained = None
    if retain_weight is not None and recipe.retain_data:
        known = np.concatenate([parts.train.digests, parts.validation.digests])
        count, trains = len(validation.records), retain_weight > 0
        retained = prepare_retained(recipe, encoder, max_length_tokens, known, count, trains=trains, listener=listener)
        require_text(retained.measured, RETAINED_DATA, "--retain")
    require_whole_weights(train.records)
    if recipe.retain_data and retain_weight is not None:
        require_text(train.records, "Training data beside data to retain", "--retain")
    used = (train.records, validation.records, *([retained.measured, retained.trained] if retained else []))
    check_lengths(check, [length for records in used for length in token_lengths(records)], checkpoint)
    added = added_system_text(encoder, train.examples)
    if added is not None:
        listener.note(f"Training data: {added}")
    named = {**parts.named_issues(), **({RETAINED_DATA: retained.issues} if retained else {})}
    return TrainingInputs(
        checkpoint,
        encoder.tokenizer,
        train.records,
        validation.records,
        _digests(train, validation, retained),
        train.examples.digests,
        left_out,
        template_record(encoder, recipe),
        {name: counts for name, issues in named.items() if (counts := issues.counts())},
        check,
        validation.examples,
        retained,
        encoder.images,
    )


def _digests(train: PreparedRecords, validation: PreparedRecords, retained: RetainedData | None) -> Digests:
    found = Digests(train=data_digest(train.examples), validation=data_digest(validation.examples))
    return found if retained is None else found.model_copy(update={"retained": retained.digest})


def _settle(
    recipe: Recipe,
    parts: Parts,
    train: PreparedRecords,
    validation: PreparedRecords,
    max_length_tokens: int,
    listener: Listener,
) -> None:
    """Refuses unusable records, or reports that they are left out."""
    for name, issues in parts.named_issues().items():
        issues.settle(recipe.bad_records, recipe.bad_records_max, part=name)
        tell_issues(name, issues, max_length_tokens, listener)
    require_records("Training data", train.records, parts.train_issues, max_length_tokens)
    require_records("Validation data", validation.records, parts.validation_issues, max_length_tokens)


def split_examples(recipe: Recipe, listener: Listener, kind: RecordKind = "answers") -> Parts:
    """The training and validation records of a recipe; unreadable records are listed in the issues.

    Args:
        recipe: Names the data, the split and the seed.
        listener: Receives progress updates and notes on the cache.
        kind: Kind of the records.

    Raises:
        DataError: A file cannot be used, has records of another kind, or there are too few records to split.
    """
    issues = RecordIssues()
    train = load_examples(recipe.data, seed=recipe.seed, issues=issues, listener=listener, kind=kind)
    if recipe.val_data:
        of_validation = RecordIssues()
        validation = load_examples(
            recipe.val_data, seed=recipe.seed, issues=of_validation, listener=listener, kind=kind
        )
        return Parts(train, validation, issues, of_validation)
    try:
        kept, held_out = split_validation(train, recipe.val_fraction, recipe.seed)
    except DataError:
        issues.settle(recipe.bad_records, recipe.bad_records_max, part=_DATA)  # they explain why there are so few
        raise
    return Parts(kept, held_out, issues, issues)


def require_same_data(before: RunInputs, inputs: TrainingInputs) -> None:
    """Checks that a resumed run has the same data and chat template as when it began.

    Args:
        before: The inputs in the run's record; a new run has no data entries yet.
        inputs: The current inputs.

    Raises:
        ChangedDataError: The data or the template has changed.
    """
    began = {**before.digests.document(), "chat template": before.chat_template.digest}
    now = {**inputs.digests.document(), "chat template": inputs.template.digest}
    changed = [name for name, digest in began.items() if digest is not None and digest != now.get(name)]
    if changed:
        raise ChangedDataError(
            "The data has changed since this run began.",
            key=", ".join(changed),
            expected=", ".join(f"SHA-256 {began[name]}" for name in changed),
            actual=", ".join(str(now.get(name)) for name in changed),
            hint="restore the data, or start a new run without --resume",
        )
