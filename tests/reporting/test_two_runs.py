from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.experiments.run_folder import Run, load_run
from mftctl.experiments.run_record import RunRecord
from mftctl.masking.mask import save_mask
from mftctl.reporting.two_runs import Difference, RunComparison, compare_two
from tests.masking.mask_files import DELTA_METADATA, METADATA, build_mask
from tests.reporting.run_folders import make_samples, write_evaluation
from tests.reporting.test_state_tables import bootstrap

BOTH = ("loss", "exact_match")
PLAIN = st.none() | st.booleans() | st.integers(-3, 3) | st.text("abc", min_size=1, max_size=2)
NESTED = st.recursive(
    PLAIN | st.lists(st.integers(0, 2), min_size=1, max_size=2),
    lambda inner: st.dictionaries(st.text("xyz", min_size=1, max_size=2), inner, min_size=1, max_size=3),
    max_leaves=8,
)
CONFIG = st.dictionaries(st.text("pqr", min_size=1, max_size=2), NESTED, max_size=4)


def run(name: str = "001-fft", **fields: Any) -> Run:
    record = RunRecord("fft", "finished", "", {})
    return Run(Path("runs") / name, replace(record, **fields))


def leaves(value: Any, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Every value that is not a mapping, by its path."""
    if isinstance(value, dict):
        return {key: leaf for name, item in value.items() for key, leaf in leaves(item, (*place, name)).items()}
    return {} if value is None else {place: value}


@pytest.mark.slow
@given(CONFIG, CONFIG)
def test_a_setting_is_listed_if_and_only_if_it_differs(one: dict[str, Any], other: dict[str, Any]) -> None:
    found = compare_two(run(config=one), run(config=other)).settings
    listed = {side: {} for side in (0, 1)}
    for item in found:
        for side, value in enumerate((item.one, item.other)):
            listed[side] |= leaves(value, tuple(item.key.split(".")))
    first, second = leaves(one), leaves(other)
    places = [place for place in {*first, *second} if place not in first or place not in second]
    places += [place for place in {*first} & {*second} if first[place] != second[place]]
    assert listed[0] == {place: first[place] for place in places if place in first}
    assert listed[1] == {place: second[place] for place in places if place in second}


@pytest.mark.slow
@given(CONFIG)
def test_a_run_does_not_differ_from_itself(config: dict[str, Any]) -> None:
    found = compare_two(run(config=config), run(config=deepcopy(config)))
    assert (found.settings, found.inputs, found.versions, found.results) == ((), (), (), ())


def test_data_models_code_and_processes_are_told_apart() -> None:
    one = run(
        config={"data": [{"path": "a.jsonl", "count": 5}], "fft": {"learning_rate": 0.1}},
        inputs={"digests": {"train": "t"}, "parents": []},
        versions={"torch": "2.13.0"},
    )
    other = run(
        "002-fft",
        config={"data": [{"path": "b.jsonl", "count": 5}], "fft": {"learning_rate": 0.2}},
        inputs={"digests": {"train": "u"}, "parents": ["001-fft"]},
        versions={"torch": "2.13.0", "mftctl source": "abc"},
        decides={"files": {"b.jsonl": "f"}},
        processes=2,
    )
    found = compare_two(one, other)
    assert [(item.key, item.one, item.other) for item in found.settings] == [
        ("data.0.path", "a.jsonl", "b.jsonl"),
        ("fft.learning_rate", 0.1, 0.2),
        ("processes", 1, 2),
    ]
    assert [(item.key, item.one, item.other) for item in found.inputs] == [
        ("digests.train", "t", "u"),
        ("parents", None, ["001-fft"]),
        ("files.b.jsonl", None, "f"),
    ]
    assert found.versions == (Difference("mftctl source", None, "abc", None),)


def test_results_have_their_difference_and_list_entries_are_identified_by_name() -> None:
    group = {"layers": "0-3", "best_loss": 0.75, "best_step": 4}
    groups = [group, {**group, "layers": "4-7", "best_loss": 0.5}]
    one = run(result={"groups": groups, "model": "a", "layer_ratios": {"9": 0.1, "10": 0.1}, "fast": False})
    other = run(
        result={
            "groups": [{**groups[1], "best_loss": 0.25}, {**groups[0], "best_step": 8}],
            "model": "b",
            "layer_ratios": {"10": 0.2, "9": 0.1, "2": 0.1},
            "fast": True,
        },
        seconds=2.5,
    )
    assert compare_two(one, other).results == (
        Difference("groups.0-3.best_step", 4, 8, 4),
        Difference("groups.4-7.best_loss", 0.5, 0.25, -0.25),
        Difference("layer_ratios.2", None, 0.1, None),
        Difference("layer_ratios.10", 0.1, 0.2, 0.1),
        Difference("fast", False, True, None),
        Difference("seconds", 0.0, 2.5, 2.5),
    )


def test_entries_of_the_same_name_are_identified_by_their_position() -> None:
    lines = [{"step": 1, "loss": 0.5}, {"step": 1, "loss": 0.25}]
    found = compare_two(run(result={"lines": lines}), run(result={"lines": [lines[0], {**lines[1], "loss": 1.0}]}))
    assert found.results == (Difference("lines.1.loss", 0.25, 1.0, 0.75),)


def test_ratio_of_another_kind_is_one_difference() -> None:
    found = compare_two(run(config={"ratio": 0.1}), run(config={"ratio": {"q_proj": 0.1}}))
    assert found.settings == (Difference("ratio", 0.1, {"q_proj": 0.1}, None),)


def test_unfinished_runs_are_compared_as_far_as_possible() -> None:
    running = run("002-fft", status="running")
    found = compare_two(run(result={"best_loss": 1.0}), running)
    assert found.problems == ("002-fft is not finished (running)",)
    assert found.results == (Difference("best_loss", 1.0, None, None),)
    assert compare_two(running, running).problems == ("002-fft is not finished (running)",)


def test_runs_of_the_same_name_are_identified_by_their_folders() -> None:
    found = compare_two(run(), Run(Path("again") / "001-fft", run().record))
    assert (found.one, found.other) == ("runs/001-fft", "again/001-fft")


# Two evaluations


def compared(one: Path, other: Path) -> RunComparison:
    return compare_two(load_run(one), load_run(other))


def test_metrics_are_paired_as_an_independent_bootstrap_has_them(tmp_path: Path) -> None:
    base, new = make_samples(1, loss=0.3, correct=0.4), make_samples(2, loss=0.25, correct=0.8)
    found = compared(
        write_evaluation(tmp_path, 3, "FFT", ["001-fft"], base),
        write_evaluation(tmp_path, 4, "MFT", ["001-fft", "002-mask-train"], new),
    )
    assert found.problems == ()
    loss, match = found.metrics
    assert (loss.dataset, loss.metric, loss.samples, match.metric) == ("test.jsonl", "loss", 60, "exact_match")
    for item, column in ((loss, 0), (match, 2)):
        estimate, low, high = bootstrap([(base, new)], column)
        assert item.change.value == pytest.approx(estimate, abs=1e-12)
        assert item.other - item.one == pytest.approx(estimate, abs=1e-12)
        assert (item.change.low, item.change.high) == pytest.approx((low, high), abs=0.05 * (high - low) + 1 / 60)
        assert item.change.verdict == "better"
    assert loss.change.p_value is None
    assert match.change.corrected_p_value == match.change.p_value < 0.01


def test_swapping_the_runs_turns_better_into_worse(tmp_path: Path) -> None:
    folders = [
        write_evaluation(tmp_path, number, "FFT", [], make_samples(number, loss=loss, correct=0.4))
        for number, loss in ((1, 0.3), (2, 0.25))
    ]
    forth, back = compared(*folders).metrics[0].change, compared(*reversed(folders)).metrics[0].change
    assert (forth.verdict, back.verdict) == ("better", "worse")
    assert forth.value == pytest.approx(-back.value)


def test_p_values_are_corrected_for_the_number_of_benchmarks(tmp_path: Path) -> None:
    folders = []
    for number, correct in ((1, 0.3), (2, 0.5)):
        folder = write_evaluation(tmp_path, number, "FFT", [], make_samples(number, loss=0.3, correct=correct))
        record = json.loads((folder / "run.json").read_text())
        record["result"]["datasets"] *= 2
        record["result"]["datasets"][1] = {**record["result"]["datasets"][0], "name": "other"}
        (folder / "run.json").write_text(json.dumps(record))
        folders.append(folder)
    found = [item.change for item in compared(*folders).metrics if item.change.p_value is not None]
    assert len(found) == 2
    assert all(change.corrected_p_value == min(1.0, 2 * change.p_value) for change in found)


@pytest.mark.parametrize(
    ("kind", "problems"),
    [
        ("other data", ("test.jsonl: not evaluated on the same data",)),
        (
            "fewer samples",
            tuple(f"test.jsonl, {name}: not measured on the same samples as its baseline" for name in BOTH),
        ),
        (
            "no samples",
            tuple(f"test.jsonl, {name}: The samples in 002-eval/samples.jsonl cannot be read." for name in BOTH),
        ),
        ("no digest", ("the record of an evaluation is incomplete: digest is missing",)),
        ("no data in common", ()),
    ],
)
def test_unpaired_samples_are_reported(tmp_path: Path, kind: str, problems: tuple[str, ...]) -> None:
    samples = make_samples(1, loss=0.3, correct=0.4)
    one = write_evaluation(tmp_path, 1, "FFT", [], samples)
    changes = {"other data": {"digest": "d2"}, "no data in common": {"task": "gsm8k"}}.get(kind, {})
    other = write_evaluation(tmp_path, 2, "FFT", [], samples[: 30 if kind == "fewer samples" else None], **changes)
    if kind == "no samples":
        (other / "samples.jsonl").unlink()
    if kind == "no digest":
        record = json.loads((other / "run.json").read_text())
        del record["result"]["datasets"][0]["digest"]
        (other / "run.json").write_text(json.dumps(record))
    found = compared(one, other)
    assert found.metrics == ()
    assert found.problems == problems


# Two masks


def masked(folder: Path, **keep: torch.Tensor) -> Run:
    folder.mkdir(parents=True)
    save_mask(build_mask(**keep), folder / "mask.bits")
    return Run(folder, replace(run().record, command="mask-train"))


def test_masks_overlap_as_counted_by_hand(tmp_path: Path) -> None:
    keep = torch.ones(2, 10, dtype=torch.bool)
    first, second = keep.clone(), keep.clone()
    first[0, :4] = False
    second[0, 2:7] = False
    found = compare_two(masked(tmp_path / "1", a=first, b=keep), masked(tmp_path / "2", a=second, c=keep, d=keep)).mask
    assert found is not None
    assert (found.weights, found.removed_one, found.removed_other, found.removed_both) == (20, 4, 5, 2)
    assert found.jaccard == pytest.approx(2 / 7)
    assert found.expected_jaccard == pytest.approx(1 / (9 - 1))  # 4 * 5 / 20 = 1 in both
    assert (found.only_one, found.only_other) == (("b",), ("c", "d"))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [("gone", "masks: "), ("damaged", "masks: "), ("another model", "masks: The two masks have no tensor in common.")],
)
def test_masks_that_cannot_be_compared_are_a_problem(tmp_path: Path, kind: str, problem: str) -> None:
    keep = torch.ones(2, 10, dtype=torch.bool)
    one, other = masked(tmp_path / "1", a=keep), masked(tmp_path / "2", a=keep)
    path = other.folder / "mask.bits"
    if kind == "gone":
        path.unlink()
    elif kind == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        save_mask(build_mask(b=keep), path)
    found = compare_two(one, other)
    assert found.mask is None
    assert [said.startswith(problem) for said in found.problems] == [True]


def test_masks_of_different_kinds_are_a_problem(tmp_path: Path) -> None:
    keep = torch.ones(2, 10, dtype=torch.bool)
    one, other = masked(tmp_path / "1", a=keep), masked(tmp_path / "2", a=keep)
    save_mask(build_mask(DELTA_METADATA, a=keep), other.folder / "mask.bits")
    assert DELTA_METADATA.kind != METADATA.kind
    assert "differ in kind" in compare_two(one, other).problems[0]


def test_mask_and_fine_tuning_have_no_overlap(tmp_path: Path) -> None:
    assert compare_two(masked(tmp_path / "1", a=torch.ones(2, 2, dtype=torch.bool)), run()).mask is None
