"""What `mftctl validate` says of a training's memory beforehand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from transformers import LlamaConfig

from mftctl.config import FftOptions, MaskTrainOptions
from mftctl.planning import memory, preparing
from mftctl.planning.memory import estimate_memory, largest_batches
from mftctl.planning.preparing import plan_fine_tuning, plan_mask_training
from mftctl.preparation import TrainingInputs
from scripts.gpu_check.measuring import GB
from scripts.gpu_check.scale import Shape


def estimated_peak_gb(
    shape: Shape,
    options: FftOptions | MaskTrainOptions,
    inputs: TrainingInputs,
    layers: Sequence[int] = (),
    *,
    emulated: bool,
) -> float:
    """The peak on the GPU, in GB, without the CUDA context.

    Args:
        shape: Of the model.
        options: Of the training.
        inputs: Its data.
        layers: That carry a mask.
        emulated: Whether the GPU is emulated, which has no tensors without data; the estimate is then that of a CPU.
    """
    with _on_cpu() if emulated else contextlib.nullcontext():
        if isinstance(options, MaskTrainOptions):
            plan = plan_mask_training(options, layers)
        else:
            plan = plan_fine_tuning(options, seed=0)
        batches = largest_batches(inputs.train, inputs.validation, options.batch_size)
        found = estimate_memory(LlamaConfig(**shape.settings()), plan, batches, process_bytes=0)
    return found.peak_bytes / GB


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in (memory, preparing):
            stack.enter_context(mock.patch.object(module, "best_device", return_value=torch.device("cpu")))
        yield
