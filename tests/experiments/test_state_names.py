from __future__ import annotations

from typing import Any

import pytest

from mftctl.experiments.delta_options import DeltaOptions
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.state_names import (
    AVERAGED,
    CONTINUED_FFT,
    FFT,
    INTERPOLATED,
    PRE_TRAINED,
    STATE_ORDER,
    State,
    StateKind,
    delta_state,
    fine_tuned_state,
    known_state,
    mask_state,
    place_of,
)


@pytest.mark.parametrize("state", [*STATE_ORDER, State(StateKind.WRITTEN)], ids=lambda state: state.label)
def test_a_state_is_found_by_its_own_label(state: State) -> None:
    assert known_state(state.label) == state


@pytest.mark.slow
@pytest.mark.parametrize("source", ["pre-trained", FFT])
@pytest.mark.parametrize("method", ["full", "lora", "gmt", "hft", "random", "shira", "supertuning"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("exclude", [(), ("head",), ("head", "embeddings")])
def test_every_fine_tuning_is_a_known_state(source: str, method: str, scope: str, exclude: tuple[str, ...]) -> None:
    chosen = exclude if method in ("gmt", "random") else ()
    support = {"support": "mask.bits"} if method in ("shira", "supertuning") and exclude else {}
    options = FftOptions.model_validate({"method": method, "scope": scope, "exclude": chosen, **support})
    state = known_state(fine_tuned_state(source, options))
    assert state is not None
    assert (state.is_continued, state.is_global) == (source == FFT, scope == "global")
    assert state.has_support == bool(support)
    assert state.excluded == tuple(sorted(chosen))
    assert state.is_update == (method in ("gmt", "hft", "random"))


def test_a_label_with_a_suffix_is_not_a_known_state() -> None:
    assert known_state("MFT (mft[ratio=0.1])") is None
    assert known_state("something new") is None
    assert place_of("something new") == place_of("GMT excluding head") == len(STATE_ORDER)


def test_states_stand_in_the_order_of_the_papers() -> None:
    labels = [state.label for state in STATE_ORDER]
    assert [place_of(label) for label in labels] == list(range(len(labels)))
    assert labels.index(FFT) + 1 == labels.index(CONTINUED_FFT)
    assert labels[0] == "pre-trained"
    after_fft = labels.index(CONTINUED_FFT) + 1
    assert labels[after_fft : after_fft + 2] == [AVERAGED, INTERPOLATED] == ["averaged", "interpolated"]
    masks = ["MFT, paper", "MFT, reference", "MFT", "MFT threshold"]
    of_preferences = ["MFT DPO, paper", "MFT DPO, reference", "MFT DPO", "MFT DPO threshold"]
    first = labels.index("MFT, paper")
    assert labels[first : first + 8] == [*masks, *of_preferences]
    assert labels[first + 8 : first + 12] == ["MFT soft", "MFT DPO soft", "MFT hardened", "MFT DPO hardened"]
    first = labels.index("MFT delta, paper")
    assert labels[first : first + 8] == [label.replace("MFT", "MFT delta") for label in (*masks, *of_preferences)]
    assert labels[-1] == "masked"


@pytest.mark.parametrize(
    ("options", "label"),
    [({}, "MFT soft"), ({"harden": True}, "MFT hardened"), ({"objective": "dpo"}, "MFT DPO soft")],
    ids=str,
)
def test_soft_masks_are_named_and_learned(options: dict[str, Any], label: str) -> None:
    assert mask_state(MaskTrainOptions.model_validate({"mask": "soft", **options})) == label
    state = known_state(label)
    assert state is not None
    assert state.is_mft


def test_masks_and_drops_are_told_apart() -> None:
    kinds = {
        "learned": {"preset": "paper", "threshold": 0.0},
        "paper": {"preset": "paper"},
        "random": {"method": "random"},
        "drop": {"method": "drop", "strategy": "salient"},
    }
    found = {name: known_state(mask_state(MaskTrainOptions.model_validate(given))) for name, given in kinds.items()}
    states = {name: state for name, state in found.items() if state is not None}
    assert {name for name, state in states.items() if state.is_mft} == {"learned", "paper"}
    assert {name for name, state in states.items() if state.is_drop} == {"drop"}
    assert states["paper"] == State(StateKind.MFT, preset="paper")
    masked = State(StateKind.MASKED)
    assert masked.is_masked_by_learning
    assert not masked.is_mft


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "MFT delta"),
        ({"preset": "paper"}, "MFT delta, paper"),
        ({"preset": "reference"}, "MFT delta, reference"),
        ({"preset": "paper", "threshold": -0.1}, "MFT delta threshold"),
        ({"method": "random"}, "random mask delta"),
        ({"method": "magnitude"}, "L1 mask delta"),
    ],
    ids=str,
)
def test_delta_masks_are_named_and_told_apart_from_drops(options: dict[str, Any], label: str) -> None:
    assert mask_state(MaskTrainOptions.model_validate({**options, "kind": "delta"})) == label
    state = known_state(label)
    assert state is not None
    assert (state.is_delta, state.resets, state.is_drop, state.is_update) == (True, True, False, False)
    assert state.is_mft == state.is_masked_by_learning == ("MFT" in label)
    drop = known_state(mask_state(MaskTrainOptions(method="drop")))
    assert drop is not None
    assert (drop.is_delta, drop.resets) == (False, True)
    weight = known_state(mask_state(MaskTrainOptions.model_validate(options)))
    assert weight is not None
    assert not weight.resets


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "delta exact"),
        ({"values": "sign", "ratio": 0.5}, "delta sign"),
        ({"values": "int8", "select": "random", "rescale": True}, "delta int8 rescaled"),
    ],
    ids=str,
)
def test_delta_files_are_named_by_their_values(options: dict[str, Any], label: str) -> None:
    assert delta_state(DeltaOptions.model_validate(options)) == label
    state = known_state(label)
    assert state is not None
    assert (state.kind, state.is_update, state.resets, state.is_mft) == (StateKind.DELTA, False, False, False)
    assert place_of("DARE") < place_of(label) < place_of("merged deltas") < place_of("MFT")


@pytest.mark.parametrize(("method", "label"), [("full", "FFT retaining"), ("gmt", "GMT retaining")])
def test_training_against_forgetting_has_its_own_label_and_is_no_baseline(method: str, label: str) -> None:
    options = FftOptions.model_validate({"method": method, "retain_weight": 1.0})
    assert fine_tuned_state(PRE_TRAINED, options) == label
    assert fine_tuned_state(FFT, options) == f"continued {label}"
    state = known_state(label)
    assert state is not None
    assert state.is_retaining
    assert not state.is_plain_training


@pytest.mark.parametrize(
    ("method", "label"), [("full", "DPO"), ("lora", "LoRA DPO"), ("gmt", "GMT DPO"), ("random", "random update DPO")]
)
def test_training_on_preferences_has_its_own_label(method: str, label: str) -> None:
    options = FftOptions.model_validate({"method": method, "objective": "dpo"})
    assert [fine_tuned_state(source, options) for source in (PRE_TRAINED, FFT, CONTINUED_FFT)] == [label] * 3
    assert fine_tuned_state(label, options) == f"continued {label}"
    state = known_state(label)
    assert state is not None
    assert (state.is_preference, state.is_plain_training) == (True, method == "full")
    learned = known_state(mask_state(MaskTrainOptions.model_validate({"objective": "dpo", "preset": "paper"})))
    assert learned == State(StateKind.MFT, preset="paper", is_preference=True)
    assert learned.label == "MFT DPO, paper"
