"""The optimizers for fine-tuning and their requirements."""

from __future__ import annotations

from typing import Any

import torch
from transformers.training_args import OptimizerNames

from mftctl.errors import ConfigError
from mftctl.experiments.fft_options import FftOptions
from mftctl.masking.checkpoints.quantization import require_bitsandbytes
from mftctl.runtime.processes import spreads_parameters, under_deepspeed
from mftctl.training.updates.stochastic_adamw import StochasticAdamW

_NAMES = {
    "adamw": "adamw_torch",
    "sgd": "sgd",
    "rmsprop": "rmsprop",
    "adagrad": "adagrad",
    "adafactor": "adafactor",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
_BY_SHAPE = ("adagrad", "adafactor")
"""Optimizers that create state on construction or depend on rows and columns of parameters."""


def check_memory_options(options: FftOptions, device: torch.device) -> None:
    """Checks that the memory-saving options are available with this device and the installed packages.

    Args:
        options: Options of the training.
        device: The training's device.

    Raises:
        ConfigError: An option is not available.
    """
    if options.quantize is not None:
        require_bitsandbytes("fft.quantize", options.quantize)
    if options.has_8bit_moments:
        require_bitsandbytes("fft.optimizer", options.optimizer)
    if options.optimizer == "paged_adamw_8bit" and device.type == "cpu":
        raise ConfigError(
            "A paged optimizer moves moments between GPU and main memory, but there is no GPU.",
            key="fft.optimizer",
            expected="adamw_8bit, or a GPU",
            actual="paged_adamw_8bit on a CPU",
        )
    if not spreads_parameters():
        return
    if options.low_memory or options.has_8bit_moments:
        raise ConfigError(
            "Low-precision weights or moments require all of them in each process.",
            key="fft.low_memory" if options.low_memory else "fft.optimizer",
            expected="one process, or recipes/accelerate/ddp.yaml",
            actual="ZeRO or FSDP, which shard them",
        )
    if under_deepspeed() and options.optimizer in _BY_SHAPE:
        raise ConfigError(
            "DeepSpeed passes flat tensors to the optimizer, which this optimizer does not support.",
            key="fft.optimizer",
            expected="adamw, sgd or rmsprop",
            actual=options.optimizer,
        )


def optimizer_name(options: FftOptions, device: torch.device) -> OptimizerNames:
    """The Trainer's name for the optimizer.

    On a GPU, AdamW is fused, which avoids copies of the parameters; if they are sharded, DeepSpeed and FSDP use their
    own implementations.
    """
    if options.optimizer == "adamw" and device.type == "cuda" and not spreads_parameters():
        return OptimizerNames("adamw_torch_fused")
    return OptimizerNames(_NAMES[options.optimizer])


def low_memory_optimizer(arguments: Any) -> tuple[type[StochasticAdamW], dict[str, Any]]:
    """The optimizer for weights in bf16, with the settings of the Trainer's AdamW.

    Args:
        arguments: `TrainingArguments`.
    """
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    settings = {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}
    return StochasticAdamW, {**settings, "weight_decay": arguments.weight_decay, "seed": arguments.seed}


def forget_8bit_overrides() -> None:
    """Releases the embeddings registered with bitsandbytes for 32-bit moments, which it never does itself."""
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()  # type: ignore[no-untyped-call]
