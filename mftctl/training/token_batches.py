"""Splits the records of an optimizer step into forward passes of similar length with a token limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, Sampler

from mftctl.data.batching import LengthGroupedSampler, PaddingCollator, ProcessRecords
from mftctl.data.encoding import Encoded

_PASSES = 16

MICRO_BATCHES = "micro_batches"
"""The key under which a step holds its micro-batches."""


@dataclass(frozen=True, slots=True)
class StepSize:
    """The size of an optimizer step and of its forward passes.

    Attributes:
        records: Records per step, over all processes.
        batch_tokens: Maximum tokens per forward pass, padding included; of preferences, in the chosen sequences.
    """

    records: int
    batch_tokens: int


def packed(order: Sequence[int], lengths_tokens: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Groups of records, as large as fit, with an extra pass where the padding it saves is worth it.

    Minimising passes alone would pad a third of the tokens of short records. The fixed cost of a pass, which reads and
    casts all weights, is assumed to equal a sixteenth of the token limit.

    Args:
        order: Records, longest first.
        lengths_tokens: Lengths of all records.
        batch_tokens: Maximum tokens of a group, padding included. A longer record is on its own.
    """
    pass_tokens = batch_tokens / _PASSES
    costs = [0.0] + [float("inf")] * len(order)
    starts = [0] * (len(order) + 1)
    for start, index in enumerate(order):
        length = lengths_tokens[index]
        last = min(start + max(batch_tokens // length, 1), len(order))
        for end in range(start + 1, last + 1):
            cost = costs[start] + length * (end - start) + pass_tokens
            if cost < costs[end]:
                costs[end], starts[end] = cost, start
    batches: list[list[int]] = []
    end = len(order)
    while end:
        batches.insert(0, list(order[starts[end] : end]))
        end = starts[end]
    return batches


def shared_out(
    indices: Sequence[int], lengths_tokens: Sequence[int], batch_tokens: int, world_size: int
) -> list[list[list[int]]]:
    """The micro-batches of each process, equal in number; together they contain every record once.

    They depend on the records and not on their order, so the same records always give the same micro-batches. To fill
    a gap, a process gets a record marked by a negative number, as in `ProcessRecords`.

    Args:
        indices: The records of a step, at least one.
        lengths_tokens: Lengths of all records.
        batch_tokens: Maximum tokens of a micro-batch, padding included. A longer record is on its own.
        world_size: Number of processes.
    """
    order = sorted(indices, key=lambda index: (-lengths_tokens[index], index))
    batches = packed(order, lengths_tokens, batch_tokens)
    while len(batches) % world_size:
        most = max(range(len(batches)), key=lambda place: len(batches[place]))
        batch = batches[most]
        if len(batch) == 1:
            batches.append([-1 - order[-1]])
        else:
            half = (len(batch) + 1) // 2
            batches[most : most + 1] = [batch[:half], batch[half:]]
    # Processes run passes of similar size at the same time; otherwise they would wait for each other.
    batches.sort(key=lambda batch: -len(batch) * lengths_tokens[batch[0] if batch[0] >= 0 else -1 - batch[0]])
    return [batches[rank::world_size] for rank in range(world_size)]


class StepBatches(Sampler[list[list[int]]]):
    """The micro-batches of one process, one list per optimizer step.

    A step has the same records as with a fixed number of records per forward pass.

    Args:
        order: The order of the records in an epoch.
        size: The size of a step and of its forward passes.
        rank: The process.
        world_size: Number of processes.
    """

    def __init__(self, order: LengthGroupedSampler, size: StepSize, rank: int, world_size: int) -> None:
        self.order = order
        self.size = size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return -(-len(self.order) // self.size.records)

    def __iter__(self) -> Iterator[list[list[int]]]:
        indices = list(self.order)
        for start in range(0, len(indices), self.size.records):
            step = indices[start : start + self.size.records]
            yield shared_out(step, self.order.lengths, self.size.batch_tokens, self.world_size)[self.rank]


class StepRecords(Dataset[list[Encoded]]):
    """Micro-batches of records, indexed by `StepBatches`."""

    def __init__(self, records: Sequence[Encoded]) -> None:
        self._records = ProcessRecords(records)

    def __getitem__(self, indices: list[int]) -> list[Encoded]:
        return [self._records[index] for index in indices]

    def __len__(self) -> int:
        return len(self._records)


@dataclass(frozen=True, slots=True)
class StepCollator:
    """Collates each micro-batch of a step into one batch of tensors."""

    collate: PaddingCollator

    def __call__(self, step: Sequence[Sequence[Encoded]]) -> dict[str, list[dict[str, torch.Tensor]]]:
        """The micro-batches under one key, which the Trainer treats as one batch."""
        return {MICRO_BATCHES: [self.collate(records) for records in step]}
