"""One pass over the training records that adds up gradients, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch.nn import Module, Parameter
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mftctl.data.batching import PaddingCollator, pad_token_id
from mftctl.data.prepared.records import answer_lengths, token_lengths
from mftctl.evaluation.head_chunks import answer_positions, logits_only_at
from mftctl.evaluation.inference import length_batches
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.targets import decoder_layers
from mftctl.progress import Listener, Progress
from mftctl.runtime.process_group import add_up
from mftctl.runtime.processes import rank, world_size
from mftctl.training.answer_loss import answer_loss
from mftctl.training.inputs import TrainingInputs


def accumulated_gradients(
    model: PreTrainedModel,
    parameters: Sequence[Parameter],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    listener: Listener,
    *,
    squared: bool = False,
) -> dict[Parameter, torch.Tensor]:
    """The fp32 gradient of the loss per answer token over all training records, for some parameters.

    Several processes share the batches.

    Args:
        model: Frozen; it is left unchanged.
        parameters: The parameters; one may be listed several times, once for each of its parts.
        options: Size of the batches, and whether layers recompute activations.
        inputs: The data.
        listener: Receives progress updates.
        squared: Whether to add up the squares of each batch's gradient instead.
    """
    collate = PaddingCollator(pad_token_id(inputs.tokenizer))
    answer_tokens = sum(answer_lengths(inputs.train))
    checkpointed = list(decoder_layers(model)[1]) if options.gradient_checkpointing else []
    with _checkpointing(checkpointed), _accumulating(model, parameters, squared=squared) as gradients:
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
def _accumulating(
    model: PreTrainedModel, parameters: Sequence[Parameter], *, squared: bool
) -> Iterator[dict[Parameter, torch.Tensor]]:
    """Context in which the gradients of some parameters, or their squares, are added up in fp32 and not kept elsewhere.

    The other parameters of the model require no gradients in the meantime.
    """
    sums = {parameter: torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters}

    def add(parameter: Parameter) -> None:
        if parameter.grad is not None:
            gradient = parameter.grad.float() if squared else parameter.grad
            sums[parameter] += gradient.square_() if squared else gradient
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
