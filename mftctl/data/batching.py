"""Batches of records of similar length, padded to tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from mftctl.data.encoding import Encoded
from mftctl.data.examples import IGNORED_LABEL
from mftctl.errors import DataError

_MEGA_BATCH = 50
"""How many batches are sorted by length together: enough for little padding, few enough to stay random."""


class LengthGroupedSampler(Sampler[int]):
    """Indices so that every run of `batch_size` of them is a batch of similar lengths.

    The order follows from the seed and the epoch alone. The batch with the longest record comes first, so that a lack
    of memory shows at once; a batch that is not full comes last.

    Args:
        lengths: The length of each record in tokens.
        batch_size: How many records make a batch, at least 1.
        seed: Decides the order together with the epoch.

    Attributes:
        same_batches: Whether all epochs have the batches of the first, in another order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.same_batches = False

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the given epoch for the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed}:{self.epoch}")
        batches = self._batches(random.Random(f"{self.seed}:0") if self.same_batches and self.epoch else generator)
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        generator.shuffle(batches)
        if batches:
            longest = max(range(len(batches)), key=lambda index: self.lengths[batches[index][0]])
            batches.insert(0, batches.pop(longest))
        return (index for batch in [*batches, *last] for index in batch)

    def _batches(self, generator: random.Random) -> list[list[int]]:
        """All batches, each from its longest record to its shortest; only the last may be short."""
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        mega = _MEGA_BATCH * self.batch_size
        # A rest too small for a full batch joins the mega-batch before it: the longest record must not be in it.
        starts = range(0, max(len(order) - self.batch_size + 1, 1), mega)
        ends = [*starts[1:], len(order)]
        batches = []
        for start, end in zip(starts, ends, strict=True):
            part = sorted(order[start:end], key=lambda index: self.lengths[index], reverse=True)
            batches += [part[offset : offset + self.batch_size] for offset in range(0, len(part), self.batch_size)]
        return batches


class ProcessBatches(Sampler[list[int]]):
    """The micro-batches of one of several processes: as one process would take them in turn.

    Every process has as many. Where the last ones run out, a process gets the first record of the batch before, marked
    by a negative number, whose labels count for nothing.

    Args:
        order: The records of an epoch in their order.
        batch_size: Records of a micro-batch.
        rank: The process.
        world_size: Number of processes.
    """

    def __init__(self, order: LengthGroupedSampler, batch_size: int, rank: int, world_size: int) -> None:
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-len(self.order) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        indices = list(self.order)
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        for start in range(0, len(batches), self.world_size):
            mine = start + self.rank
            yield batches[mine] if mine < len(batches) else [-1 - batches[start][0]]


class ProcessRecords(Dataset[Encoded]):
    """Records as `ProcessBatches` names them: `-1 - index` is the record without anything to learn."""

    def __init__(self, records: Sequence[Encoded]) -> None:
        self.records = records

    def __getitem__(self, index: int) -> Encoded:
        if index >= 0:
            return self.records[index]
        record = self.records[-1 - index]
        return replace(record, labels=[IGNORED_LABEL] * len(record.labels))

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, slots=True)
class PaddingCollator:
    """Encoded examples as one batch of tensors, padded on the right.

    Attributes:
        pad_token_id: Fills `input_ids`; the attention mask is 0 and the label -100 there.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The batch: `input_ids`, `attention_mask` and `labels`, each int64 of shape `(examples, longest)`.

        Args:
            examples: At least one.
        """
        width = max(len(example.input_ids) for example in examples)
        return {
            "input_ids": _pad([example.input_ids for example in examples], width, self.pad_token_id),
            "attention_mask": _pad([[1] * len(example.input_ids) for example in examples], width, 0),
            "labels": _pad([example.labels for example in examples], width, IGNORED_LABEL),
        }


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token to pad with: the padding token, or else the end-of-sequence token.

    Raises:
        DataError: the tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise DataError(
        "The tokenizer has no token to pad with.",
        path=tokenizer.name_or_path or None,
        expected="a padding or an end-of-sequence token",
        actual="neither",
        hint="set pad_token in its tokenizer_config.json",
    )


def _pad(rows: Sequence[Sequence[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64)
