"""`mftctl mask import`, `mask export` and the other mask commands on delta masks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mftctl.masking.checkpoints.delta_mask import drop_mask
from mftctl.masking.mask import Mask, load_mask, save_mask
from tests.cli.running import CommandLine
from tests.masking.built_checkpoints import learn_mask, projections, write_tuned
from tests.masking.mask_files import plain_read, same, same_bits


@pytest.fixture
def mask(tiny_checkpoint: Path, mftctl: CommandLine) -> Mask:
    """A mask, saved as learned.bits in the command's folder."""
    mask = learn_mask(projections(tiny_checkpoint))
    save_mask(mask, mftctl.folder / "learned.bits")
    return mask


@pytest.fixture
def delta(tiny_checkpoint: Path, mftctl: CommandLine) -> Mask:
    """A delta mask, saved as delta.bits in the command's folder."""
    tuned = write_tuned(tiny_checkpoint, mftctl.folder / "tuned")
    mask = drop_mask(tiny_checkpoint, tuned, 0.3, "trivial", base_model="org/base", tuned_model="org/tuned")
    save_mask(mask, mftctl.folder / "delta.bits")
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masks.pt", "masks.npz"])
def test_export_and_import_round_trip(name: str, mftctl: CommandLine, mask: Mask, tiny_checkpoint: Path) -> None:
    exported = mftctl("mask", "export", "learned.bits", "-o", name, "--json")
    assert exported.code == 0, exported.stderr
    document = json.loads(exported.stdout)
    assert document == {
        "mask": "learned.bits",
        "output": str(mftctl.folder / name),
        "tensors": len(mask),
        "file_bytes": (mftctl.folder / name).stat().st_size,
    }
    imported = mftctl("mask", "import", name, "-m", tiny_checkpoint, "--json")
    assert imported.code == 0, imported.stderr
    document = json.loads(imported.stdout)
    assert (document["mask"], document["model"]) == (str(mftctl.folder / "mask.bits"), str(tiny_checkpoint))
    assert (document["tensors"], document["removed"], document["ratio"]) == (len(mask), mask.removed, mask.ratio)
    found = load_mask(mftctl.folder / "mask.bits")
    assert same_bits(found, mask)
    assert found.metadata.base_model == str(tiny_checkpoint)
    assert f"Next: mftctl apply {tiny_checkpoint} mask.bits -o OUT" in imported.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "options"), [("deflate", []), *((c, ["--codec", c]) for c in ("packed", "ans"))])
def test_export_as_a_mask_file_changes_the_codec_alone(
    codec: str, options: list[str], mftctl: CommandLine, delta: Mask
) -> None:
    exported = mftctl("mask", "export", "delta.bits", "-o", "other.bits", *options)
    assert exported.code == 0, exported.stderr
    document, _ = plain_read(mftctl.folder / "other.bits")
    assert {entry["codec"] for entry in document["tensors"].values()} == {codec}
    assert same(load_mask(mftctl.folder / "other.bits"), delta)


def test_results_are_shown_as_tables(mftctl: CommandLine, mask: Mask, tiny_checkpoint: Path) -> None:
    exported = mftctl("mask", "export", "learned.bits", "-o", "masks.npz")
    assert "masks.npz" in exported.stdout
    imported = mftctl("mask", "import", "masks.npz", "-m", tiny_checkpoint, "-o", "other.bits")
    assert f"{mask.removed:,} of {mask.weights:,}" in " ".join(imported.stdout.split())
    assert same_bits(load_mask(mftctl.folder / "other.bits"), mask)


@pytest.mark.slow
@pytest.mark.usefixtures("mask")
@pytest.mark.parametrize("command", ["import", "export"])
def test_an_existing_result_is_replaced_only_with_yes(command: str, mftctl: CommandLine, tiny_checkpoint: Path) -> None:
    assert mftctl("mask", "export", "learned.bits", "-o", "source.npz").code == 0
    output = mftctl.folder / ("old.bits" if command == "import" else "old.npz")
    inputs = ["source.npz", "-m", tiny_checkpoint] if command == "import" else ["learned.bits"]
    assert mftctl("mask", command, *inputs, "-o", output).code == 0
    old = output.stat().st_ino
    refused = mftctl("mask", command, *inputs, "-o", output)
    assert refused.code == 2
    assert "A result already exists" in refused.stderr
    assert (refused.stdout, output.stat().st_ino) == ("", old)
    assert mftctl("mask", command, *inputs, "-o", output, "--yes").code == 0
    assert output.stat().st_ino != old
    output.write_text("mine")
    assert "exists and is not a mask" in mftctl("mask", command, *inputs, "-o", output, "--yes").stderr
    assert output.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.usefixtures("delta", "mask")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["import", "missing.pt", "-m", "MODEL"], 1, "cannot be read"),
        (["import", "learned.bits", "-m", "MODEL"], 1, "not in a format that can be imported"),
        (["import", "scores.pt", "-m", "MODEL"], 1, "values other than 0 and 1"),
        (["import", "other.npz", "-m", "MODEL"], 1, "a weight that the base does not have"),
        (["import", "other.npz"], 2, "Missing option"),
        (["import", "other.npz", "-m", "./nowhere"], 1, "There is no such model"),
        (["export", "learned.bits"], 2, "Missing option"),
        (["export", "learned.bits", "-o", "masks.txt"], 1, "not a known export format"),
        (["export", "learned.bits", "-o", "masks.npz", "--codec", "ans"], 2, "--codec applies only to mask files"),
        (["export", "learned.bits", "-o", "small.bits", "--codec", "zip"], 2, "zip"),
        (["export", "delta.bits", "-o", "masks.npz"], 1, "delta mask cannot be exported"),
        (["export", "missing.bits", "-o", "masks.npz"], 1, "missing.bits"),
        (["diff", "learned.bits", "delta.bits"], 1, "differ in kind"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake(mftctl: CommandLine, tiny_checkpoint: Path, arguments: list[str], code: int, message: str) -> None:
    name, tensor = next(iter(projections(tiny_checkpoint).items()))
    torch.save({name: tensor}, mftctl.folder / "scores.pt")
    np.savez(mftctl.folder / "other.npz", w=np.zeros(3, np.uint8))
    given = [str(tiny_checkpoint) if argument == "MODEL" else argument for argument in arguments]
    outcome = mftctl("mask", *given)
    assert outcome.code == code, outcome.stderr
    assert message in " ".join(outcome.stderr.replace("│", " ").split())
    assert outcome.stdout == ""
    assert not (mftctl.folder / "mask.bits").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("mask")
def test_info_names_the_tuned_model_of_a_delta_mask_alone(mftctl: CommandLine, delta: Mask) -> None:
    document = json.loads(mftctl("mask", "info", "delta.bits", "--json").stdout)
    assert (document["kind"], document["base_model"], document["tuned_model"]) == ("delta", "org/base", "org/tuned")
    assert document["tensors"][delta.names()[0]]["tuned_sha256"] == delta.records[delta.names()[0]].tuned_sha256
    assert "org/tuned" in mftctl("mask", "info", "delta.bits").stdout
    assert "tuned" not in mftctl("mask", "info", "learned.bits").stdout


@pytest.mark.slow
@pytest.mark.usefixtures("delta")
def test_diff_compares_delta_masks(mftctl: CommandLine) -> None:
    document = json.loads(mftctl("mask", "diff", "delta.bits", "delta.bits", "--json").stdout)
    assert document["tensors"]["all"]["jaccard"] == 1.0
