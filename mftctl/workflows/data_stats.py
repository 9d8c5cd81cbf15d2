"""The `data stats` workflow: lengths, duplicates, and overlap between training, validation and test data."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np

from mftctl.data.contamination import NgramIndex
from mftctl.data.encoding import Encoder
from mftctl.data.overlap import Matches, parsed, question_keys, repeated, shared
from mftctl.data.prepared.examples import Examples
from mftctl.data.prepared.load import load_examples
from mftctl.data.prepared.records import Records, Side, encode_prepared
from mftctl.data.record_issues import RecordIssues
from mftctl.data.retained import split_retained
from mftctl.data.sources import EVALUATION_SEED
from mftctl.data.splits import split_validation
from mftctl.errors import ConfigError, DataError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import load_model_encoder
from mftctl.masking.checkpoints.remote_code import trusting_code
from mftctl.progress import Listener, Progress
from mftctl.workflows.planning.problem_list import describe

_MOST_EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class RecordPair:
    """Two records that match.

    Attributes:
        where: Origin of the record, such as `test.jsonl:17`.
        other: Origin of the first record that it matches.
    """

    where: str
    other: str


@dataclass(frozen=True, slots=True)
class Found:
    """Records that match others.

    Attributes:
        records: Their number.
        share: Their share of the part.
        examples: The first few.
    """

    records: int
    share: float
    examples: tuple[RecordPair, ...]


@dataclass(frozen=True, slots=True)
class LengthBin:
    """A bar of the histogram of lengths.

    Attributes:
        least: Smallest length in tokens.
        most: Largest length in tokens.
        records: Number of records of these lengths.
    """

    least: int
    most: int
    records: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of records in tokens, before truncation; each percentile is the length of some record.

    Attributes:
        least: The smallest.
        median: The median, the smaller of two.
        p90: The 90th percentile.
        p99: The 99th percentile.
        most: The largest.
        histogram: Number of records by length.
    """

    least: int
    median: int
    p90: int
    p99: int
    most: int
    histogram: tuple[LengthBin, ...]


@dataclass(frozen=True, slots=True)
class TokenStats:
    """The tokens of a part.

    Attributes:
        tokens: Number of tokens that training uses.
        answer_tokens: Number of those trained on.
        cut_tokens: Number of tokens beyond the maximum length.
        truncated: Records that are truncated.
        truncated_share: Their share of the records that are tokenised.
        overlong: Records left out, as their prompt leaves no room for the answer.
        lengths: Their lengths; None without a record.
    """

    tokens: int
    answer_tokens: int
    cut_tokens: int
    truncated: int
    truncated_share: float
    overlong: int
    lengths: Lengths | None


@dataclass(frozen=True, slots=True)
class PreferenceStats:
    """The lengths of the answers of preferences in tokens, before truncation.

    Attributes:
        records: Number of preferences.
        chosen: Lengths of the chosen answers.
        rejected: Lengths of the rejected answers.
    """

    records: int
    chosen: Lengths
    rejected: Lengths


@dataclass(frozen=True, slots=True)
class PartStats:
    """The statistics of a part of the data.

    Attributes:
        part: `train`, `validation`, `test`, or a half of the data to retain: `retained_held_out` or
            `retained_to_train`.
        records: Records that can be read.
        refused: Records that cannot be read or tokenised; those of data that is split count as training data.
        refused_examples: Why the first few are refused.
        same_content: Records with the content of an earlier one.
        same_prompt: Records with the prompt of an earlier one.
        tokens: The tokens; None without a model.
        preferences: The answers of preferences; None without any, or without a model.
    """

    part: str
    records: int
    refused: int
    refused_examples: tuple[str, ...]
    same_content: Found
    same_prompt: Found
    tokens: TokenStats | None
    preferences: PreferenceStats | None = None


@dataclass(frozen=True, slots=True)
class Overlap:
    """Records of one part that occur in another.

    Attributes:
        part: The part whose records are counted.
        other: The part that they occur in.
        same_content: Records that are equal.
        same_prompt: Records with the same prompt, apart from space around its turns.
        ngrams: Records that share 13 consecutive words; only looked for in training data.
    """

    part: str
    other: str
    same_content: Found
    same_prompt: Found
    ngrams: Found | None


@dataclass(frozen=True, slots=True)
class DataStats:
    """The statistics of training, validation and test data, and of the data to retain.

    Attributes:
        model: The model that tokenises; None without one.
        max_length_tokens: Length at which records are truncated.
        parts: Each part that has data.
        overlaps: Each pair of parts.
    """

    model: str | None
    max_length_tokens: int
    parts: tuple[PartStats, ...]
    overlaps: tuple[Overlap, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the data with the keys by which its records are compared."""

    name: str
    examples: Examples
    issues: RecordIssues
    questions: np.ndarray


def data_stats(recipe: Recipe, model: str | None, max_length_tokens: int, listener: Listener) -> DataStats:
    """The statistics of a recipe's data.

    Args:
        recipe: Names the data of all parts, the split, the chat template, the answers to learn and the seed.
        model: Checkpoint folder, hub id or `quickstart`; None to tokenise nothing.
        max_length_tokens: Longer records are truncated at the end.
        listener: Receives progress updates, notes and warnings.

    Raises:
        ConfigError: The recipe names no data, or the chat template does not exist.
        DataError: The data cannot be read.
        ModelError: The tokenizer cannot be loaded.
    """
    with trusting_code(recipe.trust_remote_code):
        encoder = None
        if model is not None:
            encoder = load_model_encoder(model, recipe)
        parts = _parts(recipe, listener)
        stats = tuple(_part_stats(part, encoder, max_length_tokens, listener) for part in parts)
        return DataStats(model, max_length_tokens, stats, tuple(_overlaps(parts, listener)))


def _parts(recipe: Recipe, listener: Listener) -> list[_Part]:
    """The parts that have data."""
    if not (recipe.data or recipe.val_data or recipe.test_data or recipe.retain_data):
        raise ConfigError("There is no data to look at.", key="--data", expected="a file or a hub id", actual="none")
    read = []
    for name, sources, seed in (
        ("train", recipe.data, recipe.seed),
        ("validation", recipe.val_data, recipe.seed),
        ("test", recipe.test_data, EVALUATION_SEED),
    ):
        if sources:
            issues = RecordIssues()
            examples = load_examples(sources, seed=seed, issues=issues, listener=listener, kind=None)
            read.append((name, examples, issues))
    if recipe.data and not recipe.val_data:
        name, examples, issues = read[0]
        try:
            kept, held_out = split_validation(examples, recipe.val_fraction, recipe.seed)
        except DataError as error:
            listener.warn(f"No validation data: {describe(error)}")
        else:
            read[0:1] = [(name, kept, issues), ("validation", held_out, RecordIssues())]
    if recipe.retain_data:
        issues = RecordIssues()
        examples = load_examples(recipe.retain_data, seed=EVALUATION_SEED, issues=issues, listener=listener)
        held_out, to_train = split_retained(examples)
        read += [("retained_held_out", held_out, issues), ("retained_to_train", to_train, RecordIssues())]
    return [_Part(name, examples, issues, question_keys(examples)) for name, examples, issues in read]


def _part_stats(part: _Part, encoder: Encoder | None, max_length_tokens: int, listener: Listener) -> PartStats:
    tokens = preferences = None
    if encoder is not None:
        # Whole, so that lengths beyond the maximum are known and another maximum needs no other preparation.
        whole = encode_prepared(part.examples, encoder, sys.maxsize, part.issues, listener)
        tokens, preferences = _token_stats(whole.records, max_length_tokens), _preference_stats(whole.records)
    refused = part.issues.refused
    return PartStats(
        part.name,
        len(part.examples),
        len(refused),
        tuple(map(describe, refused[:_MOST_EXAMPLES])),
        _found(repeated(part.examples.digests), part.examples, part.examples),
        _found(repeated(part.questions), part.examples, part.examples),
        tokens,
        preferences,
    )


def _token_stats(records: Records, max_length_tokens: int) -> TokenStats:
    lengths = np.array(records.lengths_tokens, np.int64)
    sides: tuple[Side, ...] = ("chosen", "rejected")
    has_rejected = records.side_lengths("rejected") > 0
    # Nothing precedes the first token, so it is not learned.
    is_cut_away = [records.answer_tokens_between(1, max_length_tokens, side) == 0 for side in sides]
    is_overlong = (lengths > max_length_tokens) & (is_cut_away[0] | (has_rejected & is_cut_away[1]))
    is_truncated = (lengths > max_length_tokens) & ~is_overlong
    used = sum(np.where(is_overlong, 0, np.minimum(records.side_lengths(side), max_length_tokens)) for side in sides)
    learned = sum(records.answer_tokens_between(0, max_length_tokens, side) for side in sides)
    truncated = int(is_truncated.sum())
    return TokenStats(
        int(np.sum(used)),
        int(np.sum(np.where(is_overlong, 0, learned))),
        sum(records.tokens) - int(np.sum(used)),
        truncated,
        truncated / len(lengths) if len(lengths) else 0.0,
        int(is_overlong.sum()),
        lengths_of(lengths) if len(lengths) else None,
    )


def _preference_stats(records: Records) -> PreferenceStats | None:
    are_preferences = records.side_lengths("rejected") > 0
    if not are_preferences.any():
        return None
    chosen, rejected = (
        lengths_of(records.answer_tokens_between(0, sys.maxsize, side)[are_preferences])
        for side in ("chosen", "rejected")
    )
    return PreferenceStats(int(are_preferences.sum()), chosen, rejected)


def lengths_of(lengths: np.ndarray) -> Lengths:
    """The distribution of some lengths.

    Args:
        lengths: At least one, int64.
    """
    shares = np.percentile(lengths, [0, 50, 90, 99, 100], method="inverted_cdf")
    least, median, p90, p99, most = (int(value) for value in shares)
    bounds = _bounds(least, most)
    counts, _ = np.histogram(lengths, [*bounds[:-1], bounds[-1] - 0.5])
    bins = tuple(LengthBin(start, end - 1, int(n)) for (start, end), n in zip(pairwise(bounds), counts, strict=True))
    return Lengths(least, median, p90, p99, most, bins)


def _bounds(least: int, most: int) -> list[int]:
    """The ends of bins around all lengths: powers of two and the middle between each two of them."""
    bounds = sorted({step for power in range(most.bit_length() + 1) for step in (1 << power, 3 << power >> 1)})
    first = max((bound for bound in bounds if bound <= least), default=0)
    last = min(bound for bound in bounds if bound > most)
    return [*([0] if first == 0 else []), *(bound for bound in bounds if first <= bound <= last and bound)]


def _overlaps(parts: Sequence[_Part], listener: Listener) -> list[Overlap]:
    """The overlap of each part with every one before it."""
    by_ngrams = _shared_ngrams(parts, listener)
    return [
        Overlap(
            part.name,
            other.name,
            _found(shared(part.examples.digests, other.examples.digests), part.examples, other.examples),
            _found(shared(part.questions, other.questions), part.examples, other.examples),
            _found(by_ngrams[part.name], part.examples, other.examples) if other.name == "train" else None,
        )
        for number, part in enumerate(parts)
        for other in parts[:number]
    ]


def _shared_ngrams(parts: Sequence[_Part], listener: Listener) -> dict[str, Matches]:
    """The records of each other part that share n-grams with the training data, which is streamed once."""
    if parts[0].name != "train":
        return {}
    train, others = parts[0].examples, parts[1:]
    index = NgramIndex(chain.from_iterable(parsed(part.examples) for part in others))
    for done in index.look_up(parsed(train)) if others else ():
        listener.progress(Progress("comparing", done, len(train)))
    matches, found, start = index.matches(), {}, 0
    for part in others:
        here = (matches.rows >= start) & (matches.rows < start + len(part.examples))
        found[part.name] = Matches(matches.rows[here] - start, matches.others[here])
        start += len(part.examples)
    return found


def _found(matches: Matches, examples: Examples, others: Examples) -> Found:
    named = tuple(
        RecordPair(examples.where(int(row)), others.where(int(other)))
        for row, other in zip(matches.rows[:_MOST_EXAMPLES], matches.others[:_MOST_EXAMPLES], strict=True)
    )
    return Found(len(matches), len(matches) / len(examples) if len(examples) else 0.0, named)
