"""The device of a run: checks, settings and a record of it, and advice when its memory runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from mftctl.errors import ConfigError, DeviceMemoryError
from mftctl.progress import Listener
from mftctl.runtime.compute_settings import Attention, Precision
from mftctl.runtime.devices import Use, device_name, find_device, require_attention, using
from mftctl.runtime.processes import world_size
from mftctl.runtime.torch_failures import gpu_failures

if TYPE_CHECKING:
    from mftctl.experiments.run_folder import Run

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""The only values for which cuBLAS adds in a fixed order."""

_TOGETHER = ("fft", "probe", "mask-train", "eval", "run")
_TESTED = ("cpu", "cuda")
_told_untested: set[str] = set()


@contextmanager
def device_for(
    run: Run,
    listener: Listener,
    *,
    less_memory: Sequence[str],
    deterministic: bool = False,
    device: str = "auto",
    attention: Attention = "auto",
    precision: Precision = "fp32",
) -> Iterator[None]:
    """Context in which a command computes with fixed numerics, recorded in its run, and reports missing memory.

    fp32 means fp32, not TF32. Only one of several GPUs is used unless several processes were started.

    Args:
        run: The run of the command.
        listener: Receives messages about unused GPUs and untested devices.
        less_memory: Options that reduce memory use compared with the current ones.
        deterministic: Whether results must be bit-identical each time on a GPU.
        device: The device from the recipe.
        attention: The attention from the recipe.
        precision: The precision of forward passes; evaluations use the dtype of the weights.

    Raises:
        ConfigError: The device is not available, does not support the requested attention, or the environment is not
            deterministic.
        DeviceMemoryError: The GPU does not have enough memory.
    """
    found = find_device(device)
    require_attention(attention, found)
    if deterministic and found.type != "cpu":
        _require_deterministic_environment()
    with using(Use(found, attention, precision, partial(_record_attention, run))):
        if found.type == "cuda":
            torch.backends.cuda.matmul.fp32_precision = "ieee"
            torch.backends.cudnn.fp32_precision = "ieee"
        run.update(device={"name": device_name(found), "tf32": False, "deterministic": deterministic})
        _tell(found, run.record.command if run.record.stage is None else "run", listener)
        with _working(run.record.command, less_memory, deterministic=deterministic and found.type != "cpu"):
            yield


@contextmanager
def _working(command: str, less_memory: Sequence[str], *, deterministic: bool) -> Iterator[None]:
    """Context for the work itself; ends determinism afterwards."""
    _compute_deterministically(deterministic)
    try:
        with gpu_failures(f"working on {command}"):
            yield
    except DeviceMemoryError as error:
        error.hint = error.hint or f"options that need less memory: {', '.join(less_memory)}"
        raise
    finally:
        _compute_deterministically(False)


def _tell(device: torch.device, command: str, listener: Listener) -> None:
    """Reports untested devices and unused GPUs."""
    if device.type not in _TESTED and device.type not in _told_untested:
        _told_untested.add(device.type)
        listener.warn(f"mftctl is not tested on {device.type}, only on CUDA GPUs and with --device cpu.")
    count = torch.accelerator.device_count() if device.type == "cuda" else 1
    if count > 1 and device.index is None and world_size() == 1:
        listener.note(_one_of(count, command))


def _one_of(count: int, command: str) -> str:
    text = f"{count} GPUs are visible, but a single process uses only the first."
    if command not in _TOGETHER:
        return text
    return f"{text} To use all: mftctl {command} --processes {count} ..."


def _require_deterministic_environment() -> None:
    workspace = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ConfigError(
            "cuBLAS is not configured for deterministic results.",
            key=_WORKSPACE,
            expected=" or ".join(_WORKSPACES),
            actual=workspace,
            hint=f"unset {_WORKSPACE}, or omit --deterministic",
        )
    if world_size() > 1:
        raise ConfigError(
            "Multi-GPU training is not deterministic: gradients are added in varying order.",
            key="deterministic",
            expected="one process",
            actual=f"{world_size()} processes",
            hint="mftctl without accelerate launch or torchrun, or omit --deterministic",
        )


def _compute_deterministically(wanted: bool) -> None:
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = wanted
    # Among torch's attention kernels, only this one has a backward pass that ignores the switch above.
    torch.backends.cuda.enable_cudnn_sdp(not wanted)


def _record_attention(run: Run, attention: str) -> None:
    if run.record.device.get("attention") != attention:
        run.update(device={**run.record.device, "attention": attention})
