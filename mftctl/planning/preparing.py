"""How a recipe's sections train a model, as far as memory depends on it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedModel

from mftctl.config import FftOptions, MaskTrainOptions, TrainingOptions
from mftctl.devices import best_device
from mftctl.masking.layers import Indicator, attach_masks, keep_no_products, masked_layers
from mftctl.masking.selection import Cut
from mftctl.masking.targets import MaskTarget, find_targets
from mftctl.steps import accumulates
from mftctl.training import lora_base_dtype, uses_bf16
from mftctl.tuning.hft import freeze_half

Optimizer = Literal["adamw", "sgd", "rmsprop", "adagrad", "adafactor", "adamw_8bit", "paged_adamw_8bit"]


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """What decides the memory of a training besides the model and its batches.

    Attributes:
        prepare: Makes the parameters trainable that the method trains, with adapters or masks in place.
        trained: What that depends on; plans are equal where it and the settings below are.
        weights_dtype: Of the weights in memory.
        autocast: Whether forward passes compute in bf16 on fp32 weights.
        gradient_checkpointing: Whether activations are computed twice instead of kept.
        accumulates: Whether gradients are kept while further batches are computed.
        optimizer: What keeps moments.
        selects_entries: Whether a step chooses the entries that it updates.
        in_pieces: Whether a step makes no temporary tensors of the parameters' sizes.
        quantized: Whether frozen weights of linear layers stand for such of 4 bits.
    """

    prepare: Callable[[PreTrainedModel], None] = field(compare=False)
    trained: tuple[Hashable, ...]
    weights_dtype: torch.dtype
    autocast: bool
    gradient_checkpointing: bool
    accumulates: bool
    optimizer: Optimizer = "adamw"
    selects_entries: bool = False
    in_pieces: bool = False
    quantized: bool = False


def plan_fine_tuning(options: FftOptions, seed: int) -> TrainingPlan:
    """The plan of the `fft` command.

    Args:
        options: The recipe's `fft` section.
        seed: Decides what HFT freezes.
    """

    def prepare(model: PreTrainedModel) -> None:
        if options.method == "hft":
            freeze_half(model, seed)
        elif options.method == "lora":
            from mftctl.tuning.lora import add_adapter

            add_adapter(model, options, base=model.config.model_type, seed=seed)

    fused = best_device().type == "cuda"
    return TrainingPlan(
        prepare,
        (options.method, options.lora_rank, seed if options.method == "hft" else None),
        _weights_dtype(options),
        uses_bf16(options.precision) and not options.low_memory,
        *_repeats(options),
        options.optimizer,
        options.method in ("gmt", "random"),
        options.low_memory or options.has_8bit_moments or (options.optimizer == "adamw" and fused),
        options.quantize is not None,
    )


def _weights_dtype(options: FftOptions) -> torch.dtype:
    if options.method == "lora" and options.quantize is None:
        return lora_base_dtype(options)
    return torch.bfloat16 if options.low_memory else torch.float32


def plan_mask_training(options: MaskTrainOptions, layers: Sequence[int]) -> TrainingPlan:
    """The plan of the `mask-train` command for the methods that measure on the model.

    Args:
        options: The recipe's `mask_train` section.
        layers: Decoder layers that carry the mask.
    """

    def prepare(model: PreTrainedModel) -> None:
        dtype = torch.bfloat16 if options.low_memory else torch.float32
        attach_without_data(model, find_targets(model, layers, options.target, options.projections), dtype)
        if options.low_memory:
            keep_no_products(model)
        if options.method != "learned":
            model.requires_grad_(False)

    dtype = torch.bfloat16 if uses_bf16(options.precision) else torch.float32
    in_pieces = options.low_memory or best_device().type == "cuda"  # there torch's AdamW is fused
    trained = (options.method == "learned", tuple(layers), options.target, tuple(options.projections or ()))
    return TrainingPlan(prepare, trained, dtype, False, *_repeats(options), in_pieces=in_pieces)


def attach_without_data(
    model: PreTrainedModel, targets: Sequence[MaskTarget], dtype: torch.dtype = torch.float32
) -> None:
    """Puts masks on a model without data, whose scores cannot be compared."""
    scores = {target.name: torch.empty(target.weight.shape, dtype=dtype) for target in targets}
    attach_masks(model, targets, scores, Indicator())
    for _, module in masked_layers(model):
        module.indicator = _ShapeIndicator()


class _ShapeIndicator(Indicator):
    """Allocates what a selection by rank allocates, and compares nothing."""

    def cut(self, scores: torch.Tensor) -> None:
        return None

    def keep(self, scores: torch.Tensor, cut: Cut | None = None) -> torch.Tensor:
        ranked = scores.abs()
        partitioned = ranked.clone()
        return torch.empty_like(partitioned, dtype=torch.bool)


def _repeats(options: TrainingOptions) -> tuple[bool, bool]:
    return options.gradient_checkpointing, accumulates(options)
