"""Which optimizer fine-tuning takes a step with, and what it needs."""

from __future__ import annotations

from typing import Any

import torch
from transformers.training_args import OptimizerNames

from mftctl.errors import ConfigError
from mftctl.experiments.training_options import FftOptions
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
"""Optimizers that make their state for the parameters they are created with, or look at their rows and columns."""


def check_memory_options(options: FftOptions, device: torch.device) -> None:
    """Nothing, if the options that save memory can be had here: on this device, with what is installed.

    Args:
        options: Of the training.
        device: That it will use.

    Raises:
        ConfigError: One of them cannot.
    """
    if options.quantize is not None:
        require_bitsandbytes("fft.quantize", options.quantize)
    if options.has_8bit_moments:
        require_bitsandbytes("fft.optimizer", options.optimizer)
    if options.optimizer == "paged_adamw_8bit" and device.type == "cpu":
        raise ConfigError(
            "Pages of moments go between a GPU and the machine's memory, and there is no GPU.",
            key="fft.optimizer",
            expected="adamw_8bit, or a GPU",
            actual="paged_adamw_8bit on a CPU",
        )
    if not spreads_parameters():
        return
    if options.low_memory or options.has_8bit_moments:
        raise ConfigError(
            "Weights or moments of fewer bits are trained where each process has all of them.",
            key="fft.low_memory" if options.low_memory else "fft.optimizer",
            expected="one process, or recipes/accelerate/ddp.yaml",
            actual="ZeRO or FSDP, which spread them over the processes themselves",
        )
    if under_deepspeed() and options.optimizer in _BY_SHAPE:
        raise ConfigError(
            "DeepSpeed hands parameters to the optimizer as flat tensors, which this one cannot work with.",
            key="fft.optimizer",
            expected="adamw, sgd or rmsprop",
            actual=options.optimizer,
        )


def optimizer_name(options: FftOptions, device: torch.device) -> OptimizerNames:
    """The Trainer's name of the optimizer.

    AdamW on a GPU is fused, which makes no copies of the parameters; where they are spread over processes, DeepSpeed
    and FSDP have ways of their own.
    """
    if options.optimizer == "adamw" and device.type == "cuda" and not spreads_parameters():
        return OptimizerNames("adamw_torch_fused")
    return OptimizerNames(_NAMES[options.optimizer])


def low_memory_optimizer(arguments: Any) -> tuple[type[StochasticAdamW], dict[str, Any]]:
    """The optimizer of weights in bf16, and its settings: those of the Trainer's AdamW.

    Args:
        arguments: `TrainingArguments`.
    """
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    settings = {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}
    return StochasticAdamW, {**settings, "weight_decay": arguments.weight_decay, "seed": arguments.seed}


def forget_8bit_overrides() -> None:
    """Lets go of the embeddings that bitsandbytes was told to keep 32-bit moments for, which it never does itself."""
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    GlobalOptimManager.get_instance().initialize()  # type: ignore[no-untyped-call]
