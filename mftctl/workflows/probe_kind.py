"""Checks of the kind of a probe's masks and of what they are trained for."""

from __future__ import annotations

from mftctl.errors import ConfigError
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.recipe import Recipe

_PARTS = {"head": "attn", "neuron": "mlp"}
"""The part of each layer that has such units."""


def check_kind(recipe: Recipe) -> None:
    """Checks that a probe supports the masks, their ratio and target, and the objective in its recipe.

    Raises:
        ConfigError: It does not.
    """
    options, unit = recipe.mask_train, recipe.probe.unit
    if options.objective == "dpo" and (recipe.probe.fast or recipe.probe.by == "exact_match"):
        key = "probe.fast" if recipe.probe.fast else "probe.by"
        raise ConfigError(
            "This probe does not work on preferences.",
            key=key,
            expected="a trained probe by loss or by a benchmark, for mask_train.objective: dpo",
            actual=recipe.probe.fast or recipe.probe.by,
        )
    if recipe.probe.fast and options.kind == "delta":
        raise ConfigError(
            "A fast probe predicts weight masks only.",
            key="mask_train.kind",
            expected="weight with probe.fast",
            actual=options.kind,
            hint="probe without --fast, which trains a delta mask for each group",
        )
    _check_masks(options)
    part = _PARTS.get(unit, options.target)
    if options.target not in (part, "both"):
        raise ConfigError(
            f"The part of each layer to mask has no {unit}s.",
            key="mask_train.target",
            expected=f"{part} or both",
            actual=options.target,
        )


def _check_masks(options: MaskTrainOptions) -> None:
    if options.mask == "soft":
        raise ConfigError(
            "A probe compares hard masks.",
            key="mask_train.mask",
            expected="hard",
            actual=options.mask,
            hint="probe without it, then mask-train --mask soft on the layers found",
        )
    if options.shared_budget is not None:
        raise ConfigError(
            "A probe compares masks with the same ratio in each tensor.",
            key="mask_train.ratio",
            expected="a number, or a threshold or pattern",
            actual=str(options.ratio),
            hint="--ratio auto distributes its budget in mask-train itself, without a probe",
        )
    if options.target in ("projector", "all"):
        raise ConfigError(
            "A probe compares decoder layers, and the projector belongs to none.",
            key="mask_train.target",
            expected="attn, mlp or both",
            actual=options.target,
            hint="mask-train --target projector, without a probe",
        )
