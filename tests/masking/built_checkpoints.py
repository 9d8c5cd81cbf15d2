"""Tiny checkpoints, and masks for them."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mftctl.masking.checkpoints.tensors import INDEX_FILE
from mftctl.masking.mask import Mask
from mftctl.masking.mask_file.document import TensorRecord
from tests.masking.mask_files import DELTA_METADATA, METADATA

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read with the safetensors library."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def raw_tensors(path: Path) -> dict[str, bytes]:
    """The bytes of each tensor in a file, parsed from the format's definition."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items()
    }


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """A folder with these tensors in one safetensors file or distributed over several."""
    folder.mkdir()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    files = {name: f"model-{number % shards + 1:05}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def write_tuned(base: Path, folder: Path, *, seed: int = 7, shards: int = 1) -> Path:
    """A copy of a checkpoint with small changes to most of its floating-point weights."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in stored_tensors(base).items():
        moved = torch.rand(tensor.shape, generator=generator) < 0.8
        delta = torch.randn(tensor.shape, generator=generator) * 0.02
        tensors[name] = (tensor.double() + torch.where(moved, delta, 0.0)).to(tensor.dtype)
    write_checkpoint(folder, tensors, shards=shards)
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX_FILE:
            shutil.copyfile(path, folder / path.name)
    return folder


def digest_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def learn_mask(
    tensors: dict[str, torch.Tensor],
    *,
    ratio: float = 0.25,
    seed: int = 0,
    tuned: dict[str, torch.Tensor] | None = None,
) -> Mask:
    """A random mask for these base tensors, or a delta mask if tuned tensors are given."""
    generator = torch.Generator().manual_seed(seed)
    keep = {name: torch.rand(tensor.shape, generator=generator) >= ratio for name, tensor in tensors.items()}
    records = {
        name: TensorRecord(
            shape=tuple(tensor.shape),
            removed=int((~keep[name]).sum()),
            sha256=digest_of(tensor),
            dtype=SAFETENSORS_NAMES[tensor.dtype],
            tuned_sha256=None if tuned is None else digest_of(tuned[name]),
        )
        for name, tensor in tensors.items()
    }
    return Mask(keep, records, METADATA if tuned is None else DELTA_METADATA)


def projections(folder: Path, layers: tuple[str, ...] = ("layers.1.", "layers.2.", "h.1.")) -> dict[str, torch.Tensor]:
    """The attention and MLP matrices of some layers, as stored."""
    return {
        name: tensor
        for name, tensor in stored_tensors(folder).items()
        if tensor.ndim == 2 and any(layer in name for layer in layers)
    }
