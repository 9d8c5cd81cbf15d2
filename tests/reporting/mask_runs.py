"""Hand-written `mask-train` runs, with a mask file of a model with arbitrary tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mftctl.masking.mask import Mask, save_mask
from mftctl.masking.mask_file.document import MaskMetadata, TensorRecord

Tensors = Mapping[str, torch.Tensor]


def digest(weights: torch.Tensor) -> str:
    return hashlib.sha256(weights.view(torch.uint8).numpy().tobytes()).hexdigest()


def write_model(folder: Path, weights: Tensors, shards: int = 1) -> Path:
    """Writes a checkpoint folder in one file or in several."""
    folder.mkdir(parents=True)
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors")
        return folder
    names = sorted(weights)
    files = {name: f"model-{place % shards}.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def make_mask(keep: Tensors, weights: Tensors | None = None, *, kind: str = "weight") -> Mask:
    """A mask of these tensors; without weights it belongs to no model."""
    records = {}
    for name, bits in keep.items():
        own = torch.zeros(bits.shape) if weights is None else weights[name]
        dtype = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16"}[own.dtype]
        digests = (digest(own), None) if kind == "weight" else (digest(torch.zeros(1)), digest(own))
        records[name] = TensorRecord(tuple(bits.shape), int((~bits).sum()), digests[0], dtype, digests[1])
    metadata: dict[str, Any] = {"base_revision": None, "method": "learned", "ratio": None, "threshold": None}
    metadata |= {"layers": None, "seed": 0, "run_id": None, "base_model": "base"}
    if kind == "delta":
        metadata |= {"kind": kind, "tuned_model": "tuned"}
    return Mask(keep, records, MaskMetadata(**metadata))


def write_mask_run(
    root: Path,
    number: int,
    state: str,
    mask: Mask,
    *,
    seed: int = 0,
    stage: str | None = None,
    recipe: str | None = None,
    model: str = "gone",
    origin: str = "models/base",
    status: str = "finished",
    options: Mapping[str, object] | None = None,
) -> Path:
    """Writes a new `mask-train` run folder and returns it."""
    folder = root / f"{number:03d}-mask-train"
    folder.mkdir(parents=True)
    save_mask(mask, folder / "mask.bits")
    record = {
        "command": "mask-train",
        "status": status,
        "started": "2025-01-01T00:00:00+00:00",
        "config": {"seed": seed, "data": ["train.jsonl"], "mask_train": dict(options or {})},
        "recipe": recipe,
        "inputs": {"model": model, "mask": None, "state": "FFT", "parents": ["001-fft"], "origin": origin},
        "result": {"state": state, "model": model, "mask": str(folder / "mask.bits")} if status == "finished" else {},
        "stage": stage,
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def random_keep(seed: int, ratio: float = 0.2, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random bits of these shapes; `__` in a name stands for a dot."""
    generator = torch.Generator().manual_seed(seed)
    return {name.replace("__", "."): torch.rand(shape, generator=generator) >= ratio for name, shape in shapes.items()}


def damage(path: Path) -> None:
    """Flips one bit of a file's last byte."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
