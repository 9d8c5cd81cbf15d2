"""Training figures: where lines begin, what they are relative to, and which are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure as Canvas

from mftctl.reporting.figures.style import render
from tests.reporting.figures.curve_study import (
    FFT_LOSSES,
    drawn,
    figures_and_problems_of,
    figures_of,
    labels_of,
    lines_of,
    points_of,
    star_of,
    write_study,
)
from tests.reporting.run_folders import make_samples, write_evaluation
from tests.reporting.training_runs import write_training

PAPER = {"preset": "paper"}


def test_each_line_is_relative_to_the_best_fft_and_begins_at_its_model(tmp_path: Path) -> None:
    write_study(tmp_path)
    [figure] = figures_of(tmp_path)
    assert points_of(figure, "FFT") == pytest.approx({0: 1.2, 10: 0.2, 20: 0.0, 30: 0.1})
    assert points_of(figure, "continued FFT") == pytest.approx({20: 0.0, 30: 0.15})
    assert points_of(figure, "MFT") == pytest.approx({20: 0.0, 24: -0.1})
    assert points_of(figure, "random mask") == pytest.approx({20: 0.04})
    assert star_of(figure) == (20.0, 0.0)
    assert "The loss at the star is 0.8000." in figure.caption


@pytest.mark.slow
@given(
    fft=st.lists(st.floats(0.1, 5), min_size=2, max_size=8),
    mask=st.lists(st.floats(0.1, 5), min_size=2, max_size=5),
    unmasked=st.floats(0.1, 5),
)
def test_the_best_fft_is_zero_and_a_mask_is_measured_from_it(
    tmp_path_factory: pytest.TempPathFactory, fft: list[float], mask: list[float], unmasked: float
) -> None:
    root = tmp_path_factory.mktemp("runs")
    parent = write_training(root, 1, "FFT", {10 * step: loss for step, loss in enumerate(fft)})
    write_training(
        root,
        2,
        "MFT",
        dict(enumerate(mask)),
        command="mask-train",
        parents=[parent],
        before="FFT",
        unmasked_loss=unmasked,
    )
    [figure] = figures_of(root)
    assert min(points_of(figure, "FFT").values()) == 0
    best_step = 10 * fft.index(min(fft))
    assert points_of(figure, "MFT") == pytest.approx(
        {best_step + step: loss - unmasked for step, loss in enumerate(mask)}
    )


def test_a_line_begins_at_the_last_state_kept_by_a_continued_training(tmp_path: Path) -> None:
    write_study(tmp_path)
    parents = ["001-fft", "002-fft"]
    losses = {0: 0.9, 5: 0.85}
    write_training(
        tmp_path,
        9,
        "MFT threshold",
        losses,
        command="mask-train",
        parents=parents,
        before="continued FFT",
        unmasked_loss=0.9,
        options={**PAPER, "threshold": -0.035},
    )
    [figure] = figures_of(tmp_path)
    # 20 steps to the best FFT and 10 more; the model to mask is 0.15 above the best FFT.
    assert points_of(figure, "MFT threshold") == pytest.approx({30: 0.15, 35: 0.10})


def test_seeds_with_the_same_steps_are_one_line_with_a_band(tmp_path: Path) -> None:
    write_study(tmp_path, seed=0)
    write_study(tmp_path, seed=1, shift=0.5)
    [figure] = figures_of(tmp_path)
    axes = drawn(figure).axes[0]
    by_label = {line.get_label(): line for line in axes.get_lines()}
    assert len(axes.get_lines()) == len(by_label) == 5  # four methods and the star
    assert by_label["FFT"].get_ydata() == pytest.approx([1.2, 0.2, 0.0, 0.1])
    assert len(axes.collections) == 4
    assert "Mean over 2 seeds" in figure.caption
    assert "The loss at the star is 1.0500." in figure.caption


def test_seeds_that_end_at_different_steps_are_drawn_separately_afterwards(tmp_path: Path) -> None:
    for seed, steps in ((0, (0, 10, 20)), (1, (0, 10, 20, 30))):
        losses = {step: 1.0 - 0.01 * step for step in steps}
        write_training(tmp_path, 1 + seed, "FFT", losses, seed=seed)
    [figure] = figures_of(tmp_path)
    whole, thin = [line for line in lines_of(figure) if line.get_marker() == "h"]
    assert list(whole.get_xdata()) == [0, 10, 20]
    assert list(thin.get_xdata()) == [20, 30]
    assert thin.get_linewidth() < whole.get_linewidth()


def test_a_seed_in_training_is_drawn_separately_and_moves_no_star(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_training(tmp_path, 1 + seed, "FFT", {0: 1.0, 10: 0.8 - seed, 20: 0.9}, seed=seed)
    write_training(tmp_path, 3, "FFT", {0: 1.0}, seed=2, status="running")
    [figure] = figures_of(tmp_path)
    mean, running = [line for line in lines_of(figure) if line.get_marker() == "h"]
    assert (list(mean.get_xdata()), list(running.get_xdata())) == ([0, 10, 20], [0])
    assert mean.get_ydata() == pytest.approx([0.7, 0.0, 0.6])
    assert star_of(figure) == (10.0, 0.0)


def test_seeds_measured_at_different_steps_are_drawn_separately(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "FFT", {0: 1.0, 10: 0.8, 20: 0.7}, seed=0)
    write_training(tmp_path, 2, "FFT", {0: 1.2, 7: 0.9, 20: 0.8}, seed=1)
    [figure] = figures_of(tmp_path)
    lines = [line for line in lines_of(figure) if line.get_marker() == "h"]
    assert [list(line.get_xdata()) for line in lines] == [[0, 10, 20], [0, 7, 20]]
    assert labels_of(figure) == ["FFT", "best FFT"]


def test_the_variants_of_a_sweep_are_never_averaged_and_the_best_is_drawn(tmp_path: Path) -> None:
    fft = write_training(tmp_path, 1, "FFT", FFT_LOSSES, stage="fft")
    for number, (ratio, loss) in enumerate(((0.02, 0.66), (0.1, 0.6), (0.4, 0.69)), start=2):
        write_training(
            tmp_path,
            number,
            "MFT, paper",
            {0: 0.7, 4: loss},
            command="mask-train",
            parents=[fft],
            before="FFT",
            unmasked_loss=0.7,
            options={**PAPER, "ratio": ratio},
            stage=f"mft[ratio={ratio}]",
        )
    [figure] = figures_of(tmp_path)
    assert points_of(figure, "MFT, paper (ratio=0.1)") == pytest.approx({20: 0.0, 24: -0.1})
    assert labels_of(figure) == ["FFT", "MFT, paper (ratio=0.1)", "best FFT"]
    assert "MFT, paper (ratio=0.1) of 3" in figure.caption


def test_a_separate_stage_is_drawn_rather_than_a_variant_of_a_sweep(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_training(
        tmp_path,
        8,
        "MFT",
        {0: 0.7, 4: 0.1},
        command="mask-train",
        parents=["001-fft"],
        before="FFT",
        unmasked_loss=0.7,
        stage="mft[data_fraction=0.5]",
        options={"data_fraction": 0.5},
    )
    [figure] = figures_of(tmp_path)
    assert points_of(figure, "MFT") == pytest.approx({20: 0.0, 24: -0.1})
    assert "MFT of 2" in figure.caption


def test_of_repeated_runs_the_newest_finished_one_counts(tmp_path: Path) -> None:
    for number, (status, last) in enumerate((("finished", 0.9), ("finished", 0.8), ("interrupted", 0.7)), start=1):
        write_training(tmp_path, number, "FFT", {0: 1.0, 10: last}, status=status)
    [figure] = figures_of(tmp_path)
    assert figure.runs == ("002-fft",)


def test_a_running_training_is_drawn_up_to_its_last_step(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_training(tmp_path, 6, "", {0: 2.0, 10: 1.1}, status="running", options={"method": "gmt"}, stage="gmt")
    write_training(tmp_path, 7, "", {}, status="running", options={"method": "lora"}, stage="lora")
    mask = {"command": "mask-train", "parents": ["001-fft"], "before": "FFT", "status": "interrupted"}
    write_training(tmp_path, 8, "", {0: 0.75, 4: 0.72}, options=PAPER, stage="paper", **mask)
    [figure] = figures_of(tmp_path)
    assert points_of(figure, "GMT") == pytest.approx({0: 1.2, 10: 0.3})
    # The unmasked loss on the first half of the records is known from the finished mask.
    assert points_of(figure, "MFT, paper") == pytest.approx({20: 0.05, 24: 0.02})
    assert "Not finished: 006-fft, 008-mask-train." in figure.caption


def test_a_running_mask_training_without_an_unmasked_loss_is_reported_as_missing(tmp_path: Path) -> None:
    fft = write_training(tmp_path, 1, "FFT", FFT_LOSSES)
    mask = {"command": "mask-train", "parents": [fft], "before": "FFT", "status": "running"}
    write_training(tmp_path, 2, "", {0: 0.75, 4: 0.72}, options=PAPER, **mask)
    [figure], [problem] = figures_and_problems_of(tmp_path)
    assert labels_of(figure) == ["FFT", "best FFT"]
    assert "002-mask-train" in problem
    assert problem.endswith("is unknown")


def test_masks_of_a_model_without_a_run_are_relative_to_that_model(tmp_path: Path) -> None:
    losses = {0: 0.7, 4: 0.65}
    write_training(tmp_path, 1, "MFT", losses, command="mask-train", unmasked_loss=0.7)
    [figure] = figures_of(tmp_path)
    assert points_of(figure, "MFT") == pytest.approx({0: 0.0, 4: -0.05})
    assert "the unmasked model" in figure.title
    assert star_of(figure) is None


def test_without_fft_the_losses_themselves_are_drawn(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "GMT", FFT_LOSSES, options={"method": "gmt"})
    [figure] = figures_of(tmp_path)
    assert points_of(figure, "GMT") == FFT_LOSSES
    assert figure.title == "Validation loss by step"


def test_two_domains_of_one_model_have_a_figure_each(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "FFT", FFT_LOSSES, data="maths.jsonl")
    code = write_training(tmp_path, 2, "FFT", FFT_LOSSES, data="code.jsonl")
    # Learned on maths alone, from a model tuned on code: it belongs to that model.
    write_training(
        tmp_path,
        3,
        "MFT",
        {0: 0.7, 4: 0.6},
        command="mask-train",
        data="maths.jsonl",
        parents=[code],
        before="FFT",
        unmasked_loss=0.7,
    )
    maths, coding = figures_of(tmp_path)
    assert (maths.name, coding.name) == ("loss-by-step", "loss-by-step-2")
    assert (labels_of(maths), labels_of(coding)) == (["FFT", "best FFT"], ["FFT", "MFT", "best FFT"])


def write_many(root: Path) -> None:
    """FFT and eleven other methods."""
    write_study(root)
    ways = ({"method": "hft"}, {"method": "random"}, {"method": "gmt"}, {"method": "gmt", "scope": "global"})
    for number, (state, options) in enumerate(
        zip(("HFT", "random update", "GMT", "GMT global"), ways, strict=True), start=20
    ):
        write_training(root, number, state, FFT_LOSSES, options=options, stage=state)
    write_training(root, 30, "LoRA", FFT_LOSSES, options={"method": "lora"}, stage="lora")
    on_fft: dict[str, Any] = {"command": "mask-train", "parents": ["001-fft"], "before": "FFT", "unmasked_loss": 0.7}
    write_training(root, 31, "MFT, paper", {0: 0.7, 4: 0.6}, options=PAPER, stage="paper", **on_fft)
    threshold = {**PAPER, "threshold": -0.035}
    write_training(root, 32, "MFT threshold", {0: 0.7, 4: 0.6}, options=threshold, stage="global", **on_fft)


def test_too_many_lines_to_distinguish_are_split_into_two_figures(tmp_path: Path) -> None:
    write_many(tmp_path)
    masks, updates = figures_of(tmp_path)
    assert (masks.name, updates.name) == ("loss-by-step", "loss-by-step-updates")
    assert labels_of(updates) == ["FFT", "HFT", "random update", "GMT", "GMT global", "best FFT"]
    assert labels_of(masks) == [
        "FFT",
        "continued FFT",
        "LoRA",
        "random mask",
        "MFT, paper",
        "MFT",
        "MFT threshold",
        "best FFT",
    ]


def test_a_line_far_above_all_starts_is_off_the_figure_and_named(tmp_path: Path) -> None:
    write_study(tmp_path)
    write_training(
        tmp_path,
        8,
        "L1 mask",
        {0: 9.0},
        command="mask-train",
        options={"method": "magnitude"},
        parents=["001-fft"],
        before="FFT",
        unmasked_loss=0.8,
        stage="l1",
    )
    [figure] = figures_of(tmp_path)
    assert drawn(figure).axes[0].get_ylim()[1] < 1.2
    assert "cut off at the top, all of L1 mask." in figure.caption


def write_scored(root: Path) -> None:
    """FFT, continued FFT, MFT and a random mask; the mask was measured by `eval` alone, on the same samples."""
    scores: dict[str, Any] = {"scores": {"exact_match": {0: 0.1, 10: 0.3, 20: 0.5, 30: 0.4}}}
    fft = write_training(root, 1, "FFT", FFT_LOSSES, stage="fft", **scores)
    on_fft: dict[str, Any] = {"parents": [fft], "before": "FFT"}
    masks: dict[str, Any] = {"command": "mask-train", **on_fft}
    write_training(
        root, 2, "MFT", {0: 0.7, 4: 0.6}, unmasked_loss=0.7, scores={"exact_match": {0: 0.5, 4: 0.6}}, **masks
    )
    random: dict[str, Any] = {"options": {"method": "random"}, "unmasked_loss": 0.8, **masks}
    made = write_training(root, 3, "random mask", {0: 0.9}, **random)
    write_evaluation(root, 4, "random mask", [fft, made], make_samples(1, loss=1, correct=0.2, samples=100))
    # As many samples, but different ones.
    drop: dict[str, Any] = {"options": {"method": "drop"}, **masks}
    made = write_training(root, 5, "trivial drop", {}, **drop)
    samples = make_samples(1, loss=1, correct=0.2, samples=100)
    write_evaluation(root, 6, "trivial drop", [fft, made], samples, digest="other")


def test_interim_scores_are_drawn_with_those_of_eval_on_the_same_samples(tmp_path: Path) -> None:
    write_scored(tmp_path)
    figure = next(figure for figure in figures_of(tmp_path) if figure.name.startswith("score"))
    assert figure.name == "score-by-step-test-jsonl-exact-match"
    assert points_of(figure, "FFT") == {0: 0.1, 10: 0.3, 20: 0.5, 30: 0.4}
    assert points_of(figure, "MFT") == {20: 0.5, 24: 0.6}
    record = json.loads((tmp_path / "004-eval" / "run.json").read_text(encoding="utf-8"))
    assert points_of(figure, "random mask") == {20: record["result"]["datasets"][0]["metrics"][1]["value"]}
    assert labels_of(figure) == ["FFT", "random mask", "MFT", "best FFT"]
    assert star_of(figure) == (20.0, 0.5)
    assert "standard error of up to 0.020" in figure.caption


def test_the_star_of_a_score_is_at_the_start_of_the_next_training_if_its_own_step_was_not_measured(
    tmp_path: Path,
) -> None:
    few: dict[str, Any] = {"scores": {"exact_match": {0: 0.1, 15: 0.3, 30: 0.4}}}
    fft = write_training(tmp_path, 1, "FFT", FFT_LOSSES, **few)
    figure = next(figure for figure in figures_of(tmp_path) if figure.name.startswith("score"))
    assert star_of(figure) is None
    assert "There is no star" in figure.caption
    on_fft: dict[str, Any] = {"parents": [fft], "before": "FFT", "scores": {"exact_match": {0: 0.45, 15: 0.4}}}
    write_training(tmp_path, 2, "continued FFT", {0: 0.8, 10: 0.9}, **on_fft)
    figure = next(figure for figure in figures_of(tmp_path) if figure.name.startswith("score"))
    assert star_of(figure) == (20.0, 0.45)


def test_long_labels_stay_inside_the_figure(tmp_path: Path) -> None:
    fft = write_training(tmp_path, 1, "FFT", FFT_LOSSES)
    for number, value in enumerate((0.1, 0.2), start=2):
        stage = f"mft[data_fraction={value},learn_from=unseen]"
        mask: dict[str, Any] = {"command": "mask-train", "parents": [fft], "before": "FFT", "unmasked_loss": 0.7}
        write_training(tmp_path, number, "MFT", {0: 0.7, 4: 0.6}, options={"data_fraction": value}, stage=stage, **mask)
    [figure] = figures_of(tmp_path)
    canvas = Canvas(figsize=(figure.width_inches, figure.height_inches), layout="constrained")
    figure.draw(canvas)
    canvas.draw_without_rendering()
    [legend] = canvas.legends
    box, whole = legend.get_window_extent(), canvas.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1


def test_masks_too_short_to_be_seen_get_an_inset(tmp_path: Path) -> None:
    write_training(tmp_path, 1, "FFT", {0: 2.0, 100: 0.8, 200: 0.9})
    on_fft: dict[str, Any] = {"parents": ["001-fft"], "before": "FFT", "unmasked_loss": 0.7}
    write_training(tmp_path, 2, "MFT", {0: 0.7, 4: 0.6}, command="mask-train", **on_fft)
    [figure] = figures_of(tmp_path)
    _, closer = drawn(figure).axes
    low, high = closer.get_xlim()
    assert 90 < low < 100 < 104 < high < 110


@pytest.mark.parametrize("status", ["failed", "running"])
def test_without_trainings_there_is_no_figure(tmp_path: Path, status: str) -> None:
    write_training(tmp_path, 1, "FFT", {} if status == "running" else FFT_LOSSES, status=status)
    assert figures_of(tmp_path) == []


@pytest.mark.slow
def test_a_figure_is_the_same_svg_each_time_and_its_data_is_plain(tmp_path: Path) -> None:
    write_study(tmp_path)
    [one], [other] = figures_of(tmp_path), figures_of(tmp_path)
    assert render(one).svg == render(other).svg
    assert "continued FFT" in render(one).svg
    assert json.loads(json.dumps(one.data)) == list(one.data)
    assert fmean(point["value"] for point in one.data if point["state"] == "MFT") == pytest.approx(-0.05)
