"""The divergence of a model from the model before fine-tuning, on data of another domain."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from mftctl.data.batching import PaddingCollator, pad_token_id
from mftctl.data.prepared.records import answer_lengths, token_lengths
from mftctl.errors import ConfigError, ModelError
from mftctl.evaluation.head_chunks import answer_positions, logits_only_at, positions_at_once
from mftctl.evaluation.losses import mean_loss, sample_losses
from mftctl.experiments.training_options import TrainingOptions
from mftctl.masking.checkpoints.load import load_model
from mftctl.progress import Listener, Progress
from mftctl.runtime.devices import frozen_dtype
from mftctl.runtime.processes import rank, spreads_parameters, world_size
from mftctl.training.inputs import TrainingInputs
from mftctl.training.retained_data import RetainedData
from mftctl.training.schedule import records_per_step

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class RetainedStep:
    """The retained records of one optimizer step.

    Attributes:
        passes: Record numbers of each forward pass of this process.
        answer_tokens: Answer tokens of the step in all processes.
    """

    passes: list[list[int]]
    answer_tokens: int


class Retention:
    """Measures the loss on retained data, and computes the divergence from the model before fine-tuning on it.

    An optimizer step uses as many retained records as training records. Their order depends only on the seed and the
    step, so that a resumed training run continues with the same records.

    Args:
        data: The retained data.
        options: Options of the training.
        seed: Decides the order of the records.
        pad_token_id: Pads shorter records on the right.
        listener: Receives progress updates.
        reference: The frozen model before fine-tuning; None for an adapter, which is disabled instead, and where
            nothing is trained on the data.

    Attributes:
        weight: Weight of the divergence in the loss.
    """

    def __init__(
        self,
        data: RetainedData,
        options: TrainingOptions,
        *,
        seed: int,
        pad_token_id: int,
        listener: Listener,
        reference: PreTrainedModel | None,
    ) -> None:
        self.weight = options.retain_weight
        self._data = data
        self._options = options
        self._seed = seed
        self._padding = pad_token_id
        self._listener = listener
        self._reference = reference
        self._collate = PaddingCollator(pad_token_id)
        self._lengths, self._answers = token_lengths(data.trained), answer_lengths(data.trained)

    @property
    def records(self) -> int:
        """Number of records that the loss is measured on."""
        return len(self._data.measured)

    def loss(self, model: PreTrainedModel) -> float:
        """The model's loss per answer token on the held-out records; must be called in all processes at once."""
        losses = sample_losses(
            model,
            self._data.measured,
            pad_token_id=self._padding,
            on_progress=lambda done, total: self._listener.progress(Progress("measuring retained data", done, total)),
            together=True,
        )
        return mean_loss(losses)

    def step(self, number: int, most_answer_tokens: int) -> RetainedStep:
        """The records of an optimizer step.

        Args:
            number: Steps taken before.
            most_answer_tokens: Maximum answer tokens of a forward pass; a longer record gets its own pass.
        """
        size = records_per_step(self._options, world_size())
        chosen = [self._at(place) for place in range(number * size, (number + 1) * size)]
        mine = sorted(chosen[rank() :: world_size()], key=lambda index: (-self._lengths[index], index))
        answer_tokens = sum(self._answers[index] for index in chosen)
        return RetainedStep(list(self._passes(mine, most_answer_tokens)), answer_tokens)

    def batch(self, records: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of a forward pass: `input_ids`, `attention_mask` and `labels`, each `(records, tokens)`."""
        batch = self._collate([self._data.trained[index] for index in records])
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def divergence(self, call: nn.Module, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The divergence of the model from the reference, summed over the answer tokens of a batch, with a gradient.

        Args:
            call: The model as trained, which may be wrapped for several processes.
            model: The same model without the wrapper.
            batch: From `batch`.

        Source: Not from the papers. Hinton et al., "Distilling the knowledge in a neural network" (2015), section 2,
            at temperature 1, with the model before fine-tuning as the teacher.
        """
        positions, _ = answer_positions(batch["labels"])
        with torch.no_grad(), self._before_tuning(model) as before:
            wanted = _logits(before, before, batch, positions)
        return summed_divergence(_logits(call, model, batch, positions), wanted)

    def most_answer_tokens(self, model: PreTrainedModel) -> int:
        """Answer tokens whose logits fit into one chunk of the output head."""
        return positions_at_once(model)

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, len(self._data.trained))
        return _order(self._seed, epoch, len(self._data.trained))[offset]

    def _passes(self, records: Sequence[int], most_answer_tokens: int) -> Iterator[list[int]]:
        """Groups of records, longest first, within the limits of a training pass."""
        group: list[int] = []
        for index in records:
            answers = sum(self._answers[other] for other in (*group, index))
            if group and (self._is_full(group) or answers > most_answer_tokens):
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _is_full(self, group: Sequence[int]) -> bool:
        if self._options.batch_tokens is None:
            return len(group) == self._options.batch_size
        return self._lengths[group[0]] * (len(group) + 1) > self._options.batch_tokens

    @contextmanager
    def _before_tuning(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The model before fine-tuning, in evaluation mode."""
        if self._reference is not None:
            yield self._reference
            return
        with cast("PeftModel", model).disable_adapter():
            model.eval()  # type: ignore[no-untyped-call]
            try:
                yield model
            finally:
                model.train()


def make_retention(
    inputs: TrainingInputs,
    options: TrainingOptions,
    model: PreTrainedModel | PeftModel,
    before: Path | None,
    *,
    seed: int,
    listener: Listener,
) -> Retention | None:
    """The retention of a training; None without retained data.

    Args:
        inputs: Inputs of the training.
        options: Options of the training.
        model: The model to train, or to learn a mask for.
        before: Folder of the model before fine-tuning, loaded if the divergence has a weight; None for an adapter.
        seed: Decides the order of the records.
        listener: Receives progress updates.

    Raises:
        ConfigError: The divergence has a weight, and the processes share the parameters.
        ModelError: The model before fine-tuning cannot be loaded, or has a different vocabulary.
    """
    if inputs.retained is None:
        return None
    reference = None
    if options.retain_weight > 0:
        _require_whole_parameters()
        reference = None if before is None else _load_reference(before, model, options)
    padding = pad_token_id(inputs.tokenizer)
    return Retention(inputs.retained, options, seed=seed, pad_token_id=padding, listener=listener, reference=reference)


def _require_whole_parameters() -> None:
    if spreads_parameters():
        raise ConfigError(
            "The divergence from the model before fine-tuning needs whole parameters in each process.",
            key="retain_weight",
            expected="one process, or recipes/accelerate/ddp.yaml",
            actual="ZeRO or FSDP, which shard them",
            hint="--shard ddp, or --retain-weight 0 to only measure",
        )


def _load_reference(before: Path, model: PreTrainedModel | PeftModel, options: TrainingOptions) -> PreTrainedModel:
    """The frozen model before fine-tuning."""
    reference = load_model(before, dtype=frozen_dtype(options.precision)).requires_grad_(False)
    sizes = [one.config.get_text_config().vocab_size for one in (model, reference)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            "The model before fine-tuning has a different vocabulary.",
            path=before,
            key="vocab_size",
            expected=sizes[0],
            actual=sizes[1],
        )
    return reference


def summed_divergence(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence KL(reference || model) in nats, summed over positions, fp32.

    Args:
        logits: Of the model, `(positions, vocabulary)`, with a gradient.
        reference: Of the reference, of the same shape.
    """
    ours, theirs = (F.log_softmax(values.float(), dim=-1) for values in (logits, reference))
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


def _logits(
    call: nn.Module, model: PreTrainedModel, batch: dict[str, torch.Tensor], positions: torch.Tensor
) -> torch.Tensor:
    """The logits at some positions, `(positions, vocabulary)`."""
    with logits_only_at(model, positions):
        output = call(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    logits: torch.Tensor = output.logits
    return logits[0] if logits.shape[:2] == (1, len(positions)) else logits.flatten(0, 1)[positions]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, records: int) -> list[int]:
    """The order of the records in one pass over them."""
    order = list(range(records))
    random.Random(f"{seed}:retained:{epoch}").shuffle(order)
    return order
