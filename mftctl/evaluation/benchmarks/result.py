"""The result of one benchmark: its scores and its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of a benchmark.

    Attributes:
        metric: Name of the metric, such as `exact_match`.
        filter: How the answer was taken from the output, such as `strict-match`; `none` for the whole output.
        value: Sum of the samples' scores over the sum of their weights.
        standard_error: Over samples; None with a single one, or where lm-eval has a figure for all of them only.
        samples: Number of problems.
    """

    metric: str
    filter: str
    value: float
    standard_error: float | None
    samples: int

    @property
    def name(self) -> str:
        """Metric and filter, as lm-eval joins them."""
        return f"{self.metric},{self.filter}"


@dataclass(frozen=True, slots=True)
class BenchmarkSample:
    """One problem.

    Attributes:
        doc_id: The problem's position in the data, from 0.
        name: The problem's own name, such as `HumanEval/0`; None where it has none.
        prompt: What the model was given, with the template applied; of several requests the first.
        target: The right answer.
        outputs: What was written, up to the stop string: one, or several samples; empty where nothing is written.
        answers: What each filter took from it.
        scores: The sum of each metric, by `metric,filter`.
        weights: Of what a score is a sum, where that is not one: the instructions of a prompt.
    """

    doc_id: int
    name: str | None
    prompt: str
    target: str
    outputs: tuple[str, ...]
    answers: Mapping[str, str]
    scores: Mapping[str, float]
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """One benchmark's figures with everything needed to repeat them.

    Attributes:
        name: The name given to `--tasks`.
        task_version: lm-eval's or our version of the task.
        lm_eval_version: The engine's.
        shots: Number of solved examples in the prompt.
        chat_template: Whether the prompt went through the tokenizer's chat template.
        data: The file or the hub's data set.
        data_digest: SHA-256 of all its records, also where `limit` takes the first ones only.
        scores: Every metric under every filter.
        samples: Every problem.
    """

    name: str
    task_version: str
    lm_eval_version: str
    shots: int
    chat_template: bool
    data: str
    data_digest: str
    scores: tuple[Score, ...]
    samples: tuple[BenchmarkSample, ...]
