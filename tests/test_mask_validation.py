"""Which validation records decide which mask is the best, and which confirm it."""

from __future__ import annotations

from typing import Any

from mftctl.config import MaskTrainOptions
from mftctl.mask_validation import split_validation_records


def test_too_few_records_for_two_parts_all_decide() -> None:
    records: Any = list(range(7))
    assert split_validation_records(records, MaskTrainOptions()) == (records, [])
    assert split_validation_records(records * 2, MaskTrainOptions(method="random")) == (records * 2, [])
