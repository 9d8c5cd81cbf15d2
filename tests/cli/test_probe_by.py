"""From a probe by score to a mask on the recommended layers, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.running import CommandLine


@pytest.mark.slow
def test_the_mask_of_rows_goes_to_the_layers_with_the_best_score(mftctl: CommandLine, workspace: Path) -> None:
    model, train, validation = (workspace / name for name in ("tiny", "train.jsonl", "val.jsonl"))
    shared = ("-m", model, "-d", train, "--val-data", validation)
    steps = ("--set", "mask_train.max_steps=2", "--groups", "2", "--limit", "4")
    probed = mftctl("probe", *shared, *steps, "--by", "exact_match")
    assert probed.code == 0, probed.stderr
    title, headings = [line for line in probed.stdout.splitlines() if "exact_match" in line or "layers" in line][:2]
    assert title.startswith("exact_match and loss by masked group; unmasked 0.0000 ± 0.0000 of 4 and ")
    assert [word for word in headings.split() if word.isalpha()] == ["layers", "score", "change", "loss", "change"]
    masked = mftctl("mask-train", *shared, "--method", "magnitude", "--unit", "row", "--json")
    assert masked.code == 0, masked.stderr
    result = json.loads(masked.stdout)
    recommended = json.loads((mftctl.folder / "runs" / "001-probe" / "run.json").read_text())["result"]
    assert (result["state"], result["layers"]) == ("L1 row mask", recommended["recommended_layers"])
    assert f"Recommended: layers {recommended['recommended_layers']}" in probed.stderr
    assert "Warning: No group beat the unmasked model." in probed.stderr
