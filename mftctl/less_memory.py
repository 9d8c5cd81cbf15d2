"""The options with which a command needs less memory, where nothing more is known of the model and the data."""

from __future__ import annotations

from mftctl.config import EvalOptions, FftOptions, MaskTrainOptions, TrainingOptions


def training_with_less_memory(options: TrainingOptions) -> list[str]:
    """The options with which a training needs less memory than with those it has, the cheapest first."""
    found = []
    if options.batch_tokens is not None:
        if options.batch_tokens > options.max_length_tokens:
            found.append(f"--batch-tokens {max(options.batch_tokens // 2, options.max_length_tokens)}")
    elif options.batch_size > 1:
        smaller = options.batch_size // 2
        while options.global_batch_size is not None and options.global_batch_size % smaller:
            smaller -= 1
        accumulated = -(-(options.grad_accum_steps or 1) * options.batch_size // smaller)
        steps = "" if options.global_batch_size is not None else f" --grad-accum {accumulated}"
        found.append(f"--batch-size {smaller}{steps}")
    if not options.gradient_checkpointing:
        found.append("--gradient-checkpointing")
    if isinstance(options, MaskTrainOptions):
        if not options.low_memory:
            found.append("--low-memory")
        found.append("fewer --layers")
    if isinstance(options, FftOptions):
        found += _fine_tuning_with_less_memory(options)
    return [*found, f"--max-length below {options.max_length_tokens}"]


def _fine_tuning_with_less_memory(options: FftOptions) -> list[str]:
    """Of fine-tuning alone: all that keeps the method first, and only what goes with its other options."""
    if options.method == "lora":
        return [] if options.quantize else ["--quantize nf4"]
    found = []
    if options.optimizer == "adamw":
        if not options.low_memory and options.precision != "fp32":
            found.append("--low-memory")
        keeps_entries = options.method in ("gmt", "random") and options.unselected == "unchanged"
        if not options.low_memory and not keeps_entries:
            found.append("--optimizer adamw_8bit")
    adapter = "--no-low-memory --method lora" if options.low_memory else "--method lora"
    return [*found, adapter, f"{adapter} --quantize nf4"]


def evaluation_with_less_memory(options: EvalOptions) -> list[str]:
    """The same of an evaluation."""
    found = [] if options.batch_size == 1 or not options.tasks else ["--batch-size 1"]
    if options.generate:
        found.append("--no-generate")
    return [*found, f"--max-length below {options.max_length_tokens}"]
