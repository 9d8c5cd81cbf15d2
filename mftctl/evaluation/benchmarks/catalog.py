"""The benchmarks on offer, by the papers' names.

The module itself needs no torch, so that help and completion can name the benchmarks.
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
"""Where each benchmark's YAML file lies, under its name."""

Domain = Literal["math", "coding", "instruction", "general"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark of the papers.

    Attributes:
        name: The name given to `--tasks`, and that of its file in `TASKS_FOLDER`.
        description: One line for help and reports.
        domain: What it is about.
        shots: Number of solved examples in the prompt.
        runs_code: Whether what the model writes is run, in a sandbox.
        in_olmes: Whether there is a form of OLMES's, in the folder `olmes` of `TASKS_FOLDER`.
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
            Benchmark("gsm8k", "grade-school maths, 8 solved examples in the prompt", "math", shots=8, in_olmes=True),
            Benchmark("gsm8k_0shot", "grade-school maths, the question alone", "math"),
            Benchmark("math", "competition maths, 4 solved examples in the prompt", "math", shots=4, in_olmes=True),
            Benchmark("math_0shot", "competition maths, the problem alone", "math"),
            Benchmark("humaneval", "the rest of a Python function", "coding", runs_code=True, in_olmes=True),
            Benchmark("humaneval_plus", "the same with far more tests", "coding", runs_code=True, in_olmes=True),
            Benchmark("mbpp", "a short Python function from a sentence", "coding", runs_code=True),
            Benchmark("mbpp_plus", "the same with far more tests", "coding", runs_code=True),
            Benchmark("humaneval_instruct", "a whole Python function, asked for in words", "coding", runs_code=True),
            Benchmark("humaneval_plus_instruct", "the same with far more tests", "coding", runs_code=True),
            Benchmark("mbpp_instruct", "a short Python function, asked for in words", "coding", runs_code=True),
            Benchmark("mbpp_plus_instruct", "the same with far more tests", "coding", runs_code=True),
            Benchmark("ifeval", "instructions whose keeping can be checked", "instruction", in_olmes=True),
            Benchmark("alpaca_eval", "instructions, answers compared by a judge", "instruction", in_olmes=True),
            Benchmark("mmlu", "questions of 57 subjects, four answers each", "general"),
            Benchmark("bbh", "27 hard tasks, 3 solved examples with reasoning each", "general", shots=3),
            Benchmark("tydiqa", "an answer from a passage, 9 languages, 1 solved example", "general", shots=1),
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
"""Benchmarks by what a group of them is called; `math` alone is the benchmark, `group:math` the group."""

_INSTRUCT = "_instruct"


def instruct_form(name: str) -> str:
    """The benchmark that asks a chat model in words for what this one lets a base model complete, or the same.

    Args:
        name: A benchmark, or a task of lm-eval.
    """
    return f"{name}{_INSTRUCT}" if f"{name}{_INSTRUCT}" in BENCHMARKS else name


def completion_form(name: str) -> str:
    """The benchmark whose problems and fields this one has.

    Args:
        name: A benchmark, or a task of lm-eval.
    """
    return name.removesuffix(_INSTRUCT) if name in BENCHMARKS else name


def expand_groups(names: Iterable[str]) -> tuple[str, ...]:
    """The benchmarks and tasks meant, each once, groups replaced by their members.

    Args:
        names: As given to `--tasks`.
    """
    return tuple(dict.fromkeys(member for name in names for member in GROUPS.get(name, (name,))))


def unknown_benchmark(name: str, others: Iterable[str] = ()) -> EvaluationError:
    """The error for a name that is none, with the nearest names.

    Args:
        name: What was asked for.
        others: Further names to look among, lm-eval's own tasks.
    """
    nearest = difflib.get_close_matches(name.lower(), dict.fromkeys([*BENCHMARKS, *GROUPS, *others]), cutoff=0.6)
    return EvaluationError(
        f"There is no benchmark named {name!r}.",
        key="tasks",
        expected=f"one of {', '.join([*BENCHMARKS, *GROUPS])}, or a task of lm-eval",
        hint=" or ".join(nearest) or None,
    )


def check_prompts(name: str, prompts: Prompts) -> None:
    """Nothing, if the benchmark has that form.

    Args:
        name: A benchmark, or a task of lm-eval.
        prompts: As given to `--prompts`.

    Raises:
        EvaluationError: It has not.
    """
    in_olmes = [known for known, benchmark in BENCHMARKS.items() if benchmark.in_olmes]
    if prompts == "olmes" and name not in in_olmes:
        raise EvaluationError(
            "This benchmark has no form of OLMES's.",
            key="eval.prompts",
            expected=f"one of {', '.join(in_olmes)}",
            actual=name,
            hint="--prompts lm-eval for it",
        )
