"""`mftctl probe --fast`: the expected gain of a mask for each group, from one gradient pass without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

from mftctl.errors import RunError
from mftctl.evaluation.losses import exact_sum
from mftctl.experiments.results import Agreement, TrainedProbe
from mftctl.experiments.run_folder import list_runs
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.training_options import MaskTrainOptions
from mftctl.masking.selection import removed_count
from mftctl.masking.targets import MaskTarget, find_targets, format_layers
from mftctl.progress import Listener
from mftctl.runtime.torch_failures import gpu_failures
from mftctl.training.gradient_pass import accumulated_gradients
from mftctl.training.inputs import TrainingInputs
from mftctl.training.schedule import schedule_factors, total_steps
from mftctl.training.score_start import ScoreStart, score_start

_FEWEST_RANKED = 3


def promised_changes(
    model: PreTrainedModel,
    groups: Sequence[Sequence[int]],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    listener: Listener,
    *,
    fft_learning_rate: float,
    seed: int,
) -> dict[str, float]:
    """First-order estimate of how much a mask of each group would change the loss per answer token.

    Removing a weight w changes the loss by -w * dL/dw. With a threshold, a mask is assumed to remove every weight whose
    removal lowers the loss and whose score can fall below the threshold; Adam moves a score by about one learning rate
    per step. With a ratio, it is assumed to remove the weights of each tensor whose removal lowers the loss most; the
    cost of a random start is not counted.

    Args:
        model: Frozen and without masks; it is left unchanged.
        groups: Decoder layers of each group.
        options: Options of the training that this estimate replaces.
        inputs: The data.
        listener: Receives progress updates.
        fft_learning_rate: Learning rate that the model was fine-tuned with.
        seed: Decides random starts.

    Returns:
        The change of each group, keyed by its layers, such as `4-7`; negative is better.

    Source: ours; the gradient is that of MFT, equation 5, at a mask that removes nothing.
    """
    layers = sorted({layer for group in groups for layer in group})
    targets = find_targets(model, layers, options.target, options.projections)
    with gpu_failures("computing gradients"):
        parameters = [_parameter(target) for target in targets]
        gradients = accumulated_gradients(model, parameters, options, inputs, listener)
    steps = total_steps(len(inputs.train), options)
    start = score_start(options, model, seed=seed, fft_learning_rate=fft_learning_rate, steps=steps)
    travel = sum(schedule_factors(steps, options))
    changes = dict.fromkeys(layers, 0.0)
    for target in targets:
        gains = target.part_of(gradients[_parameter(target)]) * target.weight.detach()
        changes[target.layer] -= _promised_gain(target, gains, start, travel * start.learning_rate(target))
    return {format_layers(list(group)): sum(changes[layer] for layer in group) for group in groups}


def agreement_with_training(root: Path, model: str, changes: dict[str, float]) -> Agreement | None:
    """Agreement with the ranking of the same groups by the latest trained probe of the same model; None without one.

    Args:
        root: The runs folder.
        model: Folder or hub id.
        changes: From `promised_changes`.
    """
    from scipy import stats  # takes as long to import as a short command to run

    for run in reversed(list_runs(root)[0]):
        record = run.record
        if (record.command, record.status, RunInputs.read(record.inputs).model) != ("probe", RunStatus.FINISHED, model):
            continue
        try:
            trained = {group.layers: group.change for group in run.result(TrainedProbe).groups}
        except RunError:
            continue  # of a fast probe, or incomplete
        shared = [layers for layers in changes if layers in trained]
        if len(shared) >= _FEWEST_RANKED:
            found = stats.spearmanr([changes[layers] for layers in shared], [trained[layers] for layers in shared])
            return Agreement(run=run.name, groups=len(shared), rank_correlation=float(found.statistic))
    return None


def _promised_gain(target: MaskTarget, gains: torch.Tensor, start: ScoreStart, reach: float) -> float:
    """The amount by which removing the weights that a mask is assumed to remove lowers the loss.

    Args:
        target: The projection.
        gains: The amount by which removing each of its weights lowers the loss.
        start: How the scores are initialised.
        reach: The distance that a score can move.
    """
    options = start.options
    threshold = options.threshold
    if threshold is None:
        count = removed_count(gains.numel(), options.ratio_of(target.projection) or 0.0)
        return exact_sum(gains.flatten().topk(count).values)
    scores = start.scores(target)
    return exact_sum(gains[(scores - reach < threshold) & (gains > 0)])


def _parameter(target: MaskTarget) -> Parameter:
    return target.module.get_parameter(target.parameter)
