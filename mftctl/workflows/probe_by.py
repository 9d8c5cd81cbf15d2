"""Checks of a probe's criterion and of the kind of its masks."""

from __future__ import annotations

from pathlib import Path

from mftctl.errors import ConfigError, EvaluationError
from mftctl.evaluation.benchmarks.catalog import GROUPS
from mftctl.experiments.recipe import Recipe

EXACT_MATCH = "exact_match"
_WITHOUT_A_SCORE = ("alpaca_eval",)
"""Benchmarks scored only by a judge model, which costs money."""


def check_by(recipe: Recipe) -> None:
    """Checks that a probe can rank groups by the criterion in its recipe, with masks of the kind in its recipe.

    Raises:
        ConfigError: The criterion is a group of benchmarks, or a benchmark without its own score; or `check_kind`.
        EvaluationError: The benchmark is unknown, or its local file is missing.
    """
    check_kind(recipe)
    by = recipe.probe.by
    if by in ("loss", EXACT_MATCH):
        return
    if by in GROUPS or by in _WITHOUT_A_SCORE:
        raise ConfigError(
            "A probe needs a single benchmark with its own score.",
            key="probe.by",
            expected="loss, exact_match or such a benchmark",
            actual=by,
            hint=f"one of {', '.join(GROUPS[by])}" if by in GROUPS else None,
        )
    from mftctl.evaluation.benchmarks.lm_eval_tasks import check_task  # lm-eval takes seconds to import

    check_task(by)
    file = recipe.eval.task_data.get(by)
    if file is not None and not Path(file).exists():
        raise EvaluationError("The benchmark's local file does not exist.", path=file, key=f"task_data.{by}")


def check_kind(recipe: Recipe) -> None:
    """Checks that a probe supports the kind of masks in its recipe.

    Raises:
        ConfigError: A fast probe is to predict delta masks.
    """
    if recipe.probe.fast and recipe.mask_train.kind == "delta":
        raise ConfigError(
            "A fast probe predicts weight masks only.",
            key="mask_train.kind",
            expected="weight with probe.fast",
            actual=recipe.mask_train.kind,
            hint="probe without --fast, which trains a delta mask for each group",
        )
