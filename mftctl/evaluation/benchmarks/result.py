"""The result of one benchmark: its scores and its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Score:
    """One score of a benchmark.

    Attributes:
        metric: Name of the metric, such as `exact_match`.
        filter: How the answer is taken from the output, such as `strict-match`; `none` for the whole output.
        value: Sum of the samples' scores over the sum of their weights.
        standard_error: Over samples; None with a single sample, or if lm-eval reports only a total.
        samples: Number of problems.
    """

    metric: str
    filter: str
    value: float
    standard_error: float | None
    samples: int

    @property
    def name(self) -> str:
        """Metric and filter, joined as in lm-eval."""
        return f"{self.metric},{self.filter}"


@dataclass(frozen=True, slots=True)
class BenchmarkSample:
    """One problem with its outputs and scores.

    Attributes:
        doc_id: The problem's position in the data, from 0.
        name: The problem's own name, such as `HumanEval/0`; None if it has none.
        prompt: The model's input, with the template applied; the first one if there are several requests.
        target: The reference answer.
        outputs: Generated texts up to the stop string: one, or several samples; empty if nothing is generated.
        answers: The answer that each filter took from the output.
        scores: The sum of each metric, by `metric,filter`.
        weights: Number of items that a score sums up, such as the instructions of a prompt, if it is not 1.
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
    """The scores of one benchmark with everything needed to reproduce them.

    Attributes:
        name: The name in `--tasks`.
        task_version: lm-eval's or our version of the task.
        lm_eval_version: Version of lm-eval.
        shots: Number of few-shot examples in the prompt.
        chat_template: Whether the tokenizer's chat template was applied.
        data: The file or hub dataset.
        data_digest: SHA-256 of all its records, even if `limit` selects only the first ones.
        scores: Every metric with every filter.
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
