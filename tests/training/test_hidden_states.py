"""Hidden states in memory and in a file are read back unchanged, within the size limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mftctl.training.prefix_cache import HiddenStates

FULL = Path("/dev/full")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
puts = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2), st.integers(0, 99)),
    max_size=12,
)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(puts, st.integers(0, 200), st.integers(0, 200))
def test_returns_the_last_value_kept_within_the_limits(
    tmp_path: Path, calls: list[tuple[int, int, int, int, int]], memory_bytes: int, file_bytes: int
) -> None:
    expected: dict[bytes, tuple[int, torch.Tensor]] = {}
    with HiddenStates(tmp_path, memory_bytes, file_bytes) as states:
        for batch, layer, tokens, dtype, seed in calls:
            generator = torch.Generator().manual_seed(seed)
            hidden_states = torch.randn(2, tokens, 3, generator=generator).to(DTYPES[dtype])
            if states.put(bytes([batch]), layer, hidden_states):
                expected[bytes([batch])] = (layer, hidden_states)
            assert states.size_bytes <= memory_bytes + file_bytes
            assert len(states) == len(expected)
        for key, (layer, hidden_states) in expected.items():
            found = states.get(key, deepest=3)
            assert found is not None
            assert found[0] == layer
            assert found[1].dtype == hidden_states.dtype
            assert torch.equal(found[1], hidden_states)
            assert states.get(key, deepest=layer - 1) is None
        assert states.reused == len(expected)
        assert states.size_bytes == sum(hidden_states.nbytes for _, hidden_states in expected.values())


def test_memory_comes_first_then_the_file_then_nothing(tmp_path: Path) -> None:
    hidden_states = torch.ones(1, 4, 4)
    with HiddenStates(tmp_path, 64, 64) as states:
        assert states.put(b"a", 1, hidden_states)
        assert states._file is None
        assert states.put(b"b", 1, hidden_states)
        assert states._file is not None
        assert not states.put(b"c", 1, hidden_states)
        assert states.put(b"b", 2, 2 * hidden_states)  # replaces the other one
        found = states.get(b"b", 2)
        assert found is not None
        assert torch.equal(found[1], 2 * hidden_states)
        assert list(tmp_path.iterdir()) == []  # so that a killed process leaves no file
        file = states._file
    assert file.closed


def test_reads_return_copies(tmp_path: Path) -> None:
    with HiddenStates(tmp_path, 0, 64) as states:
        states.put(b"a", 1, torch.ones(1, 4, 4))
        for _ in range(2):
            found = states.get(b"a", 1)
            assert found is not None
            assert torch.equal(found[1], torch.ones(1, 4, 4))
            found[1].zero_()


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path) -> None:
    with HiddenStates(tmp_path, 0, 1 << 20) as states:
        states._file = FULL.open("r+b", buffering=0)
        with pytest.raises(OSError, match="No space left"):
            states.put(b"a", 1, torch.ones(1, 4, 4))
        assert len(states) == 0
        assert states.size_bytes == 0
