"""The results of evaluation runs, and which of them to compare."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mftctl.errors import RunError
from mftctl.experiments.measured_lines import Dataset, Metric
from mftctl.experiments.results import EvalResult, Outcome
from mftctl.experiments.run_contents import first_fault
from mftctl.experiments.run_folder import Run
from mftctl.experiments.run_inputs import Lineage, Parents, RunInputs, UsedModel
from mftctl.experiments.state_names import FFT, PRE_TRAINED
from mftctl.reporting.paired_change import Samples, read_samples

Maker = tuple[str, str]
"""Recipe and stage that made a state, or nothing and its run."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One metric of one evaluation run.

    Attributes:
        run: The evaluation.
        dataset: The data or benchmark it was measured on.
        metric: The metric.
        state: Label of the measured state, as in the papers.
        made_by: The runs that made the state, first to last.
    """

    run: Run
    dataset: Dataset
    metric: Metric
    state: str
    made_by: tuple[Run, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """Model, data and metric, which are the same throughout a table."""
        return (self.lineage.origin, f"{self.dataset.name}:{self.dataset.digest}", self.metric.name)

    @property
    def is_number(self) -> bool:
        """True if the value and its error are finite; a diverged model gives other values."""
        error = self.metric.standard_error
        return math.isfinite(self.metric.value) and (error is None or math.isfinite(error))

    @property
    def lineage(self) -> Lineage:
        """The runs that made the evaluated model, and its origin."""
        return Lineage.read(self.run.record.inputs)

    @property
    def seed(self) -> int:
        """Seed of the evaluation."""
        return int(self.run.record.config.get("seed", 0))

    @property
    def trained_on(self) -> str:
        """The training data."""
        return json.dumps(self.run.record.config.get("data", []))

    @property
    def maker(self) -> Maker:
        """Distinguishes states of the same name: recipe and stage, or else the run that made the state."""
        makers = [name for name in self.lineage.parents if not name.endswith("-apply")]
        record = next((run.record for run in self.made_by if makers and run.name == makers[-1]), self.run.record)
        if self.state == PRE_TRAINED:
            return "", ""
        if self.run.record.chose_its_model:  # the chosen one may be another for each seed
            record = self.run.record
        return record.recipe or "", record.stage or self.run.record.stage or (makers[-1] if makers else "")

    @property
    def first_state(self) -> str | None:
        """State of the model that the first run in the lineage produced; None if unknown."""
        first = [run for run in self.made_by if run.name in self.lineage.parents[:1]]
        return first[0].result(Outcome).state if first else None

    def samples(self) -> Samples:
        """Score and weight of each sample, by ID."""
        return read_samples(self.run.folder / self.dataset.samples, self.metric.name)


def measurements_of(run: Run, by_name: Mapping[str, Run]) -> list[Measurement]:
    """All metrics of a finished evaluation.

    Raises:
        RunError: The record lacks a value that the comparison needs.
    """
    record = run.record
    try:
        made_by = tuple(by_name[name] for name in Parents.read(record.inputs).parents if name in by_name)
        result = run.result(EvalResult)
        found = [
            Measurement(run, data, metric, result.state, made_by) for data in result.datasets for metric in data.metrics
        ]
        for item in found:
            _ = item.key, item.seed, item.maker
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        path = run.folder / "run.json"
        raise RunError("The record of this evaluation is incomplete.", path=path, actual=first_fault(error)) from error
    return found


def belong_together(base: Measurement, item: Measurement) -> bool:
    """True if a state is compared with this baseline.

    A state made from a fine-tuned model is compared with that model, any state with its pre-trained model, and a model
    tuned by a different method, such as GMT, with the baseline of the same pre-trained model, training data and seed.
    """
    same_origin = base.lineage.origin == item.lineage.origin
    if PRE_TRAINED in (base.state, item.state):
        return same_origin
    parents = item.lineage.parents
    if not parents:  # as for a model folder from a different runs folder
        base_model = RunInputs.read(item.run.record.inputs).base
        return base_model is not None and base_model == str(_model_folder(base.run))
    if item.first_state in (None, FFT):
        return base.lineage.parents == parents[:1]
    return same_origin and (base.seed, base.trained_on) == (item.seed, item.trained_on)


def _model_folder(run: Run) -> Path:
    return Path(UsedModel.read(run.record.inputs).model).resolve()
