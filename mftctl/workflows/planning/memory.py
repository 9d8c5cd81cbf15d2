"""Estimates the memory of training on one device from a model's configuration and batch sizes.

No architecture-specific formula is used: the forward and backward passes run on tensors without data, and every storage
they would allocate is counted; a few decoder layers stand in for all equivalent ones. Values that do not come from
running the model are constants in `entry_costs`. Scratch memory inside kernels and allocator losses from rounding and
fragmentation are not counted. If freed blocks return to the system, measured peaks of small models on a CPU were within
10 % of the estimate; with glibc's default settings, which keep freed blocks, they were up to 1.3 times the estimate and
in one case with gradient checkpointing 2.4 times (all without the process itself).

A model for a GPU is run with CPU kernels, so no GPU is needed: attention without a square matrix is the same on both,
and autocast differs only in the dtypes of some normalisations.

Plain data parallelism (DDP) needs the same on every device, plus buckets of the size of the gradients.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mftctl.errors import ModelError
from mftctl.evaluation.head_chunks import logits_only_at, positions_at_once
from mftctl.masking.checkpoints.meta_models import build_skeleton, without_data
from mftctl.masking.experts import MaskedExperts
from mftctl.masking.layers import MaskedLinear, masked_layers, masked_products
from mftctl.masking.targets import decoder_layers
from mftctl.runtime.peak_memory import peak_memory_bytes
from mftctl.text import first_line
from mftctl.training.answer_loss import answer_loss
from mftctl.training.loop import CHECKPOINTING
from mftctl.workflows.planning.allocation_meter import AllocationMeter, Event, add_up
from mftctl.workflows.planning.batches import Batches
from mftctl.workflows.planning.entry_costs import (
    DIVERGENCE_LOGITS,
    NF4_BYTES,
    PROMISED_BYTES,
    kept_bytes,
    selecting_bytes,
    step_bytes,
)
from mftctl.workflows.planning.layer_sampling import keep_stand_ins, repeat_layers, stand_ins, telling_stretches
from mftctl.workflows.planning.training_setup import TrainingPlan

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Estimated memory on one device, in bytes.

    Attributes:
        weights_bytes: All parameters and buffers of the model, including adapters, and of a frozen model beside it.
        scores_bytes: Trainable mask scores.
        masked_weights_bytes: Cached products of weights and masks.
        gradients_bytes: Gradients of everything that is trained or whose gradients are summed.
        optimizer_bytes: Optimizer state and running averages kept between steps.
        activations_bytes: Peak additional memory of forward, loss and backward.
        step_bytes: Peak additional memory of the optimizer step.
        validation_bytes: Peak memory of a validation batch.
        process_bytes: Measured memory of Python and its libraries on a CPU; 0 on a GPU (the CUDA context is extra).
        peak_bytes: Overall peak; less than the sum, since gradients appear as activations are freed.
        generation_bytes: Peak memory for the answer to one problem, including its key-value cache.
    """

    weights_bytes: int = 0
    scores_bytes: int = 0
    masked_weights_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_bytes: int = 0
    activations_bytes: int = 0
    step_bytes: int = 0
    validation_bytes: int = 0
    process_bytes: int = 0
    peak_bytes: int = 0
    generation_bytes: int = 0


def estimate_memory(
    config: PreTrainedConfig, plan: TrainingPlan, batches: Batches, *, process_bytes: int
) -> MemoryEstimate:
    """Estimates the memory of training on the planned device.

    Args:
        config: Model configuration; the weights are not needed.
        plan: The training plan.
        batches: Sizes of the largest batches.
        process_bytes: Memory of the process without a model; counted on a CPU only.

    Raises:
        ConfigError: The plan does not fit the model.
        MaskingError: The layers or projections are not in the model.
        ModelError: The architecture's computation depends on tensor values, so it cannot run without data.
    """
    model = build_skeleton(config, plan.weights_dtype)
    layers = decoder_layers(model)[1]
    with torch.device("meta"):
        plan.prepare(model)
    standing = _standing(model, plan, 0 if plan.on_gpu else process_bytes)
    chosen = stand_ins(layers)
    kept = keep_stand_ins(model, layers, chosen)
    with without_data(model, _CPU), known_to_run(config):
        return _with_passes(standing, model, layers, plan, batches, kept, chosen)


def least_memory(config: PreTrainedConfig, plan: TrainingPlan) -> int:
    """A lower bound for the memory of training, without activations; much faster than the full estimate.

    Args:
        config: Model configuration; the weights are not needed.
        plan: The training plan.

    Raises:
        ConfigError: The plan does not fit the model.
        MaskingError: The layers or projections are not in the model.
        ModelError: transformers cannot build the model.
    """
    model = build_skeleton(config, plan.weights_dtype)
    with torch.device("meta"):
        plan.prepare(model)
    return _standing(model, plan, 0).peak_bytes


@contextmanager
def known_to_run(config: PreTrainedConfig) -> Iterator[None]:
    """Context for running a model without data.

    Raises:
        ModelError: The model cannot run without data.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        raise ModelError(
            "The memory of this architecture cannot be estimated without its weights.",
            key=config.model_type,
            actual=first_line(error),
        ) from error


def resident_bytes() -> int:
    """Current memory of this process, or its peak if the system does not report the current value."""
    path = Path("/proc/self/statm")
    if path.is_file():
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory_bytes()


def _standing(model: PreTrainedModel, plan: TrainingPlan, process: int) -> MemoryEstimate:
    """The part of the estimate that follows from parameter sizes alone: resident memory and step temporaries."""
    scores = sum(_size(module.scores) for _, module in masked_layers(model))
    weights = sum(map(_size, {*model.parameters(), *model.buffers()})) - scores
    if plan.reference_dtype is not None:
        weights += weights * plan.reference_dtype.itemsize // plan.weights_dtype.itemsize
    weights -= _quantized_bytes(model)[0] if plan.quantized else 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(4 * parameter.numel() if plan.adds_up else _size(parameter) for parameter in trained)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    optimizer = sum(
        kept_bytes(item, plan.optimizer, on_gpu=plan.on_gpu, is_embedding=item in embeddings) for item in trained
    )
    found = MemoryEstimate(
        weights_bytes=weights,
        scores_bytes=scores,
        masked_weights_bytes=sum(_product_sizes(model)),
        gradients_bytes=gradients,
        optimizer_bytes=0 if plan.adds_up else optimizer + plan.averages * sum(map(_size, trained)),
        step_bytes=_step_bytes(trained, plan) if trained else 0,
        process_bytes=process,
    )
    peak = (
        process + weights + scores + found.optimizer_bytes + found.masked_weights_bytes + gradients + found.step_bytes
    )
    return replace(found, peak_bytes=peak)


def _with_passes(
    standing: MemoryEstimate,
    model: PreTrainedModel,
    layers: nn.ModuleList,
    plan: TrainingPlan,
    batches: Batches,
    kept: Mapping[int, nn.Module],
    chosen: Sequence[int],
) -> MemoryEstimate:
    """Adds the memory of training and validation passes, measured on the model's stand-ins."""
    dequantized = _quantized_bytes(model)[1] if plan.quantized else 0
    masked = standing.masked_weights_bytes
    trains = any(parameter.requires_grad for parameter in model.parameters())
    events = _training_events(model, kept, plan, batches) if trains else []
    training = add_up(repeat_layers(events, chosen))
    extra = dequantized + (_divergence_bytes(model, batches) if plan.retains else 0)
    activations = extra + max(training.peak_other_bytes - masked, 0)
    passes, validation = training.peak_bytes + extra if trains else 0, 0
    before = standing.process_bytes + standing.weights_bytes + standing.scores_bytes + standing.optimizer_bytes
    if plan.adds_up:
        passes += standing.gradients_bytes
    else:
        # A product is recomputed while the previous one is still alive.
        passes += max(_product_sizes(model), default=0) if trains else 0
        validation = dequantized + _validation_bytes(model, layers, plan, batches, kept, chosen)
    return replace(
        standing,
        activations_bytes=activations,
        validation_bytes=validation,
        peak_bytes=max(standing.peak_bytes, before + passes, before + masked + validation),
    )


def _divergence_bytes(model: PreTrainedModel, batches: Batches) -> int:
    """What a pass over retained data holds beyond one over training data: fp32 logits of both models, in several forms.

    Its records are assumed to have as many answer tokens as training records.
    """
    positions = min(batches.answer_tokens, positions_at_once(model))
    vocabulary: int = model.config.get_text_config().vocab_size
    return DIVERGENCE_LOGITS * 4 * positions * vocabulary


def _product_sizes(model: nn.Module) -> list[int]:
    """The size of each cached product of a weight and its mask, without computing any."""
    sizes = []
    for module in model.modules():
        if isinstance(module, MaskedLinear) and module.keeps_product:
            sizes.append(_size(module.weight))
        elif isinstance(module, MaskedExperts):
            sizes += [_size(module.experts.get_parameter(name)) for name in module._parts]
    return sizes


def _training_events(
    model: PreTrainedModel, layers: Mapping[int, nn.Module], plan: TrainingPlan, batches: Batches
) -> list[Event]:
    """The allocations of the forward and backward passes of an optimizer step."""
    model.train()
    if plan.gradient_checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    _outdate_products(model)
    shape = (batches.records, batches.length_tokens)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    positions, tokens = (torch.zeros(batches.answer_tokens, dtype=torch.int64) for _ in range(2))
    # Trainers pass (records, tokens), which the model expands to this shape; it accepts the shape directly too.
    mask = torch.ones(shape[0], 1, shape[1], shape[1], dtype=torch.bool) if batches.padded else None
    meter = AllocationMeter([*model.parameters(), *model.buffers(), input_ids, positions, tokens])

    def take(parameter: torch.Tensor) -> None:
        if plan.adds_up:
            parameter.grad = None
        else:
            meter.mark_gradient(parameter)

    with meter, telling_stretches(model, layers, meter):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(take)  # type: ignore[no-untyped-call]
        for _ in range(2 if plan.accumulates else 1):
            loss = _loss(model, input_ids, mask, positions, tokens, autocast=plan.autocast)
            loss.backward()  # type: ignore[no-untyped-call]
    return meter.events


def _outdate_products(model: nn.Module) -> None:
    """Invalidates the products of weights and masks, as a step does, so that the next pass recomputes them."""
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            module._state, module._masked_weight = None, torch.empty(0)
        elif isinstance(module, MaskedExperts):
            module._products.clear()


def _loss(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    *,
    autocast: bool,
) -> torch.Tensor:
    """The loss as the trainer computes it: accelerate converts autocast outputs to fp32."""
    with (
        logits_only_at(model, positions, tokens),
        torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=autocast),
    ):
        outputs = model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    if autocast:
        outputs.logits = outputs.logits.float()
    return answer_loss(outputs, positions, tokens, torch.ones((), dtype=torch.int64))


def _validation_bytes(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    plan: TrainingPlan,
    batches: Batches,
    kept: Mapping[int, nn.Module],
    chosen: Sequence[int],
) -> int:
    """Peak memory of a validation batch.

    Args:
        model: The model reduced to its stand-ins.
        layers: The module list of the stand-ins.
        plan: The training plan.
        batches: The largest batches.
        kept: The stand-ins, by their index in the full model.
        chosen: The stand-in of each layer.
    """
    if plan.autocast:  # autocast keeps the cast weights of every layer
        meter = AllocationMeter([*model.parameters(), *model.buffers()])
        with telling_stretches(model, kept, meter):
            return add_up(repeat_layers(validation_events(model, batches, meter, autocast=True), chosen)).peak_bytes
    # Without gradients a layer keeps nothing, so it does not matter which parameters are trained.
    model.requires_grad_(False)
    keep_stand_ins(model, layers, stand_ins(layers))
    meter = AllocationMeter([*model.parameters(), *model.buffers(), *masked_products(model)])
    return add_up(validation_events(model, batches, meter)).peak_bytes


def validation_events(
    model: PreTrainedModel, batches: Batches, meter: AllocationMeter, *, autocast: bool = False
) -> list[Event]:
    """The allocations of a validation batch, with logits at answer positions."""
    model.eval()  # type: ignore[no-untyped-call]
    input_ids = torch.zeros(batches.validation_records, batches.validation_tokens, dtype=torch.int64)
    mask = torch.ones(len(input_ids), 1, batches.validation_tokens, batches.validation_tokens, dtype=torch.bool)
    keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters
    scored = len(input_ids) * batches.scored_tokens
    positions = torch.zeros(scored, dtype=torch.int64)
    with meter, torch.no_grad():
        with torch.autocast(_CPU.type, dtype=torch.bfloat16, enabled=autocast):
            if scored > positions_at_once(model):
                with logits_only_at(model, positions, positions):
                    model(input_ids=input_ids, attention_mask=mask, use_cache=False)
                return meter.events
            logits = model(
                input_ids=input_ids,
                attention_mask=mask,
                use_cache=False,
                **({"logits_to_keep": batches.scored_tokens} if keeps_some else {}),
            ).logits
        if autocast:  # as accelerate does with model outputs
            logits = logits.float()
        nn.functional.log_softmax(logits[0].float(), dim=-1)
    return meter.events


def _step_bytes(trained: Sequence[torch.Tensor], plan: TrainingPlan) -> int:
    """Bytes of temporary tensors between the last backward pass of a step and the next forward pass."""
    if plan.adds_up:
        return PROMISED_BYTES * max(parameter.numel() for parameter in trained)
    how = {"on_gpu": plan.on_gpu, "decays": plan.decays}
    if plan.selects_entries:
        return selecting_bytes(trained, plan.optimizer, holds=plan.holds_entries, **how)
    return step_bytes(trained, plan.optimizer, **how)


def _quantized_bytes(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes that 4-bit weights save on linear projections, and bytes of the largest projection while in use."""
    head: object = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not module.weight.requires_grad
    ]
    saved = sum(_size(weight) - int(NF4_BYTES * weight.numel()) for weight in linear)
    return saved, max((2 * weight.numel() for weight in linear), default=0)  # in bf16


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
