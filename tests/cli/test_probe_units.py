"""From a probe of projections or heads to the mask that follows it, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import CommandLine
from tests.cli.test_tracking import on_the_workspace


@pytest.mark.slow
def test_a_mask_takes_the_projection_of_the_latest_probe(mftctl: CommandLine, workspace: Path) -> None:
    shared = on_the_workspace(workspace)
    probed = mftctl("probe", *shared, "--unit", "projection", "--fast", "--layers", "1-2")
    assert probed.code == 0, probed.stderr
    result = json.loads((mftctl.folder / "runs" / "001-probe" / "run.json").read_text())["result"]
    kind = result["recommended_projection"]
    assert f"Recommended: layers 1-2, projection {kind}" in probed.stderr
    assert "Warning: Predictions rank kinds of projections only roughly." in probed.stderr
    assert [word for word in probed.stdout.splitlines()[2].split() if word.isalpha()] == [
        "projection",
        "predicted",
        "weights",
    ]
    heads = mftctl("probe", *shared, "--unit", "head", "--fast")
    assert heads.code == 0, heads.stderr
    assert "Best 10 %: 2 heads with " in heads.stdout
    assert "Next: mftctl mask-train --layers all --ratio auto" in heads.stderr
    masked = mftctl("mask-train", *shared, "--method", "magnitude", "--json")
    assert f"Layers: 1-2, projections: {kind}, recommended by 001-probe" in masked.stderr
    assert json.loads(masked.stdout)["tensors"] == 2
    own = mftctl("mask-train", *shared, "--method", "magnitude", "--ratio", "o_proj=0.2", "--json", "--yes")
    assert f"Projections: as in the options; 001-probe recommends {kind}" in own.stderr
    assert json.loads(own.stdout)["removed"] == 2 * 205


@pytest.mark.slow
def test_a_budget_is_shown_by_projection_and_layer(mftctl: CommandLine, workspace: Path) -> None:
    options = ("--method", "magnitude", "--ratio", "auto", "--budget", "0.2", "--layers", "all")
    outcome = mftctl("mask-train", *on_the_workspace(workspace), *options)
    assert outcome.code == 0, outcome.stderr
    assert "% of q_proj" in outcome.stdout
    assert "% of layer 3" in outcome.stdout
    assert "7,373 of 36,864 weights" in outcome.stdout


@pytest.mark.parametrize("unit", ["head", "neuron"])
def test_heads_and_neurons_need_a_fast_probe(mftctl: CommandLine, unit: str) -> None:
    outcome = mftctl("probe", "--unit", unit, "-m", "m", "-d", "d")
    assert outcome.code == 2
    assert f"probe.unit: {unit} needs probe.fast" in outcome.stderr
