from __future__ import annotations

import math
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mftctl.errors import MaskFileError, MaskFormatError
from mftctl.masking.mask import load_mask, save_mask
from mftctl.masking.mask_file import ans
from mftctl.masking.mask_file.ans import MAX_BYTES_A_WORD, WORD_BYTES, decode_ans, encode_ans, frequencies
from mftctl.masking.mask_file.codecs import count_kept, decode, encode
from tests.masking.mask_files import (
    GOLDEN,
    plain_ans,
    plain_ans_model,
    plain_ans_read,
    plain_document,
    plain_file,
    plain_packed,
    small_mask,
)

PATH = Path("mask.bits")
RATIOS = [0.0, 1e-6, 0.001, 0.02, 0.1, 0.4, 0.5, 0.9, 1.0]


def random_packed(size_bytes: int, ratio: float, seed: int = 0) -> npt.NDArray[np.uint8]:
    keep = np.random.default_rng(seed).random(8 * size_bytes) >= ratio
    return np.packbits(keep, bitorder="little")


def zeros_of(packed: npt.NDArray[np.uint8]) -> int:
    return 8 * len(packed) - count_kept(packed)


def read(payload: bytes, size_bytes: int, zeros: int) -> npt.NDArray[np.uint8]:
    return decode_ans(payload, size_bytes, zeros, path=PATH, key="w")


def entropy_bits(ratio: float) -> float:
    return -ratio * math.log2(ratio) - (1 - ratio) * math.log2(1 - ratio)


# The payload


@pytest.mark.slow
@settings(deadline=None)
@given(packed=st.binary(min_size=1, max_size=300))
def test_payload_is_the_one_of_the_definition(packed: bytes) -> None:
    array = np.frombuffer(packed, dtype=np.uint8)
    payload = encode_ans(array, zeros_of(array))
    assert payload == plain_ans(packed)
    assert read(payload, len(packed), zeros_of(array)).tobytes() == packed


@pytest.mark.slow
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size_bytes", [1, 2, 5000])
def test_payloads_of_every_ratio_are_those_of_the_definition(ratio: float, size_bytes: int) -> None:
    packed = random_packed(size_bytes, ratio)
    payload = encode_ans(packed, zeros_of(packed))
    assert payload == plain_ans(packed.tobytes())
    assert plain_ans_read(payload, 8 * size_bytes, zeros_of(packed)) == packed.tobytes()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("weights", range(1, 18))
def test_all_kept_and_all_removed_round_trip(kept: bool, weights: int) -> None:
    packed = np.packbits(np.full(weights, kept), bitorder="little")
    decoded = decode(encode(packed, "ans"), "ans", weights, 0 if kept else weights, path=PATH, key="w")
    assert np.array_equal(decoded, packed)
    assert not decoded.flags.writeable


@pytest.mark.parametrize("ratio", [0.002, 0.02, 0.5])
def test_tensor_of_several_chunks_and_starting_words_is_the_one_of_the_definition(
    ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ans, "_CHUNK_BYTES", 30_001)
    packed = random_packed(2**17 + 1, ratio)
    payload = encode_ans(packed, zeros_of(packed))
    assert payload == plain_ans(packed.tobytes())
    assert np.array_equal(read(payload, len(packed), zeros_of(packed)), packed)


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.4])
def test_size_is_within_1002_of_the_entropy(ratio: float) -> None:
    packed = random_packed(1_000_000, ratio)
    bits = 8 * len(encode_ans(packed, zeros_of(packed)))
    assert 0.999 < bits / (8 * len(packed) * entropy_bits(zeros_of(packed) / (8 * len(packed)))) < 1.002


@pytest.mark.slow
@given(size_bytes=st.integers(1, 2**45), share=st.fractions(0, 1))
def test_frequencies_are_positive_and_add_up(size_bytes: int, share: float) -> None:
    zeros = int(8 * size_bytes * share)
    found = frequencies(size_bytes, zeros)
    assert min(found) >= 1
    assert sum(found) == 2**24
    assert found == plain_ans_model(size_bytes, zeros)[0]


def test_file_is_the_one_the_definition_gives() -> None:
    mask = small_mask()
    payloads = {name: plain_ans(plain_packed(mask[name])) for name in mask.names()}
    assert (GOLDEN / "ans.bits").read_bytes() == plain_file(plain_document(mask, "ans"), payloads)


# Hostile payloads

SIZE_BYTES = 40
PACKED = random_packed(SIZE_BYTES, 0.2)
PAYLOAD = plain_ans(PACKED.tobytes())


@pytest.mark.parametrize("length_bytes", range(len(PAYLOAD)))
def test_payload_cut_short_is_refused(length_bytes: int) -> None:
    with pytest.raises(MaskFormatError, match="ANS stream") as caught:
        read(PAYLOAD[:length_bytes], SIZE_BYTES, zeros_of(PACKED))
    assert (caught.value.path, caught.value.key) == (str(PATH), "w")


@pytest.mark.parametrize("payload", [b"\0" * 4, PAYLOAD + b"\0" * 4, b""])
def test_last_word_of_zero_and_no_word_are_refused(payload: bytes) -> None:
    with pytest.raises(MaskFormatError, match="not an ANS stream for its shape"):
        read(payload, SIZE_BYTES, zeros_of(PACKED))


@pytest.mark.parametrize("more", [b"\1", b"\1\0\0\0", bytes(range(1, 9))])
def test_payload_with_more_at_either_end_is_refused(more: bytes) -> None:
    for payload in (PAYLOAD + more, more + PAYLOAD):
        with pytest.raises(MaskFormatError, match="ANS stream"):
            read(payload, SIZE_BYTES, zeros_of(PACKED))


def test_other_count_or_shape_than_the_payload_was_made_for_is_refused() -> None:
    for size_bytes, zeros in ((SIZE_BYTES, zeros_of(PACKED) + 1), (SIZE_BYTES - 1, 40), (SIZE_BYTES + 1, 70)):
        with pytest.raises(MaskFormatError, match="does not match its shape and its number"):
            read(PAYLOAD, size_bytes, zeros)


@pytest.mark.parametrize(("zeros", "words"), [(0, 4097), (2**16, 4097), (2**22, 4097)])
def test_shape_that_the_words_cannot_stand_for_is_refused_without_allocation(zeros: int, words: int) -> None:
    tracemalloc.start()
    with pytest.raises(MaskFormatError, match="not an ANS stream for its shape") as caught:
        read(struct.pack("<2I", 1, 1), 2**20 + 1, zeros)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert f"at least {WORD_BYTES * words} bytes" in str(caught.value.expected)


def test_time_and_memory_of_a_hostile_payload_are_bounded_by_its_size() -> None:
    """A payload of 33 KB once took 20 s and 0.8 GB: 8,192 words of 1 for half a billion bytes without removals."""
    payload = struct.pack("<8192I", *[1] * 8192)
    with pytest.raises(MaskFormatError, match="not an ANS stream for its shape"):
        read(payload, 8192 * 2**16, 0)
    everything = np.full(2**21, 255, dtype=np.uint8)
    assert 2**21 / 64 <= len(encode_ans(everything, 0)) < 1.001 * 2**21 / 64


@pytest.mark.slow
@settings(deadline=None)
@given(
    size_bytes=st.integers(1, 3000),
    ratio=st.floats(0, 1).map(lambda share: share**6),
    whole_bytes=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_mask_has_a_payload_too_small_for_a_reader(
    size_bytes: int, ratio: float, whole_bytes: bool, seed: int
) -> None:
    packed = random_packed(size_bytes, ratio, seed)
    if whole_bytes:  # takes the fewest bits per removed weight
        packed = np.where(np.random.default_rng(seed).random(size_bytes) < ratio, 0, 255).astype(np.uint8)
    payload = encode_ans(packed, zeros_of(packed))
    assert size_bytes <= MAX_BYTES_A_WORD * len(payload) // WORD_BYTES
    assert np.array_equal(read(payload, size_bytes, zeros_of(packed)), packed)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(
    words=st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 3), min_size=1, max_size=6),
    size_bytes=st.integers(1, 30),
    share=st.floats(0, 1),
)
def test_any_words_are_refused_or_are_the_one_payload_of_their_bytes(
    words: list[int], size_bytes: int, share: float
) -> None:
    payload, zeros = struct.pack(f"<{len(words)}I", *words), int(8 * size_bytes * share)
    try:
        packed = read(payload, size_bytes, zeros)
    except MaskFormatError:
        return
    if zeros_of(packed) == zeros:  # otherwise the mask file's reader refuses the count
        assert plain_ans(packed.tobytes()) == payload


# Without the constriction package


def test_missing_package_is_one_clear_error_for_writing_and_for_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(MaskFileError, match="needs the package constriction") as writing:
        save_mask(small_mask(), tmp_path / "mask.bits", "ans")
    assert writing.value.hint == "pip install 'mftctl[ans]', or use codec deflate"
    assert not list(tmp_path.iterdir())
    with pytest.raises(MaskFileError, match="needs the package constriction") as reading:
        load_mask(GOLDEN / "ans.bits")
    assert (reading.value.path, reading.value.key) == (str(GOLDEN / "ans.bits"), "even.weight")
    assert reading.value.hint == "pip install 'mftctl[ans]'"
    load_mask(GOLDEN / "deflate.bits")
