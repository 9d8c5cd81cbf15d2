"""The part of the trainer that measures retained data and adds the divergence on it to the loss."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from mftctl.training.averaging_trainer import AveragingTrainer
from mftctl.training.retention import Retention


class RetainingTrainer(AveragingTrainer):
    """A Trainer that can keep a model close to the model before fine-tuning on data of another domain.

    Attributes:
        retention: Measures the retained data; None without such data.
        divergence: Divergence at the last step, per answer token of the retained data; None before the first.
    """

    retention: Retention | None = None
    divergence: float | None = None
    _diverged_step: int | None = None

    def retained_loss(self) -> float | None:
        """The loss of the model as it is on the retained data; None without such data."""
        if self.retention is None:
            return None
        model: PreTrainedModel = self.accelerator.unwrap_model(self.model)
        return self.retention.loss(model)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Runs the backward passes of a micro-batch; before those of a step, also that of its retained records."""
        step = self.state.global_step
        if self.retention is not None and self.retention.weight > 0 and self._diverged_step != step:
            self._diverged_step = step
            self._add_divergence(model, self.retention, step)
        return super().training_step(model, inputs, num_items_in_batch)

    def _add_divergence(self, model: Any, retention: Retention, number: int) -> None:
        """Adds the gradient of the weighted divergence; processes that train together average it with the others."""
        model.train()
        plain: PreTrainedModel = self.accelerator.unwrap_model(model)
        step = retention.step(number, retention.most_answer_tokens(plain))
        total = torch.zeros((), device=self.args.device)
        with self.accelerator.no_sync(model):
            for records in step.passes:
                batch = retention.batch(records, self.args.device)
                with self.compute_loss_context_manager():
                    divergence = retention.divergence(model, plain, batch) / step.answer_tokens
                (retention.weight * self.accelerator.num_processes * divergence).backward()
                total += divergence.detach()
        self.divergence = float(self.accelerator.reduce(total, "sum"))
