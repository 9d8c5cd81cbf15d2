"""The records of another domain that a training measures and, if asked to, trains against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mftctl.data.encoding import Encoded, Encoder
from mftctl.data.prepared.examples import Examples, data_digest
from mftctl.data.prepared.load import load_examples
from mftctl.data.prepared.records import encode_prepared
from mftctl.data.record_issues import RecordIssues
from mftctl.data.retained import split_retained, without_training_records
from mftctl.data.sources import EVALUATION_SEED
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import require_records, tell_issues
from mftctl.experiments.retained_records import RETAINED_DATA
from mftctl.progress import Listener


@dataclass(frozen=True, slots=True)
class RetainedData:
    """Records of another domain.

    Attributes:
        measured: Held-out records, at most as many as there are validation records.
        trained: Records that the divergence is computed on.
        digest: SHA-256 of the examples of both.
        issues: Issues with the records they were read from.
    """

    measured: Sequence[Encoded]
    trained: Sequence[Encoded]
    digest: str
    issues: RecordIssues


def prepare_retained(
    recipe: Recipe,
    encoder: Encoder,
    max_length_tokens: int,
    known: np.ndarray,
    most_measured: int,
    *,
    trains: bool,
    listener: Listener,
) -> RetainedData:
    """The encoded records of `retain_data`, without those that also occur in the other data.

    Args:
        recipe: Names the data.
        encoder: Encoder for the model's tokenizer.
        max_length_tokens: Longer records are truncated at the end.
        known: Digests of the training and validation records, uint64.
        most_measured: Number of held-out records to measure, if there are so many.
        trains: Whether the other records are trained on, so that there must be some.
        listener: Receives notes and warnings about the records.

    Raises:
        DataError: A file or a record cannot be used, all records are training records, or there are too few.
    """
    issues = RecordIssues()
    examples = load_examples(recipe.retain_data, seed=EVALUATION_SEED, issues=issues, listener=listener)
    issues.settle(recipe.bad_records, recipe.bad_records_max, part=RETAINED_DATA)
    new = without_training_records(examples, known)
    if len(new) < len(examples):
        listener.note(f"Retained data: left out because they are training records: {len(examples) - len(new)}")
    held_out, rest = split_retained(new)
    measured = encode_prepared(held_out[:most_measured], encoder, max_length_tokens, issues, listener)
    trained = encode_prepared(rest if trains else rest[:0], encoder, max_length_tokens, issues, listener)
    issues.settle(recipe.bad_records, recipe.bad_records_max, part=RETAINED_DATA)
    tell_issues(RETAINED_DATA, issues, max_length_tokens, listener)
    require_records(RETAINED_DATA, measured.records, issues, max_length_tokens)
    if trains:
        require_records(f"{RETAINED_DATA} to train on", trained.records, issues, max_length_tokens)
    digest = data_digest(Examples.joined([measured.examples, trained.examples]))
    return RetainedData(measured.records, trained.records, digest, issues)
