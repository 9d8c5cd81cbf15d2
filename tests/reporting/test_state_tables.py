from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mftctl.reporting.output.text_tables import metric_text
from mftctl.reporting.state_tables import MetricTable, Row
from tests.reporting.run_folders import Sample, compare_runs, make_samples, write_evaluation, write_experiment

FFT = make_samples(1, loss=0.3, correct=0.5)


def shifted(samples: list[Sample], *, loss: float = 0.0, match: float = 0.0) -> list[Sample]:
    """The samples with every loss per token and every score shifted by the same amount."""
    return [(nll + loss * tokens, tokens, right + match) for nll, tokens, right in samples]


def table_of(root: Path, metric: str) -> MetricTable:
    tables, problems = compare_runs(root)
    assert problems == []
    [table] = [table for table in tables if table.metric == metric]
    return table


def row_of(table: MetricTable, state: str) -> Row:
    [row] = [row for row in table.rows if row.state == state]
    return row


def bootstrap(pairs: list[tuple[list[Sample], list[Sample]]], column: int) -> tuple[float, float, float]:
    """Estimate and 95 % interval of a difference averaged over seeds, computed from the definition."""
    base, new = (np.array([pair[side] for pair in pairs])[:, :, column] for side in (0, 1))
    differences = (new - base).mean(axis=0)
    weights = np.array(pairs[0][0])[:, 1] if column == 0 else np.ones(len(differences))
    chosen = np.random.default_rng(7).integers(0, len(differences), (20_000, len(differences)))
    drawn = differences[chosen].sum(axis=1) / weights[chosen].sum(axis=1)
    return (differences.sum() / weights.sum(), *np.percentile(drawn, [2.5, 97.5]))


@pytest.mark.slow
@pytest.mark.parametrize(("metric", "column"), [("loss", 0), ("exact_match", 2)])
@pytest.mark.parametrize("state", ["continued FFT", "MFT"])
def test_change_and_interval_are_those_of_an_independent_bootstrap(
    tmp_path: Path, metric: str, column: int, state: str
) -> None:
    level = {"loss": 0.26, "correct": 0.6} if state == "MFT" else {"loss": 0.32, "correct": 0.48}
    pairs = []
    for seed in (0, 1):
        base, new = make_samples(seed, loss=0.3, correct=0.5), make_samples(5 + seed, noise=0.2, **level)
        pairs.append((base, new))
        write_evaluation(tmp_path, 10 + seed, "FFT", [f"00{seed}-fft"], base, seed=seed, stage="fft")
        made_by = [f"00{seed}-fft", f"05{seed}-mask-train"]
        write_evaluation(tmp_path, 20 + seed, state, made_by, new, seed=seed, stage="new")
    change = row_of(table_of(tmp_path, metric), state).change
    assert change is not None
    estimate, low, high = bootstrap(pairs, column)
    assert change.value == pytest.approx(estimate, abs=1e-12)
    # A share of correct answers changes in steps of one answer of one seed.
    tolerance = 0.05 * (high - low) + (0 if column == 0 else 1 / (len(pairs) * len(pairs[0][0])))
    assert (change.low, change.high) == pytest.approx((low, high), abs=tolerance)


@pytest.mark.parametrize(
    ("metric", "change", "verdict"),
    [
        ("loss", {"loss": -0.1}, "better"),
        ("loss", {"loss": 0.1}, "worse"),
        ("exact_match", {"match": 0.1}, "better"),
        ("exact_match", {"match": -0.1}, "worse"),
        ("loss", {}, "within noise"),
        ("exact_match", {}, "within noise"),
    ],
)
def test_verdict_depends_on_which_direction_is_better(
    tmp_path: Path, metric: str, change: dict[str, float], verdict: str
) -> None:
    write_evaluation(tmp_path, 3, "FFT", ["001-fft"], FFT)
    write_evaluation(tmp_path, 4, "MFT", ["001-fft", "002-mask-train"], shifted(FFT, **change))
    found = row_of(table_of(tmp_path, metric), "MFT").change
    assert found is not None
    assert found.verdict == verdict


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_difference_of_both_signs_is_within_noise(tmp_path: Path, metric: str) -> None:
    write_evaluation(tmp_path, 3, "FFT", ["001-fft"], FFT)
    mixed = [shifted([sample], loss=0.1 * sign, match=sign)[0] for sample, sign in zip(FFT, [1, -1] * 30, strict=True)]
    write_evaluation(tmp_path, 4, "MFT", ["001-fft", "002-mask-train"], mixed)
    change = row_of(table_of(tmp_path, metric), "MFT").change
    assert change is not None
    assert change.low < 0 < change.high
    assert change.verdict == "within noise"


@pytest.mark.slow
def test_rows_are_in_the_order_of_the_papers_and_averaged_over_seeds(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    table = table_of(tmp_path, "loss")
    assert (table.origin, table.dataset, table.baseline) == ("models/base", "test.jsonl", "FFT")
    assert [row.state for row in table.rows] == ["pre-trained", "FFT", "continued FFT", "random mask", "MFT"]
    assert [row.is_baseline for row in table.rows] == [False, True, False, False, False]
    assert [row.change is None for row in table.rows] == [False, True, False, False, False]
    row = row_of(table, "MFT")
    assert (row.seeds, row.runs, row.samples) == ((0, 1), ("009-eval", "019-eval"), 60)
    values = [
        json.loads((tmp_path / name / "run.json").read_text())["result"]["datasets"][0]["metrics"][0]["value"]
        for name in row.runs
    ]
    assert row.value == pytest.approx(np.mean(values))
    assert row.spread == pytest.approx(np.std(values, ddof=1))
    assert row.standard_error == pytest.approx(0.01)
    assert row_of(table_of(tmp_path, "exact_match"), "MFT").standard_error is None


def test_each_seed_is_paired_with_its_own_baseline(tmp_path: Path) -> None:
    for seed in (0, 1):
        base = shifted(FFT, loss=float(seed))
        fft = f"00{seed + 1}-fft"
        write_evaluation(tmp_path, 10 + seed, "FFT", [fft], base, seed=seed, stage="fft")
        new = shifted(base, loss=-0.5)
        write_evaluation(tmp_path, 20 + seed, "MFT", [fft, f"00{seed + 3}-mask-train"], new, seed=seed, stage="mft")
    change = row_of(table_of(tmp_path, "loss"), "MFT").change
    assert change is not None
    assert (change.value, change.low, change.high) == pytest.approx((-0.5, -0.5, -0.5))


def test_seeds_measured_on_different_samples_are_not_averaged(tmp_path: Path) -> None:
    for seed, samples in enumerate((FFT, FFT[1:])):
        fft = f"00{seed + 1}-fft"
        write_evaluation(tmp_path, 10 + seed, "FFT", [fft], samples, seed=seed, stage="fft")
        write_evaluation(tmp_path, 20 + seed, "MFT", [fft, f"00{seed + 3}-mask-train"], samples, seed=seed, stage="mft")
    tables, problems = compare_runs(tmp_path)
    assert row_of(tables[0], "MFT").change is None
    assert problems == ["MFT: its seeds were not measured on the same samples"] * 2


def test_single_run_has_no_spread(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 1, "pre-trained", [], FFT)
    [row] = table_of(tmp_path, "loss").rows
    assert (row.spread, row.change, row.is_baseline) == (None, None, True)


def test_without_fft_changes_are_against_the_pre_trained_model(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 2, "pre-trained", [], FFT)
    write_evaluation(tmp_path, 3, "MFT", ["001-mask-train"], shifted(FFT, loss=-0.1))
    table = table_of(tmp_path, "loss")
    assert table.baseline == "pre-trained"
    change = row_of(table, "MFT").change
    assert change is not None
    assert change.value == pytest.approx(-0.1)


def test_applied_mask_is_the_same_state_as_the_mask(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 4, "FFT", ["001-fft"], FFT)
    write_evaluation(tmp_path, 5, "MFT", ["001-fft", "002-mask-train"], shifted(FFT, loss=0.1))
    write_evaluation(tmp_path, 6, "MFT", ["001-fft", "002-mask-train", "003-apply"], shifted(FFT, loss=-0.1))
    row = row_of(table_of(tmp_path, "loss"), "MFT")
    assert row.runs == ("006-eval",)


def test_repeated_evaluation_replaces_the_old_one(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 2, "FFT", ["001-fft"], FFT)
    write_evaluation(tmp_path, 3, "FFT", ["001-fft"], shifted(FFT, loss=1.0))
    [row] = table_of(tmp_path, "loss").rows
    assert row.runs == ("003-eval",)


def test_states_of_the_same_name_are_distinguished_by_their_runs(tmp_path: Path) -> None:
    for number in (1, 2):
        write_evaluation(tmp_path, 4 + number, "FFT", [f"00{number}-fft"], shifted(FFT, loss=float(number)))
    write_evaluation(tmp_path, 9, "MFT", ["002-fft", "003-mask-train"], shifted(FFT, loss=1.5))
    table = table_of(tmp_path, "loss")
    assert [row.state for row in table.rows] == ["FFT (001-fft)", "FFT (002-fft)", "MFT"]
    assert [row.is_baseline for row in table.rows] == [True, True, False]
    change = row_of(table, "MFT").change
    assert change is not None
    assert change.value == pytest.approx(-0.5)


def test_models_and_data_have_a_table_each(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 1, "pre-trained", [], FFT)
    write_evaluation(tmp_path, 2, "pre-trained", [], FFT, origin="models/other")
    write_evaluation(tmp_path, 3, "pre-trained", [], FFT[:30], digest="d2")
    tables, _ = compare_runs(tmp_path)
    assert [(table.origin, table.rows[0].samples, table.metric) for table in tables] == [
        (origin, samples, metric)
        for origin, samples in (("models/base", 60), ("models/other", 60), ("models/base", 30))
        for metric in ("loss", "exact_match")
    ]


# Results that cannot be compared, and damaged runs


def change_samples(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def samples_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("difference", ["other", "fewer", "more"])
def test_state_measured_on_other_samples_is_not_compared(tmp_path: Path, difference: str) -> None:
    write_evaluation(tmp_path, 3, "FFT", ["001-fft"], FFT)
    folder = write_evaluation(tmp_path, 4, "MFT", ["001-fft", "002-mask-train"], FFT)
    rows = samples_in(folder)
    extra = {**rows[0], "id": "another"}
    change_samples(folder, {"other": [extra, *rows[1:]], "fewer": rows[1:], "more": [*rows, extra]}[difference])
    tables, problems = compare_runs(tmp_path)
    row = row_of(tables[0], "MFT")
    assert row.change is None
    assert not row.is_baseline
    assert problems == ["MFT: not measured on the same samples as its baseline"] * 2


def test_single_sample_is_not_compared(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 3, "FFT", ["001-fft"], FFT[:1])
    write_evaluation(tmp_path, 4, "MFT", ["001-fft", "002-mask-train"], FFT[:1])
    tables, problems = compare_runs(tmp_path)
    assert row_of(tables[0], "MFT").change is None
    assert problems == ["MFT: A standard error needs several samples."] * 2


def test_state_without_its_own_baseline_is_not_compared(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 4, "FFT", ["001-fft"], FFT)
    write_evaluation(tmp_path, 5, "MFT", ["002-fft", "003-mask-train"], FFT)
    assert row_of(table_of(tmp_path, "loss"), "MFT").change is None


def damage(folder: Path, kind: str) -> None:
    path = folder / "run.json"
    record = json.loads(path.read_text())
    if kind == "cut short":
        path.write_text(json.dumps(record)[:100])
    elif kind == "missing":
        path.unlink()
    elif kind == "no result":
        path.write_text(json.dumps({**record, "result": {}}))
    elif kind == "no inputs":
        path.write_text(json.dumps({**record, "inputs": {}}))
    elif kind == "config of another type":
        path.write_text(json.dumps({**record, "config": None}))
    else:
        del record["result"]["datasets"][0]["metrics"][1]["value"]
        path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "kind", ["cut short", "missing", "no result", "no inputs", "config of another type", "no value"]
)
def test_damaged_record_hides_no_other_run(tmp_path: Path, kind: str) -> None:
    write_evaluation(tmp_path, 3, "FFT", ["001-fft"], FFT)
    write_evaluation(tmp_path, 4, "MFT", ["001-fft", "002-mask-train"], shifted(FFT, loss=-0.1))
    damage(write_evaluation(tmp_path, 5, "random mask", ["001-fft", "002-mask-train"], FFT), kind)
    tables, [problem] = compare_runs(tmp_path)
    assert [[row.state for row in table.rows] for table in tables] == [["FFT", "MFT"]] * 2
    assert row_of(tables[0], "MFT").change is not None
    assert problem.startswith(f"{tmp_path / '005-eval' / 'run.json'}: ")


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_run_that_is_not_finished_hides_no_other_run(tmp_path: Path, status: str) -> None:
    write_evaluation(tmp_path, 3, "FFT", ["001-fft"], FFT)
    write_evaluation(tmp_path, 4, "MFT", ["001-fft", "002-mask-train"], FFT, status=status)
    assert [row.state for row in table_of(tmp_path, "loss").rows] == ["FFT"]


@pytest.mark.parametrize("kind", ["missing", "cut short", "no scores"])
def test_damaged_samples_hide_no_other_run(tmp_path: Path, kind: str) -> None:
    write_evaluation(tmp_path, 3, "FFT", ["001-fft"], FFT)
    write_evaluation(tmp_path, 4, "random mask", ["001-fft", "002-mask-train"], shifted(FFT, loss=-0.1))
    folder = write_evaluation(tmp_path, 5, "MFT", ["001-fft", "002-mask-train"], FFT)
    path = folder / "samples.jsonl"
    if kind == "missing":
        path.unlink()
    elif kind == "cut short":
        path.write_text(path.read_text()[:-20])
    else:
        change_samples(folder, [{"id": row["id"]} for row in samples_in(folder)])
    tables, problems = compare_runs(tmp_path)
    assert row_of(tables[0], "random mask").change is not None
    assert row_of(tables[0], "MFT").change is None
    place = {"missing": "", "cut short": ":60", "no scores": ":1"}[kind]
    assert len(set(problems)) == 1
    assert problems[0].startswith(f"{path}: The samples in 005-eval/samples.jsonl{place} cannot be read")


def test_without_a_finished_evaluation_there_is_no_table(tmp_path: Path) -> None:
    assert compare_runs(tmp_path / "runs") == ([], [])
    write_evaluation(tmp_path, 1, "FFT", [], FFT, status="running")
    assert compare_runs(tmp_path) == ([], [])
    damage(tmp_path / "001-eval", "cut short")
    tables, [problem] = compare_runs(tmp_path)
    assert tables == []
    assert "not a readable run folder" in problem


def test_scores_of_0_and_1_have_a_p_value_corrected_for_the_benchmarks_of_the_state(tmp_path: Path) -> None:
    for number, digest in enumerate(("d1", "d2")):
        base = make_samples(1, loss=0.3, correct=0.3)
        better = make_samples(2 + number, loss=0.3, correct=0.3 + 0.2 * number)
        write_evaluation(tmp_path, 10 * number + 1, "FFT", ["001-fft"], base, digest=digest)
        write_evaluation(tmp_path, 10 * number + 2, "MFT", ["001-fft", "002-mask-train"], better, digest=digest)
    tables, _ = compare_runs(tmp_path)
    changes = [table.rows[1].change for table in tables if table.metric == "exact_match"]
    p_values = [change.p_value for change in changes]
    assert p_values[1] < 0.01 < p_values[0]
    assert [change.corrected_p_value for change in changes] == [p_values[0], 2 * p_values[1]]
    assert all(table.rows[1].change.p_value is None for table in tables if table.metric == "loss")
    told = [row[3].text for table in tables for row in metric_text(table).rows]
    assert f"better (p = {p_values[1]:.2g}, corrected {2 * p_values[1]:.2g})" in told
