"""What `mftctl validate` says of a training's memory beforehand."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import LlamaConfig

from mftctl.experiments.training_options import FftOptions, MaskTrainOptions
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
    """The peak on the GPU, in GB, without the CUDA context.

    Args:
        shape: Of the model.
        options: Of the training.
        inputs: Its data.
        layers: That carry a mask.
    """
    if isinstance(options, MaskTrainOptions):
        plan = plan_mask_training(options, layers)
    else:
        plan = plan_fine_tuning(options, seed=0)
    batches = batches_of(options, inputs.train, inputs.validation)
    found = estimate_memory(LlamaConfig(**shape.settings()), plan, batches, process_bytes=0)
    return found.peak_bytes / GB
