"""Check of the kind of a probe's masks."""

from __future__ import annotations

from mftctl.errors import ConfigError
from mftctl.experiments.recipe import Recipe


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
