"""Scores other than the loss by which `probe --by` ranks groups of layers: exact match or a benchmark score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mftctl.data.encoding import EncodedRecords
from mftctl.data.record_issues import RecordIssues
from mftctl.errors import ConfigError
from mftctl.evaluation.suite import Suite, SuiteRecords, measure, prepare_suite, with_fixed_clock
from mftctl.experiments.measured_lines import Metric
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.record_encoding import load_encoder
from mftctl.experiments.results import Score
from mftctl.experiments.run_contents import read_part
from mftctl.experiments.run_folder import Run
from mftctl.files.atomic import write_text
from mftctl.progress import Listener
from mftctl.runtime.processes import is_first
from mftctl.text import counted
from mftctl.training.held_out import split_validation_records
from mftctl.training.inputs import TrainingInputs
from mftctl.workflows.probe_by import EXACT_MATCH, check_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ProbeScorer:
    """Scores a probe's model with the mask of each group and without one, always on the same samples.

    Args:
        recipe: Provides `probe.by`, which names the score, and the `eval` section.
        inputs: Inputs of the probe, with all of its validation records.
        run: Receives the samples of each score.
        listener: Receives progress updates, and a warning if the benchmark's own problems choose the layers.

    Raises:
        MftError: A task, a file or the sandbox cannot be used, or the records have no questions.

    Source: MFT, figures 3 and 7, which show benchmark scores.
    """

    def __init__(self, recipe: Recipe, inputs: TrainingInputs, run: Run, listener: Listener) -> None:
        self.by = recipe.probe.by
        self._run = run
        self._listener = listener
        encoder = load_encoder(inputs.checkpoint, recipe, run.started)
        self._tokenizer = with_fixed_clock(encoder)
        self._test: SuiteRecords | None = None
        if self.by == EXACT_MATCH:
            self._recipe = recipe.model_copy(
                update={
                    "test_data": recipe.val_data or recipe.data,
                    "eval": recipe.eval.model_copy(update={"generate": True, "tasks": ()}),
                }
            )
            self._measures = Suite([], RecordIssues(), [])
            self._test = SuiteRecords(encoder, _questions(recipe, inputs))
            return
        check_by(recipe)
        self._recipe = _of_task(recipe)
        if not self._recipe.eval.task_data:
            listener.warn(
                f"The layers are chosen on the problems of {self.by} itself, so later scores on them are biased; "
                f"to choose them on different problems: --task-data {self.by}=FILE."
            )
        self._measures = prepare_suite(self._recipe, listener)

    def unmasked(self, model: PreTrainedModel) -> Score:
        """The score without a mask, measured once even if the run is resumed."""
        path = self._run.folder / "unmasked.json"
        if not path.exists():
            score = self.score(model, self._run.folder / "unmasked")
            if is_first():
                write_text(path, json.dumps(score.document(), indent=2) + "\n")
            return score
        return read_part(path, Score)

    def score(self, model: PreTrainedModel, folder: Path) -> Score:
        """The model's current score: the first metric that a benchmark reports.

        Args:
            model: The model, with or without a mask.
            folder: Receives the samples.
        """
        folder.mkdir(parents=True, exist_ok=True)
        [found] = measure(
            self._measures,
            self._recipe,
            (model, self._tokenizer),
            folder,
            self._listener,
            test=self._test,
            model_name=str(self._recipe.model),
        )
        wanted = [metric for metric in found.metrics if self._test is None or metric.name == EXACT_MATCH]
        first = wanted[0]
        return Score(
            metric=first.name,
            value=first.value,
            standard_error=first.standard_error,
            samples=first.samples,
            higher_is_better=self._is_better_higher(first),
        )

    def _is_better_higher(self, metric: Metric) -> bool:
        directions: dict[str, bool] = {}
        for benchmark in self._measures.benchmarks:
            directions |= benchmark.task.higher_is_better()
        return directions.get(metric.name.partition(",")[0], True)


def _of_task(recipe: Recipe) -> Recipe:
    """The recipe that evaluates only that benchmark."""
    by = recipe.probe.by
    file = recipe.eval.task_data.get(by)
    changes = {
        "test_data": [],
        "eval.tasks": [by],
        "eval.task_data": {} if file is None else {by: file},
        "eval.predictions": None,
        "eval.engine": "hf",
    }
    return with_changes(recipe, changes)


def _questions(recipe: Recipe, inputs: TrainingInputs) -> EncodedRecords:
    """The deciding validation records, for which answers are generated.

    Raises:
        ConfigError: None of them has a question.
    """
    options, limit = recipe.mask_train, recipe.eval.limit
    records = split_validation_records(inputs.validation, options)[0][:limit]
    examples = split_validation_records(inputs.validation_examples, options)[0][:limit]
    if not any(example.prompt for example in examples):
        raise ConfigError(
            "Exact match needs questions to answer.",
            key="probe.by",
            expected="validation records with a question and an answer",
            actual=f"{counted(len(examples), 'record')} of plain text",
            hint="--by loss",
        )
    return EncodedRecords(records, examples)
