"""The masked optimizer in `transformers.Trainer`: a tiny Llama, accumulation, clipping, schedule and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from mftctl.masking.selection import removed_count
from mftctl.training.updates.masked_optimizer import MaskedOptimizer, UpdateRule
from tests.conftest import build_llama
from tests.training.updates.test_gradient_selection import keep_by_sorting


class MaskedTrainer(Trainer):
    """Wraps the Trainer's own AdamW, and selects entries before gradients are clipped."""

    rule: UpdateRule

    def create_optimizer(self, model: Any = None) -> MaskedOptimizer:
        self.optimizer = MaskedOptimizer(super().create_optimizer(model), self.rule)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        self.optimizer.optimizer.select()
        return super()._clip_grad_norm(model)


class Watch(TrainerCallback):
    """Compares the selection with the full gradient, and the weights after a step with those before."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.before: dict[str, torch.Tensor] = {}
        self.steps: list[dict[str, torch.Tensor]] = []

    def hear_gradients(self, model: torch.nn.Module) -> None:
        def remember(name: str, parameter: torch.Tensor) -> None:
            self.gradients[name] = parameter.grad.clone()

        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda tensor, name=name: remember(name, tensor))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(
            {name: parameter.detach() != self.before[name] for name, parameter in model.named_parameters()}
        )
        self.check(state.global_step)

    def check(self, step: int) -> None:
        """GMT with a ratio of 0.3: exactly the entries selected by sorting the accumulated gradient change."""
        keep = keep_by_sorting([gradient.numpy() for gradient in self.gradients.values()], 0.3, "tensor")
        for (name, gradient), selected in zip(self.gradients.items(), keep, strict=True):
            # Selected entries with zero gradient and no momentum do not move.
            nonzero = gradient != 0
            changed = self.steps[-1][name]
            assert not changed[~torch.from_numpy(selected)].any(), (step, name)
            assert changed[torch.from_numpy(selected) & nonzero].all(), (step, name)


def make_trainer(folder: Path, rule: UpdateRule, watch: TrainerCallback | None = None) -> MaskedTrainer:
    generator = torch.Generator().manual_seed(0)
    records = [{"input_ids": ids, "labels": ids} for ids in torch.randint(6, 100, (24, 12), generator=generator)]
    trainer = MaskedTrainer(
        model=build_llama(layers=2),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            lr_scheduler_type="linear",
            max_grad_norm=0.5,
            weight_decay=0.1,
            save_steps=2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=records,
        callbacks=[] if watch is None else [watch],
    )
    trainer.rule = rule
    trainer.remove_callback(PrinterCallback)
    return trainer


@pytest.mark.slow
def test_exactly_the_selected_entries_change_in_every_step(tmp_path: Path) -> None:
    watch = Watch()
    trainer = make_trainer(tmp_path, UpdateRule("gmt", 0.3), watch)
    watch.hear_gradients(trainer.model)
    trainer.train()
    assert len(watch.steps) == 4
    sizes = [parameter.numel() for parameter in trainer.model.parameters()]
    optimizer = trainer.optimizer.optimizer
    assert optimizer.total_entries == sum(sizes)
    assert optimizer.updated_entries == sum(sizes) - sum(removed_count(size, 0.3) for size in sizes)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [UpdateRule("gmt", 0.3, "global"), UpdateRule("random", 0.3)], ids=["gmt", "random"])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path, rule: UpdateRule) -> None:
    whole, resumed = (make_trainer(tmp_path, rule) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name])
