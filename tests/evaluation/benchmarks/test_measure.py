"""Benchmarks in the eval workflow: what is saved, what is resumed, and scoring of saved outputs without a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mftctl.errors import ConfigError, EvaluationError, MftError
from mftctl.evaluation.benchmarks import alpaca_judge, measure
from mftctl.evaluation.lm.hf import ModelAnswers
from mftctl.experiments.recipe import EvalOptions, Recipe
from mftctl.experiments.run_folder import Run
from mftctl.progress import Listener, Silence
from mftctl.workflows.eval import evaluate
from tests.workflow_fixtures import make_recipe, open_run

FUNCTIONS = [
    {
        "task_id": f"T/{n}",
        "prompt": f"def add_{n}(x):\n",
        "entry_point": f"add_{n}",
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(f):\n    assert f(1) == {1 + n}\n",
    }
    for n in range(4)
]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def scored(
    workspace: Path, tmp_path: Path, listener: Listener | None = None, **options: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The data set of the only task, and its samples."""
    recipe = make_recipe(workspace, test_data=[], **{f"eval__{key}": value for key, value in options.items()})
    run, source = open_run(tmp_path, "eval", recipe)
    (dataset,) = evaluate(recipe, source, run, listener or Silence()).document()["datasets"]
    return dataset, [json.loads(line) for line in (run.folder / dataset["samples"]).read_text().splitlines()]


@pytest.mark.slow
def test_saved_programs_are_run_and_scored_without_a_model(workspace: Path, tmp_path: Path) -> None:
    written = [{"task_id": record["task_id"], "completion": record["canonical_solution"]} for record in FUNCTIONS]
    written[2]["completion"] = "    return x\n"
    dataset, rows = scored(
        workspace,
        tmp_path,
        tasks=["humaneval"],
        task_data={"humaneval": write(tmp_path / "problems.jsonl", FUNCTIONS)},
        predictions=write(tmp_path / "written.jsonl", written),
    )
    (metric,) = dataset["metrics"]
    assert (metric["name"], metric["value"], metric["samples"]) == ("pass@1,tests", 0.75, 4)
    assert [row["scores"]["pass@1,tests"] for row in rows] == [1, 1, 0, 1]
    assert [row["task_id"] for row in rows] == ["T/0", "T/1", "T/2", "T/3"]
    [completions] = tmp_path.rglob("humaneval.completions.jsonl")
    assert completions.read_text() == (tmp_path / "written.jsonl").read_text()


@pytest.mark.slow
def test_ten_samples_per_problem_give_pass_at_ten(workspace: Path, tmp_path: Path) -> None:
    written = [{"task_id": "T/0", "outputs": ["    return x\n"] * 9 + ["    return x + 0\n"]}]
    right = FUNCTIONS[1]["canonical_solution"]
    written.append({"task_id": "T/1", "outputs": [right] * 2 + ["    return x\n"] * 8})
    dataset, _ = scored(
        workspace,
        tmp_path,
        tasks=["humaneval"],
        task_data={"humaneval": write(tmp_path / "problems.jsonl", FUNCTIONS[:2])},
        predictions=write(tmp_path / "written.jsonl", written),
    )
    assert {metric["name"]: metric["value"] for metric in dataset["metrics"]} == pytest.approx(
        {"pass@1,tests": (1.0 + 0.2) / 2, "pass@10,tests": 1.0}
    )


@pytest.mark.slow
def test_saved_samples_can_be_scored_again(workspace: Path, tmp_path: Path) -> None:
    problems = write(tmp_path / "p.jsonl", [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(3)])
    options = {"tasks": ["gsm8k_0shot"], "task_data": {"gsm8k_0shot": problems}, "max_new_tokens": 5}
    first, rows = scored(workspace, tmp_path / "a", **options, save_samples=True)
    assert rows[0]["prompt"] == "Q: 0+1?\nA:"
    again, _ = scored(workspace, tmp_path / "b", **options, predictions=write(tmp_path / "w.jsonl", rows))
    assert again["metrics"] == first["metrics"]
    assert first["generated_tokens"] > 0 == again["generated_tokens"]
    assert first["digest"] == again["digest"]


@pytest.mark.slow
def test_a_chat_template_is_applied_to_the_prompt_and_named(workspace: Path, tmp_path: Path) -> None:
    problems = write(tmp_path / "p.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    options = {"tasks": ["gsm8k_0shot"], "task_data": {"gsm8k_0shot": problems}, "max_new_tokens": 5}
    plain, _ = scored(workspace, tmp_path / "a", **options)
    chat, rows = scored(workspace, tmp_path / "b", **options, chat_template=True, save_samples=True)
    assert rows[0]["prompt"] != "Q: 1+1?\nA:"
    assert "1+1?" in rows[0]["prompt"]
    assert (plain["chat_template"], chat["chat_template"]) == (False, True)
    assert plain["digest"] != chat["digest"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["humaneval", "humaneval_plus"])
def test_a_chat_model_writes_a_whole_function_without_truncation(workspace: Path, tmp_path: Path, task: str) -> None:
    options = {"task_data": {task: write(tmp_path / "p.jsonl", FUNCTIONS[:1])}, "max_new_tokens": 5}
    options |= {"tasks": [task], "save_samples": True}
    plain, rows = scored(workspace, tmp_path / "a", **options)
    chat, asked = scored(workspace, tmp_path / "b", **options, chat_template=True)
    assert rows[0]["prompt"] == FUNCTIONS[0]["prompt"]
    assert "Answer with the whole function" in asked[0]["prompt"]
    assert FUNCTIONS[0]["prompt"] in asked[0]["prompt"]
    assert (plain["name"], plain["task"]) == (task, task)
    assert (chat["name"], chat["task"]) == (task, f"{task}_instruct")
    assert chat["digest"].endswith(":chat, instruct:5 tokens")
    prepared = measure.prepare_benchmark(task, EvalOptions(**options, chat_template=True), Silence())
    assert prepared.task.config.generation_kwargs["until"] == []


@pytest.mark.slow
@pytest.mark.parametrize("task", ["humaneval", "humaneval_instruct"])
def test_saved_whole_functions_are_correct_in_every_form(workspace: Path, tmp_path: Path, task: str) -> None:
    whole = ["{}", "# It adds.\n{}", "Here it is:\n\n```python\nfrom typing import List\n\n\n{}```\nDone.", "```\n{}"]
    solutions = [f"{record['prompt']}{record['canonical_solution']}" for record in FUNCTIONS]
    for solution, value in ((solutions, 1.0), ([text.replace("x +", "1 - x +") for text in solutions], 0.0)):
        written = [
            {"task_id": record["task_id"], "solution": form.format(text)}
            for record, form, text in zip(FUNCTIONS, whole, solution, strict=True)
        ]
        dataset, _ = scored(
            workspace,
            tmp_path / str(value),
            tasks=[task],
            task_data={task: write(tmp_path / "problems.jsonl", FUNCTIONS)},
            predictions=write(tmp_path / "written.jsonl", written),
        )
        assert dataset["metrics"][0]["value"] == value


MBPP = {
    "task_id": 1,
    "text": "Add one.",
    "code": "def add(x):\n    return x + 1\n",
    "test_list": ["assert add(1) == 2"],
}


@pytest.mark.slow
def test_mbpp_asked_of_a_chat_model_and_answers_with_comments(workspace: Path, tmp_path: Path) -> None:
    problems = write(tmp_path / "p.jsonl", [MBPP])
    for task in ("mbpp", "mbpp_instruct"):
        written = write(tmp_path / "w.jsonl", [{"task_id": 1, "output": f"import math\n# It adds.\n{MBPP['code']}"}])
        dataset, _ = scored(workspace, tmp_path / task, tasks=[task], task_data={task: problems}, predictions=written)
        assert dataset["metrics"][0]["value"] == 1.0
    options = {"tasks": ["mbpp_instruct"], "task_data": {"mbpp_instruct": problems}, "max_new_tokens": 5}
    _, rows = scored(workspace, tmp_path / "m", **options, save_samples=True)
    assert rows[0]["prompt"].startswith("Add one.\n\nThe function has to pass these tests:")
    assert "assert add(1) == 2" in rows[0]["prompt"]


def test_gsm8ks_own_form_is_correct_besides_lm_evals(workspace: Path, tmp_path: Path) -> None:
    problems = write(tmp_path / "p.jsonl", [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(2)])
    written = write(tmp_path / "w.jsonl", [{"id": 0, "output": "0+1=1\n#### 1"}, {"id": 1, "output": "#### 3"}])
    dataset, _ = scored(
        workspace, tmp_path, tasks=["gsm8k_0shot"], task_data={"gsm8k_0shot": problems}, predictions=written
    )
    assert {metric["name"]: metric["value"] for metric in dataset["metrics"]} == {
        "exact_match,strict-match": 0.0,
        "exact_match,flexible-extract": 0.5,
        "exact_match,marked-match": 0.5,
    }


class Warnings(Silence):
    """A listener that collects warnings."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def warn(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.slow
def test_predictions_that_are_not_text_fail_only_their_problems(workspace: Path, tmp_path: Path) -> None:
    """A lone surrogate, which JSON can express, used to end the run after all answers were judged."""
    written = [{"task_id": record["task_id"], "completion": record["canonical_solution"]} for record in FUNCTIONS]
    written[0]["completion"] += "    # \ud800"
    written[3]["completion"] = "\udfff"
    listener = Warnings()
    _, rows = scored(
        workspace,
        tmp_path,
        listener,
        tasks=["humaneval"],
        task_data={"humaneval": write(tmp_path / "problems.jsonl", FUNCTIONS)},
        predictions=write(tmp_path / "written.jsonl", written),
    )
    assert [row["scores"]["pass@1,tests"] for row in rows] == [0, 1, 1, 0]
    (text,) = [text for text in listener.texts if "surrogate" in text]
    assert text.endswith("those for T/0, T/3.")


@pytest.mark.slow
def test_formulas_that_take_too_long_are_named(workspace: Path, tmp_path: Path) -> None:
    problems = [
        {"problem": f"What is {n}?", "solution": f"$\\boxed{{{n}}}$", "level": "Level 1", "type": "Algebra"}
        for n in range(8)
    ]
    written = [{"id": n, "output": "\\boxed{" + "1" * 10**5 + "}" if n else "\\boxed{0}"} for n in range(8)]
    listener = Warnings()
    _, rows = scored(
        workspace,
        tmp_path,
        listener,
        tasks=["math"],
        task_data={"math": write(tmp_path / "problems.jsonl", problems)},
        predictions=write(tmp_path / "written.jsonl", written),
    )
    assert [row["scores"]["flexible,none"] for row in rows] == [1] + [0] * 7
    text = next(text for text in listener.texts if "500 characters" in text)
    assert text.endswith("those to 1, 2, 3, 4, 5 and 2 more.")


def judge_alpaca(
    workspace: Path, tmp_path: Path, outputs: list[str], prompts: str = "lm-eval"
) -> tuple[Run, dict[str, Any], list[str]]:
    """An evaluation of saved outputs, with its only data set and its warnings."""
    tmp_path.mkdir(exist_ok=True)
    asked = [
        {"instruction": f"Say {n}.", "output": f"reference {n}", "generator": "gpt4", "dataset": "helpful_base"}
        for n in range(len(outputs))
    ]
    recipe = make_recipe(
        workspace,
        test_data=[],
        eval__tasks=["alpaca_eval"],
        eval__prompts=prompts,
        eval__task_data={"alpaca_eval": write(tmp_path / "p.jsonl", asked)},
        eval__predictions=write(tmp_path / "w.jsonl", [{"id": n, "output": text} for n, text in enumerate(outputs)]),
    )
    run, source = open_run(tmp_path, "eval", recipe)
    listener = Warnings()
    (dataset,) = evaluate(recipe, source, run, listener).document()["datasets"]
    return run, dataset, listener.texts


def test_alpaca_eval_without_a_key_keeps_the_answers_and_names_the_missing_key(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_API_KEYS", "OPENAI_CLIENT_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)
    run, dataset, warnings = judge_alpaca(workspace, tmp_path, ["hi"])
    (entry,) = json.loads((run.folder / "alpaca_eval.json").read_text())
    model = run.record.inputs["model"]
    assert entry == {"dataset": "helpful_base", "instruction": "Say 0.", "output": "hi", "generator": model}
    assert [metric["name"] for metric in dataset["metrics"]] == ["characters,none"]
    (warning,) = warnings
    assert "needs an API key (OPENAI_API_KEY)." in warning
    assert f"--predictions {run.folder / 'alpaca_eval.jsonl'}" in warning


def test_alpaca_eval_with_a_judge_has_its_win_rate(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = [0.25, None, 0.75]
    monkeypatch.setattr(alpaca_judge, "what_is_missing", list)
    monkeypatch.setattr(alpaca_judge, "win_shares", lambda answers, references, cache: shares[: len(answers)])
    run, dataset, warnings = judge_alpaca(workspace, tmp_path, ["a", "b", "c"])
    win_rate = dataset["metrics"][0]
    assert (win_rate["name"], win_rate["value"], win_rate["samples"]) == ("win_rate,judge", 0.5, 2)
    assert win_rate["standard_error"] == pytest.approx(0.25)
    rows = [json.loads(line) for line in (run.folder / dataset["samples"]).read_text().splitlines()]
    assert [row["scores"].get("win_rate,judge") for row in rows] == shares
    assert "no verdict on 1 of 3" in warnings[0]


@pytest.mark.slow
def test_the_olmes_form_is_used_and_recorded_without_bos(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    class Answers(ModelAnswers):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            begun.append(self.add_bos_token)

    monkeypatch.setattr(measure, "ModelAnswers", Answers)
    options: dict[str, Any] = {"tasks": ["humaneval"], "max_new_tokens": 5, "save_samples": True}
    options["task_data"] = {"humaneval": write(tmp_path / "p.jsonl", FUNCTIONS[:1])}
    plain, _ = scored(workspace, tmp_path / "a", **options)
    olmes, rows = scored(workspace, tmp_path / "b", **options, prompts="olmes")
    assert rows[0]["prompt"] == f"{FUNCTIONS[0]['prompt']}Here is the completed function:\n\n```python\n"
    assert (olmes["name"], olmes["task"]) == ("humaneval", "humaneval")
    assert (plain["prompts"], olmes["prompts"]) == ("lm-eval", "olmes")
    assert olmes["digest"] == plain["digest"].replace(":all:", ":all:olmes:")
    assert begun == [None, False]


@pytest.mark.slow
def test_olmes_takes_the_mean_of_maths_subjects_and_needs_them(workspace: Path, tmp_path: Path) -> None:
    subjects = ["Algebra", "Algebra", "Geometry"]
    problems = [{"problem": f"{n}?", "solution": f"$\\boxed{{{n}}}$", "type": s} for n, s in enumerate(subjects)]
    options = {"tasks": ["math"], "task_data": {"math": write(tmp_path / "p.jsonl", problems)}, "prompts": "olmes"}
    options["predictions"] = write(tmp_path / "w.jsonl", [{"id": n, "output": " $0$"} for n in range(3)])
    dataset, rows = scored(workspace, tmp_path / "a", **options)
    assert (dataset["metrics"][0]["name"], dataset["metrics"][0]["value"]) == ("flexible,none", pytest.approx(0.25))
    assert [row["weights"]["flexible,none"] for row in rows] == [0.75, 0.75, 1.5]
    del problems[1]["type"]
    write(tmp_path / "p.jsonl", problems)
    with pytest.raises(EvaluationError, match="the subject of every problem"):
        scored(workspace, tmp_path / "b", **options)


@pytest.mark.parametrize("changes", [{"tasks": ["mbpp"]}, {"tasks": ["gsm8k"], "chat_template": True}])
def test_olmes_with_unsupported_settings(workspace: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(MftError, match=r"no OLMES form|no chat template"):
        scored(workspace, tmp_path, **changes, prompts="olmes")


def test_a_length_controlled_win_rate_comes_first_or_its_absence_is_reported(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alpaca_judge, "what_is_missing", list)
    monkeypatch.setattr(alpaca_judge, "win_shares", lambda answers, references, cache: [0.25, 0.75])
    _, dataset, warnings = judge_alpaca(workspace, tmp_path, ["a", "b"], prompts="olmes")
    assert [metric["name"] for metric in dataset["metrics"]] == ["win_rate,judge", "characters,none"]
    assert "only for AlpacaEval's own instructions" in warnings[0]
    monkeypatch.setattr(alpaca_judge, "length_controlled", lambda *given: [0.5, 0.75])
    _, dataset, warnings = judge_alpaca(workspace, tmp_path / "again", ["a", "b"], prompts="olmes")
    first = dataset["metrics"][0]
    assert (first["name"], first["value"], warnings) == ("length_controlled_win_rate,judge", 0.625, [])


def test_several_samples_of_a_task_without_code(workspace: Path, tmp_path: Path) -> None:
    problems = write(tmp_path / "p.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    with pytest.raises(EvaluationError, match="several samples"):
        scored(
            workspace,
            tmp_path,
            tasks=["gsm8k"],
            task_data={"gsm8k": problems},
            samples=2,
            temperature=0.8,
        )


def test_several_greedy_samples() -> None:
    with pytest.raises(ValueError, match="would be identical"):
        Recipe(eval={"samples": 10})


@pytest.mark.parametrize("tasks", [[], ["gsm8k", "humaneval"]])
def test_predictions_are_for_one_task(workspace: Path, tmp_path: Path, tasks: list[str]) -> None:
    recipe = make_recipe(workspace, eval__tasks=tasks, eval__predictions="w.jsonl")
    run, source = open_run(tmp_path, "eval", recipe)
    with pytest.raises(ConfigError, match="exactly one benchmark"):
        evaluate(recipe, source, run, Silence())


def test_predictions_that_are_missing(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="does not exist") as caught:
        scored(workspace, tmp_path, tasks=["gsm8k"], predictions="none.jsonl")
    assert caught.value.path == "none.jsonl"


def vllm_recipe(workspace: Path, tmp_path: Path, **changes: Any) -> Recipe:
    problems = write(tmp_path / "p.jsonl", [{"question": "1+1?", "answer": "#### 2"}])
    options = {"engine": "vllm", "tasks": ["gsm8k_0shot"], "task_data": {"gsm8k_0shot": problems}}
    return make_recipe(workspace, **{"test_data": [], "eval": options, **changes})


def test_vllm_that_is_not_installed(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mftctl.evaluation.engine_checks.find_spec", lambda name: None)
    recipe = vllm_recipe(workspace, tmp_path)
    run, source = open_run(tmp_path, "eval", recipe)
    with pytest.raises(ConfigError, match="not installed") as caught:
        evaluate(recipe, source, run, Silence())
    assert "mftctl[vllm]" in str(caught.value.hint)


def test_vllm_and_a_data_file(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mftctl.evaluation.engine_checks.find_spec", lambda name: name)
    recipe = vllm_recipe(workspace, tmp_path, test_data=[str(workspace / "test.jsonl")])
    run, source = open_run(tmp_path, "eval", recipe)
    with pytest.raises(ConfigError, match="computed with transformers"):
        evaluate(recipe, source, run, Silence())


def test_vllm_with_a_mask_that_is_not_applied(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mftctl.evaluation.engine_checks.find_spec", lambda name: name)
    recipe = vllm_recipe(workspace, tmp_path)
    run, source = open_run(tmp_path, "eval", recipe)
    with pytest.raises(ConfigError, match="complete checkpoint") as caught:
        evaluate(recipe, replace(source, mask="mask.bits"), run, Silence())
    assert caught.value.actual == "mask.bits"


def test_no_process_writes_outputs_before_all_have_read_those_there_are(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that begin with different outputs would divide different work, and leave some undone."""
    recipe = make_recipe(workspace, test_data=[])
    run, _ = open_run(tmp_path, "eval", recipe)
    benchmark = Mock()
    benchmark.name = "sums"
    key = measure.output_cache(benchmark, run).keys([("prompt", {})])[0]
    other = measure.output_cache(benchmark, run)
    monkeypatch.setattr(measure, "wait_for_all", lambda: other.add({key: "its answer"}))
    assert key not in measure.output_cache(benchmark, run)
    assert key in measure.output_cache(benchmark, run)
