"""Probe figures: each group by its layers, by group size and over seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure as Canvas

from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.figures.probe import probe_figures
from mftctl.reporting.figures.style import Figure, render
from tests.reporting.training_runs import write_probe

FOURS = {"0-3": 0.02, "4-7": -0.03, "8-11": -0.01, "12-13": 0.0}


def figures_and_problems_of(root: Path) -> tuple[list[Figure], list[str]]:
    return probe_figures(list_runs(root)[0])


def figures_of(root: Path) -> list[Figure]:
    figures, problems = figures_and_problems_of(root)
    assert problems == []
    return figures


def changes_of(figure: Figure) -> dict[str, float]:
    return {point["layers"]: point["change"] for point in figure.data}


def lines_of(figure: Figure) -> dict[str, Any]:
    """The lines in the legend, by label."""
    canvas = Canvas(layout="constrained")
    figure.draw(canvas)
    [axes] = canvas.axes
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def test_each_group_is_drawn_at_the_middle_of_its_layers(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, FOURS, unmasked_loss=0.5)
    [figure] = figures_of(tmp_path)
    lines = lines_of(figure)
    assert list(lines) == ["FFT, no mask", "groups of 4", "recommended"]
    assert set(lines["FFT, no mask"].get_ydata()) == {0.5}
    assert list(lines["groups of 4"].get_xdata()) == [1.5, 5.5, 9.5, 12.5]
    assert lines["groups of 4"].get_ydata() == pytest.approx([0.52, 0.47, 0.49, 0.5])
    assert lines["recommended"].get_xydata()[0] == pytest.approx([5.5, 0.47])


@pytest.mark.slow
@given(
    changes=st.integers(1, 4).flatmap(
        lambda seeds: st.lists(st.lists(st.floats(-1, 1), min_size=seeds, max_size=seeds), min_size=2, max_size=5)
    )
)
def test_groups_have_mean_and_range_over_seeds(
    tmp_path_factory: pytest.TempPathFactory, changes: list[list[float]]
) -> None:
    root = tmp_path_factory.mktemp("runs")
    for seed in range(len(changes[0])):
        groups = {f"{4 * place}-{4 * place + 3}": found[seed] for place, found in enumerate(changes)}
        write_probe(root, 1 + seed, groups, seed=seed, parents=[f"{100 + seed}-fft"])
    [figure] = figures_of(root)
    found = np.array([[point["change"], point["lowest"], point["highest"]] for point in figure.data])
    expected = np.array(changes)
    assert found == pytest.approx(np.stack([expected.mean(1), expected.min(1), expected.max(1)], axis=1))


def test_each_size_is_a_line_and_the_last_of_a_size_may_be_smaller(tmp_path: Path) -> None:
    groups = {**FOURS, "0-7": 0.01, "8-13": -0.02}
    write_probe(tmp_path, 1, groups, groups=[4, 8])
    [figure] = figures_of(tmp_path)
    sizes = {point["layers"]: point["groups"] for point in figure.data}
    assert sizes == {layers: "groups of 4" for layers in FOURS} | {"0-7": "groups of 8", "8-13": "groups of 8"}
    assert list(lines_of(figure)["groups of 8"].get_xdata()) == [3.5, 10.5]


def test_all_layers_together_are_a_line_of_their_own_beside_the_groups(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, {**FOURS, "0-13": -0.05}, groups=[4, "all"])
    [figure] = figures_of(tmp_path)
    assert list(lines_of(figure)) == ["FFT, no mask", "groups of 4", "all layers together", "recommended"]
    assert "layers 0-13" in figure.caption


def test_sizes_of_groups_not_given_are_the_default(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, {**FOURS, "0-13": -0.05})
    [figure] = figures_of(tmp_path)
    assert list(lines_of(figure)) == ["FFT, no mask", "groups of 4", "all layers together", "recommended"]


def test_layers_that_are_not_adjacent_are_drawn_at_their_positions(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, {"0,2-3": -0.01, "8-10": 0.01}, groups=[3])
    [figure] = figures_of(tmp_path)
    canvas = Canvas(layout="constrained")
    figure.draw(canvas)
    bars = [list(line.get_xdata()) for line in canvas.axes[0].get_lines() if line.get_linewidth() > 2]
    assert bars == [[-0.4, 0.4], [1.6, 3.4], [7.6, 10.4]]


def test_several_seeds_are_averaged_as_changes_from_their_own_models(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, {"0-3": 0.1, "4-7": -0.1}, unmasked_loss=0.5, seed=0)
    write_probe(tmp_path, 2, {"0-3": 0.3, "4-7": -0.2}, unmasked_loss=0.7, seed=1, parents=["002-fft"])
    [figure] = figures_of(tmp_path)
    assert changes_of(figure) == pytest.approx({"0-3": 0.2, "4-7": -0.15})
    [point] = [point for point in figure.data if point["layers"] == "4-7"]
    assert (point["lowest"], point["highest"], point["seeds"]) == (-0.2, -0.1, 2)
    assert lines_of(figure)["FFT, no mask"].get_ydata()[0] == pytest.approx(0.6)
    assert "Star: layers 4-7 (-0.1500), recommended by 2 of 2 probes." in figure.caption


def test_the_layers_that_most_seeds_recommend_are_marked(tmp_path: Path) -> None:
    for number, best in enumerate(("0-3", "4-7", "4-7")):
        changes = {"0-3": -0.5 if best == "0-3" else 0.0, "4-7": -0.1}
        write_probe(tmp_path, 1 + number, changes, seed=number)
    [figure] = figures_of(tmp_path)
    assert [point["layers"] for point in figure.data if point["recommended"]] == ["4-7"]
    assert "recommended by 2 of 3 probes" in figure.caption


def test_probes_of_one_model_with_other_groups_share_a_figure_and_the_newest_counts(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, {"0-3": 0.5, "4-7": 0.4}, groups=[4])
    write_probe(tmp_path, 2, {"0-7": 0.3}, groups=[8])
    write_probe(tmp_path, 3, {"0-3": 0.1}, groups=[4])
    [figure] = figures_of(tmp_path)
    assert changes_of(figure) == {"0-3": 0.1, "4-7": 0.4, "0-7": 0.3}
    assert figure.runs == ("001-probe", "002-probe", "003-probe")


@pytest.mark.parametrize(
    "changed", [{"parents": ["009-fft"]}, {"options": {"preset": "paper"}}, {"state": "continued FFT"}]
)
def test_probes_of_other_models_or_masks_have_separate_figures(tmp_path: Path, changed: dict[str, Any]) -> None:
    write_probe(tmp_path, 1, FOURS)
    write_probe(tmp_path, 2, FOURS, **changed)
    assert [(figure.name, figure.runs) for figure in figures_of(tmp_path)] == [
        ("probe", ("001-probe",)),
        ("probe-2", ("002-probe",)),
    ]


def test_the_estimates_of_a_fast_probe_have_a_separate_figure(tmp_path: Path) -> None:
    agreement = {"run": "002-probe", "groups": 4, "rank_correlation": 0.8}
    write_probe(tmp_path, 1, {"0-3": -1.0, "4-7": -2.0}, fast=True, agreement=agreement)
    write_probe(tmp_path, 2, {"0-3": -0.1, "4-7": -0.2})
    trained, promised = figures_of(tmp_path)
    assert (trained.name, promised.name) == ("probe", "probe-promised")
    assert changes_of(promised) == {"0-3": -1.0, "4-7": -2.0}
    assert set(lines_of(promised)["FFT, no mask"].get_ydata()) == {0.0}
    assert "Nothing was trained" in promised.caption
    assert "0.80 (002-probe)" in promised.caption
    assert "Nothing was trained" not in trained.caption


def test_a_probe_by_a_score_has_a_separate_figure_with_the_loss_in_its_data(tmp_path: Path) -> None:
    scores = {"0-3": -0.05, "4-7": 0.025, "8-11": 0.05, "12-13": 0.0}
    write_probe(tmp_path, 1, FOURS)
    write_probe(tmp_path, 2, FOURS, scores=scores, recommended="8-11")
    by_loss, by_score = figures_of(tmp_path)
    assert (by_loss.title, by_loss.runs) == ("Validation loss by group of layers", ("001-probe",))
    assert (by_score.title, by_score.runs) == ("gsm8k exact_match,strict-match by group of layers", ("002-probe",))
    assert changes_of(by_score) == scores
    assert {point["layers"]: point["loss_change"] for point in by_score.data} == FOURS
    assert {(point["unmasked_score"], point["unmasked_loss"]) for point in by_score.data} == {(0.25, 0.5)}
    assert "loss_change" not in by_loss.data[0]
    lines = lines_of(by_score)
    assert lines["groups of 4"].get_ydata() == pytest.approx([0.2, 0.275, 0.3, 0.25])
    assert lines["recommended"].get_xydata()[0] == pytest.approx([9.5, 0.3])
    assert "scored on 80 samples, standard error of one score 0.0500" in by_score.caption
    canvas = Canvas(layout="constrained")
    by_score.draw(canvas)
    assert canvas.axes[0].get_ylabel() == "gsm8k exact_match,strict-match"


def test_probes_by_different_scores_are_not_averaged(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, FOURS, scores=FOURS)
    write_probe(tmp_path, 2, FOURS, scores=FOURS, by="exact_match", seed=1)
    write_probe(tmp_path, 3, FOURS, scores=FOURS, seed=1)
    gsm8k, exact_match = figures_of(tmp_path)
    assert (gsm8k.runs, exact_match.runs) == (("001-probe", "003-probe"), ("002-probe",))
    assert exact_match.title == "exact_match on validation records by group of layers"


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_a_probe_that_is_not_finished_is_in_no_figure(tmp_path: Path, status: str) -> None:
    write_probe(tmp_path, 1, FOURS, status=status)
    assert figures_of(tmp_path) == []


def test_a_single_group_has_no_figure(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, {"4-7": -0.1})
    assert figures_of(tmp_path) == []


GROUP = {"size": 4, "change": 0.1, "start_loss": 0.5, "best_loss": 0.6, "best_step": 1, "steps": 2}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"unmasked_loss": None}, "unmasked_loss"),
        ({"groups": [{**GROUP, "layers": "first"}]}, "first is not a list of layers"),
        ({"groups": [{"layers": "0-3", "size": 4}]}, "change"),
        ({"recommended_layers": "20-23"}, "20-23"),
        ({"fast": True, "agreement": {"run": "001-probe", "groups": 2}}, "rank_correlation"),
    ],
)
def test_a_damaged_result_is_named_and_hides_no_other_probe(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    write_probe(tmp_path, 1, FOURS)
    write_probe(tmp_path, 2, FOURS)
    path = tmp_path / "002-probe" / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["result"] |= change
    path.write_text(json.dumps(record), encoding="utf-8")
    [figure], [problem] = figures_and_problems_of(tmp_path)
    assert figure.runs == ("001-probe",)
    assert "002-probe" in problem
    assert told in problem


@pytest.mark.slow
def test_a_figure_is_the_same_svg_each_time_and_its_data_is_plain(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, FOURS)
    [one], [other] = figures_of(tmp_path), figures_of(tmp_path)
    assert render(one).svg == render(other).svg
    assert "decoder layer" in render(one).svg
    assert json.loads(json.dumps(one.data)) == list(one.data)


def test_kinds_of_projections_are_drawn_apart_from_layers_and_the_best_first(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, FOURS)
    for number, fast in ((2, False), (3, True)):
        write_probe(tmp_path, number, {"q_proj": -0.02, "v_proj": -0.03, "up_proj": 0.01}, of_kinds=True, fast=fast)
    layers, trained, promised = figures_of(tmp_path)
    assert [layers.name, trained.name, promised.name] == ["probe", "probe-projections", "probe-promised-projections"]
    assert trained.title == "Validation loss by kind of projection"
    assert "Star: v_proj (-0.0300), recommended by 1 of 1 probes." in trained.caption
    assert {point["projection"]: point["change"] for point in trained.data} == {
        "v_proj": -0.03,
        "q_proj": -0.02,
        "up_proj": 0.01,
    }
    canvas = Canvas(layout="constrained")
    trained.draw(canvas)
    [axes] = canvas.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["v_proj", "q_proj", "up_proj"]
    line = lines_of(trained)["one kind of projection"]
    assert list(line.get_xdata()) == [0, 1, 2]
    assert line.get_ydata() == pytest.approx([0.47, 0.48, 0.51])
    assert line.get_linestyle() == "None"
