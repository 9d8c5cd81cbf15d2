"""`mftctl probe --fast`: the expected gain of a mask for each group, from one gradient pass without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.nn import Module, Parameter
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mftctl.data.batching import PaddingCollator, pad_token_id
from mftctl.data.prepared.records import answer_lengths, token_lengths
from mftctl.errors import RunError
from mftctl.evaluation.head_chunks import answer_positions, logits_only_at
from mftctl.evaluation.inference import length_batches
from mftctl.evaluation.losses import exact_sum
from mftctl.experiments.results import Agreement, TrainedProbe
from mftctl.experiments.run_folder import list_runs
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.training_options import MaskTrainOptions
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


def _mean_gradients(
    model: PreTrainedModel,
    targets: Sequence[MaskTarget],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    listener: Listener,
) -> dict[Parameter, torch.Tensor]:
    """The fp32 gradient of the loss per answer token over all training records, for each parameter with a target.

    Several processes share the batches.
    """
    collate = PaddingCollator(pad_token_id(inputs.tokenizer))
    answer_tokens = sum(answer_lengths(inputs.train))
    checkpointed = list(decoder_layers(model)[1]) if options.gradient_checkpointing else []
    parameters = [_parameter(target) for target in targets]
    with _checkpointing(checkpointed), _accumulating(model, parameters) as gradients:
        done = 0
        for indices in _batches(token_lengths(inputs.train), options)[rank() :: world_size()]:
            batch = collate([inputs.train[index] for index in indices])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            positions, tokens = answer_positions(batch.pop("labels"))
            with logits_only_at(model, positions, tokens, listener.warn):
                outputs = model(**batch, use_cache=False)
            answer_loss(outputs, positions, tokens, answer_tokens).backward()  # type: ignore[no-untyped-call]
            done += len(indices)
            listener.progress(
                Progress("computing gradients", min(done * world_size(), len(inputs.train)), len(inputs.train))
            )
    add_up(gradients.values())
    return gradients


def _batches(lengths_tokens: Sequence[int], options: MaskTrainOptions) -> list[list[int]]:
    """Batches of records, longest first so that running out of memory shows at once, each a forward pass."""
    if options.batch_tokens is not None:
        return length_batches(lengths_tokens, options.batch_tokens)
    order = sorted(range(len(lengths_tokens)), key=lambda index: -lengths_tokens[index])
    return [order[start : start + options.batch_size] for start in range(0, len(order), options.batch_size)]


@contextmanager
def _checkpointing(layers: Sequence[Module]) -> Iterator[None]:
    """Context in which layers keep only their input for the backward pass and recompute everything else.

    Models do this themselves only in training mode, which may enable dropout.
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
    """Context in which the gradients of some parameters are accumulated in fp32 and stored nowhere else.

    Args:
        model: Its other parameters require no gradients in the meantime.
        parameters: The parameters of interest; one may be listed several times, once for each of its parts.
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
    """The amount by which removing the weights that a mask is assumed to remove lowers the loss.

    Args:
        target: The projection.
        gains: The amount by which removing each of its weights lowers the loss.
        start: How the scores are initialised.
        reach: The distance that a score can move.
    """
    options = start.options
    threshold = options.threshold
    if options.blocks is not None:
        blocks = options.blocks.blocks(gains, target.inputs_dim)
        return exact_sum(blocks.topk(options.blocks.block - options.blocks.kept).values.flatten())
    if threshold is None:
        count = removed_count(gains.numel(), options.ratio_of(target.projection) or 0.0)
        return exact_sum(gains.flatten().topk(count).values)
    scores = start.scores(target)
    return exact_sum(gains[(scores - reach < threshold) & (gains > 0)])


def _parameter(target: MaskTarget) -> Parameter:
    return target.module.get_parameter(target.parameter)
