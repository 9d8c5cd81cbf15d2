"""The benchmarks on offer, and one run of one of them.

The module itself needs no torch, so that help and completion can name the benchmarks.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mftctl.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mftctl.evaluation.inference import OnProgress
    from mftctl.evaluation.problems import Problems


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark of the papers as a task of lm-eval.

    Attributes:
        name: The name given to `--tasks`.
        description: One line for help and reports.
        folder: Where lm-eval keeps the task, below its `tasks`.
        task: lm-eval's name of the task whose prompt, filters and metrics are used.
        shots: Number of solved examples in the prompt.
    """

    name: str
    description: str
    folder: str
    task: str
    shots: int


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        benchmark.name: benchmark
        for benchmark in (
            Benchmark("gsm8k", "grade-school maths, 8 solved examples in the prompt", "gsm8k", "gsm8k_cot", 8),
            Benchmark("gsm8k_0shot", "grade-school maths, the question alone", "gsm8k", "gsm8k_cot", 0),
        )
    }
)
"""Every benchmark by its name."""


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of a benchmark.

    Attributes:
        metric: lm-eval's name of the metric, such as `exact_match`.
        filter: How the answer was taken from the output, such as `strict-match`.
        value: The mean over samples.
        standard_error: As lm-eval computes it; None with a single sample.
        samples: Number of problems.
    """

    metric: str
    filter: str
    value: float
    standard_error: float | None
    samples: int


@dataclass(frozen=True, slots=True)
class BenchmarkSample:
    """One problem under one filter.

    Attributes:
        doc_id: The problem's position in the data, from 0.
        filter: How the answer was taken from the output.
        target: The right answer.
        output: What the model wrote, up to the stop string.
        answer: What the filter took from it.
        score: The metric's value, 0 or 1.
    """

    doc_id: int
    filter: str
    target: str
    output: str
    answer: str
    score: float

    @property
    def correct(self) -> bool:
        """Whether the answer counts as right."""
        return self.score == 1.0


@dataclass(frozen=True, slots=True)
class BenchmarkResult:
    """One benchmark's figures with everything needed to repeat them.

    Attributes:
        name: Ours.
        task: lm-eval's task it builds on.
        task_version: lm-eval's version of that task.
        lm_eval_version: The engine's.
        shots: Number of solved examples in the prompt.
        max_new_tokens: Where an unfinished answer was cut.
        data: The file or the hub's data set.
        data_digest: SHA-256 of all its records, also where `limit` takes the first ones only.
        scores: Every metric under every filter.
        samples: Every problem under every filter.
    """

    name: str
    task: str
    task_version: str
    lm_eval_version: str
    shots: int
    max_new_tokens: int
    data: str
    data_digest: str
    scores: tuple[Score, ...]
    samples: tuple[BenchmarkSample, ...]


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Args:
        name: One of `BENCHMARKS`.

    Raises:
        EvaluationError: There is none; names the nearest.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    nearest = difflib.get_close_matches(name.lower(), BENCHMARKS, cutoff=0.4)
    raise EvaluationError(
        f"There is no benchmark named {name!r}.",
        key="tasks",
        expected=f"one of {', '.join(BENCHMARKS)}",
        hint=" or ".join(nearest) or None,
    )


def run_benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    data_file: Path | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    on_progress: OnProgress | None = None,
) -> BenchmarkResult:
    """The scores of a model on one benchmark, answers generated greedily.

    Nothing is fetched where `data_file` is given, and no file is written.

    Args:
        model: A causal language model, left in the mode it was in.
        tokenizer: Its tokenizer.
        name: One of `BENCHMARKS`.
        data_file: JSON lines with `question` and `answer`; None takes the hub's data.
        limit: Only the first problems; None for all.
        batch_size: Problems answered at a time.
        seed: For tasks that draw the examples in their prompt.
        on_progress: Told after each batch.

    Raises:
        EvaluationError: Unknown name, limit or batch size below 1, data that does not fit the benchmark, or a prompt
            that does not fit the model's context; all before the first answer.
    """
    benchmark = find_benchmark(name)
    for key, number in (("limit", limit), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise EvaluationError("A number of problems is too small.", key=key, expected="at least 1", actual=number)
    # Only here: lm-eval takes seconds to import.
    import lm_eval.evaluator

    from mftctl.evaluation import harness
    from mftctl.evaluation.inference import evaluation_mode
    from mftctl.evaluation.problems import fetch_problems, read_problems

    config = harness.task_config(benchmark.folder, benchmark.task)
    config.update(task=benchmark.name, num_fewshot=benchmark.shots)
    problems = (
        fetch_problems(config["dataset_path"], config["dataset_name"], config["test_split"])
        if data_file is None
        else read_problems(data_file)
    )
    with harness.quiet_libraries(), evaluation_mode(model):
        task = harness.LocalTask(config, problems)
        task.set_fewshot_seed(seed=seed)
        engine = harness.CheckedModel(model, tokenizer, batch_size=batch_size, on_progress=on_progress)
        outcome = lm_eval.evaluator.evaluate(engine, {"tasks": {benchmark.name: task}}, limit=limit)
    return _result(benchmark, problems, outcome, max_new_tokens=engine.max_gen_toks)


def _result(
    benchmark: Benchmark, problems: Problems, outcome: Mapping[str, Any], *, max_new_tokens: int
) -> BenchmarkResult:
    """lm-eval's outcome in our terms."""
    rows = outcome["samples"][benchmark.name]
    scores = []
    for key, value in outcome["results"][benchmark.name].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        error = outcome["results"][benchmark.name][f"{metric}_stderr,{filter_name}"]
        scores.append(
            Score(
                metric=metric,
                filter=filter_name,
                value=float(value),
                standard_error=None if error == "N/A" else float(error),
                samples=sum(row["filter"] == filter_name for row in rows),
            )
        )
    return BenchmarkResult(
        name=benchmark.name,
        task=benchmark.task,
        task_version=str(outcome["versions"][benchmark.name]),
        lm_eval_version=version("lm-eval"),
        shots=int(outcome["n-shot"][benchmark.name]),
        max_new_tokens=max_new_tokens,
        data=problems.source,
        data_digest=problems.digest,
        scores=tuple(scores),
        samples=tuple(
            BenchmarkSample(
                doc_id=int(row["doc_id"]),
                filter=row["filter"],
                target=str(row["target"]),
                output=row["resps"][0][0],
                answer=str(row["filtered_resps"][0]),
                score=float(row[row["metrics"][0]]),
            )
            for row in rows
        ),
    )
