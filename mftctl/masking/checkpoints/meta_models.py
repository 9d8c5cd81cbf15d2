"""Builds models with the right shapes but no weights from their configuration."""

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
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from mftctl.data.quickstart import built_in
from mftctl.masking.checkpoints.load_weights import require_few_labels, require_few_layers
from mftctl.masking.checkpoints.model_failures import model_failures
from mftctl.masking.checkpoints.remote_code import require_trusted_code, trusts_code
from mftctl.masking.checkpoints.vision_language import auto_class
from mftctl.masking.targets import decoder_layers


def read_config(model: str, revision: str | None = None) -> PreTrainedConfig:
    """Reads a model's configuration; only its `config.json` is needed.

    Args:
        model: Checkpoint folder, Hub ID or `quickstart`.
        revision: Revision of a Hub model.

    Raises:
        ModelError: The model does not exist, the Hub is unreachable, or transformers does not know the architecture.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir() and model == built_in.NAME:
        folder = built_in.model_path()
    require_trusted_code(folder)
    require_few_labels(folder)
    with model_failures(
        "The model's configuration cannot be read.",
        path=folder if folder.is_dir() else model,
        expected='a folder with config.json, a reachable hub model, or "quickstart"',
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
    """Builds the language or vision-language model of a configuration on the meta device: shapes and dtypes only.

    Args:
        config: Model configuration, which the model copies.
        dtype: Dtype of the parameters.

    Raises:
        ModelError: transformers has no causal language model for this configuration.
    """
    with (
        model_failures(
            "transformers cannot build a causal language model from this configuration.",
            path=config.name_or_path or None,
            key=config.model_type,
        ),
        torch.device("meta"),
    ):
        model: PreTrainedModel = auto_class(config).from_config(
            copy.deepcopy(config), dtype=dtype, trust_remote_code=trusts_code()
        )
    return model


def count_layers(config: PreTrainedConfig) -> int:
    """Returns the number of decoder layers of a model.

    Args:
        config: Model configuration.

    Raises:
        ModelError: transformers has no causal language model for this configuration.
    """
    return len(decoder_layers(build_skeleton(config, torch.float32))[1])


@contextmanager
def without_data(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Context in which a meta-device model runs as if on a device, without using memory or computing.

    Unlike meta tensors, fake tensors know which device they represent, so they use the same kernels and casts as real
    tensors.

    Args:
        model: The model, changed in place: its parameters and buffers become fake tensors; sharing is preserved.
        device: The device to run on, which need not exist on this machine.
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
    """Multiplies fused experts with transformers' own operator; torch's infers result shapes only for bf16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._grouped_mm:
            inputs, weight = args
            return torch.ops.transformers.grouped_mm_fallback(inputs, weight, kwargs["offs"])
        return func(*args, **(kwargs or {}))


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
