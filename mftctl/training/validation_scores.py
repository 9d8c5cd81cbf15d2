"""Scores of a model on validation records or a benchmark, which decide between masks or between steps."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mftctl.data.encoding import EncodedRecords
from mftctl.data.record_issues import RecordIssues
from mftctl.errors import ConfigError
from mftctl.evaluation.score_choice import EXACT_MATCH, check_score
from mftctl.evaluation.statistics import Interval, paired_difference
from mftctl.evaluation.suite import Suite, SuiteRecords, measure, prepare_suite, with_fixed_clock
from mftctl.experiments.measured_lines import Metric
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import with_changes
from mftctl.experiments.record_encoding import load_encoder
from mftctl.experiments.results import Score
from mftctl.experiments.run_contents import read_part, sample_lines
from mftctl.files.atomic import write_text
from mftctl.progress import Listener
from mftctl.runtime.processes import is_first
from mftctl.text import counted
from mftctl.training.inputs import TrainingInputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MANY_QUESTIONS = 1_000


class ValidationScorer:
    """Scores a model, always on the same samples: exact match of validation records, or a benchmark.

    Args:
        recipe: Provides the `eval` section.
        by: `exact_match` or a benchmark.
        key: The recipe key that names the score.
        chosen: What the score chooses, in words.
        inputs: Inputs of the training.
        records: The validation records and their examples, for exact match.
        now: The time as seen by a chat template.
        listener: Receives progress updates, and a warning if a benchmark's own problems choose.

    Raises:
        MftError: A task, a file or the sandbox cannot be used, or the records have no questions.

    Source: MFT, figures 3 and 7, which show benchmark scores.
    """

    def __init__(
        self,
        recipe: Recipe,
        by: str,
        key: str,
        chosen: str,
        inputs: TrainingInputs,
        records: EncodedRecords,
        now: datetime,
        listener: Listener,
    ) -> None:
        self._listener = listener
        encoder = load_encoder(inputs.checkpoint, recipe, now)
        self._tokenizer = with_fixed_clock(encoder)
        self._test: SuiteRecords | None = None
        if by == EXACT_MATCH:
            self._recipe = recipe.model_copy(
                update={
                    "test_data": recipe.val_data or recipe.data,
                    "retain_data": (),
                    "eval": recipe.eval.model_copy(update={"generate": True, "tasks": ()}),
                }
            )
            self._measures = Suite([], RecordIssues(), [])
            questions = _questions(records, recipe.eval.limit, key)
            if len(questions.records) > _MANY_QUESTIONS:
                listener.note(
                    f"Every score takes answers to {len(questions.records):,} validation records; "
                    "--set eval.limit=N uses the first N."
                )
            self._test = SuiteRecords(encoder, questions)
            return
        check_score(by, recipe.eval.task_data, key)
        self._recipe = _of_task(recipe, by)
        if not self._recipe.eval.task_data:
            listener.warn(
                f"{chosen} chosen on the problems of {by} itself, so later scores on them are biased; "
                f"to use different problems: --task-data {by}=FILE."
            )
        self._measures = prepare_suite(self._recipe, listener)

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

    def score_once(self, model: PreTrainedModel, folder: Path) -> Score:
        """The score of a model that does not change, measured once even if the run is resumed.

        Args:
            model: The model.
            folder: Receives the samples; the score is stored beside it.
        """
        path = folder.with_suffix(".json")
        if path.exists():
            return read_part(path, Score)
        score = self.score(model, folder)
        if is_first():
            write_text(path, json.dumps(score.document(), indent=2) + "\n")
        return score

    def _is_better_higher(self, metric: Metric) -> bool:
        directions: dict[str, bool] = {}
        for benchmark in self._measures.benchmarks:
            directions |= benchmark.task.higher_is_better()
        return directions.get(metric.name.partition(",")[0], True)


def score_change(before: Path, after: Path, score: Score) -> Interval:
    """The change of a score between two measurements of the same samples, with its paired 95 % interval.

    Args:
        before: Folder given to `ValidationScorer.score`.
        after: The folder of the later score.
        score: The later score, which names the metric.
    """
    values = []
    for folder in (before, after):
        [file] = folder.glob("*.jsonl")
        values.append({row.id: row.scores[score.metric] for row in sample_lines(file) if score.metric in row.scores})
    old, new = values
    return paired_difference(np.array([new[key] - old[key] for key in old]), np.ones(len(old)))


def _of_task(recipe: Recipe, by: str) -> Recipe:
    """The recipe that evaluates only that benchmark."""
    file = recipe.eval.task_data.get(by)
    changes = {
        "test_data": [],
        "retain_data": [],
        "eval.tasks": [by],
        "eval.task_data": {} if file is None else {by: file},
        "eval.predictions": None,
        "eval.engine": "hf",
        "eval.base_url": None,
    }
    return with_changes(recipe, changes)


def _questions(records: EncodedRecords, limit: int | None, key: str) -> EncodedRecords:
    """The validation records for which answers are generated.

    Raises:
        ConfigError: None of them has a question.
    """
    encoded, examples = records.records[:limit], records.examples[:limit]
    if not any(example.prompt for example in examples):
        raise ConfigError(
            "Exact match needs questions to answer.",
            key=key,
            expected="validation records with a question and an answer",
            actual=f"{counted(len(examples), 'record')} of plain text",
            hint="choose by the loss",
        )
    return EncodedRecords(encoded, examples)
