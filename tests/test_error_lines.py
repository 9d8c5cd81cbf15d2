"""The text of an exception as one line."""

from __future__ import annotations

import pytest

from mftctl.masking.checkpoints.model_failures import reason_of
from mftctl.text import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  \n after"), "after"),
        (NotImplementedError(), "NotImplementedError"),
        (ValueError("x" * 400), "x" * 300 + "…"),
    ],
)
def test_the_first_line_or_the_class(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("rope"), "KeyError: 'rope'"),
        (OSError("no such file"), "no such file"),
        (AttributeError(), "AttributeError"),
    ],
)
def test_a_more_specific_class_is_named(error: Exception, reason: str) -> None:
    assert reason_of(error) == reason
