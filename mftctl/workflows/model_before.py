"""The model before fine-tuning, whose weights a mask of kind `delta` returns to."""

from __future__ import annotations

from mftctl.errors import ConfigError
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.model_source import ModelSource, known_base
from mftctl.runtime.process_group import shares_weights


def model_before(options: MaskTrainOptions, source: ModelSource) -> str:
    """The model before fine-tuning: given, or that of the run that fine-tuned the model.

    Args:
        options: Options of a delta mask.
        source: The fine-tuned model.

    Raises:
        ConfigError: The model before fine-tuning is unknown.
    """
    what = "The drop method" if options.method == "drop" else "A delta mask"
    return known_base(source, options.base, key="mask_train.base", what=what)


def model_before_measured(options: MaskTrainOptions, source: ModelSource) -> str | None:
    """The same for a mask that is measured on the model; None for a weight mask.

    Raises:
        ConfigError: The model before fine-tuning is unknown, or the processes share their weights.
    """
    if options.kind == "weight":
        return None
    if shares_weights():
        raise ConfigError(
            "A delta mask needs whole weights in each process.",
            key="mask_train.kind",
            expected="one process, or recipes/accelerate/ddp.yaml or zero2.yaml",
            actual="ZeRO-3 or FSDP, which shard the weights",
            hint="--shard ddp or zero2, or --kind weight",
        )
    return model_before(options, source)
