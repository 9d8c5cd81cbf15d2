"""Answers to a few prompts, in batches and word by word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.cli.output import Output
from mftctl.data.quickstart.built_in import model_path
from mftctl.errors import DataError
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.recipe import Recipe
from mftctl.experiments.recipe_files import load_recipe
from mftctl.progress import Silence
from mftctl.workflows.generate import Answered, generate, prompt_examples
from tests.cli.running import CommandLine

QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have?"


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe(options={"eval.max_new_tokens": 24})


def answers(recipe: Recipe, source: ModelSource, **options: object) -> list[Answered]:
    return generate(recipe, source, prompt_examples([QUESTION, "2+3?"], [], 5), Silence(), texts=2, **options)  # type: ignore[arg-type]


def test_streamed_text_is_the_answer_in_batches(recipe: Recipe) -> None:
    source, shown = ModelSource(str(model_path())), list[str]()
    together = answers(recipe, source)
    streamed = answers(recipe, source, on_text=shown.append)
    assert [one.answer.strip() for one in streamed] == [one.answer.strip() for one in together]
    assert all(one.answer for one in together)
    assert together[0].prompt == QUESTION
    assert together[0].reference is None
    assert "".join(shown).startswith(f"[pre-trained]\n> {QUESTION}\n{together[0].answer}")


@pytest.mark.slow
def test_answers_with_and_without_a_mask(mftctl: CommandLine) -> None:
    masked = mftctl(
        "mask-train",
        "--model",
        "quickstart",
        "--method",
        "random",
        "--ratio",
        0.9,
        "--layers",
        "all",
        "-o",
        "r.bits",
        "-d",
        "quickstart",
    )
    assert masked.code == 0, masked.stderr
    outcome = mftctl("generate", "quickstart", "--mask", "r.bits", "-p", QUESTION, "--max-new-tokens", 12, "--json")
    assert outcome.code == 0, outcome.stderr
    [found] = json.loads(outcome.stdout)["answers"]
    assert found["answer"] != found["masked_answer"]
    table = mftctl("generate", "quickstart", "--mask", "r.bits", "-p", QUESTION, "--max-new-tokens", 12)
    assert "without mask" in table.stdout
    assert "with mask" in table.stdout
    latest = mftctl("generate", "-d", "quickstart/test", "--limit", 2, "--max-new-tokens", 4, "--json")
    assert [one["reference"] is None for one in json.loads(latest.stdout)["answers"]] == [False, False]
    assert json.loads(latest.stdout)["mask"].endswith("mask.bits")


def test_no_model(mftctl: CommandLine) -> None:
    outcome = mftctl("generate", "-p", "a")
    assert outcome.code == 2
    assert "generate needs a model" in outcome.stderr


def test_no_prompt(mftctl: CommandLine) -> None:
    outcome = mftctl("generate", "quickstart")
    assert outcome.code == 2
    assert "give --prompt or --data" in outcome.stderr


def test_records_without_prompts(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "plain"}\n')
    with pytest.raises(DataError, match="no prompt to answer"):
        prompt_examples([], [str(tmp_path / "text.jsonl")], 5)


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Output() as console:
        console.text("a\x1b[2Jb")
    assert "\x1b" not in capsys.readouterr().out
