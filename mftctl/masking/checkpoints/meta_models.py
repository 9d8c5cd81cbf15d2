"""Models of the right shapes without any weights, from their configuration alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from mftctl.data.quickstart import built_in
from mftctl.masking.checkpoints.load_weights import require_few_labels, require_few_layers
from mftctl.masking.checkpoints.model_failures import model_failures
from mftctl.masking.checkpoints.remote_code import require_trusted_code, trusts_code
from mftctl.masking.targets import decoder_layers


def read_config(model: str, revision: str | None = None) -> PreTrainedConfig:
    """The configuration of a model; of its files only `config.json` is needed.

    Args:
        model: Checkpoint folder, hub id or `quickstart`.
        revision: Of a hub model.

    Raises:
        ModelError: There is no such model, the hub cannot be reached, or transformers does not know its architecture.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir() and model == built_in.NAME:
        folder = built_in.model_path()
    require_trusted_code(folder)
    require_few_labels(folder)
    with model_failures(
        "The model's configuration cannot be read.",
        path=folder if folder.is_dir() else model,
        expected='a folder with config.json, a hub model that can be reached, or "quickstart"',
        hint="check the path; config.json alone is enough for validate",
    ):
        config: PreTrainedConfig = (
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusts_code())
            if folder.is_dir()
            else AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusts_code())
        )
    require_few_layers(config, folder if folder.is_dir() else model)
    return config


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a configuration on the meta device: shapes and dtypes alone.

    Args:
        config: The model keeps a copy of it.
        dtype: Of its parameters.

    Raises:
        ModelError: transformers has no causal language model for it.
    """
    with (
        model_failures(
            "transformers cannot build a causal language model from this configuration.",
            path=config.name_or_path or None,
            key=config.model_type,
        ),
        torch.device("meta"),
    ):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trusts_code()
        )
    return model


def count_layers(config: PreTrainedConfig) -> int:
    """The decoder layers of a model.

    Args:
        config: Of the model.

    Raises:
        ModelError: transformers has no causal language model for it.
    """
    return len(decoder_layers(build_skeleton(config, torch.float32))[1])


@contextmanager
def without_data(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside it, a model from the meta device runs as if on a device, and nothing takes memory or computes.

    Unlike tensors of the meta device, fake tensors know the device they stand for, and so take the same kernels and
    casts as real ones.

    Args:
        model: Changed in place: its parameters and buffers become fake tensors, shared ones stay shared.
        device: What it is to run on; need not exist here.
    """
    with FakeTensorMode(), device, _PlainGroupedProducts():
        made: dict[torch.Tensor, torch.Tensor] = {}
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in list(tensors.items()):
                    if tensor is not None:
                        setattr(module, name, made.setdefault(tensor, _fake(tensor)))
        yield


class _PlainGroupedProducts(TorchFunctionMode):
    """Multiplies fused experts by transformers' own operator: torch's knows the shapes of its result in bf16 alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._grouped_mm:
            inputs, weight = args
            return torch.ops.transformers.grouped_mm_fallback(inputs, weight, kwargs["offs"])
        return func(*args, **(kwargs or {}))


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
