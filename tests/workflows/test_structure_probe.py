"""`probe --fast --unit head|neuron`, compared with a separate computation and with the estimate of the layers."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mftctl.errors import ConfigError, RunError
from mftctl.experiments.model_source import recommendation_of, recommended_layers
from mftctl.experiments.probe_results import ProbeResult, StructureProbe
from mftctl.experiments.run_folder import Run
from mftctl.masking.selection import removed_count
from mftctl.progress import Silence
from mftctl.reporting.figures.heads_and_neurons import structure_figures
from mftctl.reporting.figures.probe import probe_figures
from mftctl.workflows.probe import probe
from mftctl.workflows.probe_kind import check_kind
from tests.workflow_fixtures import make_recipe, open_run
from tests.workflows.test_fast_probe import estimate, gains_by_projection

RATIO = 0.2


def structure(workspace: Path, root: Path, unit: str, **changes: Any) -> tuple[Run, StructureProbe]:
    options = {"unit": unit, "fast": True, "data_fraction": 1.0}
    recipe = make_recipe(workspace, probe=options, mask_train__ratio=RATIO, **changes)
    run, source = open_run(root, "probe", recipe)
    run.finish(probe(recipe, source, run, Silence()))
    found = run.result(ProbeResult)
    assert isinstance(found, StructureProbe)
    return run, found


def promised(workspace: Path) -> dict[tuple[int, str], torch.Tensor]:
    """The gains of the best fifth of each tensor, the others as 0, with the short name of the projection."""
    found = {}
    for (layer, name), (_, gains) in gains_by_projection(workspace).items():
        cut = gains.flatten().sort(descending=True).values[removed_count(gains.numel(), RATIO) - 1]
        found[layer, name.rpartition(".")[2]] = gains.where(gains >= cut, 0.0).double()
    return found


def changes_in_file(run: Run, name: str) -> dict[tuple[int, int], float]:
    with (run.folder / name).open(newline="") as file:
        return {(int(row["layer"]), int(row["index"])): float(row["change"]) for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def probes(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, StructureProbe]]:
    root = tmp_path_factory.mktemp("structure")
    found = {unit: structure(workspace, root, unit) for unit in ("head", "neuron")}
    return found.__getitem__


@pytest.mark.slow
def test_heads(workspace: Path, probes: Callable[[str], tuple[Run, StructureProbe]]) -> None:
    run, result = probes("head")
    parts = promised(workspace)
    expected = {}
    for layer in range(4):
        q, k, v, o = (parts[layer, name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
        for head in range(4):
            own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)
            expected[layer, head] = -float(q[own].sum() + o[:, own].sum() + (k[shared].sum() + v[shared].sum()) / 2)
    assert changes_in_file(run, "heads.csv") == pytest.approx(expected, rel=1e-3)
    assert (result.units, result.best_units, len(result.best)) == (16, 2, 16)
    best = min(expected, key=expected.__getitem__)
    assert (result.best[0].layer, result.best[0].index) == best
    ranked = sorted(expected.values())
    assert result.best_share == pytest.approx(sum(ranked[:2]) / sum(ranked), rel=1e-3)
    assert sum(layer.best_share for layer in result.layers) == pytest.approx(result.best_share)
    assert sum(layer.best for layer in result.layers) == 2


@pytest.mark.slow
def test_neurons(workspace: Path, probes: Callable[[str], tuple[Run, StructureProbe]]) -> None:
    run, result = probes("neuron")
    parts = promised(workspace)
    expected = {}
    for layer in range(4):
        gate, up, down = (parts[layer, name] for name in ("gate_proj", "up_proj", "down_proj"))
        for index, change in enumerate((gate.sum(1) + up.sum(1) + down.sum(0)).tolist()):
            expected[layer, index] = -change
    assert changes_in_file(run, "neurons.csv") == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert (result.units, result.best_units, len(result.best)) == (256, 26, 20)


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "target"), [("head", "attn"), ("neuron", "mlp")])
def test_they_add_up_to_the_estimate_of_their_layers(
    workspace: Path,
    tmp_path: Path,
    probes: Callable[[str], tuple[Run, StructureProbe]],
    unit: str,
    target: str,
) -> None:
    _, layers = estimate(workspace, tmp_path, mask_train__ratio=RATIO, mask_train__target=target)
    expected = {int(group["layers"]): group["change"] for group in layers["groups"]}
    _, result = probes(unit)
    assert {layer.layer: layer.change for layer in result.layers} == pytest.approx(expected, rel=1e-9)
    assert result.change == pytest.approx(sum(expected.values()), rel=1e-9)


@pytest.mark.slow
def test_it_recommends_no_layers_and_has_its_own_figure(probes: Callable[[str], tuple[Run, StructureProbe]]) -> None:
    run, result = probes("head")
    with pytest.raises(RunError):
        recommendation_of(run)
    assert probe_figures([run]) == ([], [])
    [figure], problems = structure_figures([run])
    assert problems == []
    assert sum(cell["change"] for cell in figure.data) == pytest.approx(result.change)


@pytest.mark.slow
def test_the_latest_probe_of_layers_still_counts(workspace: Path, tmp_path: Path) -> None:
    first, _ = estimate(workspace, tmp_path)
    structure(workspace, tmp_path, "head", mask_train__max_steps=2)
    _, source = open_run(tmp_path, "mask-train", make_recipe(workspace))
    found = recommended_layers(tmp_path, source)
    assert found is not None
    assert found.run == first.name


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"probe": {"unit": "head", "fast": True}, "mask_train__target": "mlp"}, "mask_train.target"),
        ({"probe": {"unit": "neuron", "fast": True}, "mask_train__target": "attn"}, "mask_train.target"),
        ({"mask_train__ratio": "auto"}, "mask_train.ratio"),
    ],
    ids=str,
)
def test_masks_that_a_probe_does_not_support(workspace: Path, changes: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_kind(make_recipe(workspace, **changes))
    assert error.value.key == key
