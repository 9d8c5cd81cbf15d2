from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.errors import OutputError, StorageError
from mftctl.files.atomic import atomic_folder
from mftctl.files.ownership import (
    MARKER,
    Kind,
    permit_file,
    permit_folder,
    require_free,
    strangers,
    write_listed,
    write_marker,
)


def make_model(folder: Path) -> Path:
    """A folder as written by `fft` and `apply`."""
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(b"\x00\x01" * 3_000_000)
    (folder / "sub" / "template").write_text("x")
    write_marker(folder, Kind.MODEL)
    return folder


def test_own_folder_has_no_foreign_files(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    assert strangers(model, Kind.MODEL) == []
    files = json.loads((model / MARKER).read_text())["files"]
    assert list(files) == ["sub/template", "weights"]


@pytest.mark.parametrize(
    ("name", "found"),
    [("notes.txt", "notes.txt"), ("sub/notes.txt", "sub/notes.txt"), (".git/HEAD", ".git"), ("empty/", "empty")],
)
def test_unlisted_file_is_foreign(tmp_path: Path, name: str, found: str) -> None:
    model = make_model(tmp_path / "model")
    path = model / name
    if name.endswith("/"):
        path.mkdir()
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert strangers(model, Kind.MODEL)[0] == found


def test_changed_file_is_foreign(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (model / "weights").write_bytes(b"\x00\x01" * 2_999_999 + b"\x00\x02")
    assert strangers(model, Kind.MODEL) == ["weights (modified)"]


def test_link_in_place_of_a_listed_file_is_foreign(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (model / "weights").rename(tmp_path / "weights")
    (model / "weights").symlink_to(tmp_path / "weights")
    assert strangers(model, Kind.MODEL) == ["weights"]


def test_missing_file_is_not_foreign(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (model / "weights").unlink()
    assert strangers(model, Kind.MODEL) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"purpose": "result of mftctl", "kind": "x", "files": {}}'])
def test_invalid_marker_makes_every_file_foreign(tmp_path: Path, text: str) -> None:
    (tmp_path / MARKER).write_text(text)
    (tmp_path / "file").write_text("mine")
    assert strangers(tmp_path, Kind.MODEL) == ["file", MARKER]


def test_result_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(OutputError, match="not written by mftctl"):
        permit_folder(Kind.REPORT, replace=True)(model)


def test_own_folder_is_replaced_only_with_consent(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    permit_folder(Kind.MODEL, replace=True)(model)
    with pytest.raises(OutputError, match="result already exists"):
        permit_folder(Kind.MODEL, replace=False)(model)


def test_empty_folder_needs_no_consent(tmp_path: Path) -> None:
    permit_folder(Kind.MODEL, replace=False)(tmp_path)


def test_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    permit = permit_file("a mask file", lambda path: True, replace=True)
    with pytest.raises(OutputError, match="a folder exists there"):
        permit(tmp_path)


def test_file_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("mine")
    permit = permit_file("a mask file", lambda path: False, replace=True)
    with pytest.raises(OutputError, match="not a mask file"):
        permit(tmp_path / "data.jsonl")


def test_folder_that_appears_while_the_new_one_is_made_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def write() -> None:
        with atomic_folder(path, permit_folder(Kind.MODEL, replace=True)) as temporary:
            (temporary / "weights").write_text("new")
            path.mkdir()
            (path / "thesis.txt").write_text("mine")

    with pytest.raises(OutputError, match="not written by mftctl"):
        write()
    assert [item.name for item in tmp_path.rglob("*")] == ["model", "thesis.txt"]


def test_folder_that_changes_during_the_exchange_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_model(tmp_path / "model")
    monkeypatch.setattr("mftctl.files.atomic._write_through", lambda _: (path / "thesis.txt").write_text("mine"))

    def write() -> None:
        with atomic_folder(path, permit_folder(Kind.MODEL, replace=True)) as temporary:
            (temporary / "weights").write_text("new")

    with pytest.raises(StorageError, match="changed during its replacement"):
        write()
    assert (path / "thesis.txt").read_text() == "mine"
    assert (path / "sub" / "template").exists()


def test_listed_files_are_written_beside_the_users_and_removed_again(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_listed(tmp_path, {"index.html": b"1", "figures/a.svg": b"a"}, Kind.REPORT)
    (tmp_path / "figures" / "mine.png").write_text("mine")
    write_listed(tmp_path, {"index.html": b"2"}, Kind.REPORT)
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["figures/mine.png", "index.html", MARKER, "notes.txt"]
    assert (tmp_path / "index.html").read_bytes() == b"2"


@pytest.mark.parametrize("name", ["index.html", "figures/a.svg", MARKER, "figures"])
def test_users_file_is_not_written_over(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="would be replaced") as caught:
        write_listed(tmp_path, {"index.html": b"1", "figures/a.svg": b"a"}, Kind.REPORT)
    assert caught.value.actual == name
    assert [path.read_text() for path in tmp_path.rglob("*") if path.is_file()] == ["mine"]


def test_file_that_was_changed_since_is_neither_replaced_nor_removed(tmp_path: Path) -> None:
    write_listed(tmp_path, {"index.html": b"1", "old.csv": b"1"}, Kind.REPORT)
    (tmp_path / "old.csv").write_text("mine")
    write_listed(tmp_path, {"index.html": b"2"}, Kind.REPORT)
    assert (tmp_path / "old.csv").read_text() == "mine"
    (tmp_path / "index.html").write_text("mine")
    with pytest.raises(OutputError, match="were modified since"):
        write_listed(tmp_path, {"index.html": b"3"}, Kind.REPORT)


def test_a_report_is_not_written_over_the_marker_of_a_model(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    with pytest.raises(OutputError, match="would be replaced") as caught:
        write_listed(model, {"index.html": b"1"}, Kind.REPORT)
    assert caught.value.actual == MARKER


def test_link_to_a_folder_of_the_users_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "figures").symlink_to(tmp_path / "pictures")
    with pytest.raises(OutputError, match="would be replaced"):
        require_free(tmp_path / "report", ["figures/a.svg"], Kind.REPORT)


@pytest.mark.slow
@given(st.integers(0, 9))
def test_interrupted_write_can_be_repeated(tmp_path_factory: pytest.TempPathFactory, ends_at: int) -> None:
    folder = tmp_path_factory.mktemp("report")
    contents = {f"{number}.csv": bytes([number]) for number in range(5)}
    write_listed(folder, dict.fromkeys(contents, b"old"), Kind.REPORT)
    with pytest.MonkeyPatch.context() as patch:
        calls = iter(range(100))

        def place(*arguments: object) -> None:
            if next(calls) >= ends_at:
                raise KeyboardInterrupt
            original(*arguments)

        from mftctl.files import atomic

        original = atomic._place
        patch.setattr(atomic, "_place", place)
        if ends_at < 7:
            with pytest.raises(KeyboardInterrupt):
                write_listed(folder, contents, Kind.REPORT)
        else:
            write_listed(folder, contents, Kind.REPORT)
    write_listed(folder, contents, Kind.REPORT)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARKER} == contents
