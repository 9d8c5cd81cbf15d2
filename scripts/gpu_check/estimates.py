"""Memory estimates of `mftctl validate` for a training run."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlamaConfig

from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.training.inputs import TrainingInputs
from mftctl.workflows.planning.batches import batches_of
from mftctl.workflows.planning.memory import estimate_memory
from mftctl.workflows.planning.training_setup import plan_fine_tuning, plan_mask_training
from scripts.gpu_check.measuring import GB
from scripts.gpu_check.scale import Shape


def estimated_peak_gb(
    shape: Shape,
    options: FftOptions | MaskTrainOptions,
    inputs: TrainingInputs,
    layers: Sequence[int] = (),
) -> float:
    """The estimated peak on the GPU, in GB, without the CUDA context.

    Args:
        shape: Shape of the model.
        options: Training options.
        inputs: Training data.
        layers: Masked layers.
    """
    if isinstance(options, MaskTrainOptions):
        plan = plan_mask_training(options, layers)
    else:
        plan = plan_fine_tuning(options, seed=0)
    batches = batches_of(options, inputs.train, inputs.validation)
    found = estimate_memory(LlamaConfig(**shape.settings()), plan, batches, process_bytes=0)
    return found.peak_bytes / GB
