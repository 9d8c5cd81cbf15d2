"""Settings that the recipe sections `fft` and `mask_train` share."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mftctl.data.examples import RecordKind
from mftctl.experiments.presets import Objective
from mftctl.experiments.section import Section
from mftctl.runtime.compute_settings import Precision

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
Schedule = Literal["linear", "cosine", "constant", "wsd"]


class TrainingOptions(Section):
    """Training settings shared by `fft` and `mask-train`."""

    objective: Objective = Field(
        "sft",
        description="sft: the loss on answers; dpo: direct preference optimisation, on records of prompt, chosen and "
        "rejected.",
    )
    beta: float | None = Field(
        None, gt=0, description="dpo: how strongly the model is held to the one before training; 0.1 by default."
    )
    length_normalized: bool = Field(
        False,
        description="dpo: divide the log-probability of each answer by its number of tokens (TRL: sigmoid_norm).",
    )
    data_fraction: float = Field(1.0, gt=0, le=1, description="Share of the training data to use.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training data.")
    max_steps: int | None = Field(None, gt=0, description="Stop after this many optimizer steps; overrides epochs.")
    batch_size: int = Field(8, gt=0, description="Records per forward pass on each device.")
    grad_accum_steps: int | None = Field(
        None, gt=0, description="Forward passes per optimizer step on each device; 1 by default."
    )
    global_batch_size: int | None = Field(
        None, gt=0, description="Records per optimizer step over all processes, instead of --grad-accum."
    )
    batch_tokens: int | None = Field(
        None,
        gt=0,
        description="Tokens per forward pass on each device, including padding: groups records of similar length up to "
        "this size, regardless of the batch size; a longer record gets its own pass.",
    )
    max_length_tokens: int = Field(1024, gt=1, description="Longer records are truncated at the end.")
    schedule: Schedule = Field(
        "linear",
        description="Learning rate after the warmup. linear and cosine: decays to 0; constant: does not decay; wsd: "
        "stays constant, then decays linearly to 0 (warmup, stable, decay).",
    )
    warmup_ratio: Share = Field(0.03, description="Share of steps for learning rate warmup.")
    decay_ratio: float = Field(0.2, gt=0, le=1, description="wsd: share of steps for the decay.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip gradients to this norm; 0 disables clipping.")
    precision: Precision = Field("auto", description="auto: bf16 on a GPU that supports it, otherwise fp32.")
    gradient_checkpointing: bool = Field(
        False, description="Save memory by recomputing activations in the backward pass."
    )
    deterministic: bool = Field(
        False, description="Bit-identical results on a GPU, also after --resume; slower. CPU results always are."
    )
    val_steps: int | None = Field(None, gt=0, description="Steps between validations; a tenth of all steps by default.")
    patience: int | None = Field(None, gt=0, description="Stop early after this many validations without improvement.")
    best_by: str = Field(
        "loss",
        min_length=1,
        description="What makes a step the best: the loss on validation records, exact_match of their answers, or the "
        "score of a benchmark.",
    )
    retain_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the KL divergence to the model before fine-tuning on --retain data, added to the loss; "
        "0 only measures.",
    )
    average: Literal["none", "ema"] = Field(
        "none",
        description="ema: also keep running averages of what is trained, one per horizon; each is validated beside the "
        "current values, and the one with the lowest loss is kept.",
    )
    average_horizons: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(
        (0.1, 0.3, 1.0),
        strict=False,
        min_length=1,
        max_length=4,
        description="Horizons of the averages as shares of all steps; each takes as much memory as what is trained.",
    )
    average_device: Literal["device", "cpu"] = Field(
        "device", description="Memory that holds the averages: that of the training's device, or main memory."
    )
    benchmark_every: int | None = Field(
        None, gt=0, description="Measure benchmarks and test data every N steps, at the start and at the end."
    )
    benchmark_limit: int = Field(
        100, gt=0, description="--benchmark-every: use only the first N problems or records of each."
    )

    @model_validator(mode="after")
    def _objective_has_its_options(self) -> Self:
        if self.objective == "sft" and self.beta is not None:
            raise ValueError("beta applies only to the objective dpo; the objective is sft")
        if self.objective == "sft" and self.length_normalized:
            raise ValueError("length_normalized applies only to the objective dpo; the objective is sft")
        if self.objective == "dpo" and self.best_by == "exact_match":
            raise ValueError(
                "best_by: exact_match needs reference answers; with the objective dpo use loss or a benchmark"
            )
        return self

    @property
    def record_kind(self) -> RecordKind:
        """Kind of the training and validation records."""
        return "preferences" if self.objective == "dpo" else "answers"

    @model_validator(mode="after")
    def _horizons_differ(self) -> Self:
        if len(set(self.average_horizons)) < len(self.average_horizons):
            raise ValueError("average_horizons must differ from each other")
        return self

    @model_validator(mode="after")
    def _one_step_size(self) -> Self:
        if self.global_batch_size is None:
            return self
        if self.grad_accum_steps is not None:
            raise ValueError("give either global_batch_size or grad_accum_steps, not both")
        if self.batch_tokens is None and self.global_batch_size % self.batch_size:
            raise ValueError(
                f"global_batch_size must be a multiple of batch_size; {self.global_batch_size} is not a "
                f"multiple of {self.batch_size} (not required with batch_tokens)"
            )
        return self
