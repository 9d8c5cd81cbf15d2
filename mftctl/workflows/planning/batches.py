"""The largest batches of training, validation and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mftctl.data.encoding import Encoded
from mftctl.data.prepared.records import Sides, answer_lengths, token_lengths
from mftctl.evaluation.inference import length_batches
from mftctl.experiments.training_options import TrainingOptions
from mftctl.training.schedule import micro_batch_records, records_per_step, sequences_of_a_record

VALIDATION_TOKENS = 4096
"""Batch size of `sample_losses`."""


@dataclass(frozen=True, slots=True)
class Batches:
    """The largest batches of a training run and its validation, in sequences: a preference has two.

    Attributes:
        records: Sequences per training batch.
        length_tokens: Tokens of the longest training sequence.
        padded: Whether sequences differ in length, so that attention needs a mask tensor.
        validation_records: Sequences per validation batch.
        validation_tokens: Tokens of the longest validation sequence.
        scored_tokens: Positions in a validation batch whose logits are computed.
        answer_tokens: Maximum answer tokens of a training batch, the only positions whose logits are computed.
    """

    records: int
    length_tokens: int
    padded: bool
    validation_records: int
    validation_tokens: int
    scored_tokens: int
    answer_tokens: int


def largest_batches(
    train: Sequence[Encoded], validation: Sequence[Encoded], batch_size: int, batch_tokens: int | None = None
) -> Batches:
    """Returns the batches that need the most memory; the trainer groups records of similar length.

    Args:
        train: Training records, at least one.
        validation: Validation records, at least one.
        batch_size: Records per training batch.
        batch_tokens: Padded tokens per training batch; overrides `batch_size`.
    """
    paired = 1 if train[0].rejected is None else 2
    lengths = sorted(token_lengths(train), reverse=True)
    answers = sorted(answer_lengths(train), reverse=True)
    if batch_tokens is not None:
        batches = length_batches(lengths, batch_tokens // paired)
        largest = max(batches, key=lambda batch: len(batch) * lengths[batch[0]])
        lengths = [lengths[index] for index in largest]
        answers = answers[: max(map(len, batches))]
        answer_tokens = min(sum(answers), max(batch_tokens, lengths[0]))
    else:
        lengths = lengths[:batch_size]
        answer_tokens = sum(answers[:batch_size])
    sequences = validation if validation[0].rejected is None else Sides(validation)
    sizes = token_lengths(sequences)
    groups = length_batches(sizes, VALIDATION_TOKENS)
    scored = {len(group) * _scored_tokens([sequences[index] for index in group]) for group in groups}
    widest = max(groups, key=lambda group: len(group) * sizes[group[0]])
    return Batches(
        records=paired * len(lengths),
        length_tokens=lengths[0],
        padded=paired > 1 or lengths[0] != lengths[-1],
        validation_records=len(widest),
        validation_tokens=sizes[widest[0]],
        scored_tokens=min(sizes[widest[0]], -(-max(scored) // len(widest))),
        answer_tokens=answer_tokens,
    )


def assumed_batches(batch_size: int, max_length_tokens: int) -> Batches:
    """The largest possible batches, for data with unknown token counts.

    Args:
        batch_size: Sequences per training batch.
        max_length_tokens: Their length.
    """
    records = max(1, VALIDATION_TOKENS // max_length_tokens)
    answer_tokens = batch_size * (max_length_tokens - 1)
    return Batches(batch_size, max_length_tokens, True, records, max_length_tokens, max_length_tokens, answer_tokens)


def batches_of(options: TrainingOptions, train: Sequence[Encoded], validation: Sequence[Encoded]) -> Batches:
    """The largest batches of a training run.

    Args:
        options: Training options.
        train: Training records; empty if their tokens are unknown.
        validation: Validation records; empty if their tokens are unknown.
    """
    if not train or not validation:
        at_once = micro_batch_records(options, options.max_length_tokens) * sequences_of_a_record(options)
        return assumed_batches(at_once, options.max_length_tokens)
    at_once = micro_batch_records(options, max(token_lengths(train)))
    # A step of few records is one forward pass, even if more tokens would fit.
    whole = options.batch_tokens is None or at_once == records_per_step(options)
    return largest_batches(train, validation, at_once, None if whole else options.batch_tokens)


def _scored_tokens(records: Sequence[Encoded]) -> int:
    """Number of positions where any record of a batch has an answer token."""
    return len({index for record in records for index, label in enumerate(record.labels[1:]) if label >= 0})
