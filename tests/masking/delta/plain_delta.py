"""Delta files read and applied from the format's definition alone, entry by entry, to compare with mftctl."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tests.masking.mask_files import plain_ans_read

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_64 = 2**64


def plain_read_delta(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The document and the payloads, read with the safetensors library."""
    with safe_open(path, framework="np") as reader:
        document = json.loads(reader.metadata()["mftctl"])
        return document, {name: reader.get_tensor(name).tobytes() for name in reader.keys()}


def plain_bits(entry: dict[str, Any], payload: bytes | None) -> list[bool]:
    """Which entries of a tensor stay changed."""
    weights = int(np.prod(entry["shape"]))
    if payload is None:
        return [True] * weights
    match entry["codec"]:
        case "seeded":
            key, limit = struct.unpack("<QQ", payload)
            return [plain_random(key, place) < limit for place in range(weights)]
        case "deflate":
            payload = zlib.decompress(payload, -15)
        case "ans":
            payload = plain_ans_read(payload, weights, entry["removed"])
    return [bool(payload[place // 8] >> (place % 8) & 1) for place in range(weights)]


def plain_random(key: int, place: int) -> int:
    """64 random bits."""
    state = (key + (place + 1) * 0x9E3779B97F4A7C15) % _64
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % _64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % _64
    return state ^ state >> 31


def plain_result(entry: dict[str, Any], bits: list[bool], payload: bytes, base: bytes) -> bytes:
    """The bytes of a changed tensor."""
    size, kept = SIZES[entry["dtype"]], sum(bits)
    raw = payload if entry["values_codec"] == "raw" else zlib.decompress(payload, -15)
    patterns = [int.from_bytes(base[place : place + size], "little") for place in range(0, len(base), size)]
    places = [place for place, bit in enumerate(bits) if bit]
    assert kept == len(patterns) - entry["removed"]
    if entry["values"] == "exact":
        assert len(raw) == kept * size
        for number, place in enumerate(places):
            zigzag = sum(raw[byte * kept + number] << 8 * byte for byte in range(size))
            steps = zigzag // 2 if zigzag % 2 == 0 else -(zigzag // 2) - 1
            patterns[place] = _pattern(_place(patterns[place], size) + steps, size)
    else:
        for place, change in zip(places, plain_changes(entry["values"], raw, kept), strict=True):
            patterns[place] = _rounded_sum(patterns[place], change, entry["dtype"])
    return b"".join(pattern.to_bytes(size, "little") for pattern in patterns)


def plain_changes(values: str, raw: bytes, kept: int) -> list[np.float32]:
    """The changes that rounded values stand for."""
    match values:
        case "bf16":
            pairs = [raw[number] | raw[kept + number] << 8 for number in range(kept)]
            return [np.uint32(pair << 16).view(np.float32) for pair in pairs]
        case "int8":
            blocks = -(-kept // 128)
            scales = np.frombuffer(raw[: 4 * blocks], "<f4")
            codes = struct.unpack(f"{kept}b", raw[4 * blocks :])
            return [np.float32(code) * scales[number // 128] for number, code in enumerate(codes)]
        case _:
            scale = np.frombuffer(raw[:4], "<f4")[0]
            return [scale if raw[4 + number // 8] >> number % 8 & 1 else -scale for number in range(kept)]


def plain_applied(path: Path, base: dict[str, bytes]) -> dict[str, bytes]:
    """The bytes of every tensor of the base with the changes of a delta file, whose digests are checked."""
    document, payloads = plain_read_delta(path)
    assert set(base) == {*document["tensors"], *document["unchanged"], *document["left_out"]}
    results = dict(base)
    for name, entry in document["tensors"].items():
        assert entry["sha256"] == hashlib.sha256(base[name]).hexdigest()
        bits = plain_bits(entry, payloads.get(name))
        results[name] = plain_result(entry, bits, payloads[f"values:{name}"], base[name])
        assert entry["result_sha256"] == hashlib.sha256(results[name]).hexdigest()
    for name in (*document["unchanged"], *document["left_out"]):
        entry = document["unchanged"].get(name) or document["left_out"][name]
        assert (entry["sha256"], entry["length_bytes"]) == (hashlib.sha256(base[name]).hexdigest(), len(base[name]))
    return results


def _place(pattern: int, size: int) -> int:
    """The place of a bit pattern on the line of all numbers; +0.0 is at 0 and -0.0 at -1."""
    top = 1 << (8 * size - 1)
    return pattern if pattern < top else -(pattern - top) - 1


def _pattern(place: int, size: int) -> int:
    top = 1 << (8 * size - 1)
    place = (place + top) % (2 * top) - top
    return place if place >= 0 else top - place - 1


def _rounded_sum(pattern: int, change: np.float32, dtype: str) -> int:
    """The base's number plus a change, in binary32 or binary64, rounded to the dtype."""
    match dtype:
        case "F64":
            return int((np.uint64(pattern).view(np.float64) + np.float64(change)).view(np.uint64))
        case "F32":
            return int((np.uint32(pattern).view(np.float32) + change).view(np.uint32))
        case "F16":
            return int((np.float32(np.uint16(pattern).view(np.float16)) + change).astype(np.float16).view(np.uint16))
    total = int((np.uint32(pattern << 16).view(np.float32) + change).view(np.uint32))
    return total + 0x7FFF + (total >> 16 & 1) >> 16  # to nearest, ties to even
