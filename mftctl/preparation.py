"""Training data ready for the model: read, split, encoded and checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mftctl.config import Recipe
from mftctl.data.encoding import Encoded, encode_all
from mftctl.data.examples import Example
from mftctl.data.sources import data_digest, load_examples, record_digest
from mftctl.data.splits import sample_fraction, split_validation
from mftctl.errors import ConfigError
from mftctl.masking.checkpoint import resolve_checkpoint
from mftctl.models import load_tokenizer
from mftctl.seen_records import LearnFrom, records_to_learn_from


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """What a training needs besides the model's weights.

    Attributes:
        checkpoint: Folder of the model to start from.
        tokenizer: The model's.
        train: Encoded training records.
        validation: Encoded validation records.
        digests: SHA-256 of the examples of both parts.
        records: The digest of each training record.
        left_out: Training records that were not to be learned from.
    """

    checkpoint: Path
    tokenizer: PreTrainedTokenizerBase
    train: list[Encoded]
    validation: list[Encoded]
    digests: dict[str, str]
    records: list[str]
    left_out: int

    def summary(self) -> dict[str, Any]:
        """Counts for the run's record."""
        return {
            "train_records": len(self.train),
            "validation_records": len(self.validation),
            "train_answer_tokens": sum(record.answer_tokens for record in self.train),
            "digests": self.digests,
        }


def prepare_training(
    recipe: Recipe,
    model: str,
    *,
    max_length_tokens: int,
    data_fraction: float = 1.0,
    adapters: bool = False,
    seen: frozenset[str] = frozenset(),
    learn_from: LearnFrom = "all",
) -> TrainingInputs:
    """The encoded training and validation data of a recipe.

    Args:
        recipe: Names the data, the split and the seed.
        model: Checkpoint folder, hub id or `quickstart`.
        max_length_tokens: Longer records are cut at the end.
        data_fraction: Share of the training records to use, of those to learn from.
        adapters: Whether the model may be a LoRA adapter.
        seen: Digests of the records that the model was fine-tuned on.
        learn_from: What that is good for, as `records_to_learn_from` has it.

    Raises:
        ConfigError: The recipe names no data.
        DataError: A file or a record cannot be used.
        ModelError: The model's tokenizer cannot be loaded.
    """
    if not recipe.data:
        raise ConfigError("Training needs data.", key="--data", expected="a file or a hub id", actual="none given")
    checkpoint = resolve_checkpoint(model, recipe.revision, adapters=adapters)
    tokenizer = load_tokenizer(checkpoint)
    everything, validation = split_examples(recipe)
    train = records_to_learn_from(everything, seen, learn_from)
    left_out = len(everything) - len(train)
    train = sample_fraction(train, data_fraction, recipe.seed) if data_fraction < 1 else train
    return TrainingInputs(
        checkpoint,
        tokenizer,
        encode_all(train, tokenizer, max_length_tokens),
        encode_all(validation, tokenizer, max_length_tokens),
        {"train": data_digest(train), "validation": data_digest(validation)},
        [record_digest(example) for example in train],
        left_out,
    )


def split_examples(recipe: Recipe) -> tuple[Sequence[Example], Sequence[Example]]:
    """The training and the validation records of a recipe.

    Raises:
        DataError: A file or a record cannot be used.
    """
    train = load_examples(recipe.data, seed=recipe.seed)
    if recipe.val_data:
        return train, load_examples(recipe.val_data, seed=recipe.seed)
    return split_validation(train, recipe.val_fraction, recipe.seed)
