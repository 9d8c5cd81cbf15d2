"""Files of soft masks: written, read, applied to checkpoints and to loaded models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from mftctl.errors import MaskFormatError, MaskingError, MaskMismatchError
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.delta.apply import apply_delta, apply_delta_to_checkpoint
from mftctl.masking.delta.delta import is_delta_file, is_soft_mask, open_delta
from mftctl.masking.delta.document import DeltaContents, DeltaDocument
from mftctl.masking.delta.merge import MergePlan, open_merge
from mftctl.masking.delta.records import DeltaMetadata, NamedModel
from mftctl.masking.delta.soft_file import stored_dtypes, write_soft_mask
from mftctl.masking.delta.values import decode_values
from mftctl.masking.mask import _is_mask_file
from mftctl.masking.soft_mask import IDENTITY_CODES, multiplied
from mftctl.masking.targets import find_targets
from tests.conftest import build_llama
from tests.masking.built_checkpoints import stored_tensors
from tests.masking.delta.made_deltas import make, moved, random_tensors, write_pair

METADATA = DeltaMetadata(values="scale", base=NamedModel("org/base"), tuned=(), method="learned", seed=3)


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    build_llama(layers=2).to(dtype).save_pretrained(folder)
    return folder


def codes_of(targets: list[Any], limit: int, *, changed: float) -> dict[str, torch.Tensor]:
    """Random codes for a share of the weights, and the identity for the rest."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for target in targets:
        drawn = torch.randint(0, limit * IDENTITY_CODES[limit] + 1, target.weight.shape, generator=generator)
        chosen = torch.rand(target.weight.shape, generator=generator) < changed
        found[target.name] = torch.where(chosen, drawn, IDENTITY_CODES[limit]).to(torch.uint8)
    return found


def write(
    base: Path, output: Path, limit: int = 1, changed: float = 0.5
) -> tuple[DeltaContents, dict[str, torch.Tensor]]:
    model = load_model(base, dtype="auto")
    targets = find_targets(model, [1])
    codes = codes_of(targets, limit, changed=changed)
    return write_soft_mask(codes, limit, targets, model, base, output, METADATA), codes


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 1)], ids=str)
def test_applied_weights_are_those_times_the_multipliers(tmp_path: Path, dtype: torch.dtype, limit: int) -> None:
    base = checkpoint(tmp_path / "base", dtype)
    contents, codes = write(base, tmp_path / "mask.bits", limit)
    before = stored_tensors(base)
    with open_delta(tmp_path / "mask.bits") as opened:
        assert opened.contents == contents
        apply_delta_to_checkpoint(base, opened, tmp_path / "out", base_model="org/base")
        model = load_model(base, dtype=dtype)
        apply_delta(model, opened, base)
    after = stored_tensors(tmp_path / "out")
    assert {f"{name}.weight" for name in codes} == set(contents.tensors)
    for name, tensor in before.items():
        own = codes.get(name.removesuffix(".weight"))
        expected = tensor if own is None else multiplied(tensor, own, limit)
        assert torch.equal(after[name].view(torch.uint8), expected.view(torch.uint8)), name
        assert torch.equal(model.state_dict()[name], expected)


def test_a_mask_that_changes_nothing_can_be_written_and_applied(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    contents, _ = write(base, tmp_path / "mask.bits", changed=0.0)
    assert all(record.kept == 0 for record in contents.tensors.values())
    with open_delta(tmp_path / "mask.bits") as opened:
        apply_delta_to_checkpoint(base, opened, tmp_path / "out", base_model="org/base")
    assert all(
        torch.equal(tensor, stored_tensors(base)[name]) for name, tensor in stored_tensors(tmp_path / "out").items()
    )


def test_few_changes_take_few_bytes(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    sizes = []
    for changed in (0.01, 0.2, 1.0):
        contents, _ = write(base, tmp_path / f"{changed}.bits", changed=changed)
        weights = sum(record.weights for record in contents.tensors.values())
        with open_delta(tmp_path / f"{changed}.bits") as opened:
            sizes.append(sum(sum(opened.payload_bytes(name)) for name in contents.tensors) / weights)
    assert sizes == sorted(sizes)
    assert sizes[0] < 0.2  # bytes a weight
    assert sizes[2] < 1.2


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_the_file_is_told_from_delta_files_and_may_replace_mask_files(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    mask = tmp_path / "mask.bits"
    write(base, mask)
    one, other = write_pair(
        _folder(tmp_path / "pair"), random_tensors(torch.float32), moved(random_tensors(torch.float32))
    )
    make(one, other, tmp_path / "change.delta")
    assert is_delta_file(mask)
    assert is_soft_mask(mask)
    assert not is_soft_mask(tmp_path / "change.delta")
    assert not is_soft_mask(base / "config.json")
    assert _is_mask_file(mask)
    assert not _is_mask_file(tmp_path / "change.delta")


def test_the_card_says_what_was_multiplied(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    write(base, tmp_path / "mask.bits")
    with open_delta(tmp_path / "mask.bits") as opened:
        apply_delta_to_checkpoint(base, opened, tmp_path / "out", base_model="org/base")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.tags == ["soft-mask", "mftctl"]
    assert "multiplied by the numbers of a soft mask" in card.text
    assert "multipliers in 8 bits" in card.text


def document(tmp_path: Path) -> dict[str, Any]:
    from mftctl.masking.delta.document import write_document

    contents, _ = write(checkpoint(tmp_path / "base"), tmp_path / "mask.bits")
    import json

    found: dict[str, Any] = json.loads(write_document(contents))
    return found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "delta"}, "values are of kind scale in a soft mask"),
        ({"values": "int8"}, "values are of kind scale in a soft mask"),
        ({"tuned": [{"model": "x", "revision": None}]}, "a soft mask has none"),
        ({"scale": 2.0}, "has no scale"),
    ],
    ids=str,
)
def test_a_document_that_contradicts_its_kind_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    fields = document(tmp_path)
    assert DeltaDocument.model_validate(fields).kind == "scale"
    with pytest.raises(ValueError, match=message):
        DeltaDocument.model_validate({**fields, **changes})


def test_other_values_in_a_soft_mask_are_refused(tmp_path: Path) -> None:
    fields = document(tmp_path)
    name = next(iter(fields["tensors"]))
    fields["tensors"][name]["values"] = "int8"
    with pytest.raises(ValueError, match="must be of kind scale"):
        DeltaDocument.model_validate(fields)


@pytest.mark.parametrize(("raw", "message"), [([3, 0], "must be 1 or 2"), ([2, 255], "above 254")])
def test_codes_beyond_the_limit_are_refused(raw: list[int], message: str) -> None:
    import numpy as np

    with pytest.raises(ValueError, match=message):
        decode_values("scale", np.array(raw, dtype=np.uint8), 1, "F32")


def test_a_file_with_such_codes_is_a_format_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = checkpoint(tmp_path / "base")
    monkeypatch.setattr("mftctl.masking.delta.soft_file.encode_multipliers", _with_limit_3)
    contents, _ = write(base, tmp_path / "mask.bits")
    with open_delta(tmp_path / "mask.bits") as opened, pytest.raises(MaskFormatError, match="must be 1 or 2, not 3"):
        opened.change(next(iter(contents.tensors)))


def _with_limit_3(codes: torch.Tensor, limit: int) -> Any:
    import numpy as np

    return np.concatenate([np.array([3], dtype=np.uint8), codes.numpy()])


def test_a_soft_mask_is_not_merged(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    write(base, tmp_path / "mask.bits")
    with (
        open_delta(tmp_path / "mask.bits") as opened,
        pytest.raises(MaskMismatchError, match="no fine-tuning to merge"),
    ):
        open_merge([opened], base, MergePlan((1.0,)))


def test_weights_in_8_bits_are_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    model = load_model(base, dtype="auto")
    targets = find_targets(model, [1])
    assert set(stored_dtypes(targets, model, base).values()) == {torch.float32}
    small = tmp_path / "small"
    build_llama(layers=2).to(torch.float8_e4m3fn).save_pretrained(small)
    with pytest.raises(MaskingError, match="cannot multiply weights in this data type"):
        stored_dtypes(targets, model, small)
