"""`mftctl mask-train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mftctl.cli import completion
from mftctl.cli import options as opt
from mftctl.cli.output import Output, pairs_table, retained_rows, reward_rows
from mftctl.cli.session import Session, mask_file_permit
from mftctl.experiments.mask_results import DroppedMask, MaskTrainResult, MeasuredMask
from mftctl.experiments.mask_train_options import MaskTrainOptions
from mftctl.experiments.run_folder import Run
from mftctl.workflows.command_run import run_to_end
from mftctl.workflows.multi_process.process_count import settle_launch


def mask_train(
    context: typer.Context,
    model: opt.Model = None,
    data: opt.Data = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="The mask file; a copy is kept in the run folder.", rich_help_panel=opt.INPUT
        ),
    ] = Path("mask.bits"),
    val_data: opt.ValData = None,
    val_fraction: opt.ValFraction = None,
    retain_data: opt.RetainData = None,
    recipe: opt.RecipeName = None,
    sets: opt.Sets = None,
    chat_template: opt.ChatTemplate = None,
    template_args: opt.TemplateArgs = None,
    merge_system: opt.MergeSystem = None,
    learn: opt.LearnAnswers = None,
    bad_records: opt.BadRecords = None,
    bad_records_max: opt.BadRecordsMax = None,
    method: Annotated[str | None, opt.setting(MaskTrainOptions, "method", "--method", panel=opt.MASKING)] = None,
    kind: Annotated[str | None, opt.setting(MaskTrainOptions, "kind", "--kind", panel=opt.MASKING)] = None,
    mask: Annotated[str | None, opt.setting(MaskTrainOptions, "mask", "--mask", panel=opt.MASKING)] = None,
    max_multiplier: Annotated[
        int | None, opt.setting(MaskTrainOptions, "max_multiplier", "--max-multiplier", panel=opt.MASKING)
    ] = None,
    harden: Annotated[bool | None, opt.setting(MaskTrainOptions, "harden", "--harden", panel=opt.MASKING)] = None,
    unit: Annotated[str | None, opt.setting(MaskTrainOptions, "unit", "--unit", panel=opt.MASKING)] = None,
    layers: Annotated[
        str | None,
        opt.setting(
            MaskTrainOptions,
            "layers",
            "--layers",
            panel=opt.MASKING,
            default="the probe's, otherwise all",
            offered=completion.layers,
        ),
    ] = None,
    target: opt.Target = None,
    preset: opt.Preset = None,
    learn_from: Annotated[
        str | None, opt.setting(MaskTrainOptions, "learn_from", "--learn-from", panel=opt.MASKING, default="")
    ] = None,
    projections: Annotated[
        Any,
        opt.setting(
            MaskTrainOptions,
            "projections",
            "--projections",
            panel=opt.MASKING,
            parser=opt.names,
            default="the probe's, otherwise all",
        ),
    ] = None,
    ratio: opt.Ratio = None,
    budget: Annotated[float | None, opt.setting(MaskTrainOptions, "budget", "--budget", panel=opt.MASKING)] = None,
    threshold: Annotated[
        float | None, opt.setting(MaskTrainOptions, "threshold", "--threshold", panel=opt.MASKING)
    ] = None,
    pattern: Annotated[str | None, opt.setting(MaskTrainOptions, "pattern", "--pattern", panel=opt.MASKING)] = None,
    ranking: Annotated[
        str | None, opt.setting(MaskTrainOptions, "ranking", "--ranking", panel=opt.MASKING, default="")
    ] = None,
    start: Annotated[
        str | None, opt.setting(MaskTrainOptions, "start", "--start", panel=opt.MASKING, default="")
    ] = None,
    start_std: Annotated[
        float | None, opt.setting(MaskTrainOptions, "start_std", "--start-std", panel=opt.MASKING)
    ] = None,
    start_value: Annotated[
        float | None, opt.setting(MaskTrainOptions, "start_value", "--start-value", panel=opt.MASKING)
    ] = None,
    keep: Annotated[str | None, opt.setting(MaskTrainOptions, "keep", "--keep", panel=opt.MASKING, default="")] = None,
    strategy: Annotated[str | None, opt.setting(MaskTrainOptions, "strategy", "--strategy", panel=opt.MASKING)] = None,
    rescale: Annotated[bool | None, opt.setting(MaskTrainOptions, "rescale", "--rescale", panel=opt.MASKING)] = None,
    base: Annotated[str | None, opt.setting(MaskTrainOptions, "base", "--base", panel=opt.MASKING)] = None,
    objective: opt.Objective = None,
    beta: opt.Beta = None,
    length_normalized: opt.LengthNormalized = None,
    epochs: opt.Epochs = None,
    max_steps: opt.MaxSteps = None,
    learning_rate: opt.MaskRate = None,
    schedule: opt.Schedule = None,
    retain_weight: opt.RetainWeight = None,
    average: opt.Average = None,
    average_device: opt.AverageDevice = None,
    batch_size: opt.BatchSize = None,
    grad_accum_steps: opt.GradAccum = None,
    global_batch_size: opt.GlobalBatch = None,
    batch_tokens: opt.BatchTokens = None,
    max_length_tokens: opt.MaxLength = None,
    precision: opt.Precision = None,
    gradient_checkpointing: opt.Checkpointing = None,
    low_memory: opt.LowMemory = None,
    prefix_cache_gb: opt.PrefixCache = None,
    deterministic: opt.Deterministic = None,
    check_memory: opt.CheckMemory = None,
    val_steps: opt.ValSteps = None,
    patience: opt.MaskPatience = None,
    best_by: opt.BestBy = None,
    benchmark_every: opt.BenchmarkEvery = None,
    benchmark_limit: opt.BenchmarkLimit = None,
    tasks: opt.InterimTasks = None,
    task_data: opt.InterimTaskData = None,
    resume: opt.Resume = False,
    processes: opt.Processes = None,
    shard: opt.ShardOption = None,
    runs: opt.Runs = Path("runs"),
    seed: opt.Seed = None,
    device: opt.Device = None,
    attention: opt.Attention = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    track: opt.Track = None,
    no_cache: opt.NoCache = False,
    as_json: opt.AsJson = False,
    yes: opt.Yes = False,
) -> None:
    """Learn which weights of a fine-tuned model to remove.

    The model is frozen; each weight of the selected layers gets a score, and the scores are trained. Half of the
    validation data selects the best mask, or none if none helps; the other half confirms the choice. The mask is
    written to a small file separate from the model.

    With --kind delta, removed weights return to their values before fine-tuning instead of becoming 0. With --objective
    dpo, the data are preferences: records of prompt, chosen and rejected. With --mask soft, weights are not removed but
    multiplied by numbers from 0 to 1 (or 2).
    """
    launch = settle_launch("mask-train", processes, shard)
    with Output(as_json=as_json) as console:
        chosen = opt.given(context, "mask_train", "eval")
        session = Session("mask-train", console, runs, recipe=recipe, sets=sets, options=chosen, yes=yes, launch=launch)
        run, settled, source = session.open_training(resume=resume, output=output, permit=mask_file_permit)
        run_to_end(run, settled, source, console, launch, resume=resume, may_replace=session.replaces)
        result = run.result(MaskTrainResult)
        show(console, run, result)
        session.end(result)
        console.next_command("mftctl", "apply", runs=runs)


def show(console: Output, run: Run, result: MaskTrainResult) -> None:
    """Prints the result of mask training."""
    resets = isinstance(result, DroppedMask) or (isinstance(result, MeasuredMask) and result.base is not None)
    done = "reset" if resets else "removed"
    rows = [("layers", result.layers), *_soft_rows(result), (done, f"{result.removed:,} of {result.weights:,} weights")]
    if isinstance(result, MeasuredMask) and result.projection_ratios:
        rows += [("", f"{100 * ratio:.2g} % of {name}") for name, ratio in result.projection_ratios.items()]
    if len(set(result.layer_ratios.values())) > 1:
        rows += [("", f"{100 * ratio:.2g} % of {_place(layer)}") for layer, ratio in result.layer_ratios.items()]
    if isinstance(result, MeasuredMask):
        rows += _losses(result)
    rows += [("mask", result.output or result.mask)]
    rows += [("peak memory", f"{result.peak_memory_bytes / 1e9:.2f} GB")]
    title = f"{result.state} in {run.record.seconds:.0f} s"
    console.result({"run": str(run.folder), **result.document()}, pairs_table(title, rows))


def _soft_rows(result: MaskTrainResult) -> list[tuple[str, str]]:
    if result.soft is None:
        return []
    multipliers = f"mean {result.soft.mean:.4f}, {result.soft.changed:,} of {result.weights:,} are not 1"
    return [("multipliers", multipliers), ("file", f"{result.soft.file_bytes:,} bytes")]


def _place(layer: str) -> str:
    """A masked layer of the result, or the projector, in words."""
    return f"layer {layer}" if layer.isdigit() else f"the {layer}"


def _losses(result: MeasuredMask) -> list[tuple[str, str]]:
    rows = [("validation loss", f"{result.unmasked_loss:.4f} without a mask")]
    if result.steps:
        step = f"the {result.kept} mask, step {result.best_step} of {result.steps}"
        if result.kept_average is not None:
            step += f", scores averaged over {100 * result.kept_average:g} % of the steps"
        rows += [("", f"{result.start_loss:.4f} with the initial mask")]
        rows += [("", f"{result.best_loss:.4f} with {step}")]
    else:
        rows += [("", f"{result.best_loss:.4f} with the mask")]
    if result.unmasked_score is not None and result.best_score is not None:
        name, before, after = result.best_score.metric, result.unmasked_score.value, result.best_score.value
        rows += [(name, f"{before:.4f} without a mask"), ("", f"{after:.4f} with the mask")]
    rows += reward_rows(result.rewards)
    rows += retained_rows(result.retained, "without a mask")
    if found := result.confirmation:
        change = f"{found.change:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        rows += [("confirmation", f"{change} {'confirmed' if found.confirmed else 'not confirmed'}")]
    return rows
