"""The linear layers of a checkpoint's model, by the names of their weights in the checkpoint."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import torch
from torch import nn

from mftctl.errors import MaskingError
from mftctl.masking.checkpoints.apply_in_memory import spellings
from mftctl.masking.checkpoints.meta_models import build_skeleton, read_config
from mftctl.masking.checkpoints.tensors import StoredTensor

_WEIGHT = ".weight"


class LinearModules:
    """The modules of a model without its weights.

    Args:
        folder: The checkpoint.

    Raises:
        ModelError: transformers cannot build the model.
    """

    def __init__(self, folder: Path) -> None:
        model = build_skeleton(read_config(str(folder)), torch.float32)
        self._prefix = model.base_model_prefix
        self._modules = dict(model.named_modules())

    def module_of(self, stored: StoredTensor) -> str:
        """The name of the linear layer that a tensor is the weight of.

        Raises:
            MaskingError: It is the weight of something else.
        """
        for name in spellings(stored.name, self._prefix):
            module = self._modules.get(name.removesuffix(_WEIGHT)) if name.endswith(_WEIGHT) else None
            if isinstance(module, nn.Linear) and tuple(module.weight.shape) == stored.shape:
                return name.removesuffix(_WEIGHT)
        raise MaskingError(
            "The delta file changes a tensor that is not the weight of a linear layer, which a Super-Tuning adapter "
            "cannot hold.",
            path=stored.path,
            key=stored.name,
            expected="weights of torch.nn.Linear only",
            actual=self._what(stored.name),
            hint="mftctl delta BASE TUNED --exclude embeddings,vectors leaves the others out",
        )

    def weight_of(self, module: str, index: Container[str]) -> str | None:
        """The name of a linear layer's weight in the checkpoint; None if there is no such layer."""
        if not isinstance(self._modules.get(module), nn.Linear):
            return None
        return next((name for name in spellings(module + _WEIGHT, self._prefix) if name in index), None)

    def _what(self, name: str) -> str:
        for spelling in spellings(name, self._prefix):
            module = self._modules.get(spelling.rpartition(".")[0])
            if module is not None:
                return f"{spelling.rpartition('.')[2]} of {type(module).__name__}"
        return "a tensor of no module, such as fused experts"
