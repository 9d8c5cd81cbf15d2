"""Mixtures of files, hub data sets and built-in data, and one named test per way in which a source can be invalid."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from mftctl.data.examples import Example, Message
from mftctl.data.prepared.examples import data_digest
from mftctl.data.prepared.load import load_examples
from mftctl.data.quickstart import built_in
from mftctl.data.record_issues import RecordIssues
from mftctl.data.sources import (
    DataSource,
    source_content_digest,
    source_files,
    stream_source,
)
from mftctl.errors import DataError

RECORDS = [{"question": f"{number}+1?", "answer": f"00{number + 1}"} for number in range(9)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
PAIRS = [(record["question"], record["answer"]) for record in RECORDS]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def load(path: Path | str, count: int | None = None, seed: int = 0) -> list[Example]:
    return list(load_examples([DataSource(str(path), count)], seed=seed))


def pairs(examples: list[Example]) -> list[tuple[str, str]]:
    return [(example.prompt[0].content, example.answer) for example in examples]


def failure(path: Path | str) -> DataError:
    with pytest.raises(DataError) as caught:
        load(path)
    return caught.value


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("math.jsonl", DataSource("math.jsonl")),
        ("math.jsonl=10000", DataSource("math.jsonl", 10000)),
        ("a=b.jsonl=3", DataSource("a=b.jsonl", 3)),
        ("a=b.jsonl", DataSource("a=b.jsonl")),
        ("math.jsonl=0", DataSource("math.jsonl=0")),
        ("math.jsonl=-3", DataSource("math.jsonl=-3")),
        ("math.jsonl=", DataSource("math.jsonl=")),
        ("math.jsonl=٣", DataSource("math.jsonl=٣")),
        ("openai/gsm8k:main=5", DataSource("openai/gsm8k:main", 5)),
    ],
)
def test_parse(text: str, source: DataSource) -> None:
    assert DataSource.parse(text) == source


@pytest.mark.parametrize("text", ["", "=5"])
def test_parse_without_a_path(text: str) -> None:
    with pytest.raises(DataError, match="no path"):
        DataSource.parse(text)


def test_parsing_loads_neither_torch_nor_datasets() -> None:
    code = (
        "import sys; from mftctl.data.sources import DataSource; DataSource.parse('a=3');"
        "sys.exit(any(name in sys.modules for name in ('torch', 'datasets', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_from_the_hub_is_quiet_and_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loggers = [datasets.logging.get_logger("datasets.load"), hub_logging.get_logger("huggingface_hub.file_download")]

    def loudness() -> tuple[bool, ...]:
        bars = (datasets.is_progress_bar_enabled(), not are_progress_bars_disabled())
        return (*bars, *(logger.isEnabledFor(logging.ERROR) for logger in loggers))

    inside: list[tuple[bool, ...]] = []

    def load_dataset(*_: object, **__: object) -> None:
        inside.append(loudness())
        raise ValueError("damaged")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    before = loudness()
    assert before == (True, True, True, True), "an earlier test left the libraries quiet"
    assert failure("owner/name").actual == "damaged"
    assert inside == [(False, False, False, False)]
    assert loudness() == before


def test_mixture_is_concatenated_in_order(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", LINES)
    second = write(tmp_path / "b.jsonl", '{"text": "a"}\n{"text": "b"}\n')
    examples = load_examples([DataSource(str(first), 4), DataSource(str(second))], seed=1)
    assert list(examples) == [*load(first, 4, seed=1), *load(second)]
    assert len(examples) == 6


def test_count_takes_a_seeded_subset_in_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES)
    chosen = {seed: pairs(load(path, 4, seed)) for seed in range(9)}
    assert all(subset == [pair for pair in PAIRS if pair in subset] for subset in chosen.values())
    assert all(len(subset) == 4 for subset in chosen.values())
    assert len({tuple(subset) for subset in chosen.values()}) > 1
    assert chosen[3] == pairs(load(path, 4, 3))
    assert pairs(load(path, 9)) == PAIRS


def test_count_above_the_records_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES)
    with pytest.raises(DataError, match="fewer records") as caught:
        load(path, 10)
    assert (caught.value.expected, caught.value.actual) == (10, 9)


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("quickstart", "train"),
        ("quickstart/train", "train"),
        ("quickstart/validation", "validation"),
        ("quickstart/test", "test"),
    ],
)
def test_built_in_data(path: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("train", "validation", "test"):
        write(tmp_path / f"{part}.jsonl", json.dumps({"question": part, "answer": "yes"}))
    monkeypatch.setattr(built_in, "data_path", lambda part: tmp_path / f"{part}.jsonl")
    assert pairs(load(path)) == [(split, "yes")]


def test_built_in_data_without_such_a_part() -> None:
    error = failure("quickstart/dev")
    assert "no such split" in error.message
    assert "quickstart/validation" in str(error.expected)


@pytest.mark.parametrize(
    ("path", "split", "arguments"),
    [
        ("openai/gsm8k:main", None, ("openai/gsm8k", "main", "train")),
        ("gsm8k", "test", ("gsm8k", None, "test")),
        ("owner/data-v1.5", None, ("owner/data-v1.5", None, "train")),
    ],
)
def test_hub_data_set(
    path: str, split: str | None, arguments: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(identifier: str, configuration: str | None, *, split: str) -> datasets.Dataset:
        calls.append((identifier, configuration, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    examples = load_examples([DataSource(path, split=split)])
    assert pairs(examples) == PAIRS
    assert examples[1].where == f"{path}/{arguments[2]}, record 2"
    assert set(calls) == {arguments}


def test_hub_data_set_without_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([]))
    monkeypatch.chdir(tmp_path)
    assert "dataset is empty" in failure("owner/name").message


def test_unreachable_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = failure("nobody/nothing:main")
    assert "neither an existing file nor a reachable hub dataset" in error.message
    assert error.path == "nobody/nothing:main"


@pytest.mark.parametrize(
    "path", ["absent.jsonl", "folder/absent.csv", "a/b/c", "./absent", "/absent", ".absent", "a b", "données"]
)
def test_absent_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = failure(path)
    assert "does not exist" in error.message
    assert error.path == str(Path(path))


def parts(folder: Path) -> list[Path]:
    """Files with three records each, part 1 in a subfolder, beside files that are no data."""
    (folder / "sub").mkdir(parents=True)
    write(folder / "notes.md", "")
    write(folder / ".part-9.jsonl", LINES)
    lines = LINES.splitlines(keepends=True)
    names = ("part-0.jsonl", "part-2.jsonl", "sub/part-1.jsonl")
    return [write(folder / name, "".join(lines[3 * part : 3 * part + 3])) for part, name in enumerate(names)]


def test_folder_is_all_its_data_files_in_order(tmp_path: Path) -> None:
    files = parts(tmp_path / "data")
    assert source_files(DataSource(str(tmp_path / "data"))) == files
    assert pairs(load(f"{tmp_path / 'data'}/")) == PAIRS
    assert len(load(tmp_path / "data", 4)) == 4
    with pytest.raises(DataError, match="fewer records"):
        load(tmp_path / "data", 10)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("part-*.jsonl", [0, 1]),
        ("part-[02].jsonl", [0, 1]),
        ("*/part-?.jsonl", [2]),
        ("**/part-*", [0, 1, 2]),
        ("part-*", [0, 1]),
        ("s*/*", [2]),
    ],
)
def test_pattern_is_the_files_that_match(
    pattern: str, found: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = parts(tmp_path / "data")
    expected = [files[part] for part in found]
    assert source_files(DataSource(str(tmp_path / "data" / pattern))) == expected
    assert pairs(load(tmp_path / "data" / pattern)) == [
        pair for part in found for pair in PAIRS[3 * part : 3 * part + 3]
    ]
    monkeypatch.chdir(tmp_path)
    assert source_files(DataSource(f"data/{pattern}", 2)) == [path.relative_to(tmp_path) for path in expected]


def test_existing_name_with_brackets_is_no_pattern(tmp_path: Path) -> None:
    parts(tmp_path)
    named = write(tmp_path / "part-[02].jsonl", LINES)
    assert source_files(DataSource(str(named))) == [named]
    assert DataSource.parse(f"{tmp_path}/*.jsonl=7") == DataSource(f"{tmp_path}/*.jsonl", 7)


def test_pattern_without_a_file(tmp_path: Path) -> None:
    (tmp_path / "part-0").mkdir()
    error = failure(tmp_path / "part-*")
    assert "No file matches" in error.message
    assert error.path == str(tmp_path / "part-*")


def test_pattern_that_matches_a_file_of_unknown_type(tmp_path: Path) -> None:
    parts(tmp_path)
    error = failure(tmp_path / "*")
    assert "unknown type" in error.message
    assert error.path == str(tmp_path / "notes.md")


def test_link_that_leads_nowhere_is_not_left_out(tmp_path: Path) -> None:
    parts(tmp_path)
    (tmp_path / "part-3.jsonl").symlink_to("absent")
    assert "cannot be read" in failure(tmp_path / "part-*").message


def test_folder_without_data_files(tmp_path: Path) -> None:
    assert "no data files" in failure(tmp_path).message


@pytest.mark.parametrize("path", ["", "part-*.jsonl"])
def test_split_of_a_folder_or_a_pattern(path: str, tmp_path: Path) -> None:
    parts(tmp_path)
    with pytest.raises(DataError, match="Only hub datasets have splits"):
        source_files(DataSource(str(tmp_path / path), split="test"))


def test_hub_data_set_has_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_files(DataSource("owner/name:main")) is None


def test_malformed_records_are_collected(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", LINES + "{\n")
    second = write(tmp_path / "b.csv", "question,answer\n1,2\n1,2,3\n")
    issues = RecordIssues()
    examples = load_examples([DataSource(str(tmp_path / "*"))], issues=issues)
    assert pairs(examples) == [*PAIRS, ("1", "2")]
    assert [error.path for error in issues.refused] == [f"{first}:10", f"{second}:3"]
    assert issues.records == 12
    assert len(load_examples([DataSource(str(tmp_path / "*"), 10)], issues=issues)) == 10


def test_malformed_record_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "{\n" + LINES)
    error = failure(path)
    assert "malformed" in error.message
    assert error.path == f"{path}:1"


def test_stream_reads_no_further_than_asked(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "b.jsonl", "")
    records = stream_source(DataSource(str(tmp_path)))
    assert [record.fields for record in islice(records, 9)] == RECORDS
    with pytest.raises(DataError, match="no records"):
        next(records)


def test_hub_rows_are_those_of_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "more": datasets.Json()})
    rows = [{"text": f"{number}", "more": {"a": [number]}} for number in range(200)]
    stored = datasets.Dataset.from_list(rows, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: stored)
    monkeypatch.chdir(tmp_path)
    assert [record.fields for record in stream_source(DataSource("owner/name"))] == list(stored) == rows


def digest(path: Path | str, split: str | None = None) -> str:
    return source_content_digest(DataSource(str(path), split=split))


def test_content_digest_of_files(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", LINES)
    expected = hashlib.sha256(b".jsonl\0" + hashlib.sha256(LINES.encode()).digest()).hexdigest()
    assert digest(first) == expected
    moved = parts(tmp_path / "x")
    parts(tmp_path / "y")
    of_parts = digest(tmp_path / "x")
    assert digest(tmp_path / "y") == digest(f"{tmp_path}/x/**/part-*") == of_parts
    moved[0].rename(tmp_path / "x" / "z.jsonl")
    swapped = digest(tmp_path / "x")
    others = [
        digest(write(tmp_path / "a.json", LINES)),
        digest(write(tmp_path / "b.jsonl", LINES + "\n")),
        digest(f"{tmp_path}/y/part-*"),
    ]
    assert len({expected, of_parts, swapped, *others}) == 6


def test_content_digest_ignores_the_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES)
    assert source_content_digest(DataSource(str(path), 3)) == digest(path)


def test_content_digest_of_hub_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = datasets.Dataset.from_list(RECORDS * 20)
    stored.save_to_disk(tmp_path / "stored")
    mapped = datasets.load_from_disk(str(tmp_path / "stored"))
    of = {
        "all": stored,
        "mapped": mapped,
        "slice": mapped.select(range(9)),
        "other": mapped.select(range(1, 10)),
        "renamed": stored.rename_column("answer", "response"),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: of[split])
    monkeypatch.chdir(tmp_path)
    assert digest("owner/name", "all") == digest("owner/name", "mapped")
    assert len({digest("owner/name", split) for split in of}) == 4


def test_content_digest_of_an_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("absent")
    with pytest.raises(DataError, match="cannot be read"):
        digest(tmp_path / "*.jsonl")


def test_content_digest_of_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.jsonl")
    with pytest.raises(DataError, match="cannot be read") as caught:
        source_content_digest(DataSource(str(tmp_path / "data.jsonl")))
    assert "a FIFO instead of a file" in str(caught.value.actual)


def test_content_digest_of_a_file_of_unknown_type(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown type"):
        digest(write(tmp_path / "a.txt", "hello"))


def test_split_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES)
    with pytest.raises(DataError, match="Only hub datasets have splits"):
        load_examples([DataSource(str(path), split="test")])


def test_record_error_carries_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINES + '{"question": "?", "answer": " "}\n')
    assert failure(path).path == f"{path}:10"


def test_digest_covers_kind_roles_and_contents_but_not_places() -> None:
    turns = (Message("user", "a"), Message("assistant", "b"))
    digest = data_digest([Example("chat", turns, "x:1")])
    assert digest == data_digest([Example("chat", turns, "y:2")])
    assert len(digest) == 64
    others = [
        [],
        [Example("completion", turns, "")],
        [Example("chat", (Message("system", "a"), turns[1]), "")],
        [Example("chat", (Message("user", "ab"), Message("assistant", "")), "")],
        [Example("chat", turns, ""), Example("chat", turns, "")],
    ]
    assert len({digest, *map(data_digest, others)}) == len(others) + 1


@pytest.mark.slow
def test_real_gsm8k(real_data: Path) -> None:
    path = real_data / "gsm8k" / "train.jsonl.gz"
    examples = load(path)
    assert len(examples) == 7473
    assert examples[0].where == f"{path}:1"
    assert all("####" in example.answer for example in examples)
    assert data_digest(examples) == "d75ea34ae0863a280e2fe08c4e2e434da22c629d5b25597be69111d7b3a6c6b4"


@pytest.mark.slow
def test_real_math(real_data: Path) -> None:
    examples = load(real_data / "math" / "MATH_test.jsonl.gz", count=100)
    assert len(examples) == 100
    assert all("boxed" in example.answer for example in examples)


def test_a_file_whose_name_holds_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert DataSource.parse("y=5") == DataSource("y", 5)
    Path("y=5").touch()
    assert DataSource.parse("y=5") == DataSource("y=5")
    assert DataSource.parse("y=5=7") == DataSource("y=5", 7)
