from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mftctl.files.temporary import CONTENT, REPLACED, remove_folder, remove_leftovers, temporary_folder

LEAVE = """
import os, pathlib, sys
from mftctl.files.temporary import temporary_folder
manager = temporary_folder(pathlib.Path(sys.argv[1]), target=sys.argv[2])
folder = manager.__enter__()
for name in sys.argv[3:]:
    (folder / name).mkdir()
    (folder / name / "file").write_text("half")
print(folder, flush=True)
os._exit(0)
"""


def left_behind(parent: Path, target: str = "", *names: str) -> Path:
    """The temporary folder of a process that exited without removing it."""
    command = [sys.executable, "-c", LEAVE, str(parent), target, *names]
    return Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def test_folder_is_removed_with_all_that_is_in_it(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        (folder / CONTENT).mkdir()
        (folder / CONTENT / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_leftover_of_a_process_that_ended_is_removed(tmp_path: Path) -> None:
    left = left_behind(tmp_path, "model", CONTENT)
    assert (left / CONTENT / "file").exists()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_live_process_stays(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as folder:
        remove_leftovers(tmp_path)
        assert folder.exists()


def test_replaced_folder_is_restored_if_the_new_one_is_missing(tmp_path: Path) -> None:
    left_behind(tmp_path, "model", CONTENT, REPLACED)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "file"]


def test_replaced_folder_is_removed_if_the_new_one_is_in_place(tmp_path: Path) -> None:
    left_behind(tmp_path, "model", REPLACED)
    (tmp_path / "model").mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["model"]


def test_empty_folder_of_that_name_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".mftctl-tmp-abc").mkdir()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "journal",
    [
        None,
        "no JSON",
        "[]",
        "{}",
        {"host": "elsewhere"},
        {"purpose": "mine"},
        {"target": "../model"},
        {"target": "/etc"},
        {"target": 3},
    ],
)
def test_only_a_folder_with_a_journal_of_this_host_is_a_leftover(
    tmp_path: Path, journal: str | dict[str, object] | None
) -> None:
    left = left_behind(tmp_path, "model", CONTENT)
    if isinstance(journal, dict):
        (left / "journal.json").write_text(json.dumps(json.loads((left / "journal.json").read_text()) | journal))
    elif journal is None:
        (left / "journal.json").unlink()
    else:
        (left / "journal.json").write_text(journal)
    remove_leftovers(tmp_path)
    assert (left / CONTENT / "file").read_text() == "half"


@pytest.mark.slow
@pytest.mark.parametrize("names_the_host", [True, False])
def test_truncated_journal_is_recognised_by_its_beginning(tmp_path: Path, names_the_host: bool) -> None:
    left = left_behind(tmp_path, "model")
    journal = left / "journal.json"
    text = journal.read_bytes()
    journal.write_bytes(text[: text.index(b', "process"') - (not names_the_host)])
    remove_leftovers(tmp_path)
    assert left.exists() != names_the_host


def test_empty_journal_is_removed_once_its_process_has_ended(tmp_path: Path) -> None:
    left = left_behind(tmp_path, "model")
    (left / "journal.json").write_bytes(b"")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_truncated_journal_next_to_other_files_stays(tmp_path: Path) -> None:
    left = left_behind(tmp_path, "model", CONTENT)
    journal = left / "journal.json"
    journal.write_bytes(journal.read_bytes()[:-1])
    remove_leftovers(tmp_path)
    assert (left / CONTENT / "file").exists()


def test_folder_with_a_user_file_is_not_a_leftover(tmp_path: Path) -> None:
    left = left_behind(tmp_path, "model", CONTENT)
    (left / "notes.txt").write_text("mine")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in left.iterdir()) == [CONTENT, "journal.json", "notes.txt"]


def test_hidden_files_of_the_users_stay_whatever_their_names(tmp_path: Path) -> None:
    host = os.uname().nodename
    names = [f".notes.{host}-99999.txt", f".backup.{host}-20241129.tar", ".mftctl-tmp-file", ".mftctl-tmp-link"]
    for name in names[:3]:
        (tmp_path / name).write_text("mine")
    left = left_behind(tmp_path / "..", "model", CONTENT)
    (tmp_path / names[3]).symlink_to(left)
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert left.exists()
    remove_leftovers(tmp_path.parent)


@pytest.mark.slow
def test_deep_folders_and_closed_ones_are_removed_and_links_are_not_followed(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (tmp_path / "kept").mkdir()
    (top / "link").symlink_to(tmp_path / "kept")
    here = os.open(top, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d" * 10, dir_fd=here)
        below = os.open("d" * 10, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    (top / "closed").mkdir(mode=0)
    remove_folder(top)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
