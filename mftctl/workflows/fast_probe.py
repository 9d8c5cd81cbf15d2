"""`mftctl probe --fast`: the expected gain of a mask, from one gradient pass without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from mftctl.errors import RunError
from mftctl.evaluation.losses import exact_sum
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.probe_results import Agreement, TrainedProbe
from mftctl.experiments.run_folder import list_runs
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.run_record import RunStatus
from mftctl.masking.selection import removed_count
from mftctl.masking.target_groups import TargetGroup
from mftctl.masking.targets import MaskTarget, find_targets
from mftctl.progress import Listener
from mftctl.training.inputs import TrainingInputs
from mftctl.training.schedule import schedule_factors, total_steps
from mftctl.training.score_start import ScoreStart, score_start
from mftctl.training.target_gradients import mean_gradients, parameter_of

_FEWEST_RANKED = 3


@dataclass(frozen=True, slots=True)
class PromisedMask:
    """The mask that training is assumed to find for a projection.

    Attributes:
        target: The projection.
        gains: The amount by which removing each of its weights lowers the loss, to first order; fp32, of its shape.
        removed: The weights that the mask removes; bool, of its shape.
    """

    target: MaskTarget
    gains: torch.Tensor
    removed: torch.Tensor

    @property
    def change(self) -> float:
        """The change of the loss with this mask; negative is better."""
        return -exact_sum(self.gains[self.removed])


@dataclass(frozen=True, slots=True)
class PromisedChange:
    """The change of the loss with the mask that training is assumed to find for a projection; negative is better."""

    target: MaskTarget
    change: float


def promised_masks(
    model: PreTrainedModel,
    targets: Sequence[MaskTarget],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    listener: Listener,
    *,
    fft_learning_rate: float,
    seed: int,
) -> Iterator[PromisedMask]:
    """Yields the mask that training is assumed to find for each projection, one at a time.

    Removing a weight w changes the loss by -w * dL/dw. With a threshold, a mask is assumed to remove every weight whose
    removal lowers the loss and whose score can fall below the threshold; Adam moves a score by about one learning rate
    per step. With a ratio, it is assumed to remove the weights of each tensor whose removal lowers the loss most; the
    cost of a random start is not counted.

    Args:
        model: Frozen and without masks; it is left unchanged.
        targets: The projections.
        options: Options of the training that this estimate replaces.
        inputs: The data.
        listener: Receives progress updates.
        fft_learning_rate: Learning rate that the model was fine-tuned with.
        seed: Decides random starts.

    Source: ours; the gradient is that of MFT, equation 5, at a mask that removes nothing.
    """
    gradients = mean_gradients(model, targets, options, inputs, listener)
    steps = total_steps(len(inputs.train), options)
    start = score_start(options, model, seed=seed, fft_learning_rate=fft_learning_rate, steps=steps)
    travel = sum(schedule_factors(steps, options))
    for target in targets:
        gains = target.part_of(gradients[parameter_of(target)]) * target.weight.detach()
        yield PromisedMask(target, gains, _removed(target, gains, start, travel * start.learning_rate(target)))


def promised_changes(
    model: PreTrainedModel,
    layers: Sequence[int],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    listener: Listener,
    *,
    fft_learning_rate: float,
    seed: int,
) -> list[PromisedChange]:
    """First-order estimate of how much a mask of each projection would change the loss per answer token.

    Args:
        model: Frozen and without masks; it is left unchanged.
        layers: Decoder layers.
        options: Options of the training that this estimate replaces.
        inputs: The data.
        listener: Receives progress updates.
        fft_learning_rate: Learning rate that the model was fine-tuned with.
        seed: Decides random starts.

    Returns:
        The change of each masked projection of these layers.
    """
    targets = find_targets(model, layers, options.target, options.masked_projections)
    found = promised_masks(model, targets, options, inputs, listener, fft_learning_rate=fft_learning_rate, seed=seed)
    return [PromisedChange(promised.target, promised.change) for promised in found]


def changes_of_groups(changes: Sequence[PromisedChange], groups: Sequence[TargetGroup]) -> dict[str, float]:
    """The sum of the changes in each group, by its name.

    Args:
        changes: From `promised_changes`.
        groups: The groups.
    """
    by_layer = {
        group.name: [
            sum(item.change for item in changes if item.target.layer == layer and group.has(item.target))
            for layer in group.layers
        ]
        for group in groups
    }
    return {name: sum(found) for name, found in by_layer.items()}


def agreement_with_training(root: Path, model: str, changes: dict[str, float]) -> Agreement | None:
    """Agreement with the ranking of the same groups by the latest trained probe of the same model; None without one.

    Args:
        root: The runs folder.
        model: Folder or hub id.
        changes: From `changes_of_groups`.
    """
    from scipy import stats  # takes as long to import as a short command to run

    for run in reversed(list_runs(root)[0]):
        record = run.record
        if (record.command, record.status, RunInputs.read(record.inputs).model) != ("probe", RunStatus.FINISHED, model):
            continue
        try:
            trained = {group.name: group.change for group in run.result(TrainedProbe).groups}
        except RunError:
            continue  # of a fast probe, or incomplete
        shared = [name for name in changes if name in trained]
        if len(shared) >= _FEWEST_RANKED:
            found = stats.spearmanr([changes[name] for name in shared], [trained[name] for name in shared])
            return Agreement(run=run.name, groups=len(shared), rank_correlation=float(found.statistic))
    return None


def _removed(target: MaskTarget, gains: torch.Tensor, start: ScoreStart, reach: float) -> torch.Tensor:
    """The weights that a mask is assumed to remove; bool, of the weight's shape.

    Args:
        target: The projection.
        gains: The amount by which removing each of its weights lowers the loss.
        start: How the scores are initialised.
        reach: The distance that a score can move.
    """
    options = start.options
    if options.threshold is not None:
        return (start.scores(target) - reach < options.threshold) & (gains > 0)
    if options.blocks is not None:
        blocks = options.blocks.blocks(gains, target.inputs_dim)
        highest = blocks.topk(options.blocks.block - options.blocks.kept).indices
        removed = torch.zeros_like(blocks, dtype=torch.bool).scatter_(-1, highest, True)
        return removed.flatten(-2).movedim(-1, target.inputs_dim)
    count = removed_count(gains.numel(), options.ratio_of(target.projection) or 0.0)
    removed = torch.zeros(gains.numel(), dtype=torch.bool, device=gains.device)
    removed[gains.flatten().topk(count).indices] = True
    return removed.view(gains.shape)
