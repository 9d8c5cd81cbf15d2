"""Prepared records are those that encoding in memory gives."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mftctl.data.encoding import Encoder, encode_all
from mftctl.data.examples import Example, Learn
from mftctl.data.prepared import encode
from mftctl.data.prepared.examples import Examples, data_digest
from mftctl.data.prepared.load import load_examples
from mftctl.data.prepared.records import answer_lengths, encode_prepared, token_lengths
from mftctl.data.record_issues import RecordIssues
from mftctl.data.sources import DataSource
from mftctl.progress import Progress, Silence
from tests.conftest import build_tokenizer
from tests.data.prepared.preparing import Notes, encoder, prepare, write_questions

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)
spoken = words.filter(str.strip)
records = st.one_of(
    st.fixed_dictionaries({"question": words, "answer": spoken}),
    st.fixed_dictionaries({"prompt": words, "completion": spoken}),
    st.fixed_dictionaries({"text": spoken}),
    st.fixed_dictionaries({"question": words, "answer": st.just(" ")}),  # refused
    st.fixed_dictionaries({"question": st.just("long " * 60), "answer": spoken}),  # overlong
    st.fixed_dictionaries({"input_ids": st.lists(st.integers(0, 400), min_size=1, max_size=9)}),  # some unknown
    st.lists(st.tuples(words, spoken), min_size=1, max_size=3).map(
        lambda turns: {
            "messages": [
                {"role": role, "content": content}
                for pair in turns
                for role, content in zip(("user", "assistant"), pair, strict=True)
            ]
        }
    ),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(records, min_size=1, max_size=20), st.sampled_from(["all", "last"]))
def test_prepared_records_are_those_encoded_in_memory(
    tmp_path: Path, rows: list[dict[str, object]], learn: Learn
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    by_table, in_memory = RecordIssues(), RecordIssues()
    encoder = Encoder(build_tokenizer(), learn=learn)
    examples = load_examples([DataSource(str(path))], issues=by_table)
    found = encode_prepared(examples, encoder, 48, by_table, Silence())
    expected = encode_all(list(load_examples([DataSource(str(path))], issues=in_memory)), encoder, 48, in_memory)
    assert list(found.records) == expected.records
    assert list(found.examples) == expected.examples
    assert token_lengths(found.records) == token_lengths(list(expected.records))
    assert answer_lengths(found.records) == answer_lengths(list(expected.records))
    assert by_table.counts() == in_memory.counts()
    assert [str(error) for error in by_table.refused] == [str(error) for error in in_memory.refused]


def test_examples_survive_their_table(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2? \u2028 é", "name": "ann"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Easy.",
            "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": {"a": 2}}}],
        },
        {"role": "tool", "content": "4", "tool_call_id": "c1"},
        {"role": "assistant", "content": "4", "weight": 1},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "5", "weight": 0},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "No."},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    rows = [
        {"messages": turns, "tools": tools, "chat_template_kwargs": {"enable_thinking": False}},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"prompt": "a", "completion": "b"},
        {"text": "plain"},
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    examples = load_examples([DataSource(str(path))])
    assert [example.where for example in examples] == [f"{path}:{line}" for line in (1, 2, 3, 4)]
    conversation = examples[0]
    assert conversation.has_turns
    assert conversation.tools
    assert conversation.template_args == '{"enable_thinking": false}'
    assert conversation.messages[2].thinking == "Easy."
    assert conversation.messages[2].tool_calls[0].id == "c1"
    assert [message.is_learned for message in conversation.messages if message.role == "assistant"] == [
        True,
        True,
        False,
        True,
    ]
    assert examples[1].token_ids is not None
    for example in examples:
        assert Example.from_canonical(example.canonical(), example.where, has_turns=example.has_turns) == example


def test_slices_and_choices_are_of_rows(tmp_path: Path) -> None:
    found = prepare(write_questions(tmp_path / "data.jsonl", 30))
    every = list(found.records)
    assert list(found.records[3:11:2]) == every[3:11:2]
    assert list(found.records[0::2][1:4]) == every[0::2][1:4]
    assert found.records[-1] == every[-1]
    with pytest.raises(IndexError):
        found.records[len(every)]
    assert data_digest(found.examples.take([2, 0])) == data_digest([found.examples[2], found.examples[0]])
    assert len(Examples.joined([])) == 0


def test_all_records_of_a_source_are_encoded_once_for_every_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = load_examples([DataSource(str(write_questions(tmp_path / "data.jsonl", 40)))])
    encode_prepared(examples[:3], encoder(), 47, RecordIssues(), Silence())
    monkeypatch.setattr(encode, "_encoded", None)  # nothing is encoded again
    found = encode_prepared(examples.take([39, 5]), encoder(), 47, RecordIssues(), Silence())
    assert [record.where for record in found.records] == [examples[39].where, examples[5].where]


def test_a_count_encodes_what_it_takes(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "data.jsonl", 40)
    examples = load_examples([DataSource(str(path), 6), DataSource(str(path))], seed=1)
    found = encode_prepared(examples, encoder(), 48, RecordIssues(), Silence())
    expected = encode_all(list(examples), encoder(), 48, RecordIssues())
    assert list(found.records) == expected.records
    assert [len(table.outcomes) for table in found.records._tables] == [6, 40]


@pytest.mark.slow
def test_several_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_FEW_RECORDS", 100)
    path = write_questions(tmp_path / "data.jsonl", 3000)
    told: list[Progress] = []

    class Told(Notes):
        def progress(self, state: Progress) -> None:
            told.append(state)

    found = {}
    for processes in ("1", "3"):
        monkeypatch.setenv("MFTCTL_DATA_PROCESSES", processes)
        monkeypatch.setenv("MFTCTL_CACHE", str(tmp_path / processes))
        issues = RecordIssues()
        records = prepare(path, listener=Told(), issues=issues)
        [table] = [
            file for file in (tmp_path / processes).rglob("table.arrow") if b"input_ids" in file.read_bytes()[:4096]
        ]
        found[processes] = (table.read_bytes(), issues.counts(), list(records.records))
        assert (told[-1].task, told[-1].done, told[-1].total) == ("tokenising", 3000, 3000)
        assert told[-1].records_per_second
    assert found["1"] == found["3"]
    assert found["1"][1]["overlong"] == sum(number % 7 == 3 for number in range(3000))


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("{{ strftime_now('%d %b') }}", ["18", "Nov"]),
        ("{{ strftime_now('%_H|%^b|%-M') }}", ["5", " 9", "NOV"]),
        ("{%if x%}{%set y = 1%}{{ strftime_now('%Y') }}{%endif%}", ["2026"]),
    ],
)
def test_the_parts_of_the_time_that_a_template_writes(template: str, parts: list[str]) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = f"{tokenizer.chat_template}{template}"
    used = encode._time_used(Encoder(tokenizer, now=datetime(2026, 11, 18, 9, 5)))
    assert used is not None
    assert sorted(used) == sorted(parts)
