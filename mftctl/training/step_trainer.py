"""The part of the trainer that splits an optimizer step into forward passes by token count."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

from mftctl.data.batching import LengthGroupedSampler, PaddingCollator, ProcessBatches, ProcessRecords
from mftctl.runtime.processes import rank, world_size
from mftctl.training.objectives import SFT, Objective
from mftctl.training.sharding.sharded_trainer import ShardedTrainer
from mftctl.training.token_batches import MICRO_BATCHES, StepBatches, StepCollator, StepRecords, StepSize


class StepTrainer(ShardedTrainer):
    """A Trainer whose steps can use micro-batches with a token budget instead of a fixed number of micro-batches.

    The Trainer itself supports only fixed accumulation, so it treats a whole step as one batch.

    Attributes:
        sampler: The order of the records.
        step_size: The step size with a token budget; None if the arguments' batch size and accumulation apply.
        objective: What is minimised.
    """

    sampler: LengthGroupedSampler
    step_size: StepSize | None = None
    objective: Objective = SFT

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches that over all processes equal those of a single process, or whole steps with a token budget."""
        records = cast("ProcessRecords", self.train_dataset)
        pin_memory = self.args.dataloader_pin_memory
        if self.step_size is not None:
            steps = StepBatches(self.sampler, self.step_size, rank(), world_size())
            collate = StepCollator(cast("PaddingCollator", self.data_collator))
            # torch's annotations do not cover batches whose items are lists of indices.
            return DataLoader(
                cast("Any", StepRecords(records.records)),
                batch_sampler=cast("Any", steps),
                collate_fn=collate,
                pin_memory=pin_memory,
            )
        if world_size() == 1:
            return super().get_train_dataloader()
        batches = ProcessBatches(self.sampler, self.args.per_device_train_batch_size, rank(), world_size())
        return DataLoader(records, batch_sampler=batches, collate_fn=self.data_collator, pin_memory=pin_memory)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Runs the backward passes of a micro-batch or a step and returns its loss."""
        if MICRO_BATCHES not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        micro_batches = inputs[MICRO_BATCHES]
        losses = []
        for number, micro_batch in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            engine_accumulates = self.accelerator.distributed_type == DistributedType.DEEPSPEED
            waits = not is_last and not engine_accumulates
            with self.accelerator.no_sync(model=model) if waits else contextlib.nullcontext():
                losses.append(super().training_step(model, micro_batch, num_items_in_batch))
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's estimate, summed over all micro-batches."""
        return sum(super(StepTrainer, self).floating_point_ops(batch) for batch in inputs.get(MICRO_BATCHES, [inputs]))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        flat = [batch for step in batch_samples for batch in step.get(MICRO_BATCHES, [step])]
        flat = [{"labels": self.objective.counted(batch["labels"])} for batch in flat]
        return super()._get_num_items_in_batch(flat, device)

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # Counted in one go, since the Trainer synchronises with the device here.
        if MICRO_BATCHES in inputs:
            masks = [batch["attention_mask"].flatten() for batch in inputs[MICRO_BATCHES]]
            inputs = {"input_ids": None, "attention_mask": torch.cat(masks)}
        super()._track_num_input_tokens(inputs)  # type: ignore[no-untyped-call]
