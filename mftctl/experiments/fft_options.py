"""The recipe section `fft`: methods and settings of fine-tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mftctl.experiments.fft_checks import fft_problem
from mftctl.experiments.presets import DEFAULT_RATES, LearnFrom, fft_in_force, without_nulls
from mftctl.experiments.training_options import Share, TrainingOptions


class FftOptions(TrainingOptions):
    """Settings for fine-tuning all weights, or those selected by a method."""

    method: Literal["full", "lora", "gmt", "hft", "random", "shira", "supertuning"] = Field(
        "full",
        description="full: all weights; gmt: the weights with the largest gradients at each step; random: random "
        "weights at each step; hft: half of the parameters; lora: a low-rank adapter; shira: an adapter of random "
        "weights; supertuning: an adapter of the largest weights.",
    )
    ratio: Share | None = Field(
        None,
        description="gmt and random: share of weights not updated in a step, chosen again at each step; 0.2 by "
        "default. supertuning: share of weights of each projection that are never updated; 0.99 by default.",
    )
    support: str | None = Field(
        None, min_length=1, description="shira and supertuning: a mask file; train the weights that it keeps."
    )
    scope: Literal["tensor", "global"] = Field(
        "tensor", description="gmt and random: apply the ratio to each tensor, or to all weights together."
    )
    unselected: Literal["unchanged", "momentum"] = Field(
        "unchanged",
        description="gmt and random: keep unselected weights unchanged, or let optimizer momentum move them.",
    )
    exclude: tuple[Literal["embeddings", "head"], ...] = Field(
        (),
        strict=False,
        description="gmt and random: parts always updated in full: embeddings, head or both; if tied, either word "
        "means the shared tensor.",
    )
    learn_from: LearnFrom = Field(
        "all",
        description="Training records to use: all; unseen: those not seen in earlier fine-tuning of the model; auto: "
        "unseen if there are at least 64, otherwise all.",
    )
    lora_rank: int = Field(
        16,
        gt=0,
        description="lora: rank of the adapter. shira: trains as many weights as a LoRA adapter of this rank has, "
        "rank * (inputs + outputs) of each projection.",
    )
    lora_alpha: int = Field(32, gt=0, description="lora: the adapter is scaled by alpha / rank.")
    lora_dropout: Share = Field(0.0, description="lora: dropout before the adapter.")
    lora_experts: bool = Field(False, description="lora: also adapt experts that are stored in one tensor per layer.")
    merge: bool = Field(
        False, description="lora, shira and supertuning: write the merged model instead of the adapter."
    )
    quantize: Literal["nf4"] | None = Field(
        None, description="lora: load the base model in 4 bits per weight (QLoRA); needs bitsandbytes."
    )
    optimizer: Literal["adamw", "sgd", "rmsprop", "adagrad", "adafactor", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="adamw, sgd, rmsprop, adagrad, adafactor; adamw_8bit and paged_adamw_8bit (8-bit moments) need "
        "bitsandbytes.",
    )
    low_memory: bool = Field(
        False,
        description="Weights, gradients and moments in stochastically rounded bf16: 8 bytes per weight, not 16.",
    )
    learning_rate: float = Field(
        DEFAULT_RATES["sft"], gt=0, description="Peak learning rate; 1e-6 by default for the objective dpo."
    )
    keep: Literal["best", "last"] = Field(
        "best", description="Checkpoint to keep. best: the one with the lowest validation loss."
    )
    save_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Data type of saved weights; auto: that of the initial checkpoint."
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_unset(cls, document: object) -> object:
        return without_nulls("fft", document)

    @model_validator(mode="after")
    def _goes_together(self) -> FftOptions:
        problem = fft_problem(self)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _settle(self) -> FftOptions:
        """Fills in options left unset, without marking them as given."""
        self.__dict__.update(fft_in_force(self.given(), self.method, self.objective))
        return self

    @property
    def trains_adapter(self) -> bool:
        """True if the weights stay frozen and an adapter is trained."""
        return self.method == "lora" or self.trains_positions

    @property
    def trains_positions(self) -> bool:
        """True for adapters that consist of changes to individual weights, chosen before training."""
        return self.method in ("shira", "supertuning")

    @property
    def has_8bit_moments(self) -> bool:
        """True for the optimizers of bitsandbytes."""
        return self.optimizer in ("adamw_8bit", "paged_adamw_8bit")
