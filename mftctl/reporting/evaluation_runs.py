"""What evaluation runs have measured, and which of it belongs together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mftctl.errors import RunError
from mftctl.experiments.measured_lines import Dataset, Metric
from mftctl.experiments.results import EvalResult, Outcome
from mftctl.experiments.run_contents import first_fault
from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import FFT, PRE_TRAINED
from mftctl.reporting.paired_change import Samples, read_samples


@dataclass(frozen=True, slots=True)
class Measurement:
    """One metric of one evaluation run.

    Attributes:
        run: The evaluation.
        dataset: What it was measured on.
        metric: The figures.
        state: What was measured, in the words of the papers.
        made_by: The runs that made the state, from first to last, as far as known.
    """

    run: Run
    dataset: Dataset
    metric: Metric
    state: str
    made_by: tuple[Run, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """What two measurements in one table have in common: model, data and metric."""
        return (self.inputs["origin"], f"{self.dataset.name}:{self.dataset.digest}", self.metric.name)

    @property
    def is_number(self) -> bool:
        """Whether the value and its error are numbers, and not what a model gives that diverged."""
        error = self.metric.standard_error
        return math.isfinite(self.metric.value) and (error is None or math.isfinite(error))

    @property
    def inputs(self) -> dict[str, Any]:
        """What was measured, and where it comes from."""
        return self.run.record.inputs

    @property
    def seed(self) -> int:
        """The evaluation's."""
        return int(self.run.record.config.get("seed", 0))

    @property
    def trained_on(self) -> str:
        """The training data."""
        return json.dumps(self.run.record.config.get("data", []))

    @property
    def maker(self) -> tuple[str, str]:
        """What tells two states of the same name apart: recipe and stage, else the run that made the state."""
        makers = [name for name in self.inputs["parents"] if not name.endswith("-apply")]
        record = next((run.record for run in self.made_by if makers and run.name == makers[-1]), self.run.record)
        if self.state == PRE_TRAINED:
            return "", ""
        return record.recipe or "", record.stage or self.run.record.stage or (makers[-1] if makers else "")

    @property
    def first_state(self) -> str | None:
        """The state that the first run on the way here made of the pre-trained model; None where it is not known."""
        first = [run for run in self.made_by if run.name in self.inputs["parents"][:1]]
        return first[0].result(Outcome).state if first else None

    def samples(self) -> Samples:
        """Score and weight of each sample, by its id."""
        return read_samples(self.run.folder / self.dataset.samples, self.metric.name)


def measurements_of(run: Run, by_name: Mapping[str, Run]) -> list[Measurement]:
    """All metrics of a finished evaluation.

    Raises:
        RunError: Its record lacks something that a comparison needs.
    """
    record = run.record
    try:
        made_by = tuple(by_name[name] for name in record.inputs["parents"] if name in by_name)
        result = run.result(EvalResult)
        found = [
            Measurement(run, data, metric, result.state, made_by) for data in result.datasets for metric in data.metrics
        ]
        for item in found:
            _ = item.key, item.seed, item.maker
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        path = run.folder / "run.json"
        raise RunError(
            "The record of this evaluation is not complete.", path=path, actual=first_fault(error)
        ) from error
    return found


def belong_together(base: Measurement, item: Measurement) -> bool:
    """Whether a state is to be compared with this baseline.

    What was made of a fine-tuned model belongs to that very model; a pre-trained model to all made of it; and what was
    tuned in another way, such as GMT, to the baseline of the same pre-trained model, training data and seed.
    """
    same_origin = bool(base.inputs["origin"] == item.inputs["origin"])
    if PRE_TRAINED in (base.state, item.state):
        return same_origin
    if not item.inputs["parents"]:  # which a folder tells that another runs folder has
        base_model = item.inputs.get("base")
        return base_model is not None and base_model == str(Path(base.inputs["model"]).resolve())
    if item.first_state in (None, FFT):
        return bool(base.inputs["parents"] == item.inputs["parents"][:1])
    return same_origin and (base.seed, base.trained_on) == (item.seed, item.trained_on)
