from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mftctl.errors import MaskFormatError
from mftctl.masking.mask import Mask, load_mask, save_mask
from tests.masking.mask_files import (
    DELTA_METADATA,
    compact,
    parts_of_small_mask,
    plain_file,
    plain_read,
    refuse,
    small_mask,
)

Change = Callable[[dict[str, Any]], object]


def test_document_that_is_not_json_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, plain_file(b"{", {"w": b"\1"}), "document of the mask file is not valid JSON")


def test_document_with_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    text = compact(document)[:-1] + b',"method":"random"}'
    error = refuse(tmp_path, plain_file(text, payloads), "not valid JSON")
    assert "duplicate key 'method'" in str(error.actual)


def test_document_with_nan_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    text = compact(document).replace(b'"ratio":0.25', b'"ratio":NaN')
    refuse(tmp_path, plain_file(text, payloads), "not valid JSON")


def test_unknown_version_is_refused_with_the_way_to_update(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    document |= {"format_version": 4, "unheard_of": True}
    error = refuse(tmp_path, plain_file(document, payloads), "format version")
    assert (error.expected, error.actual) == ("1 to 3", "4")
    assert "pip install" in str(error.hint)


def test_a_delta_file_is_refused_as_a_mask(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    error = refuse(tmp_path, plain_file({**document, "format_version": 3}, payloads), "This is a delta file")
    assert (error.expected, error.actual) == ("1 or 2", 3)


def test_control_characters_of_a_hostile_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    document["\x1b[2J"] = 1
    assert "\x1b" not in str(refuse(tmp_path, plain_file(document, payloads), "violates the format"))


@pytest.mark.parametrize("half", ["\ud800", "text\udfff"])
@pytest.mark.parametrize("key", ["method", "layers", "run_id", "model", "revision"])
def test_half_a_surrogate_pair_is_refused_on_reading_and_on_writing(key: str, half: str, tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    (document["base"] if key in document["base"] else document)[key] = half
    text = json.dumps(document).encode()
    error = refuse(tmp_path, plain_file(text, payloads), "violates the format")
    assert str(error).isprintable() or "\\u" not in str(error)
    assert str(error.key).endswith(key)
    mask = small_mask()
    field = f"base_{key}" if key in document["base"] else key
    with pytest.raises(MaskFormatError, match="violates the format"):
        Mask({name: mask[name] for name in mask.names()}, mask.records, replace(mask.metadata, **{field: half}))


document_changes: dict[str, Change] = {
    "version_as_text": lambda document: document.update(format_version="1"),
    "version_as_bool": lambda document: document.update(format_version=True),
    "version_as_float": lambda document: document.update(format_version=1.0),
    "no_version": lambda document: document.pop("format_version"),
    "unknown_kind": lambda document: document.update(kind="sum"),
    "unknown_bit_order": lambda document: document.update(bit_order="big"),
    "further_key": lambda document: document.update(more=1),
    "no_seed": lambda document: document.pop("seed"),
    "no_tensors": lambda document: document.update(tensors={}),
    "tensors_as_list": lambda document: document.update(tensors=[]),
    "base_without_revision": lambda document: document["base"].pop("revision"),
    "base_with_a_further_key": lambda document: document["base"].update(more=1),
    "no_base_model": lambda document: document["base"].update(model=""),
    "ratio_above_one": lambda document: document.update(ratio=1.01),
    "ratio_as_bool": lambda document: document.update(ratio=True),
    "seed_as_float": lambda document: document.update(seed=1.0),
    "seed_as_bool": lambda document: document.update(seed=True),
    "method_as_null": lambda document: document.update(method=None),
}


@pytest.mark.parametrize("change", document_changes.values(), ids=document_changes)
def test_document_that_breaks_a_rule_is_refused(change: Change, tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    change(document)
    error = refuse(tmp_path, plain_file(document, payloads), "violates the format")
    assert error.key
    assert error.expected
    assert error.hint


scale_changes: dict[str, Change] = {
    "version_1": lambda document: document.update(format_version=1),
    "no_scale": lambda document: document.pop("scale"),
    "null": lambda document: document.update(scale=None),
    "one": lambda document: document.update(scale=1),
    "text": lambda document: document.update(scale="2"),
    "too_large": lambda document: document.update(scale=1e7),
    "eight_bits": lambda document: [entry.update(dtype="F8_E5M2") for entry in document["tensors"].values()],
}


def scaled_parts() -> tuple[dict[str, Any], dict[str, bytes]]:
    """An independently written document of version 2 and its payloads."""
    document, payloads = parts_of_small_mask(DELTA_METADATA)
    return {**document, "format_version": 2, "scale": 1.25}, payloads


def test_a_scale_is_read_and_written_as_version_2(tmp_path: Path) -> None:
    document, payloads = scaled_parts()
    path = tmp_path / "scaled.bits"
    path.write_bytes(plain_file(document, payloads))
    mask = load_mask(path)
    assert mask.metadata.scale == 1.25
    save_mask(mask, tmp_path / "again.bits", codec="packed")
    assert plain_read(tmp_path / "again.bits")[0] == document
    without = small_mask(DELTA_METADATA)
    save_mask(without, tmp_path / "without.bits", codec="packed")
    written, _ = plain_read(tmp_path / "without.bits")
    assert (written["format_version"], "scale" in written) == (1, False)


@pytest.mark.parametrize("change", scale_changes.values(), ids=scale_changes)
def test_a_scale_that_breaks_a_rule_is_refused(change: Change, tmp_path: Path) -> None:
    document, payloads = scaled_parts()
    change(document)
    refuse(tmp_path, plain_file(document, payloads), "violates the format")


def test_a_weight_mask_with_a_scale_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    refuse(tmp_path, plain_file({**document, "format_version": 2, "scale": 1.25}, payloads), "violates the format")


def test_threshold_that_overflows_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    text = compact(document).replace(b'"threshold":null', b'"threshold":1e999')
    assert refuse(tmp_path, plain_file(text, payloads), "violates the format").key == "threshold"


entry_changes: dict[str, Change] = {
    "zero_dimension": lambda entry: entry.update(shape=[0, 15]),
    "negative_dimension": lambda entry: entry.update(shape=[-3, -5]),
    "float_dimension": lambda entry: entry.update(shape=[3.0, 5.0]),
    "bool_dimension": lambda entry: entry.update(shape=[True, 15]),
    "text_dimension": lambda entry: entry.update(shape=["3", "5"]),
    "no_dimension": lambda entry: entry.update(shape=[]),
    "nine_dimensions": lambda entry: entry.update(shape=[1] * 8 + [15]),
    "shape_as_number": lambda entry: entry.update(shape=15),
    "huge_dimension": lambda entry: entry.update(shape=[2**48 + 1]),
    "huge_product": lambda entry: entry.update(shape=[2**32, 2**32]),
    "overflowing_product": lambda entry: entry.update(shape=[2**32] * 8),
    "removed_below_zero": lambda entry: entry.update(removed=-1),
    "removed_above_all": lambda entry: entry.update(removed=16),
    "removed_as_bool": lambda entry: entry.update(removed=True),
    "removed_as_float": lambda entry: entry.update(removed=3.0),
    "unknown_codec": lambda entry: entry.update(codec="zip"),
    "unknown_dtype": lambda entry: entry.update(dtype="I8"),
    "digest_too_short": lambda entry: entry.update(sha256="0" * 63),
    "digest_in_capitals": lambda entry: entry.update(sha256="A" * 64),
    "digest_with_a_newline": lambda entry: entry.update(sha256="0" * 64 + "\n"),
    "further_key": lambda entry: entry.update(more=1),
    "no_dtype": lambda entry: entry.pop("dtype"),
}


@pytest.mark.parametrize("change", entry_changes.values(), ids=entry_changes)
def test_record_that_breaks_a_rule_is_refused(change: Change, tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    change(document["tensors"]["odd.weight"])
    error = refuse(tmp_path, plain_file(document, payloads), "violates the format")
    assert str(error.key).startswith("tensors.odd.weight")


tuned_changes: dict[str, Change] = {
    "no_tuned_model": lambda document: document.pop("tuned"),
    "tuned_as_null": lambda document: document.update(tuned=None),
    "tuned_without_revision": lambda document: document["tuned"].pop("revision"),
    "tuned_without_a_name": lambda document: document["tuned"].update(model=""),
    "no_tuned_digest": lambda document: document["tensors"]["odd.weight"].pop("tuned_sha256"),
    "tuned_digest_as_null": lambda document: document["tensors"]["odd.weight"].update(tuned_sha256=None),
    "tuned_digest_too_short": lambda document: document["tensors"]["odd.weight"].update(tuned_sha256="0" * 63),
    "weight_with_what_a_delta_mask_states": lambda document: document.update(kind="weight"),
}


@pytest.mark.parametrize("change", tuned_changes.values(), ids=tuned_changes)
def test_delta_document_that_breaks_a_rule_is_refused(change: Change, tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask(DELTA_METADATA)
    change(document)
    error = refuse(tmp_path, plain_file(document, payloads), "violates the format")
    assert "tuned" in f"{error.key} {error.expected}"


weight_changes: dict[str, Change] = {
    "tuned_model": lambda document: document.update(tuned={"model": "org/tuned", "revision": None}),
    "tuned_as_null": lambda document: document.update(tuned=None),
    "tuned_digest": lambda document: document["tensors"]["odd.weight"].update(tuned_sha256="0" * 64),
    "tuned_digest_as_null": lambda document: document["tensors"]["odd.weight"].update(tuned_sha256=None),
}


@pytest.mark.parametrize("change", weight_changes.values(), ids=weight_changes)
def test_weight_document_with_a_key_of_a_delta_mask_is_refused(change: Change, tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    change(document)
    error = refuse(tmp_path, plain_file(document, payloads), "violates the format")
    assert "a weight mask must not have t" in str(error.expected)


@pytest.mark.parametrize("name", ["", "a\nb", "a\x00b", "a\u202eb"])
def test_name_that_is_not_printable_is_refused(name: str, tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    document["tensors"][name] = document["tensors"].pop("odd.weight")
    payloads[name] = payloads.pop("odd.weight")
    refuse(tmp_path, plain_file(document, payloads), "violates the format")
