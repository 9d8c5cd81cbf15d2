from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mftctl.errors import MaskFormatError
from mftctl.masking.mask_file.codecs import (
    MAX_EXPANSION,
    Codec,
    count_kept,
    decode,
    encode,
    pack,
    packed_size_bytes,
    unpack,
)
from tests.masking.mask_files import plain_deflate, plain_packed

PATH = Path("mask.bits")
CODECS: tuple[Codec, ...] = ("packed", "deflate", "ans")
bit_lists = st.lists(st.booleans(), min_size=1, max_size=300)


def test_pack_sets_the_lowest_bit_first() -> None:
    keep = torch.tensor([[True, False, False], [False, False, True], [False, False, True]])
    assert pack(keep).tolist() == [0b00100001, 0b00000001]


def test_pack_follows_rows_of_a_transposed_tensor() -> None:
    keep = torch.tensor([[True, False], [True, True], [False, False]])
    assert pack(keep.T).tobytes() == plain_packed(keep.T.contiguous())


@pytest.mark.slow
@given(bit_lists)
def test_pack_agrees_with_bit_arithmetic_and_comes_back(bits: list[bool]) -> None:
    keep = torch.tensor(bits)
    packed = pack(keep)
    assert packed.tobytes() == plain_packed(keep)
    assert len(packed) == packed_size_bytes(len(bits))
    assert unpack(packed, len(bits)).tolist() == bits
    assert count_kept(packed) == sum(bits)


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
@given(bits=bit_lists)
def test_decode_inverts_encode(codec: Codec, bits: list[bool]) -> None:
    packed = pack(torch.tensor(bits))
    decoded = decode(encode(packed, codec), codec, len(bits), bits.count(False), path=PATH, key="w")
    assert np.array_equal(decoded, packed)


def test_deflate_takes_at_most_049_bits_per_weight_at_ratio_01() -> None:
    weights = 1_000_000
    keep = torch.rand(weights, generator=torch.Generator().manual_seed(0)) >= 0.1
    assert len(encode(pack(keep), "deflate")) * 8 / weights <= 0.49


@pytest.mark.parametrize("value", [0x00, 0xFF])
@pytest.mark.parametrize("size_bytes", [1, 7, 64, 1000, 40_000, 300_000])
def test_deflate_of_equal_bytes_stays_below_the_bound(value: int, size_bytes: int) -> None:
    packed = np.full(size_bytes, value, dtype=np.uint8)
    payload = encode(packed, "deflate")
    assert size_bytes < MAX_EXPANSION * len(payload)
    assert np.array_equal(decode(payload, "deflate", size_bytes * 8, 0, path=PATH, key="w"), packed)


@pytest.mark.parametrize("size_bytes", [0, 1, 3])
def test_packed_of_another_size_is_refused(size_bytes: int) -> None:
    with pytest.raises(MaskFormatError, match="does not match its shape") as caught:
        decode(b"\x01" * size_bytes, "packed", 10, 0, path=PATH, key="w")
    assert (caught.value.path, caught.value.key) == (str(PATH), "w")
    assert caught.value.expected == "2 bytes for 10 weights"


@pytest.mark.parametrize("codec", CODECS)
def test_padding_that_is_not_zero_is_refused(codec: Codec) -> None:
    payload = encode(np.array([0xFE, 0b111], dtype=np.uint8), codec)
    assert len(decode(payload, codec, 11, 1, path=PATH, key="w")) == 2
    with pytest.raises(MaskFormatError, match="padding bits"):
        decode(payload, codec, 10, 0, path=PATH, key="w")


def test_shape_that_no_huffman_stream_can_fill_is_refused_without_decompression(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(zlib, "decompressobj", lambda *_: pytest.fail("decompressed"))
    with pytest.raises(MaskFormatError, match="more weights than its payload can hold"):
        decode(b"\x03\x00", "deflate", 8 * MAX_EXPANSION * 2, 0, path=PATH, key="w")


def test_deflate_bomb_is_refused_and_never_decompressed() -> None:
    bomb = plain_deflate(bytes(10_000_000), zlib.Z_DEFAULT_STRATEGY)
    assert len(bomb) < 20_000
    with pytest.raises(MaskFormatError, match="does not match its shape") as caught:
        decode(bomb, "deflate", 8 * 1000, 0, path=PATH, key="w")
    assert "more" in str(caught.value.actual)


def test_deflate_that_ends_early_is_refused() -> None:
    with pytest.raises(MaskFormatError, match="does not match its shape") as caught:
        decode(plain_deflate(b"abc"), "deflate", 8 * 4, 0, path=PATH, key="w")
    assert str(caught.value.actual).startswith("3 bytes")


def test_deflate_cut_short_is_refused() -> None:
    payload = plain_deflate(bytes(range(200)))
    with pytest.raises(MaskFormatError, match="does not match its shape") as caught:
        decode(payload[:-1], "deflate", 8 * 200, 0, path=PATH, key="w")
    assert "without an end of stream" in str(caught.value.actual)


def test_bytes_after_the_deflate_stream_are_refused() -> None:
    with pytest.raises(MaskFormatError, match="does not match its shape") as caught:
        decode(plain_deflate(b"abc") + b"\x00", "deflate", 8 * 3, 0, path=PATH, key="w")
    assert "1 bytes of the payload left over" in str(caught.value.actual)


def test_bytes_that_are_not_a_deflate_stream_are_refused() -> None:
    with pytest.raises(MaskFormatError, match="not a DEFLATE stream"):
        decode(b"\xff\xff\xff", "deflate", 8, 0, path=PATH, key="w")
