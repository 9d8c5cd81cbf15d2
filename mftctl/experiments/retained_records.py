"""The held-out records of a recipe's data to retain, which show what a model forgets."""

from __future__ import annotations

from collections.abc import Sequence

from mftctl.data.encoding import EncodedRecords, Encoder
from mftctl.data.examples import Example
from mftctl.data.prepared.load import load_examples
from mftctl.data.record_issues import RecordIssues
from mftctl.data.retained import split_retained
from mftctl.data.sources import EVALUATION_SEED
from mftctl.errors import DataError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import added_system_text, encode_part, require_records, tell_issues
from mftctl.progress import Listener

RETAINED_DATA = "Retained data"
"""Name of the part in messages and in the record of a run."""


def load_held_out(recipe: Recipe, issues: RecordIssues, listener: Listener) -> Sequence[Example]:
    """The records that are measured and never trained on; empty without data to retain.

    Args:
        recipe: Names the data to retain.
        issues: Collects problems with records.
        listener: Receives progress updates.

    Raises:
        DataError: The data cannot be read, or no record is held out.
    """
    if not recipe.retain_data:
        return []
    examples = load_examples(recipe.retain_data, seed=EVALUATION_SEED, issues=issues, listener=listener)
    try:
        return split_retained(examples)[0]
    except DataError:
        # Unusable records explain why there are so few.
        issues.settle(recipe.bad_records, recipe.bad_records_max, part=RETAINED_DATA)
        raise


def encode_measured(
    name: str,
    examples: Sequence[Example],
    recipe: Recipe,
    encoder: Encoder,
    max_length_tokens: int,
    issues: RecordIssues,
    listener: Listener,
) -> EncodedRecords:
    """The usable records of a part that is only measured; tells of problems with the others.

    Args:
        name: Name of the part, such as `Test data`.
        examples: Its records; none if the recipe names no such data.
        recipe: Says how many unusable records may be left out.
        encoder: Encoder of the model's tokenizer.
        max_length_tokens: Longer records are truncated at the end.
        issues: Problems found while reading the records; receives further ones.
        listener: Receives notes and warnings about the records.

    Raises:
        DataError: Some records cannot be used.
    """
    used = encode_part(examples, encoder, max_length_tokens, issues, listener)
    issues.settle(recipe.bad_records, recipe.bad_records_max, part=name)
    tell_issues(name, issues, max_length_tokens, listener)
    if examples or issues.records:
        require_records(name, used.records, issues, max_length_tokens)
    added = added_system_text(encoder, used.examples)
    if added is not None:
        listener.note(f"{name}: {added}")
    return used
