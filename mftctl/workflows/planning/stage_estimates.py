"""Estimates the steps, tokens, masks and memory of each training stage."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np

from mftctl.data.prepared.examples import Examples
from mftctl.data.prepared.records import token_totals
from mftctl.data.seen_records import records_to_learn_from
from mftctl.data.splits import sample_fraction
from mftctl.errors import ConfigError
from mftctl.evaluation.generation import default_max_new_tokens
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.jobs import Job
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.training_options import TrainingOptions
from mftctl.masking.target_groups import largest_kind
from mftctl.masking.targets import MaskTarget, format_layers, layer_groups, masked_layer_indices, parse_layers
from mftctl.text import counted
from mftctl.training.schedule import records_per_step, total_steps
from mftctl.workflows.planning.batches import Batches, assumed_batches, largest_batches
from mftctl.workflows.planning.command_memory import Asked, CommandMemory
from mftctl.workflows.planning.evaluation_memory import BENCHMARK_PROMPT_TOKENS, Generation
from mftctl.workflows.planning.mask_sizes import MaskEstimate, masked_tensors
from mftctl.workflows.planning.memory import MemoryEstimate
from mftctl.workflows.planning.model_check import CheckedModel
from mftctl.workflows.planning.planned_device import PlannedDevice
from mftctl.workflows.planning.planned_stages import PlannedStage, Room, StageMemory
from mftctl.workflows.planning.problem_list import ProblemList
from mftctl.workflows.planning.room import Verdict, judge
from mftctl.workflows.planning.training_data import DataCheck

TRAINING_COMMANDS = ("fft", "probe", "mask-train")


class StageEstimates:
    """Estimates for a recipe's stages; estimates shared by several stages are computed once.

    Args:
        model: The recipe's model; None omits all values that depend on it.
        data: The recipe's data.
        problems: Receives problems that concern the model.
        process_bytes: Memory of the process without a model.
        device: Device that the stages run on.
        staged: Whether these are stages of an experiment, which does not accept options of single commands.

    Attributes:
        masks: Mask estimates by stage name.
        memory: Memory estimates of the stages.
    """

    def __init__(
        self,
        model: CheckedModel | None,
        data: DataCheck,
        problems: ProblemList,
        process_bytes: int,
        device: PlannedDevice,
        *,
        staged: bool = False,
    ) -> None:
        self.masks: dict[str, MaskEstimate] = {}
        self.memory: list[StageMemory] = []
        self._model = model
        self._data = data
        self._problems = problems
        self._process_bytes = process_bytes
        self._device = device
        self._staged = staged
        self._known: dict[Hashable, MemoryEstimate] = {}

    def training(self, job: Job) -> PlannedStage:
        """Returns method, layers, records, steps and tokens of a training stage, and stores its masks and memory.

        Raises:
            MftError: The stage does not fit the model.
        """
        method = job.recipe.fft.method if job.command == "fft" else job.recipe.mask_train.method
        stage = PlannedStage(job.name, job.command, method=method)
        if job.command != "fft" and job.recipe.mask_train.kind == "delta":
            _check_base(job)
        if method == "drop" and job.command == "mask-train":
            if self._model is not None:
                self._note_mask(job, self._model.projections, "all")
            return stage
        if not job.recipe.data:
            raise ConfigError("Training needs data.", key="data", expected="a file or a hub id", actual="none given")
        self._check_length(training_options(job))
        self._data.require_kind(job.recipe, training_options(job).record_kind)
        stage = self._with_steps(stage, job)
        if self._model is None:
            return stage
        groups = None
        if job.command != "fft":
            groups = self._groups(job, self._model)
            text = _layers_text(job, groups)
            stage = replace(stage, layers=text)
            if not _is_fast(job):
                layers = max(groups, key=len)
                masked = [target for target in self._model.projections if target.layer in layers]
                chosen = _chosen(masked, job.recipe.mask_train)
                self._note_mask(job, largest_kind(chosen) if _has_one_kind(job) and chosen else chosen, text)
        self._note_training_memory(job, self._model, groups)
        return stage

    def evaluation(self, job: Job) -> None:
        """Stores the memory estimate of an evaluation.

        Raises:
            MftError: The model cannot run without data.
        """
        recipe = job.recipe
        if self._model is None or recipe.eval.engine != "hf" or recipe.eval.predictions is not None:
            return
        memory = self._command_memory(job, self._model)
        memory.asked = self._asked(recipe)
        generation, batches = memory.generation(recipe), memory.asked.batches
        if recipe.eval.tasks:
            self._problems.skip(
                f"{job.name}: length of benchmark prompts, assumed to be {BENCHMARK_PROMPT_TOKENS:,} tokens"
            )
        records, length_tokens = (1, 0) if batches is None else (batches.records, batches.length_tokens)
        if generation is not None:
            records, length_tokens = generation.records, generation.prompt_tokens + generation.new_tokens
        self._note_memory(job, memory, records, length_tokens, batches)

    def interpolation(self, job: Job) -> None:
        """Stores the memory estimate of the validations of an interpolation.

        Raises:
            MftError: The stage lacks an input, or the model cannot run without data.
        """
        recipe = job.recipe
        if recipe.interpolate.base is None and job.after is None:
            raise _no_base("interpolate", "interpolate.base")
        if not recipe.data:
            raise ConfigError("Validation needs data.", key="data", expected="a file or a hub id", actual="none given")
        self._check_length(recipe.fft)
        if self._model is None:
            return
        memory, length_tokens = self._command_memory(job, self._model), recipe.fft.max_length_tokens
        tokens = self._data.tokens(recipe, length_tokens)
        if tokens is None or not tokens.validation:
            batches = assumed_batches(1, length_tokens)
        else:
            batches = largest_batches(tokens.validation, tokens.validation, 1)
        memory.asked = Asked(batches)
        self._note_memory(job, memory, batches.validation_records, batches.validation_tokens, batches)

    def _asked(self, recipe: Recipe) -> Asked:
        """The work of an evaluation on the test data and the data to retain."""
        parts = self._data.parts(recipe)
        retained, tokens = self._data.retained(recipe), recipe.eval.max_length_tokens
        if not parts.test:
            if not parts.retained:
                return Asked()
            return Asked(largest_batches(retained, retained, 1) if retained else assumed_batches(1, tokens))
        found = self._data.longest_question(recipe)
        if found is None:
            return Asked(assumed_batches(1, tokens), Generation(tokens, tokens))
        encoded, prompt_tokens = found
        measured = [*encoded, *retained]
        batches = largest_batches(measured, measured, 1)
        if prompt_tokens == 0:
            return Asked(batches)
        limit = None
        if self._model is not None:
            limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        room = default_max_new_tokens(encoded, longest_prompt_tokens=prompt_tokens, limit_tokens=limit)
        return Asked(batches, Generation(prompt_tokens, room))

    def _with_steps(self, stage: PlannedStage, job: Job) -> PlannedStage:
        """The stage with its records, steps and tokens, as far as they are known."""
        options = training_options(job)
        train = self._learned_from(job)
        share = job.recipe.probe.data_fraction if job.command == "probe" else options.data_fraction
        records = max(1, int(len(train) * share + 0.5)) if share < 1 else len(train)
        if records == 0:
            return stage
        runs = 1
        if job.command == "probe" and self._model is not None:
            runs = len(self._groups(job, self._model))
            if job.recipe.probe.unit == "projection":
                runs = len({target.projection for target in _chosen(self._model.projections, job.recipe.mask_train)})
        learns = job.command == "fft" or (job.recipe.mask_train.method == "learned" and not _is_fast(job))
        steps = total_steps(records, options) * runs if learns else 0
        step_records = min(records_per_step(options), records)
        stage = replace(stage, records=records, trainings=runs, steps=steps, records_per_step=step_records)
        tokens = self._data.tokens(job.recipe, options.max_length_tokens)
        if tokens is None:
            return stage
        mean_tokens = sum(token_totals(tokens.train)) / len(tokens.train)
        total = steps * step_records if options.max_steps else math.ceil(options.epochs * records) * runs * bool(steps)
        return replace(stage, tokens_per_step=round(mean_tokens * step_records), tokens=round(mean_tokens * total))

    def _learned_from(self, job: Job) -> Examples:
        """The records that a stage may learn from; a mask may exclude those seen by earlier fine-tuning."""
        train = self._data.parts(job.recipe).train
        learn_from = (job.recipe.fft if job.command == "fft" else job.recipe.mask_train).learn_from
        if learn_from == "all":
            return train
        seen = [np.empty(0, np.uint64)]
        before = job.after
        while before is not None:
            if before.command == "fft":
                known, share = self._data.parts(before.recipe).train, before.recipe.fft.data_fraction
                if len(known):
                    seen.append(sample_fraction(known, share, before.seed).digests)
            before = before.after
        return records_to_learn_from(train, np.concatenate(seen), learn_from)

    def _groups(self, job: Job, model: CheckedModel) -> list[list[int]]:
        """The layers to mask: a single choice, or all groups that a probe tries."""
        count = model.layer_count
        probe = job if job.command == "probe" else job.layers_from
        if probe is None:
            options = job.recipe.mask_train
            return [masked_layer_indices(options.layers or "all", count, options.target)]
        wanted = parse_layers(probe.recipe.probe.layers or "all", count)
        if probe.recipe.probe.unit != "layer":
            return [wanted]
        return layer_groups(count, probe.recipe.probe.groups, wanted)

    def _note_mask(self, job: Job, targets: Sequence[MaskTarget], layers: str) -> None:
        self.masks[job.name] = MaskEstimate(layers, tuple(masked_tensors(targets, job.recipe.mask_train)))

    def _note_training_memory(self, job: Job, model: CheckedModel, groups: Sequence[Sequence[int]] | None) -> None:
        memory = self._command_memory(job, model)
        if job.command == "mask-train" and job.layers_from is not None and groups is not None:
            memory.layers = max(groups, key=len)
        tokens = self._data.tokens(job.recipe, training_options(job).max_length_tokens)
        if tokens is not None:
            memory.train, memory.validation = tokens.train, tokens.validation
        batches = memory.batches(job.recipe)
        self._note_memory(job, memory, batches.records, batches.length_tokens, batches)

    def _command_memory(self, job: Job, model: CheckedModel) -> CommandMemory:
        return CommandMemory(
            job.command,
            model.config,
            model.layer_count,
            self._device,
            seed=job.seed,
            process_bytes=self._process_bytes,
            known=self._known,
        )

    def _note_memory(
        self, job: Job, memory: CommandMemory, records: int, length_tokens: int, batches: Batches | None
    ) -> None:
        """Stores an estimate with the available memory and, if it does not fit, the options with which it would."""
        found = memory.estimate(job.recipe)
        room, free = None, self._device.free_bytes
        if free is not None:
            verdict = judge(found.peak_bytes, free)
            smaller = None if verdict is Verdict.FITS else memory.smaller(job.recipe, free)
            options = None if smaller is None else smaller.sets if self._staged else smaller.flags
            room = Room(free, verdict, options)
            if verdict is not Verdict.FITS:
                tell = self._problems.problem if verdict is Verdict.NO else self._problems.warn
                tell(f"{job.name}: {_room_text(found.peak_bytes, free, verdict, options)}")
        self.memory.append(StageMemory(job.name, records, length_tokens, batches, found, room))

    def _check_length(self, options: TrainingOptions) -> None:
        if self._model is None:
            return
        known = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if known is not None and options.max_length_tokens > known:
            self._problems.warn(
                "max_length_tokens: exceeds the model's context length "
                f"(expected: at most {known}; got: {options.max_length_tokens})"
            )


def _has_one_kind(job: Job) -> bool:
    """True if the job trains masks of one kind of projection each, or takes the kind from a probe."""
    probe = job if job.command == "probe" else job.layers_from
    return probe is not None and probe.recipe.probe.unit == "projection"


def _is_fast(job: Job) -> bool:
    """True if the job is a probe that computes gradients without training."""
    return job.command == "probe" and job.recipe.probe.fast


def training_options(job: Job) -> FftOptions | MaskTrainOptions:
    """The options that a training stage uses."""
    if job.command == "fft":
        return job.recipe.fft
    options = job.recipe.mask_train
    if job.command == "probe" and job.recipe.probe.epochs is not None:
        return options.model_copy(update={"epochs": job.recipe.probe.epochs})
    return options


def _chosen(targets: Sequence[MaskTarget], options: MaskTrainOptions) -> list[MaskTarget]:
    """The targets selected by part and, with ratios by projection, by name; the plan checks that all names exist."""
    return [
        target
        for target in targets
        if (options.target in (target.part, "all") or (options.target == "both" and target.part != "projector"))
        and (options.masked_projections is None or target.projection in options.masked_projections)
    ]


def _layers_text(job: Job, groups: Sequence[Sequence[int]]) -> str:
    if len(groups) == 1:
        return format_layers(groups[0])
    return counted(len(groups), "group") if job.command == "probe" else f"{len(max(groups, key=len))} of a probe"


def _check_base(job: Job) -> None:
    if job.recipe.mask_train.base is None and job.after is None:
        what = "drop" if job.recipe.mask_train.method == "drop" else "kind delta"
        raise _no_base(what, "mask_train.base")


def _no_base(what: str, key: str) -> ConfigError:
    return ConfigError(
        f"{what} needs the model before fine-tuning.",
        key=key,
        expected="a checkpoint folder or a hub id, or a stage that comes after an fft stage",
        actual="none given",
    )


def _room_text(needed_bytes: int, free_bytes: int, verdict: Verdict, options: str | None) -> str:
    short = "does not fit" if verdict is Verdict.NO else "barely fits"
    advice = f"fits with: {options}" if options else "no set of options makes it fit"
    return f"{short} on the device (needs {needed_bytes / 1e9:.1f} GB; free: {free_bytes / 1e9:.1f} GB; {advice})"
