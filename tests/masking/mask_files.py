"""Mask files written and read from the format's definition alone, to compare with mftctl and to attack it."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mftctl.errors import MaskFormatError
from mftctl.masking.mask import Mask, load_mask
from mftctl.masking.mask_file.document import MaskMetadata, TensorRecord

GOLDEN = Path(__file__).parent / "golden"

METADATA = MaskMetadata(
    base_model="org/base",
    base_revision="abc123",
    method="learned",
    ratio=0.25,
    threshold=None,
    layers="4-7",
    seed=7,
    run_id="0003-mask-train",
)


DELTA_METADATA = replace(
    METADATA, kind="delta", method="drop-trivial", layers=None, tuned_model="org/tuned", tuned_revision="def456"
)


def build_mask(metadata: MaskMetadata = METADATA, **keep: torch.Tensor) -> Mask:
    """A mask whose tensors have made-up digests."""
    records = {
        name: TensorRecord(
            shape=tuple(tensor.shape),
            removed=int((~tensor).sum()),
            sha256=hashlib.sha256(name.encode()).hexdigest(),
            dtype="BF16",
            tuned_sha256=hashlib.sha256(f"tuned {name}".encode()).hexdigest() if metadata.kind == "delta" else None,
        )
        for name, tensor in keep.items()
    }
    return Mask(keep, records, metadata)


def small_mask(metadata: MaskMetadata = METADATA) -> Mask:
    """Two tensors: 15 weights with 3 removed (one padding bit), and 16 weights with 4 removed."""
    odd = torch.ones(3, 5, dtype=torch.bool)
    odd[0, 1] = odd[1, 4] = odd[2, 4] = False
    even = torch.ones(2, 8, dtype=torch.bool)
    even[1, 2:6] = False
    return build_mask(metadata, **{"odd.weight": odd, "even.weight": even})


def same_bits(a: Mask, b: Mask) -> bool:
    return a.names() == b.names() and all(torch.equal(a[name], b[name]) for name in a.names())


def same(a: Mask, b: Mask) -> bool:
    return dict(a.records) == dict(b.records) and a.metadata == b.metadata and same_bits(a, b)


def plain_packed(keep: torch.Tensor) -> bytes:
    """The packed codec, one bit at a time."""
    packed = bytearray((keep.numel() + 7) // 8)
    for position, bit in enumerate(keep.reshape(-1).tolist()):
        packed[position // 8] |= int(bit) << (position % 8)
    return bytes(packed)


def plain_deflate(packed: bytes, strategy: int = zlib.Z_HUFFMAN_ONLY) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 8, strategy)
    return compressor.compress(packed) + compressor.flush()


def plain_ans_model(size_bytes: int, zeros: int) -> tuple[list[int], list[int]]:
    """The frequency of each byte, and the sum of the preceding frequencies."""
    bits = 8 * size_bytes
    frequencies = []
    for byte in range(256):
        ones = bin(byte).count("1")
        frequencies.append(1 + (2**24 - 256) * zeros ** (8 - ones) * (bits - zeros) ** ones // bits**8)
    frequencies[255 if 2 * zeros <= bits else 0] += 2**24 - sum(frequencies)
    return frequencies, [sum(frequencies[:byte]) for byte in range(256)]


def plain_ans_start(size_bytes: int, zeros: int) -> list[int]:
    lacking = math.ceil(size_bytes / 2**8) - min(zeros, 8 * size_bytes - zeros) // 16
    return [1] * max(math.ceil(size_bytes / 2**16), lacking)


def _ans_state(words: list[int], state: int) -> int:
    while state < 2**32 and words:
        state = state << 32 | words.pop()
    return state


def plain_ans(packed: bytes) -> bytes:
    """The ans codec, one word at a time."""
    zeros = sum(8 - byte.bit_count() for byte in packed)
    frequencies, before = plain_ans_model(len(packed), zeros)
    words = plain_ans_start(len(packed), zeros)
    state = _ans_state(words, 0)
    for byte in reversed(packed):
        if state >> 40 >= frequencies[byte]:
            words.append(state % 2**32)
            state >>= 32
        state = (state // frequencies[byte] << 24) + before[byte] + state % frequencies[byte]
    words += [state % 2**32, state >> 32] if state >> 32 else [state]
    return struct.pack(f"<{len(words)}I", *words)


def plain_ans_read(payload: bytes, weights: int, removed: int) -> bytes:
    """The packed bytes of a valid payload."""
    size_bytes = (weights + 7) // 8
    frequencies, before = plain_ans_model(size_bytes, removed + -weights % 8)
    words = list(struct.unpack(f"<{len(payload) // 4}I", payload))
    state = _ans_state(words, 0)
    packed = bytearray()
    for _ in range(size_bytes):
        place = state % 2**24
        byte = bisect_right(before, place) - 1
        packed.append(byte)
        state = _ans_state(words, frequencies[byte] * (state >> 24) + place - before[byte])
    start = plain_ans_start(size_bytes, removed + -weights % 8)
    assert (state, words) == (_ans_state(start, 0), start)
    return bytes(packed)


def plain_document(mask: Mask, codec: str = "packed") -> dict[str, Any]:
    metadata = mask.metadata
    document: dict[str, Any] = {
        "format_version": 1,
        "kind": metadata.kind,
        "bit_order": "little",
        "tensors": {
            name: {
                "shape": list(record.shape),
                "removed": record.removed,
                "codec": codec,
                "sha256": record.sha256,
                "dtype": record.dtype,
            }
            for name, record in mask.records.items()
        },
        "base": {"model": metadata.base_model, "revision": metadata.base_revision},
        "method": metadata.method,
        "ratio": metadata.ratio,
        "threshold": metadata.threshold,
        "layers": metadata.layers,
        "seed": metadata.seed,
        "run_id": metadata.run_id,
    }
    if metadata.kind == "delta":
        document["tuned"] = {"model": metadata.tuned_model, "revision": metadata.tuned_revision}
        for name, record in mask.records.items():
            document["tensors"][name]["tuned_sha256"] = record.tuned_sha256
    return document


def plain_digest(document: bytes, payloads: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    items = [document]
    for name in sorted(payloads):
        items += [name.encode(), payloads[name]]
    for item in items:
        digest.update(struct.pack("<Q", len(item)) + item)
    return digest.hexdigest()


def plain_header(document: bytes, payloads: dict[str, bytes], digest: str | None = None) -> dict[str, Any]:
    header: dict[str, Any] = {}
    offset = 0
    for name, payload in sorted(payloads.items()):
        header[name] = {
            "dtype": "U8",
            "shape": [len(payload)],
            "data_offsets": [offset, offset + len(payload)],
        }
        offset += len(payload)
    header["__metadata__"] = {"mftctl": document.decode(), "sha256": digest or plain_digest(document, payloads)}
    return header


def plain_bytes(header: dict[str, Any] | bytes, buffer: bytes) -> bytes:
    text = header if isinstance(header, bytes) else compact(header)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + buffer


def compact(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def plain_file(document: dict[str, Any] | bytes, payloads: dict[str, bytes]) -> bytes:
    """A whole mask file with a correct digest, whatever the document contains."""
    text = document if isinstance(document, bytes) else compact(document)
    return plain_bytes(plain_header(text, payloads), b"".join(payloads[name] for name in sorted(payloads)))


def plain_read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The document and the bool arrays, read with the safetensors library and numpy."""
    arrays = {}
    with safe_open(path, framework="np") as reader:
        document = json.loads(reader.metadata()["mftctl"])
        for name, entry in document["tensors"].items():
            payload = reader.get_tensor(name).tobytes()
            weights = int(np.prod(entry["shape"]))
            match entry["codec"]:
                case "deflate":
                    packed = zlib.decompress(payload, -15)
                case "ans":
                    packed = plain_ans_read(payload, weights, entry["removed"])
                case _:
                    packed = payload
            bits = [(packed[i // 8] >> (i % 8)) & 1 for i in range(weights)]
            arrays[name] = np.array(bits, dtype=bool).reshape(entry["shape"])
    return document, arrays


def parts_of_small_mask(metadata: MaskMetadata = METADATA) -> tuple[dict[str, Any], dict[str, bytes]]:
    mask = small_mask(metadata)
    return plain_document(mask), {name: plain_packed(mask[name]) for name in mask.names()}


def refuse(tmp_path: Path, content: bytes, message: str) -> MaskFormatError:
    """The error raised for a file that must be refused with this message."""
    path = tmp_path / "hostile.bits"
    path.write_bytes(content)
    with pytest.raises(MaskFormatError, match=message) as caught:
        load_mask(path)
    assert caught.value.path == str(path)
    return caught.value
