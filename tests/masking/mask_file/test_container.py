from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from mftctl.errors import MaskFormatError
from mftctl.masking.mask import load_mask
from tests.masking.mask_files import GOLDEN, compact, parts_of_small_mask, plain_bytes, plain_header, refuse


def test_empty_file_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, b"", "empty")


def test_file_cut_short_within_the_header_says_so(tmp_path: Path) -> None:
    content = (GOLDEN / "deflate.bits").read_bytes()
    assert refuse(tmp_path, content[:100], "truncated").hint


def test_trailing_bytes_are_refused(tmp_path: Path) -> None:
    refuse(tmp_path, (GOLDEN / "packed.bits").read_bytes() + b"\0", "do not fill the file")


def test_torch_save_file_is_refused_as_a_pickle(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "mask.pt")
    refuse(tmp_path, (tmp_path / "mask.pt").read_bytes(), "pickle")


def test_plain_pickle_is_refused_as_a_pickle(tmp_path: Path) -> None:
    refuse(tmp_path, pickle.dumps({"w": [1] * 20}), "pickle")


def test_text_file_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, b"version https://git-lfs.github.com/spec/v1\n", "not a mask file")


def test_safetensors_file_of_a_model_is_refused(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.ones(2)}, tmp_path / "model", {"format": "pt"})
    error = refuse(tmp_path, (tmp_path / "model").read_bytes(), "not that of a mask file")
    assert "model's own" in str(error.hint)


def test_header_length_beyond_the_cap_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.bits"
    with path.open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    tracemalloc.start()
    with pytest.raises(MaskFormatError, match="not a mask file"):
        load_mask(path)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_header_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, plain_bytes(b'{"\xff":1}', b""), "not valid JSON")


def test_header_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, plain_bytes(b"[" * 200_000, b""), "not valid JSON")


def test_header_with_half_a_surrogate_pair_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, plain_bytes(rb'{"\ud800":1}', b""), "not valid JSON")


def test_header_with_a_number_too_long_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, plain_bytes(b'{"a":' + b"9" * 5000 + b"}", b""), "not valid JSON")


def test_header_that_is_not_an_object_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path, plain_bytes(b"[]", b""), "not that of a mask file")


def test_header_with_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    header = compact(plain_header(compact(document), payloads))
    twice = header[:-1] + b"," + compact({"odd.weight": {"dtype": "U8"}})[1:]
    error = refuse(tmp_path, plain_bytes(twice, b"".join(payloads.values())), "not valid JSON")
    assert "duplicate key 'odd.weight'" in str(error.actual)


def test_header_with_white_space_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    header = json.dumps(plain_header(compact(document), payloads)).encode()
    refuse(tmp_path, plain_bytes(header, b"".join(payloads.values())), "canonical form")


def test_header_with_too_much_padding_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    header = compact(plain_header(compact(document), payloads)) + b" " * 8
    refuse(tmp_path, plain_bytes(header, b"".join(payloads.values())), "canonical form")


Change = Callable[[dict[str, Any]], object]
header_changes: dict[str, Change] = {
    "no_metadata": lambda header: header.pop("__metadata__"),
    "no_digest": lambda header: header["__metadata__"].pop("sha256"),
    "no_document": lambda header: header["__metadata__"].pop("mftctl"),
    "further_metadata": lambda header: header["__metadata__"].update(more="x"),
    "digest_in_capitals": lambda header: header["__metadata__"].update(sha256="A" * 64),
    "other_dtype": lambda header: header["odd.weight"].update(dtype="I8"),
    "further_field": lambda header: header["odd.weight"].update(more=1),
    "two_dimensions": lambda header: header["odd.weight"].update(shape=[1, 2]),
    "no_dimension": lambda header: header["odd.weight"].update(shape=[]),
    "bool_size": lambda header: header["odd.weight"].update(shape=[True]),
    "float_offset": lambda header: header["odd.weight"].update(data_offsets=[2.0, 4.0]),
    "negative_offset": lambda header: header["even.weight"].update(data_offsets=[-2, 2]),
    "three_offsets": lambda header: header["odd.weight"].update(data_offsets=[2, 3, 4]),
}


@pytest.mark.parametrize("change", header_changes.values(), ids=header_changes)
def test_header_that_is_not_a_mask_files_is_refused(change: Change, tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    header = plain_header(compact(document), payloads)
    change(header)
    refuse(tmp_path, plain_bytes(header, b"".join(payloads.values())), "not that of a mask file")


layout_changes: dict[str, Change] = {
    "overlap": lambda header: header["odd.weight"].update(data_offsets=[1, 3]),
    "hole": lambda header: header["odd.weight"].update(data_offsets=[3, 5]),
    "same_place_twice": lambda header: header["odd.weight"].update(data_offsets=[0, 2]),
    "backwards": lambda header: header["odd.weight"].update(data_offsets=[4, 2]),
    "empty": lambda header: header["odd.weight"].update(data_offsets=[2, 2], shape=[0]),
    "size_unlike_offsets": lambda header: header["odd.weight"].update(shape=[3]),
}


@pytest.mark.parametrize("change", layout_changes.values(), ids=layout_changes)
def test_payload_out_of_place_is_refused(change: Change, tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    header = plain_header(compact(document), payloads)
    change(header)
    content = plain_bytes(header, payloads["even.weight"] + payloads["odd.weight"])
    assert refuse(tmp_path, content, "does not start where").key in payloads


def test_payload_beyond_the_end_is_refused(tmp_path: Path) -> None:
    document, payloads = parts_of_small_mask()
    header = plain_header(compact(document), payloads)
    header["odd.weight"].update(data_offsets=[2, 2**62], shape=[2**62 - 2])
    refuse(tmp_path, plain_bytes(header, b"".join(payloads.values())), "do not fill the file")
