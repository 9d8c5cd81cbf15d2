from __future__ import annotations

import subprocess
import sys

import pytest

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.catalog import BENCHMARKS, GROUPS, expand_groups, unknown_benchmark
from mftctl.evaluation.benchmarks.lm_eval_tasks import check_task


def test_groups_are_their_members_each_once() -> None:
    assert expand_groups(["group:math", "gsm8k", "instruction"]) == ("gsm8k", "math", "ifeval", "alpaca_eval")
    assert expand_groups(["math"]) == ("math",)
    assert expand_groups(["hellaswag"]) == ("hellaswag",)
    assert all(set(names) <= set(BENCHMARKS) for names in GROUPS.values())


@pytest.mark.parametrize("name", ["coding", "instruction", "general"])
def test_a_group_has_two_names_where_no_benchmark_has_one_of_them(name: str) -> None:
    assert GROUPS[name] == GROUPS[f"group:{name}"]


@pytest.mark.slow
def test_an_unknown_name_is_an_error_with_the_nearest() -> None:
    error = unknown_benchmark("gsmk8")
    assert "gsm8k" in str(error.hint)
    assert all(name in str(error.expected) for name in BENCHMARKS)
    with pytest.raises(EvaluationError, match="no benchmark named 'gsmk8'"):
        check_task("gsmk8")


def test_a_name_like_no_other_is_an_error_without_a_guess() -> None:
    assert unknown_benchmark("zzz").hint is None


@pytest.mark.slow
def test_the_names_are_there_without_torch() -> None:
    code = (
        "import sys; from mftctl.evaluation.benchmarks.catalog import BENCHMARKS; assert 'gsm8k' in BENCHMARKS;"
        "assert not {'torch', 'transformers', 'lm_eval', 'datasets'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_name_that_lm_eval_has_too_is_offered_once() -> None:
    assert unknown_benchmark("gsm9k", ["gsm8k", "other"]).hint == "gsm8k"
