"""The figure of a loss surface: its contents, the runs it uses, and notes on runs that cannot be drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure as Canvas
from matplotlib.tri import TriContourSet

from mftctl.experiments.run_folder import Run, create_run, list_runs
from mftctl.reporting.figures.style import Figure, render
from mftctl.reporting.figures.surface import SurfacePoint, surface_figures, surfaces
from tests.partial_results import partial_result

Loss = Callable[[float, float], float | None]
MARKS = {"FFT": (0.0, 0.0), "continued FFT": (6.0, 0.0), "MFT, paper": (1.0, 6.0)}


def train_loss(x: float, y: float) -> float:
    return 0.1 + (x - 6) ** 2 / 50 + y**2 / 500


def held_out_loss(x: float, y: float) -> float:
    return 0.5 + (x - 1) ** 2 / 100 + (y - 5) ** 2 / 300


def write_surface(
    root: Path,
    *,
    side: int = 7,
    cells: int | None = None,
    train: Loss = train_loss,
    test: Loss = held_out_loss,
    mask: str = "003-mask-train",
) -> Run:
    """Writes a surface run of a known function; with `cells`, an unfinished one with only that many points."""
    names = ("001-fft", "002-fft", mask)
    inputs = {
        "points": side,
        "records": 100,
        "train_records": 100,
        "test_records": 60,
        "corners": [{"run": name} for name in names],
    }
    run = create_run(root, "surface", {}, inputs=inputs)
    axis = np.linspace(-2, 8, side).tolist()
    grid = [({"column": i, "row": j}, (axis[i], axis[j])) for j in range(side) for i in range(side)]
    places = [*(({"mark": name}, place) for name, place in MARKS.items()), *grid[:cells]]
    for step, (name, (x, y)) in enumerate(places, start=1):
        run.training.log({"step": step, **name, "x": x, "y": y, "train_loss": train(x, y), "test_loss": test(x, y)})
    if cells is None:
        run.finish(partial_result({}))
    return run


def figures(root: Path) -> tuple[list[Figure], list[str]]:
    return surface_figures(list_runs(root)[0])


def canvas_of(figure: Figure) -> Canvas:
    canvas = Canvas(figsize=(figure.width_inches, figure.height_inches))
    figure.draw(canvas)
    return canvas


def test_one_figure_with_every_point_and_the_runs_it_is_from(tmp_path: Path) -> None:
    write_surface(tmp_path)
    (figure,), problems = figures(tmp_path)
    assert problems == []
    assert figure.name == "loss-surface-001-surface"
    assert figure.title == "Loss in the plane through FFT, continued FFT and MFT, paper"
    assert figure.runs == ("001-surface", "001-fft", "002-fft", "003-mask-train")
    assert [row["state"] for row in figure.data[:3]] == list(MARKS)
    assert len(figure.data) == 3 + 49
    for row in figure.data:
        assert row["train_loss"] == pytest.approx(train_loss(row["x"], row["y"]))
        assert row["test_loss"] == pytest.approx(held_out_loss(row["x"], row["y"]))
    json.dumps(figure.data, allow_nan=False)


def test_the_caption_states_sample_sizes_and_limits(tmp_path: Path) -> None:
    write_surface(tmp_path)
    ((figure,), _) = figures(tmp_path)
    assert "on 100 training records of 001-fft and on 60 test records, at 7 × 7 points." in figure.caption
    assert "FFT 0.82 and 0.5933; continued FFT 0.1 and 0.8333; MFT, paper 0.672 and 0.5033." in figure.caption
    assert "it cannot show" in figure.caption
    assert "so far" not in figure.caption


@pytest.mark.slow
def test_the_svg_names_the_three_models_and_is_the_same_each_time(tmp_path: Path) -> None:
    write_surface(tmp_path)
    ((figure,), _) = figures(tmp_path)
    svg = render(figure).svg
    for text in (*MARKS, "train loss (100 records)", "test loss (60 records)", "towards MFT, paper"):
        assert f">{text}<" in svg
    assert render(figure).svg == svg


@pytest.mark.slow
def test_marks_and_contours_are_at_the_right_positions(tmp_path: Path) -> None:
    write_surface(tmp_path, side=41)
    ((figure,), _) = figures(tmp_path)
    for axes, loss in zip(canvas_of(figure).axes, (train_loss, held_out_loss), strict=True):
        assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines] == list(MARKS.values())
        _, lines = [item for item in axes.collections if isinstance(item, TriContourSet)]
        for level, path in zip(lines.levels, lines.get_paths(), strict=True):
            assert [loss(x, y) for x, y in path.vertices] == pytest.approx([level] * len(path.vertices), abs=3e-3)


@pytest.mark.slow
@settings(max_examples=10)  # each example draws a figure
@given(st.lists(st.floats(0.01, 20), min_size=25, max_size=25, unique=True))
def test_each_band_has_its_share_of_the_grid(tmp_path_factory: pytest.TempPathFactory, losses: list[float]) -> None:
    root = tmp_path_factory.mktemp("bands")
    values = iter([1.0, 2.0, 3.0, *losses])
    write_surface(root, side=5, test=lambda x, y: next(values))
    ((figure,), _) = figures(root)
    bands = canvas_of(figure).axes[1].collections[0].levels  # type: ignore[attr-defined]
    for number, level in enumerate(bands, start=1):
        assert sum(loss < level for loss in losses) / 25 == pytest.approx(number / 9, abs=1 / 25)


@pytest.mark.slow
def test_a_partial_grid_is_drawn_and_labelled_as_such(tmp_path: Path) -> None:
    write_surface(tmp_path, cells=20)
    (figure,), problems = figures(tmp_path)
    assert problems == []
    assert "at 7 × 7 points. 20 of them are measured so far." in figure.caption
    assert "MFT, paper" in render(figure).svg


def test_too_few_points_are_reported(tmp_path: Path) -> None:
    write_surface(tmp_path, cells=15)
    found, problems = figures(tmp_path)
    assert found == []
    assert problems == [
        "001-surface: 15 of 49 points of the loss surface are measured, too few for a figure; "
        "mftctl report --surface continues it"
    ]


def test_one_bad_run_does_not_hide_the_others(tmp_path: Path) -> None:
    log = write_surface(tmp_path, mask="004-mask-train").folder / "metrics.jsonl"
    log.write_text(log.read_text().replace('"x": 6.0', '"x": six'))
    no_corners = write_surface(tmp_path, mask="005-mask-train")
    no_corners.update(inputs={"points": 7})
    write_surface(tmp_path)
    found, problems = figures(tmp_path)
    assert [figure.name for figure in found] == ["loss-surface-003-surface"]
    assert problems[0].startswith(f"{log}: The metrics in 001-surface/metrics.jsonl:2 cannot be read: expected value")
    assert problems[1:] == ["002-surface: its loss surface cannot be read: corners is missing"]


def test_a_line_that_is_not_a_mapping_is_a_bad_run_too(tmp_path: Path) -> None:
    write_surface(tmp_path).training.log([1])  # type: ignore[arg-type]
    found, (problem,) = figures(tmp_path)
    assert found == []
    assert problem.endswith("metrics.jsonl:53 cannot be read: Input should be a valid dictionary.")


def test_collinear_points_are_not_a_surface(tmp_path: Path) -> None:
    log = write_surface(tmp_path).folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
    log.write_text("".join(json.dumps({**row, "y": 2 * row["x"]}) + "\n" for row in rows))
    assert figures(tmp_path) == ([], ["001-surface: the points of its loss surface do not span a plane"])


def test_the_same_loss_everywhere_is_not_a_surface(tmp_path: Path) -> None:
    write_surface(tmp_path, test=lambda x, y: 0.5)
    assert figures(tmp_path) == ([], ["001-surface: constant over the whole plane: test loss"])


@pytest.mark.slow
def test_infinite_losses_are_drawn_at_the_highest_value(tmp_path: Path) -> None:
    write_surface(tmp_path, test=lambda x, y: None if x > 7 else held_out_loss(x, y))
    (figure,), problems = figures(tmp_path)
    assert problems == []
    assert [row["test_loss"] for row in figure.data if row["x"] > 7] == [None] * 7
    assert "MFT, paper" in render(figure).svg


def test_of_several_runs_of_the_same_models_the_one_with_most_points_is_drawn(tmp_path: Path) -> None:
    for side, cells in ((7, None), (9, 48), (7, None), (4, None)):
        write_surface(tmp_path, side=side, cells=cells)
    write_surface(tmp_path, side=4, mask="004-mask-train")
    found, _ = figures(tmp_path)
    assert [figure.name for figure in found] == ["loss-surface-003-surface", "loss-surface-005-surface"]


def test_other_runs_have_no_surface(tmp_path: Path) -> None:
    create_run(tmp_path, "fft", {}).training.log({"step": 1, "loss": 2.0})
    assert figures(tmp_path) == ([], [])


def test_the_points_read_are_those_written(tmp_path: Path) -> None:
    write_surface(tmp_path, side=4)
    (surface,), problems = surfaces(list_runs(tmp_path)[0])
    assert problems == []
    assert surface.is_complete
    assert surface.marks[1] == SurfacePoint(6.0, 0.0, train_loss(6, 0), held_out_loss(6, 0), "continued FFT")
    assert surface.cells[0] == SurfacePoint(-2.0, -2.0, train_loss(-2, -2), held_out_loss(-2, -2))
