"""How much memory a training takes on one device, from a model's configuration and the sizes of its batches.

Nothing is guessed by a formula for one architecture: forward and backward run on tensors without data, and every
storage they would allocate is counted; of decoder layers that are alike a few run for all. Not seen are scratch memory
inside kernels and what allocators lose by rounding and fragmentation. Where freed blocks go back to the system,
measured peaks of small models on a CPU lay within a tenth of the estimate; under glibc's default settings, which keep
them, at up to 1.3 times the estimate, and in one case with gradient checkpointing at 2.4 times (all without the process
itself).

Plain data parallelism (DDP) takes the same on every device, and buckets of the size of the gradients besides.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mftctl.answer_loss import answer_loss, logits_only_at
from mftctl.data.encoding import Encoded
from mftctl.devices import best_device
from mftctl.errors import ModelError
from mftctl.evaluation.head_chunks import positions_at_once
from mftctl.evaluation.inference import length_batches
from mftctl.masking.layers import masked_layers, masked_products
from mftctl.masking.targets import decoder_layers
from mftctl.models import peak_memory_bytes
from mftctl.planning.alike_layers import keep_stand_ins, repeat_layers, stand_ins, telling_stretches
from mftctl.planning.allocations import AllocationMeter, Event, add_up
from mftctl.planning.preparing import Optimizer, TrainingPlan
from mftctl.planning.skeletons import build_skeleton, without_data
from mftctl.training import CHECKPOINTING

_VALIDATION_TOKENS = 4096  # a batch of `sample_losses`
_MOMENTS: dict[Optimizer, int] = {"adamw": 2, "sgd": 0, "rmsprop": 1, "adagrad": 1, "adafactor": 1}
_8BIT_BLOCK = 256
_8BIT_ENTRIES = 4096  # tensors of fewer have moments of 32 bits
_4BIT_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # nf4: half a byte, a byte for 64 weights, and 4 bytes for 256 of those


@dataclass(frozen=True, slots=True)
class Batches:
    """The largest batches of a training and of its validation.

    Attributes:
        records: Records of a training batch.
        length_tokens: Of its longest record.
        padded: Whether its records differ in length, so that attention needs a mask tensor.
        validation_records: Records of a validation batch.
        validation_tokens: Of its longest record.
        scored_tokens: Positions of a validation batch whose logits are computed.
        answer_tokens: The most of a training batch: logits are computed for these only.
    """

    records: int
    length_tokens: int
    padded: bool
    validation_records: int
    validation_tokens: int
    scored_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device.

    Attributes:
        weights_bytes: All parameters and buffers of the model, adapters included.
        scores_bytes: Trainable scores of masks.
        masked_weights_bytes: The cached products of weights and masks.
        gradients_bytes: Of everything that is trained.
        optimizer_bytes: What the optimizer keeps between steps.
        activations_bytes: The most that forward, loss and backward hold besides.
        step_bytes: The most that the optimizer's step holds besides.
        validation_bytes: The most that a validation batch holds.
        process_bytes: Of Python and its libraries on a CPU, measured; 0 on a GPU, where the CUDA context comes on top.
        peak_bytes: The most at once. Gradients come while activations go, so that it is less than the sum.
    """

    weights_bytes: int
    scores_bytes: int
    masked_weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    step_bytes: int
    validation_bytes: int
    process_bytes: int
    peak_bytes: int


def largest_batches(train: Sequence[Encoded], validation: Sequence[Encoded], batch_size: int) -> Batches:
    """The batches that need most memory: the trainer puts records of similar length together.

    Args:
        train: Training records, at least one.
        validation: Validation records, at least one.
        batch_size: Records of a training batch.
    """
    lengths = sorted((len(record.input_ids) for record in train), reverse=True)[:batch_size]
    sizes = [len(record.input_ids) for record in validation]
    groups = length_batches(sizes, _VALIDATION_TOKENS)
    scored = {len(group) * _scored_tokens([validation[index] for index in group]) for group in groups}
    widest = max(groups, key=lambda group: len(group) * sizes[group[0]])
    return Batches(
        records=len(lengths),
        length_tokens=lengths[0],
        padded=lengths[0] != lengths[-1],
        validation_records=len(widest),
        validation_tokens=sizes[widest[0]],
        scored_tokens=min(sizes[widest[0]], -(-max(scored) // len(widest))),
        answer_tokens=sum(sorted((record.answer_tokens for record in train), reverse=True)[:batch_size]),
    )


def assumed_batches(batch_size: int, max_length_tokens: int) -> Batches:
    """The largest batches there can be, for data whose token counts are not known."""
    records = max(1, _VALIDATION_TOKENS // max_length_tokens)
    answer_tokens = batch_size * (max_length_tokens - 1)
    return Batches(batch_size, max_length_tokens, True, records, max_length_tokens, max_length_tokens, answer_tokens)


def estimate_memory(
    config: PreTrainedConfig, plan: TrainingPlan, batches: Batches, *, process_bytes: int
) -> MemoryEstimate:
    """The memory of a training on the best device of this machine.

    Args:
        config: Of the model; its weights are not needed.
        plan: What is trained, and how.
        batches: Sizes of the largest batches.
        process_bytes: Bytes that the process takes without any model; counted on a CPU only.

    Raises:
        ConfigError: The plan does not fit the model.
        MaskingError: The layers or projections are not in the model.
        ModelError: The architecture decides by values what it computes, so that it cannot run without data.
    """
    device = best_device()
    model = build_skeleton(config, plan.weights_dtype)
    layers = decoder_layers(model)[1]
    with torch.device("meta"):
        plan.prepare(model)
    with without_data(model, device):
        try:
            return _estimate(model, layers, plan, batches, process_bytes if device.type == "cpu" else 0)
        except (RuntimeError, NotImplementedError) as error:
            raise ModelError(
                "The memory of this architecture cannot be estimated without its weights.",
                key=config.model_type,
                actual=str(error).splitlines()[0],
            ) from error


def resident_bytes() -> int:
    """What this process holds now; where the system does not tell, the most it has held."""
    path = Path("/proc/self/statm")
    if path.is_file():
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory_bytes()


def _estimate(
    model: PreTrainedModel, layers: nn.ModuleList, plan: TrainingPlan, batches: Batches, process: int
) -> MemoryEstimate:
    masks = [module for _, module in masked_layers(model)]
    scores = sum(_size(module.scores) for module in masks)
    quantized = _quantized(model) if plan.quantized else []
    saved = sum(_size(item) - round(_4BIT_BYTES * item.numel()) for item in quantized)
    dequantized = max((2 * item.numel() for item in quantized), default=0)  # in bf16, of one layer at a time
    weights = sum(map(_size, {*model.parameters(), *model.buffers()})) - scores - saved
    masked = sum(map(_size, masked_products(model)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = sum(map(_size, trained))
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    optimizer = sum(_optimizer_bytes(item, plan.optimizer, embeddings) for item in trained)
    step = _step_bytes(trained, plan) if trained else 0
    chosen = stand_ins(layers)
    kept = keep_stand_ins(model, layers, chosen)
    events = _training_events(model, kept, plan, batches) if trained else []
    training = add_up(repeat_layers(events, chosen))
    # Without gradients a layer leaves nothing behind, and what is trained makes no difference.
    model.requires_grad_(False)
    keep_stand_ins(model, layers, stand_ins(layers))
    validation = _measure_validation(model, batches)
    standing = process + weights + scores + optimizer + dequantized
    peak = standing + max(training.peak_bytes, masked + gradients + step, masked + validation)
    activations = max(training.peak_other_bytes - masked, 0) + dequantized
    return MemoryEstimate(weights, scores, masked, gradients, optimizer, activations, step, validation, process, peak)


def _training_events(
    model: PreTrainedModel, layers: Mapping[int, nn.Module], plan: TrainingPlan, batches: Batches
) -> list[Event]:
    """What the forward and backward passes of an optimizer step allocate and free."""
    model.train()
    if plan.gradient_checkpointing:
        getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": False})
    shape = (batches.records, batches.length_tokens)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    positions, tokens = (torch.zeros(batches.answer_tokens, dtype=torch.int64) for _ in range(2))
    # Trainers give (records, tokens), of which the model makes this; a model takes it as it is.
    mask = torch.ones(shape[0], 1, shape[1], shape[1], dtype=torch.bool) if batches.padded else None
    meter = AllocationMeter([*model.parameters(), *model.buffers(), input_ids, positions, tokens])
    with meter, telling_stretches(model, layers, meter):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(meter.mark_gradient)  # type: ignore[no-untyped-call]
        for _ in range(2 if plan.accumulates else 1):
            loss = _loss(model, input_ids, mask, positions, tokens, autocast=plan.autocast)
            loss.backward()  # type: ignore[no-untyped-call]
    return meter.events


def _loss(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor,
    tokens: torch.Tensor,
    *,
    autocast: bool,
) -> torch.Tensor:
    """The loss as the trainer computes it: accelerate turns the outputs of autocast into fp32."""
    with (
        logits_only_at(model, positions, tokens),
        torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=autocast),
    ):
        outputs = model(input_ids=input_ids, attention_mask=mask, use_cache=False)
    if autocast:
        outputs.logits = outputs.logits.float()
    return answer_loss(outputs, positions, tokens, torch.ones((), dtype=torch.int64))


def _measure_validation(model: PreTrainedModel, batches: Batches) -> int:
    """The most that a validation batch allocates, with logits where there are answers."""
    model.eval()  # type: ignore[no-untyped-call]
    input_ids = torch.zeros(batches.validation_records, batches.validation_tokens, dtype=torch.int64)
    mask = torch.ones(len(input_ids), 1, batches.validation_tokens, batches.validation_tokens, dtype=torch.bool)
    keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters
    scored = len(input_ids) * batches.scored_tokens
    in_chunks = scored > positions_at_once(model)
    positions = torch.zeros(scored, dtype=torch.int64)
    existing = [*model.parameters(), *model.buffers(), input_ids, positions, *masked_products(model)]
    with AllocationMeter(existing) as meter, torch.no_grad():
        if in_chunks:
            with logits_only_at(model, positions, positions):
                model(input_ids=input_ids, attention_mask=mask, use_cache=False)
            return add_up(meter.events).peak_bytes
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            use_cache=False,
            **({"logits_to_keep": batches.scored_tokens} if keeps_some else {}),
        ).logits
        nn.functional.log_softmax(logits[0].float(), dim=-1)
    return add_up(meter.events).peak_bytes


def _step_bytes(trained: Sequence[torch.Tensor], plan: TrainingPlan) -> int:
    """Temporary tensors of an optimizer step: of one parameter at a time on a CPU, of all at once on a GPU."""
    sizes = [_size(parameter) for parameter in trained]
    temporary = 2 * max(sizes) if trained[0].device.type == "cpu" else sum(sizes)
    if plan.in_pieces:
        temporary = 0
    if not plan.selects_entries:
        return temporary
    # A bool for each entry, and copies of one parameter at a time: ranked values, the weight and its two moments.
    return temporary + sum(parameter.numel() for parameter in trained) + 5 * max(sizes)


def _quantized(model: PreTrainedModel) -> list[torch.Tensor]:
    """The weights that are held in 4 bits: of all linear layers but the output head and adapters."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    return [module.weight for module in linear if not module.weight.requires_grad]


def _optimizer_bytes(parameter: torch.Tensor, optimizer: Optimizer, embeddings: Sequence[torch.Tensor]) -> int:
    """What an optimizer keeps for a parameter. In 8 bits: two bytes an entry and two scales a block."""
    if optimizer not in ("adamw_8bit", "paged_adamw_8bit"):
        return _optimizer_numbers(parameter, optimizer) * parameter.element_size()
    entries = parameter.numel()
    if entries < _8BIT_ENTRIES or any(parameter is embedding for embedding in embeddings):
        return 8 * entries
    return 2 * entries + 8 * -(-entries // _8BIT_BLOCK)


def _optimizer_numbers(parameter: torch.Tensor, optimizer: Optimizer) -> int:
    """The numbers, of the parameter's dtype, that an optimizer keeps for it."""
    if optimizer == "adafactor" and parameter.dim() > 1:
        return parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2]
    return _MOMENTS[optimizer] * parameter.numel()


def _scored_tokens(records: Sequence[Encoded]) -> int:
    """Positions at which some record of a batch has an answer token."""
    return len({index for record in records for index, label in enumerate(record.labels[1:]) if label >= 0})


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
