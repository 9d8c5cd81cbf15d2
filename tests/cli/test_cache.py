"""`mftctl cache clear`, and what `mftctl env` says of the cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mftctl.cli.cache import cache_text
from mftctl.data.prepared.cache_folder import CacheUse, cache_use
from mftctl.data.prepared.entries import Entry, entry
from mftctl.files.temporary import temporary_folder
from mftctl.progress import Silence
from tests.cli.running import CommandLine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MFTCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def make(name: str, size_bytes: int) -> Entry:
    def write(path: Path) -> dict[str, object]:
        path.write_bytes(bytes(size_bytes))
        return {}

    return entry(name, write, Silence())


def test_clear_says_what_was_removed(cache: Path, mftctl: CommandLine) -> None:
    made = [make(name, 5000) for name in "abc"]
    use = cache_use()
    assert use.entries == 3
    assert use.size_bytes > 15_000
    document = json.loads(mftctl("cache", "clear", "--json").stdout)
    assert document == {"cache": str(cache), "removed": 3, "removed_bytes": use.size_bytes}
    assert not any(one.table.exists() for one in made)
    assert list(cache.iterdir()) == []
    assert "0 data sets, 0 bytes" in " ".join(mftctl("cache", "clear").stdout.split())


def test_clear_keeps_what_is_being_prepared(cache: Path, mftctl: CommandLine) -> None:
    other = make("other", 10)

    def write(path: Path) -> dict[str, object]:
        path.write_bytes(bytes(100))
        outcome = mftctl("cache", "clear", "--json")
        assert json.loads(outcome.stdout)["removed"] == 1
        assert path.exists()
        return {"made": True}

    made = entry("new", write, Silence())
    assert not other.table.exists()
    assert made.table.stat().st_size == 100
    assert entry("new", lambda path: pytest.fail("prepared again"), Silence()).summary == {"made": True}


def test_clear_removes_what_a_killed_command_left(cache: Path, mftctl: CommandLine) -> None:
    cache.mkdir(parents=True)
    with temporary_folder(cache, target="x") as folder:
        left = cache / f"{folder.name}-copy"
        left.mkdir()
        journal = json.loads((folder / "journal.json").read_text())
        (left / "journal.json").write_text(json.dumps({**journal, "process": 2**22 + 1}))
        (left / "content").mkdir()
        (left / "content" / "table.arrow").write_bytes(bytes(1000))
        document = json.loads(mftctl("cache", "clear", "--json").stdout)
        assert folder.exists()
    assert not left.exists()
    assert document["removed"] == 0
    assert document["removed_bytes"] > 1000


def test_clear_leaves_files_of_others(cache: Path, mftctl: CommandLine) -> None:
    make("a", 10)
    (cache / "mine").mkdir()
    (cache / "mine" / "notes.txt").write_text("mine")
    assert json.loads(mftctl("cache", "clear", "--json").stdout)["removed"] == 1
    assert (cache / "mine" / "notes.txt").exists()


def test_clear_leaves_files_of_others_with_names_like_digests(cache: Path, mftctl: CommandLine) -> None:
    make("a", 10)
    photos = cache / f"{1:032x}"
    photos.mkdir()
    (photos / "table.arrow").write_text("mine")
    (photos / "photo.jpg").write_text("mine")
    (cache / f"{2:032x}").mkdir()
    (cache / f"{3:032x}.lock").write_text("mine")
    (cache / f"{4:032x}").symlink_to(photos)
    (cache / f"{4:032x}.lock").touch()
    before = {path for path in cache.rglob("*") if path.name.startswith("0000") or path.parent == photos}
    assert json.loads(mftctl("cache", "clear", "--json").stdout)["removed"] == 1
    assert set(cache.rglob("*")) == before


def test_clear_without_a_cache(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFTCTL_CACHE", "off")
    outcome = mftctl("cache", "clear")
    assert outcome.code == 0
    assert outcome.stdout.split() == ["Cache", "removed", "off"]
    assert json.loads(mftctl("cache", "clear", "--json").stdout)["cache"] is None


def test_where_it_lies_and_how_large_it_is() -> None:
    folder = Path("/home/u/.cache/mftctl/data")
    assert cache_text(CacheUse(folder, 3, 1_234_000_000)) == f"{folder}: 3 data sets, 1.2 GB"
    assert cache_text(CacheUse(folder, 1, 2_000_000)) == f"{folder}: 1 data set, 2.0 MB"
    assert cache_text(CacheUse(folder, 0, 0)) == f"{folder}: 0 data sets, 0 bytes"
    assert cache_text(CacheUse(folder, 0, 0, "Permission denied")) == f"{folder}: cannot be read (Permission denied)"
    assert cache_text(CacheUse(None, 0, 0)) == "off"


def test_a_cache_that_cannot_be_read_is_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", refuse)
    assert cache_use() == CacheUse(cache, 0, 0, "Permission denied")


@pytest.mark.slow
def test_env_tells_of_the_cache(cache: Path, mftctl: CommandLine) -> None:
    make("a", 5000)
    facts = json.loads(mftctl("env", "--json").stdout)
    assert facts["cache"] == f"{cache}: 1 data set, {cache_use().size_bytes / 1000:.1f} kB"


def test_a_number_of_processes_that_is_none(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFTCTL_DATA_PROCESSES", "0")
    outcome = mftctl("cache", "clear")
    assert outcome.code == 2
    assert "key: MFTCTL_DATA_PROCESSES" in outcome.stderr


def test_a_cache_folder_that_is_not_utf_8(mftctl: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MFTCTL_CACHE", "name-\udcff")
    outcome = mftctl("cache", "clear")
    assert outcome.code == 2
    assert "key: MFTCTL_CACHE" in outcome.stderr
