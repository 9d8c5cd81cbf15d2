"""The part of the trainer that handles parameters sharded by DeepSpeed's ZeRO or FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from mftctl.masking.checkpoints.outlines import Rows
from mftctl.runtime.process_group import import_deepspeed, wait_for_all
from mftctl.training.sharding.fsdp import FsdpModel, shard_outline
from mftctl.training.sharding.sharded_model import ShardedModel
from mftctl.training.sharding.zero import SteppingEngine, ZeroModel, check_plan, partition_outline


class ShardedTrainer(Trainer):
    """A Trainer whose checkpoints are whole, like those of a single process, however the parameters are sharded.

    Subclasses save and load the trained parameters (`_save`, `_load_from_checkpoint`, `_load_best_model`).

    Attributes:
        sharded_model: The sharded parameters; None where each process holds all of them, and before training.
        exact_norm: Whether DeepSpeed clips gradients by exactly the norm that a single process would compute; this
            gathers all gradients once per step.
        rows: Source of the values for a model with parameters on the meta device; None for any other model.
    """

    sharded_model: ShardedModel | None = None
    exact_norm = True
    rows: Rows | None = None
    _grad_norm: float | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        import_deepspeed()
        super().__init__(*arguments, **options)

    def before_step(self) -> None:
        """Called by DeepSpeed's engine before its step, when all gradients are available."""
        if isinstance(self.sharded_model, ZeroModel) and self.exact_norm:
            model = cast("torch.nn.Module", self.model)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            self._grad_norm = self.sharded_model.clip(trained, self.args.max_grad_norm)

    def after_spreading(self) -> None:
        """Called once `sharded_model` is set, before a checkpoint is loaded."""

    def optimizer_state(self, sharded_model: ShardedModel) -> dict[str, Any]:
        """The optimizer's state for a checkpoint, in the first process; must be called in all processes at once."""
        return sharded_model.state_dict()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the trained parameters."""
        if self.sharded_model is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir)
        # One process writes, while the Trainer continues to a barrier or collective that has a timeout.
        wait_for_all()

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[no-untyped-call]
        if self.is_deepspeed_enabled:
            self._plan()
        spread = None if self.rows is None else self._spread(self.rows)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]
        if spread is not None:
            for group, parameters in zip(cast(Any, self.optimizer).param_groups, spread, strict=True):
                group["params"] = parameters
        if self.is_deepspeed_enabled:
            # Models loaded from now on are not sharded.
            unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
            self.sharded_model = ZeroModel(self.deepspeed)
            self.accelerator.deepspeed_engine_wrapped = SteppingEngine(self.deepspeed, self.before_step)
        else:
            self.sharded_model = FsdpModel(cast(Any, self.optimizer).optimizer, cast("torch.nn.Module", self.model))
        self.after_spreading()
        if resume_from_checkpoint is not None:
            self._load_from_checkpoint(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _spread(self, rows: Rows) -> list[list[torch.nn.Parameter]] | None:
        """Shards a model without values; for FSDP2, returns the optimizer's final parameters by group.

        accelerate would look them up by address, which empty shards do not have.
        """
        model = cast("torch.nn.Module", self.model)
        if self.is_deepspeed_enabled:
            partition_outline(
                model, self.accelerator.state.deepspeed_plugin.hf_ds_config.config["zero_optimization"], rows
            )
            return None
        shard_outline(self.accelerator, model, rows)
        return [list(group["params"]) for group in self.create_optimizer().param_groups]

    def _plan(self) -> None:
        """Sets what DeepSpeed's configuration leaves unset."""
        plugin = self.accelerator.state.deepspeed_plugin
        check_plan(plugin)
        config = plugin.hf_ds_config.config
        if self.exact_norm:
            config["gradient_clipping"] = 0.0
        # By default every tensor of fewer than 100,000 entries stays whole; "auto" scales this with the model.
        config["zero_optimization"].setdefault("stage3_param_persistence_threshold", "auto")

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self._grad_norm is not None:
            return self._grad_norm
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharded_model is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.optimizer_state(self.sharded_model)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(cast(Any, self.lr_scheduler).state_dict(), Path(output_dir) / SCHEDULER_NAME)
        wait_for_all()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.sharded_model is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        self.sharded_model.load_state_dict(torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True))
        cast(Any, self.lr_scheduler).load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME))
