"""Steps, tokens, masks and memory of each training stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mftctl.config import FftOptions, MaskTrainOptions, TrainingOptions
from mftctl.data.examples import Example
from mftctl.data.sources import record_digest
from mftctl.data.splits import sample_fraction
from mftctl.errors import ConfigError
from mftctl.masking.targets import MaskTarget, format_layers, layer_groups, parse_layers
from mftctl.planning.batches import Batches
from mftctl.planning.findings import Findings
from mftctl.planning.masks import masked_tensors
from mftctl.planning.memory import MemoryEstimate, estimate_memory
from mftctl.planning.model_check import CheckedModel
from mftctl.planning.preparing import TrainingPlan, plan_fine_tuning, plan_mask_training
from mftctl.planning.training_data import DataCheck, Tokens
from mftctl.seen_records import records_to_learn_from
from mftctl.stages import Task
from mftctl.steps import total_steps

TRAINING_COMMANDS = ("fft", "probe", "mask-train")


class StageFigures:
    """The figures of a recipe's stages; estimates that several stages share are made once.

    Args:
        model: The recipe's model; None leaves its figures out.
        data: The recipe's data.
        findings: Gets what does not fit the model.
        process_bytes: What the process takes without any model.

    Attributes:
        masks: What is masked, by the stage's name.
        memory: The estimate of each training stage.
    """

    def __init__(self, model: CheckedModel | None, data: DataCheck, findings: Findings, process_bytes: int) -> None:
        self.masks: dict[str, dict[str, Any]] = {}
        self.memory: list[dict[str, Any]] = []
        self._model = model
        self._data = data
        self._findings = findings
        self._process_bytes = process_bytes
        self._estimates: dict[tuple[TrainingPlan, Batches], MemoryEstimate] = {}

    def row(self, task: Task) -> dict[str, Any]:
        """Method, layers, records, steps and tokens of a training stage; its masks and its memory go to the attributes.

        Raises:
            MftError: The stage does not fit the model.
        """
        method = task.recipe.fft.method if task.command == "fft" else task.recipe.mask_train.method
        row: dict[str, Any] = {"method": method}
        if method == "drop" and task.command == "mask-train":
            _check_drop(task)
            if self._model is not None:
                self._note_mask(task, self._model.projections, "all")
            return row
        if not task.recipe.data:
            raise ConfigError("Training needs data.", key="data", expected="a file or a hub id", actual="none given")
        self._check_length(training_options(task))
        row |= self._steps(task)
        if self._model is None:
            return row
        if _is_fast(task):
            row["layers"] = _layers_text(task, self._groups(task, self._model))
            self._findings.skip(
                f"{task.name}: the memory of probe --fast (4 bytes a weight of its layers, and their "
                "activations, on top of the model)"
            )
            return row
        plan = plan_fine_tuning(task.recipe.fft, task.seed)
        if task.command != "fft":
            groups = self._groups(task, self._model)
            layers = max(groups, key=len)
            row["layers"] = _layers_text(task, groups)
            options = task.recipe.mask_train
            masked = [target for target in self._model.projections if target.layer in layers]
            self._note_mask(task, _chosen(masked, options), row["layers"])
            plan = plan_mask_training(options, layers)
        self._note_memory(task, plan)
        return row

    def _steps(self, task: Task) -> dict[str, Any]:
        options = training_options(task)
        train = self._learned_from(task)
        share = task.recipe.probe.data_fraction if task.command == "probe" else options.data_fraction
        records = max(1, int(len(train) * share + 0.5)) if share < 1 else len(train)
        if records == 0:
            return {}
        runs = 1
        if task.command == "probe" and self._model is not None:
            runs = len(self._groups(task, self._model))
        learns = task.command == "fft" or (task.recipe.mask_train.method == "learned" and not _is_fast(task))
        steps = total_steps(records, options) * runs if learns else 0
        step_records = min(options.batch_size * options.grad_accum_steps, records)
        figures = {"records": records, "trainings": runs, "steps": steps, "records_per_step": step_records}
        tokens = self._data.tokens(task.recipe, options.max_length_tokens)
        if tokens is None:
            return figures
        mean_tokens = sum(len(record.input_ids) for record in tokens.train) / len(tokens.train)
        total = steps * step_records if options.max_steps else math.ceil(options.epochs * records) * runs * bool(steps)
        return {
            **figures,
            "tokens_per_step": round(mean_tokens * step_records),
            "tokens": round(mean_tokens * total),
        }

    def _learned_from(self, task: Task) -> Sequence[Example]:
        """The records that a stage may learn from; those that fine-tuning before it sees may be none for a mask."""
        train = self._data.parts(task.recipe).train
        learn_from = task.recipe.mask_train.effective_learn_from
        if task.command == "fft" or learn_from == "all":
            return train
        seen: set[str] = set()
        before = task.after
        while before is not None:
            if before.command == "fft":
                known, share = self._data.parts(before.recipe).train, before.recipe.fft.data_fraction
                seen.update(map(record_digest, sample_fraction(known, share, before.seed) if known else []))
            before = before.after
        return records_to_learn_from(train, frozenset(seen), learn_from)

    def _groups(self, task: Task, model: CheckedModel) -> list[list[int]]:
        """The layers that may carry a mask: one choice, or all that a probe tries."""
        count = model.layer_count
        probe = task if task.command == "probe" else task.layers_from
        if probe is None:
            return [parse_layers(task.recipe.mask_train.layers or "all", count)]
        wanted = parse_layers(probe.recipe.probe.layers or "all", count)
        return layer_groups(count, probe.recipe.probe_groups, wanted)

    def _note_mask(self, task: Task, targets: Sequence[MaskTarget], layers: str) -> None:
        tensors = masked_tensors(targets, task.recipe.mask_train)
        counted = [tensor.removed for tensor in tensors if tensor.removed is not None]
        sizes = [tensor.deflate_bytes for tensor in tensors if tensor.deflate_bytes is not None]
        whole = len(counted) == len(tensors)
        self.masks[task.name] = {
            "layers": layers,
            "tensors": [{**asdict(tensor), "shape": list(tensor.shape)} for tensor in tensors],
            "weights": sum(tensor.weights for tensor in tensors),
            "removed": sum(counted) if whole else None,
            "packed_bytes": sum(tensor.packed_bytes for tensor in tensors),
            "deflate_bytes": sum(sizes) if whole else None,
        }

    def _note_memory(self, task: Task, plan: TrainingPlan) -> None:
        if self._model is None:
            return
        options = training_options(task)
        tokens = self._data.tokens(task.recipe, options.max_length_tokens)
        batches = _batches(tokens, options)
        key = (plan, batches)
        if key not in self._estimates:
            self._estimates[key] = estimate_memory(self._model.config, plan, batches, process_bytes=self._process_bytes)
        self.memory.append({"stage": task.name, **asdict(batches), **asdict(self._estimates[key])})

    def _check_length(self, options: TrainingOptions) -> None:
        if self._model is None:
            return
        known = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if known is not None and options.max_length_tokens > known:
            self._findings.warn(
                "max_length_tokens: longer than what the model was made for "
                f"(expected: at most {known}; got: {options.max_length_tokens})"
            )


def _is_fast(task: Task) -> bool:
    """Whether a probe takes gradients and trains nothing."""
    return task.command == "probe" and task.recipe.probe.fast


def training_options(task: Task) -> FftOptions | MaskTrainOptions:
    """The section that a training stage trains with."""
    if task.command == "fft":
        return task.recipe.fft
    options = task.recipe.mask_train
    if task.command == "probe" and task.recipe.probe.epochs is not None:
        return options.model_copy(update={"epochs": task.recipe.probe.epochs})
    return options


def _batches(tokens: Tokens | None, options: TrainingOptions) -> Batches:
    if tokens is None:
        return assumed_batches(options.batch_size, options.max_length_tokens)
    return largest_batches(tokens.train, tokens.validation, options.batch_size)


def _chosen(targets: Sequence[MaskTarget], options: MaskTrainOptions) -> list[MaskTarget]:
    """Those of the target and, with a ratio by projection, of its names; the plan checks that all names are there."""
    return [
        target
        for target in targets
        if options.target in (target.part, "both")
        and (options.projections is None or target.projection in options.projections)
    ]


def _layers_text(task: Task, groups: Sequence[Sequence[int]]) -> str:
    if len(groups) == 1:
        return format_layers(groups[0])
    return f"{len(groups)} groups" if task.command == "probe" else f"{len(max(groups, key=len))} of a probe"


def _check_drop(task: Task) -> None:
    if task.recipe.mask_train.base is None and task.after is None:
        raise ConfigError(
            "drop needs the model before fine-tuning.",
            key="mask_train.base",
            expected="a checkpoint folder or a hub id, or a stage that comes after an fft stage",
            actual="none given",
        )
