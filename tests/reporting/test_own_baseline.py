"""Each state is compared with one fine-tuned model: its own, or the one whose settings are most like its own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.progress import Silence
from mftctl.reporting.output.headlines import headlines
from mftctl.reporting.output.text_tables import metric_text, overview_text
from mftctl.reporting.overview import overviews
from mftctl.reporting.report import make_report
from mftctl.reporting.state_tables import MetricTable, Row
from tests.reporting.run_folders import compare_runs, make_samples, write_evaluation
from tests.reporting.training_folders import write_training

STRONG = {"schedule": "constant", "average": "ema"}
HALF = {**STRONG, "data_fraction": 0.5}


def write_state(
    root: Path,
    number: int,
    state: str,
    loss: float,
    settings: Mapping[str, Any] | None = None,
    *,
    stage: str,
    seed: int = 0,
    recipe: str = "r",
    data: str = "train.jsonl",
) -> None:
    """Writes a fine-tuning with these settings, unless it is the pre-trained model, and its evaluation."""
    parents = [] if settings is None else [f"{number:03d}-fft"]
    named: Any = {"stage": stage, "recipe": recipe, "seed": seed, "data": data}
    if settings is not None:
        write_training(root, number, "fft", state, fft=settings, **named)
    samples = make_samples(number, loss=loss, correct=1.0 - loss)
    write_evaluation(root, 100 + number, state, parents, samples, **named)


def rows_of(root: Path, metric: str = "loss") -> tuple[dict[str, Row], list[str]]:
    tables, problems = compare_runs(root)
    [table] = [table for table in tables if table.metric == metric]
    return {row.state: row for row in table.rows}, problems


def change_of(row: Row) -> float:
    assert row.change is not None
    return row.change.value


def write_study(root: Path) -> None:
    """Three fine-tunings, and GMT with the settings of the second."""
    write_state(root, 1, "FFT", 0.5, {}, stage="fft")
    write_state(root, 2, "FFT", 0.3, STRONG, stage="strong")
    write_state(root, 3, "FFT", 0.7, HALF, stage="half")
    write_state(root, 4, "GMT", 0.4, {**STRONG, "method": "gmt", "ratio": 0.2}, stage="gmt")


def test_a_method_is_compared_with_the_fine_tuning_of_the_same_settings(tmp_path: Path) -> None:
    write_study(tmp_path)
    rows, problems = rows_of(tmp_path)
    assert problems == []
    assert rows["GMT"].against == ("FFT (strong)",)
    assert change_of(rows["GMT"]) == pytest.approx(rows["GMT"].value - rows["FFT (strong)"].value)


def test_every_metric_has_the_same_baseline(tmp_path: Path) -> None:
    write_state(tmp_path, 1, "FFT", 0.5, {"batch_size": 4}, stage="fft")
    write_state(tmp_path, 2, "FFT", 0.3, {"batch_size": 16}, stage="large")
    write_state(tmp_path, 3, "GMT", 0.4, {"batch_size": 16, "method": "gmt"}, stage="gmt")
    tables, problems = compare_runs(tmp_path)
    assert problems == []
    against = [row.against for table in tables for row in table.rows if row.state == "GMT"]
    assert against == [("FFT (large)",)] * 2


@pytest.mark.parametrize(("loss", "control", "is_baseline"), [(0.5, "strong", True), (0.1, "fft", False)])
def test_the_strongest_control_has_its_own_change(tmp_path: Path, loss: float, control: str, is_baseline: bool) -> None:
    write_state(tmp_path, 1, "FFT", loss, {}, stage="fft")
    write_state(tmp_path, 2, "FFT", 0.3, STRONG, stage="strong")
    write_state(tmp_path, 4, "GMT", 0.4, {**STRONG, "method": "gmt"}, stage="gmt")
    rows, _ = rows_of(tmp_path)
    found = rows["GMT"].against_control
    assert found is not None
    assert (found.control, found.is_baseline) == (f"FFT ({control})", is_baseline)
    assert found.change.value == pytest.approx(rows["GMT"].value - rows[f"FFT ({control})"].value)


def test_several_fine_tunings_that_fit_equally_well_are_not_averaged(tmp_path: Path) -> None:
    write_state(tmp_path, 1, "FFT", 0.5, {}, stage="fft")
    write_state(tmp_path, 2, "FFT", 0.3, STRONG, stage="strong")
    write_state(tmp_path, 3, "pre-trained", 0.9, stage="base")
    rows, problems = rows_of(tmp_path)
    assert (rows["pre-trained"].change, rows["pre-trained"].against) == (None, ())
    told = "pre-trained: not compared, since several fine-tuned models fit equally well: r: fft, r: strong"
    assert set(problems) == {told}


@pytest.mark.parametrize("same", [{}, {"benchmark_every": 10}])
def test_two_fine_tunings_with_the_same_effective_settings_are_not_averaged(
    tmp_path: Path, same: dict[str, object]
) -> None:
    write_state(tmp_path, 1, "FFT", 0.5, {"epochs": 1}, stage="fft")
    write_state(tmp_path, 2, "FFT", 0.3, {"epochs": 1, **same}, stage="again")
    write_state(tmp_path, 3, "GMT", 0.4, {"epochs": 1, "method": "gmt"}, stage="gmt")
    rows, problems = rows_of(tmp_path)
    assert rows["GMT"].change is None
    assert problems


def test_fine_tunings_on_different_data_are_not_averaged(tmp_path: Path) -> None:
    write_state(tmp_path, 1, "FFT", 0.5, {}, stage="fft", data="maths.jsonl")
    write_state(tmp_path, 2, "FFT", 0.3, {}, stage="code", data="code.jsonl")
    write_state(tmp_path, 3, "pre-trained", 0.9, stage="base")
    rows, _ = rows_of(tmp_path)
    assert rows["pre-trained"].change is None


@pytest.mark.parametrize("settings", [None, {"method": "lora", "learning_rate": 2e-3}])
def test_the_fine_tuning_of_the_same_recipe_is_preferred(tmp_path: Path, settings: dict[str, Any] | None) -> None:
    write_state(tmp_path, 1, "FFT", 0.5, {}, stage="fft", recipe="one")
    write_state(tmp_path, 2, "FFT", 0.3, {}, stage="fft", recipe="other")
    state = "pre-trained" if settings is None else "LoRA"
    write_state(tmp_path, 3, state, 0.9, settings, stage="s", recipe="one")
    rows, problems = rows_of(tmp_path)
    assert problems == []
    assert rows[state].against == ("FFT (one: fft)",)
    assert change_of(rows[state]) == pytest.approx(rows[state].value - rows["FFT (one: fft)"].value)


def test_seeds_are_not_compared_with_different_fine_tunings(tmp_path: Path) -> None:
    write_state(tmp_path, 1, "FFT", 0.5, {}, stage="fft", seed=0)
    write_state(tmp_path, 12, "FFT", 0.3, STRONG, stage="strong", seed=1)
    for seed in (0, 1):
        write_state(tmp_path, 4 + 10 * seed, "GMT", 0.4, {**STRONG, "method": "gmt"}, stage="gmt", seed=seed)
    rows, _ = rows_of(tmp_path)
    assert rows["GMT"].against == ("FFT (strong)",)
    assert change_of(rows["GMT"]) == pytest.approx(rows["GMT"].by_seed[1].value - rows["FFT (strong)"].value)
    assert [result.change is None for result in rows["GMT"].by_seed] == [True, False]


@pytest.mark.parametrize("gone", ["001-fft", "002-fft", "004-fft"])
def test_settings_that_are_missing_decide_nothing(tmp_path: Path, gone: str) -> None:
    write_study(tmp_path)
    shutil.rmtree(tmp_path / gone)
    rows, _ = rows_of(tmp_path)
    assert rows["GMT"].change is None


def test_seeds_of_one_fine_tuning_are_one_baseline(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_state(tmp_path, 1 + 10 * seed, "FFT", 0.5 - 0.1 * seed, {}, stage="fft", seed=seed)
    write_state(tmp_path, 3, "pre-trained", 0.9, stage="base")
    rows, problems = rows_of(tmp_path)
    assert problems == []
    assert change_of(rows["pre-trained"]) == pytest.approx(rows["pre-trained"].value - rows["FFT"].value)


CHOICES = {"schedule": ["linear", "constant"], "epochs": [1, 2, 3], "learning_rate": [1e-5, 2e-5]}
settings_strategy = st.fixed_dictionaries({key: st.sampled_from(values) for key, values in CHOICES.items()})


@given(st.lists(settings_strategy, min_size=1, max_size=4), settings_strategy)
def test_the_change_is_against_the_fine_tuning_with_fewest_other_settings(
    tunings: Sequence[dict[str, Any]], own: dict[str, Any]
) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for number, settings in enumerate(tunings):
            write_state(root, number, "FFT", 0.3 + 0.1 * number, settings, stage=f"fft{number}")
        write_state(root, 9, "GMT", 0.4, {**own, "method": "gmt"}, stage="gmt")
        rows, problems = rows_of(root)
    distances = [sum(settings[key] != own[key] for key in CHOICES) for settings in tunings]
    nearest = [number for number, distance in enumerate(distances) if distance == min(distances)]
    gmt = rows["GMT"]
    if len(nearest) > 1:
        assert gmt.change is None
        assert problems
        return
    name = "FFT" if len(tunings) == 1 else f"FFT (fft{nearest[0]})"
    assert gmt.against == (name,)
    assert change_of(gmt) == pytest.approx(gmt.value - rows[name].value)


def table_of(root: Path) -> MetricTable:
    tables, _ = compare_runs(root)
    [table] = [table for table in tables if table.metric == "loss"]
    return table


def test_tables_and_headline_name_the_baseline_if_there_are_several(tmp_path: Path) -> None:
    write_study(tmp_path)
    samples = make_samples(8, loss=0.25, correct=0.7)
    write_training(tmp_path, 5, "mask-train", "MFT", parents=["003-fft"], stage="mft", recipe="r")
    write_evaluation(tmp_path, 108, "MFT", ["003-fft", "005-mask-train"], samples, stage="mft", recipe="r")
    tables, _ = compare_runs(tmp_path)
    loss = next(table for table in tables if table.metric == "loss")
    details = {cells[0].text: cells[2].detail for cells in metric_text(loss).rows}
    assert details["GMT"] == "against FFT (strong)"
    assert details["MFT"] == "against FFT (half)"
    [overview] = overviews(tables)
    shown = {cells[0].text: cells[0].detail for cells in overview_text(overview).rows}
    assert (shown["GMT"], shown["FFT (half)"]) == ("against FFT (strong)", "")
    [text] = [line.text for line in headlines(tables) if line.text.startswith("MFT changes loss")]
    assert "Against FFT (half): " in text


def test_a_state_that_is_not_compared_names_no_baseline(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_training(tmp_path, 5, "fft", "HFT", stage="hft", recipe="r", fft={"method": "hft"})
    fewer = make_samples(8, loss=0.25, correct=0.7, samples=50)
    write_evaluation(tmp_path, 108, "HFT", ["005-fft"], fewer, stage="hft", recipe="r")
    tables, _ = compare_runs(tmp_path)
    [overview] = overviews(tables)
    [hft] = [cells for cells in overview_text(overview).rows if cells[0].text == "HFT"]
    assert hft[0].detail == ""


def test_one_baseline_is_not_repeated_in_every_row(tmp_path: Path) -> None:
    write_state(tmp_path, 1, "FFT", 0.5, {}, stage="fft")
    write_state(tmp_path, 4, "GMT", 0.4, {"method": "gmt"}, stage="gmt")
    [gmt] = [cells for cells in metric_text(table_of(tmp_path)).rows if cells[0].text == "GMT"]
    assert gmt[2].detail == ""


def test_flags_are_about_the_own_baseline(tmp_path: Path) -> None:
    write_state(tmp_path, 1, "FFT", 0.5, {"batch_size": 7}, stage="fft")
    write_state(tmp_path, 2, "FFT", 0.3, STRONG, stage="strong")
    write_state(tmp_path, 3, "GMT", 0.4, {**STRONG, "method": "gmt"}, stage="gmt")
    write_state(tmp_path, 4, "GMT", 0.4, {"batch_size": 9, "method": "gmt"}, stage="other")
    table = next(table for table in make_report(tmp_path, Silence()).tables if table.metric == "loss")
    flags = {row.state: row.flags for row in table.rows}
    assert flags["GMT (gmt)"] == ()
    assert flags["GMT (other)"] == ("Trained with a batch of 9, the baseline with 7",)
