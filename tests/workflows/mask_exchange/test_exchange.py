"""Round trips through the other formats, tensor names, and files that must be refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from mftctl.errors import MaskFileError, MaskFormatError, MaskMismatchError, ModelError
from mftctl.masking.checkpoints.apply import apply_to_checkpoint
from mftctl.masking.mask import Mask, load_mask, save_mask
from mftctl.workflows.mask_exchange import exchange
from mftctl.workflows.mask_exchange.exchange import export_mask, import_mask
from tests.masking.built_checkpoints import digest_of, learn_mask, projections, stored_tensors, write_checkpoint
from tests.masking.mask_files import DELTA_METADATA, same_bits, small_mask

SUFFIXES = [".pt", ".npz"]


def take(file: Path, base: Path) -> Mask:
    return import_mask(file, base, base_model="org/base")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_exported_mask_is_imported_with_the_records_of_its_base(
    suffix: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    mask = learn_mask(projections(tiny_checkpoint))
    export_mask(mask, tmp_path / f"masks{suffix}")
    found = import_mask(
        tmp_path / f"masks{suffix}", tiny_checkpoint, base_model="org/base", base_revision="abc", run_id="007"
    )
    assert same_bits(found, mask)
    assert dict(found.records) == dict(mask.records)
    metadata = found.metadata
    assert (metadata.kind, metadata.method, metadata.base_label) == ("weight", "imported", "org/base at revision abc")
    assert (metadata.run_id, metadata.ratio, metadata.seed) == ("007", None, None)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_imported_mask_exports_to_the_same_bytes(suffix: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    export_mask(learn_mask(projections(tiny_checkpoint)), first)
    save_mask(take(first, tiny_checkpoint), tmp_path / "mask.bits")
    export_mask(load_mask(tmp_path / "mask.bits"), second)
    assert first.read_bytes() == second.read_bytes()


def test_imported_mask_is_applied_to_its_base(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tensors = projections(tiny_checkpoint)
    keep = {name.removesuffix(".weight"): (torch.rand(tensor.shape) < 0.9).float() for name, tensor in tensors.items()}
    torch.save(keep, tmp_path / "masks.pt")
    mask = take(tmp_path / "masks.pt", tiny_checkpoint)
    apply_to_checkpoint(tiny_checkpoint, mask, tmp_path / "out", mask_path=None, base_model="org/base")
    for name, tensor in stored_tensors(tmp_path / "out").items():
        expected = stored_tensors(tiny_checkpoint)[name]
        assert torch.equal(tensor, expected * keep[name.removesuffix(".weight")] if name in mask else expected)


@pytest.mark.parametrize("spelling", ["{}", "{}.weight", "{}.mask", "{}.weight.mask"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_names_with_and_without_weight_and_mask(spelling: str, suffix: str, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"layers.0.up.weight": torch.randn(4, 8)})
    keep = torch.rand(4, 8) < 0.5
    name = spelling.format("layers.0.up")
    if suffix == ".pt":
        torch.save({name: keep}, tmp_path / "masks.pt")
    else:
        np.savez(tmp_path / "masks.npz", **{name: np.packbits(keep.numpy())})
    assert torch.equal(take(tmp_path / f"masks{suffix}", base)["layers.0.up.weight"], keep)


def test_tensor_without_weight_in_its_name_is_found(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"layers.0.experts.up": torch.randn(2, 4, 8)})
    torch.save({"layers.0.experts.up": torch.ones(2, 4, 8)}, tmp_path / "masks.pt")
    assert take(tmp_path / "masks.pt", base).names() == ["layers.0.experts.up"]


@pytest.mark.parametrize("bare", [True, False])
def test_prefix_that_the_file_has_and_the_base_lacks_is_left_out_and_the_other_way_round(
    bare: bool, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2)).save_pretrained(base)
    name = "h.0.attn.c_attn.weight" if bare else "transformer.h.0.attn.c_attn.weight"
    if bare:
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored_tensors(base).items()}
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    other = "transformer.h.0.attn.c_attn" if bare else "h.0.attn.c_attn"
    torch.save({other: torch.ones(8, 24)}, tmp_path / "masks.pt")
    assert take(tmp_path / "masks.pt", base).names() == [name]


@pytest.mark.parametrize("config", [None, "{", "[]", "{}", '{"model_type": "unheard-of"}', '{"model_type": "clip"}'])
def test_base_of_an_unknown_type_needs_its_own_names(config: str | None, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"h.0.weight": torch.randn(4, 8)})
    if config is not None:
        (base / "config.json").write_text(config)
    torch.save({"transformer.h.0": torch.ones(4, 8)}, tmp_path / "masks.pt")
    with pytest.raises(MaskMismatchError, match="the base does not have"):
        take(tmp_path / "masks.pt", base)


def test_sharded_base_gives_the_digests_of_its_tensors(tmp_path: Path) -> None:
    tensors = {f"layers.{number}.weight": torch.randn(4, 6).bfloat16() for number in range(4)}
    base = write_checkpoint(tmp_path / "base", tensors, shards=3)
    torch.save({name: torch.ones(4, 6) for name in tensors}, tmp_path / "masks.pt")
    mask = take(tmp_path / "masks.pt", base)
    assert all(mask.records[name].sha256 == digest_of(tensor) for name, tensor in tensors.items())
    assert {record.dtype for record in mask.records.values()} == {"BF16"}


# Files that are refused


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "base", {"layers.0.up.weight": torch.randn(4, 8), "steps": torch.arange(4)})


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK", b"PK\x05\x06" + bytes(18), b'{"a": 1}'])
def test_file_of_another_kind_is_refused(content: bytes, base: Path, tmp_path: Path) -> None:
    (tmp_path / "masks.pt").write_bytes(content)
    with pytest.raises(MaskFormatError, match=r"format that can be imported|damaged or truncated") as caught:
        take(tmp_path / "masks.pt", base)
    assert caught.value.path == str(tmp_path / "masks.pt")
    assert caught.value.hint


def test_mask_file_of_mftctl_is_refused(base: Path, tmp_path: Path) -> None:
    save_mask(small_mask(), tmp_path / "mask.bits")
    with pytest.raises(MaskFormatError, match="format that can be imported") as caught:
        take(tmp_path / "mask.bits", base)
    assert "need no import" in str(caught.value.hint)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_cut_short_is_refused(suffix: str, base: Path, tmp_path: Path) -> None:
    file = tmp_path / f"masks{suffix}"
    export_mask(learn_mask({"layers.0.up.weight": stored_tensors(base)["layers.0.up.weight"]}), file)
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(MaskFormatError, match="damaged or truncated"):
        take(file, base)


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_file_that_cannot_be_read_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / "masks.pt").mkdir()
    with pytest.raises(MaskFormatError, match="cannot be read"):
        take(tmp_path / "masks.pt", base)


def test_suffix_does_not_decide_what_is_read(base: Path, tmp_path: Path) -> None:
    torch.save({"layers.0.up": torch.ones(4, 8)}, tmp_path / "masks.npz")
    assert take(tmp_path / "masks.npz", base).names() == ["layers.0.up.weight"]


def test_name_that_the_base_lacks_is_refused(base: Path, tmp_path: Path) -> None:
    torch.save({"layers.9.up": torch.ones(4, 8)}, tmp_path / "masks.pt")
    with pytest.raises(MaskMismatchError, match="a weight that the base does not have") as caught:
        take(tmp_path / "masks.pt", base)
    assert (caught.value.key, caught.value.actual) == ("layers.9.up", "layers.9.up.weight")
    assert str(base) in str(caught.value.expected)


def test_two_masks_for_one_weight_are_refused(base: Path, tmp_path: Path) -> None:
    torch.save({"layers.0.up": torch.ones(4, 8), "layers.0.up.weight": torch.ones(4, 8)}, tmp_path / "masks.pt")
    with pytest.raises(MaskMismatchError, match="for the same weight") as caught:
        take(tmp_path / "masks.pt", base)
    assert caught.value.actual == "layers.0.up and layers.0.up.weight"


def test_mask_for_integers_is_refused(base: Path, tmp_path: Path) -> None:
    torch.save({"steps": torch.ones(4)}, tmp_path / "masks.pt")
    with pytest.raises(MaskMismatchError, match="not floating point") as caught:
        take(tmp_path / "masks.pt", base)
    assert (caught.value.key, caught.value.actual) == ("steps", "I64")


def test_wrong_shape_is_refused(base: Path, tmp_path: Path) -> None:
    torch.save({"layers.0.up": torch.ones(8, 4)}, tmp_path / "masks.pt")
    with pytest.raises(MaskMismatchError, match="shape of a mask"):
        take(tmp_path / "masks.pt", base)


def test_wrong_size_is_refused(base: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "masks.npz", **{"layers.0.up.weight.mask": np.zeros(5, np.uint8)})
    with pytest.raises(MaskMismatchError, match="size of a mask"):
        take(tmp_path / "masks.npz", base)


def test_base_without_weights_is_refused(base: Path, tmp_path: Path) -> None:
    torch.save({"layers.0.up": torch.ones(4, 8)}, tmp_path / "masks.pt")
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="no safetensors weights"):
        take(tmp_path / "masks.pt", base)


# Exports that are refused


def test_delta_mask_is_not_exported(tmp_path: Path) -> None:
    with pytest.raises(MaskFileError, match="delta mask cannot be exported") as caught:
        export_mask(small_mask(DELTA_METADATA), tmp_path / "masks.npz")
    assert caught.value.actual == "delta"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["masks", "masks.bits", "masks.safetensors", "masks.NPZ"])
def test_unknown_suffix_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(MaskFileError, match="not a known export format") as caught:
        export_mask(small_mask(), tmp_path / name)
    assert caught.value.expected == ".pt or .npz"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_path_that_cannot_be_written_is_refused(suffix: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MaskFileError, match="cannot be written"):
        export_mask(small_mask(), tmp_path / "file" / f"masks{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_full_disk_keeps_the_old_file(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / f"masks{suffix}"
    file.write_bytes(b"old")
    monkeypatch.setitem(exchange._WRITERS, suffix, full)
    with pytest.raises(MaskFileError, match="cannot be written") as caught:
        export_mask(small_mask(), file)
    assert "No space left" in str(caught.value.actual)
    assert (list(tmp_path.iterdir()), file.read_bytes()) == ([file], b"old")


FULL = """
import json, resource, sys
from pathlib import Path
from mftctl.errors import MaskFileError
from mftctl.masking.mask import load_mask
from mftctl.workflows.mask_exchange.exchange import export_mask
mask = load_mask("mask.bits")
for suffix, limit_bytes in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    told = "no error"
    try:
        export_mask(mask, Path("masks" + suffix))
    except MaskFileError as error:
        told = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    print(json.dumps([told, sorted(path.name for path in Path().iterdir())]))
"""


@pytest.mark.slow
def test_a_failed_write_reports_the_system_error(tmp_path: Path) -> None:
    """In a separate process with a file-size limit, which takes the same path through torch as a full disk."""
    save_mask(small_mask(), tmp_path / "mask.bits")
    cases = [(suffix, limit_bytes) for suffix in SUFFIXES for limit_bytes in (0, 100, 400)]
    command = [sys.executable, "-c", FULL, json.dumps(cases)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(cases)
    for told, files in found:
        assert "The exported mask cannot be written" in told
        assert "got: File too large" in told
        assert "inline_container" not in told
        assert files == ["mask.bits"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_existing_file_is_replaced_and_folders_are_made(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / "deep" / f"masks{suffix}"
    for _ in range(2):
        export_mask(small_mask(), file)
    assert list(file.parent.iterdir()) == [file]
