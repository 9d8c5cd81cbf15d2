"""Frontier figures: which states are dominated, which form a line, what is drawn, and where labels fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure as Canvas

from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.figures.frontier import frontier_figures
from mftctl.reporting.figures.frontier_families import families
from mftctl.reporting.figures.frontier_labels import Label, place_labels
from mftctl.reporting.figures.style import Figure, render
from mftctl.reporting.frontier import frontiers
from mftctl.reporting.state_tables import MetricTable, Row
from tests.reporting.retained_runs import DELTA, RATIOS, RetainedStudy, add_retained, write_retained_study
from tests.reporting.run_folders import compare_runs, write_experiment


def figure_of(root: Path) -> Figure:
    figures, problems = frontier_figures(compare_runs(root)[0], list_runs(root)[0])
    assert problems == []
    [figure] = figures
    return figure


def row(state: str, value: float, seeds: tuple[int, ...] = (0,)) -> Row:
    return Row(state, value, None, None, 10, seeds, False, None, ())


def table(dataset: str, *rows: Row) -> MetricTable:
    return MetricTable("base", dataset, "loss", "FFT", rows)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("study")
    write_retained_study(root)
    return root


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=8))
def test_a_state_is_dominated_if_another_is_better_in_one_loss_and_no_worse_in_the_other(
    losses: list[tuple[int, int]],
) -> None:
    tables = [
        table("test.jsonl", *(row(str(number), one) for number, (one, _) in enumerate(losses))),
        table("retained", *(row(str(number), other) for number, (_, other) in enumerate(losses))),
    ]
    [frontier] = frontiers(tables)[0]
    for point in frontier.points:
        one, other = losses[int(point.state)]
        expected = any(x <= one and y <= other and (x < one or y < other) for x, y in losses)
        assert point.is_dominated == expected
    assert [point.in_domain.value for point in frontier.points] == sorted(one for one, _ in losses)


def test_a_state_measured_with_different_seeds_is_left_out() -> None:
    rows = (row("FFT", 1.0), row("MFT", 0.9, (0, 1)), row("LoRA", 1.1))
    kept = (row("FFT", 1.0), row("MFT", 0.9), row("LoRA", 1.1))
    [frontier], problems = frontiers([table("test.jsonl", *rows), table("retained", *kept)])
    assert [point.state for point in frontier.points] == ["FFT", "LoRA"]
    assert problems == [
        "MFT: left out of the frontier: measured on test.jsonl with seeds 0, 1, on data to retain with 0"
    ]


def test_without_data_to_retain_there_is_no_figure(tmp_path: Path) -> None:
    write_experiment(tmp_path)
    assert frontier_figures(compare_runs(tmp_path)[0], list_runs(tmp_path)[0]) == ([], [])


def test_states_that_differ_in_their_ratio_form_a_line_for_each_weight(study: Path) -> None:
    lines: dict[str, list[float]] = {}
    for point in figure_of(study).data:
        if "line" in point:
            lines.setdefault(point["line"], []).append(point["ratio"])
    assert lines == {
        "pre-trained": [None],
        "FFT": [None],
        "LoRA": [None],
        "random drop by ratio": list(RATIOS),
        "MFT delta by ratio": list(RATIOS),
        "MFT delta by ratio, retain weight 1": list(RATIOS),
    }


def test_states_that_differ_in_the_weight_alone_form_a_line(tmp_path: Path) -> None:
    study = RetainedStudy(tmp_path)
    fft = study.add("FFT", 0.3, 0.9, stage="fft")
    for weight in (0.1, 1.0, 10.0):
        options = {**DELTA, "ratio": 0.5, "retain_weight": weight}
        study.add("MFT delta", 0.3, 0.9 - weight / 20, options=options, on=[fft], stage=f"delta[{weight}]")
    study.add("MFT delta", 0.3, 0.9, options={**DELTA, "layers": "0-1", "ratio": 0.5}, on=[fft], stage="few")
    lines = [(point["line"], point["retain_weight"]) for point in figure_of(tmp_path).data]
    assert [weight for line, weight in lines if line == "MFT delta by retain weight"] == [0.1, 1.0, 10.0]
    assert [line for line, _ in lines if "few" in line] == ["MFT delta (few)"]


def test_the_numbers_are_those_of_the_tables(study: Path) -> None:
    tables = {one.dataset: one for one in compare_runs(study)[0] if one.metric == "loss"}
    points = {point["state"]: point for point in figure_of(study).data if "line" in point}
    for dataset, key in (("test.jsonl", "in_domain"), ("retained", "retained")):
        for one in tables[dataset].rows:
            point = points[one.state]
            assert point[f"{key}_loss"] == one.value
            if one.change is not None:
                ends = (point[f"{key}_low"], point[f"{key}_high"])
                shift = one.value - one.change.value
                assert ends == pytest.approx((shift + one.change.low, shift + one.change.high))


def test_the_caption_names_what_is_not_dominated_and_what_is_not_drawn(study: Path) -> None:
    figure = figure_of(study)
    names = [point["state"] for point in figure.data if point.get("dominated") is False]
    assert (
        "Not dominated, which means that no other state has one loss lower and the other no higher: " in figure.caption
    )
    assert all(name in figure.caption for name in names)
    assert "FFT" not in names
    assert "Dotted line: the retained loss before fine-tuning" in figure.caption
    assert "validation data instead" in figure.caption
    assert "Outside the axes" not in figure.caption


def test_a_state_far_away_is_named_instead_of_drawn(tmp_path: Path) -> None:
    write_retained_study(tmp_path).add("HFT", 9.0, 8.0, options={"method": "hft"}, stage="hft")
    assert "Outside the axes: HFT (9." in figure_of(tmp_path).caption


def test_the_shares_of_an_interpolation_are_averaged_over_seeds(tmp_path: Path) -> None:
    study = write_retained_study(tmp_path)
    study.interpolate({0.5: (0.8, 0.7), 1.0: (0.33, 1.1)}, seed=1)
    found = [point for point in figure_of(tmp_path).data if "share" in point]
    shares = [(point["share"], point["validation_loss"], point["retained_loss"]) for point in found]
    assert shares == [(0.5, pytest.approx(0.7), pytest.approx(0.6)), (1.0, pytest.approx(0.32), pytest.approx(1.0))]


@pytest.mark.parametrize(("kept", "digest", "lines"), [(None, "r1", 0), (0.5, "other", 1)])
def test_an_interpolation_that_measured_other_data_is_not_drawn(
    kept: float | None, digest: str, lines: int, tmp_path: Path
) -> None:
    study = RetainedStudy(tmp_path)
    study.add("pre-trained", 1.9, 0.3, stage="base")
    study.add("FFT", 0.3, 0.9, stage="fft")
    study.interpolate({0.5: (0.8, kept)}, digest=digest)
    [figure], problems = frontier_figures(compare_runs(tmp_path)[0], list_runs(tmp_path)[0])
    assert not any("share" in point for point in figure.data)
    assert [line.partition(",")[0] for line in problems] == lines * [
        "005-interpolate: left out of the frontier: its retained data differ from those of the evaluations"
    ]


def test_no_two_states_have_one_style(tmp_path: Path) -> None:
    study = RetainedStudy(tmp_path)
    study.add("pre-trained", 1.9, 0.3, stage="base")
    fft = study.add("FFT", 0.3, 0.9, stage="fft")
    for number in range(20):
        options = {**DELTA, "learning_rate": number}
        study.add("MFT delta", 0.3 + 0.01 * number, 0.8, options=options, on=[fft], stage=f"rate{number}")
    for name in ("a later state", "another later state"):
        study.add(name, 0.4, 0.7, options=DELTA, on=[fft], stage=name)
    [frontier] = frontiers(compare_runs(tmp_path)[0])[0]
    found = families(frontier, {run.name: run for run in list_runs(tmp_path)[0]})
    assert len(found) >= 23
    assert len({(family.style.color, family.style.marker) for family in found}) == len(found)


def test_the_figure_is_drawn_with_each_line_in_the_legend(study: Path) -> None:
    figure = figure_of(study)
    canvas = Canvas(layout="constrained")
    figure.draw(canvas)
    [legend] = canvas.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts[:2] == ["not dominated", "interpolation (validation)"]
    assert {"FFT", "MFT delta by ratio", "MFT delta by ratio, retain weight 1"} <= set(texts)
    drawn = render(figure)
    assert drawn == render(figure)
    assert "before fine-tuning" in drawn.svg


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(0, 1), st.text("abc0.", min_size=1, max_size=12)), min_size=1, max_size=12
    ),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=4),
)
def test_labels_lie_inside_and_overlap_nothing(
    points: list[tuple[float, float, str]], others: list[tuple[float, float]]
) -> None:
    size = (5.0, 3.0)
    labels = [Label(text, x, y) for x, y, text in points]
    placed = place_labels(labels, others, (0, 1), (0, 1), size)
    boxes = []
    for one in placed:
        x, y = one.x * 72 * size[0] + one.offset_points[0], one.y * 72 * size[1] + one.offset_points[1]
        half = 4.6 * len(one.text) / 2
        boxes.append((x - half, x + half, y - 4.5, y + 4.5))
        assert -1e-6 <= x - half
        assert x + half <= 72 * size[0] + 1e-6
    for number, (left, right, low, high) in enumerate(boxes):
        for other in boxes[:number]:
            assert (
                right <= other[0] + 1e-6 or other[1] <= left + 1e-6 or high <= other[2] + 1e-6 or other[3] <= low + 1e-6
            )
        for across, up in [*((one.x, one.y) for one in labels), *others]:
            x, y = across * 72 * size[0], up * 72 * size[1]
            assert not (left < x < right and low < y < high)


def test_the_retained_table_has_no_strongest_control(study: Path) -> None:
    tables = compare_runs(study)[0]
    assert [one.dataset for one in tables] == ["test.jsonl", "test.jsonl", "retained"]
    assert any(one.against_control is not None for one in tables[0].rows)
    assert all(one.against_control is None for one in tables[2].rows)
    assert tables[2].is_retained
    assert not tables[0].is_retained


def test_data_to_retain_measured_first_still_comes_last(tmp_path: Path) -> None:
    study = RetainedStudy(tmp_path)
    study.add("FFT", 0.3, None, stage="fft")
    evaluation = tmp_path / "002-eval"
    add_retained(evaluation, 0.9)
    text = (evaluation / "run.json").read_text(encoding="utf-8")

    record = json.loads(text)
    record["result"]["datasets"].reverse()
    (evaluation / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert [one.dataset for one in compare_runs(tmp_path)[0]] == ["test.jsonl", "test.jsonl", "retained"]
