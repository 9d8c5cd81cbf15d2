"""Options that reduce a command's memory use, when nothing more is known about model and data."""

from __future__ import annotations

from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.recipe import EvalOptions
from mftctl.experiments.training_options import TrainingOptions
from mftctl.training.schedule import records_per_step, smaller_batch_sizes

_KEYS = {
    "--batch-tokens ": "--set mask_train.batch_tokens=",
    "--batch-size ": "--set mask_train.batch_size=",
    "--grad-accum ": "--set mask_train.grad_accum_steps=",
    "--gradient-checkpointing": "--set mask_train.gradient_checkpointing=true",
    "--average-device cpu": "--set mask_train.average_device=cpu",
    "--retain-weight 0": "--set mask_train.retain_weight=0",
    "--max-length below ": "mask_train.max_length_tokens below ",
    "fewer --layers": "smaller --groups",
}
"""Settings for which `probe` has no options."""


def training_with_less_memory(options: TrainingOptions) -> list[str]:
    """Returns options that reduce the memory of training compared with the current ones, cheapest first."""
    found = []
    if options.batch_tokens is not None:
        if options.batch_tokens > options.max_length_tokens:
            found.append(f"--batch-tokens {max(options.batch_tokens // 2, options.max_length_tokens)}")
    elif options.batch_size > 1:
        smaller = smaller_batch_sizes(options)[0]
        steps = "" if options.global_batch_size else f" --grad-accum {records_per_step(options) // smaller}"
        found.append(f"--batch-size {smaller}{steps}")
    if not options.gradient_checkpointing:
        found.append("--gradient-checkpointing")
    if options.average != "none" and options.average_device == "device":
        found.append("--average-device cpu")
    if options.retain_weight > 0:
        found.append("--retain-weight 0")
    if isinstance(options, MaskTrainOptions):
        if not options.low_memory:
            found.append("--low-memory")
        found.append("fewer --layers")
    if isinstance(options, FftOptions):
        found += _fine_tuning_with_less_memory(options)
    return [*found, f"--max-length below {options.max_length_tokens}"]


def probing_with_less_memory(options: MaskTrainOptions) -> list[str]:
    """Like `training_with_less_memory`, in the syntax of `probe`."""
    found = []
    for text in training_with_less_memory(options):
        for flag, setting in _KEYS.items():
            text = text.replace(flag, setting)
        found.append(text)
    return found


def _fine_tuning_with_less_memory(options: FftOptions) -> list[str]:
    """Returns such options for fine-tuning: those that keep the method first, and only compatible ones."""
    if options.method == "lora":
        return [] if options.quantize or options.lora_experts else ["--quantize nf4"]
    found = []
    if options.optimizer == "adamw" and not options.trains_adapter:
        if not options.low_memory and options.precision != "fp32":
            found.append("--low-memory")
        keeps_entries = options.method in ("gmt", "random") and options.unselected == "unchanged"
        if not options.low_memory and not keeps_entries:
            found.append("--optimizer adamw_8bit")
    if options.support is not None or "ratio" in options.given():  # not available for LoRA
        return found
    adapter = "--no-low-memory --method lora" if options.low_memory else "--method lora"
    return [*found, adapter, f"{adapter} --quantize nf4"]


def evaluation_with_less_memory(options: EvalOptions) -> list[str]:
    """Returns options that reduce the memory of an evaluation."""
    found = [] if options.batch_size == 1 or not options.tasks else ["--batch-size 1"]
    if options.generate:
        found.append("--no-generate")
    return [*found, f"--max-length below {options.max_length_tokens}"]
