"""Memory needed by an evaluation: a batch of losses, and the answer to one problem with its key-value cache.

Batches of problems are sized by the free memory, so only one problem must fit.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from mftctl.masking.checkpoints.meta_models import build_skeleton, without_data
from mftctl.masking.targets import decoder_layers
from mftctl.workflows.planning.allocation_meter import AllocationMeter, add_up
from mftctl.workflows.planning.batches import Batches
from mftctl.workflows.planning.layer_sampling import keep_stand_ins, repeat_layers, stand_ins, telling_stretches
from mftctl.workflows.planning.memory import MemoryEstimate, known_to_run, validation_events
from mftctl.workflows.planning.planned_device import PlannedDevice

BENCHMARK_PROMPT_TOKENS = 2048
BENCHMARK_ANSWER_TOKENS = 1024
"""Assumed prompt and answer lengths of benchmarks, whose prompts are unknown until they are built."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Generation:
    """The longest problem to answer.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        new_tokens: Maximum tokens of the answer.
        records: Minimum number of problems answered together.
    """

    prompt_tokens: int
    new_tokens: int
    records: int = 1


def evaluation_dtype(config: PreTrainedConfig, device: PlannedDevice) -> torch.dtype:
    """The dtype of the weights in an evaluation; on a GPU, the dtype stated by the checkpoint.

    Args:
        config: Model configuration.
        device: Device that the evaluation runs on.
    """
    stored = getattr(config, "dtype", None)
    if not device.is_gpu or not isinstance(stored, torch.dtype):
        return torch.float32
    return torch.float32 if stored == torch.bfloat16 and not device.has_bf16 else stored


def estimate_evaluation(
    config: PreTrainedConfig,
    device: PlannedDevice,
    batches: Batches | None,
    generation: Generation | None,
    *,
    process_bytes: int,
) -> MemoryEstimate:
    """Estimates the memory of an evaluation.

    Args:
        config: Model configuration; the weights are not needed.
        device: Device that the evaluation runs on.
        batches: The batches whose losses are measured, as validation batches; None if there are none.
        generation: The longest problem to answer; None if there is none.
        process_bytes: Memory of the process without a model; counted on a CPU only.

    Raises:
        ModelError: The architecture's computation depends on tensor values, so it cannot run without data.
    """
    model = build_skeleton(config, evaluation_dtype(config, device)).requires_grad_(False)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in {*model.parameters(), *model.buffers()})
    layers = decoder_layers(model)[1]
    chosen = stand_ins(layers)
    kept = keep_stand_ins(model, layers, chosen)
    _number(layers)
    losses = answers = 0
    with without_data(model, _CPU), known_to_run(config):
        existing = [*model.parameters(), *model.buffers()]
        if batches is not None:
            losses = add_up(validation_events(model, batches, AllocationMeter(existing))).peak_bytes
        if generation is not None:
            model.eval()  # type: ignore[no-untyped-call]
            answers = max(_prefill(model, kept, chosen, generation), _decoding(model, kept, chosen, generation))
    process = 0 if device.is_gpu else process_bytes
    return MemoryEstimate(
        weights_bytes=weights,
        validation_bytes=losses,
        process_bytes=process,
        peak_bytes=process + weights + max(losses, answers),
        generation_bytes=answers,
    )


def _prefill(model: PreTrainedModel, kept: Any, chosen: list[int], generation: Generation) -> int:
    """Peak memory of the pass over the prompt; the cache is kept."""
    meter = AllocationMeter([*model.parameters(), *model.buffers()])
    with torch.no_grad(), telling_stretches(model, kept, meter):
        outputs = _pass(model, generation.records, generation.prompt_tokens, None, meter)
        events = list(meter.events)
    del outputs
    return add_up(repeat_layers(events, chosen)).peak_bytes


def _decoding(model: PreTrainedModel, kept: Any, chosen: list[int], generation: Generation) -> int:
    """Peak memory at the last token of the answer: the whole cache, one layer's cache again, and one step."""
    before = generation.prompt_tokens + generation.new_tokens - 1
    with torch.no_grad():
        cache = _pass(model, generation.records, before, None).past_key_values
        meter = AllocationMeter([*model.parameters(), *model.buffers()])
        with telling_stretches(model, kept, meter):
            outputs = _pass(model, generation.records, 1, cache, meter)
            events = list(meter.events)
    tally = add_up(repeat_layers(events, chosen))
    del outputs, cache
    return tally.peak_bytes + tally.live_bytes // len(chosen)


def _pass(model: PreTrainedModel, records: int, tokens: int, cache: Any, meter: AllocationMeter | None = None) -> Any:
    seen = 0 if cache is None else cache.get_seq_length()
    some = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with meter or torch.no_grad():
        return model(
            input_ids=torch.zeros(records, tokens, dtype=torch.int64),
            attention_mask=torch.ones(records, 1, tokens, seen + tokens, dtype=torch.bool),
            past_key_values=cache,
            use_cache=True,
            **some,
        )


def _number(layers: torch.nn.ModuleList) -> None:
    """Renumbers stand-ins by their new position, which the cache uses as the key for their keys and values."""
    for place, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place  # type: ignore[assignment]
