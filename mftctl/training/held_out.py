"""Validation of masks: some records select the best mask, the others confirm that it helps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from mftctl.data.batching import pad_token_id
from mftctl.data.encoding import Encoded
from mftctl.evaluation.losses import RecordLoss, mean_loss
from mftctl.evaluation.statistics import paired_difference
from mftctl.experiments.mask_results import Confirmation
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.dtypes import bits
from mftctl.masking.masked_values import mask_in_place
from mftctl.masking.rule import Rule
from mftctl.masking.soft_mask import IDENTITY_CODES, SoftRule
from mftctl.masking.targets import MaskTarget
from mftctl.progress import Listener, Progress
from mftctl.training.inputs import TrainingInputs
from mftctl.training.mask_search import MaskSearch
from mftctl.training.objectives import SFT, Objective

_T = TypeVar("_T")
_FEWEST_CONFIRMING = 4


def split_validation_records(validation: Sequence[_T], options: MaskTrainOptions) -> tuple[Sequence[_T], Sequence[_T]]:
    """Splits the validation records into those that select the best mask and those that only confirm it.

    The best of many masks owes part of its lead to chance; records not used in the selection show how much of it is
    real. A mask obtained without selection is evaluated on all records, as is one with too few records to split.

    Args:
        validation: Records in the order of the data.
        options: Options of mask training, including its method.
    """
    if options.method != "learned" or len(validation) < 2 * _FEWEST_CONFIRMING:
        return validation, []
    return validation[0::2], validation[1::2]


def confirm(search: MaskSearch, mask: Mapping[str, torch.Tensor], records: Sequence[Encoded]) -> Confirmation:
    """The change in loss on records not used to select a mask, with its paired 95 % interval.

    Args:
        search: The search that found the mask; its listener is warned if the interval contains 0.
        mask: The mask.
        records: At least two records.
    """
    inputs = replace(search.inputs, validation=records)
    objective = search.objective
    before = validation_losses(search.model, inputs, search.listener, objective)
    with masked(search.targets, mask, base=search.base, rules=search.rules):
        after = validation_losses(search.model, inputs, search.listener, objective)
    return compare(before, after, search.listener)


def compare(before: Sequence[RecordLoss], after: Sequence[RecordLoss], listener: Listener) -> Confirmation:
    """Compares the losses of the same records without and with a mask, with the paired 95 % interval.

    Args:
        before: Losses without the mask, at least two.
        after: Losses with the mask.
        listener: Warned if the interval contains 0.
    """
    change = paired_difference(
        np.array([mine.nll - its.nll for mine, its in zip(after, before, strict=True)]),
        np.array([float(loss.weight) for loss in before]),
    )
    confirmed = change.high < 0
    if not confirmed:
        listener.warn(
            f"The {len(before)} validation records not used to select the mask do not confirm it: "
            f"{change.estimate:+.4f} [{change.low:+.4f}, {change.high:+.4f}] in the loss."
        )
    return Confirmation(
        records=len(before),
        unmasked_loss=mean_loss(before),
        masked_loss=mean_loss(after),
        change=change.estimate,
        low=change.low,
        high=change.high,
        confirmed=confirmed,
    )


@contextmanager
def masked(
    targets: Sequence[MaskTarget],
    mask: Mapping[str, torch.Tensor],
    *,
    base: Mapping[str, torch.Tensor] | None = None,
    rules: Mapping[str, Rule] | None = None,
) -> Iterator[None]:
    """Context in which the model's own weights are masked; afterwards all are restored bit for bit.

    Meanwhile the mask (one byte per weight) and the values that it changes are held on the weights' device.

    Args:
        targets: From `find_targets` on a model without masks; the model then computes with the mask.
        mask: By target name, on any device: bool, True = keep, or the uint8 codes of a soft mask.
        base: For a delta mask, the weight before fine-tuning by target name, on the weight's device.
        rules: The rule of each target, for a soft mask.
    """
    changed: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    try:
        for target in targets:
            weight, own = target.weight.detach(), mask[target.name].to(target.weight.device)
            rule = None if rules is None else rules[target.name]
            if isinstance(rule, SoftRule) and own.dtype == torch.uint8:
                places = torch.ne(own, IDENTITY_CODES[rule.limit])
                changed.append((bits(weight), places, bits(weight)[places]))
                weight.copy_(rule.masked(weight, own))
            else:
                gone = own.logical_not()
                changed.append((bits(weight), gone, bits(weight)[gone]))
                mask_in_place(weight, own, None if base is None else base[target.name])
        yield
    finally:
        for weight, places, values in changed:
            weight[places] = values


def validation_loss(
    model: PreTrainedModel, inputs: TrainingInputs, listener: Listener, objective: Objective = SFT
) -> float:
    """The model's current loss on the validation data, per answer token or per preference."""
    return mean_loss(validation_losses(model, inputs, listener, objective))


def validation_losses(
    model: PreTrainedModel, inputs: TrainingInputs, listener: Listener, objective: Objective = SFT
) -> Sequence[RecordLoss]:
    """The model's current loss on each validation record."""
    return objective.measure(
        model,
        inputs.validation,
        pad_token_id=pad_token_id(inputs.tokenizer),
        on_progress=lambda done, total: listener.progress(Progress("validating", done, total)),
    )
