"""`mask-train --ratio auto`: the ratio of each tensor, from one gradient pass before training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from mftctl.errors import RunError
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.run_contents import read_part
from mftctl.experiments.value_types import Number, Part
from mftctl.files.atomic import write_text
from mftctl.masking.budget import counts_in_budget
from mftctl.masking.targets import MaskTarget
from mftctl.progress import Listener
from mftctl.runtime.peak_memory import free_unreachable
from mftctl.runtime.process_group import from_first
from mftctl.training.inputs import TrainingInputs
from mftctl.training.target_gradients import mean_gradients, parameter_of


class _Ratios(Part):
    """The ratio of each masked projection, by its name."""

    ratios: dict[str, Number]


def ratios_in_budget(
    model: PreTrainedModel,
    targets: Sequence[MaskTarget],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    budget: float,
    path: Path,
    listener: Listener,
) -> dict[str, float]:
    """The ratio of each projection, by name, which together remove exactly the budget.

    The highest of all first-order gains share the budget: removing a weight w lowers the loss by w * dL/dw.

    Args:
        model: Frozen and without masks; it is left unchanged.
        targets: The projections.
        options: Sizes of the batches.
        inputs: The data; all training records are used.
        budget: Share of all their weights to remove.
        path: File that stores the ratios, from which a resumed run reads them.
        listener: Receives progress updates.

    Raises:
        MaskingError: A gradient is not finite.
        RunError: The stored ratios cannot be read, or are not those of these projections.

    Source: ours; the gradient is that of MFT, equation 5, at a mask that removes nothing.
    """
    if not from_first(lambda: "stored" if path.exists() else ""):
        shares = _estimated(model, targets, options, inputs, budget, listener)
        free_unreachable()
        from_first(lambda: _stored(path, shares))
    ratios = read_part(path, _Ratios).ratios
    if set(ratios) != {target.name for target in targets}:
        raise RunError(
            "The stored ratios are of other projections.",
            path=path,
            expected=f"{len(targets)} projections of this model",
            actual=f"{len(ratios)} names",
            hint="start a new run",
        )
    return ratios


def _estimated(
    model: PreTrainedModel,
    targets: Sequence[MaskTarget],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    budget: float,
    listener: Listener,
) -> dict[str, float]:
    """The share of the highest gains that each projection has, by name; the gradients are freed on return."""
    gradients = mean_gradients(model, targets, options, inputs, listener)
    gains = [target.part_of(gradients[parameter_of(target)]) for target in targets]
    for target, part in zip(targets, gains, strict=True):
        part.mul_(target.weight.detach())
    counts = counts_in_budget(gains, budget)
    return {target.name: count / target.weight.numel() for target, count in zip(targets, counts, strict=True)}


def _stored(path: Path, ratios: dict[str, float]) -> str:
    write_text(path, json.dumps({"ratios": ratios}, indent=2) + "\n")
    return str(path)
