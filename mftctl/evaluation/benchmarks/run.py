"""One run of one benchmark: outputs from a model or a file, and their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import lm_eval.evaluator

from mftctl.evaluation.benchmarks import local_task
from mftctl.evaluation.benchmarks.catalog import BENCHMARKS
from mftctl.evaluation.benchmarks.result import BenchmarkResult, BenchmarkSample, Score
from mftctl.evaluation.statistics import standard_error_of_ratio

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask

    from mftctl.evaluation.benchmarks.problems import Problems


def run_benchmark(
    answers: LM, task: ConfigurableTask, problems: Problems, *, limit: int | None, chat_template: bool, seed: int
) -> BenchmarkResult:
    """Runs one benchmark and returns its scores.

    Args:
        answers: Source of the outputs.
        task: The lm-eval task.
        problems: The benchmark's problems.
        limit: Number of problems to run, from the first; None for all.
        chat_template: Whether to apply the tokenizer's chat template, with few-shot examples as turns.
        seed: Seed for tasks that draw few-shot examples at random.

    Raises:
        EvaluationError: A prompt does not fit the model's context; raised before the first answer.
    """
    name = task.config.task  # task_name would draw from the global random state
    with local_task.quiet_libraries():
        task.set_fewshot_seed(seed=seed)
        outcome = lm_eval.evaluator.evaluate(
            answers,
            {"tasks": {name: task}},
            limit=limit,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            bootstrap_iters=0,
        )
    samples = _samples(outcome["samples"][name])
    return BenchmarkResult(
        name=name,
        task_version=str(outcome["versions"][name]),
        lm_eval_version=version("lm-eval"),
        shots=BENCHMARKS[name].shots if name in BENCHMARKS else int(outcome["n-shot"][name]),
        chat_template=chat_template,
        data=problems.source,
        data_digest=problems.digest,
        scores=_scores(outcome["results"][name], samples),
        samples=samples,
    )


def with_scores(
    result: BenchmarkResult, metric: str, filter_name: str, values: Sequence[float | None]
) -> BenchmarkResult:
    """The result with one more score per problem.

    Args:
        result: Result of a run.
        metric: Name of the metric.
        filter_name: Name in place of an lm-eval filter, such as `judge`.
        values: One per problem; None for problems without a score.
    """
    key = f"{metric},{filter_name}"
    samples = tuple(
        sample if value is None else replace(sample, scores={**sample.scores, key: value})
        for sample, value in zip(result.samples, values, strict=True)
    )
    given = [value for value in values if value is not None]
    if not given:
        return result
    error = standard_error_of_ratio(given, [1.0] * len(given)) if len(given) > 1 else None
    score = Score(metric, filter_name, sum(given) / len(given), error, len(given))
    return replace(result, scores=(score, *result.scores), samples=samples)


def _samples(rows: Sequence[Mapping[str, Any]]) -> tuple[BenchmarkSample, ...]:
    """Groups lm-eval's rows, one per problem and filter, by problem."""
    by_problem: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_problem.setdefault(int(row["doc_id"]), []).append(row)
    return tuple(_sample(doc_id, found) for doc_id, found in sorted(by_problem.items()))


def _sample(doc_id: int, rows: Sequence[Mapping[str, Any]]) -> BenchmarkSample:
    first, doc = rows[0], rows[0]["doc"]
    written = [output for outputs in first["resps"] for output in outputs if isinstance(output, str)]
    scores, weights = {}, {}
    for row in rows:
        for metric in row["metrics"]:
            found = _sum_and_weight(row[metric])
            if found is not None:
                scores[f"{metric},{row['filter']}"], weights[f"{metric},{row['filter']}"] = found
    named = next((doc[field] for field in ("task_id", "key", "id") if field in doc), None)
    return BenchmarkSample(
        doc_id=doc_id,
        name=None if named is None else str(named),
        prompt=first["arguments"][0][0],
        target=str(first["target"]),
        outputs=tuple(written),
        answers={row["filter"]: str(row["filtered_resps"][0]) for row in rows} if written else {},
        scores=scores,
        weights={key: weight for key, weight in weights.items() if weight != 1},
    )


def _sum_and_weight(value: Any) -> tuple[float, float] | None:
    """Sum and weight of a value: a number has weight 1, a list its length; None for values that lm-eval aggregates."""
    if isinstance(value, list) and value and all(isinstance(item, (bool, int, float)) for item in value):
        return float(sum(value)), float(len(value))
    try:
        return float(value), 1.0
    except (TypeError, ValueError):
        return None


def _scores(results: Mapping[str, Any], samples: Sequence[BenchmarkSample]) -> tuple[Score, ...]:
    scores = []
    for key, value in results.items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        sums = [sample.scores[key] for sample in samples if key in sample.scores]
        weights = [sample.weights.get(key, 1.0) for sample in samples if key in sample.scores]
        error = standard_error_of_ratio(sums, weights) if len(sums) > 1 else None
        scores.append(Score(metric, filter_name, float(value), error, len(samples)))
    return tuple(scores)
