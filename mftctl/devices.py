"""How a command computes on a GPU: on which, how exactly, and what is said where there is no room on it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import psutil
import torch

from mftctl.config import EvalOptions, FftOptions, MaskTrainOptions, TrainingOptions
from mftctl.errors import ConfigError, DeviceMemoryError, TrainingError
from mftctl.processes import world_size
from mftctl.progress import Listener

if TYPE_CHECKING:
    from mftctl.runs import Run

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WORKSPACES = (":4096:8", ":16:8")
"""With one of these, and no other, cuBLAS adds up in the same order each time."""

_TOGETHER = ("fft", "probe", "mask-train", "eval", "run")
_DETERMINISTIC_ATTENTION = ("sdpa", "eager")
_IN_NO_FIXED_ORDER = re.compile(r"^(\S+) does not have a deterministic implementation")
_ASKED = re.compile(r"Tried to allocate ([\d.]+ \w+)")
_FREE = re.compile(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")


def has_bf16() -> bool:
    """Whether there is a GPU that computes in bf16 itself; others emulate it, more slowly than fp32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def free_memory_bytes(device: torch.device) -> int:
    """The memory that a process can still take: of a GPU what is free, and what torch holds of it without using it.

    Args:
        device: Where.
    """
    if device.type in ("cpu", "mps"):  # which share their memory
        return int(psutil.virtual_memory().available)
    of_device: Any = torch.cuda if device.type == "cuda" else torch.accelerator
    free = torch.cuda.mem_get_info if device.type == "cuda" else torch.accelerator.get_memory_info
    return int(free(device)[0]) + int(of_device.memory_reserved(device)) - int(of_device.memory_allocated(device))


@contextmanager
def device_for(
    run: Run, listener: Listener, *, less_memory: Sequence[str], deterministic: bool = False
) -> Iterator[None]:
    """Inside it, a command computes alike whichever it is, which its run records, and says so where there is no room.

    fp32 is fp32, and not TF32. Of several GPUs one is used, unless several processes were started.

    Args:
        run: Of the command.
        listener: Is told of GPUs that are not used.
        less_memory: Options with which it needs less memory than with those it has.
        deterministic: Whether the same command gives the same bits each time on a GPU.

    Raises:
        ConfigError: Something in the environment is not deterministic.
        DeviceMemoryError: The GPU has no room for it.
    """
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.fp32_precision = "ieee"
    on_gpu = torch.cuda.is_available()
    if deterministic and on_gpu:
        _require_deterministic_environment()
    _compute_deterministically(deterministic and on_gpu)
    run.update(device={"name": _name(), "tf32": False, "deterministic": deterministic})
    if on_gpu and torch.cuda.device_count() > 1 and world_size() == 1:
        listener.note(_one_of(torch.cuda.device_count(), run.record.command if run.record.stage is None else "run"))
    try:
        with gpu_failures(f"working on {run.record.command}"):
            yield
    except DeviceMemoryError as error:
        error.hint = error.hint or f"options that need less memory: {', '.join(less_memory)}"
        raise
    finally:
        _compute_deterministically(False)


@contextmanager
def gpu_failures(doing: str) -> Iterator[None]:
    """Turns what a GPU cannot do into a known failure; the innermost block names what was being done.

    Args:
        doing: Such as `training`.

    Raises:
        DeviceMemoryError: There is no room.
        TrainingError: Something has no deterministic implementation, and one was asked for.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"The GPU ran out of memory while {doing}.", actual=_shortage(str(error))) from error
    except RuntimeError as error:
        operation = _IN_NO_FIXED_ORDER.match(str(error))
        if operation is None:
            raise
        raise TrainingError(
            "An operation of this model has no deterministic implementation.",
            key="deterministic",
            expected="operations that give the same bits each time",
            actual=operation[1],
            hint="leave --deterministic out",
        ) from error


def require_deterministic_attention(model: Any) -> None:
    """Nothing, if the model's attention gives the same bits each time, or nobody asked for that.

    Raises:
        TrainingError: It is computed by something else than torch.
    """
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if torch.are_deterministic_algorithms_enabled() and attention not in _DETERMINISTIC_ATTENTION:
        raise TrainingError(
            "The attention of this model is not known to give the same bits each time.",
            key="deterministic",
            expected=" or ".join(_DETERMINISTIC_ATTENTION),
            actual=attention,
            hint="leave --deterministic out",
        )


def training_with_less_memory(options: TrainingOptions) -> list[str]:
    """The options with which a training needs less memory than with those it has, the cheapest first."""
    found = []
    if options.batch_size > 1:
        smaller = options.batch_size // 2
        accumulated = -(-options.grad_accum_steps * options.batch_size // smaller)
        found.append(f"--batch-size {smaller} --grad-accum {accumulated}")
    if not options.gradient_checkpointing:
        found.append("--gradient-checkpointing")
    if isinstance(options, MaskTrainOptions):
        if not options.low_memory:
            found.append("--low-memory")
        found.append("fewer --layers")
    if isinstance(options, FftOptions) and options.method != "lora":
        found.append("--method lora")
    return [*found, f"--max-length below {options.max_length_tokens}"]


def evaluation_with_less_memory(options: EvalOptions) -> list[str]:
    """The same of an evaluation."""
    found = [] if options.batch_size == 1 or not options.tasks else ["--batch-size 1"]
    if options.generate:
        found.append("--no-generate")
    return [*found, f"--max-length below {options.max_length_tokens}"]


def _name() -> str:
    return f"cuda: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "cpu"


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


def _shortage(message: str) -> str:
    """What was asked for and what was free, from what torch says."""
    asked, free = _ASKED.search(message), _FREE.search(message)
    if asked is None or free is None:
        return message.splitlines()[0]
    return f"{asked[1]} asked for, {free[2]} of {free[1]} free"
