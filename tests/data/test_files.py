"""Files of every kind, and one named test per way in which a file can be invalid."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.data.files import Record, data_files, file_kind, read_records
from mftctl.errors import DataError

RECORDS = [{"question": f"{number}+1?", "answer": f"00{number + 1}"} for number in range(9)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
TEXTS = st.text(st.characters(codec="utf-8"))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fields(path: Path) -> list[dict[str, object]]:
    return [record.fields for record in read_records(path)]


def failure(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(path)
    return caught.value


def zstd(text: str) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(text.encode(), asbytes=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.jsonl", LINES.encode()),
        ("train.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("train.json", LINES.encode()),
        ("list.json", json.dumps(RECORDS, indent=2).encode()),
        ("pages.json", json.dumps({"version": 1, "data": RECORDS}).encode()),
        ("columns.json", json.dumps({key: [row[key] for row in RECORDS] for key in RECORDS[0]}, indent=1).encode()),
        ("train.jsonl.zst", zstd(LINES)),
        ("list.json.zst", zstd(json.dumps(RECORDS))),
        ("list.json.gz", gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
        ("TRAIN.CSV", "\r\n".join(["question,answer", *(",".join(record.values()) for record in RECORDS)]).encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
    ],
)
def test_text_files(tmp_path: Path, name: str, content: bytes) -> None:
    assert fields(write(tmp_path / name, content)) == RECORDS


def test_parquet_file_with_brackets_in_its_name(tmp_path: Path) -> None:
    path = tmp_path / "part[1].parquet"
    datasets.Dataset.from_list(RECORDS).to_parquet(path)
    assert fields(path) == RECORDS
    assert read_records(path)[2] == Record(f"{path}, record 3", RECORDS[2])


def test_jsonl_places_are_line_numbers_in_spite_of_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", '\n{"text": "a\u2028b"}\r\n  \n{"text": "c"}')
    assert read_records(path) == [Record(f"{path}:2", {"text": "a\u2028b"}), Record(f"{path}:4", {"text": "c"})]


def test_texts_that_look_like_dates_or_numbers_stay_texts(tmp_path: Path) -> None:
    answers = ["2020-01-01", "2020-01-02", "007", "NA", '{"a": 1}', "null"]
    lines = write(tmp_path / "a.json", json.dumps([{"question": "?", "answer": answer} for answer in answers]))
    assert [record["answer"] for record in fields(lines)] == answers
    table = write(tmp_path / "a.csv", "question,answer\n" + "".join(f"?,{answer}\n" for answer in answers[:4]))
    assert [record["answer"] for record in fields(table)] == answers[:4]


def test_csv_quotes_line_ends_and_empty_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'instruction,input,output\n"a, ""b""\nc",,d\n\ne,f,g\n')
    assert read_records(path) == [
        Record(f"{path}:3", {"instruction": 'a, "b"\nc', "input": None, "output": "d"}),
        Record(f"{path}:5", {"instruction": "e", "input": "f", "output": "g"}),
    ]


@pytest.mark.slow
@given(st.lists(st.dictionaries(TEXTS, TEXTS), min_size=1, max_size=5), st.booleans())
def test_jsonl_round_trip(
    tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, str]], ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.jsonl"
    write(path, "\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records))
    assert fields(path) == records


def test_unknown_suffix(tmp_path: Path) -> None:
    error = failure(write(tmp_path / "train.txt", "hello"))
    assert "unknown type" in error.message
    assert ".parquet" in str(error.expected)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", " \n\n"),
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.csv", ""),
        ("a.csv", "question,answer\n"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),
    ],
)
def test_file_without_records(tmp_path: Path, name: str, content: str | bytes) -> None:
    error = failure(write(tmp_path / name, content))
    assert "no records" in error.message
    assert error.path == str(tmp_path / name)


def test_parquet_without_records(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": []}).to_parquet(path)
    assert "no records" in failure(path).message


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", LINES + '{"question": \n', 10),
        ("a.jsonl", LINES + "\n[1, 2]\n", 11),
        ("a.jsonl", "5\n" + LINES, 1),
        ("a.jsonl", LINES + LINES[:20], 10),
        ("a.jsonl.gz", gzip.compress((LINES + "{").encode(), mtime=0), 10),
        ("a.json", '[\n{"text": "a"},\n{"text" "b"}\n]', 3),
        ("a.json", '{"text": "a"}\n{"text": }', 2),
        ("a.jsonl", '{"text": "a", "n": ' + "1" * 5000 + "}", 1),
        ("a.jsonl", "[" * 200_000, 1),
    ],
)
def test_malformed_json_names_file_and_line(tmp_path: Path, name: str, content: str | bytes, line: int) -> None:
    error = failure(write(tmp_path / name, content))
    assert "malformed" in error.message
    assert error.path == f"{tmp_path / name}:{line}"


def test_json_list_of_something_else_than_records(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[{"text": "a"}, "b"]')
    assert failure(path).path == f"{path}, record 2"


@pytest.mark.parametrize("row", ["1,2,3", "1"])
def test_csv_row_of_another_width(tmp_path: Path, row: str) -> None:
    path = write(tmp_path / "a.csv", f"question,answer\n1,2\n{row}\n")
    error = failure(path)
    assert "different number of cells" in error.message
    assert error.path == f"{path}:3"


def test_csv_with_an_open_quote(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'question,answer\n1,"2\n')
    error = failure(path)
    assert "malformed" in error.message
    assert error.path == f"{path}:2"


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xe9"}\n')
    error = failure(path)
    assert "not UTF-8" in error.message
    assert (error.path, error.actual) == (f"{path}:2", "the byte 0xe9")


@pytest.mark.parametrize("content", [b"hello", gzip.compress(LINES.encode() * 99, mtime=0)[:-50], b""])
def test_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.jsonl.gz", content)
    error = failure(path)
    assert ("gzip" if content else "no records") in error.message


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", b"PAR1 and nothing else")
    assert "Parquet" in failure(path).message


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.jsonl", LINES)
    monkeypatch.setattr(Path, "open", refuse)
    error = failure(path)
    assert "cannot be read" in error.message
    assert "Permission denied" in str(error.actual)


def test_one_record_over_several_lines(tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert fields(write(tmp_path / "one.json", json.dumps(record, indent=2))) == [record]


def test_csv_cell_of_any_length(tmp_path: Path) -> None:
    question = "word " * 40_000
    path = write(tmp_path / "long.csv", f'question,answer\n"{question}",b\n')
    assert fields(path) == [{"question": question, "answer": "b"}]


def test_zstd_file_that_is_cut_short(tmp_path: Path) -> None:
    error = failure(write(tmp_path / "cut.jsonl.zst", zstd(LINES)[:-9]))
    assert "not a complete zstd file" in error.message


def test_two_csv_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("question,question,answer\na,b,c\n", encoding="utf-8")
    with pytest.raises(DataError, match="Two columns have the same name") as caught:
        read_records(path)
    assert (caught.value.path, caught.value.actual) == (f"{path}:1", "'question'")


@pytest.mark.parametrize(
    ("name", "kind"), [("a.b.JSONL.GZ", ".jsonl.gz"), ("a.json", ".json"), ("a.Parquet", ".parquet")]
)
def test_kind_is_the_suffix_in_lower_case(name: str, kind: str) -> None:
    assert file_kind(Path(name)) == kind


def test_data_files_of_a_folder_are_sorted_and_not_hidden(tmp_path: Path) -> None:
    for name in (
        "b.jsonl",
        "a/2.csv",
        "a/10.CSV.GZ",
        ".x.jsonl",
        ".git/a.jsonl",
        "a/.b/c.json",
        "README.md",
        "a.jsonl/d.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, "")
    found = [str(path.relative_to(tmp_path)) for path in data_files(tmp_path)]
    assert found == ["a/10.CSV.GZ", "a/2.csv", "a.jsonl/d.json", "b.jsonl"]
    assert data_files(tmp_path / "b.jsonl") == [tmp_path / "b.jsonl"]
    assert data_files(tmp_path / ".git") == [tmp_path / ".git" / "a.jsonl"]


def test_folder_without_data_files(tmp_path: Path) -> None:
    write(tmp_path / "notes.txt", "")
    with pytest.raises(DataError, match="no data files") as caught:
        data_files(tmp_path)
    assert caught.value.path == str(tmp_path)


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="folder cannot be read") as caught:
        data_files(tmp_path)
    assert caught.value.path == str(tmp_path)
