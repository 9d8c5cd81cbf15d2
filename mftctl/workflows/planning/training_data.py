"""Tokenises training data and checks it: counts, records without an answer, and overlap with the test data."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import dropwhile, groupby

import numpy as np
from transformers import PreTrainedTokenizerBase

from mftctl.data.decoding import decode_behind
from mftctl.data.encoding import Encoded, EncodedRecords, Encoder, encode_all
from mftctl.data.examples import IGNORED_LABEL, RecordKind
from mftctl.data.image_inputs import ImageInputs
from mftctl.data.overlap import question_keys, shared
from mftctl.data.prepared.examples import Examples
from mftctl.data.prepared.load import load_examples, other_kind
from mftctl.data.prepared.records import answer_lengths, token_lengths, token_totals
from mftctl.data.record_issues import RecordIssues
from mftctl.data.rendering import Segment
from mftctl.data.retained import split_retained, without_training_records
from mftctl.data.sources import EVALUATION_SEED, DataSource
from mftctl.data.splits import split_validation
from mftctl.errors import DataError, MftError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import added_system_text, no_end_text
from mftctl.workflows.planning.problem_list import ProblemList, describe

MOST_TOKENIZED = 5_000
"""Maximum records to tokenise per part; larger data is sampled at even intervals."""

_MOST_PROMPTS = 200


@dataclass(frozen=True, slots=True)
class Parts:
    """The records of a recipe.

    Attributes:
        train: Training records.
        validation: Validation records, from separate files or split off.
        test: Test records for `eval`.
        retained: Held-out records of the data to retain, for `eval`.
        retained_train: Its other records, for training.
        issues: Problems with the records read, by the recipe key of the data.
    """

    train: Examples
    validation: Examples
    test: Examples
    retained: Examples
    retained_train: Examples
    issues: dict[str, RecordIssues]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The encoded training and validation records, neither of them empty."""

    train: Sequence[Encoded]
    validation: Sequence[Encoded]


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Counts of encoded records.

    Attributes:
        tokenized_records: Number of records.
        tokens: Their tokens; of preferences, those of both sequences.
        answer_tokens: Those of them that are learned.
        longest_tokens: Tokens of the longest sequence.
    """

    tokenized_records: int
    tokens: int
    answer_tokens: int
    longest_tokens: int


class DataCheck:
    """The data of a recipe and its stages; each file is read and each record tokenised once.

    Args:
        tokenizer: The model's tokenizer with the recipe's chat template; None skips tokenisation.
        problems: Receives problems with files and records.
        images: The image side of a vision-language model; None for other models.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, problems: ProblemList, images: ImageInputs | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._images = images
        self._problems = problems
        self._parts: dict[str, Parts] = {}
        self._tokens: dict[tuple[str, int], Tokens | None] = {}
        self._encoders: dict[str, Encoder] = {}
        self._train: dict[tuple[str, int], Sequence[Encoded]] = {}
        self._questions: dict[Hashable, tuple[Sequence[Encoded], int] | None] = {}
        self._retained: dict[Hashable, Sequence[Encoded]] = {}
        self._checked: set[Hashable] = set()

    def parts(self, recipe: Recipe) -> Parts:
        """The readable records of a recipe's files."""
        key = _data_key(recipe)
        if key not in self._parts:
            parts = self._parts[key] = read_parts(recipe, self._problems)
            for name, issues in parts.issues.items():
                if self._tokenizer is None or name in (
                    "test_data",
                    "retain_data",
                ):  # others are reported with the results of tokenisation
                    report_issues(name, issues, recipe, 0, self._problems)
        return self._parts[key]

    def require_kind(self, recipe: Recipe, kind: RecordKind) -> None:
        """Checks that the training and validation records are of a kind; a file of both is left to the reader.

        Raises:
            DataError: All records of a part are of another kind.
        """
        parts = self.parts(recipe)
        for examples, sources in ((parts.train, recipe.data), (parts.validation, recipe.val_data or recipe.data)):
            fits = examples.are_preferences == (kind == "preferences")
            if len(fits) and not fits.any():
                raise other_kind(kind, ", ".join(source.path for source in sources))

    def tokens(self, recipe: Recipe, max_length_tokens: int) -> Tokens | None:
        """The tokenised records; None without a tokenizer or usable records."""
        key = (_data_key(recipe), max_length_tokens)
        if key not in self._tokens:
            self._tokens[key] = self._tokenize(recipe, max_length_tokens)
        return self._tokens[key]

    def train(self, recipe: Recipe, max_length_tokens: int) -> Sequence[Encoded]:
        """The encoded training records, even if no validation record is usable."""
        self.tokens(recipe, max_length_tokens)
        return self._train.get((_data_key(recipe), max_length_tokens), [])

    def longest_question(self, recipe: Recipe) -> tuple[Sequence[Encoded], int] | None:
        """The encoded test records of an evaluation and the tokens of the longest prompt, 0 if no record has a prompt.

        None without a tokenizer or usable records.
        """
        key = _evaluation_key(recipe)
        if key not in self._questions:
            self._questions[key] = self._longest_question(recipe)
        return self._questions[key]

    def retained(self, recipe: Recipe) -> Sequence[Encoded]:
        """The encoded held-out records that an evaluation measures; empty without a tokenizer."""
        key = _evaluation_key(recipe)
        if key not in self._retained:
            self._retained[key] = self._encode_retained(recipe)
        return self._retained[key]

    def check_retained(self, recipe: Recipe, max_length_tokens: int, *, trains: bool) -> None:
        """Tokenises the data to retain as a training does, which measures as many records as it validates on.

        Args:
            recipe: Names the data.
            max_length_tokens: Length at which records are truncated.
            trains: Whether the records that are not held out are trained on.
        """
        encoder, tokens = self._encoder(recipe), self.tokens(recipe, max_length_tokens)
        key = (_data_key(recipe), max_length_tokens, trains)
        if encoder is None or tokens is None or key in self._checked:
            return
        self._checked.add(key)
        parts, issues = self.parts(recipe), RecordIssues()
        for examples in (parts.retained[: len(tokens.validation)], *([parts.retained_train] if trains else [])):
            tokenize("retain_data", examples, encoder, max_length_tokens, issues, self._problems)
        report_issues("retain_data", issues, recipe, max_length_tokens, self._problems)

    def _encode_retained(self, recipe: Recipe) -> Sequence[Encoded]:
        encoder = self._encoder(recipe)
        if encoder is None:
            return []
        examples, issues = self.parts(recipe).retained[: recipe.eval.limit], RecordIssues()
        length = recipe.eval.max_length_tokens
        used = tokenize("retain_data", examples, encoder, length, issues, self._problems)
        report_issues("retain_data", issues, recipe, length, self._problems)
        return used.records

    def _longest_question(self, recipe: Recipe) -> tuple[Sequence[Encoded], int] | None:
        encoder = self._encoder(recipe)
        if encoder is None:
            return None
        examples, issues = self.parts(recipe).test[: recipe.eval.limit], RecordIssues()
        length = recipe.eval.max_length_tokens
        used = tokenize("test_data", examples, encoder, length, issues, self._problems)
        report_issues("test_data", issues, recipe, length, self._problems)
        asked = sorted(
            (example for example in used.examples if recipe.eval.generate and example.prompt),
            key=lambda example: -sum(len(message.content) for message in example.prompt),
        )
        # The longest few by characters include the longest by tokens, or one close to it.
        longest = [len(encoder.prompt(example)) for example in asked[:_MOST_PROMPTS]]
        return (used.records, max(longest, default=0)) if used.records else None

    def _encoder(self, recipe: Recipe) -> Encoder | None:
        if self._tokenizer is None:
            return None
        encoder = Encoder(self._tokenizer, learn=recipe.learn, images=self._images)
        return self._encoders.setdefault(recipe.learn, encoder)

    def _tokenize(self, recipe: Recipe, max_length_tokens: int) -> Tokens | None:
        encoder, parts = self._encoder(recipe), self.parts(recipe)
        if encoder is None:
            return None
        issues = copy.deepcopy(parts.issues)  # issues found on reading, shared by other lengths
        if "val_data" not in issues:
            issues["val_data"] = issues["data"]
        used = [
            tokenize(key, examples, encoder, max_length_tokens, issues[key], self._problems)
            for key, examples in (("data", parts.train), ("val_data", parts.validation))
        ]
        if not recipe.val_data:
            del issues["val_data"]
        for key in ("data", "val_data"):
            if key in issues:
                report_issues(key, issues[key], recipe, max_length_tokens, self._problems)
        train, validation = (part.records for part in used)
        self._train[_data_key(recipe), max_length_tokens] = train
        added = added_system_text(encoder, used[0].examples)
        if added is not None:
            self._problems.warn(f"data: {added}")
        return Tokens(train, validation) if train and validation else None


def read_parts(recipe: Recipe, problems: ProblemList) -> Parts:
    """Reads the records of all data files; each unreadable file is reported as a problem."""
    issues = {"data": RecordIssues(), "test_data": RecordIssues(), "retain_data": RecordIssues()}
    train = _read("data", recipe.data, recipe.seed, issues["data"], problems, kind=None)
    validation = Examples.joined([])
    if recipe.val_data:
        issues["val_data"] = RecordIssues()
        validation = _read("val_data", recipe.val_data, recipe.seed, issues["val_data"], problems, kind=None)
    test = _read("test_data", recipe.test_data, EVALUATION_SEED, issues["test_data"], problems)
    retained = held_out = retained_train = _read(
        "retain_data", recipe.retain_data, EVALUATION_SEED, issues["retain_data"], problems
    )
    if len(train) and not recipe.val_data:
        with problems.collecting("val_fraction"):
            train, validation = split_validation(train, recipe.val_fraction, recipe.seed)
    if len(retained):
        known = np.concatenate([train.digests, validation.digests])
        with problems.collecting("retain_data"):
            held_out, retained_train = split_retained(without_training_records(retained, known))
    parts = Parts(train, validation, test, held_out, retained_train, issues)
    if recipe.test_data or recipe.val_data or recipe.retain_data:
        known = question_keys(train)
        _check_overlap("test_data", known, test, problems)
        _check_overlap("retain_data", known, retained, problems)
        if recipe.val_data:
            _check_overlap("val_data", known, validation, problems)
    return parts


def tokenize(
    key: str,
    examples: Examples,
    encoder: Encoder,
    max_length_tokens: int,
    issues: RecordIssues,
    problems: ProblemList,
) -> EncodedRecords:
    """Returns the encoded records.

    Args:
        key: The recipe key of the data.
        examples: All records; more than `MOST_TOKENIZED` are sampled.
        encoder: Encoder of the model's tokenizer.
        max_length_tokens: Length at which longer records are truncated.
        issues: Receives problems with records.
        problems: Receives a note if the records are sampled.
    """
    chosen = examples
    if len(examples) > MOST_TOKENIZED:
        chosen = examples.take([index * len(examples) // MOST_TOKENIZED for index in range(MOST_TOKENIZED)])
        problems.skip(f"{key}: {MOST_TOKENIZED:,} of {len(examples):,} records were tokenised as a sample")
    before = issues.overlong
    used = encode_all(chosen, encoder, max_length_tokens, issues)
    if issues.overlong > before and not used.records:
        problems.problem(f"{key}: no record can be used at --max-length {max_length_tokens}")
    return used


def report_issues(
    key: str, issues: RecordIssues, recipe: Recipe, max_length_tokens: int, problems: ProblemList
) -> None:
    """Adds issues that would stop training as a problem, and the others as warnings.

    Args:
        key: The recipe key of the data.
        issues: Issues of the records.
        recipe: Says how many unusable records may be left out.
        max_length_tokens: Length at which records were truncated.
        problems: Receives the problems and warnings.
    """
    told = issues.lines(max_length_tokens)
    try:
        issues.settle(recipe.bad_records, recipe.bad_records_max)
    except DataError as error:
        problems.problem(f"{key}: {describe(error)}")
        told = told[1:]  # without the line on unusable records
    for line in told:
        problems.warn(f"{key}: {line}")
    if issues.learns_no_end:
        problems.warn(f"{key}: {no_end_text(max_length_tokens)}")


def token_counts(encoded: Sequence[Encoded]) -> TokenCounts:
    """Counts the tokens of encoded records."""
    lengths, answer_tokens = token_lengths(encoded), sum(answer_lengths(encoded))
    return TokenCounts(len(encoded), sum(token_totals(encoded)), answer_tokens, max(lengths, default=0))


def _read(
    key: str,
    sources: Sequence[DataSource],
    seed: int,
    issues: RecordIssues,
    problems: ProblemList,
    *,
    kind: RecordKind | None = "answers",
) -> Examples:
    parts = []
    for source in sources:
        try:
            parts.append(load_examples([source], seed=seed, issues=issues, kind=kind))
        except MftError as error:
            problems.problem(f"{key}: {describe(error)}")
    return Examples.joined(parts)


def _check_overlap(key: str, known: np.ndarray, other: Examples, problems: ProblemList) -> None:
    found = len(shared(question_keys(other), known))
    if found:
        problems.warn(f"{key}: questions also in the training data: {found:,} of {len(other):,} records")


def _data_key(recipe: Recipe) -> str:
    sources = (recipe.data, recipe.val_data, recipe.test_data, recipe.retain_data)
    return repr((*sources, recipe.val_fraction, recipe.seed, recipe.learn))


def _evaluation_key(recipe: Recipe) -> Hashable:
    options = recipe.eval
    said = (recipe.bad_records, recipe.bad_records_max)
    return (_data_key(recipe), options.limit, options.max_length_tokens, options.generate, said)


def trained_segments(record: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The text decoded from a record's tokens, so exactly the training input, split where labels begin and end.

    The first token is never learned, since there is no context to predict it from.

    Args:
        record: Token IDs and labels.
        tokenizer: The tokenizer that produced them.
    """
    learned = [label != IGNORED_LABEL and index > 0 for index, label in enumerate(record.labels)]
    segments, start = [], 0
    for is_answer, run in groupby(learned):
        end = start + len(list(run))
        text = decode_behind(tokenizer, record.input_ids[:start], record.input_ids[start:end])
        segments.append(Segment(text, is_answer))
        start = end
    return segments


def rejected_segments(record: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The text of the rejected answer of a preference, from its first label on; empty for a record with one answer.

    Args:
        record: Token IDs and labels.
        tokenizer: The tokenizer that produced them.
    """
    if record.rejected is None:
        return []
    return list(dropwhile(lambda segment: not segment.is_answer, trained_segments(record.rejected, tokenizer)))
