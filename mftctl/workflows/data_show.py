"""The `data show` workflow: records as the model sees them, or why they cannot be used."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mftctl.data.encoding import Encoded, Encoder, PromptTooLongError
from mftctl.data.examples import Example
from mftctl.data.prepared.load import load_examples
from mftctl.data.record_issues import REMARK_TEXTS, RecordIssues
from mftctl.data.rendering import Segment
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError, DataError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import added_system_text, load_model_encoder
from mftctl.masking.checkpoints.remote_code import trusting_code
from mftctl.progress import Listener
from mftctl.workflows.planning.problem_list import describe
from mftctl.workflows.planning.training_data import rejected_segments, trained_segments

FIRST_RECORDS = 3
"""Records shown if none are chosen."""


@dataclass(frozen=True, slots=True)
class ShownRecord:
    """A record as the model sees it.

    Attributes:
        index: Its number in the data, from 1.
        where: Origin of the record, such as `train.jsonl:17`.
        outcome: `used`; `dropped`, if the prompt leaves no room for the answer; or `refused`.
        error: Why it is dropped or refused.
        tokens: Number of tokens that are used.
        answer_tokens: Number of those trained on.
        cut_tokens: Number of tokens beyond the maximum length.
        remarks: What else is changed or not trained on.
        segments: The text of the tokens that are used, split where labels begin and end; of a preference, with the
            chosen answer.
        rejected: The rejected answer of a preference, split in the same way.
    """

    index: int
    where: str
    outcome: Literal["used", "dropped", "refused"]
    error: str | None = None
    tokens: int = 0
    answer_tokens: int = 0
    cut_tokens: int = 0
    remarks: tuple[str, ...] = ()
    segments: tuple[Segment, ...] = ()
    rejected: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class ShownData:
    """Some records of the data.

    Attributes:
        model: The model whose tokenizer and chat template are used.
        records: Number of records in the data, including those that cannot be read.
        max_length_tokens: Longer records are truncated at the end.
        shown: The chosen records in order.
    """

    model: str
    records: int
    max_length_tokens: int
    shown: tuple[ShownRecord, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The records to show; the first few without either.

    Attributes:
        index: The number of one record, from 1.
        sample: Number of random records.
    """

    index: int | None = None
    sample: int | None = None

    def of(self, records: int, seed: int) -> list[int]:
        """The chosen ones of a number of records, from 0, in order.

        Raises:
            ConfigError: There is no record with that number.
        """
        if self.index is not None:
            if self.index > records:
                raise ConfigError(
                    "There is no record with this number.",
                    key="--index",
                    expected=f"1 to {records}" if records else "data with records",
                    actual=self.index,
                )
            return [self.index - 1]
        if self.sample is not None:
            return sorted(random.Random(seed).sample(range(records), min(self.sample, records)))
        return list(range(min(FIRST_RECORDS, records)))


def show_data(recipe: Recipe, model: str, choice: Choice, max_length_tokens: int, listener: Listener) -> ShownData:
    """Some records of a recipe's training data as a model sees them.

    Args:
        recipe: Names the data, the chat template, the answers to learn and the seed.
        model: Checkpoint folder, hub id or `quickstart`.
        choice: The records to show.
        max_length_tokens: Longer records are truncated at the end.
        listener: Receives progress updates and notes.

    Raises:
        ConfigError: The recipe names no data, a record that does not exist is chosen, or the chat template does not
            exist.
        DataError: The data cannot be read.
        ModelError: The tokenizer cannot be loaded.
    """
    if not recipe.data:
        raise ConfigError("There is no data to look at.", key="DATA", expected="a file or a hub id", actual="none")
    with trusting_code(recipe.trust_remote_code):
        encoder = load_model_encoder(model, recipe)
        issues = RecordIssues()
        parts = [_Part(source, recipe.seed, issues, listener) for source in recipe.data]
        ends = np.cumsum([0, *map(len, parts)])
        chosen = choice.of(int(ends[-1]), recipe.seed)
        found = []
        for index in chosen:
            number = int(np.searchsorted(ends, index, side="right")) - 1
            found.append((index + 1, parts[number].record(index - int(ends[number]))))
        shown = tuple(_shown(found, encoder, max_length_tokens))
    if issues.ignored:
        listener.note(f"Ignored fields: {', '.join(sorted(issues.ignored))}")
    added = added_system_text(encoder, [record for _, record in found if isinstance(record, Example)])
    if added is not None:
        listener.note(f"Note: {added}")
    return ShownData(model, int(ends[-1]), max_length_tokens, shown)


class _Part:
    """The records of a source in the order of its files, with the errors of those that cannot be read among them."""

    def __init__(self, source: DataSource, seed: int, issues: RecordIssues, listener: Listener) -> None:
        self._examples = load_examples([source], seed=seed, issues=issues, listener=listener, kind=None)
        [table] = self._examples.tables
        self._refused = table.refused()
        numbers = [*table.numbers[self._examples.rows], *(item.number for item in table.summary.refused)]
        self._order = np.argsort(np.array(numbers, np.int64))

    def __len__(self) -> int:
        return len(self._order)

    def record(self, index: int) -> Example | DataError:
        """A record, or why it cannot be read."""
        place = int(self._order[index])
        read = len(self._examples)
        return self._examples[place] if place < read else self._refused[place - read]


def _shown(
    records: Sequence[tuple[int, Example | DataError]], encoder: Encoder, max_length_tokens: int
) -> Iterator[ShownRecord]:
    for index, record in records:
        if isinstance(record, DataError):
            yield ShownRecord(index, str(record.path), "refused", _reason(record))
            continue
        [outcome], [whole] = (encoder.encode_batch([record], length) for length in (max_length_tokens, sys.maxsize))
        total = whole.tokens if isinstance(whole, Encoded) else 0
        if isinstance(outcome, DataError):
            is_long = isinstance(outcome, PromptTooLongError)
            yield ShownRecord(
                index, record.where, "dropped" if is_long else "refused", _reason(outcome), cut_tokens=total
            )
            continue
        yield ShownRecord(
            index,
            record.where,
            "used",
            None,
            outcome.tokens,
            outcome.answer_tokens,
            total - outcome.tokens,
            tuple(text for remark, text in REMARK_TEXTS.items() if remark in outcome.remarks),
            tuple(trained_segments(outcome, encoder.tokenizer)),
            tuple(rejected_segments(outcome, encoder.tokenizer)),
        )


def _reason(error: DataError) -> str:
    """The error without the place of the record, which is shown beside it."""
    return describe(
        DataError(error.message, key=error.key, expected=error.expected, actual=error.actual, hint=error.hint)
    )
