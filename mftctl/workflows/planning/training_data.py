"""The data of a training as its tokens: counts, what has no answer left, and questions that also are in the test."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from mftctl.data.decoding import decode_behind
from mftctl.data.encoding import Encoded, EncodedRecords, Encoder, encode_all
from mftctl.data.examples import IGNORED_LABEL, Example
from mftctl.data.record_issues import BadRecords, RecordIssues
from mftctl.data.rendering import Segment
from mftctl.data.sources import DataSource, load_examples
from mftctl.data.splits import split_validation
from mftctl.errors import DataError, MftError
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.record_encoding import added_system_text, no_end_text
from mftctl.workflows.planning.problem_list import Findings, describe

MOST_TOKENIZED = 5_000
"""Records tokenised of each part: of larger data, as many at even distances stand for all."""

_MOST_PROMPTS = 200


@dataclass(frozen=True, slots=True)
class Parts:
    """The records of a recipe.

    Attributes:
        train: Training records.
        validation: Validation records, of files of their own or split off.
        test: What `eval` measures on.
        issues: What is wrong with the records that were read, by the recipe key that names the data.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    issues: dict[str, RecordIssues]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The encoded records of a training and of its validation, neither of them empty."""

    train: list[Encoded]
    validation: list[Encoded]


class DataCheck:
    """The data of a recipe and its stages, each file read and each record tokenised once.

    Args:
        tokenizer: The model's, with the recipe's chat template; None leaves everything untokenised.
        findings: Gets what is wrong with files and records.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, findings: Findings) -> None:
        self._tokenizer = tokenizer
        self._findings = findings
        self._parts: dict[str, Parts] = {}
        self._tokens: dict[tuple[str, int], Tokens | None] = {}
        self._encoders: dict[str, Encoder] = {}
        self._train: dict[tuple[str, int], list[Encoded]] = {}

    def parts(self, recipe: Recipe) -> Parts:
        """The records of a recipe's files, as far as they can be read."""
        key = _data_key(recipe)
        if key not in self._parts:
            parts = self._parts[key] = read_parts(recipe, self._findings)
            for name, issues in parts.issues.items():
                if self._tokenizer is None or name == "test_data":  # others are told with what tokenising finds
                    report_issues(name, issues, recipe.bad_records, 0, self._findings)
        return self._parts[key]

    def tokens(self, recipe: Recipe, max_length_tokens: int) -> Tokens | None:
        """The same as tokens, or None where there is no tokenizer or no record that can be used."""
        key = (_data_key(recipe), max_length_tokens)
        if key not in self._tokens:
            self._tokens[key] = self._tokenize(recipe, max_length_tokens)
        return self._tokens[key]

    def train(self, recipe: Recipe, max_length_tokens: int) -> list[Encoded]:
        """The encoded training records, also where none of the validation can be used."""
        self.tokens(recipe, max_length_tokens)
        return self._train.get((_data_key(recipe), max_length_tokens), [])

    def longest_question(self, recipe: Recipe) -> tuple[list[Encoded], int] | None:
        """The encoded test records of an evaluation and the tokens of its longest prompt, 0 where none has one.

        None where there is no tokenizer or no record that can be used.
        """
        encoder = self._encoder(recipe)
        if encoder is None:
            return None
        examples, issues = self.parts(recipe).test[: recipe.eval.limit], RecordIssues()
        length = recipe.eval.max_length_tokens
        used = tokenize("test_data", examples, encoder, length, issues, self._findings)
        report_issues("test_data", issues, recipe.bad_records, length, self._findings)
        asked = sorted(
            (example for example in used.examples if recipe.eval.generate and example.prompt),
            key=lambda example: -sum(len(message.content) for message in example.prompt),
        )
        # By characters the longest few: among them is the longest by tokens, or one next to it.
        longest = [len(encoder.prompt(example)) for example in asked[:_MOST_PROMPTS]]
        return (used.records, max(longest, default=0)) if used.records else None

    def _encoder(self, recipe: Recipe) -> Encoder | None:
        if self._tokenizer is None:
            return None
        return self._encoders.setdefault(recipe.learn, Encoder(self._tokenizer, learn=recipe.learn))

    def _tokenize(self, recipe: Recipe, max_length_tokens: int) -> Tokens | None:
        encoder, parts = self._encoder(recipe), self.parts(recipe)
        if encoder is None:
            return None
        issues = copy.deepcopy(parts.issues)  # of what was read, which other lengths share
        if "val_data" not in issues:
            issues["val_data"] = issues["data"]
        used = [
            tokenize(key, examples, encoder, max_length_tokens, issues[key], self._findings)
            for key, examples in (("data", parts.train), ("val_data", parts.validation))
        ]
        if not recipe.val_data:
            del issues["val_data"]
        for key in ("data", "val_data"):
            if key in issues:
                report_issues(key, issues[key], recipe.bad_records, max_length_tokens, self._findings)
        train, validation = (part.records for part in used)
        self._train[_data_key(recipe), max_length_tokens] = train
        added = added_system_text(encoder, used[0].examples)
        if added is not None:
            self._findings.warn(f"data: {added}")
        return Tokens(train, validation) if train and validation else None


def read_parts(recipe: Recipe, findings: Findings) -> Parts:
    """The records of all data files, as far as they can be read; each file that cannot is a problem."""
    issues = {"data": RecordIssues(), "test_data": RecordIssues()}
    train = _read("data", recipe.data, recipe.seed, issues["data"], findings)
    validation: Sequence[Example] = []
    if recipe.val_data:
        issues["val_data"] = RecordIssues()
        validation = _read("val_data", recipe.val_data, recipe.seed, issues["val_data"], findings)
    test = _read("test_data", recipe.test_data, recipe.seed, issues["test_data"], findings)
    if train and not recipe.val_data:
        with findings.collecting("val_fraction"):
            train, validation = split_validation(train, recipe.val_fraction, recipe.seed)
    parts = Parts(train, validation, test, issues)
    _check_overlap("test_data", parts.train, parts.test, findings)
    if recipe.val_data:
        _check_overlap("val_data", parts.train, parts.validation, findings)
    return parts


def tokenize(
    key: str,
    examples: Sequence[Example],
    encoder: Encoder,
    max_length_tokens: int,
    issues: RecordIssues,
    findings: Findings,
) -> EncodedRecords:
    """The encoded records.

    Args:
        key: The recipe key that names the data.
        examples: All records; of more than `MOST_TOKENIZED` a part is tokenised.
        encoder: Of the model's tokenizer.
        max_length_tokens: Longer records are cut at the end.
        issues: Gets what is wrong with records.
        findings: Is told where not all are tokenised.
    """
    chosen = examples
    if len(examples) > MOST_TOKENIZED:
        chosen = [examples[index * len(examples) // MOST_TOKENIZED] for index in range(MOST_TOKENIZED)]
        findings.skip(f"{key}: {MOST_TOKENIZED:,} of {len(examples):,} records were tokenised; they stand for all")
    used = encode_all(chosen, encoder, max_length_tokens, issues)
    if issues.overlong and not used.records:
        findings.problem(f"{key}: no record can be used at --max-length {max_length_tokens}")
    return used


def report_issues(
    key: str, issues: RecordIssues, bad_records: BadRecords, max_length_tokens: int, findings: Findings
) -> None:
    """Adds what a training would refuse as a problem, and what it would say as warnings.

    Args:
        key: The recipe key that names the data.
        issues: Of its records.
        bad_records: What the recipe does with records that cannot be used.
        max_length_tokens: At which records were cut.
        findings: Gets it.
    """
    told = issues.lines(max_length_tokens)
    try:
        issues.settle(bad_records)
    except DataError as error:
        findings.problem(f"{key}: {describe(error)}")
        told = told[1:]  # without the line on records that cannot be used
    for line in told:
        findings.warn(f"{key}: {line}")
    if issues.learns_no_end:
        findings.warn(f"{key}: {no_end_text(max_length_tokens)}")


def token_counts(encoded: Sequence[Encoded]) -> dict[str, int | float]:
    """Figures of encoded records: how many, their tokens and answer tokens, and the longest."""
    lengths = [len(record.input_ids) for record in encoded]
    return {
        "tokenized_records": len(encoded),
        "tokens": sum(lengths),
        "answer_tokens": sum(record.answer_tokens for record in encoded),
        "longest_tokens": max(lengths, default=0),
    }


def _read(
    key: str, sources: Sequence[DataSource], seed: int, issues: RecordIssues, findings: Findings
) -> list[Example]:
    examples: list[Example] = []
    for source in sources:
        try:
            examples += load_examples([source], seed=seed, issues=issues)
        except MftError as error:
            findings.problem(f"{key}: {describe(error)}")
    return examples


def _check_overlap(key: str, train: Sequence[Example], other: Sequence[Example], findings: Findings) -> None:
    known = {_question(example) for example in train}
    shared = sum(_question(example) in known for example in other)
    if shared:
        findings.warn(f"{key}: {shared:,} of {len(other):,} records ask what a training record asks")


def _question(example: Example) -> tuple[object, ...]:
    """The texts before the answer, or all of a plain text or of token ids."""
    if example.token_ids is not None:
        return example.token_ids.input_ids
    return tuple(message.content.strip() for message in example.prompt or example.messages)


def _data_key(recipe: Recipe) -> str:
    return repr((recipe.data, recipe.val_data, recipe.val_fraction, recipe.test_data, recipe.seed, recipe.learn))


def trained_segments(record: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """The text of a record's tokens, cut where the labels begin and end: decoded, and so exactly what is trained on.

    The first token is never learned, since nothing comes before it to predict it from.

    Args:
        record: Token ids and labels.
        tokenizer: The one that made them.
    """
    learned = [label != IGNORED_LABEL and index > 0 for index, label in enumerate(record.labels)]
    segments, start = [], 0
    for is_answer, run in groupby(learned):
        end = start + len(list(run))
        text = decode_behind(tokenizer, record.input_ids[:start], record.input_ids[start:end])
        segments.append(Segment(text, is_answer))
        start = end
    return segments
