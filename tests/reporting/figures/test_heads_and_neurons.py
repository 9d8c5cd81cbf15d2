"""Figures of the heads and neurons that probes predict to gain from a mask."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure as Canvas

from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.figures.heads_and_neurons import structure_figures
from mftctl.reporting.figures.style import Figure, render
from tests.reporting.training_runs import write_probe, write_structure_probe

HEADS = {0: [-0.1, -0.3, 0.0], 1: [-0.2, 0.1, -0.4]}


def figures_of(root: Path) -> list[Figure]:
    figures, problems = structure_figures(list_runs(root)[0])
    assert problems == []
    return figures


def cells_of(figure: Figure) -> np.ma.MaskedArray:
    canvas = Canvas(layout="constrained")
    figure.draw(canvas)
    [mesh] = canvas.axes[0].collections
    return np.ma.asarray(mesh.get_array())


def test_each_head_is_a_cell_of_its_layer(tmp_path: Path) -> None:
    write_structure_probe(tmp_path, 1, "head", HEADS)
    [figure] = figures_of(tmp_path)
    assert figure.name == "probe-heads"
    assert cells_of(figure).tolist() == list(HEADS.values())
    assert [(row["layer"], row["head"], row["change"]) for row in figure.data] == [
        (layer, head, change) for layer, values in HEADS.items() for head, change in enumerate(values)
    ]
    assert "The best 10 % of all 6 heads have 25% of the predicted change. One seed." in figure.caption


def test_layers_with_fewer_heads_are_left_empty(tmp_path: Path) -> None:
    write_structure_probe(tmp_path, 1, "head", {0: [-0.1], 3: [-0.2, -0.4]})
    [figure] = figures_of(tmp_path)
    assert np.ma.getmaskarray(cells_of(figure)).tolist() == [[False, True], [False, False]]
    assert [(row["layer"], row["head"]) for row in figure.data] == [(0, 0), (3, 0), (3, 1)]


@pytest.mark.slow
@given(
    changes=st.tuples(st.integers(1, 3), st.integers(1, 130)).flatmap(
        lambda sizes: st.lists(
            st.lists(st.floats(-1, 1), min_size=sizes[1], max_size=sizes[1]), min_size=sizes[0], max_size=sizes[0]
        )
    )
)
def test_many_neurons_are_sorted_by_their_mean_and_grouped(
    tmp_path_factory: pytest.TempPathFactory, changes: list[list[float]]
) -> None:
    root = tmp_path_factory.mktemp("runs")
    for seed, values in enumerate(changes):
        write_structure_probe(root, 1 + seed, "neuron", {7: values}, seed=seed)
    [figure] = figures_of(root)
    expected = np.array(changes).T
    count = len(expected)
    if count > 50:
        expected = expected[np.argsort(expected.mean(1), kind="stable")]
        groups = np.array([np.searchsorted([count * n // 50 for n in range(1, 50)], i, "right") for i in range(count)])
        expected = np.array([expected[groups == group].sum(0) for group in range(50)])
    found = np.array([[row["change"], row["lowest"], row["highest"]] for row in figure.data])
    # Values that tie in the mean may swap places, so the ends are compared only where there is one seed.
    assert found[:, 0] == pytest.approx(expected.mean(1), abs=1e-9)
    if len(changes) == 1:
        assert found == pytest.approx(np.repeat(expected, 3, axis=1), abs=1e-9)
    assert sum(row["neurons"] for row in figure.data) == count


def test_seeds_share_a_figure_and_the_latest_probe_of_a_seed_counts(tmp_path: Path) -> None:
    write_structure_probe(tmp_path, 1, "head", {0: [9.0, 9.0]}, seed=0)
    write_structure_probe(tmp_path, 2, "head", {0: [-0.1, -0.3]}, seed=0)
    write_structure_probe(tmp_path, 3, "head", {0: [-0.3, -0.1]}, seed=1)
    [figure] = figures_of(tmp_path)
    assert figure.runs == ("002-probe", "003-probe")
    assert [(row["change"], row["lowest"], row["highest"], row["seeds"]) for row in figure.data] == [
        (pytest.approx(-0.2), -0.3, -0.1, 2)
    ] * 2
    assert "Mean over 2 seeds." in figure.caption


def test_heads_neurons_and_other_layers_have_their_own_figures(tmp_path: Path) -> None:
    write_structure_probe(tmp_path, 1, "head", HEADS)
    write_structure_probe(tmp_path, 2, "neuron", HEADS)
    write_structure_probe(tmp_path, 3, "head", {0: [-0.1, -0.3, 0.0]})
    assert [figure.name for figure in figures_of(tmp_path)] == ["probe-heads", "probe-neurons", "probe-heads-2"]


def test_probes_of_layers_and_unfinished_ones_are_ignored(tmp_path: Path) -> None:
    write_probe(tmp_path, 1, {"0-3": -0.1, "4-7": 0.1})
    folder = write_structure_probe(tmp_path, 2, "head", HEADS)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "failed"}))
    assert figures_of(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "No such file"),
        ("", "not a table of layer, index and change"),
        ("layer,index,change\n0,0,-0.1\n", "not one row for each of 6 heads"),
        ("layer,index,change\n" + "".join(f"0,{n},0\n" for n in range(6)), "not one row for each of 6 heads"),
        ("layer,index,change\n0,0,-0.1\n0,2\n", "not a table"),
        ("layer,index\n0,0\n", "not a table"),
        ("layer,index,other\n" + "".join(f"{n // 3},{n % 3},0\n" for n in range(6)), "not one row for each"),
        ("layer,index,change\n" + "".join(f"{n // 3},{n % 3},much\n" for n in range(6)), "much"),
        ("layer,index,change\n" + "".join(f"{n // 3},{n % 3},nan\n" for n in range(6)), "a change is not a number"),
        ("layer,index,change\n" + "x" * 200_000, "not a table"),
    ],
    ids=["no file", "empty", "cut", "other layers", "short row", "columns", "header", "text", "nan", "long field"],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str | None, reason: str) -> None:
    folder = write_structure_probe(tmp_path, 1, "head", HEADS)
    if text is None:
        (folder / "heads.csv").unlink()
    else:
        (folder / "heads.csv").write_text(text)
    figures, [problem] = structure_figures(list_runs(tmp_path)[0])
    assert figures == []
    assert str(folder) in problem
    assert reason in problem


def test_a_fifo_instead_of_the_file_does_not_block(tmp_path: Path) -> None:
    folder = write_structure_probe(tmp_path, 1, "head", HEADS)
    (folder / "heads.csv").unlink()
    os.mkfifo(folder / "heads.csv")
    figures, [problem] = structure_figures(list_runs(tmp_path)[0])
    assert figures == []
    assert "a FIFO instead of a file" in problem


def test_drawing_is_deterministic(tmp_path: Path) -> None:
    write_structure_probe(tmp_path, 1, "neuron", {layer: [-0.01 * n for n in range(64)] for layer in range(3)})
    [figure] = figures_of(tmp_path)
    drawing = render(figure)
    assert "neurons of the layer, best first" in drawing.svg
    assert "100%" in drawing.svg
    assert render(figure) == drawing
