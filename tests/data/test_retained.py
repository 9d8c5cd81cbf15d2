"""Which records of another domain are held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.data.prepared.examples import Examples
from mftctl.data.prepared.load import load_examples
from mftctl.data.retained import split_retained
from mftctl.data.sources import DataSource
from mftctl.errors import DataError


def examples(path: Path, words: list[str]) -> Examples:
    path.write_text("".join(json.dumps({"question": word, "answer": str(n)}) + "\n" for n, word in enumerate(words)))
    return load_examples([DataSource(str(path))])


def questions(part: Examples) -> list[str]:
    return [example.prompt[0].content for example in part]


def test_the_same_records_are_held_out_whatever_surrounds_them(tmp_path: Path) -> None:
    words = [f"word {number}" for number in range(200)]
    held_out, rest = (questions(part) for part in split_retained(examples(tmp_path / "all.jsonl", words)))
    assert sorted(held_out + rest) == sorted(words)
    assert 70 < len(held_out) < 130
    few, others = (questions(part) for part in split_retained(examples(tmp_path / "few.jsonl", words[100:][::-1])))
    assert set(few) == set(held_out) & set(words[100:])
    assert others == [word for word in reversed(words[100:]) if word in rest]


def test_records_with_the_same_prompt_stay_together(tmp_path: Path) -> None:
    words = [f"word {number % 20}" for number in range(100)]
    held_out, rest = split_retained(examples(tmp_path / "a.jsonl", words))
    assert not set(questions(held_out)) & set(questions(rest))


def test_too_few_records(tmp_path: Path) -> None:
    words = [f"word {number}" for number in range(20)]
    _, rest = split_retained(examples(tmp_path / "a.jsonl", words))
    with pytest.raises(DataError, match="too few records") as caught:
        split_retained(examples(tmp_path / "b.jsonl", questions(rest)[:1]))
    assert caught.value.key == "retain_data"
    assert caught.value.actual == "records: 1, held out: 0"
