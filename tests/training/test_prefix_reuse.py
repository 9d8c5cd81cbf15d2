"""The memory reserved for hidden states of frozen layers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.training import prefix_cache
from mftctl.training.prefix_cache import hidden_states

GB = 10**9


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "available_bytes", lambda: 64 * GB)
    monkeypatch.setattr(prefix_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=400 * GB))


@pytest.mark.parametrize("on_this_machine", [1, 8])
@pytest.mark.parametrize(("limit_gb", "memory_gb", "file_gb"), [(None, 16, 100), (40.0, 16, 24), (8.0, 8, 0)])
def test_the_memory_of_a_machine_is_divided_among_its_processes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on_this_machine: int,
    limit_gb: float | None,
    memory_gb: int,
    file_gb: int,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(2 * on_this_machine))  # on two machines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_this_machine))
    states = hidden_states(MaskTrainOptions(prefix_cache_gb=limit_gb), tmp_path)
    rooms = [room * on_this_machine for room in (states._room_bytes, states._file_room_bytes)]
    assert rooms == [memory_gb * GB, file_gb * GB]
