"""New low-rank adapters (LoRA) through peft."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D

from mftctl.errors import ConfigError
from mftctl.experiments.fft_options import FftOptions
from mftctl.masking.targets import find_targets, linear_projections


def add_lora(model: PreTrainedModel, options: FftOptions, *, seed: int) -> PeftModel:
    """Adds a new adapter to every attention and MLP projection; only the adapter is trainable.

    Fused experts get one only with `lora_experts`: of the given rank for each expert, added to the weights, which costs
    a copy of all experts of a layer in memory.

    Args:
        model: A whole model; modified in place.
        options: Rank, scale, dropout and whether experts are adapted.
        seed: Decides the initial values of the adapter.

    Raises:
        ConfigError: Experts are to be adapted, and the model has no fused ones.

    Source: MFT, section 3.1, baseline 3 (LoRA).
    """
    projections = linear_projections(model)
    experts = _experts(model) if options.lora_experts else []
    set_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=[name for name, _ in projections],
        target_parameters=experts or None,
        fan_in_fan_out=isinstance(projections[0][1], Conv1D),
    )
    return get_peft_model(model, config)


def _experts(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold fused experts.

    Raises:
        ConfigError: There are none.
    """
    found = {target.fused.parameter: None for target in find_targets(model) if target.fused is not None}
    if not found:
        raise ConfigError(
            "The model has no fused experts to adapt; experts that are linear layers are always adapted.",
            key="fft.lora_experts",
            expected="a model with experts that are stored in one tensor per layer",
            actual=model.config.model_type,
            hint="--set fft.lora_experts=false",
        )
    return list(found)
