"""Mask files written and read from the format's definition alone, without mftctl, to compare with and to attack it."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from mftctl.errors import MaskFormatError
from mftctl.masking.bits import Mask, MaskMetadata, TensorRecord, load_mask

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


def same(a: Mask, b: Mask) -> bool:
    return (
        a.names() == b.names()
        and dict(a.records) == dict(b.records)
        and a.metadata == b.metadata
        and all(torch.equal(a[name], b[name]) for name in a.names())
    )


def plain_packed(keep: torch.Tensor) -> bytes:
    """The packed codec, bit by bit."""
    packed = bytearray((keep.numel() + 7) // 8)
    for position, bit in enumerate(keep.reshape(-1).tolist()):
        packed[position // 8] |= int(bit) << (position % 8)
    return bytes(packed)


def plain_deflate(packed: bytes, strategy: int = zlib.Z_HUFFMAN_ONLY) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15, 8, strategy)
    return compressor.compress(packed) + compressor.flush()


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
    """A whole mask file with a right digest, whatever the document says."""
    text = document if isinstance(document, bytes) else compact(document)
    return plain_bytes(plain_header(text, payloads), b"".join(payloads[name] for name in sorted(payloads)))


def plain_read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The document and the bool arrays, through the safetensors library and numpy."""
    arrays = {}
    with safe_open(path, framework="np") as reader:
        document = json.loads(reader.metadata()["mftctl"])
        for name, entry in document["tensors"].items():
            payload = reader.get_tensor(name).tobytes()
            packed = zlib.decompress(payload, -15) if entry["codec"] == "deflate" else payload
            bits = [(packed[i // 8] >> (i % 8)) & 1 for i in range(int(np.prod(entry["shape"])))]
            arrays[name] = np.array(bits, dtype=bool).reshape(entry["shape"])
    return document, arrays


def parts_of_small_mask(metadata: MaskMetadata = METADATA) -> tuple[dict[str, Any], dict[str, bytes]]:
    mask = small_mask(metadata)
    return plain_document(mask), {name: plain_packed(mask[name]) for name in mask.names()}


def refuse(tmp_path: Path, content: bytes, message: str) -> MaskFormatError:
    """The error of a file that must be refused with this message."""
    path = tmp_path / "hostile.bits"
    path.write_bytes(content)
    with pytest.raises(MaskFormatError, match=message) as caught:
        load_mask(path)
    assert caught.value.path == str(path)
    return caught.value
