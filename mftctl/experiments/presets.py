"""Presets, and the values that they give to options left unset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

PresetName = Literal["default", "paper", "reference"]
LearnFrom = Literal["auto", "all", "unseen"]
ScoreStart = Literal["weights", "normal", "kaiming", "constant", "identity"]
Ranking = Literal["absolute", "signed"]
Keep = Literal["best", "last"]
MaskKind = Literal["weight", "delta"]
MaxMultiplier = Literal[1, 2]
Objective = Literal["sft", "dpo"]
GroupSize = int | Literal["all"]

DEFAULT_RATIO = 0.1
DEFAULT_UPDATE_RATIO = 0.2
DEFAULT_FROZEN_RATIO = 0.99
DEFAULT_PATIENCE = 5
DEFAULT_TRAVEL = 1.6
DEFAULT_SOFT_TRAVEL = 0.05
DEFAULT_BETA = 0.1
DEFAULT_RATES: Final[Mapping[Objective, float]] = {"sft": 2e-5, "dpo": 1e-6}
"""Learning rates of fine-tuning; that of DPO is TRL's."""
DEFAULT_GROUPS: tuple[GroupSize, ...] = (4, "all")

SETTLED: Final[Mapping[str, tuple[str, ...]]] = {
    "fft": ("ratio", "learning_rate", "beta"),
    "probe": ("groups",),
    "mask_train": (
        *("kind", "learn_from", "ratio", "patience", "threshold", "ranking", "start", "keep", "travel", "beta"),
    ),
}
"""Options, by recipe section, whose defaults depend on other options."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Defaults for options left unset.

    Attributes:
        learn_from: Training records to use.
        start: Initial scores.
        ranking: Ranking for a ratio.
        keep: Mask to keep.
        patience: Validations without improvement after which training stops; None for never.
        threshold: Score below which weights are removed, for starts with a natural threshold; None to use a ratio.
        groups: Group sizes that a probe tries; the paper does not try all layers together.
        averages_records: Whether the loss is the mean over records instead of answer tokens.
    """

    learn_from: LearnFrom
    start: ScoreStart
    ranking: Ranking
    keep: Keep
    patience: int | None
    threshold: float | None
    groups: tuple[GroupSize, ...]
    averages_records: bool


PRESETS: Final[Mapping[PresetName, Preset]] = {
    "default": Preset("auto", "weights", "signed", "best", DEFAULT_PATIENCE, 0.0, DEFAULT_GROUPS, False),
    "paper": Preset("all", "normal", "absolute", "best", None, None, (4,), False),
    "reference": Preset("all", "normal", "absolute", "last", None, None, (4,), True),
}


def fft_in_force(given: Mapping[str, Any], method: str, objective: Objective = "sft") -> dict[str, Any]:
    """Returns the effective values of the `fft` options in `SETTLED`.

    Args:
        given: The options that were set.
        method: The training method.
        objective: What is minimised.
    """
    ratios = {"gmt": DEFAULT_UPDATE_RATIO, "random": DEFAULT_UPDATE_RATIO, "supertuning": DEFAULT_FROZEN_RATIO}
    in_force = {
        "ratio": ratios.get(method) if given.get("support") is None else None,
        "learning_rate": DEFAULT_RATES[objective],
        "beta": _beta(objective),
    }
    return _settled("fft", given, in_force)


def mask_train_in_force(
    given: Mapping[str, Any], preset: PresetName, method: str, objective: Objective = "sft"
) -> dict[str, Any]:
    """Returns the effective values of the `mask_train` options in `SETTLED`.

    Args:
        given: The options that were set.
        preset: The effective preset.
        method: The method that chooses the weights.
        objective: What is minimised.
    """
    values, is_learned = PRESETS[preset], method == "learned"
    start: ScoreStart = given.get("start", values.start)
    keep: Keep = given.get("keep", values.keep if is_learned else "best")
    has_pattern = given.get("pattern") is not None
    has_threshold = is_learned and start in ("weights", "constant") and "ratio" not in given and not has_pattern
    threshold: float | None = given.get("threshold", values.threshold if has_threshold else None)
    in_force = {
        "kind": "delta" if method == "drop" else "weight",
        "learn_from": values.learn_from,
        "ratio": DEFAULT_RATIO if threshold is None and not has_pattern else None,
        "patience": None if is_learned and keep == "last" else values.patience,
        "threshold": threshold,
        "ranking": values.ranking,
        "start": start,
        "keep": keep,
        "travel": DEFAULT_TRAVEL,
        "beta": _beta(objective),
    }
    return _settled("mask_train", given, in_force)


def soft_mask_in_force(given: Mapping[str, Any], in_force: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the effective values of those `mask_train` options in `SETTLED` that soft masks settle otherwise.

    A mask that is to become hard has the loss of the unmasked model for half of the training, so it never stops early.

    Args:
        given: The options that were set.
        in_force: The values for hard masks.
    """
    hardens = given.get("harden")
    patience = None if hardens and "patience" not in given else in_force["patience"]
    travel = given.get("travel", DEFAULT_TRAVEL if hardens else DEFAULT_SOFT_TRAVEL)
    return {"ratio": None, "threshold": None, "start": "identity", "patience": patience, "travel": travel}


def probe_in_force(given: Mapping[str, Any], preset: PresetName, *, is_fast: bool) -> dict[str, Any]:
    """Returns the effective values of the `probe` options in `SETTLED`.

    A fast probe does not try all layers together: its predictions are additive, so these would always rank first.

    Args:
        given: The options that were set.
        preset: The preset of the masks.
        is_fast: Whether the probe trains nothing.
    """
    sizes = PRESETS[preset].groups
    return _settled("probe", given, {"groups": tuple(size for size in sizes if not (is_fast and size == "all"))})


def _beta(objective: Objective) -> float | None:
    return DEFAULT_BETA if objective == "dpo" else None


def _settled(section: str, given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: given.get(key, values[key]) for key in SETTLED[section]}


def without_nulls(section: str, document: object) -> object:
    """Returns a section without options set to null, which counts as unset.

    Args:
        section: Name of the section in the recipe.
        document: The section as given; it need not be valid.
    """
    if not isinstance(document, dict):
        return document
    return {key: value for key, value in document.items() if value is not None or key not in SETTLED[section]}
