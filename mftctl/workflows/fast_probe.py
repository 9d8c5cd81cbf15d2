"""`mftctl probe --fast`: what a mask of each group promises, from one pass of gradients and no training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from scipy import stats
from torch.nn import Module, Parameter
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mftctl.data.batching import PaddingCollator, pad_token_id
from mftctl.data.encoding import Encoded
from mftctl.errors import RunError
from mftctl.evaluation.head_chunks import answer_positions, logits_only_at
from mftctl.evaluation.inference import length_batches
from mftctl.evaluation.losses import exact_sum
from mftctl.experiments.recipe import MaskTrainOptions
from mftctl.experiments.results import Agreement, TrainedProbe
from mftctl.experiments.run_folder import list_runs
from mftctl.masking.selection import removed_count
from mftctl.masking.targets import MaskTarget, decoder_layers, find_targets, format_layers
from mftctl.progress import Listener, Progress
from mftctl.runtime.process_group import add_up
from mftctl.runtime.processes import rank, world_size
from mftctl.runtime.torch_failures import gpu_failures
from mftctl.training.answer_loss import answer_loss
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
    """By how much, to first order, the mask of each group would change the loss per answer token.

    To remove a weight w changes the loss by -w * dL/dw. With a threshold, a mask is taken to remove every weight that
    lowers the loss so and whose score can fall below the threshold: Adam moves it by about one learning rate a step.
    With a ratio, it is taken to remove those weights of each tensor that lower the loss most; what a random start
    costs is left out.

    Args:
        model: Frozen, without masks; left as it was.
        groups: Decoder layers of each group.
        options: Of the training that this takes the place of.
        inputs: Data.
        listener: Hears progress.
        fft_learning_rate: That the model was fine-tuned with.
        seed: Decides random starts.

    Returns:
        The change of each group by its layers, such as `4-7`; below 0 is better.

    Source: ours; the gradient is that of MFT, equation 5, at a mask that removes nothing.
    """
    layers = sorted({layer for group in groups for layer in group})
    targets = find_targets(model, layers, options.target, options.projections)
    with gpu_failures("taking gradients"):
        gradients = _mean_gradients(model, targets, options, inputs, listener)
    steps = total_steps(len(inputs.train), options)
    start = score_start(options, model, seed=seed, fft_learning_rate=fft_learning_rate, steps=steps)
    travel = sum(schedule_factors(steps, options))
    changes = dict.fromkeys(layers, 0.0)
    for target in targets:
        gains = target.part_of(gradients[_parameter(target)]) * target.weight.detach()
        changes[target.layer] -= _promised_gain(target, gains, start, travel * start.learning_rate(target))
    return {format_layers(list(group)): sum(changes[layer] for layer in group) for group in groups}


def agreement_with_training(root: Path, model: str, changes: dict[str, float]) -> Agreement | None:
    """How alike the newest trained probe of the same model ranks the same groups; None without one.

    Args:
        root: The runs folder.
        model: Folder or hub id.
        changes: From `promised_changes`.
    """
    for run in reversed(list_runs(root)[0]):
        record = run.record
        if (record.command, record.status, record.inputs.get("model")) != ("probe", "finished", model):
            continue
        try:
            trained = {group.layers: group.change for group in run.result(TrainedProbe).groups}
        except RunError:
            continue  # of a fast one, or not complete
        shared = [layers for layers in changes if layers in trained]
        if len(shared) >= _FEWEST_RANKED:
            found = stats.spearmanr([changes[layers] for layers in shared], [trained[layers] for layers in shared])
            return Agreement(run=run.name, groups=len(shared), rank_correlation=float(found.statistic))
    return None


def _mean_gradients(
    model: PreTrainedModel,
    targets: Sequence[MaskTarget],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    listener: Listener,
) -> dict[Parameter, torch.Tensor]:
    """The gradient of the loss per answer token over all training records, fp32, of each parameter with a target.

    Several processes share out the batches.
    """
    collate = PaddingCollator(pad_token_id(inputs.tokenizer))
    records = sorted(inputs.train, key=lambda record: -len(record.input_ids))  # a lack of memory shows at once
    answer_tokens = sum(record.answer_tokens for record in records)
    checkpointed = list(decoder_layers(model)[1]) if options.gradient_checkpointing else []
    parameters = [_parameter(target) for target in targets]
    with _checkpointing(checkpointed), _accumulating(model, parameters) as gradients:
        done = 0
        for batch_records in _batches(records, options)[rank() :: world_size()]:
            batch = collate(batch_records)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            positions, tokens = answer_positions(batch.pop("labels"))
            with logits_only_at(model, positions, tokens, listener.warn):
                outputs = model(**batch, use_cache=False)
            answer_loss(outputs, positions, tokens, answer_tokens).backward()  # type: ignore[no-untyped-call]
            done += len(batch_records)
            listener.progress(Progress("taking gradients", min(done * world_size(), len(records)), len(records)))
    add_up(gradients.values())
    return gradients


def _batches(records: Sequence[Encoded], options: MaskTrainOptions) -> list[Sequence[Encoded]]:
    """Records, the longest first, as many together as a forward pass takes."""
    if options.batch_tokens is None:
        return [records[start : start + options.batch_size] for start in range(0, len(records), options.batch_size)]
    lengths = [len(record.input_ids) for record in records]
    batches = length_batches(lengths, options.batch_tokens)
    return [[records[index] for index in batch] for batch in batches]


@contextmanager
def _checkpointing(layers: Sequence[Module]) -> Iterator[None]:
    """Inside it, layers keep their input alone for the backward pass, and compute all else again in it.

    Models do so themselves in training mode only, in which they may have dropout.
    """
    forwards = [(layer, layer.__dict__.get("forward")) for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield
    finally:
        for layer, forward in forwards:
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


@contextmanager
def _accumulating(model: PreTrainedModel, parameters: Sequence[Parameter]) -> Iterator[dict[Parameter, torch.Tensor]]:
    """Inside it, what backward passes give for some parameters is added up in fp32, and held nowhere else.

    Args:
        model: Its other parameters need no gradients meanwhile.
        parameters: Those of interest; several parts of one may be named.
    """
    sums = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters}

    def add(parameter: Parameter) -> None:
        if parameter.grad is not None:
            sums[parameter] += parameter.grad
            parameter.grad = None

    needed = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    hooks = []
    for parameter in sums:
        parameter.requires_grad_(True)
        hooks.append(parameter.register_post_accumulate_grad_hook(add))  # type: ignore[no-untyped-call]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, before in needed:
            parameter.requires_grad_(before)


def _promised_gain(target: MaskTarget, gains: torch.Tensor, start: ScoreStart, reach: float) -> float:
    """What the removal of the weights that a mask is taken to remove lowers the loss by.

    Args:
        target: The projection.
        gains: What the removal of each of its weights lowers the loss by.
        start: Of the scores.
        reach: How far a score can move.
    """
    options = start.options
    threshold = options.effective_threshold
    if threshold is None:
        count = removed_count(gains.numel(), options.ratio_of(target.projection) or 0.0)
        return exact_sum(gains.flatten().topk(count).values)
    scores = start.scores(target)
    return exact_sum(gains[(scores - reach < threshold) & (gains > 0)])


def _parameter(target: MaskTarget) -> Parameter:
    return target.module.get_parameter(target.parameter)
