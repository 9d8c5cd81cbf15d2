"""Presets, and what options that were left unset stand for under each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

PresetName = Literal["default", "paper", "reference"]
LearnFrom = Literal["auto", "all", "unseen"]
ScoreStart = Literal["weights", "normal", "kaiming", "constant"]
Ranking = Literal["absolute", "signed"]
Keep = Literal["best", "last"]
GroupSize = int | Literal["all"]

DEFAULT_RATIO = 0.1
DEFAULT_UPDATE_RATIO = 0.2
DEFAULT_PATIENCE = 5
DEFAULT_GROUPS: tuple[GroupSize, ...] = (4, "all")

SETTLED: Final[Mapping[str, tuple[str, ...]]] = {
    "fft": ("ratio",),
    "probe": ("groups",),
    "mask_train": ("learn_from", "ratio", "patience", "threshold", "ranking", "start", "keep"),
}
"""Options, by section of the recipe, whose value hangs on others where they are left unset."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Values of options that are left unset.

    Attributes:
        learn_from: The training records of a mask.
        start: Where scores start.
        ranking: What a ratio ranks.
        keep: The mask kept.
        patience: Validations without a new best after which training ends; None for never.
        threshold: Below which scores are removed, of starts that have a natural one; None where a ratio decides.
        groups: Sizes of the groups that a probe tries. The paper never tries all layers beside its groups.
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


def fft_in_force(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The values of the settled options of `fft`.

    Args:
        given: The options that were set.
        method: That trains.
    """
    ratio = DEFAULT_UPDATE_RATIO if method in ("gmt", "random") else None
    return _settled("fft", given, {"ratio": ratio})


def mask_train_in_force(given: Mapping[str, Any], preset: PresetName, method: str) -> dict[str, Any]:
    """The values of the settled options of `mask_train`.

    Args:
        given: The options that were set.
        preset: In force.
        method: That chooses the weights.
    """
    values, is_learned = PRESETS[preset], method == "learned"
    start: ScoreStart = given.get("start", values.start)
    keep: Keep = given.get("keep", values.keep if is_learned else "best")
    has_threshold = is_learned and start in ("weights", "constant") and "ratio" not in given
    threshold: float | None = given.get("threshold", values.threshold if has_threshold else None)
    in_force = {
        "learn_from": values.learn_from,
        "ratio": DEFAULT_RATIO if threshold is None else None,
        "patience": None if is_learned and keep == "last" else values.patience,
        "threshold": threshold,
        "ranking": values.ranking,
        "start": start,
        "keep": keep,
    }
    return _settled("mask_train", given, in_force)


def probe_in_force(given: Mapping[str, Any], preset: PresetName, *, is_fast: bool) -> dict[str, Any]:
    """The values of the settled options of `probe`.

    Promises of a fast probe add up, so that all layers always promise most.

    Args:
        given: The options that were set.
        preset: Of the masks.
        is_fast: Whether nothing is trained.
    """
    sizes = PRESETS[preset].groups
    return _settled("probe", given, {"groups": tuple(size for size in sizes if not (is_fast and size == "all"))})


def _settled(section: str, given: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: given.get(key, values[key]) for key in SETTLED[section]}


def without_nulls(section: str, document: object) -> object:
    """A section's document without those options that a null leaves unset.

    Args:
        section: Its name in the recipe.
        document: As given, whatever it is.
    """
    if not isinstance(document, dict):
        return document
    return {key: value for key, value in document.items() if value is not None or key not in SETTLED[section]}
