"""Gradients of the loss at the unmasked model for the weights that may carry a mask, from one pass over the data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel

from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.masking.targets import MaskTarget
from mftctl.progress import Listener
from mftctl.runtime.torch_failures import gpu_failures
from mftctl.training.gradient_pass import accumulated_gradients
from mftctl.training.inputs import TrainingInputs


def mean_gradients(
    model: PreTrainedModel,
    targets: Sequence[MaskTarget],
    options: MaskTrainOptions,
    inputs: TrainingInputs,
    listener: Listener,
) -> dict[Parameter, torch.Tensor]:
    """The fp32 gradient of the loss per answer token over all training records, for each parameter with a target.

    Several processes share the batches.

    Args:
        model: Frozen and without masks; it is left unchanged.
        targets: The projections.
        options: Sizes of the batches, and whether activations are recomputed.
        inputs: The data.
        listener: Receives progress updates.

    Raises:
        DeviceMemoryError: The GPU runs out of memory.
    """
    with gpu_failures("computing gradients"):
        return accumulated_gradients(model, [parameter_of(target) for target in targets], options, inputs, listener)


def parameter_of(target: MaskTarget) -> Parameter:
    """The parameter that contains the target's weight."""
    return target.module.get_parameter(target.parameter)
