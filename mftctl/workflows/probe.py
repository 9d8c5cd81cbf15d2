"""The `probe` workflow: finds the decoder layers, or the kind of projection, that gain most from a mask."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mftctl.data.batching import any_images
from mftctl.data.encoding import EncodedRecords
from mftctl.errors import Interrupted
from mftctl.evaluation.losses import mean_loss
from mftctl.evaluation.score_choice import LOSS
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.probe_results import FastProbe, Group, ProbeResult, TrainedGroup, TrainedProbe, group_text
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.run_contents import read_part
from mftctl.experiments.run_folder import Run
from mftctl.experiments.training_folder import TrainingFolder
from mftctl.files.atomic import write_text
from mftctl.masking.checkpoints.earlier_weights import pair_targets, read_base
from mftctl.masking.checkpoints.locate import resolve_checkpoint
from mftctl.masking.target_groups import TargetGroup, groups_by_projection
from mftctl.masking.targets import MaskTarget, decoder_layers, find_targets, format_layers, layer_groups, parse_layers
from mftctl.progress import Listener
from mftctl.runtime.peak_memory import peak_memory_bytes
from mftctl.runtime.process_group import forget_plan, shares_weights, wait_for_all
from mftctl.runtime.processes import is_first
from mftctl.runtime.stop_request import take_late_stop
from mftctl.training.held_out import masked, split_validation_records, validation_losses
from mftctl.training.inputs import TrainingInputs
from mftctl.training.learn_mask import find_mask
from mftctl.training.mask_search import (
    FoundMask,
    MaskSearch,
    MaskTrainingInputs,
    load_frozen_model,
    prepare_mask_training,
)
from mftctl.training.objectives import objective_of
from mftctl.training.prefix_cache import HiddenStates, hidden_states, prefix_reuse, reusing_prefix
from mftctl.training.reference import Reference, require_whole_reference, turn_off_dropout, with_references
from mftctl.training.step_scores import StepScores
from mftctl.training.validation_scores import ValidationScorer
from mftctl.workflows.fast_probe import agreement_with_training, changes_of_groups, promised_changes
from mftctl.workflows.model_before import model_before_measured
from mftctl.workflows.planning.memory_check import RoomOnGpu, training_on_device
from mftctl.workflows.probe_kind import check_kind
from mftctl.workflows.structure_probe import structure_probe


def probe(recipe: Recipe, source: ModelSource, run: Run, listener: Listener, *, resume: bool = False) -> ProbeResult:
    """Probes layers or projections; returns every group's losses and score, best first, and the recommended group.

    A probe of heads or neurons returns a summary of their predicted changes.

    Args:
        recipe: Provides the `probe` and `mask_train` sections, the data and the seed.
        source: The fine-tuned model.
        run: Open run; receives one file per finished group, metrics, checkpoints and the result.
        listener: Receives progress updates.
        resume: Keep finished groups and continue with the one that was interrupted.

    Raises:
        ConfigError: The options are inconsistent, or the recipe names no data.
        DataError: A data file or record cannot be used.
        ModelError: The model cannot be loaded.
        MaskingError: The chosen layers or projections cannot be masked.
        TrainingError: The loss is no longer finite.
        DeviceMemoryError: The GPU runs out of memory.
        Interrupted: The user stopped the run; its state is saved.

    Source: MFT, section 3.2, local mask fine-tuning ablation (groups of 4, 10 % of the data). Each group keeps its mask
    with the lowest loss, whatever ranks the groups. Kinds of projections follow its masking ratio ablation, which
    proposes to tell them apart; heads and neurons are ours.
    """
    options = recipe.mask_train
    check_kind(recipe)
    with training_on_device("probe", recipe, options, run, listener) as room:
        if recipe.probe.unit in ("head", "neuron"):
            return structure_probe(recipe, source, run, listener, room)
        if recipe.probe.fast:
            return _estimate(recipe, source, run, listener, room)
        return _train_groups(recipe, source, run, listener, room, resume=resume)


def _train_groups(
    recipe: Recipe, source: ModelSource, run: Run, listener: Listener, room: RoomOnGpu, *, resume: bool
) -> TrainedProbe:
    """Trains a mask for each group and returns the result."""
    options = _options(recipe)
    if options.objective == "dpo":
        require_whole_reference()
    base = model_before_measured(options, source)
    base_folder = None if base is None else resolve_checkpoint(base)
    prepared = prepare_mask_training(recipe, source, run, listener, recipe.probe.data_fraction)
    inputs = prepared.inputs
    scorer = _scorer(recipe, recipe.probe.by, "probe.by", "The layers are", inputs, run, listener)
    of_steps = _scorer(recipe, options.best_by, "mask_train.best_by", "The best step is", inputs, run, listener)
    inputs = replace(inputs, validation=split_validation_records(inputs.validation, options)[0])
    room.require(inputs)
    probed = _ProbedModel(
        recipe, options, replace(prepared, inputs=inputs), listener, run, scorer, of_steps, base_folder
    )
    # From bottom to top, so that each group enters the model at the same layer as the one before it, or above.
    groups = sorted(_groups(recipe, probed.model), key=lambda group: min(group.layers))
    results = []
    take_late_stop()  # one from before this probe
    with hidden_states(options, run.folder) as states:
        for number, group in enumerate(groups, start=1):
            folder = run.folder / "groups" / group.name
            stored = folder / "outcome.json"
            done = " (already done)" if stored.exists() else ""
            listener.note(f"Group {number} of {len(groups)}: {group_text(group.name)}{done}")
            if not stored.exists():
                outcome = probed.outcome(group, run.training_in(folder), states, resume=resume)
                if is_first():
                    write_text(stored, json.dumps(outcome.document(), indent=2) + "\n")
            if is_first():  # including those of a finished group that a killed process left behind
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            wait_for_all()
            results.append(read_part(stored, TrainedGroup))
            if take_late_stop() and number < len(groups):
                raise Interrupted(
                    f"Stopped after group {number} of {len(groups)}.", path=run.folder, hint=run.resume_command
                )
        reuse = prefix_reuse(states)
    ranked = sorted(results, key=lambda item: (item.score_rank or 0.0, item.best_loss))
    return TrainedProbe(
        groups=ranked,
        recommended_layers=ranked[0].layers,
        recommended_projection=ranked[0].projection,
        by=recipe.probe.by,
        unmasked_loss=probed.unmasked_loss,
        unmasked_score=probed.unmasked,
        prefix_reuse=reuse,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _scorer(
    recipe: Recipe, by: str, key: str, chosen: str, inputs: TrainingInputs, run: Run, listener: Listener
) -> ValidationScorer | None:
    """Scores masks by a criterion on the deciding validation records; None for the loss."""
    if by == LOSS:
        return None
    records = EncodedRecords(
        split_validation_records(inputs.validation, recipe.mask_train)[0],
        split_validation_records(inputs.validation_examples, recipe.mask_train)[0],
    )
    return ValidationScorer(recipe, by, key, chosen, inputs, records, run.started, listener)


class _ProbedModel:
    """The model of a probe, which is trained with the mask of one group after another.

    Attributes:
        model: The model without a mask; only a shard of it after a group was trained under DeepSpeed or FSDP.
        unmasked_loss: Its loss on the deciding validation records.
        unmasked: Its score; None if groups are ranked by loss.
    """

    def __init__(
        self,
        recipe: Recipe,
        options: MaskTrainOptions,
        prepared: MaskTrainingInputs,
        listener: Listener,
        run: Run,
        scorer: ValidationScorer | None,
        of_steps: ValidationScorer | None,
        base: Path | None = None,
    ) -> None:
        self._options, self._inputs, self._listener = options, prepared.inputs, listener
        self._fft_learning_rate = prepared.fft_learning_rate
        self._seed = recipe.seed
        self._scorer, self._of_steps = scorer, of_steps
        self.model = load_frozen_model(self._inputs, options)
        self._is_whole = True
        layers = {layer for group in _groups(recipe, self.model) for layer in group.layers}
        targets = self._targets(TargetGroup(tuple(sorted(layers))))
        self._pairs = None if base is None else pair_targets(targets, self.model, base, self._inputs.checkpoint)
        if options.objective == "dpo":
            turn_off_dropout(self.model, listener)
            reference = Reference(self.model, self._inputs.checkpoint)
            self._inputs, _ = with_references(self._inputs, [self._inputs.validation], reference, listener)
        losses = validation_losses(self.model, self._inputs, listener, objective_of(options))
        self.unmasked_loss, self._unmasked_rewards = mean_loss(losses), objective_of(options).rewards(losses)
        self.unmasked = None if scorer is None else scorer.score_once(self.model, run.folder / "unmasked")
        self._samples_of_steps = run.folder / "scores" / "unmasked"
        self._unmasked_of_steps = None if of_steps is None else of_steps.score_once(self.model, self._samples_of_steps)

    def outcome(
        self, group: TargetGroup, folder: TrainingFolder, states: HiddenStates, *, resume: bool
    ) -> TrainedGroup:
        """Trains the mask of a group and returns its result.

        Args:
            group: Its projections.
            folder: Receives metrics, checkpoints and samples.
            states: Cached hidden states of the layers below.
            resume: Resume from the latest checkpoint of the group.
        """
        self._make_whole()
        self._is_whole = not shares_weights()
        forget_plan()
        targets = self._targets(group)
        search = MaskSearch(
            self.model,
            targets,
            self._options,
            self._inputs,
            folder,
            self._listener,
            unmasked_loss=self.unmasked_loss,
            fft_learning_rate=self._fft_learning_rate,
            seed=self._seed,
            resume=resume,
            scores=self._step_scores(folder.folder),
            unmasked_score=self._unmasked_of_steps,
            base=self._before(targets),
            unmasked_rewards=self._unmasked_rewards,
        )
        lowest = 0 if shares_weights() or any_images(self._inputs.train) else min(group.layers)
        with reusing_prefix(self.model, lowest, states, self._listener.warn, in_training=True):
            found = find_mask(search)
        return self._scored(_outcome(group, targets, found), group, found, folder.folder)

    def _step_scores(self, folder: Path) -> StepScores | None:
        """The scores that decide between the masks of a group; None if the loss does."""
        if self._of_steps is None:
            return None
        return StepScores(self._of_steps, folder / "scores", self._listener, unmasked=self._samples_of_steps)

    def _scored(self, outcome: TrainedGroup, group: TargetGroup, found: FoundMask, folder: Path) -> TrainedGroup:
        """The score of the mask; empty if groups are ranked by loss."""
        if self._scorer is None or self.unmasked is None:
            return outcome
        self._make_whole()
        targets = self._targets(group)
        with masked(targets, found.mask, base=self._before(targets)):
            score = self._scorer.score(self.model, folder)
        return TrainedGroup(
            **outcome.document(),
            score=score.value,
            score_standard_error=score.standard_error,
            score_change=score.value - self.unmasked.value,
            score_rank=score.rank,
        )

    def _before(self, targets: list[MaskTarget]) -> dict[str, torch.Tensor] | None:
        """The weights of the targets before fine-tuning; None for weight masks."""
        return None if self._pairs is None else read_base(targets, self._pairs)

    def _targets(self, group: TargetGroup) -> list[MaskTarget]:
        options = self._options
        return find_targets(self.model, group.layers, options.target, group.projections(options.masked_projections))

    def _make_whole(self) -> None:
        if not self._is_whole:  # DeepSpeed or FSDP left this process only a shard
            self.model, self._is_whole = load_frozen_model(self._inputs, self._options), True


def _estimate(recipe: Recipe, source: ModelSource, run: Run, listener: Listener, room: RoomOnGpu) -> FastProbe:
    """The result of `--fast`: the expected gain of a mask for each group, best first among groups of the same size."""
    options = _options(recipe)
    prepared = prepare_mask_training(recipe, source, run, listener, recipe.probe.data_fraction)
    inputs = prepared.inputs
    room.require(inputs)
    model = load_frozen_model(inputs, options)
    groups = _groups(recipe, model)
    promised = promised_changes(
        model,
        sorted({layer for group in groups for layer in group.layers}),
        options,
        inputs,
        listener,
        fft_learning_rate=prepared.fft_learning_rate,
        seed=recipe.seed,
    )
    changes = changes_of_groups(promised, groups)
    sizes = list(dict.fromkeys(len(group.layers) for group in groups if group.projection is None))

    def order(group: TargetGroup) -> tuple[int, float]:
        return sizes.index(len(group.layers)) if group.projection is None else 0, changes[group.name]

    ranked = [
        Group(
            layers=format_layers(group.layers),
            size=len(group.layers),
            change=changes[group.name],
            **_kind(group, [item.target for item in promised if group.has(item.target)]),
        )
        for group in sorted(groups, key=order)
    ]
    return FastProbe(
        fast=True,
        groups=ranked,
        recommended_layers=ranked[0].layers,
        recommended_projection=ranked[0].projection,
        agreement=agreement_with_training(run.folder.parent, source.model, changes),
        peak_memory_bytes=peak_memory_bytes(),
    )


def _options(recipe: Recipe) -> MaskTrainOptions:
    changes: dict[str, Any] = {"keep": "best"}  # groups are compared by their best mask
    if recipe.probe.epochs is not None:
        changes["epochs"] = recipe.probe.epochs
    return recipe.mask_train.model_copy(update=changes)


def _groups(recipe: Recipe, model: PreTrainedModel) -> list[TargetGroup]:
    options, layer_count = recipe.mask_train, len(decoder_layers(model)[1])
    wanted = parse_layers(recipe.probe.layers or "all", layer_count)
    if recipe.probe.unit == "projection":
        return groups_by_projection(model, wanted, options.target, options.masked_projections)
    return [TargetGroup(tuple(layers)) for layers in layer_groups(layer_count, recipe.probe.groups, wanted)]


def _kind(group: TargetGroup, targets: Sequence[MaskTarget]) -> dict[str, Any]:
    """The fields of a result that only a kind of projection has."""
    if group.projection is None:
        return {}
    return {"projection": group.projection, "weights": sum(target.weight.numel() for target in targets)}


def _outcome(group: TargetGroup, targets: Sequence[MaskTarget], found: FoundMask) -> TrainedGroup:
    return TrainedGroup(
        layers=format_layers(group.layers),
        size=len(group.layers),
        start_loss=found.start_loss,
        best_loss=found.best_loss,
        change=found.best_loss - found.unmasked_loss,
        best_step=found.best_step,
        steps=found.steps,
        **_kind(group, targets),
    )
