"""The data of a training as its tokens: counts, what has no answer left, and questions that also are in the test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from mftctl.config import Recipe
from mftctl.data.encoding import Encoded, encode, encode_prompt
from mftctl.data.examples import Example
from mftctl.data.sources import DataSource, load_examples
from mftctl.data.splits import split_validation
from mftctl.errors import DataError, MftError
from mftctl.planning.findings import Findings, describe

MOST_TOKENIZED = 5_000
"""Records tokenised of each part: of larger data, as many at even distances stand for all."""

_MOST_NAMED = 3
_MOST_PROMPTS = 200


@dataclass(frozen=True, slots=True)
class Parts:
    """The records of a recipe.

    Attributes:
        train: Training records.
        validation: Validation records, of files of their own or split off.
        test: What `eval` measures on.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The encoded records of a training and of its validation, neither of them empty."""

    train: list[Encoded]
    validation: list[Encoded]


class DataCheck:
    """The data of a recipe and its stages, each file read and each record tokenised once.

    Args:
        tokenizer: The model's; None leaves everything untokenised.
        findings: Gets what is wrong with files and records.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, findings: Findings) -> None:
        self._tokenizer = tokenizer
        self._findings = findings
        self._parts: dict[str, Parts] = {}
        self._tokens: dict[tuple[str, int], Tokens | None] = {}

    def parts(self, recipe: Recipe) -> Parts:
        """The records of a recipe's files, as far as they can be read."""
        key = _data_key(recipe)
        if key not in self._parts:
            self._parts[key] = read_parts(recipe, self._findings)
        return self._parts[key]

    def tokens(self, recipe: Recipe, max_length_tokens: int) -> Tokens | None:
        """The same as tokens, or None where there is no tokenizer or no record that can be used."""
        key = (_data_key(recipe), max_length_tokens)
        if key not in self._tokens:
            self._tokens[key] = self._tokenize(self.parts(recipe), max_length_tokens)
        return self._tokens[key]

    def longest_question(self, recipe: Recipe) -> tuple[list[Encoded], int] | None:
        """The encoded test records of an evaluation and the tokens of its longest prompt, 0 where none has one.

        None where there is no tokenizer or no record that can be used.
        """
        if self._tokenizer is None:
            return None
        examples = self.parts(recipe).test[: recipe.eval.limit]
        encoded = tokenize("test_data", examples, self._tokenizer, recipe.eval.max_length_tokens, self._findings)
        asked = sorted(
            (example for example in examples if recipe.eval.generate and example.prompt),
            key=lambda example: -sum(len(message.content) for message in example.prompt),
        )
        # By characters the longest few: among them is the longest by tokens, or one next to it.
        longest = [len(encode_prompt(example, self._tokenizer)) for example in asked[:_MOST_PROMPTS]]
        return (encoded, max(longest, default=0)) if encoded else None

    def _tokenize(self, parts: Parts, max_length_tokens: int) -> Tokens | None:
        if self._tokenizer is None:
            return None
        train = tokenize("data", parts.train, self._tokenizer, max_length_tokens, self._findings)
        validation = tokenize("val_data", parts.validation, self._tokenizer, max_length_tokens, self._findings)
        return Tokens(train, validation) if train and validation else None


def read_parts(recipe: Recipe, findings: Findings) -> Parts:
    """The records of all data files, as far as they can be read; each file that cannot is a problem."""
    train = _read("data", recipe.data, recipe.seed, findings)
    validation = _read("val_data", recipe.val_data, recipe.seed, findings)
    test = _read("test_data", recipe.test_data, recipe.seed, findings)
    if train and not recipe.val_data:
        with findings.collecting("val_fraction"):
            train, validation = split_validation(train, recipe.val_fraction, recipe.seed)
    parts = Parts(train, validation, test)
    _check_overlap("test_data", parts.train, parts.test, findings)
    if recipe.val_data:
        _check_overlap("val_data", parts.train, parts.validation, findings)
    return parts


def tokenize(
    key: str,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length_tokens: int,
    findings: Findings,
) -> list[Encoded]:
    """The encoded records; those that cannot be learned from are a problem, named by the first few.

    Args:
        key: The recipe key that names the data.
        examples: All records; of more than `MOST_TOKENIZED` a part is tokenised.
        tokenizer: The model's.
        max_length_tokens: Longer records are cut at the end.
        findings: Gets the problems.
    """
    chosen = examples
    if len(examples) > MOST_TOKENIZED:
        chosen = [examples[index * len(examples) // MOST_TOKENIZED] for index in range(MOST_TOKENIZED)]
        findings.skip(f"{key}: {MOST_TOKENIZED:,} of {len(examples):,} records were tokenised; they stand for all")
    encoded: list[Encoded] = []
    failed: list[DataError] = []
    for example in chosen:
        try:
            encoded.append(encode(example, tokenizer, max_length_tokens))
        except DataError as error:
            failed.append(error)
    for failure in failed[:_MOST_NAMED]:
        findings.problem(f"{key}: {describe(failure)}")
    if len(failed) > _MOST_NAMED:
        findings.problem(
            f"{key}: {len(failed):,} of {len(chosen):,} records cannot be used at {max_length_tokens} tokens"
        )
    return encoded


def token_counts(encoded: Sequence[Encoded]) -> dict[str, int | float]:
    """Figures of encoded records: how many, their tokens and answer tokens, and the longest."""
    lengths = [len(record.input_ids) for record in encoded]
    return {
        "tokenized_records": len(encoded),
        "tokens": sum(lengths),
        "answer_tokens": sum(record.answer_tokens for record in encoded),
        "longest_tokens": max(lengths, default=0),
    }


def _read(key: str, sources: Sequence[DataSource], seed: int, findings: Findings) -> list[Example]:
    examples: list[Example] = []
    for source in sources:
        try:
            examples += load_examples([source], seed=seed)
        except MftError as error:
            findings.problem(f"{key}: {describe(error)}")
    return examples


def _check_overlap(key: str, train: Sequence[Example], other: Sequence[Example], findings: Findings) -> None:
    known = {_question(example) for example in train}
    shared = sum(_question(example) in known for example in other)
    if shared:
        findings.warn(f"{key}: {shared:,} of {len(other):,} records ask what a training record asks")


def _question(example: Example) -> tuple[str, ...]:
    """The texts before the answer, or all of a plain text."""
    return tuple(message.content.strip() for message in example.prompt or example.messages)


def _data_key(recipe: Recipe) -> str:
    return repr((recipe.data, recipe.val_data, recipe.val_fraction, recipe.test_data, recipe.seed))
