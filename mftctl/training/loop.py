"""The training loop shared by `fft` and `mask-train`: `transformers.Trainer`, configured to be exact and quiet."""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from accelerate.state import AcceleratorState, PartialState
from safetensors import SafetensorError
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from mftctl.data.batching import (
    REFERENCE,
    LengthGroupedSampler,
    PaddingCollator,
    ProcessRecords,
    any_images,
    pad_token_id,
)
from mftctl.data.encoding import Encoded
from mftctl.data.prepared.records import token_lengths
from mftctl.errors import Interrupted, LostProcessError, StorageError
from mftctl.evaluation.head_chunks import answer_positions, logits_only_at
from mftctl.evaluation.losses import RecordLoss, mean_loss
from mftctl.experiments.training_folder import TrainingFolder, step_of
from mftctl.experiments.training_options import TrainingOptions
from mftctl.progress import Listener, Progress
from mftctl.runtime.devices import best_device, is_launched, numbered, require_deterministic_attention
from mftctl.runtime.peak_memory import keep_freed_memory
from mftctl.runtime.process_group import wait_for_all
from mftctl.runtime.processes import timeout_seconds, world_size
from mftctl.runtime.stop_request import StopRequest
from mftctl.runtime.torch_failures import gpu_failures, reason_of
from mftctl.text import first_line
from mftctl.training.answer_loss import answer_loss
from mftctl.training.candidates import RANK, Candidate, best_candidate, log_entry
from mftctl.training.objectives import AnswerBatch
from mftctl.training.retaining_trainer import RetainingTrainer
from mftctl.training.schedule import accumulation, decay_steps, records_per_step, sequences_of_a_record, warmup_steps
from mftctl.training.stopping import EndedBefore, NoStepTooMany
from mftctl.training.token_batches import StepSize
from mftctl.training.watch import TrainingWatch

if TYPE_CHECKING:
    from mftctl.training.interim_evaluation import InterimEvaluation
    from mftctl.training.step_scores import StepScores

VALIDATIONS = 10
_FAILED_WRITE = re.compile("PytorchStreamWriter|inline_container|iostream|unexpected pos")
"""torch's messages for failed file writes; failures of a GPU or another process are RuntimeErrors as well."""

_LOST = re.compile("gloo/transport|Connection closed by peer|Connection reset by peer")
"""gloo's messages, in a generic error class, if another process is lost or does not respond."""

_KNOWN = inspect.signature(TrainingArguments).parameters
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _KNOWN)
"""The name in transformers; the versions that vLLM requires use the older name."""


def training_arguments(
    folder: Path, options: TrainingOptions, *, steps: int, learning_rate: float, seed: int, bf16: bool
) -> TrainingArguments:
    """The arguments of the `transformers.Trainer`.

    Args:
        folder: Folder for checkpoints.
        options: Options from the recipe.
        steps: Optimizer steps in all.
        learning_rate: Peak of the linear schedule.
        seed: Decides dropout; the order of the data has its own generator.
        bf16: Whether forward passes run under bf16 autocast.
    """
    val_steps = options.val_steps or max(1, steps // VALIDATIONS)
    checkpointing: dict[str, Any] = {
        CHECKPOINTING: options.gradient_checkpointing,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
    }
    return _Arguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        # With a token budget, the Trainer treats a step as one batch.
        gradient_accumulation_steps=1 if options.batch_tokens else accumulation(options, world_size()),
        learning_rate=learning_rate,
        **_schedule_arguments(steps, options),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch",
        bf16=bf16,
        use_cpu=best_device().type == "cpu",
        **checkpointing,
        eval_strategy="steps",
        eval_steps=val_steps,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=val_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{RANK}",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=best_device().type == "cuda",
        seed=seed,
        ddp_timeout=timeout_seconds(),
    )


def _schedule_arguments(steps: int, options: TrainingOptions) -> dict[str, Any]:
    """The schedule in the Trainer's terms; `schedule_factors` describes the same one."""
    warmup = {"warmup_steps": warmup_steps(steps, options)}
    match options.schedule:
        case "constant":
            return {"lr_scheduler_type": "constant_with_warmup", **warmup}
        case "wsd":
            decay = {"num_decay_steps": decay_steps(steps, options), "decay_type": "linear"}
            return {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": decay, **warmup}
        case "linear" | "cosine":
            return {"lr_scheduler_type": options.schedule, **warmup}


class _Arguments(TrainingArguments):
    """Arguments for a Trainer on the device in use; by default it takes the first GPU, or all with DataParallel."""

    @cached_property
    def _setup_devices(self) -> torch.device:
        if is_launched():
            return super()._setup_devices
        device = numbered(best_device())
        AcceleratorState._reset_state(reset_partial_state=True)
        self.distributed_state = PartialState(cpu=device.type == "cpu")
        self.distributed_state.device = device
        self._n_gpu = 0 if device.type == "cpu" else 1
        return device


def step_size(options: TrainingOptions) -> StepSize | None:
    """The size of a step with a token budget; None without one."""
    if options.batch_tokens is None:
        return None
    tokens = max(options.batch_tokens // sequences_of_a_record(options), 1)
    return StepSize(records_per_step(options, world_size()), tokens)


class SftTrainer(RetainingTrainer):
    """A Trainer for answer tokens: exact means over a step, a record order that depends only on the seed, no printing.

    Attributes:
        start_loss: Validation loss per answer token before the first step; None until measured.
        scores: Scores that decide between steps; None if the loss does.
    """

    scores: StepScores | None = None

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        train: Sequence[Encoded],
        validation: Sequence[Encoded],
        tokenizer: PreTrainedTokenizerBase,
        listener: Listener,
    ) -> None:
        self.validation = validation
        self.listener = listener
        self.start_loss: float | None = None
        self._padding = pad_token_id(tokenizer)
        # A batch of text does not reach the vision tower, and DDP would wait for its gradients.
        args.ddp_find_unused_parameters = any_images(train)
        self.sampler = LengthGroupedSampler(token_lengths(train), args.per_device_train_batch_size, args.seed)
        super().__init__(
            model=model,
            args=args,
            train_dataset=ProcessRecords(train),
            eval_dataset=ProcessRecords(validation),
            data_collator=PaddingCollator(self._padding),
            processing_class=tokenizer,
            compute_loss_func=answer_loss,  # for compute_loss; the Trainer then counts the answer tokens of a step
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_EpochOrder(self.sampler))

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return self.sampler

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a micro-batch; its gradient is averaged over processes afterwards."""
        labels = inputs.pop("labels")
        batch = AnswerBatch(labels, *answer_positions(labels), inputs.pop(REFERENCE, None))
        plain = self.accelerator.unwrap_model(model)
        with logits_only_at(plain, batch.positions, batch.tokens, self.listener.warn):
            outputs = model(**inputs, use_cache=False)
        loss = self.objective.loss(outputs, batch, num_items_in_batch) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # torch and safetensors raise errors of their own if the disk is full.
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and not _FAILED_WRITE.search(str(error)):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise StorageError(
                f"The checkpoint of step {self.state.global_step} could not be written.",
                path=folder,
                actual=reason_of(error),
                hint="free some space, then continue with --resume",
            ) from error
        wait_for_all()  # otherwise processes with nothing to write could time out in the next step

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The trainer's state, written next, marks the checkpoint as complete: also what other processes write.
        wait_for_all()

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The validation loss over all records, weighted by answer tokens or preferences, not by batches."""
        return self._record(self.measure_candidates(self._measured), metric_key_prefix)

    def _measured(self, horizon: float | None) -> Candidate:
        """Measures the model as it is; the horizon says which average it holds."""
        model = self.accelerator.unwrap_model(self.model)
        losses = self.record_losses(self.validation)
        score = None if self.scores is None else self.scores.score(model, self.state.global_step, horizon)
        return Candidate(horizon, mean_loss(losses), score, self.retained_loss(), self.objective.rewards(losses))

    def record_losses(self, records: Sequence[Encoded]) -> Sequence[RecordLoss]:
        """The loss of each record with the model as it is; must be called in all processes at once."""
        return self.objective.measure(
            self.accelerator.unwrap_model(self.model),
            records,
            pad_token_id=self._padding,
            on_progress=lambda done, total: self.listener.progress(Progress("validating", done, total)),
        )

    def _record(self, candidates: Sequence[Candidate], metric_key_prefix: str) -> dict[str, float]:
        """Passes what was measured to the log and the callbacks, and returns it as metrics."""
        metrics = {f"{metric_key_prefix}_loss": candidates[0].loss}
        if self.start_loss is None:
            self.start_loss = candidates[0].loss
        entry, best = log_entry(candidates), best_candidate(candidates)
        entry |= {} if self.divergence is None else {"divergence": self.divergence}
        if self.scores is not None:
            before_step = self.state.best_global_step
            before = None if before_step is None else self.candidate_at(before_step)
            entry |= self.scores.change(best, self.state.global_step, before, before_step or 0)
        self.log(entry)
        if (rewards := candidates[0].rewards) is not None:
            self.listener.note(
                f"Step {self.state.global_step}: validation loss {candidates[0].loss:.4f}, "
                f"reward accuracy {rewards.accuracy:.1%}, margin {rewards.margin:+.4f}"
            )
        metrics[f"{metric_key_prefix}_{RANK}"] = best.rank
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def train(
    trainer: SftTrainer,
    folder: TrainingFolder,
    stop: StopRequest,
    *,
    patience: int | None,
    resume: bool,
    interim: InterimEvaluation | None = None,
) -> None:
    """Trains to the end and loads the best state into the trainer's model.

    Args:
        trainer: Ready to train.
        folder: Receives the metrics; a resumed training run continues from its latest complete checkpoint.
        stop: Set when the user asks to stop.
        patience: Number of validations without improvement after which training stops early; None trains to the end.
        resume: Whether to resume from a checkpoint.
        interim: Evaluation during training.

    Raises:
        Interrupted: The user stopped it; the state is saved.
        TrainingError: The loss is no longer finite.
        LostProcessError: Another process was lost.
        DeviceMemoryError: The GPU runs out of memory.
    """
    if trainer.args.device.type == "cpu":
        keep_freed_memory()
    trainer.add_callback(TrainingWatch(trainer.listener, folder, stop))
    if interim is not None:
        interim.watch(stop)
        trainer.add_callback(interim)
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    checkpoint = _rewind(trainer, folder, resume=resume)
    trainer.add_callback(NoStepTooMany(trainer))
    wait_for_all()
    require_deterministic_attention(trainer.accelerator.unwrap_model(trainer.model))
    try:
        with _lost_processes(folder), gpu_failures("training"):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except EndedBefore:
        if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
            trainer._load_best_model()
    if not stop.requested or trainer.state.global_step >= trainer.state.max_steps:
        trainer.take_kept()
    wait_for_all()  # the first process may now remove what all have read
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the state is saved.",
            path=folder.folder,
            hint=folder.resume_command,
        )


def _rewind(trainer: SftTrainer, folder: TrainingFolder, *, resume: bool) -> Path | None:
    """Takes trainer and folder back to the latest checkpoint, which is returned; to the start if there is none."""
    checkpoint = folder.latest_checkpoint() if resume else None
    step = -1 if checkpoint is None else step_of(checkpoint)
    if checkpoint is not None:
        trainer.listener.note(f"Resuming after step {step} of {trainer.args.max_steps}")
    elif resume and folder.metrics():
        trainer.listener.note("Nothing was saved before the run ended: training restarts at step 1")
    folder.remove_checkpoints_after(step)
    folder.rewind(step)
    if checkpoint is not None:
        trainer.start_loss = next(line.eval_loss for line in folder.metrics() if line.eval_loss is not None)
        trainer.args.eval_on_start = False
    return checkpoint


@contextmanager
def _lost_processes(folder: TrainingFolder) -> Iterator[None]:
    """Turns torch's errors for a lost or unresponsive process into a known failure.

    Raises:
        LostProcessError: Another process was lost or did not respond.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and not _LOST.search(str(error)):
            raise
        raise LostProcessError(
            "The connection to another process was lost.",
            path=folder.folder,
            actual=first_line(error),
            hint=f"look up the error of the process that failed first, then run {folder.resume_command}",
        ) from error


class _EpochOrder(TrainerCallback):
    """Gives each epoch its own record order, also in a resumed training run."""

    def __init__(self, sampler: LengthGroupedSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))
