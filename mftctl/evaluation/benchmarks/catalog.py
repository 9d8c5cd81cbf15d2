"""The available benchmarks, with the names used in the papers.

The module does not import torch, so that help and completion can list the benchmarks.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from mftctl.errors import EvaluationError
from mftctl.experiments.recipe import Prompts

TASKS_FOLDER = Path(__file__).parent / "tasks"
"""The folder of the benchmarks' YAML files, named after the benchmarks."""

Domain = Literal["math", "coding", "instruction", "general"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark used in the papers.

    Attributes:
        name: The name in `--tasks`, and of its file in `TASKS_FOLDER`.
        description: One line for help and reports.
        domain: The domain.
        shots: Number of few-shot examples in the prompt.
        runs_code: Whether model-written code is run, in a sandbox.
        in_olmes: Whether there is an OLMES form, in the folder `olmes` of `TASKS_FOLDER`.
    """

    name: str
    description: str
    domain: Domain
    shots: int = 0
    runs_code: bool = False
    in_olmes: bool = False


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        benchmark.name: benchmark
        for benchmark in (
            Benchmark("gsm8k", "grade-school maths, 8-shot", "math", shots=8, in_olmes=True),
            Benchmark("gsm8k_0shot", "grade-school maths, 0-shot", "math"),
            Benchmark("math", "competition maths, 4-shot", "math", shots=4, in_olmes=True),
            Benchmark("math_0shot", "competition maths, 0-shot", "math"),
            Benchmark("humaneval", "completion of a Python function", "coding", runs_code=True, in_olmes=True),
            Benchmark("humaneval_plus", "the same with many more tests", "coding", runs_code=True, in_olmes=True),
            Benchmark("mbpp", "a short Python function from a sentence", "coding", runs_code=True),
            Benchmark("mbpp_plus", "the same with many more tests", "coding", runs_code=True),
            Benchmark("humaneval_instruct", "a whole Python function from an instruction", "coding", runs_code=True),
            Benchmark("humaneval_plus_instruct", "the same with many more tests", "coding", runs_code=True),
            Benchmark("mbpp_instruct", "a short Python function from an instruction", "coding", runs_code=True),
            Benchmark("mbpp_plus_instruct", "the same with many more tests", "coding", runs_code=True),
            Benchmark("ifeval", "following of verifiable instructions", "instruction", in_olmes=True),
            Benchmark("alpaca_eval", "instruction following, compared by a judge", "instruction", in_olmes=True),
            Benchmark("mmlu", "multiple-choice questions from 57 subjects", "general"),
            Benchmark("bbh", "27 hard tasks, 3-shot chain of thought", "general", shots=3),
            Benchmark("tydiqa", "question answering from a passage, 9 languages, 1-shot", "general", shots=1),
            Benchmark("truthfulqa_mc2", "the probability of true answers", "general"),
        )
    }
)
"""Every benchmark by its name."""

_GROUPED = {
    "math": ("gsm8k", "math"),
    "coding": ("humaneval", "humaneval_plus", "mbpp", "mbpp_plus"),
    "instruction": ("ifeval", "alpaca_eval"),
    "general": ("mmlu", "gsm8k", "bbh", "tydiqa", "truthfulqa_mc2"),
}
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {f"group:{domain}": names for domain, names in _GROUPED.items()}
    | {domain: names for domain, names in _GROUPED.items() if domain not in BENCHMARKS}
)
"""Benchmarks by group name; `math` is the benchmark, `group:math` the group."""

_INSTRUCT = "_instruct"


def instruct_form(name: str) -> str:
    """The instruct form of a completion benchmark, or the same name if there is none.

    Args:
        name: A benchmark or lm-eval task.
    """
    return f"{name}{_INSTRUCT}" if f"{name}{_INSTRUCT}" in BENCHMARKS else name


def completion_form(name: str) -> str:
    """The benchmark whose problems and fields this one uses.

    Args:
        name: A benchmark or lm-eval task.
    """
    return name.removesuffix(_INSTRUCT) if name in BENCHMARKS else name


def expand_groups(names: Iterable[str]) -> tuple[str, ...]:
    """The named benchmarks and tasks, each once, with groups replaced by their members.

    Args:
        names: The values of `--tasks`.
    """
    return tuple(dict.fromkeys(member for name in names for member in GROUPS.get(name, (name,))))


def unknown_benchmark(name: str, others: Iterable[str] = ()) -> EvaluationError:
    """The error for an unknown name, with the closest matches.

    Args:
        name: The unknown name.
        others: Further names to search, such as lm-eval's own tasks.
    """
    nearest = difflib.get_close_matches(name.lower(), dict.fromkeys([*BENCHMARKS, *GROUPS, *others]), cutoff=0.6)
    return EvaluationError(
        f"There is no benchmark named {name!r}.",
        key="tasks",
        expected=f"one of {', '.join([*BENCHMARKS, *GROUPS])}, or an lm-eval task",
        hint=" or ".join(nearest) or None,
    )


def check_prompts(name: str, prompts: Prompts) -> None:
    """Checks that the benchmark has the requested form.

    Args:
        name: A benchmark or lm-eval task.
        prompts: The value of `--prompts`.

    Raises:
        EvaluationError: The benchmark does not have this form.
    """
    in_olmes = [known for known, benchmark in BENCHMARKS.items() if benchmark.in_olmes]
    if prompts == "olmes" and name not in in_olmes:
        raise EvaluationError(
            "This benchmark has no OLMES form.",
            key="eval.prompts",
            expected=f"one of {', '.join(in_olmes)}",
            actual=name,
            hint="use --prompts lm-eval for it",
        )
