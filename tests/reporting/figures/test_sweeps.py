"""Sweep figures: which states form a line, and what their error bars show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure as Canvas

from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.figures.style import Figure, render
from mftctl.reporting.figures.sweeps import sweep_figures
from mftctl.reporting.paired_change import Change
from mftctl.reporting.state_tables import MetricTable, Row
from tests.reporting.run_folders import compare_runs, make_samples, write_evaluation
from tests.reporting.training_runs import write_training

PAPER = {"preset": "paper", "layers": "4-7"}


def figures_of(root: Path) -> list[Figure]:
    figures, problems = figures_and_problems_of(root)
    assert problems == []
    return figures


def figures_and_problems_of(root: Path) -> tuple[list[Figure], list[str]]:
    return sweep_figures(compare_runs(root)[0], list_runs(root)[0])


class Study:
    """Trainings, each followed by its evaluation."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._number = 0

    def add(
        self,
        state: str,
        *,
        correct: float = 0.5,
        options: Mapping[str, Any] | None = None,
        on: Sequence[str] = (),
        seed: int = 0,
        stage: str | None = None,
        data: str = "train.jsonl",
        is_applied: bool = False,
    ) -> str:
        """Writes the run of a state and its evaluation; returns the name of the first."""
        self._number += 2
        command = "mask-train" if on else "fft"
        made = write_training(
            self.root,
            self._number - 1,
            state,
            {},
            command=command,
            options=options,
            parents=on,
            before="FFT" if on else "pre-trained",
            seed=seed,
            stage=stage,
            data=data,
        )
        parents = [*on, made, *(["900-apply"] if is_applied else [])]
        samples = make_samples(self._number, loss=1.0 - correct, correct=correct)
        write_evaluation(
            self.root, self._number, state, parents, samples, seed=seed, stage=stage, data=data, recipe="study"
        )
        return made


def write_ratios(study: Study, ratios: Sequence[float], *, seed: int = 0, **changed: Any) -> None:
    """Writes FFT, and `MFT, paper` with each ratio."""
    fft = study.add("FFT", seed=seed, stage="fft")
    for place, ratio in enumerate(ratios):
        options = {**PAPER, "ratio": ratio, **changed}
        stage = f"mft[ratio={ratio}]"
        study.add("MFT, paper", correct=0.5 + 0.05 * place, options=options, on=[fft], seed=seed, stage=stage)


def numbers_of(figure: Figure, metric: str, state: str, key: str) -> dict[float, tuple[float, float, float]]:
    """Value, low end and high end by swept value."""
    return {
        point[key]: (point["value"], point["low"], point["high"])
        for point in figure.data
        if point["metric"] == metric and point["state"] == state and key in point
    }


def legend_of(figure: Figure) -> list[str]:
    canvas = Canvas(layout="constrained")
    figure.draw(canvas)
    [legend] = canvas.legends
    return [text.get_text() for text in legend.get_texts()]


def test_the_mask_ratio_is_drawn_with_the_values_and_intervals_of_the_tables(tmp_path: Path) -> None:
    write_ratios(Study(tmp_path), [0.2, 0.02, 0.1])
    [figure] = figures_of(tmp_path)
    assert figure.name == "mask-ratio-test-jsonl"
    for table in compare_runs(tmp_path)[0]:
        found = numbers_of(figure, table.metric, "MFT, paper", "ratio")
        assert list(found) == [0.02, 0.1, 0.2]
        for row in table.rows[1:]:
            assert found[float(row.state.partition("ratio=")[2].rstrip("])"))][0] == row.value


@pytest.mark.slow
@given(
    ratios=st.lists(st.sampled_from([0.02, 0.05, 0.1, 0.2, 0.4]), min_size=2, max_size=5, unique=True),
    value=st.floats(0, 1),
    ends=st.tuples(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5)).map(sorted),
)
def test_a_bar_excludes_the_line_of_fft_exactly_if_the_interval_excludes_0(
    tmp_path_factory: pytest.TempPathFactory, ratios: list[float], value: float, ends: list[float]
) -> None:
    root = tmp_path_factory.mktemp("runs")
    write_ratios(Study(root), ratios)
    low, estimate, high = ends
    fft = Row("FFT", value, None, None, 60, (0,), True, None, ("002-eval",))
    change = Change(estimate, low, high, "")
    rows = [
        Row("MFT, paper", value + estimate, None, None, 60, (0,), False, change, (f"{4 + 2 * place:03d}-eval",))
        for place in range(len(ratios))
    ]
    table = MetricTable("models/base", "test.jsonl", "exact_match", "FFT", (fft, *rows))
    [figure], problems = sweep_figures([table], list_runs(root)[0])
    assert problems == []
    bars = numbers_of(figure, "exact_match", "MFT, paper", "ratio")
    assert bars == {ratio: pytest.approx((value + estimate, value + low, value + high)) for ratio in sorted(ratios)}


def test_a_figure_has_a_panel_a_metric_and_the_line_of_fft(tmp_path: Path) -> None:
    write_ratios(Study(tmp_path), [0.1, 0.2])
    [figure] = figures_of(tmp_path)
    canvas = Canvas(layout="constrained")
    figure.draw(canvas)
    assert {axes.get_ylabel() for axes in canvas.axes} == {"loss", "exact match"}
    assert {axes.get_xlabel() for axes in canvas.axes} == {"share removed"}
    tables = {table.metric.replace("_", " "): table for table in compare_runs(tmp_path)[0]}
    for axes in canvas.axes:
        [fft] = [line for line in axes.get_lines() if line.get_label() == "FFT"]
        assert set(fft.get_ydata()) == {tables[axes.get_ylabel()].rows[0].value}
    assert legend_of(figure) == ["FFT", "MFT, paper"]
    assert figure.runs == ("004-eval", "006-eval")


def test_the_ratio_not_given_is_the_default(tmp_path: Path) -> None:
    study = Study(tmp_path)
    fft = study.add("FFT")
    study.add("MFT, paper", options=PAPER, on=[fft], stage="mft")
    study.add("MFT, paper", options={**PAPER, "ratio": 0.4}, on=[fft], stage="more")
    [figure] = figures_of(tmp_path)
    assert list(numbers_of(figure, "loss", "MFT, paper", "ratio")) == [0.1, 0.4]


def test_masks_by_threshold_or_projection_have_no_single_ratio_and_are_not_drawn(tmp_path: Path) -> None:
    study = Study(tmp_path)
    fft = study.add("FFT")
    for stage, options in (("one", {"threshold": 0.0}), ("two", {"threshold": 0.1}), ("three", {"ratio": {"q": 0.1}})):
        study.add("MFT", options=options, on=[fft], stage=stage)
    assert figures_of(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [{"layers": "0-3"}, {"travel": 3.2}, {"data_fraction": 0.5}, {"target": "mlp"}, {"epochs": 2.0}]
)
def test_states_that_differ_in_more_than_the_option_share_no_line(tmp_path: Path, changed: dict[str, Any]) -> None:
    study = Study(tmp_path)
    fft = study.add("FFT")
    study.add("MFT, paper", options={**PAPER, "ratio": 0.1}, on=[fft], stage="one")
    study.add("MFT, paper", options={**PAPER, "ratio": 0.2, **changed}, on=[fft], stage="two")
    assert figures_of(tmp_path) == []


@pytest.mark.parametrize("changed", [{"prefix_cache_gb": 0.0}, {"benchmark_every": 5}, {"benchmark_limit": 50}])
def test_options_that_decide_nothing_keep_states_in_one_line(tmp_path: Path, changed: dict[str, Any]) -> None:
    study = Study(tmp_path)
    fft = study.add("FFT")
    study.add("MFT, paper", options={**PAPER, "ratio": 0.1}, on=[fft], stage="one")
    study.add("MFT, paper", options={**PAPER, "ratio": 0.2, **changed}, on=[fft], stage="two")
    assert len(figures_of(tmp_path)) == 1


def test_masks_of_two_fine_tuned_models_share_no_line(tmp_path: Path) -> None:
    study = Study(tmp_path)
    one, other = study.add("FFT", stage="fft"), study.add("FFT", stage="fft-more", options={"epochs": 2.0})
    study.add("MFT, paper", options={**PAPER, "ratio": 0.1}, on=[one], stage="one")
    study.add("MFT, paper", options={**PAPER, "ratio": 0.2}, on=[other], stage="two")
    assert figures_of(tmp_path) == []


def test_two_sweeps_of_one_state_are_two_lines_named_by_their_differences(tmp_path: Path) -> None:
    study = Study(tmp_path)
    fft = study.add("FFT")
    for layers in ("0-3", "4-7"):
        for ratio in (0.1, 0.2):
            options = {**PAPER, "layers": layers, "ratio": ratio}
            study.add("MFT, paper", options=options, on=[fft], stage=f"mft[layers={layers},ratio={ratio}]")
    [figure] = figures_of(tmp_path)
    assert legend_of(figure) == ["FFT", "MFT, paper (layers=0-3)", "MFT, paper (layers=4-7)"]


@pytest.mark.slow
def test_seeds_are_averaged_and_a_seed_that_lacks_a_value_does_not_break_the_line(tmp_path: Path) -> None:
    study = Study(tmp_path)
    write_ratios(study, [0.1, 0.2, 0.4], seed=0)
    # With a different seed, the probe may choose other layers.
    write_ratios(study, [0.1, 0.2], seed=1, layers="0-3")
    [figure] = figures_of(tmp_path)
    seeds = {point["ratio"]: point["seeds"] for point in figure.data if "ratio" in point and point["metric"] == "loss"}
    assert seeds == {0.1: 2, 0.2: 2, 0.4: 1}
    assert "Seeds per point: 1 to 2." in figure.caption
    # Each seed's state was compared with the FFT of that seed, so it has the same distance from the line of both.
    tables = {table.metric: table for table in compare_runs(tmp_path)[0]}
    for metric, table in tables.items():
        [row] = [row for row in table.rows if row.seeds == (0,)]
        [point] = [point for point in figure.data if point["metric"] == metric and point.get("ratio") == 0.4]
        assert row.change is not None
        assert point["drawn_at"] - table.rows[0].value == pytest.approx(row.change.value)
        assert point["value"] == row.value
    assert "band: standard deviation over seeds" in figure.caption


def test_the_share_of_the_data_is_swept_for_learned_masks(tmp_path: Path) -> None:
    study = Study(tmp_path)
    fft = study.add("FFT")
    for share in (0.1, 0.5, 1.0):
        options = {"data_fraction": share}
        study.add("MFT", options=options, on=[fft], stage=f"mft[data_fraction={share}]", is_applied=True)
    [figure] = figures_of(tmp_path)
    assert figure.name == "data-share-test-jsonl"
    assert list(numbers_of(figure, "exact_match", "MFT", "data_fraction")) == [0.1, 0.5, 1.0]


def test_each_strategy_of_the_one_off_drop_is_a_line(tmp_path: Path) -> None:
    study = Study(tmp_path)
    fft = study.add("FFT")
    for strategy in ("salient", "trivial", "random"):
        for ratio in (0.1, 0.9):
            options = {"method": "drop", "strategy": strategy, "ratio": ratio}
            study.add(f"{strategy} drop", options=options, on=[fft], stage=f"drop[strategy={strategy},ratio={ratio}]")
    [figure] = figures_of(tmp_path)
    assert figure.name == "drop-rate-test-jsonl"
    assert legend_of(figure) == ["FFT", "trivial drop", "salient drop", "random drop"]


def test_the_ratio_of_updates_is_swept_with_the_fft_of_the_same_data_as_its_line(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.add("FFT", stage="fft")
    study.add("FFT", stage="fft-code", data="code.jsonl")
    for method, state in (("gmt", "GMT"), ("random", "random update")):
        for ratio in (0.1, 0.9):
            study.add(state, options={"method": method, "ratio": ratio}, stage=f"{method}[ratio={ratio}]")
    [figure] = figures_of(tmp_path)
    assert figure.name == "update-ratio-test-jsonl"
    assert legend_of(figure) == ["FFT (fft)", "random update", "GMT"]


def test_a_state_with_only_one_value_is_in_no_figure(tmp_path: Path) -> None:
    study = Study(tmp_path)
    write_ratios(study, [0.1, 0.2])
    study.add("random mask", options={"method": "random", "layers": "4-7"}, on=["001-fft"], stage="random")
    [figure] = figures_of(tmp_path)
    assert legend_of(figure) == ["FFT", "MFT, paper"]


def test_of_a_value_measured_twice_that_with_more_seeds_counts(tmp_path: Path) -> None:
    study = Study(tmp_path)
    for seed in (0, 1):
        write_ratios(study, [0.1, 0.2], seed=seed)
    study.add("MFT, paper", options={**PAPER, "ratio": 0.1}, on=["001-fft"], stage="again")
    [figure] = figures_of(tmp_path)
    seeds = [point["seeds"] for point in figure.data if point["metric"] == "loss" and point.get("ratio") == 0.1]
    assert seeds == [2]


def test_without_a_paired_baseline_the_bars_are_over_seeds(tmp_path: Path) -> None:
    study = Study(tmp_path)
    for seed in (0, 1):
        for ratio in (0.1, 0.9):
            options = {"method": "gmt", "ratio": ratio}
            study.add("GMT", options=options, seed=seed, stage=f"gmt[ratio={ratio}]", correct=0.4 + 0.2 * seed)
    [figure] = figures_of(tmp_path)
    [loss] = [table for table in compare_runs(tmp_path)[0] if table.metric == "loss"]
    for row, (value, low, high) in zip(loss.rows, numbers_of(figure, "loss", "GMT", "ratio").values(), strict=True):
        assert (value, high - value, value - low) == pytest.approx((row.value, row.spread, row.spread))
    assert "Bars: standard deviation over seeds if there is no baseline to pair with." in figure.caption
    assert "No baseline was measured" in figure.caption


def test_a_state_whose_training_is_missing_is_named_once(tmp_path: Path) -> None:
    study = Study(tmp_path)
    write_ratios(study, [0.1, 0.2, 0.4])
    (tmp_path / "003-mask-train" / "run.json").write_text("{", encoding="utf-8")
    [figure], [problem] = figures_and_problems_of(tmp_path)
    assert "004-eval" in problem
    assert "003-mask-train" in problem
    assert list(numbers_of(figure, "loss", "MFT, paper", "ratio")) == [0.2, 0.4]


def test_a_state_with_options_of_another_version_is_named(tmp_path: Path) -> None:
    study = Study(tmp_path)
    write_ratios(study, [0.1, 0.2, 0.4])
    path = tmp_path / "003-mask-train" / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["config"]["mask_train"]["ratio"] = "a tenth"
    path.write_text(json.dumps(record), encoding="utf-8")
    [_], [problem] = figures_and_problems_of(tmp_path)
    assert "004-eval" in problem


def test_two_data_sets_have_a_figure_each(tmp_path: Path) -> None:
    write_ratios(Study(tmp_path), [0.1, 0.2])
    for number, parents in (
        (20, ["001-fft"]),
        (21, ["001-fft", "003-mask-train"]),
        (22, ["001-fft", "005-mask-train"]),
    ):
        samples = make_samples(number, loss=0.5, correct=0.5)
        state = "MFT, paper" if len(parents) > 1 else "FFT"
        write_evaluation(tmp_path, number, state, parents, samples, task="gsm8k", digest="g", recipe="study")
    assert [figure.name for figure in figures_of(tmp_path)] == ["mask-ratio-gsm8k", "mask-ratio-test-jsonl"]


@pytest.mark.slow
def test_a_figure_is_drawn_and_its_data_is_plain(tmp_path: Path) -> None:
    write_ratios(Study(tmp_path), [0.1, 0.2])
    [figure] = figures_of(tmp_path)
    assert "share removed" in render(figure).svg
    assert json.loads(json.dumps(figure.data)) == list(figure.data)
