"""States of a model that a report compares: their kinds, labels (as in the papers) and order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from itertools import product
from typing import Final, get_args

from mftctl.experiments.delta_options import DeltaOptions, DeltaValues
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.presets import PresetName


class StateKind(Enum):
    """Last operation applied to a model."""

    PRE_TRAINED = auto()
    UNKNOWN = auto()
    FFT = auto()
    AVERAGED = auto()
    INTERPOLATED = auto()
    LORA = auto()
    SHIRA = auto()
    SUPER_TUNING = auto()
    HFT = auto()
    RANDOM_UPDATE = auto()
    GMT = auto()
    TRIVIAL_DROP = auto()
    SALIENT_DROP = auto()
    RANDOM_DROP = auto()
    DARE = auto()
    RANDOM_MASK = auto()
    L1_MASK = auto()
    L1_ROW_MASK = auto()
    MFT = auto()
    MFT_THRESHOLD = auto()
    SOFT_MFT = auto()
    HARDENED_MFT = auto()
    DELTA = auto()
    MERGED_DELTAS = auto()
    MASKED = auto()
    WRITTEN = auto()


_TUNED: Final = {
    "full": StateKind.FFT,
    "lora": StateKind.LORA,
    "shira": StateKind.SHIRA,
    "supertuning": StateKind.SUPER_TUNING,
    "gmt": StateKind.GMT,
    "random": StateKind.RANDOM_UPDATE,
    "hft": StateKind.HFT,
}
_DROPS: Final = {
    "trivial": StateKind.TRIVIAL_DROP,
    "salient": StateKind.SALIENT_DROP,
    "random": StateKind.RANDOM_DROP,
}
_ALL_DROPS: Final = {*_DROPS.values(), StateKind.DARE}
_LEARNED: Final = {StateKind.MFT, StateKind.MFT_THRESHOLD, StateKind.SOFT_MFT, StateKind.HARDENED_MFT}
_UPDATES: Final = {StateKind.HFT, StateKind.RANDOM_UPDATE, StateKind.GMT, *_ALL_DROPS}


@dataclass(frozen=True, slots=True)
class State:
    """State of a model.

    Attributes:
        kind: Last operation applied to the model.
        is_continued: Whether that was fine-tuning of a model that had already been fine-tuned.
        is_global: Whether an update ratio applied to all tensors together.
        excluded: Parts that an update ratio did not apply to, in alphabetical order.
        preset: Preset of mask training.
        is_delta: Whether a mask, other than a drop, returned weights to their values before fine-tuning.
        is_retaining: Whether fine-tuning also trained against forgetting other data.
        has_support: Whether a mask chose the weights that an adapter changes.
        values: Kind of the values of a delta file.
        is_rescaled: Whether a delta file multiplied the changes that it kept.
        is_preference: Whether weights or a mask were trained on preferences.
    """

    kind: StateKind
    is_continued: bool = False
    is_global: bool = False
    excluded: tuple[str, ...] = ()
    preset: PresetName = "default"
    is_delta: bool = False
    is_retaining: bool = False
    has_support: bool = False
    values: DeltaValues | None = None
    is_rescaled: bool = False
    is_preference: bool = False

    @property
    def label(self) -> str:
        """Name of the state in reports and run records."""
        return _LABELS[self]

    @property
    def is_update(self) -> bool:
        """True if a selection of weights was updated or reset."""
        return self.kind in _UPDATES

    @property
    def is_plain_training(self) -> bool:
        """True for fine-tuning of all weights on one loss, and for averages and interpolations of its weights."""
        return not self.is_retaining and self.kind in (StateKind.FFT, StateKind.AVERAGED, StateKind.INTERPOLATED)

    @property
    def is_drop(self) -> bool:
        """True if weights were reset to their values before fine-tuning."""
        return self.kind in _ALL_DROPS

    @property
    def resets(self) -> bool:
        """True if a mask returned weights to their values before fine-tuning."""
        return self.is_drop or self.is_delta

    @property
    def is_mft(self) -> bool:
        """True if a mask was learned by Mask Fine-Tuning."""
        return self.kind in _LEARNED

    @property
    def is_masked_by_learning(self) -> bool:
        """True if the model has a learned mask, or a mask file not written by any run here."""
        return self.is_mft or self.kind is StateKind.MASKED


_PRESETS: Final[Mapping[PresetName, str]] = {"paper": ", paper", "reference": ", reference", "default": ""}


def _learned_masks(*, is_delta: bool) -> dict[State, str]:
    """Labels of learned masks, first of those learned from answers."""
    found: dict[State, str] = {}
    for is_preference in (False, True):
        name = "MFT" + (" delta" if is_delta else "") + (" DPO" if is_preference else "")
        for preset, word in _PRESETS.items():
            state = State(StateKind.MFT, preset=preset, is_delta=is_delta, is_preference=is_preference)
            found[state] = name + word
        state = State(StateKind.MFT_THRESHOLD, is_delta=is_delta, is_preference=is_preference)
        found[state] = f"{name} threshold"
    return found


_TABLE: Final = {
    State(StateKind.PRE_TRAINED): "pre-trained",
    State(StateKind.UNKNOWN): "unknown origin",
    State(StateKind.FFT): "FFT",
    State(StateKind.FFT, is_continued=True): "continued FFT",
    State(StateKind.AVERAGED): "averaged",
    State(StateKind.INTERPOLATED): "interpolated",
    State(StateKind.FFT, is_retaining=True): "FFT retaining",
    State(StateKind.FFT, is_preference=True): "DPO",
    State(StateKind.FFT, is_continued=True, is_preference=True): "continued DPO",
    State(StateKind.LORA): "LoRA",
    State(StateKind.LORA, is_continued=True): "continued LoRA",
    State(StateKind.SHIRA): "SHiRA",
    State(StateKind.SHIRA, has_support=True): "SHiRA on a mask",
    State(StateKind.SUPER_TUNING): "Super-Tuning",
    State(StateKind.SUPER_TUNING, has_support=True): "Super-Tuning on a mask",
    State(StateKind.HFT): "HFT",
    State(StateKind.RANDOM_UPDATE): "random update",
    State(StateKind.RANDOM_UPDATE, is_global=True): "random update global",
    State(StateKind.GMT): "GMT",
    State(StateKind.GMT, is_global=True): "GMT global",
    State(StateKind.TRIVIAL_DROP): "trivial drop",
    State(StateKind.SALIENT_DROP): "salient drop",
    State(StateKind.RANDOM_DROP): "random drop",
    State(StateKind.DARE): "DARE",
    **{
        State(StateKind.DELTA, values=values, is_rescaled=is_rescaled): f"delta {values}{' rescaled' * is_rescaled}"
        for values in get_args(DeltaValues)
        for is_rescaled in (False, True)
    },
    State(StateKind.MERGED_DELTAS): "merged deltas",
    State(StateKind.RANDOM_MASK): "random mask",
    State(StateKind.L1_MASK): "L1 mask",
    State(StateKind.L1_ROW_MASK): "L1 row mask",
    **_learned_masks(is_delta=False),
    State(StateKind.SOFT_MFT): "MFT soft",
    State(StateKind.SOFT_MFT, is_preference=True): "MFT DPO soft",
    State(StateKind.HARDENED_MFT): "MFT hardened",
    State(StateKind.HARDENED_MFT, is_preference=True): "MFT DPO hardened",
    State(StateKind.RANDOM_MASK, is_delta=True): "random mask delta",
    State(StateKind.L1_MASK, is_delta=True): "L1 mask delta",
    **_learned_masks(is_delta=True),
    State(StateKind.MASKED): "masked",
}
"""Labels in the order of the papers' tables."""

STATE_ORDER: Final = tuple(_TABLE)


def _all_labels() -> dict[State, str]:
    """Labels of the states in the table, and of fine-tuned states that the papers' tables do not contain."""
    labels = {**_TABLE, State(StateKind.WRITTEN): "written outputs"}
    exclusions = ((), ("embeddings",), ("head",), ("embeddings", "head"))
    flags = (False, True)
    for kind, is_continued, is_global, is_retaining, is_preference, excluded, has_support in product(
        _TUNED.values(), flags, flags, flags, flags, exclusions, flags
    ):
        words = ["continued"] if is_continued else []
        words += [] if is_preference and kind is StateKind.FFT else [_TABLE[State(kind)]]
        words += ["on a mask"] if has_support else []
        words += [*(["global"] if is_global else []), *(["DPO"] if is_preference else [])]
        words += ["retaining"] if is_retaining else []
        words += [f"excluding {', '.join(excluded)}"] if excluded else []
        state = State(
            kind,
            is_continued,
            is_global,
            excluded,
            is_retaining=is_retaining,
            is_preference=is_preference,
            has_support=has_support,
        )
        labels.setdefault(state, " ".join(words))
    return labels


_LABELS: Final = _all_labels()
_BY_LABEL: Final = {label: state for state, label in _LABELS.items()}

PRE_TRAINED: Final = State(StateKind.PRE_TRAINED).label
UNKNOWN: Final = State(StateKind.UNKNOWN).label
FFT: Final = State(StateKind.FFT).label
CONTINUED_FFT: Final = State(StateKind.FFT, is_continued=True).label
AVERAGED: Final = State(StateKind.AVERAGED).label
INTERPOLATED: Final = State(StateKind.INTERPOLATED).label
MERGED_DELTAS: Final = State(StateKind.MERGED_DELTAS).label
MASKED: Final = State(StateKind.MASKED).label
WRITTEN: Final = State(StateKind.WRITTEN).label


def known_state(label: str) -> State | None:
    """Returns the state with this label; None if this version does not use the label.

    Args:
        label: The label in a run's record.
    """
    return _BY_LABEL.get(label)


def place_of(label: str) -> int:
    """Returns the position of a state in the papers' tables; states not in them come last.

    Args:
        label: The label in a run's record.
    """
    return _PLACES.get(label, len(_PLACES))


_PLACES: Final = {label: place for place, label in enumerate(_TABLE.values())}


def fine_tuned_state(source_state: str, options: FftOptions) -> str:
    """Returns the state after fine-tuning: FFT for a pre-trained model, continued FFT for a fine-tuned one.

    Training with a `retain_weight` has its own label (FFT retaining), as it is no baseline for plain training. Training
    on preferences is DPO, and continued DPO only after DPO.
    """
    is_preference, before = options.objective == "dpo", known_state(source_state)
    is_continued = source_state != PRE_TRAINED
    if is_preference:
        is_continued = before is not None and before.is_preference
    return State(
        _TUNED[options.method],
        is_continued=is_continued,
        is_global=options.scope == "global",
        excluded=tuple(sorted(set(options.exclude))),
        is_retaining=options.retain_weight > 0,
        has_support=options.support is not None,
        is_preference=is_preference,
    ).label


def mask_state(options: MaskTrainOptions) -> str:
    """Returns the state of a masked model as named in the papers; with a preset `MFT, paper` or `MFT, reference`."""
    return _mask_state(options).label


def delta_state(options: DeltaOptions) -> str:
    """Returns the state of a model with the changes of a delta file: its kind of values, and whether it rescales."""
    return State(StateKind.DELTA, values=options.values, is_rescaled=options.rescale).label


def _mask_state(options: MaskTrainOptions) -> State:
    is_delta = options.kind == "delta"
    match options.method:
        case "drop":
            return State(StateKind.DARE if options.rescale else _DROPS[options.strategy])
        case "random":
            return State(StateKind.RANDOM_MASK, is_delta=is_delta)
        case "magnitude":
            kind = StateKind.L1_ROW_MASK if options.unit == "row" else StateKind.L1_MASK
            return State(kind, is_delta=is_delta)
        case "learned":
            is_preference = options.objective == "dpo"
            if options.mask == "soft":
                kind = StateKind.HARDENED_MFT if options.harden else StateKind.SOFT_MFT
                return State(kind, is_preference=is_preference)
            if options.preset == "default" or options.threshold is None:
                return State(StateKind.MFT, preset=options.preset, is_delta=is_delta, is_preference=is_preference)
            return State(StateKind.MFT_THRESHOLD, is_delta=is_delta, is_preference=is_preference)
