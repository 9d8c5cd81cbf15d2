"""Tiny checkpoints and masks for them."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from mftctl.masking.bits import Mask, TensorRecord
from tests.masking.mask_files import METADATA

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, through the safetensors library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def raw_tensors(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor of one file, read from the container's definition."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items()
    }


def learn_mask(tensors: dict[str, torch.Tensor], *, ratio: float = 0.25, kind: str = "weight", seed: int = 0) -> Mask:
    """A random mask for these base tensors."""
    generator = torch.Generator().manual_seed(seed)
    keep = {name: torch.rand(tensor.shape, generator=generator) >= ratio for name, tensor in tensors.items()}
    records = {
        name: TensorRecord(
            shape=tuple(tensor.shape),
            removed=int((~keep[name]).sum()),
            sha256=hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
            dtype=SAFETENSORS_NAMES[tensor.dtype],
        )
        for name, tensor in tensors.items()
    }
    return Mask(keep, records, replace(METADATA, kind=kind))


def projections(folder: Path, layers: tuple[str, ...] = ("layers.1.", "layers.2.", "h.1.")) -> dict[str, torch.Tensor]:
    """The attention and MLP matrices of some layers, as stored."""
    return {
        name: tensor
        for name, tensor in stored_tensors(folder).items()
        if tensor.ndim == 2 and any(layer in name for layer in layers)
    }
