"""Records as the model sees them, and why others cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mftctl.data.record_issues import REMARK_TEXTS, Remark
from mftctl.errors import ConfigError, ModelError
from mftctl.progress import Progress
from mftctl.workflows.data_show import Choice, ShownData, show_data
from tests.conftest import build_tokenizer
from tests.workflow_fixtures import make_recipe

_FIRST = Choice()


class Notes:
    """A listener that keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def progress(self, state: Progress) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.notes.append(text)


def write(path: Path, *lines: object) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


def qa(question: str, answer: str, **more: object) -> dict[str, object]:
    return {"question": question, "answer": answer, **more}


def show(
    workspace: Path, *data: str, choice: Choice = _FIRST, length: int = 64, notes: Notes | None = None, **more: Any
) -> ShownData:
    recipe = make_recipe(workspace, data=list(data), **more)
    return show_data(recipe, str(workspace / "tiny"), choice, length, notes or Notes())


def test_a_record_as_the_model_sees_it(workspace: Path, tmp_path: Path) -> None:
    shown = show(workspace, write(tmp_path / "d.jsonl", qa("1+1?", "2")))
    [record] = shown.shown
    assert [(part.text, part.is_answer) for part in record.segments] == [
        ("<|user|>1+1?<|end|><|assistant|>", False),
        ("2<|end|>", True),
    ]
    assert (record.tokens, record.answer_tokens, record.cut_tokens, record.error) == (9, 2, 0, None)
    assert (record.index, record.where, record.outcome) == (1, f"{tmp_path}/d.jsonl:1", "used")
    assert shown.records == 1


def test_both_answers_of_a_preference(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", {"prompt": "1+1?", "chosen": "2", "rejected": "three"})
    [record] = show(workspace, data).shown
    assert [part.text for part in record.segments] == ["<|user|>1+1?<|end|><|assistant|>", "2<|end|>"]
    assert [(part.text, part.is_answer) for part in record.rejected] == [("three<|end|>", True)]
    assert (record.tokens, record.answer_tokens, record.cut_tokens) == (9 + 13, 2 + 6, 0)
    [cut] = show(workspace, data, length=10).shown
    assert [part.text for part in cut.rejected] == ["thr"]
    assert (cut.tokens, cut.answer_tokens, cut.cut_tokens) == (9 + 10, 2 + 3, 3)


def test_what_is_cut_off(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", qa("1+1?", "12345678"), qa("x" * 80, "2"))
    cut, long = show(workspace, data, length=10).shown
    assert (cut.tokens, cut.answer_tokens, cut.cut_tokens) == (10, 3, 6)
    assert cut.segments[-1].text == "123"
    assert (long.outcome, long.tokens, long.cut_tokens) == ("dropped", 0, 85)
    assert "within 10 tokens" in str(long.error)


def test_records_that_cannot_be_used_are_counted_in_their_place(workspace: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "1.jsonl", "not json", qa("q1", "a"), "", qa("q2", "a", video="x.mp4"), qa("q3", "a"))
    two = write(tmp_path / "2.jsonl", qa("q4", "a"), "[]")
    found = show(workspace, one, two, choice=Choice(sample=99)).shown
    assert [(record.index, Path(record.where).name, record.outcome) for record in found] == [
        (1, "1.jsonl:1", "refused"),
        (2, "1.jsonl:2", "used"),
        (3, "1.jsonl:4", "refused"),
        (4, "1.jsonl:5", "used"),
        (5, "2.jsonl:1", "used"),
        (6, "2.jsonl:2", "refused"),
    ]
    assert "malformed" in str(found[0].error)
    assert "key: video" in str(found[2].error)
    assert [show(workspace, one, two, choice=Choice(index=n)).shown for n in range(1, 7)] == [(one,) for one in found]


def test_a_record_that_the_template_refuses(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", qa("q", "a"))
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no') }}")
    [record] = show(workspace, data, chat_template=str(template)).shown
    assert record.outcome == "refused"
    assert "no" in str(record.error)


def test_records_that_a_count_leaves_out_are_not_counted(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", *(qa(f"q{n}", "a") for n in range(30)))
    every = show(workspace, data, choice=Choice(sample=30)).shown
    taken = show(workspace, f"{data}=7", choice=Choice(sample=30), seed=3)
    assert taken.records == 7
    assert [record.index for record in taken.shown] == list(range(1, 8))
    places = [record.where for record in taken.shown]
    assert places == [record.where for record in every if record.where in places]


def test_a_sample_is_determined_by_the_seed(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", *(qa(f"q{n}", "a") for n in range(50)))
    samples = [
        [record.index for record in show(workspace, data, choice=Choice(sample=5), seed=seed).shown]
        for seed in (1, 1, 2)
    ]
    assert samples[0] == samples[1] != samples[2]
    assert sorted(set(samples[0])) == samples[0]
    assert len(samples[0]) == 5


def test_the_first_three_without_a_choice(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", *(qa(f"q{n}", "a") for n in range(5)))
    assert [record.index for record in show(workspace, data).shown] == [1, 2, 3]


def test_a_number_that_no_record_has(workspace: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "d.jsonl", qa("q", "a"), "bad")
    with pytest.raises(ConfigError, match="no record with this number") as caught:
        show(workspace, data, choice=Choice(index=3))
    assert (caught.value.key, caught.value.expected, caught.value.actual) == ("--index", "1 to 2", 3)


def test_no_data(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="no data to look at"):
        show(workspace)


def test_remarks_and_notes(workspace: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    data = write(tmp_path / "d.jsonl", {"messages": turns, "tools": tools, "id": 7}, qa("q", "a"))
    notes = Notes()
    first, second = show(workspace, data, length=512, notes=notes).shown
    assert first.remarks == (REMARK_TEXTS[Remark.TOOLS_AS_TEXT],)
    assert second.remarks == ()
    assert notes.notes == ["Ignored fields: id"]


def test_only_the_last_answer(workspace: Path, tmp_path: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    data = write(tmp_path / "d.jsonl", {"messages": turns})
    counts = [show(workspace, data, learn=learn).shown[0].answer_tokens for learn in ("all", "last")]
    assert counts == [4, 2]


def test_a_model_that_is_not_there(workspace: Path, tmp_path: Path) -> None:
    recipe = make_recipe(workspace, data=[write(tmp_path / "d.jsonl", qa("q", "a"))])
    with pytest.raises(ModelError, match="tokenizer cannot be loaded") as caught:
        show_data(recipe, "nobody/nothing", Choice(), 64, Notes())
    assert "spelling" in str(caught.value.hint)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="tokenizer cannot be loaded") as caught:
        show_data(recipe, str(tmp_path / "empty"), Choice(), 64, Notes())
    assert "copy tokenizer.json" in str(caught.value.hint)


def test_a_folder_with_only_a_tokenizer(workspace: Path, tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    recipe = make_recipe(workspace, data=[write(tmp_path / "d.jsonl", qa("1+1?", "2"))])
    assert show_data(recipe, str(tmp_path / "tokenizer"), Choice(), 64, Notes()).shown[0].tokens == 9
