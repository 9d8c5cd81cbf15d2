"""Free memory within the cgroup limits of a container."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mftctl.runtime.memory import available_bytes, total_bytes

GB = 10**9


@pytest.fixture(autouse=True)
def _host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=512 * GB, available=300 * GB))


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def member(root: Path, line: str) -> None:
    write(root / "proc/self", cgroup=f"3:cpuset:/\n{line}")


def test_a_system_without_cgroups(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) == 300 * GB
    assert total_bytes(tmp_path) == 512 * GB


@pytest.mark.parametrize("group", ["/", "/docker/of/the/host"])
def test_version_2_in_a_container(tmp_path: Path, group: str) -> None:
    member(tmp_path, f"0::{group}")
    stat = f"anon 5\ninactive_file {3 * GB}"
    write(tmp_path / "sys/fs/cgroup", memory__max=16 * GB, memory__current=9 * GB, memory__stat=stat)
    assert available_bytes(tmp_path) == 10 * GB  # page cache can be reclaimed
    assert total_bytes(tmp_path) == 16 * GB


def test_version_2_below_a_group_that_allows_less(tmp_path: Path) -> None:
    member(tmp_path, "0::/user/job")
    top = tmp_path / "sys/fs/cgroup"
    write(top / "user/job", memory__max="max", memory__current=2 * GB)
    write(top / "user", memory__max=20 * GB, memory__current=15 * GB)
    assert available_bytes(tmp_path) == 5 * GB
    assert total_bytes(tmp_path) == 20 * GB


def test_version_1(tmp_path: Path) -> None:
    member(tmp_path, "4:cpu,memory:/job")
    top = tmp_path / "sys/fs/cgroup/memory"
    usage = {"memory__usage_in_bytes": 6 * GB, "memory__stat": f"total_inactive_file {1 * GB}"}
    write(top / "job", memory__limit_in_bytes=8 * GB, **usage)
    write(top, memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=70 * GB)
    assert available_bytes(tmp_path) == 3 * GB
    assert total_bytes(tmp_path) == 8 * GB


def test_more_used_than_allowed(tmp_path: Path) -> None:
    write(tmp_path / "sys/fs/cgroup", memory__max=GB, memory__current=2 * GB)
    assert available_bytes(tmp_path) == 0


def test_a_limit_above_what_the_host_has(tmp_path: Path) -> None:
    write(tmp_path / "sys/fs/cgroup", memory__max=900 * GB, memory__current=1)
    assert available_bytes(tmp_path) == 300 * GB
    assert total_bytes(tmp_path) == 512 * GB
