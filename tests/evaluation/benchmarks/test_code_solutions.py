"""The benchmarks' own solutions pass their tests in the sandbox, and wrong ones fail."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mftctl.evaluation.benchmarks.code import checks, entry_point, program
from mftctl.evaluation.benchmarks.problems import read_problems
from mftctl.evaluation.sandbox.find import find_sandbox
from mftctl.evaluation.sandbox.judge import judge_programs
from mftctl.evaluation.sandbox.program import Program

WHOLE = {
    "humaneval": lambda problem: f"{problem['prompt']}{problem['canonical_solution']}",
    "humaneval_plus": lambda problem: f"{problem['prompt']}{problem['canonical_solution']}",
    "mbpp": lambda problem: problem["code"],
}
FORMS = {
    "whole": "{}",
    "after a comment": "# A solution.\n{}",
    "after an import": "from typing import List\n\n{}",
    "in a fence after a sentence": "Here is the function:\n\n```python\n{}\n```\n\nIt does what is asked.",
    "in a fence with a test of its own": "```python\n{}\n\nassert False\n```",
    "after thoughts": "<think>\nHm.\n</think>\n\n```python\n{}\n```",
}
SOURCES = {
    # Every Nth problem: running all of them took minutes, and all passed.
    "humaneval": ("humaneval/HumanEval.jsonl.gz", "canonical_solution", 8),
    "humaneval_plus": ("humanevalplus/HumanEvalPlus-OriginFmt.jsonl.gz", "canonical_solution", 20),
    "mbpp": ("mbpp/mbpp.jsonl", "code", 25),
}


def some_problems(folder: Path, name: str) -> list[dict[str, Any]]:
    file, _, step = SOURCES[name]
    problems = read_problems(folder / file, name).records
    own_builtin = [problem for problem in problems if problem.get("task_id") == 126]
    return [*problems[::step], *own_builtin]


def judged(problem: Mapping[str, Any], output: str) -> Program:
    return Program(program(problem, output), checks(problem), entry_point(problem))


def returning_nothing(problem: Mapping[str, Any], solution: str) -> str:
    """The solution with the body of the tested function replaced."""
    name = entry_point(problem)
    if "prompt" in problem:
        return "    return None\n"
    return f"{solution}\n\ndef {name}(*arguments, **keywords):\n    return None\n"


@pytest.mark.real
@pytest.mark.parametrize("name", SOURCES)
def test_own_solutions_pass_and_others_fail(real_data: Path, name: str) -> None:
    problems, field = some_problems(real_data, name), SOURCES[name][1]
    right = [judged(problem, problem[field]) for problem in problems]
    wrong = [judged(problem, returning_nothing(problem, problem[field])) for problem in problems]
    verdicts = judge_programs(find_sandbox(), [*right, *wrong])
    assert [verdict.outcome for verdict in verdicts[: len(right)]] == ["passed"] * len(right)
    assert not any(verdict.passed for verdict in verdicts[len(right) :])


def parsed(source: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(source)


@pytest.mark.real
@pytest.mark.parametrize("name", SOURCES)
def test_own_solutions_are_the_same_programs_in_every_form_of_an_answer(real_data: Path, name: str) -> None:
    """Every fifth, without running it: the program contains the solution and no other code with an effect."""
    for problem in read_problems(real_data / SOURCES[name][0], name).records[::5]:
        solution = WHOLE[name](problem)
        wanted = parsed(program(problem, solution))
        for form, text in FORMS.items():
            found = parsed(program(problem, text.format(solution)))
            said = [ast.dump(statement) for statement in found.body if not isinstance(statement, ast.ImportFrom)]
            asked = [ast.dump(statement) for statement in wanted.body if not isinstance(statement, ast.ImportFrom)]
            assert said == asked, (problem["task_id"], form)


@pytest.mark.real
def test_the_function_under_test_is_found_in_every_problem(real_data: Path) -> None:
    for problem in read_problems(real_data / SOURCES["mbpp"][0], "mbpp").records:
        assert re.search(rf"\b{entry_point(problem)}\s*\(", "\n".join(problem["test_list"]))
        assert entry_point(problem)
