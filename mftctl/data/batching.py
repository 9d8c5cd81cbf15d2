"""Batches of records of similar length, padded to tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from mftctl.data.encoding import Encoded
from mftctl.data.examples import IGNORED_LABEL
from mftctl.errors import DataError

_MEGA_BATCH = 50
"""Number of batches sorted by length together: enough to keep padding low, few enough to stay random."""


REFERENCE = "reference"
"""The key under which a batch of preferences holds the log-probabilities of the reference model."""


class LengthGroupedSampler(Sampler[int]):
    """Yields indices such that every `batch_size` consecutive ones form a batch of similar lengths.

    The order depends only on the seed and the epoch. The batch with the longest record comes first, so that running
    out of memory shows at once; an incomplete batch comes last.

    Args:
        lengths: The length of each record in tokens.
        batch_size: Records per batch, at least 1.
        seed: Determines the order together with the epoch.

    Attributes:
        same_batches: Whether all epochs reuse the batches of the first, in a different order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.same_batches = False

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch that determines the order of the next iteration."""
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
        """All batches, each sorted from longest to shortest; only the last may be incomplete."""
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        mega = _MEGA_BATCH * self.batch_size
        # A remainder smaller than a batch joins the last mega-batch, so that it cannot hold the longest record.
        starts = range(0, max(len(order) - self.batch_size + 1, 1), mega)
        ends = [*starts[1:], len(order)]
        batches = []
        for start, end in zip(starts, ends, strict=True):
            part = sorted(order[start:end], key=lambda index: self.lengths[index], reverse=True)
            batches += [part[offset : offset + self.batch_size] for offset in range(0, len(part), self.batch_size)]
        return batches


class ProcessBatches(Sampler[list[int]]):
    """The micro-batches of one process, dealt out in the order a single process would take them.

    Every process gets the same number. If there are too few at the end, a process repeats the first record of an
    earlier batch, marked by a negative number, with its labels ignored.

    Args:
        order: The records of an epoch in order.
        batch_size: Records per micro-batch.
        rank: Rank of the process.
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
    """Records by the indices of `ProcessBatches`; `-1 - index` is the record with all labels ignored."""

    def __init__(self, records: Sequence[Encoded]) -> None:
        self.records = records

    def __getitem__(self, index: int) -> Encoded:
        if index >= 0:
            return self.records[index]
        return self.records[-1 - index].ignored()

    def __len__(self) -> int:
        return len(self.records)


@dataclass(frozen=True, slots=True)
class PaddingCollator:
    """Collates encoded examples into a batch of tensors, padded on the right.

    Attributes:
        pad_token_id: Pads `input_ids`; padded positions have attention mask 0 and label -100.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The batch: `input_ids`, `attention_mask` and `labels`, each int64 of shape `(sequences, longest)`.

        Preferences give two sequences each: first all with the chosen answers, then all with the rejected ones. If
        their reference log-probabilities are known, the batch has them as `reference`, fp32 `(2, preferences)`. Records
        of data with images also give the inputs of `ImageInputs.of_batch`.

        Args:
            examples: At least one; all of them preferences, or none.
        """
        sides = [example.sides for example in examples]
        sequences = [side for answers in zip(*sides, strict=True) for side in answers]
        width = max(len(sequence.input_ids) for sequence in sequences)
        batch = {
            "input_ids": _pad([sequence.input_ids for sequence in sequences], width, self.pad_token_id),
            "attention_mask": _pad([[1] * len(sequence.input_ids) for sequence in sequences], width, 0),
            "labels": _pad([sequence.labels for sequence in sequences], width, IGNORED_LABEL),
        }
        image_inputs = next((item.image_inputs for item in sequences if item.image_inputs is not None), None)
        if image_inputs is not None:
            images, places = [item.images for item in sequences], [item.where for item in sequences]
            batch |= image_inputs.of_batch(images, batch["input_ids"], places)
        known = [example.reference for example in examples if example.reference is not None]
        if known:
            batch[REFERENCE] = torch.tensor(known, dtype=torch.float32).T
        return batch


def model_inputs(batch: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The inputs of the model in a batch, on a device: all but labels and reference."""
    return {name: tensor.to(device) for name, tensor in batch.items() if name not in ("labels", REFERENCE)}


def any_images(records: Sequence[Encoded]) -> bool:
    """True if some record of the data has images."""
    return len(records) > 0 and records[0].image_inputs is not None


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, or the end-of-sequence token if there is none.

    Raises:
        DataError: The tokenizer has neither.
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
