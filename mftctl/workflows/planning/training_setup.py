"""Derives from a recipe's sections the parts of the training set-up that affect memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.training_options import TrainingOptions
from mftctl.masking.device_selection import selection_workspace_bytes
from mftctl.masking.hub_masks import local_mask
from mftctl.masking.layers import attach_masks, keep_no_products, masked_layers
from mftctl.masking.rule import MaskRule, Rule
from mftctl.masking.selection import Cut, rank
from mftctl.masking.soft_mask import SoftRule
from mftctl.masking.targets import MaskTarget, find_targets
from mftctl.training.schedule import accumulates
from mftctl.training.updates.hft import freeze_half
from mftctl.workflows.planning.entry_costs import Optimizer
from mftctl.workflows.planning.planned_device import PlannedDevice, this_device


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """The settings that determine the memory of training, apart from the model and its batches.

    Attributes:
        prepare: Attaches adapters or masks and makes the method's parameters trainable.
        trained: The inputs of `prepare`; plans are equal if these and the settings below are equal.
        weights_dtype: Dtype of the weights in memory.
        autocast: Whether forward passes compute in bf16 on fp32 weights.
        gradient_checkpointing: Whether activations are recomputed instead of kept.
        accumulates: Whether gradients are kept across batches.
        optimizer: The optimizer.
        selects_entries: Whether a step selects the entries that it updates.
        holds_entries: Whether a step leaves all other entries exactly unchanged.
        on_gpu: Whether training runs on a GPU.
        decays: Whether weight decay is used.
        quantized: Whether the base model's linear projections are in 4 bits.
        adds_up: Whether gradients are summed in fp32 without training, as in `probe --fast`.
        averages: Number of running averages on the device.
        reference_dtype: Dtype of the frozen model before fine-tuning that is held beside the trained one; None without.
        retains: Whether a step also runs on retained data.
    """

    prepare: Callable[[PreTrainedModel], None] = field(compare=False)
    trained: tuple[Hashable, ...]
    weights_dtype: torch.dtype
    autocast: bool
    gradient_checkpointing: bool
    accumulates: bool
    optimizer: Optimizer = "adamw"
    selects_entries: bool = False
    holds_entries: bool = False
    on_gpu: bool = False
    decays: bool = False
    quantized: bool = False
    adds_up: bool = False
    averages: int = 0
    reference_dtype: torch.dtype | None = None
    retains: bool = False


def plan_fine_tuning(
    options: FftOptions, seed: int, device: PlannedDevice | None = None, stored: torch.dtype | None = None
) -> TrainingPlan:
    """Returns the plan of the `fft` command.

    Args:
        options: The recipe's `fft` section.
        seed: Seed, which determines what HFT freezes.
        device: The device; this machine's by default.
        stored: Dtype of the checkpoint, if known.
    """
    device = device or this_device()

    def prepare(model: PreTrainedModel) -> None:
        if options.method == "hft":
            freeze_half(model, seed)
        elif options.trains_adapter:
            from mftctl.training.updates.adapters import plan_adapter

            plan_adapter(model, options, None if options.support is None else local_mask(options.support))

    bf16, holds_bf16 = device.uses_bf16(options.precision), stored == torch.bfloat16 or not options.trains_positions
    # bf16 is used for all weights with low_memory, and for an adapter's base if it computes in bf16, unless quantised.
    narrow = options.low_memory or (options.trains_adapter and bf16 and options.quantize is None and holds_bf16)
    selects = options.method in ("gmt", "random")
    return TrainingPlan(
        prepare,
        (
            *(options.method, options.lora_rank, options.lora_dropout, options.lora_experts),
            *(options.ratio, options.support, seed if options.method == "hft" else None),
        ),
        torch.bfloat16 if narrow else torch.float32,
        bf16 and not options.low_memory,
        *_repeats(options),
        optimizer="stochastic_adamw" if options.low_memory and options.optimizer == "adamw" else options.optimizer,
        selects_entries=selects,
        holds_entries=selects and options.unselected == "unchanged",
        on_gpu=device.is_gpu,
        decays=options.weight_decay > 0,
        quantized=options.quantize is not None,
        averages=_averages(options, device),
        reference_dtype=None if options.trains_adapter else _reference_dtype(options, device),
        retains=options.retain_weight > 0,
    )


def plan_mask_training(
    options: MaskTrainOptions, layers: Sequence[int], device: PlannedDevice | None = None
) -> TrainingPlan:
    """Returns the plan of the `mask-train` command for the methods that run the model.

    Args:
        options: The recipe's `mask_train` section.
        layers: Decoder layers to mask.
        device: The device; this machine's by default.
    """
    device = device or this_device()
    on_gpu = device.is_gpu

    def prepare(model: PreTrainedModel) -> None:
        dtype = torch.bfloat16 if options.low_memory else torch.float32
        targets = find_targets(model, layers, options.target, options.masked_projections)
        attach_without_data(model, targets, dtype, _rule(options), on_gpu=on_gpu, has_base=options.kind == "delta")
        if options.low_memory:
            keep_no_products(model)
        if options.method != "learned":
            model.requires_grad_(False)

    return TrainingPlan(
        prepare,
        (
            options.method == "learned",
            options.kind,
            tuple(layers),
            options.target,
            tuple(options.masked_projections or ()),
            _rule(options),
        ),
        torch.bfloat16 if device.uses_bf16(options.precision) else torch.float32,
        False,
        *_repeats(options),
        optimizer="stochastic_adamw" if options.low_memory else "adamw",
        on_gpu=on_gpu,
        decays=options.weight_decay > 0,
        averages=_averages(options, device),
        reference_dtype=_reference_dtype(options, device),
        retains=options.retain_weight > 0,
    )


def plan_fast_probe(
    options: MaskTrainOptions, layers: Sequence[int], device: PlannedDevice | None = None
) -> TrainingPlan:
    """Returns the plan of `probe --fast`.

    Args:
        options: The recipe's `mask_train` section.
        layers: All decoder layers whose gradients are computed.
        device: The device; this machine's by default.
    """
    device = device or this_device()

    def prepare(model: PreTrainedModel) -> None:
        targets = find_targets(model, layers, options.target, options.masked_projections)
        model.requires_grad_(False)
        for target in targets:
            target.module.get_parameter(target.parameter).requires_grad_(True)

    return TrainingPlan(
        prepare,
        ("fast", tuple(layers), options.target, tuple(options.masked_projections or ())),
        torch.bfloat16 if device.uses_bf16(options.precision) else torch.float32,
        False,
        options.gradient_checkpointing,
        False,
        on_gpu=device.is_gpu,
        adds_up=True,
    )


def attach_without_data(
    model: PreTrainedModel,
    targets: Sequence[MaskTarget],
    dtype: torch.dtype = torch.float32,
    rule: Rule | None = None,
    *,
    on_gpu: bool = False,
    has_base: bool = False,
) -> None:
    """Attaches masks to a model without data, where scores cannot be compared."""
    rule = rule or MaskRule()
    scores = {target.name: torch.empty(target.weight.shape, dtype=dtype) for target in targets}
    base = {target.name: torch.empty_like(target.weight) for target in targets} if has_base else None
    attach_masks(model, targets, scores, rule, base)
    for _, module in masked_layers(model):
        if isinstance(rule, SoftRule):
            module.rule = _SoftWithoutData(rule.limit)
        else:
            kind = _OnGpu if on_gpu else _OnCpu
            module.rule = kind(rule.ratio, rule.threshold, rule.ranking, rule.pattern)


class _OnCpu(MaskRule):
    """Makes the allocations of mask selection without comparing any scores."""

    __slots__ = ()

    def cut(self, scores: torch.Tensor) -> Cut | None:
        if self.ratio is not None:
            self._look(rank(scores, self.ranking))
        return None

    def keep(self, scores: torch.Tensor, cut: Cut | None = None) -> torch.Tensor:
        ranked = scores if self.threshold is not None else rank(scores, self.ranking)
        if self.pattern is not None:
            torch.empty_like(ranked, dtype=torch.bool)
            torch.empty(2 * ranked.numel() // self.pattern.block, dtype=torch.int64)
        if self.ratio is not None and cut is None:
            self._look(ranked)
        return torch.empty_like(ranked, dtype=torch.bool)

    def _look(self, ranked: torch.Tensor) -> None:
        """Makes the temporary allocations of the search for the cut; numpy copies to fp32."""
        torch.empty_like(ranked, dtype=torch.float32)


class _OnGpu(_OnCpu):
    """The same allocations on a GPU."""

    __slots__ = ()

    def _look(self, ranked: torch.Tensor) -> None:
        entries = ranked.numel()
        torch.empty(selection_workspace_bytes(entries, entries, ranked.element_size()), dtype=torch.uint8)


class _SoftWithoutData(SoftRule):
    """Makes the allocations of soft masks without looking at any scores."""

    __slots__ = ()

    def codes(self, scores: torch.Tensor) -> torch.Tensor:
        torch.empty_like(scores, dtype=torch.float32)
        return torch.empty_like(scores, dtype=torch.uint8)


def _rule(options: MaskTrainOptions) -> Rule:
    """The mask rule of all targets, as far as memory depends on it."""
    if options.mask == "soft":
        return SoftRule(options.max_multiplier)
    if options.threshold is not None:
        return MaskRule(None, options.threshold, options.ranking)
    if options.blocks is not None:
        return MaskRule(None, None, options.ranking, options.blocks)
    return MaskRule(ranking=options.ranking)


def _reference_dtype(options: TrainingOptions, device: PlannedDevice) -> torch.dtype | None:
    if options.retain_weight == 0:
        return None
    return torch.bfloat16 if device.uses_bf16(options.precision) else torch.float32


def _averages(options: TrainingOptions, device: PlannedDevice) -> int:
    if options.average == "none" or (options.average_device == "cpu" and device.is_gpu):
        return 0
    return len(options.average_horizons)


def _repeats(options: TrainingOptions) -> tuple[bool, bool]:
    return options.gradient_checkpointing, accumulates(options)
