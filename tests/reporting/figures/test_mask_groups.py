from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mftctl.experiments.run_folder import list_runs
from mftctl.reporting.figures.mask_groups import MAX_GROUPS, MaskFamily, mask_families
from tests.masking.mask_files import plain_document, plain_file, plain_packed
from tests.reporting.mask_runs import damage, make_mask, random_keep, write_mask_run

Q = "model.layers.{}.self_attn.q_proj.weight"
MASK = make_mask(random_keep(0, **{Q.format(4): (4, 4)}))


def families(root: Path) -> tuple[list[MaskFamily], list[str]]:
    return mask_families(list_runs(root)[0])


def only(root: Path) -> MaskFamily:
    found, problems = families(root)
    assert problems == []
    (family,) = found
    return family


def test_the_newest_of_each_seed_in_the_order_of_the_tables(tmp_path: Path) -> None:
    write_mask_run(tmp_path, 1, "MFT", MASK, stage="mft", seed=1)
    write_mask_run(tmp_path, 2, "MFT", MASK, stage="mft", seed=0)
    write_mask_run(tmp_path, 3, "random mask", MASK, stage="random")
    write_mask_run(tmp_path, 4, "MFT", MASK, stage="mft", seed=1)
    family = only(tmp_path)
    assert [(group.label, group.state, group.seeds, group.runs) for group in family.groups] == [
        ("random mask", "random mask", (0,), ("003-mask-train",)),
        ("MFT", "MFT", (0, 1), ("002-mask-train", "004-mask-train")),
    ]
    assert (family.kind, family.origin, family.older, family.more) == ("weight", "models/base", 1, 0)


def test_groups_of_one_state_are_told_apart_by_stage_recipe_or_run(tmp_path: Path) -> None:
    write_mask_run(tmp_path, 1, "MFT", MASK, stage="all", recipe="a")
    write_mask_run(tmp_path, 2, "MFT", MASK, stage="mft", recipe="a")
    write_mask_run(tmp_path, 3, "MFT", MASK, stage="mft", recipe="b")
    write_mask_run(tmp_path, 4, "MFT", MASK, recipe="b", options={"ratio": 0.1})
    write_mask_run(tmp_path, 5, "MFT", MASK, recipe="b", options={"ratio": 0.2}, seed=3)
    write_mask_run(tmp_path, 6, "MFT", MASK, recipe="b", options={"ratio": 0.2}, seed=4)
    write_mask_run(tmp_path, 7, "MFT", MASK, stage="mft", recipe="b", origin="models/other")
    write_mask_run(tmp_path, 8, "L1 mask", MASK, stage="l1")
    labels = [group.label for group in only(tmp_path).groups]
    assert labels == [
        "L1 mask",
        "MFT (all)",
        "MFT (a: mft)",
        "MFT (003-mask-train)",
        "MFT (004-mask-train)",
        "MFT (006-mask-train)",
        "MFT (007-mask-train)",
    ]


def test_of_many_groups_those_with_most_seeds_then_the_newest(tmp_path: Path) -> None:
    write_mask_run(tmp_path, 1, "MFT", MASK, stage="first", seed=0)
    write_mask_run(tmp_path, 2, "MFT", MASK, stage="first", seed=1)
    for number in range(MAX_GROUPS + 1):
        write_mask_run(tmp_path, 3 + number, "MFT", MASK, stage=f"s{number}")
    family = only(tmp_path)
    assert family.more == 2
    expected = ["MFT (first)", *(f"MFT (s{number})" for number in range(2, MAX_GROUPS + 1))]
    assert [group.label for group in family.groups] == expected


def test_masks_of_a_different_kind_or_shape_are_a_separate_family(tmp_path: Path) -> None:
    write_mask_run(tmp_path, 1, "MFT", MASK)
    write_mask_run(tmp_path, 2, "trivial drop", make_mask(random_keep(0, **{Q.format(4): (4, 4)}), kind="delta"))
    write_mask_run(tmp_path, 3, "MFT", make_mask(random_keep(0, **{Q.format(4): (4, 5)})), origin="models/wide")
    # No tensor in common with the first mask, but its layers have the same shape.
    write_mask_run(tmp_path, 4, "MFT, paper", make_mask(random_keep(0, **{Q.format(11): (4, 4)})))
    found, problems = families(tmp_path)
    assert problems == []
    assert [(family.kind, family.origin, [group.label for group in family.groups]) for family in found] == [
        ("weight", "models/base", ["MFT, paper", "MFT"]),
        ("delta", "models/base", ["trivial drop"]),
        ("weight", "models/wide", ["MFT"]),
    ]


def test_runs_that_are_not_finished_or_of_another_command_are_passed_over(tmp_path: Path) -> None:
    write_mask_run(tmp_path, 1, "MFT", MASK, status="interrupted")
    other = write_mask_run(tmp_path, 2, "MFT", MASK)
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "command": "apply"}))
    assert families(tmp_path) == ([], [])


def test_a_damaged_mask_hides_no_other(tmp_path: Path) -> None:
    broken = write_mask_run(tmp_path, 1, "MFT", MASK, seed=1)
    write_mask_run(tmp_path, 2, "MFT", MASK, seed=2)
    damage(broken / "mask.bits")
    (family,), problems = families(tmp_path)
    assert family.groups[0].seeds == (2,)
    (problem,) = problems
    assert problem.startswith(f"{broken / 'mask.bits'}: The mask file is damaged")


def test_a_missing_mask_file_is_named(tmp_path: Path) -> None:
    folder = write_mask_run(tmp_path, 1, "MFT", MASK)
    (folder / "mask.bits").unlink()
    assert families(tmp_path) == ([], [f"{folder / 'mask.bits'}: The mask file cannot be read."])


def test_bits_that_remove_more_than_the_file_says_are_found(tmp_path: Path) -> None:
    folder = write_mask_run(tmp_path, 1, "MFT", MASK)
    document = plain_document(MASK)
    document["tensors"][Q.format(4)]["removed"] += 1
    payloads = {name: plain_packed(MASK[name]) for name in MASK.names()}
    (folder / "mask.bits").write_bytes(plain_file(document, payloads))
    found, problems = families(tmp_path)
    assert found == []
    assert problems == [
        f"{folder / 'mask.bits'}: The number of weights that the mask removes does not match its record."
    ]


@pytest.mark.parametrize("key", ["state", "origin"])
def test_a_record_that_lacks_something_is_named(tmp_path: Path, key: str) -> None:
    folder = write_mask_run(tmp_path, 1, "MFT", MASK)
    record = json.loads((folder / "run.json").read_text())
    del record["result"]["state"], record["inputs"]["origin"]
    record["result"] |= {} if key == "state" else {"state": "MFT"}
    record["inputs"] |= {} if key == "origin" else {"origin": "models/base"}
    (folder / "run.json").write_text(json.dumps(record))
    assert families(tmp_path) == ([], [f"{folder / 'run.json'}: The run record of this mask is incomplete."])


def test_masks_are_read_from_a_copied_runs_folder_and_not_from_the_original(tmp_path: Path) -> None:
    original = write_mask_run(tmp_path / "runs", 1, "MFT", MASK)
    shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    damage(original / "mask.bits")
    assert only(tmp_path / "copy").groups[0].masks[0].path == tmp_path / "copy/001-mask-train/mask.bits"


def test_the_path_in_the_record_is_read_where_the_folder_has_no_mask(tmp_path: Path) -> None:
    folder = write_mask_run(tmp_path, 1, "MFT", MASK)
    record = json.loads((folder / "run.json").read_text())
    elsewhere = (folder / "mask.bits").rename(tmp_path / "kept.bits")
    record["result"]["mask"] = str(elsewhere)
    (folder / "run.json").write_text(json.dumps(record))
    (mask,) = only(tmp_path).groups[0].masks
    assert mask.path == elsewhere
    assert mask.removed_share == MASK.removed / MASK.weights
