"""The device that a command computes on: its choice, free memory, precision and attention kernels."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mftctl.errors import ConfigError, TrainingError
from mftctl.runtime.compute_settings import Attention, Precision
from mftctl.runtime.memory import available_bytes
from mftctl.runtime.processes import world_size

if TYPE_CHECKING:
    pass

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DETERMINISTIC_ATTENTION = ("sdpa", "eager")
_FLASH = "flash_attention_2"


@dataclass(frozen=True, slots=True)
class Use:
    """The settings the running command computes with.

    Attributes:
        device: The device; without an index, the current one of its type.
        attention: The requested attention.
        precision: The precision of forward passes.
        on_attention: Receives the attention actually used by a model.
    """

    device: torch.device
    attention: Attention = "auto"
    precision: Precision = "fp32"
    on_attention: Callable[[str], None] | None = None


_in_use: Use | None = None


def best_device() -> torch.device:
    """Returns the device in use: that of the running command, else an available accelerator, else the CPU."""
    return _automatic() if _in_use is None else _in_use.device


def find_device(name: str) -> torch.device:
    """Returns the device named in a recipe, if available.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:N`, `mps` or `xpu`.

    Raises:
        ConfigError: The device is not available, or not for one of several processes.
    """
    if name == "auto":
        return _automatic()
    if ":" in name and is_launched():
        raise ConfigError(
            "Each process started by a launcher uses its own GPU.",
            key="device",
            expected="auto, cuda or cpu",
            actual=name,
            hint=f"omit --device; CUDA_VISIBLE_DEVICES={name.partition(':')[2]} selects the GPUs",
        )
    there = _devices_there()
    if name not in there:
        raise ConfigError(
            "The requested device is not available.",
            key="device",
            expected=", ".join(["auto", *there]),
            actual=name,
            hint=_why_not_there(name),
        )
    return torch.device(name)


def join_on(name: str) -> None:
    """Connects the processes started by a launcher on a device, before any of them starts work.

    Args:
        name: The device name as in a recipe.

    Raises:
        ConfigError: The device is not available, or not for one of several processes.
    """
    global _in_use
    device = find_device(name)
    if world_size() > 1:
        _in_use = Use(device)


def numbered(device: torch.device) -> torch.device:
    """Returns the device with its index, by default the current one; the CPU unchanged."""
    if device.type in ("cpu", "mps") or device.index is not None:
        return device
    return torch.device(device.type, torch.accelerator.current_device_index())


def device_names() -> list[str]:
    """Returns the names of the available accelerators."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return []
    return [_product(torch.device(found.type, index)) for index in range(torch.accelerator.device_count())]


def counts_memory(device: torch.device) -> bool:
    """Checks whether a device has its own memory, whose peak use torch reports."""
    return device.type not in ("cpu", "mps")


def has_bf16() -> bool:
    """Checks whether the device in use is a GPU with native bf16; others emulate it, slower than fp32."""
    kind = best_device().type
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return kind == "xpu" and bool(torch.xpu.is_bf16_supported(including_emulation=False))


def uses_bf16(precision: Precision) -> bool:
    """Checks whether to compute in bf16: if requested, or for `auto` on a GPU that supports it."""
    return has_bf16() if precision == "auto" else precision == "bf16"


def frozen_dtype(precision: Precision) -> torch.dtype:
    """Returns the dtype of frozen weights: bf16 to compute in bf16, since they lose no updates to rounding, or fp32."""
    return torch.bfloat16 if uses_bf16(precision) else torch.float32


def free_memory_bytes(device: torch.device) -> int:
    """Returns the memory still available to a process; on a GPU, free memory plus what torch has cached unused.

    Args:
        device: The device.
    """
    if device.type in ("cpu", "mps"):  # which share memory
        return available_bytes()
    of_device: Any = torch.cuda if device.type == "cuda" else torch.accelerator
    free = torch.cuda.mem_get_info if device.type == "cuda" else torch.accelerator.get_memory_info
    return int(free(device)[0]) + int(of_device.memory_reserved(device)) - int(of_device.memory_allocated(device))


@contextmanager
def visible_alone(device: torch.device) -> Iterator[None]:
    """Context in which started processes see only this GPU.

    Args:
        device: A GPU by its number; other devices change nothing.
    """
    before = os.environ.get(_VISIBLE)
    if device.index is not None:
        os.environ[_VISIBLE] = str(device.index) if before is None else before.split(",")[device.index]
    try:
        yield
    finally:
        if device.index is not None:
            os.environ.pop(_VISIBLE)
            os.environ.update({} if before is None else {_VISIBLE: before})


def attention_in_use(dtype: torch.dtype) -> Attention:
    """Returns the requested attention, if it supports weights of this dtype.

    Args:
        dtype: The dtype of the weights; under autocast they are always computed in bf16.

    Raises:
        ConfigError: The attention supports only bf16 and fp16.
    """
    if _in_use is None:
        return "auto"
    if _in_use.attention == _FLASH and dtype == torch.float32 and not uses_bf16(_in_use.precision):
        raise ConfigError(
            "Flash attention supports only bf16 and fp16.",
            key="attention",
            expected="sdpa or eager with fp32",
            actual=_in_use.attention,
            hint="--attention sdpa, or --precision bf16 where available",
        )
    return _in_use.attention


def record_attention(model: Any) -> None:
    """Records the attention that a model actually uses in the current run."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if _in_use is not None and _in_use.on_attention is not None and attention is not None:
        _in_use.on_attention(attention)


def require_deterministic_attention(model: Any) -> None:
    """Checks that the model's attention is deterministic, if that was requested.

    Raises:
        TrainingError: The attention is not computed by torch.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if torch.are_deterministic_algorithms_enabled() and attention not in _DETERMINISTIC_ATTENTION:
        raise TrainingError(
            "The attention of this model is not known to be deterministic.",
            key="deterministic",
            expected=" or ".join(_DETERMINISTIC_ATTENTION),
            actual=attention,
            hint="omit --deterministic",
        )


def _automatic() -> torch.device:
    """Returns the accelerator found by torch, otherwise the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1")
    # On a Mac, processes cannot exchange data on the GPU.
    alone = found is not None and found.type == "mps" and is_launched()
    return torch.device("cpu") if found is None or on_cpu or alone else found


def is_launched() -> bool:
    """Checks whether a launcher started this process, alone or as one of several."""
    return world_size() > 1 or "LOCAL_RANK" in os.environ


def _devices_there() -> list[str]:
    """Returns the names of all available devices."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or (found.type == "mps" and is_launched()):
        return ["cpu"]
    each = range(torch.accelerator.device_count() if found.type == "cuda" else 0)
    return ["cpu", found.type, *(f"cuda:{index}" for index in each)]


def _why_not_there(name: str) -> str | None:
    built_for_gpus = torch.version.cuda is not None or torch.version.hip is not None
    if name.startswith("cuda") and not built_for_gpus:
        return f"a torch built for CUDA; this one is {torch.__version__}"
    return None


def require_attention(attention: Attention, device: torch.device) -> None:
    """Checks that a device supports this attention.

    Raises:
        ConfigError: Flash attention is not installed, or does not support this device.
    """
    if attention != _FLASH:
        return
    if device.type != "cuda":
        raise ConfigError(
            "Flash attention needs a CUDA GPU.",
            key="attention",
            expected=f"auto, sdpa or eager on {device.type}",
            actual=attention,
            hint="omit --attention",
        )
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:  # also if it was built for a different torch
        raise ConfigError(
            "flash-attn is not installed, or was built for a different torch.",
            key="attention",
            actual=error,
            hint="pip install 'mftctl[flash-attn]' --no-build-isolation, or --attention sdpa",
        ) from error


@contextmanager
def using(use: Use) -> Iterator[None]:
    """Context in which these settings are in use and their GPU is the current one."""
    global _in_use
    before, _in_use = _in_use, use
    current = None
    if use.device.index is not None:
        current = torch.accelerator.current_device_index()
        torch.accelerator.set_device_index(use.device.index)
    try:
        yield
    finally:
        _in_use = before
        if current is not None:
            torch.accelerator.set_device_index(current)


def device_name(device: torch.device) -> str:
    """Returns the device's name in torch, followed by the product name if known."""
    product = _product(device)
    return f"{device}: {product}" if product else str(device)


def _product(device: torch.device) -> str:
    """Returns the product name of a device; empty if torch does not provide it."""
    if device.type == "cpu":
        return ""
    name_of = getattr(torch.get_device_module(device.type), "get_device_name", None)
    return "" if name_of is None else str(name_of(device))
