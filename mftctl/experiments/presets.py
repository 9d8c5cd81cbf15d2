"""Presets, and what options that were left unset stand for under each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

if TYPE_CHECKING:
    from mftctl.experiments.recipe import ProbeOptions
    from mftctl.experiments.training_options import FftOptions, MaskTrainOptions

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


def fft_in_force(options: FftOptions) -> dict[str, Any]:
    """The values of the options of `fft` that were left unset."""
    chooses = options.method in ("gmt", "random")
    return _unset("fft", options, {"ratio": DEFAULT_UPDATE_RATIO if chooses else None})


def mask_train_in_force(options: MaskTrainOptions) -> dict[str, Any]:
    """The values of the options of `mask_train` that were left unset."""
    preset, given = PRESETS[options.preset], options.model_fields_set
    is_learned = options.method == "learned"
    start = options.start if "start" in given else preset.start
    keep: Keep = options.keep if "keep" in given else preset.keep if is_learned else "best"
    patience = None if is_learned and keep == "last" else preset.patience
    ratio, threshold = None, None
    if not given & {"ratio", "threshold"}:
        is_natural = is_learned and start in ("weights", "constant")
        threshold = preset.threshold if is_natural else None
        ratio = DEFAULT_RATIO if threshold is None else None
    values = {
        "learn_from": preset.learn_from,
        "ratio": ratio,
        "patience": patience,
        "threshold": threshold,
        "ranking": preset.ranking,
        "start": start,
        "keep": keep,
    }
    return _unset("mask_train", options, values)


def probe_in_force(options: ProbeOptions, mask_train: MaskTrainOptions) -> dict[str, Any]:
    """The values of the options of `probe` that were left unset.

    Promises of a fast probe add up, so that all layers always promise most.
    """
    sizes = PRESETS[mask_train.preset].groups
    return _unset("probe", options, {"groups": tuple(size for size in sizes if not (options.fast and size == "all"))})


def _unset(
    section: str, options: FftOptions | MaskTrainOptions | ProbeOptions, values: dict[str, Any]
) -> dict[str, Any]:
    return {key: values[key] for key in SETTLED[section] if key not in options.model_fields_set}


def without_nulls(section: str, document: object) -> object:
    """A section's document without those options that a null leaves unset.

    Args:
        section: Its name in the recipe.
        document: As given, whatever it is.
    """
    if not isinstance(document, dict):
        return document
    return {key: value for key, value in document.items() if value is not None or key not in SETTLED[section]}
