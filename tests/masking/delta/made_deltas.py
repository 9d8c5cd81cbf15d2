"""Tiny pairs of checkpoints, and delta files of them."""

from __future__ import annotations

from pathlib import Path

import torch

from mftctl.masking.delta.document import DeltaContents
from mftctl.masking.delta.make import DeltaPlan, make_delta
from mftctl.masking.delta.records import NamedModel
from mftctl.masking.delta.selection import Selection
from tests.masking.built_checkpoints import raw_tensors, write_checkpoint

Tensors = dict[str, torch.Tensor]
SHAPES = {"a.weight": (9, 37), "b.weight": (16, 4), "norm.weight": (13,), "conv": (2, 3, 5)}


def random_tensors(dtype: torch.dtype, seed: int = 0) -> Tensors:
    """A few tensors with weights of the usual size, and one that is not floating point."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in SHAPES.items()}
    return {**tensors, "positions": torch.arange(4)}


def moved(tensors: Tensors, seed: int = 1, size: float = 1e-3, share: float = 0.7) -> Tensors:
    """The tensors with small changes to a share of their floating-point weights."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in tensors.items():
        changes = torch.randn(tensor.shape, generator=generator) * size
        chosen = torch.rand(tensor.shape, generator=generator) < share
        wide = (tensor.double() + torch.where(chosen, changes, 0.0)).to(tensor.dtype)
        found[name] = wide if tensor.is_floating_point() else tensor
    return found


def write_pair(folder: Path, base: Tensors, tuned: Tensors, *, shards: tuple[int, int] = (1, 1)) -> tuple[Path, Path]:
    """The folders of a base and of a tuned checkpoint, with a configuration."""
    folders = []
    for name, tensors, count in (("base", base, shards[0]), ("tuned", tuned, shards[1])):
        path = write_checkpoint(folder / name, tensors, shards=count)
        (path / "config.json").write_text("{}")
        folders.append(path)
    return folders[0], folders[1]


def make(base: Path, tuned: Path, output: Path, plan: DeltaPlan | None = None, **options: object) -> DeltaContents:
    """Makes a delta file, by default with everything, exactly."""
    return make_delta(
        base,
        tuned,
        output,
        plan or DeltaPlan(),
        base_model=NamedModel("org/base", "abc"),
        tuned_model=NamedModel("org/tuned"),
        **options,  # type: ignore[arg-type]
    )


def plan(ratio: float = 0.0, select: str = "trivial", **options: object) -> DeltaPlan:
    """A plan without a mask."""
    return DeltaPlan(Selection(ratio, select, seed=3), **options)  # type: ignore[arg-type]


def raw_checkpoint(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a checkpoint."""
    return {name: raw for path in sorted(folder.glob("*.safetensors")) for name, raw in raw_tensors(path).items()}
