"""Check of the score that decides between groups of layers or between steps of a training."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from mftctl.errors import ConfigError, EvaluationError
from mftctl.evaluation.benchmarks.catalog import GROUPS

LOSS = "loss"
EXACT_MATCH = "exact_match"
_WITHOUT_A_SCORE = ("alpaca_eval",)
"""Benchmarks scored only by a judge model, which costs money."""


def check_score(by: str, task_data: Mapping[str, str], key: str) -> None:
    """Checks that a criterion is the loss, exact match or a single benchmark with its own score.

    Args:
        by: The criterion.
        task_data: Local files of benchmarks.
        key: The recipe key that names the criterion.

    Raises:
        ConfigError: The criterion is a group of benchmarks, or a benchmark without its own score.
        EvaluationError: The benchmark is unknown, or its local file is missing.
    """
    if by in (LOSS, EXACT_MATCH):
        return
    if by in GROUPS or by in _WITHOUT_A_SCORE:
        raise ConfigError(
            "The criterion must be a single benchmark with its own score.",
            key=key,
            expected="loss, exact_match or such a benchmark",
            actual=by,
            hint=f"one of {', '.join(GROUPS[by])}" if by in GROUPS else None,
        )
    from mftctl.evaluation.benchmarks.lm_eval_tasks import check_task  # lm-eval takes seconds to import

    try:
        check_task(by)
    except EvaluationError as error:
        close = difflib.get_close_matches(by, (LOSS, EXACT_MATCH), n=1)
        raise EvaluationError(
            error.message,
            key=key,
            expected=f"loss, exact_match, or {error.expected}",
            actual=by,
            hint=f"did you mean {close[0]}?" if close else error.hint,
        ) from error
    file = task_data.get(by)
    if file is not None and not Path(file).exists():
        raise EvaluationError("The benchmark's local file does not exist.", path=file, key=f"task_data.{by}")
