"""Assignment of layers to GPUs for a model that is too large for one of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory

from mftctl.errors import DeviceMemoryError
from mftctl.masking.checkpoints.load_weights import stored_dtype
from mftctl.masking.checkpoints.locate import is_adapter
from mftctl.masking.checkpoints.meta_models import build_skeleton, read_config
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.runtime.devices import best_device
from mftctl.runtime.processes import world_size

_FOR_WEIGHTS = 0.9
"""The share of a GPU's free memory that weights may use, as batches need memory too."""


def gpu_map(folder: Path, dtype: torch.dtype | str) -> dict[str, int] | None:
    """Returns the GPU of each module of a model by path; None if one device suffices, or there is only one.

    Args:
        folder: The checkpoint.
        dtype: The dtype of the weights in memory; `auto` keeps the checkpoint's.

    Raises:
        DeviceMemoryError: All GPUs together have too little memory.
    """
    device = best_device()
    if device.type != "cuda" or device.index is not None or world_size() > 1 or is_adapter(folder):
        return None
    count = torch.cuda.device_count()
    if count == 1:
        return None
    return spread_over(folder, dtype, {index: torch.cuda.mem_get_info(index)[0] for index in range(count)})


def spread_over(folder: Path, dtype: torch.dtype | str, free_bytes: Mapping[int, int]) -> dict[str, int] | None:
    """Like `gpu_map`, for GPUs with the given free memory; None if the first has enough.

    Args:
        folder: The checkpoint.
        dtype: The dtype of the weights in memory; `auto` keeps the checkpoint's.
        free_bytes: Free memory by GPU number.

    Raises:
        DeviceMemoryError: All GPUs together have too little memory.
    """
    dtype = dtype if isinstance(dtype, torch.dtype) else stored_dtype(folder)
    needed = sum(math.prod(stored.shape) for stored in tensor_index(folder).values()) * dtype.itemsize
    room = {index: int(free * _FOR_WEIGHTS) for index, free in free_bytes.items()}
    if needed <= next(iter(room.values())):
        return None
    model = build_skeleton(read_config(str(folder)), dtype)
    model.tie_weights()
    whole_layers = list(model._no_split_modules or ())
    balanced = get_balanced_memory(model, dict(room), whole_layers, dtype=dtype)
    found = None
    for limits in (balanced, dict(room)):
        # Buffers are included so that accelerate does not warn; placements off the GPUs are refused anyway.
        places = infer_auto_device_map(model, limits, whole_layers, dtype=dtype, offload_buffers=True)
        found = found or _fitting(places)
    if found is None:
        raise DeviceMemoryError(
            "The model is too large for the available GPUs.",
            path=folder,
            expected=f"{needed / 1e9:.1f} GB of weights in whole layers",
            actual=", ".join(f"GPU {index}: {free / 1e9:.1f} GB free" for index, free in free_bytes.items()),
            hint="more or larger GPUs; --device cpu is slow and needs as much host memory",
        )
    return found


def _fitting(places: Mapping[str, int | str]) -> dict[str, int] | None:
    """Returns the placements if all of them are GPUs, otherwise None."""
    gpus = {name: place for name, place in places.items() if isinstance(place, int)}
    return gpus if len(gpus) == len(places) else None
