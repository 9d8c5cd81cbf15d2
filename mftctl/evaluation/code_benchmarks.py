"""Benchmarks whose answers are programs: what is run of an answer, and how often it has to be right."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

FILTER = "tests"
"""How a score on tests is named, in the place of lm-eval's filter."""

Judge = Callable[[Sequence[tuple[str, str, str]]], Sequence[bool]]
"""Says of each program, with its tests and the function under test, whether it passes."""

_FENCED = re.compile(r"```(?:[pP]ython|py)?[^\S\n]*\n(.*?)(?:\n```|\Z)", re.DOTALL)


def code_config(config: Mapping[str, Any], judge: Judge, *, samples: int, temperature: float) -> dict[str, Any]:
    """A code task that runs what is written, all answers at once, and reports pass@1 and, with 10 samples, pass@10.

    Args:
        config: Of the task, for lm-eval.
        judge: Runs the programs.
        samples: Answers a problem.
        temperature: Of sampling; 0 for greedy answers.
    """
    tries = [k for k in (1, 10, 100) if k <= samples]

    def run_all(outputs: Sequence[Sequence[str]], problems: Sequence[Mapping[str, Any]]) -> list[list[str]]:
        pairs = [
            (program(problem, output), checks(problem), entry_point(problem))
            for written, problem in zip(outputs, problems, strict=True)
            for output in written
        ]
        verdicts = iter(judge(pairs))
        return [["passed" if next(verdicts) else "failed" for _ in written] for written in outputs]

    def scores(problem: Mapping[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
        verdicts = results[0]
        return {f"pass@{k}": pass_at_k(len(verdicts), verdicts.count("passed"), k) for k in tries}

    return {
        **config,
        "repeats": samples,
        "generation_kwargs": {
            **config["generation_kwargs"],
            "do_sample": temperature > 0,
            "temperature": temperature,
        },
        "filter_list": [{"name": FILTER, "filter": [{"function": "custom", "filter_fn": run_all}]}],
        "process_results": scores,
        "metric_list": [{"metric": f"pass@{k}", "aggregation": "mean", "higher_is_better": True} for k in tries],
    }


def program(problem: Mapping[str, Any], output: str) -> str:
    """The program that an output stands for.

    A fenced block is taken out of the text around it. A completion of a function that is given (HumanEval) gets the
    prompt in front, unless it defines the function itself: then only what comes before the function, its imports.

    Args:
        problem: With `prompt` and `entry_point` where a function is to be completed.
        output: What the model wrote.
    """
    block = _FENCED.search(output)
    code = block.group(1) if block else output
    if "entry_point" not in problem:
        return code
    prompt = str(problem["prompt"])
    definition = re.compile(rf"^def {re.escape(problem['entry_point'])}\b", re.MULTILINE)
    given = definition.search(prompt)
    if given is not None and definition.search(code):
        return prompt[: given.start()] + code
    return prompt + code


def checks(problem: Mapping[str, Any]) -> str:
    """The source of a problem's tests; what fails raises.

    Args:
        problem: Of HumanEval, with `test` and `entry_point`; of MBPP, with `test_list`; of MBPP+, with `test`.
    """
    if "entry_point" in problem:
        return f"{problem['test']}\n\ncheck({problem['entry_point']})\n"
    if "test" in problem:
        return str(problem["test"])
    return "\n".join([problem.get("test_setup_code") or "", *problem["test_list"]])


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
