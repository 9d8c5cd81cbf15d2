from __future__ import annotations

import copy
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mftctl.errors import MaskFileError, MaskFormatError
from mftctl.masking.mask import Mask, load_mask, save_mask
from mftctl.masking.mask_file.codecs import Codec, Packed
from mftctl.masking.mask_file.document import MaskMetadata, TensorRecord
from tests.masking.mask_files import (
    DELTA_METADATA,
    GOLDEN,
    METADATA,
    build_mask,
    compact,
    parts_of_small_mask,
    plain_bytes,
    plain_deflate,
    plain_document,
    plain_file,
    plain_header,
    plain_packed,
    plain_read,
    refuse,
    same,
    small_mask,
)

CODECS: tuple[Codec, ...] = ("packed", "deflate", "ans")
GOLDENS = ("packed", "deflate", "ans", "delta")
names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=12).filter(
    lambda name: name not in ("__metadata__", "metadata")  # the second is an argument of `build_mask`
)
masks = st.dictionaries(
    names,
    st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.floats(0, 1), st.integers(0, 2**31)),
    min_size=1,
    max_size=4,
)


def random_mask(parts: dict[str, tuple[list[int], float, int]]) -> Mask:
    return build_mask(
        **{
            name: torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= ratio
            for name, (shape, ratio, seed) in parts.items()
        }
    )


# The mask in memory


def test_mask_returns_the_tensors_it_was_built_from() -> None:
    mask = small_mask()
    assert mask.names() == ["even.weight", "odd.weight"]
    assert len(mask) == 2
    assert "odd.weight" in mask
    assert "other" not in mask
    assert mask["odd.weight"].tolist() == [
        [True, False, True, True, True],
        [True, True, True, True, False],
        [True, True, True, True, False],
    ]
    assert mask["odd.weight"].dtype == torch.bool


def test_ratio_is_the_share_removed_over_all_weights() -> None:
    mask = small_mask()
    assert (mask.removed, mask.weights) == (7, 31)
    assert mask.ratio == 7 / 31


def test_changing_a_returned_tensor_leaves_the_mask_as_it_is() -> None:
    mask = small_mask()
    mask["odd.weight"].zero_()
    assert int(mask["odd.weight"].sum()) == 12


def test_mask_takes_one_bit_per_weight() -> None:
    mask = build_mask(w=torch.ones(1000, 80, dtype=torch.bool))
    assert mask.packed("w").nbytes == 10_000


def test_unknown_name_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        small_mask()["other"]


def test_mask_of_another_dtype_is_refused() -> None:
    record = TensorRecord((2,), 0, "0" * 64, "F32")
    with pytest.raises(MaskFormatError, match="not a bool tensor") as caught:
        Mask({"w": torch.ones(2)}, {"w": record}, METADATA)
    assert caught.value.key == "w"


def test_mask_of_another_shape_than_its_record_is_refused() -> None:
    record = TensorRecord((2, 1), 0, "0" * 64, "F32")
    with pytest.raises(MaskFormatError, match="recorded shape"):
        Mask({"w": torch.ones(2, dtype=torch.bool)}, {"w": record}, METADATA)


def test_mask_with_another_count_than_its_record_is_refused() -> None:
    record = TensorRecord((2,), 1, "0" * 64, "F32")
    with pytest.raises(MaskFormatError, match="number of weights that the mask removes") as caught:
        Mask({"w": torch.ones(2, dtype=torch.bool)}, {"w": record}, METADATA)
    assert (caught.value.expected, caught.value.actual) == (1, 0)


def test_mask_without_its_record_is_refused() -> None:
    record = TensorRecord((2,), 0, "0" * 64, "F32")
    keep = torch.ones(2, dtype=torch.bool)
    with pytest.raises(MaskFormatError, match="same names") as caught:
        Mask({"w": keep, "v": keep}, {"w": record}, METADATA)
    assert caught.value.key == "v"


def test_mask_without_a_tensor_is_refused() -> None:
    with pytest.raises(MaskFormatError, match="violates the format"):
        Mask({}, {}, METADATA)


@pytest.mark.parametrize(
    ("field", "value"), [("dtype", "I8"), ("dtype", "F8_E8M0"), ("sha256", "0"), ("shape", ()), ("removed", -1)]
)
def test_record_that_no_file_can_hold_is_refused(field: str, value: object) -> None:
    record = replace(TensorRecord((2,), 0, "0" * 64, "F32"), **{field: value})
    with pytest.raises(MaskFormatError, match="violates the format"):
        Mask({"w": torch.ones(2, dtype=torch.bool)}, {"w": record}, METADATA)


@pytest.mark.parametrize(
    ("field", "value"),
    [("ratio", 1.5), ("ratio", float("nan")), ("threshold", float("inf")), ("seed", 2**64), ("method", "")],
)
def test_metadata_that_no_file_can_hold_is_refused(field: str, value: object) -> None:
    with pytest.raises(MaskFormatError, match="violates the format"):
        build_mask(replace(METADATA, **{field: value}), w=torch.ones(2, dtype=torch.bool))


def packed_parts() -> tuple[dict[str, Packed], dict[str, TensorRecord]]:
    mask = small_mask()
    return {name: mask.packed(name).copy() for name in mask.names()}, dict(mask.records)


def test_mask_from_packed_bits_is_the_mask_from_tensors() -> None:
    packed, records = packed_parts()
    mask = Mask.from_packed(packed, records, METADATA)
    assert same(mask, small_mask())
    assert not mask.packed("odd.weight").flags.writeable


def test_packed_bits_of_another_size_are_refused() -> None:
    packed, records = packed_parts()
    packed["odd.weight"] = np.zeros(3, np.uint8)
    with pytest.raises(MaskFormatError, match="size of the recorded shape") as caught:
        Mask.from_packed(packed, records, METADATA)
    assert caught.value.key == "odd.weight"


def test_packed_bits_of_another_dtype_are_refused() -> None:
    packed, records = packed_parts()
    with pytest.raises(MaskFormatError, match="size of the recorded shape"):
        Mask.from_packed(packed | {"odd.weight": np.zeros(2, np.int8)}, records, METADATA)


def test_packed_bits_with_padding_are_refused() -> None:
    packed, records = packed_parts()
    packed["odd.weight"][-1] |= 0x80
    with pytest.raises(MaskFormatError, match="padding bits"):
        Mask.from_packed(packed, records, METADATA)


def test_packed_bits_with_another_count_than_their_record_are_refused() -> None:
    packed, records = packed_parts()
    packed["odd.weight"][0] ^= 1
    with pytest.raises(MaskFormatError, match="number of weights that the mask removes"):
        Mask.from_packed(packed, records, METADATA)


def test_packed_bits_without_a_record_are_refused() -> None:
    packed, records = packed_parts()
    del records["odd.weight"]
    with pytest.raises(MaskFormatError, match="same names"):
        Mask.from_packed(packed, records, METADATA)


@pytest.mark.parametrize(
    ("metadata", "record"),
    [
        (replace(METADATA, kind="delta"), {"tuned_sha256": "0" * 64}),
        (DELTA_METADATA, {}),
        (METADATA, {"tuned_sha256": "0" * 64}),
        (replace(METADATA, tuned_model="org/tuned"), {}),
        (replace(METADATA, tuned_revision="abc"), {}),
        (replace(DELTA_METADATA, tuned_model=None), {"tuned_sha256": "0" * 64}),
    ],
)
def test_delta_mask_without_its_tuned_model_or_a_weight_mask_with_one_is_refused(
    metadata: MaskMetadata, record: dict[str, str]
) -> None:
    records = {"w": replace(TensorRecord((2,), 0, "0" * 64, "F32"), **record)}
    with pytest.raises(MaskFormatError, match="violates the format"):
        Mask({"w": torch.ones(2, dtype=torch.bool)}, records, metadata)


# Writing and reading


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_are_the_golden_ones(codec: Codec, tmp_path: Path) -> None:
    save_mask(small_mask(), tmp_path / "mask.bits", codec)
    assert (tmp_path / "mask.bits").read_bytes() == (GOLDEN / f"{codec}.bits").read_bytes()


def test_bytes_of_a_delta_mask_are_the_golden_ones_and_those_of_the_definition(tmp_path: Path) -> None:
    save_mask(small_mask(DELTA_METADATA), tmp_path / "mask.bits", "packed")
    content = (tmp_path / "mask.bits").read_bytes()
    assert content == (GOLDEN / "delta.bits").read_bytes()
    assert content == plain_file(*parts_of_small_mask(DELTA_METADATA))


def test_golden_delta_file_loads() -> None:
    mask = load_mask(GOLDEN / "delta.bits")
    assert same(mask, small_mask(DELTA_METADATA))
    assert (mask.metadata.tuned_model, mask.metadata.tuned_revision) == ("org/tuned", "def456")
    assert mask.records["odd.weight"].tuned_sha256 not in (None, mask.records["odd.weight"].sha256)


@pytest.mark.parametrize("codec", CODECS)
def test_golden_files_load(codec: Codec) -> None:
    assert same(load_mask(GOLDEN / f"{codec}.bits"), small_mask())


def test_packed_file_is_the_one_the_definition_gives(tmp_path: Path) -> None:
    save_mask(small_mask(), tmp_path / "mask.bits", "packed")
    assert (tmp_path / "mask.bits").read_bytes() == plain_file(*parts_of_small_mask())


def test_deflate_is_the_default_codec(tmp_path: Path) -> None:
    save_mask(small_mask(), tmp_path / "mask.bits")
    document, _ = plain_read(tmp_path / "mask.bits")
    assert {entry["codec"] for entry in document["tensors"].values()} == {"deflate"}


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=masks)
def test_round_trip_also_through_a_plain_reader(
    codec: Codec, parts: dict[str, tuple[list[int], float, int]], tmp_path: Path
) -> None:
    mask = random_mask(parts)
    path = tmp_path / "mask.bits"
    save_mask(mask, path, codec)
    assert same(load_mask(path), mask)
    document, arrays = plain_read(path)
    assert document == plain_document(mask, codec)
    assert all(np.array_equal(arrays[name], mask[name].numpy()) for name in mask.names())


def test_order_of_the_tensors_does_not_change_the_bytes(tmp_path: Path) -> None:
    keep = torch.ones(9, dtype=torch.bool)
    save_mask(build_mask(a=keep, b=keep), tmp_path / "ab.bits")
    save_mask(build_mask(b=keep, a=keep), tmp_path / "ba.bits")
    assert (tmp_path / "ab.bits").read_bytes() == (tmp_path / "ba.bits").read_bytes()


def test_metadata_without_optional_values_is_read_back(tmp_path: Path) -> None:
    metadata = replace(
        METADATA,
        kind="delta",
        tuned_model="/models/größer",
        tuned_revision=None,
        base_model="/models/größe",
        base_revision=None,
        ratio=None,
        threshold=-0.035,
        layers=None,
        seed=None,
        run_id=None,
    )
    save_mask(build_mask(metadata, w=torch.ones(3, dtype=torch.bool)), tmp_path / "mask.bits")
    assert load_mask(tmp_path / "mask.bits").metadata == metadata


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_every_float_dtype_can_be_recorded(dtype: str, tmp_path: Path) -> None:
    record = TensorRecord((2,), 0, "0" * 64, dtype)
    save_mask(Mask({"w": torch.ones(2, dtype=torch.bool)}, {"w": record}, METADATA), tmp_path / "mask.bits")
    assert load_mask(tmp_path / "mask.bits").records["w"].dtype == dtype


def test_existing_file_is_replaced_and_nothing_else_left(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mask.bits"
    save_mask(build_mask(w=torch.ones(3, dtype=torch.bool)), path)
    save_mask(small_mask(), path)
    assert same(load_mask(path), small_mask())
    assert list(path.parent.iterdir()) == [path]


def test_path_that_cannot_be_written_is_a_mask_file_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MaskFileError, match="cannot be written") as caught:
        save_mask(small_mask(), tmp_path / "file" / "mask.bits")
    assert caught.value.hint


def test_unknown_codec_for_writing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskFormatError, match="violates the format"):
        save_mask(small_mask(), tmp_path / "mask.bits", "zip")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_file_rewritten_by_the_safetensors_library_loads(tmp_path: Path) -> None:
    path = tmp_path / "mask.bits"
    save_mask(small_mask(), path)
    with safetensors.safe_open(path, framework="np") as reader:
        metadata = reader.metadata()
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), tmp_path / "again.bits", metadata)
    assert same(load_mask(tmp_path / "again.bits"), small_mask())


# Hostile and broken files: contents (layout: test_container.py, document: test_document.py)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskFormatError, match="cannot be read"):
        load_mask(tmp_path / "none.bits")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MaskFormatError, match="cannot be read"):
        load_mask(tmp_path)


def test_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    content = (GOLDEN / "deflate.bits").read_bytes()
    for length in range(1, len(content), 3):
        refuse(tmp_path, content[:length], ".")


def test_wrong_digest_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    header = plain_header(compact(document), payloads, digest="0" * 64)
    content = plain_bytes(header, payloads["even.weight"] + payloads["odd.weight"])
    assert refuse(tmp_path, content, "damaged").expected == "0" * 64


def test_payloads_of_two_tensors_exchanged_are_refused(tmp_path: Path) -> None:
    keep = torch.tensor([True, False, True])
    mask = build_mask(a=keep, b=keep.flip(0) ^ torch.tensor([True, True, False]))
    document = compact(plain_document(mask))
    payloads = {"a": plain_packed(mask["a"]), "b": plain_packed(mask["b"])}
    assert payloads["a"] != payloads["b"]
    content = plain_bytes(plain_header(document, payloads), payloads["b"] + payloads["a"])
    refuse(tmp_path, content, ".")


def test_name_only_in_the_document_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    document["tensors"]["other"] = copy.deepcopy(document["tensors"]["odd.weight"])
    error = refuse(tmp_path, plain_file(document, payloads), "same names")
    assert (error.key, error.actual) == ("other", "only a record")


def test_name_only_among_the_payloads_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    error = refuse(tmp_path, plain_file(document, payloads | {"other": b"\1"}), "same names")
    assert (error.key, error.actual) == ("other", "only a mask")


def test_wrong_count_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    document["tensors"]["odd.weight"]["removed"] = 4
    error = refuse(tmp_path, plain_file(document, payloads), "number of weights that the mask removes")
    assert (error.key, error.expected, error.actual) == ("odd.weight", 4, 3)


def test_padding_bits_that_are_not_zero_are_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    payloads["odd.weight"] = bytes([payloads["odd.weight"][0], payloads["odd.weight"][1] | 0x80])
    assert refuse(tmp_path, plain_file(document, payloads), "padding bits").key == "odd.weight"


def test_packed_payload_of_a_wrong_size_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    payloads["odd.weight"] += b"\0"
    assert refuse(tmp_path, plain_file(document, payloads), "does not match its shape").key == "odd.weight"


@pytest.mark.parametrize("codec", CODECS)
def test_huge_claimed_shape_is_refused_without_allocation(codec: Codec, tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    document["tensors"]["odd.weight"].update(shape=[2**24, 2**24], codec=codec)
    content = plain_file(document, payloads)
    tracemalloc.start()
    error = refuse(tmp_path, content, "for its shape|match its shape|can hold")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert error.key == "odd.weight"


@pytest.mark.slow
def test_deflate_bomb_is_refused_without_allocation(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    bomb = plain_deflate(bytes(50_000_000), zlib.Z_DEFAULT_STRATEGY)
    document["tensors"]["odd.weight"].update(shape=[50_000_000, 8], codec="deflate", removed=0)
    content = plain_file(document, payloads | {"odd.weight": bomb})
    tracemalloc.start()
    refuse(tmp_path, content, "more weights than its payload can hold")
    assert tracemalloc.get_traced_memory()[1] < 3_000_000
    tracemalloc.stop()


def test_bytes_after_a_deflate_stream_are_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    document["tensors"]["odd.weight"]["codec"] = "deflate"
    payloads["odd.weight"] = plain_deflate(payloads["odd.weight"]) + b"\0"
    refuse(tmp_path, plain_file(document, payloads), "DEFLATE stream of this tensor does not match")


@pytest.mark.slow
@pytest.mark.parametrize("golden", GOLDENS)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_always_found(golden: str, data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray((GOLDEN / f"{golden}.bits").read_bytes())
    position = data.draw(st.integers(0, len(content) - 1), label="position")
    damage = data.draw(st.sampled_from(["flip", "insert", "delete", "truncate", "overwrite"]), label="damage")
    if damage == "flip":
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    elif damage == "insert":
        content[position:position] = data.draw(st.binary(min_size=1, max_size=9))
    elif damage == "delete":
        del content[position : position + data.draw(st.integers(1, 9))]
    elif damage == "truncate":
        del content[position:]
    else:
        other = data.draw(st.binary(min_size=1, max_size=9))
        assume(content[position : position + len(other)] != other)
        content[position : position + len(other)] = other
    refuse(tmp_path, bytes(content), ".")


@pytest.mark.slow
@pytest.mark.parametrize("golden", ["deflate", "ans", "delta"])
def test_a_flipped_bit_in_any_byte_is_found(golden: str, tmp_path: Path) -> None:
    content = (GOLDEN / f"{golden}.bits").read_bytes()
    for position in range(len(content)):
        flipped = content[position] ^ 1 << (position % 8)
        refuse(tmp_path, content[:position] + bytes([flipped]) + content[position + 1 :], ".")
