"""Streaming a tuned checkpoint against its base; the zeros of weight masks are tested in test_apply."""

from __future__ import annotations

import hashlib
import shutil
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from mftctl.errors import MaskFormatError, MaskMismatchError
from mftctl.masking.checkpoints import shards
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.checkpoints.tensors import CHUNK_BYTES
from mftctl.masking.mask import Mask, open_mask
from tests.masking.built_checkpoints import learn_mask, raw_tensors, stored_tensors, write_checkpoint, write_tuned
from tests.masking.mask_files import plain_document, plain_file

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def random_tensors(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    """Six matrices of random bits, which include infinities, NaN and zeros of both signs."""
    generator = np.random.default_rng(seed)
    return {
        f"layers.{number}.w": torch.from_numpy(
            generator.integers(0, 256, (5 + number, 7 * dtype.itemsize), dtype=np.uint8)
        ).view(dtype)
        for number in range(6)
    }


def apply(base: Path, tuned: Path, mask: Mask, output: Path) -> None:
    apply_to_checkpoint(base, mask, output, mask_path=None, base_model="org/base", tuned=tuned)


def expected_bytes(mask: Mask, name: str, base: bytes, tuned: bytes) -> bytes:
    """The tuned bytes of kept weights and the base's bytes of removed ones."""
    keep = mask[name].reshape(-1, 1).numpy()
    rows = [np.frombuffer(content, np.uint8).reshape(len(keep), -1) for content in (tuned, base)]
    return np.where(keep, *rows).tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("base_shards", "tuned_shards"), [(1, 1), (1, 3), (4, 1), (2, 3)])
def test_each_weight_is_the_tuned_or_the_base_one_bit_for_bit(
    dtype: torch.dtype, base_shards: int, tuned_shards: int, tmp_path: Path
) -> None:
    before, after = random_tensors(dtype), random_tensors(dtype, seed=1)
    base = write_checkpoint(tmp_path / "base", before, shards=base_shards)
    tuned = write_checkpoint(tmp_path / "tuned", after, shards=tuned_shards)
    masked = {name: tensor for name, tensor in before.items() if not name.startswith("layers.3.")}
    mask = learn_mask(masked, ratio=0.4, tuned=after)
    apply(base, tuned, mask, tmp_path / "out")
    old = {name: content for path in base.glob("*.safetensors") for name, content in raw_tensors(path).items()}
    for path in tuned.glob("*.safetensors"):
        found = raw_tensors(tmp_path / "out" / path.name)
        for name, content in raw_tensors(path).items():
            assert found[name] == (expected_bytes(mask, name, old[name], content) if name in mask else content)
        header_bytes = path.stat().st_size - sum(map(len, found.values()))
        assert (tmp_path / "out" / path.name).read_bytes()[:header_bytes] == path.read_bytes()[:header_bytes]


def test_tensor_larger_than_a_piece_is_reset_throughout(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"w": torch.randn(1100, 1000)})
    tuned = write_tuned(base, tmp_path / "tuned")
    before, after = stored_tensors(base), stored_tensors(tuned)
    assert before["w"].nbytes > CHUNK_BYTES
    mask = learn_mask(before, tuned=after)
    apply(base, tuned, mask, tmp_path / "out")
    assert torch.equal(stored_tensors(tmp_path / "out")["w"], torch.where(mask["w"], after["w"], before["w"]))


def test_head_that_the_base_ties_is_reset_to_its_embeddings(tmp_path: Path) -> None:
    embeddings, head, tuned_embeddings = torch.randn(3, 8, 4).unbind()
    base = write_checkpoint(tmp_path / "base", {"model.embed_tokens.weight": embeddings})
    after = {"model.embed_tokens.weight": tuned_embeddings.clone(), "lm_head.weight": head.clone()}
    tuned = write_checkpoint(tmp_path / "tuned", after)
    mask = learn_mask({"lm_head.weight": embeddings}, tuned=after)
    apply(base, tuned, mask, tmp_path / "out")
    found = stored_tensors(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], torch.where(mask["lm_head.weight"], head, embeddings))
    assert torch.equal(found["model.embed_tokens.weight"], tuned_embeddings)


@pytest.mark.slow
def test_memory_is_bounded_by_pieces_and_not_by_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MOST_THREADS", 2)
    tensors = {f"layers.{number}.w": torch.full((1024, 1024), 1.0 + number).bfloat16() for number in range(16)}
    base = write_checkpoint(tmp_path / "base", tensors)
    tuned = write_checkpoint(tmp_path / "tuned", {name: tensor * 2 for name, tensor in tensors.items()})
    mask = learn_mask(tensors, tuned={name: tensor * 2 for name, tensor in tensors.items()})
    del tensors
    apply(base, tuned, mask, tmp_path / "first")  # does the imports of the measured call
    tracemalloc.start()
    apply(base, tuned, mask, tmp_path / "out")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 12 * CHUNK_BYTES
    assert (tuned / "model.safetensors").stat().st_size > 100 * CHUNK_BYTES


@pytest.mark.parametrize(("wrong", "role"), [("base", "base"), ("tuned", "tuned checkpoint")])
def test_checkpoint_with_one_other_bit_is_refused_and_leaves_nothing(wrong: str, role: str, tmp_path: Path) -> None:
    before, after = random_tensors(), random_tensors(seed=1)
    mask = learn_mask(before, tuned=after)
    changed = before if wrong == "base" else after
    changed["layers.4.w"].view(torch.int32)[-1, -1] ^= 1
    base, tuned = write_checkpoint(tmp_path / "base", before), write_checkpoint(tmp_path / "tuned", after)
    with pytest.raises(MaskMismatchError, match=f"{role} is not the one this delta mask was made for") as caught:
        apply(base, tuned, mask, tmp_path / "out")
    error = caught.value
    assert error.key == "layers.4.w"
    assert error.path == str(tmp_path / wrong / "model.safetensors")
    content = changed["layers.4.w"].numpy().tobytes()
    assert error.actual == f"SHA-256 {hashlib.sha256(content).hexdigest()}"
    assert error.hint == f"give org/{wrong} at revision {'abc123' if wrong == 'base' else 'def456'} as the {role}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_base_and_tuned_checkpoint_the_wrong_way_round_are_refused(tmp_path: Path) -> None:
    before, after = random_tensors(), random_tensors(seed=1)
    base, tuned = write_checkpoint(tmp_path / "base", before), write_checkpoint(tmp_path / "tuned", after)
    with pytest.raises(MaskMismatchError, match="not the one"):
        apply(tuned, base, learn_mask(before, tuned=after), tmp_path / "out")


def test_tuned_checkpoint_the_mask_was_applied_to_is_refused(tmp_path: Path) -> None:
    before, after = random_tensors(), random_tensors(seed=1)
    base, tuned = write_checkpoint(tmp_path / "base", before), write_checkpoint(tmp_path / "tuned", after)
    mask = learn_mask(before, tuned=after)
    apply(base, tuned, mask, tmp_path / "once")
    with pytest.raises(MaskMismatchError, match="tuned checkpoint is not the one"):
        apply(base, shutil.move(tmp_path / "once", tmp_path / "again"), mask, tmp_path / "twice")


def test_mask_of_a_wrong_count_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    before = random_tensors()
    base = write_checkpoint(tmp_path / "base", before, shards=2)
    mask = learn_mask(before)
    document = plain_document(mask)
    document["tensors"]["layers.2.w"]["removed"] += 1
    payloads = {name: mask.packed(name).tobytes() for name in mask.names()}
    (tmp_path / "mask.bits").write_bytes(plain_file(document, payloads))
    with (
        pytest.raises(MaskFormatError, match="number of weights that the mask removes"),
        open_mask(tmp_path / "mask.bits") as opened,
    ):
        apply_to_checkpoint(base, opened, tmp_path / "out", mask_path=None, base_model="org/base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mask.bits"]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
def test_first_failure_ends_the_work(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MOST_THREADS", threads)
    monkeypatch.setattr(shards.os, "cpu_count", lambda: 8)
    begun = []

    def fail() -> None:
        raise MaskMismatchError("not the one")

    def work() -> None:
        begun.append(1)
        time.sleep(0.001)

    with pytest.raises(MaskMismatchError, match="not the one"):
        shards._run_together([fail, *[work] * 1000])
    assert len(begun) < 500
