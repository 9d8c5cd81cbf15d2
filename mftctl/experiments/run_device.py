"""The device of a run: put in use, recorded, and its failures explained."""

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
"""With one of these, and no other, cuBLAS adds up in the same order each time."""

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
    """Inside it, a command computes alike whichever it is, which its run records, and says so where there is no room.

    fp32 is fp32, and not TF32. Of several GPUs one is used, unless several processes were started.

    Args:
        run: Of the command.
        listener: Is told of GPUs that are not used, and of a device on which nothing was tested.
        less_memory: Options with which it needs less memory than with those it has.
        deterministic: Whether the same command gives the same bits each time on a GPU.
        device: From the recipe.
        attention: From the recipe.
        precision: Of forward passes; those of an evaluation are in the dtype of the weights.

    Raises:
        ConfigError: The device is not there, cannot compute the attention asked for, or something in the environment
            is not deterministic.
        DeviceMemoryError: The GPU has no room for it.
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
    """The work itself, after which nothing is deterministic any more."""
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
    """What there is to know about a device."""
    if device.type not in _TESTED and device.type not in _told_untested:
        _told_untested.add(device.type)
        listener.warn(f"mftctl is not tested on {device.type}; what was is --device cpu, and GPUs of CUDA.")
    count = torch.accelerator.device_count() if device.type == "cuda" else 1
    if count > 1 and device.index is None and world_size() == 1:
        listener.note(_one_of(count, command))


def _one_of(count: int, command: str) -> str:
    text = f"{count} GPUs are visible, and one process uses the first alone."
    if command not in _TOGETHER:
        return text
    return f"{text} On all of them: mftctl {command} --processes {count} ..."


def _require_deterministic_environment() -> None:
    workspace = os.environ.setdefault(_WORKSPACE, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ConfigError(
            "cuBLAS is set to add up in no fixed order.",
            key=_WORKSPACE,
            expected=" or ".join(_WORKSPACES),
            actual=workspace,
            hint=f"unset {_WORKSPACE}, or leave --deterministic out",
        )
    if world_size() > 1:
        raise ConfigError(
            "Several processes on GPUs add up gradients in no fixed order.",
            key="deterministic",
            expected="one process",
            actual=f"{world_size()} processes",
            hint="mftctl without accelerate launch or torchrun, or leave --deterministic out",
        )


def _compute_deterministically(wanted: bool) -> None:
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = wanted
    # Of torch's kernels for attention this one alone has a backward pass that does not heed the switch above.
    torch.backends.cuda.enable_cudnn_sdp(not wanted)


def _record_attention(run: Run, attention: str) -> None:
    if run.record.device.get("attention") != attention:
        run.update(device={**run.record.device, "attention": attention})
