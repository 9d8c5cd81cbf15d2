"""Adapters that change individual weights, SHiRA and Super-Tuning: which weights these are, in memory and in files.

peft gives every projection of a Super-Tuning adapter the same share of trained weights, rounded down, and allocates
that many when it loads one. In memory, an adapter here trains exactly the weights that were chosen; in files,
projections with fewer than peft allocates repeat their last position with a change of 0, which has no effect.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from peft import PeftModel, SupertuningConfig
from peft.tuners.shira import ShiraLayer
from peft.tuners.supertuning.layer import SupertuningLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from mftctl.errors import ModelError

ADAPTER: Final = "default"
_PARTS: Final = {
    "SHIRA": (".shira_weight", ".shira_indices"),
    "SUPERTUNING": (".supertuning_values", ".supertuning_indices"),
}
"""Endings of the names of an adapter's values and of their positions, by type."""


def super_tuning_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields path in the base and layer of each projection with a Super-Tuning adapter."""
    return _layers(model, SupertuningLayer)


def trained_positions(model: nn.Module) -> dict[str, torch.Tensor]:
    """The flat indices of the weights that an adapter changes: int64 on the CPU, in its own order, by projection."""
    found = {}
    for name, layer in _layers(model, ShiraLayer):
        rows, columns = layer.shira_indices[ADAPTER].to("cpu", torch.int64)
        found[name] = rows * layer.in_features + columns
    for name, layer in super_tuning_layers(model):
        found[name] = layer.supertuning_indices[ADAPTER].to("cpu", torch.int64)
    return found


def shared_sparsity(sizes: Iterable[tuple[int, int]]) -> float:
    """The highest Super-Tuning sparsity for which PEFT allocates enough trained weights in every projection.

    Args:
        sizes: Number of weights and of trained weights, at least 1, of each projection.
    """
    sizes = list(sizes)
    sparsity = max(0.0, 1 - max(trained / weights for weights, trained in sizes))
    while any(_allocated(weights, sparsity) < trained for weights, trained in sizes):
        sparsity = max(0.0, math.nextafter(sparsity, 0.0))
    return sparsity


@torch.no_grad()
def pad_for_peft(model: PeftModel) -> None:
    """Gives each projection as many positions as PEFT allocates when it loads the adapter.

    Args:
        model: A Super-Tuning adapter to save, modified in place; others are left as they are.
    """
    config = model.peft_config[ADAPTER]
    if not isinstance(config, SupertuningConfig):
        return
    for _, layer in super_tuning_layers(model):
        indices, values = layer.supertuning_indices[ADAPTER], layer.supertuning_values[ADAPTER]
        more = _allocated(layer.get_base_layer().weight.numel(), config.sparsity) - len(indices)
        if more > 0:
            layer.supertuning_indices[ADAPTER] = torch.cat([indices, indices[-1:].expand(more)])
            layer.supertuning_values[ADAPTER] = nn.Parameter(torch.cat([values, values.new_zeros(more)]))


@torch.no_grad()
def trim_padding(model: PeftModel) -> None:
    """Undoes `pad_for_peft` after loading; a change at a repeated position is added to that of the position.

    Args:
        model: An adapter, modified in place.
    """
    for _, layer in super_tuning_layers(model):
        indices, values = layer.supertuning_indices[ADAPTER], layer.supertuning_values[ADAPTER]
        others = (indices != indices[-1]).nonzero()
        last = int(others[-1]) + 1 if len(others) else 0
        if last + 1 < len(indices):
            kept = torch.cat([values[:last], values[last:].sum().unsqueeze(0)])
            layer.supertuning_indices[ADAPTER] = indices[: last + 1].clone()
            layer.supertuning_values[ADAPTER] = nn.Parameter(kept, requires_grad=values.requires_grad)


def require_positions(folder: Path, settings: dict[str, Any]) -> None:
    """Checks that the files of an adapter say which weights it changes, instead of leaving PEFT to choose some.

    Args:
        folder: Contains the adapter's weights.
        settings: Its configuration.

    Raises:
        ModelError: The positions are missing, or the weights cannot be read.
    """
    kind = settings["peft_type"]
    if kind not in _PARTS:
        return
    values, positions = _PARTS[kind]
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError("The adapter's weights cannot be read.", path=path, actual=error) from error
    changed = [name.removesuffix(values) for name in sorted(names) if name.endswith(values)]
    missing = next((name + positions for name in changed if name + positions not in names), None)
    if missing is not None or not settings.get("save_precomputed_indices", True):
        raise ModelError(
            "The adapter does not say which weights it changes.",
            path=path,
            key=missing or "save_precomputed_indices",
            expected="a tensor of positions for each projection",
            actual="none",
            hint="save it again" + (" with save_precomputed_indices=True" if kind == "SUPERTUNING" else ""),
        )


def check_positions(model: nn.Module, folder: Path) -> None:
    """Checks that all positions of a loaded adapter are in their weights, which PEFT does not.

    Args:
        model: The adapter on its base.
        folder: Its folder, for the error.

    Raises:
        ModelError: A position is outside its weight, or there are more or fewer positions than changes.
    """
    rely_on_positions()
    for name, layer in _layers(model, ShiraLayer):
        shape = (layer.out_features, layer.in_features)
        _check(name, layer.shira_indices.get(ADAPTER), layer.shira_weight[ADAPTER], shape, shape, folder)
    for name, layer in super_tuning_layers(model):
        shape = (layer.out_features, layer.in_features)
        indices = layer.supertuning_indices[ADAPTER].unsqueeze(0)
        _check(name, indices, layer.supertuning_values[ADAPTER], (math.prod(shape),), shape, folder)


def rely_on_positions() -> None:
    """Tells torch not to check the positions of SHiRA in every forward pass; otherwise it warns that it does not."""
    checks: Any = torch.sparse.check_sparse_tensor_invariants
    if not checks.is_enabled():
        checks.disable()


def _allocated(weights: int, sparsity: float) -> int:
    """The number of trained weights that PEFT allocates."""
    return int(weights * (1 - sparsity))


def _layers(model: nn.Module, kind: type) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, kind):
            yield name.removeprefix("base_model.model."), module


def _check(
    name: str,
    indices: torch.Tensor | None,
    values: torch.Tensor,
    ends: tuple[int, ...],
    shape: tuple[int, ...],
    folder: Path,
) -> None:
    """Checks positions `(len(ends), len(values))` against the number of places in each of their dimensions."""
    found = None if indices is None else tuple(indices.shape)
    fits = indices is not None and found == (len(ends), len(values)) and len(values) > 0
    if not fits or indices is None or not all(map(_is_inside, indices, ends)):
        raise ModelError(
            "The adapter changes weights that its base does not have.",
            path=folder,
            key=name,
            expected=f"{len(values)} positions in a weight of shape {shape}",
            actual=f"positions of shape {found}, or some outside the weight",
            hint="download or save the adapter again",
        )


def _is_inside(row: torch.Tensor, end: int) -> bool:
    return 0 <= int(row.min()) and int(row.max()) < end
