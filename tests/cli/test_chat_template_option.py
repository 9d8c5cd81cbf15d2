"""`--chat-template` of `eval`, with and without a value, and of other commands with a value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.cli.options import template_variables
from mftctl.cli.template_option import with_value
from mftctl.errors import ConfigError
from mftctl.experiments.run_folder import load_run
from tests.cli.running import CommandLine
from tests.workflow_fixtures import make_workspace


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--chat-template"], ["--chat-template="]),
        (["--chat-template", "--tasks", "gsm8k"], ["--chat-template=", "--tasks", "gsm8k"]),
        (["--chat-template", "tulu", "model"], ["--chat-template", "tulu", "model"]),
        (["--chat-template", "tool_use"], ["--chat-template", "tool_use"]),
        (["--chat-template", "mine.jinja"], ["--chat-template", "mine.jinja"]),
        (["--chat-template", "elsewhere/mine.jinja"], ["--chat-template", "elsewhere/mine.jinja"]),
        (["--chat-template", "owner/name"], ["--chat-template=", "owner/name"]),
        (["--chat-template", "quickstart"], ["--chat-template=", "quickstart"]),
        (["--chat-template", "FOLDER"], ["--chat-template=", "FOLDER"]),
        (["--chat-template=tulu", "x"], ["--chat-template=tulu", "x"]),
        (["--", "--chat-template"], ["--", "--chat-template"]),
        (["--tasks", "gsm8k"], ["--tasks", "gsm8k"]),
    ],
)
def test_the_next_word_is_its_value_unless_it_is_a_model(
    words: list[str], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").mkdir()
    assert with_value(words) == expected


def test_variables_are_read_as_yaml() -> None:
    found = template_variables(["enable_thinking=false", "n=3", "rate=1e-4", "name=a=b", "word=low", "no="])
    assert found == {"enable_thinking": False, "n": 3, "rate": 1e-4, "name": "a=b", "word": "low", "no": ""}


@pytest.mark.parametrize("pair", ["enable_thinking", "=false", "x=[1]", "x=null"])
def test_a_variable_without_name_or_scalar(pair: str) -> None:
    with pytest.raises(ConfigError, match="a name and a value") as caught:
        template_variables([pair])
    assert caught.value.actual == pair


@pytest.mark.slow
def test_commands_keep_the_template_and_eval_takes_that_of_the_model(mftctl: CommandLine) -> None:
    make_workspace(mftctl.folder)
    lines = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 8
    (mftctl.folder / "turns.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    mine = mftctl.folder / "mine.jinja"
    mine.write_text("{% for m in messages %}{{ m.role }}={{ m.content }}<|end|>{% endfor %}", encoding="utf-8")
    data = ("--data", "turns.jsonl", "--val-data", "turns.jsonl")
    tuned = mftctl("fft", "-m", "tiny", *data, "--max-steps", 1, "--chat-template", "mine.jinja", "--learn", "last")
    assert tuned.code == 0, tuned.stderr
    runs = mftctl.folder / "runs"
    record = load_run(runs / "001-fft").record
    assert (record.config["chat_template"], record.config["learn"]) == ("mine.jinja", "last")
    assert record.inputs["chat_template"]["source"] == "mine.jinja"
    mine.write_text("{{ messages[0].content }}", encoding="utf-8")  # the model keeps the template it was trained with
    measured = mftctl("eval", "runs/001-fft/model", "--data", "turns.jsonl", "--chat-template", "--no-generate")
    assert measured.code == 0, measured.stderr
    evaluated = load_run(runs / "002-eval").record
    assert evaluated.inputs["chat_template"]["digest"] == record.inputs["chat_template"]["digest"]
    assert "chat_template" not in evaluated.config
    assert evaluated.config["eval"]["chat_template"] is True
    other = mftctl("eval", "--chat-template", "zephyr", "runs/001-fft/model", "--data", "turns.jsonl", "--no-generate")
    assert other.code == 0, other.stderr
    evaluated = load_run(runs / "003-eval").record
    assert (evaluated.config["chat_template"], evaluated.config["eval"]["chat_template"]) == ("zephyr", True)


def test_with_one_and_without_one(mftctl: CommandLine) -> None:
    outcome = mftctl("eval", "quickstart", "--chat-template", "--no-chat-template", "--tasks", "gsm8k")
    assert outcome.code == 2
    assert "--no-chat-template are mutually exclusive" in outcome.stderr


@pytest.mark.slow
def test_records_are_checked_before_a_model_is_loaded(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    make_workspace(mftctl.folder)
    records = [
        {"question": "a", "answer": " "},
        {"question": "q" * 90, "answer": "a"},
        {"question": "a", "answer": "b"},
    ]
    (mftctl.folder / "mixed.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    asked = ("eval", "tiny", "--data", "mixed.jsonl", "--set", "eval.max_length_tokens=64", "--no-generate")
    with monkeypatch.context() as patched:
        patched.setattr("mftctl.workflows.evaluation_engines.load_model", lambda *_, **__: pytest.fail("loaded"))
        refused = mftctl(*asked)
    assert refused.code == 1
    assert "The answer is empty" in refused.stderr
    done = mftctl(*asked, "--bad-records", "skip", "--bad-records-max", "50%", "--json")
    assert done.code == 0, done.stderr
    assert "1 of 3 records skipped as unusable" in done.stderr
    assert "1 of 2 records skipped: the prompt alone" in done.stderr
    (dataset,) = json.loads(done.stdout)["datasets"]
    assert dataset["metrics"][0]["samples"] == 1
