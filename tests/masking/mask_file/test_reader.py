"""The mask in an open file; refusals of invalid contents are tested in test_mask, through load_mask."""

from __future__ import annotations

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mftctl.errors import MaskFormatError
from mftctl.masking.mask import load_mask, open_mask, save_mask
from mftctl.masking.mask_file import reader
from tests.masking.mask_files import GOLDEN, build_mask, parts_of_small_mask, plain_file, same, small_mask


def random_keep(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= 0.1


@pytest.mark.parametrize("golden", ["packed", "deflate", "ans"])
def test_mask_in_an_open_file_is_the_loaded_one(golden: str) -> None:
    with open_mask(GOLDEN / f"{golden}.bits") as mask:
        assert same(mask, small_mask())
        assert (len(mask), mask.removed, mask.ratio) == (2, 7, 7 / 31)
        assert "odd.weight" in mask
        assert "other" not in mask


def test_names_counts_and_membership_decode_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "decode", lambda *_, **__: pytest.fail("decoded"))
    with open_mask(GOLDEN / "deflate.bits") as mask:
        assert (mask.names(), len(mask), mask.removed) == (["even.weight", "odd.weight"], 2, 7)
        assert "odd.weight" in mask
        assert mask.metadata == small_mask().metadata


@pytest.mark.slow
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    mask = build_mask(**{f"layers.{number}.w": random_keep(1000, 800, seed=number) for number in range(20)})
    save_mask(mask, tmp_path / "mask.bits")
    with open_mask(tmp_path / "mask.bits") as opened:
        tracemalloc.start()
        for name in opened.names():
            assert np.array_equal(opened.packed(name), mask.packed(name))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak_bytes < 500_000 < sum(len(mask.packed(name)) for name in mask.names()) / 3


def test_threads_get_the_tensors_they_request(tmp_path: Path) -> None:
    mask = build_mask(**{f"layers.{number}.w": random_keep(70, 101, seed=number) for number in range(9)})
    save_mask(mask, tmp_path / "mask.bits")
    names = mask.names() * 20
    with open_mask(tmp_path / "mask.bits") as opened, ThreadPoolExecutor(4) as pool:
        for name, packed in zip(names, pool.map(opened.packed, names), strict=True):
            assert np.array_equal(packed, mask.packed(name))


def test_wrong_count_is_found_when_the_bits_are_asked_for(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    document["tensors"]["odd.weight"]["removed"] = 4
    (tmp_path / "mask.bits").write_bytes(plain_file(document, payloads))
    with open_mask(tmp_path / "mask.bits") as mask:
        mask.packed("even.weight")
        with pytest.raises(MaskFormatError, match="number of weights that the mask removes") as caught:
            mask.packed("odd.weight")
    assert (caught.value.path, caught.value.key) == (str(tmp_path / "mask.bits"), "odd.weight")


@pytest.mark.parametrize("change", ["overwrite", "cut"])
def test_file_that_changes_while_it_is_open_is_refused(change: str, tmp_path: Path) -> None:
    path = tmp_path / "mask.bits"
    save_mask(small_mask(), path, "packed")
    with open_mask(path) as mask:
        mask.packed("odd.weight")
        with path.open("r+b") as stream:
            if change == "cut":
                stream.truncate(path.stat().st_size - 1)
            else:
                stream.seek(-1, os.SEEK_END)
                stream.write(b"\0")
        os.utime(path, ns=(0, 1))  # a clock too coarse to distinguish the two writes must not hide the second
        with pytest.raises(MaskFormatError, match="changed while it was being read"):
            mask.packed("odd.weight")


def test_file_that_is_replaced_while_it_is_open_is_still_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "mask.bits"
    save_mask(small_mask(), path)
    with open_mask(path) as mask:
        save_mask(build_mask(w=random_keep(9)), path)
        assert same(mask, small_mask())
    assert load_mask(path).names() == ["w"]


def test_an_error_of_the_caller_is_passed_through() -> None:
    with pytest.raises(OSError, match="no space"), open_mask(GOLDEN / "packed.bits"):
        raise OSError("no space")
