"""Saves a fine-tuned model with its card, its tokenizer and what its training left out of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mftctl.errors import OutputError, StorageError
from mftctl.evaluation.answer_stops import name_stops, turn_stops
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.model_origin import ModelOrigin, origin_of
from mftctl.experiments.model_source import ModelSource
from mftctl.experiments.run_folder import Run
from mftctl.experiments.state_names import fine_tuned_state
from mftctl.files.atomic import atomic_folder, known_failures
from mftctl.files.ownership import Kind, permit_folder, write_marker
from mftctl.masking.checkpoints.adapter_saving import without_lookup
from mftctl.masking.checkpoints.carried_parts import carry_over, copy_processor, parts_left_out
from mftctl.masking.checkpoints.load_weights import quiet_transformers, stored_dtype, whole_checkpoint
from mftctl.masking.checkpoints.locate import is_adapter
from mftctl.text import markdown_code, markdown_text
from mftctl.training.inputs import TrainingInputs

if TYPE_CHECKING:
    from peft import PeftModel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GoesWith:
    """Files and settings written along with weights and tokenizer.

    Attributes:
        beside: Text files by name; they replace files of the same name written by libraries.
        origin: How the model was produced.
        checkpoint: The checkpoint it was produced from.
        stop_ids: Tokens that end an answer.
    """

    beside: Mapping[str, str]
    origin: ModelOrigin
    checkpoint: Path
    stop_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class SavedModel:
    """Location of a saved model.

    Attributes:
        folder: Its folder.
        refused: Reason why it is not at the run's output path; None if it is, or if no path was given.
    """

    folder: Path
    refused: str | None = None


def save_trained(
    model: PreTrainedModel | PeftModel | None,
    inputs: TrainingInputs,
    source: ModelSource,
    run: Run,
    options: FftOptions,
    *,
    may_replace: bool,
) -> SavedModel:
    """Writes the trained model with its card to the run's output path, or to the run folder.

    Args:
        model: The trained model; None in a process that does not hold it, which only returns the folder.
        inputs: The inputs of the training.
        source: The model that the training started from.
        run: Its run.
        options: Its options.
        may_replace: Whether to replace a model that mftctl wrote at the output path.

    Raises:
        StorageError: The model cannot be written.
    """
    if model is None:
        return SavedModel(Path(run.record.output or run.folder / "model"))
    state = fine_tuned_state(source.state, options)
    if options.trains_adapter:
        beside = _adapter_files(cast("PeftModel", model), inputs, options)
    else:
        beside = {"README.md": write_tuned_card(state, base=source.model, template=inputs.template_text())}
    finished = _finished(model, inputs.checkpoint, options)
    goes_with = GoesWith(
        beside,
        origin_of(state, source.model, source.origin),
        whole_checkpoint(inputs.checkpoint),
        sorted(turn_stops(inputs.tokenizer).token_ids),
    )
    return _save(finished, inputs.tokenizer, run, goes_with, may_replace=may_replace)


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    goes_with: GoesWith,
    *,
    replace: bool = False,
) -> None:
    """Writes a checkpoint with its tokenizer, whole or not at all.

    Args:
        model: The model to write.
        tokenizer: Its tokenizer.
        folder: New or empty, unless a model written by mftctl is to be replaced.
        goes_with: What else to write.
        replace: Whether to replace such a model.

    Raises:
        OutputError: The folder holds something that may not be replaced.
        StorageError: The model cannot be written.
    """
    try:
        with (
            known_failures(folder),
            atomic_folder(folder, permit_folder(Kind.MODEL, replace=replace)) as temporary,
        ):
            with quiet_transformers(), without_lookup(model):
                model.save_pretrained(str(temporary))
            tokenizer.save_pretrained(temporary)
            copy_processor(goes_with.checkpoint, temporary)
            if isinstance(model, PreTrainedModel):
                parts = parts_left_out(goes_with.checkpoint, model)
                if parts:
                    carry_over(goes_with.checkpoint, temporary, parts)
                name_stops(temporary, goes_with.stop_ids)
            for name, text in goes_with.beside.items():
                (temporary / name).write_text(text, encoding="utf-8")
            write_marker(temporary, Kind.MODEL, goes_with.origin.as_document())
    except SafetensorError as error:  # also raised if the disk is full
        raise StorageError(
            "The model could not be written.", path=folder, actual=str(error), hint="free some space"
        ) from error


def _save(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    run: Run,
    goes_with: GoesWith,
    *,
    may_replace: bool,
) -> SavedModel:
    """Writes the model to the run's output path, or to the run folder if that path has since been taken."""
    refused = None
    if run.record.output is not None:
        output = Path(run.record.output)
        try:
            save_model(model, tokenizer, output, goes_with, replace=may_replace)
        except OutputError as error:
            refused = str(error)
        else:
            return SavedModel(output)
    save_model(model, tokenizer, run.folder / "model", goes_with, replace=True)
    return SavedModel(run.folder / "model", refused)


def _finished(model: PreTrainedModel | PeftModel, checkpoint: Path, options: FftOptions) -> PreTrainedModel | PeftModel:
    """The model to write, in the requested dtype; of an adapter only itself, unless the merged model is requested."""
    dtype = _DTYPES.get(options.save_dtype) or stored_dtype(checkpoint)
    if options.trains_adapter:
        if not options.merge:
            from mftctl.masking.checkpoints.sparse_adapters import pad_for_peft

            pad_for_peft(cast("PeftModel", model))
            return model
        from mftctl.training.updates.adapters import merge_adapter

        model = merge_adapter(cast("PeftModel", model), dtype)
    whole = cast("PreTrainedModel", model)
    if options.low_memory:
        whole.to("cpu")  # type: ignore[arg-type] # the GPU that held the training may lack memory for wider weights
    whole.to(dtype)  # type: ignore[arg-type]
    return whole


def _adapter_files(model: PeftModel, inputs: TrainingInputs, options: FftOptions) -> dict[str, str]:
    """Text files written along: a model card and, with an adapter of a quantised base, how that was quantised."""
    from mftctl.masking.checkpoints.quantization import QUANTIZATION, QUANTIZED_FILE, has_quantized_base
    from mftctl.training.adapter_card import write_adapter_card

    checkpoint = inputs.checkpoint
    quantized = options.quantize is not None or (is_adapter(checkpoint) and has_quantized_base(checkpoint))
    held = "nf4 with double quantisation, computing in bf16" if quantized else str(model.get_base_model().dtype)[6:]
    card = write_adapter_card(
        model.peft_config["default"],
        trained=sum(item.numel() for item in model.parameters() if item.requires_grad),
        mask=options.support,
        merged=options.merge,
        held=held,
        quantized=quantized,
        template=inputs.template_text(),
    )
    return {"README.md": card, **({QUANTIZED_FILE: QUANTIZATION} if quantized and not options.merge else {})}


def write_tuned_card(state: str, *, base: str, template: str) -> str:
    """The card's text: YAML front matter with `base_model`, then a Markdown summary of the fine-tuning.

    Args:
        state: The state of the model after fine-tuning, such as `FFT` or `continued GMT`.
        base: Name or folder of the model that fine-tuning started from.
        template: The chat template of its records, which is stored in the tokenizer.
    """
    front_matter = ModelCardData(base_model=base, library_name="transformers", tags=["fine-tuned", "mftctl"]).to_yaml()
    return (
        f"---\n{front_matter}\n---\n\n# {markdown_text(base)}, fine-tuned\n\n"
        f"This is {markdown_code(base)} after {markdown_text(state)}.\n\n"
        f"| Fine-tuning | |\n| --- | --- |\n| Method | {markdown_text(state)} |\n"
        f"| Chat template | {markdown_text(template)} |\n\nMade with mftctl.\n"
    )
