"""The trainer of scores: AdamW, and a count of flipped mask entries at each validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mftctl.data.encoding import Encoded
from mftctl.errors import ConfigError
from mftctl.evaluation.losses import RecordLoss, mean_loss
from mftctl.experiments.results import Rewards, Score
from mftctl.masking.experts import MaskedPart
from mftctl.masking.full_tensor import whole, whole_shape
from mftctl.masking.layers import MaskedLinear, masked_layers, share_weights, unmasked
from mftctl.masking.mask_file.codecs import Packed
from mftctl.training.candidates import RANK, Candidate
from mftctl.training.loop import SftTrainer
from mftctl.training.updates.stochastic_adamw import StochasticAdamW

_SCORES_FILE = "scores.safetensors"
_COUNTED = "counted."


class ScoreTrainer(SftTrainer):
    """Trains scores with AdamW, with a learning rate per tensor and checkpoints without the frozen weights.

    The mask of the initial scores is among the candidates for the best one.

    Attributes:
        learning_rates: The peak learning rate of each masked module, by its name.
        epsilon: Epsilon of AdamW.
        known_start_loss: The validation loss of the initial scores; None if it has yet to be measured.
        known_start_score: The score with them, if a score decides and the loss is known.
        known_start_rewards: The rewards with them, if the records are preferences and the loss is known.
        low_memory: Whether scores and moments are kept in bf16 and no masked weights are cached.
        counted: The mask of each module at the last validation, as stored: packed bits, or the codes of a soft mask.
        start_masks: The masks of the initial scores; for a model without values, known once training has begun.
        unmasked_losses: Unmasked losses of the validation records, for such a model.
        unmasked_retained_loss: Unmasked loss on the retained data, if there is any; for such a model, known as above.
    """

    start_masks: dict[str, Packed]
    unmasked_losses: Sequence[RecordLoss] = ()
    unmasked_retained_loss: float | None = None

    learning_rates: Mapping[str, float]
    epsilon: float
    known_start_loss: float | None
    known_start_score: Score | None = None
    known_start_rewards: Rewards | None = None
    low_memory: bool
    counted: dict[str, Packed]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sampler.same_batches = True  # so that the output of frozen layers for a batch is valid in all epochs

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the scores, with one parameter group per learning rate."""
        if self.optimizer is None:
            groups: dict[float, list[torch.nn.Parameter]] = {}
            for name, module in self.masked().items():
                groups.setdefault(self.learning_rates[name], []).append(module.scores)
            rated = [{"params": scores, "lr": rate} for rate, scores in groups.items()]
            settings: dict[str, Any] = {"eps": self.epsilon, "weight_decay": self.args.weight_decay}
            if self.low_memory:
                self._require_whole()
                self.optimizer = StochasticAdamW(rated, seed=self.args.seed, **settings)
            else:
                # On a GPU, torch would otherwise copy all scores in each step.
                self.optimizer = torch.optim.AdamW(rated, fused=self.args.device.type == "cuda", **settings)
        return self.optimizer

    def _require_whole(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError(
                "Training scores in bf16 requires all scores in each process.",
                key="mask_train.low_memory",
                expected="one process, or recipes/accelerate/ddp.yaml",
                actual="ZeRO or FSDP, which shard the scores",
            )

    def after_spreading(self) -> None:
        """Disables caches that need whole weights; runs evaluations that had to wait for the model's values."""
        model = self.accelerator.unwrap_model(self.model)
        if self.sharded_model is not None and self.sharded_model.shares_weights:
            share_weights(model)
        if self.rows is not None:
            self.start_masks = self.stored_masks()
            self.unmasked_losses = self.losses(self.validation, masked=False)
            with unmasked(model):
                self.unmasked_retained_loss = self.retained_loss()
            kept = (
                module.rule.keeps_all(self.start_masks[name], whole_shape(module.scores).numel())
                for name, module in self.masked().items()
            )
            self.known_start_loss = mean_loss(self.unmasked_losses) if all(kept) else None

    def losses(self, records: Sequence[Encoded], *, masked: bool) -> Sequence[RecordLoss]:
        """The loss of each record with the current masks or without any; must be called in all processes at once."""
        with nullcontext() if masked else unmasked(self.accelerator.unwrap_model(self.model)):
            return self.record_losses(records)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation loss per answer token; also logs the mask entries flipped since the last validation."""
        if self.start_loss is None:
            self.counted = self.stored_masks()
            return self._evaluate_start(metric_key_prefix)
        turned = self._count_flips()
        before = next(line["eval_loss"] for line in reversed(self.state.log_history) if "eval_loss" in line)
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self.log({**turned, "measured": before - metrics[f"{metric_key_prefix}_loss"]})
        return metrics

    def _evaluate_start(self, metric_key_prefix: str) -> dict[str, float]:
        """The validation loss of the initial scores, which later masks have to beat; not measured again if known."""
        if self.known_start_loss is None:
            metrics = super().evaluate(metric_key_prefix=metric_key_prefix)
        else:
            start = Candidate(
                None,
                self.known_start_loss,
                self.known_start_score,
                self.unmasked_retained_loss,
                self.known_start_rewards,
            )
            metrics = self._record([start], metric_key_prefix)
        self.state.best_metric, self.state.best_global_step = metrics[f"{metric_key_prefix}_{RANK}"], 0
        return metrics

    def masked(self) -> dict[str, MaskedLinear | MaskedPart]:
        """The modules with scores, by the name of their target, in model order."""
        model: torch.nn.Module = self.accelerator.unwrap_model(self.model)
        return dict(masked_layers(model))

    def load_scores(self, scores: Mapping[str, torch.Tensor]) -> None:
        """Loads the scores of all modules or some."""
        modules = self.masked()
        for name, values in scores.items():
            if self.sharded_model is not None:
                self.sharded_model.put(modules[name].scores, values)
            else:
                with torch.no_grad():
                    modules[name].scores.copy_(values)

    def stored_masks(self) -> dict[str, Packed]:
        """The current masks as stored, with one mask of the weight's shape in memory at a time."""
        return {name: module.stored_mask() for name, module in self.masked().items()}

    def flipped_since_start(self) -> int:
        """The number of entries removed at either the start or the last validation, but not at both."""
        return sum(
            int(((self._mask(name, self.start_masks[name]) == 0) ^ (self._mask(name, packed) == 0)).sum())
            for name, packed in self.counted.items()
        )

    def _count_flips(self) -> dict[str, float]:
        """The entries flipped since the last count, and the expected reduction of the loss.

        The estimate is first-order, from Adam's running mean of the gradients.
        """
        before, self.counted = self.counted, self.stored_masks()
        removed = restored = 0
        promised = 0.0
        for name, module in self.masked().items():
            if np.array_equal(before[name], self.counted[name]):
                continue
            old, new = self._mask(name, before[name]), self._mask(name, self.counted[name])
            removed += int(((old != 0) & (new == 0)).sum())
            restored += int(((old == 0) & (new != 0)).sum())
            promised += module.rule.promised(self._mean_gradient(module.scores), whole(module.scores), old, new)
        return {"removed": removed, "restored": restored, "promised": promised}

    def _mean_gradient(self, scores: torch.nn.Parameter) -> torch.Tensor:
        """Adam's running mean of the gradients of a score tensor."""
        if self.sharded_model is not None:
            return self.sharded_model.state(scores, "exp_avg")
        mean: torch.Tensor = self.create_optimizer().state[scores]["exp_avg"]
        return mean

    def _mask(self, name: str, stored: Packed) -> torch.Tensor:
        """A module's mask in the weight's shape and on its device."""
        module = self.masked()[name]
        return module.rule.mask(stored, whole_shape(module.scores)).to(self.args.device)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        scores = {}
        for name, module in self.masked().items():
            values = whole(module.scores)
            if self.args.should_save:
                scores[name] = values.cpu().contiguous()
            del values  # otherwise two whole tensors would be in memory at once
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        # Includes the masks at the last validation, since a checkpoint may fall between two validations.
        counted = {_COUNTED + name: torch.from_numpy(packed.copy()) for name, packed in self.counted.items()}
        save_file({**scores, **counted}, folder / _SCORES_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with safe_open(Path(resume_from_checkpoint) / _SCORES_FILE, "pt") as file:
            self._load_scores(file)
            self.counted = {name: file.get_tensor(_COUNTED + name).numpy() for name in self.masked()}

    def _load_best_model(self) -> None:
        with safe_open(Path(str(self.state.best_model_checkpoint)) / _SCORES_FILE, "pt") as file:
            self._load_scores(file)

    def _load_scores(self, file: Any) -> None:
        """Loads the scores in an open file, one tensor at a time."""
        for name in self.masked():
            self.load_scores({name: file.get_tensor(name)})
