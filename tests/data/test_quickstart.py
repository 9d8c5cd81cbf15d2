"""The built-in model and data: the shipped files are small, correct and reproducible with the generator."""

from __future__ import annotations

import importlib.util
import json
import operator
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import pytest

from mftctl.data.quickstart import built_in

if TYPE_CHECKING:
    from types import ModuleType

    from transformers import PreTrainedTokenizerFast

SPLITS = get_args(built_in.Split)
PREFERENCES = tuple(split for split in SPLITS if split.startswith("preferences"))
LARGEST_BYTES = 4 * 1024 * 1024
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def _records(split: built_in.Split) -> list[dict[str, str]]:
    lines = built_in.data_path(split).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _normalised(question: str) -> str:
    return re.sub(r"[^a-z0-9+*/-]+", " ", question.casefold()).strip()


@pytest.fixture(scope="module")
def word_problems() -> ModuleType:
    """`scripts/word_problems.py`, imported by its path."""
    path = Path(__file__).parents[2] / "scripts" / "word_problems.py"
    spec = importlib.util.spec_from_file_location("word_problems", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their module by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart_tokenizer() -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(built_in.model_path())


def test_no_question_occurs_twice_in_or_between_the_splits() -> None:
    questions = [_question(record) for split in SPLITS for record in _records(split)]
    assert len(questions) == len(set(questions))
    assert len(questions) > 1000


def _question(record: dict[str, str]) -> str:
    return _normalised(record.get("question") or record["prompt"])


def _wrong_steps(answer: str) -> int:
    """Number of wrong lines in an answer, each of which continues from the one before."""
    *lines, last = answer.split("\n")
    results: list[str] = []
    wrong = 0
    for line in lines:
        matched = STEP.fullmatch(line)
        assert matched, line
        left, sign, right, result = matched.groups()
        wrong += OPERATORS[sign](int(left), int(right)) != int(result)
        assert not results or results[-1] in (left, right), answer
        results.append(result)
    assert last == f"#### {results[-1]}"
    assert all(int(result) > 0 for result in results)
    return wrong


@pytest.mark.parametrize("split", [split for split in SPLITS if split not in PREFERENCES])
def test_every_answer_is_right_arithmetic(split: built_in.Split) -> None:
    for record in _records(split):
        assert set(record) == {"question", "answer"}
        assert _wrong_steps(record["answer"]) == 0


@pytest.mark.parametrize("split", PREFERENCES)
def test_a_rejected_answer_has_one_wrong_step(split: built_in.Split) -> None:
    for record in _records(split):
        assert set(record) == {"prompt", "chosen", "rejected"}
        assert [_wrong_steps(record[key]) for key in ("chosen", "rejected")] == [0, 1]
        assert record["chosen"].splitlines()[-1] != record["rejected"].splitlines()[-1], record


@pytest.mark.slow
def test_the_generator_makes_the_shipped_files_and_a_corpus_without_their_questions(word_problems: ModuleType) -> None:
    splits, pairs, corpus = word_problems.quickstart_data()
    made = {**splits, **pairs}
    assert set(made) == set(SPLITS)
    for split in SPLITS:
        assert word_problems.json_lines(made[split]) == built_in.data_path(split).read_text(encoding="utf-8")
    shipped = {_question(record) for split in SPLITS for record in _records(split)}
    assert shipped.isdisjoint(_normalised(problem.question) for problem in corpus)


def test_shipped_files_are_at_most_four_mebibytes() -> None:
    folder = built_in.model_path().parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= LARGEST_BYTES


@pytest.mark.slow
def test_the_model_loads_as_any_checkpoint_and_answers_in_the_form_asked_for(
    quickstart_tokenizer: PreTrainedTokenizerFast,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(built_in.model_path(), dtype=torch.float32)
    prompt = quickstart_tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 20 + 5?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
    assert quickstart_tokenizer.decode(tokens) == "20 + 5 = 25\n#### 25<|end|>"


def test_the_chat_template_renders_turns_and_the_answer_to_come(quickstart_tokenizer: PreTrainedTokenizerFast) -> None:
    question = {"role": "user", "content": "What is 1 + 2?"}
    answer = {"role": "assistant", "content": "1 + 2 = 3\n#### 3"}
    prompt = quickstart_tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = quickstart_tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert prompt == "<|user|>What is 1 + 2?<|end|><|assistant|>"
    assert whole == prompt + "1 + 2 = 3\n#### 3<|end|>"


@pytest.mark.slow
def test_the_tokenizer_round_trips_all_of_the_data(quickstart_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [text for split in SPLITS for record in _records(split) for text in record.values()]
    assert quickstart_tokenizer.batch_decode(quickstart_tokenizer(texts)["input_ids"]) == texts


def test_the_tokenizer_round_trips_unseen_text(quickstart_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "  Größe:\t12,5 € — 猫\n\n<b>x</b>  "
    assert quickstart_tokenizer.decode(quickstart_tokenizer(text)["input_ids"]) == text


def test_digits_are_single_tokens(quickstart_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = quickstart_tokenizer.tokenize("1234 + 56")
    assert tokens == ["1", "2", "3", "4", "Ġ+", "Ġ5", "6"]
