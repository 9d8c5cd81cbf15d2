from __future__ import annotations

import pytest

from mftctl.config import FftOptions
from mftctl.steps import total_steps


@pytest.mark.parametrize(
    ("records", "options", "world_size", "expected"),
    [
        (100, {"batch_size": 8}, 1, 13),
        (100, {"batch_size": 8, "epochs": 3}, 1, 39),
        (100, {"batch_size": 8, "epochs": 0.5}, 1, 7),
        (100, {"batch_size": 8, "grad_accum_steps": 4}, 1, 4),
        (100, {"batch_size": 8}, 2, 7),
        (100, {"batch_size": 8, "epochs": 3, "max_steps": 5}, 1, 5),
        (3, {"batch_size": 8}, 1, 1),
    ],
)
def test_total_steps(records: int, options: dict[str, float], world_size: int, expected: int) -> None:
    assert total_steps(records, FftOptions(**options), world_size) == expected
