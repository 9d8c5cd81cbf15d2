"""Checks of the kind of a probe's masks and of what they are trained for."""

from __future__ import annotations

from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe


def check_kind(recipe: Recipe) -> None:
    """Checks that a probe supports the masks and the objective in its recipe.

    Raises:
        ConfigError: A fast probe is to predict delta masks or a loss on preferences, or preferences are to be ranked by
            exact match.
    """
    if recipe.mask_train.objective == "dpo" and (recipe.probe.fast or recipe.probe.by == "exact_match"):
        key = "probe.fast" if recipe.probe.fast else "probe.by"
        raise ConfigError(
            "This probe does not work on preferences.",
            key=key,
            expected="a trained probe by loss or by a benchmark, for mask_train.objective: dpo",
            actual=recipe.probe.fast or recipe.probe.by,
        )
    if recipe.probe.fast and recipe.mask_train.kind == "delta":
        raise ConfigError(
            "A fast probe predicts weight masks only.",
            key="mask_train.kind",
            expected="weight with probe.fast",
            actual=recipe.mask_train.kind,
            hint="probe without --fast, which trains a delta mask for each group",
        )
