"""Benchmarks whose answers are programs: what is run of an answer, and how often it has to be right."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mftctl.evaluation.benchmarks.evalplus import comparison_source
from mftctl.evaluation.benchmarks.trials import Trial, run_trials
from mftctl.evaluation.benchmarks.written_programs import Function, written_program
from mftctl.evaluation.lm.stop_strings import cut_at
from mftctl.progress import Listener, Progress
from mftctl.runtime.process_group import from_first

if TYPE_CHECKING:
    pass

FILTER = "tests"
"""How a score on tests is named, in the place of lm-eval's filter."""

Judge = Callable[[Sequence[Trial]], Sequence[bool]]
"""Says of each answer whether it passes."""

_COMPUTED = re.compile(r"^    assertion\((\w+)\(\*inp\), ref_func\(\*inp\), (.+)\)$", re.MULTILINE)
"""How a published test of MBPP+ compares with a solution of its own, where the results would fill the file."""

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
    """A code task that runs what is written, all answers at once, and reports pass@1 and, with 10 samples, pass@10.

    Args:
        config: Of the task, for lm-eval.
        judge: Runs the programs.
        samples: Answers a problem.
        temperature: Of sampling; 0 for greedy answers.
        written: Whether the answers were written before: they may be whole programs, which nothing is to cut.
        continues: Whether an answer stands behind the prompt whatever it looks like, as in OLMES.
    """
    tries = [k for k in (1, 10, 100) if k <= samples]
    ends = list(config["generation_kwargs"].get("until") or [])
    program_of = continued if continues else program

    def run_all(outputs: Sequence[Sequence[str]], problems: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        trials = [
            Trial(program_of(problem, output, ends), checks(problem), entry_point(problem), reference(problem))
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


def program(problem: Mapping[str, Any], output: str, ends: Sequence[str] = ()) -> str:
    """The program that an output stands for: a whole one, or the rest of the function that the prompt begins.

    Args:
        problem: With `prompt` and `entry_point` where a function is to be completed.
        output: What the model wrote.
        ends: What ends the rest of a function.
    """
    named = "entry_point" in problem or "code" in problem
    function = Function(entry_point(problem) if named else "", str(problem.get("prompt", "")))
    return written_program(output, function, ends)


def continued(problem: Mapping[str, Any], output: str, ends: Sequence[str] = ()) -> str:
    """The output behind the function's start, up to what ends it.

    A whole function is one more definition there, and the one that counts; words around it are an error of syntax.

    Args:
        problem: With its `prompt`.
        output: What the model wrote.
        ends: What ends it.

    Source: OLMES, `oe_eval/tasks/oe_eval_tasks/codex_humaneval.py`.
    """
    return f"{problem['prompt']}{cut_at(output, ends)}"


def checks(problem: Mapping[str, Any]) -> str:
    """The source of a problem's tests; what fails raises.

    Args:
        problem: Of HumanEval, with `prompt`, `test` and `entry_point`; of MBPP, with `test_list`; of MBPP+, with
            `test`. One of EvalPlus's release files has `reference`, with which its results are compared.
    """
    if "test" not in problem:
        return "\n".join([problem.get("test_setup_code") or "", *problem["test_list"]])
    test, changed = _COMPUTED.subn(_ONLY_WHAT_CAN_CROSS, problem["test"])
    if "prompt" in problem:
        test = f"{_helpers(problem)}{test}\n\ncheck({problem['entry_point']})\n"
    return f"{comparison_source()}\n\n{test}" if changed or problem.get("reference") else test


def _helpers(problem: Mapping[str, Any]) -> str:
    """What the prompt defines in front of the function, for the test's own use.

    HumanEval/32, 38 and 50 test with functions of the prompt: taken from the answer, they would find anything right.
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
    """A program that solves the problem, or nothing where none is known.

    Args:
        problem: With `canonical_solution`, the function's rest, or the solution `code`.
    """
    if "prompt" in problem:
        rest = problem.get("canonical_solution")
        return f"{problem['prompt']}{rest}" if rest else ""
    return str(problem.get("code", ""))


def entry_point(problem: Mapping[str, Any]) -> str:
    """The name of the function under test, of those in the reference solution the last that the tests name.

    Args:
        problem: With `entry_point`, or with the solution `code`.
    """
    if "entry_point" in problem:
        return str(problem["entry_point"])
    test = checks(problem)
    defined = re.findall(r"^def (\w+)", problem["code"], re.MULTILINE)
    return next((name for name in reversed(defined) if re.search(rf"\b{name}\b", test)), "")


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that one of k samples is right, without bias: `1 - C(n - c, k) / C(n, k)`.

    Args:
        samples: Number of samples n, at least k.
        correct: Those that pass, c.
        k: Number drawn.

    Source: Chen et al. (2021), "Evaluating large language models trained on code", equation 1.
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def sandboxed_judge(task: str, *, unsafe: bool, listener: Listener) -> Callable[[Sequence[Trial]], list[bool]]:
    """Runs answers on their tests in a sandbox that was tried out first.

    Args:
        task: Named in the error.
        unsafe: Whether to go on without a sandbox.
        listener: Receives progress updates.

    Raises:
        EvaluationError: No sandbox holds on this machine.
    """
    from mftctl.evaluation.sandbox.find import find_sandbox

    # Found before the first answer is generated: without one the task refuses to run.
    sandbox = find_sandbox(unsafe=unsafe)
    (listener.note if sandbox.kind == "bubblewrap" else listener.warn)(f"{task}: {sandbox.line}")

    def judge(trials: Sequence[Trial]) -> list[bool]:
        def run_all() -> str:
            """Runs them on all cores, and so in one process for all."""
            verdicts = run_trials(
                sandbox,
                trials,
                on_progress=lambda done, total: listener.progress(Progress(f"running {task}", done, total)),
            )
            return json.dumps([verdict.passed for verdict in verdicts])

        passed: list[bool] = json.loads(from_first(run_all))
        return passed

    return judge
