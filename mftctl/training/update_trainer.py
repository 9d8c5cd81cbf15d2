"""Trainer for fine-tuning, which updates all weights or those selected at each step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from mftctl.masking.checkpoints.adapter_saving import without_lookup
from mftctl.masking.checkpoints.load import load_model
from mftctl.masking.checkpoints.outlines import StoredWeights
from mftctl.masking.checkpoints.tensors import tensor_index
from mftctl.runtime.processes import is_first
from mftctl.training.loop import SftTrainer
from mftctl.training.sharding.sharded_model import ShardedModel, model_state, put_model, whole_model
from mftctl.training.updates.excluded import Excluded, excluded_parameters
from mftctl.training.updates.masked_optimizer import STEPS_KEY, MaskedOptimizer, UpdateRule

if TYPE_CHECKING:
    from peft import PeftModel


class UpdateTrainer(SftTrainer):
    """Trains all trainable weights, or those that a rule selects at each step.

    Attributes:
        rule: Selects the entries to update; None updates all.
        exclude: Parameters that the rule does not apply to.
    """

    rule: UpdateRule | None = None
    exclude: Sequence[Excluded] = ()
    _choosing: MaskedOptimizer | None = None

    def trained_model(self) -> PreTrainedModel | PeftModel | None:
        """The trained model in the first process; None in the others."""
        model: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        if self.sharded_model is not None:
            return whole_model(self.sharded_model, model)
        return model if is_first() else None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, wrapped by the rule if there is one."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if self.rule is not None and self._choosing is None:
            self._choosing = MaskedOptimizer(optimizer, self.rule, self._excluded())
            self.optimizer = self._choosing
        return self._choosing or optimizer

    def before_step(self) -> None:
        """Selects the entries under DeepSpeed and clips the gradient that will be used."""
        self._choose()
        super().before_step()

    def optimizer_state(self, sharded_model: ShardedModel) -> dict[str, Any]:
        """The optimizer's state, including what a masked optimizer adds to it."""
        steps = {} if self._choosing is None else {STEPS_KEY: self.state.global_step}
        return {**super().optimizer_state(sharded_model), **steps}

    def _excluded(self) -> Collection[torch.nn.Parameter]:
        """The current parameters that the rule does not apply to; DeepSpeed and FSDP replace parameters."""
        return excluded_parameters(self.accelerator.unwrap_model(self.model), self.exclude) if self.exclude else ()

    def _choose(self) -> None:
        if self._choosing is not None and self.sharded_model is not None:
            chosen = self.sharded_model.select(self._choosing.rule, self.state.global_step, self._excluded())
            self._choosing.give(chosen)
        elif self._choosing is not None:
            self._choosing.select()

    def _clip_grad_norm(self, model: Any) -> Any:
        # The norm of the gradient that will be used.
        if not self.is_deepspeed_enabled:
            self._choose()
        return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and not self.is_deepspeed_enabled:  # nothing was clipped
            self._choose()
        return super()._get_grad_norm(model, grad_norm)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.sharded_model is not None:
            state_dict = model_state(self.sharded_model, cast("PreTrainedModel", self.model))
        with without_lookup(cast("PreTrainedModel | PeftModel", self.model)):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.sharded_model is None:
            if not self._put_renamed(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            stored = _weights(Path(resume_from_checkpoint)) if is_first() else {}
            put_model(self.sharded_model, cast("PreTrainedModel", self.model), stored)

    def _load_best_model(self) -> None:
        if self.sharded_model is None:
            if not self._put_renamed(Path(str(self.state.best_model_checkpoint))):
                super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _put_renamed(self, folder: Path) -> bool:
        """Loads weights that are stored under other names than in memory; returns False if all have the same name.

        The Trainer itself leaves out weights whose names it does not know, such as those of fused experts and of
        vision-language models.
        """
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PreTrainedModel):
            return False  # an adapter, whose names are the same
        state: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        if all(name in state for name in tensor_index(folder)):
            return False
        stored = StoredWeights(folder, model)
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(stored.rows(name))
        return True


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of a checkpoint under the model's own names."""
    return dict(load_model(folder, dtype=torch.float32, device=torch.device("cpu")).named_parameters())
