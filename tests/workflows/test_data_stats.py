"""Lengths, duplicates and overlap of small data, against counts by hand and the records that training uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.encoding import Encoder
from mftctl.data.prepared.load import load_examples
from mftctl.data.prepared.records import encode_prepared
from mftctl.data.record_issues import RecordIssues
from mftctl.data.retained import split_retained
from mftctl.data.sources import DataSource
from mftctl.errors import ConfigError
from mftctl.progress import Silence
from mftctl.workflows.data_stats import DataStats, data_stats, lengths_of
from tests.conftest import build_tokenizer
from tests.workflow_fixtures import make_recipe
from tests.workflows.test_data_show import Notes, qa, write


def stats(
    workspace: Path, *, length: int = 64, model: bool = True, notes: Notes | None = None, **data: Any
) -> DataStats:
    recipe = make_recipe(workspace, **{"data": [], "val_data": [], "test_data": [], **data})
    return data_stats(recipe, str(workspace / "tiny") if model else None, length, notes or Notes())


def long_text(first: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(first, first + count))


def test_overlap_of_three_parts(workspace: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", qa("1+1?", "2"), qa(long_text(0, 20), "a"), qa("3+3?", "6"))
    validation = write(tmp_path / "val.jsonl", qa("1+1?", "2"), qa("new", "1"), qa(" 3+3? ", "7"))
    test = write(tmp_path / "test.jsonl", qa("new", "0"), qa(long_text(7, 20), "b"), qa("other", "0"))
    found = stats(workspace, model=False, data=[train], val_data=[validation], test_data=[test])
    counts = {
        (one.part, one.other): (
            one.same_content.records,
            one.same_prompt.records,
            None if one.ngrams is None else one.ngrams.records,
        )
        for one in found.overlaps
    }
    assert counts == {
        ("validation", "train"): (1, 2, 1),
        ("test", "train"): (0, 0, 1),
        ("test", "validation"): (0, 1, None),
    }
    by_words = found.overlaps[1].ngrams
    assert by_words is not None
    assert [(pair.where, pair.other) for pair in by_words.examples] == [(f"{test}:2", f"{train}:2")]
    assert by_words.share == pytest.approx(1 / 3)
    assert [part.tokens for part in found.parts] == [None, None, None]


def test_only_the_first_three_are_named(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", *[qa("q", "a")] * 9)
    [part] = stats(workspace, model=False, test_data=[data]).parts
    assert (part.part, part.same_content.records) == ("test", 8)
    assert [pair.where for pair in part.same_content.examples] == [f"{data}:{n}" for n in (2, 3, 4)]
    assert {pair.other for pair in part.same_content.examples} == {f"{data}:1"}


def test_duplicates_within_a_part(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", qa("q", "a"), qa("r", "a"), qa("q", "b"), qa("q", "a"))
    part = stats(workspace, model=False, data=[data], val_data=[data]).parts[0]
    assert (part.records, part.same_content.records, part.same_prompt.records) == (4, 1, 2)
    assert part.same_prompt.share == 0.5


def test_refused_records_are_counted_and_named(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", "bad", qa("q", "a"), {"input_ids": [1, 2, 5000]}, qa("r", "a"))
    [part] = stats(workspace, test_data=[data]).parts
    assert (part.records, part.refused) == (3, 2)
    assert "malformed" in part.refused_examples[0]
    assert "vocabulary" in part.refused_examples[1]
    assert part.tokens is not None
    assert part.tokens.tokens == 2 * 6


def test_validation_data_is_split_off_as_in_training(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", *(qa(f"q{n}", "a") for n in range(20)))
    found = stats(workspace, model=False, data=[data], val_fraction=0.2)
    assert [(part.part, part.records) for part in found.parts] == [("train", 16), ("validation", 4)]
    assert found.overlaps[0].same_prompt.records == 0


def test_data_that_cannot_be_split(workspace: Path, tmp_path: Path) -> None:
    notes = Notes()
    found = stats(workspace, model=False, notes=notes, data=[write(tmp_path / "d.jsonl", qa("q", "a"))])
    assert [part.part for part in found.parts] == ["train"]
    assert "No validation data: The data cannot be split" in notes.notes[0]


def test_data_to_retain_is_split_as_in_an_evaluation(workspace: Path, tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", qa("1+1?", "2"))
    retained = write(tmp_path / "retained.jsonl", *(qa(f"{number}+1?", "2") for number in range(20)))
    found = stats(workspace, model=False, data=[train], retain_data=[retained])
    held_out, to_train = split_retained(load_examples([DataSource(str(retained))]))
    counts = {part.part: part.records for part in found.parts}
    assert counts["retained_held_out"] == len(held_out) > 0
    assert counts["retained_to_train"] == len(to_train) == 20 - len(held_out)
    same = [one for one in found.overlaps if one.other == "train"]
    assert sum(one.same_prompt.records for one in same) == 1
    assert len(stats(workspace, model=False, retain_data=[retained]).parts) == 2


def test_no_data(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="no data to look at"):
        stats(workspace)


@pytest.mark.parametrize("length", [8, 12, 13, 20, 64])
def test_tokens_are_those_that_training_uses(workspace: Path, tmp_path: Path, length: int) -> None:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    records = [qa("1+1?", "2" * n) for n in range(1, 9)]
    data = write(tmp_path / "d.jsonl", *records, {"messages": turns}, {"text": "plain " * 4}, qa("x" * 40, "y"))
    [part] = stats(workspace, length=length, test_data=[data]).parts
    issues = RecordIssues()
    examples = load_examples([DataSource(data)], issues=issues)
    used = encode_prepared(examples, Encoder(build_tokenizer()), length, issues, Silence()).records
    assert part.tokens is not None
    assert (part.tokens.tokens, part.tokens.answer_tokens) == (sum(used.lengths_tokens), sum(used.answer_tokens))
    assert (part.tokens.truncated, part.tokens.overlong) == (issues.cut, issues.overlong)
    assert part.tokens.truncated_share == issues.cut / len(examples)
    assert part.tokens.lengths is not None
    assert part.tokens.lengths.most == 45
    assert sum(one.records for one in part.tokens.lengths.histogram) == 11
    whole = stats(workspace, length=10_000, test_data=[data]).parts[0].tokens
    assert whole is not None
    assert part.tokens.cut_tokens == whole.tokens - part.tokens.tokens


@pytest.mark.parametrize("length", [10, 14, 64])
def test_preferences_count_with_both_answers(workspace: Path, tmp_path: Path, length: int) -> None:
    pairs = [{"prompt": "1+1?", "chosen": "2" * n, "rejected": "3" * (2 * n)} for n in range(1, 6)]
    data = write(tmp_path / "d.jsonl", *pairs, {"prompt": "x" * 30, "chosen": "a", "rejected": "b"})
    [part] = stats(workspace, length=length, test_data=[data]).parts
    issues = RecordIssues()
    examples = load_examples([DataSource(data)], issues=issues, kind="preferences")
    used = encode_prepared(examples, Encoder(build_tokenizer()), length, issues, Silence()).records
    assert part.tokens is not None
    assert (part.tokens.tokens, part.tokens.answer_tokens) == (sum(used.tokens), sum(used.answer_tokens))
    assert (part.tokens.truncated, part.tokens.overlong) == (issues.cut, issues.overlong)
    assert part.preferences is not None
    assert (part.preferences.records, part.preferences.chosen.most, part.preferences.rejected.most) == (6, 6, 11)
    assert part.preferences.chosen.median == 3


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_percentiles_and_histogram(lengths: list[int]) -> None:
    found = lengths_of(np.array(lengths, np.int64))
    ordered = sorted(lengths)
    assert (found.least, found.most) == (ordered[0], ordered[-1])
    for share, value in ((50, found.median), (90, found.p90), (99, found.p99)):
        assert value == ordered[-(-share * len(ordered) // 100) - 1]
    for one in found.histogram:
        assert one.records == sum(one.least <= length <= one.most for length in lengths)
    assert sum(one.records for one in found.histogram) == len(lengths)
    assert found.histogram[0].records > 0 < found.histogram[-1].records


def test_as_json(workspace: Path, tmp_path: Path) -> None:
    from dataclasses import asdict

    found = stats(workspace, test_data=[write(tmp_path / "d.jsonl", qa("q", "a"))])
    document = json.loads(json.dumps(asdict(found)))
    assert document["parts"][0]["tokens"]["lengths"]["histogram"] == [{"least": 6, "most": 7, "records": 1}]
