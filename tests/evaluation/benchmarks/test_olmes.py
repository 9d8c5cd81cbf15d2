"""Benchmarks in OLMES's form: exact prompts, correct answers, and the mean over subjects."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import EvaluationError
from mftctl.evaluation.benchmarks.code import code_config, continued
from mftctl.evaluation.benchmarks.lm_eval_tasks import check_task, task_config
from mftctl.evaluation.benchmarks.local_task import build_task, quiet_libraries
from mftctl.evaluation.benchmarks.olmes import last_numbers, mean_of_subjects, olmes_maths_scores, require_subjects
from mftctl.evaluation.benchmarks.problems import Problems, read_problems
from mftctl.evaluation.benchmarks.result import BenchmarkResult
from mftctl.evaluation.benchmarks.run import run_benchmark
from mftctl.evaluation.inference import evaluation_mode
from mftctl.evaluation.lm.hf import ModelAnswers, WrittenAnswers
from mftctl.evaluation.lm.output_cache import OutputCache
from tests.conftest import build_llama, build_tokenizer
from tests.evaluation.benchmarks.test_ifeval import sentence_data  # noqa: F401 - a fixture

FUNCTION = {
    "task_id": "T/0",
    "prompt": 'def add(x):\n    """Add one."""\n',
    "entry_point": "add",
    "canonical_solution": "    return x + 1\n",
    "test": "def check(add):\n    assert add(1) == 2\n",
}
ASKED: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "Ann has 3 pens and buys 4. How many has she?", "answer": "3 + 4 = 7\n#### 7"},
    "math": {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "type": "Algebra"},
    "humaneval": FUNCTION,
    "humaneval_plus": FUNCTION,
    "ifeval": {
        "key": 1,
        "prompt": "Write two words.",
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
        "kwargs": [{}, {}],
    },
    "alpaca_eval": {"instruction": "Say 0.", "output": "0"},
}
OF_HUMANEVAL = "1af9ffc1d0f764ad483214f9fbd3418e18343246453bd330a5b7dd1f2756e8d1"
DIGESTS = {
    "gsm8k": "108303695a9f0a59bffc7efe28b4297d9d76f8a2df0d7d51376d2c7c62c49305",
    "math": "422b974c9e62454aaa40d45cd0746349284d80ac596fe830b18df85aeadfbb6c",
    "humaneval": OF_HUMANEVAL,
    "humaneval_plus": OF_HUMANEVAL,
    "ifeval": "499fe715f425ec19248ff8958fb28229b882e849466de405376a1359966a1e8a",
    "alpaca_eval": "fd2b6b03da70f172a0094344fc509f9f4b0352421b2b0317b4f1380bc4bb8668",
}
"""SHA-256 of the prompts for `ASKED`, put together by OLMES's own rule from its own examples, apart from this code."""

LENGTHS = {"gsm8k": 512, "math": 1024, "humaneval": 512, "humaneval_plus": 512, "ifeval": 1280, "alpaca_eval": 8192}


def written_run(name: str, records: list[dict[str, Any]], outputs: list[str], tmp_path: Path) -> BenchmarkResult:
    """The result of saved outputs, truncated at the stop strings."""
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    problems = read_problems(file, name)
    config = task_config(name, "olmes")
    if name.startswith("humaneval"):
        config = code_config(config, lambda trials: [passes(trial) for trial in trials], samples=1, temperature=0.0)
    with quiet_libraries():
        task = build_task(config, problems, is_local=True)
    answers = WrittenAnswers([[output] for output in outputs])
    return run_benchmark(answers, task, problems, limit=len(outputs), chat_template=False, seed=0)


def passes(trial: Any) -> bool:
    """Runs a trial of our own solutions, which needs no sandbox."""
    names: dict[str, Any] = {}
    exec(f"{trial.code}\n{trial.test}", names)
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", DIGESTS)
def test_a_prompt_is_exactly_that_of_olmes(name: str, request: pytest.FixtureRequest) -> None:
    if name == "ifeval":
        request.getfixturevalue("sentence_data")
    config = task_config(name, "olmes")
    with quiet_libraries():
        task = build_task(config, Problems((ASKED[name],), "p.jsonl", ""), is_local=True)
        task.build_all_requests(limit=None)
    prompt, settings = task.instances[0].args
    assert hashlib.sha256(prompt.encode()).hexdigest() == DIGESTS[name]
    assert (settings["max_gen_toks"], settings["do_sample"]) == (LENGTHS[name], False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "output", "metric"),
    [
        ("gsm8k", " She has 3 + 4 = 7. So the answer is 7.\n\nQuestion: And 5?", "exact_match,last-number"),
        ("math", " It is $\\boxed{2}$.\n\nProblem:\n3", "flexible,none"),
        ("humaneval", f"{FUNCTION['canonical_solution']}\n```\n\nDone.", "pass@1,tests"),
        ("humaneval_plus", f"{FUNCTION['prompt']}{FUNCTION['canonical_solution']}\n```", "pass@1,tests"),
        ("ifeval", "Here, then:\nall of it", "inst_level_loose_acc,none"),
    ],
)
def test_a_right_answer_scores_one_on_the_metric_that_comes_first(
    name: str, output: str, metric: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if name == "ifeval":
        request.getfixturevalue("sentence_data")
    first = written_run(name, [ASKED[name]], [output], tmp_path).scores[0]
    assert (first.name, first.value) == (metric, 1.0)


def test_the_last_number_counts_digit_by_digit() -> None:
    def taken(output: str, gold: str = "1,200") -> str:
        return last_numbers([[output]], [{"answer": f"Why.\n#### {gold}"}])[0]

    assert taken("2 + 2. So the answer is $1,200.") == taken("1200") == taken("It is 1,200") == "1,200"
    assert taken("1200, or 7") == "7"
    assert taken("1200.00") == "1200.00"
    assert taken("None at all") == "None at all"
    assert taken("5", gold="-5") == taken("-5", gold="-5") == "-5"
    assert taken("2.5", gold="-2.5") == "2.5"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gold", "output", "strict", "flexible"),
    [
        ("2", "Final Answer: The final answer is $2$. I hope it is correct.", 1, 1),
        ("2", r"So $\boxed{2}$ it is.", 0, 1),
        ("2", "With $x$ it is $2$ then.", 0, 1),
        ("2", "2", 0, 1),
        ("2", r"$2$, or $\boxed{3}$", 0, 0),
        ("2", r"\boxed\frac{1}{2}", 0, 0),
        (r"\frac{1}{2}", "$0.5$ and $0.5$", 0, 1),
        ("(3,4)", "$(3, 4)$", 0, 1),
        ("2", r"\fbox{2}", 0, 0),
        ("2", "", 0, 0),
    ],
)
def test_a_maths_answer_is_taken_from_the_likeliest_place(
    gold: str, output: str, strict: float, flexible: float
) -> None:
    scores = olmes_maths_scores({"solution": f"So it is $\\boxed{{{gold}}}$."}, [output])
    assert scores == {"strict": strict, "flexible": flexible}


@pytest.mark.slow
def test_every_subject_of_math_counts_as_much_as_any_other(tmp_path: Path) -> None:
    records = [{**ASKED["math"], "type": subject} for subject in ("Algebra", "Algebra", "Algebra", "Geometry")]
    plain = written_run("math", records, ["$2$", "$3$", "$3$", "$2$"], tmp_path)
    assert plain.scores[0].value == 0.5
    meant = mean_of_subjects(plain, [record["type"] for record in records])
    assert [(score.name, score.value) for score in meant.scores] == [
        ("flexible,none", pytest.approx((1 / 3 + 1) / 2)),
        ("strict,none", 0.0),
    ]
    assert (meant.scores[0].standard_error or 0) > 0
    sums = sum(sample.scores["flexible,none"] for sample in meant.samples)
    weights = sum(sample.weights["flexible,none"] for sample in meant.samples)
    assert sums / weights == pytest.approx(meant.scores[0].value)
    assert weights == pytest.approx(4)


def test_a_problem_of_math_500_needs_its_subject(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    without = {key: value for key, value in ASKED["math"].items() if key != "type"}
    file.write_text(f"{json.dumps({**without, 'subject': 'Geometry'})}\n{json.dumps(without)}\n")
    problems = read_problems(file, "math")
    assert problems.records[0]["type"] == "Geometry"
    with pytest.raises(EvaluationError, match="the subject of every problem") as caught:
        require_subjects(problems.records, problems.source)
    assert (caught.value.path, caught.value.key) == (f"{file}#1", "type")


def test_words_around_a_function_are_not_part_of_the_program() -> None:
    ends = task_config("humaneval", "olmes")["generation_kwargs"]["until"]
    words = "Sure:\n```python\ndef add(x):\n    return x + 1\n```"
    assert continued(FUNCTION, words, ends) == f"{FUNCTION['prompt']}Sure:"
    assert continued(FUNCTION, "    return x\n\nprint(1)", ends) == f"{FUNCTION['prompt']}    return x\n"
    with pytest.raises(SyntaxError):
        compile(continued(FUNCTION, words, ends), "", "exec")


def test_a_benchmark_without_that_form_is_an_error() -> None:
    check_task("gsm8k", "olmes")
    with pytest.raises(EvaluationError, match="no OLMES form") as caught:
        check_task("mbpp", "olmes")
    assert (caught.value.key, caught.value.actual) == ("eval.prompts", "mbpp")
    with pytest.raises(EvaluationError, match="no OLMES form"):
        task_config("gsm8k_0shot", "olmes")


@pytest.mark.slow
@pytest.mark.parametrize(("context", "prompt_words"), [(64, 1), (64, 40)])
def test_answers_of_alpaca_eval_use_the_context_left_by_the_longest_prompt(context: int, prompt_words: int) -> None:
    model, tokenizer = build_llama(layers=1, max_position_embeddings=context), build_tokenizer()
    seen: list[int] = []
    plain = model.generate

    def generate(*arguments: Any, **options: Any) -> Any:
        seen.append(model.generation_config.max_new_tokens)
        return plain(*arguments, **options)

    model.generate = generate  # type: ignore[method-assign]
    answers = ModelAnswers(
        model, tokenizer, batch_size=2, max_new_tokens=None, seed=0, cache=OutputCache(), on_progress=None
    )
    records = ({"instruction": "a"}, {"instruction": "a" * prompt_words})
    problems = Problems(records, "p.jsonl", "")
    with quiet_libraries(), evaluation_mode(model):
        task = build_task(task_config("alpaca_eval", "olmes"), problems, is_local=True)
        run_benchmark(answers, task, problems, limit=None, chat_template=False, seed=0)
    longest = len(answers.tok_encode(records[1]["instruction"]))
    assert seen == [context - longest]


def test_a_prompt_that_fills_the_context_is_an_error() -> None:
    model = build_llama(layers=1, max_position_embeddings=16)
    answers = ModelAnswers(
        model, build_tokenizer(), batch_size=2, max_new_tokens=None, seed=0, cache=OutputCache(), on_progress=None
    )
    problems = Problems(({"instruction": "a b " * 40},), "p.jsonl", "")
    with quiet_libraries(), evaluation_mode(model):
        task = build_task(task_config("alpaca_eval", "olmes"), problems, is_local=True)
        with pytest.raises(EvaluationError, match="exceed the model's context"):
            run_benchmark(answers, task, problems, limit=None, chat_template=False, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["\\boxed{" + "1" * 10**6 + "}", "1," * 10**5, "$" + "9^" * 10**5 + "9$"])
def test_an_answer_too_long_to_be_compared_is_wrong_at_once(text: str) -> None:
    start = time.process_time()
    assert olmes_maths_scores({"solution": "\\boxed{1}"}, [text]) == {"flexible": 0.0, "strict": 0.0}
    assert time.process_time() - start < 10
