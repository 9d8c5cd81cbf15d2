"""The memory of a command for any set of options; each estimate is computed once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from mftctl.data.encoding import Encoded
from mftctl.errors import MftError
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.recipe import Recipe
from mftctl.masking.checkpoints.meta_models import build_skeleton
from mftctl.masking.target_groups import largest_kind
from mftctl.masking.targets import Target, find_targets, layer_groups, masked_layer_indices, parse_layers
from mftctl.workflows.planning.batches import Batches, batches_of
from mftctl.workflows.planning.evaluation_memory import (
    BENCHMARK_ANSWER_TOKENS,
    BENCHMARK_PROMPT_TOKENS,
    Generation,
    estimate_evaluation,
)
from mftctl.workflows.planning.memory import MemoryEstimate, estimate_memory, least_memory
from mftctl.workflows.planning.planned_device import PlannedDevice
from mftctl.workflows.planning.room import SPARE_SHARE, Smaller, smallest_options
from mftctl.workflows.planning.training_setup import TrainingPlan, plan_fast_probe, plan_fine_tuning, plan_mask_training

_MEASURING = ("interpolate", "eval")
"""Commands that run the model without training anything."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The work of an evaluation on data files.

    Attributes:
        batches: The batches whose losses are measured, as validation batches; None if there are none.
        generation: The longest problem; None if no record has a prompt.
    """

    batches: Batches | None = None
    generation: Generation | None = None


@dataclass(slots=True)
class CommandMemory:
    """The memory that a command needs on a device.

    Attributes:
        command: `fft`, `probe`, `mask-train`, `interpolate` or `eval`.
        config: Model configuration.
        layer_count: Number of decoder layers.
        device: Device that the command runs on.
        train: Training records; empty if their tokens are unknown.
        validation: Validation records; empty if their tokens are unknown.
        seed: Seed, which determines what HFT freezes.
        layers: Layers that a probe may choose; None if the recipe names the layers.
        asked: Work of an evaluation.
        process_bytes: Memory of the process without a model; counted on a CPU only.
        known: Estimates made earlier, possibly shared by several instances.
    """

    command: str
    config: PreTrainedConfig
    layer_count: int
    device: PlannedDevice
    train: Sequence[Encoded] = ()
    validation: Sequence[Encoded] = ()
    seed: int = 0
    layers: Sequence[int] | None = None
    asked: Asked = field(default_factory=Asked)
    process_bytes: int = 0
    known: dict[Hashable, MemoryEstimate] = field(default_factory=dict)

    def estimate(self, recipe: Recipe) -> MemoryEstimate:
        """Estimates the memory needed with a recipe's options.

        Raises:
            MftError: The options do not fit the model, or its architecture cannot run without data.
        """
        if self.command in _MEASURING:
            return self._evaluation(recipe)
        batches = self.batches(recipe)
        found = [self._of_plan(plan, batches) for plan in self.plans(recipe)]
        return max(found, key=lambda estimate: estimate.peak_bytes)

    def plans(self, recipe: Recipe) -> list[TrainingPlan]:
        """The plan of each training of the command; they follow one another, so the largest decides."""
        if self.command == "fft":
            return [plan_fine_tuning(recipe.fft, self.seed, self.device, getattr(self.config, "dtype", None))]
        layers = self.masked_layers(recipe)
        if self.command == "probe":
            return [self._plan_of_probe(recipe, layers)]
        options = recipe.mask_train
        estimated = [] if options.shared_budget is None else [plan_fast_probe(options, layers, self.device)]
        return [*estimated, plan_mask_training(options, layers, self.device)]

    def _of_plan(self, plan: TrainingPlan, batches: Batches) -> MemoryEstimate:
        return self._once(
            (plan, batches),
            lambda: estimate_memory(self.config, plan, batches, process_bytes=self.process_bytes),
        )

    def _plan_of_probe(self, recipe: Recipe, layers: Sequence[int]) -> TrainingPlan:
        """The plan of a probe: the gradients of everything that it compares, or training its largest group."""
        options, unit = recipe.mask_train, recipe.probe.unit
        if recipe.probe.fast:
            parts: dict[str, Target] = {"head": "attn", "neuron": "mlp"}
            target = parts.get(unit, options.target)
            return plan_fast_probe(options.model_copy(update={"target": target}), layers, self.device)
        if unit == "projection":
            targets = find_targets(
                build_skeleton(self.config, torch.float32), layers, options.target, options.masked_projections
            )
            options = options.of_projection(largest_kind(targets)[0].projection)
        return plan_mask_training(options, layers, self.device)

    def batches(self, recipe: Recipe) -> Batches:
        """The largest batches of the training or evaluation."""
        return batches_of(self._options(recipe), self.train, self.validation)

    def masked_layers(self, recipe: Recipe) -> list[int]:
        """The largest set of layers masked at once; for `probe --fast`, all layers with gradients."""
        if self.command == "probe":
            wanted = parse_layers(recipe.probe.layers or "all", self.layer_count)
            if recipe.probe.unit != "layer":
                return wanted
            groups = layer_groups(self.layer_count, recipe.probe.groups, wanted)
            return sorted({layer for group in groups for layer in group}) if recipe.probe.fast else max(groups, key=len)
        if self.layers is not None:
            return list(self.layers)
        options = recipe.mask_train
        return masked_layer_indices(options.layers or "all", self.layer_count, options.target)

    def fits(self, recipe: Recipe, free_bytes: int) -> bool:
        """True if the command fits, with room to spare."""
        most = (1 - SPARE_SHARE) * free_bytes
        if self.command not in _MEASURING and any(
            least_memory(self.config, plan) > most for plan in self.plans(recipe)
        ):
            return False
        return self.estimate(recipe).peak_bytes <= most

    def smaller(self, recipe: Recipe, free_bytes: int) -> Smaller | None:
        """The smallest set of option changes that makes the command fit; None if there is none.

        Args:
            recipe: The current recipe.
            free_bytes: Available memory.
        """

        def fits(changed: Recipe) -> bool:
            try:
                return self.fits(changed, free_bytes)
            except MftError:  # this model does not support these options
                return False

        has_say = self.command == "mask-train" and self.layers is None
        layers = self.masked_layers(recipe) if has_say else ()
        return smallest_options(self.command, recipe, fits=fits, estimate=self.estimate, layers=layers)

    def generation(self, recipe: Recipe) -> Generation | None:
        """The longest problem of an evaluation; None for a command that only measures losses."""
        if self.command != "eval":
            return None
        options = recipe.eval
        found = [self.asked.generation] if self.asked.generation is not None and options.generate else []
        if options.tasks:
            together = options.batch_size if isinstance(options.batch_size, int) else 1
            answer = options.max_new_tokens or BENCHMARK_ANSWER_TOKENS
            found.append(Generation(BENCHMARK_PROMPT_TOKENS, answer, together))
        return max(found, key=lambda one: one.records * (one.prompt_tokens + one.new_tokens), default=None)

    def _evaluation(self, recipe: Recipe) -> MemoryEstimate:
        generation, batches = self.generation(recipe), self.asked.batches
        return self._once(
            ("eval", generation, batches, self.device.is_gpu),
            lambda: estimate_evaluation(
                self.config, self.device, batches, generation, process_bytes=self.process_bytes
            ),
        )

    def _once(self, key: Hashable, make: Callable[[], MemoryEstimate]) -> MemoryEstimate:
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def _options(self, recipe: Recipe) -> FftOptions | MaskTrainOptions:
        return recipe.fft if self.command == "fft" else recipe.mask_train
