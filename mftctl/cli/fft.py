"""`mftctl fft`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mftctl.cli import options as opt
from mftctl.cli.output import Output, pairs_table, retained_rows, reward_rows
from mftctl.cli.session import Session
from mftctl.experiments.fft_options import FftOptions
from mftctl.experiments.results import FftResult
from mftctl.experiments.run_folder import Run
from mftctl.files.ownership import Kind, permit_folder
from mftctl.workflows.command_run import run_to_end
from mftctl.workflows.multi_process.process_count import settle_launch


def fft(
    context: typer.Context,
    model: opt.Model = None,
    data: opt.Data = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the fine-tuned model.",
            show_default="model/ in the run folder",
            rich_help_panel=opt.INPUT,
        ),
    ] = None,
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
    learn_from: Annotated[str | None, opt.setting(FftOptions, "learn_from", "--learn-from", panel=opt.RECORDS)] = None,
    method: Annotated[str | None, opt.setting(FftOptions, "method", "--method", panel=opt.METHOD)] = None,
    ratio: Annotated[float | None, opt.setting(FftOptions, "ratio", "--ratio", panel=opt.METHOD)] = None,
    scope: Annotated[str | None, opt.setting(FftOptions, "scope", "--scope", panel=opt.METHOD)] = None,
    unselected: Annotated[str | None, opt.setting(FftOptions, "unselected", "--unselected", panel=opt.METHOD)] = None,
    exclude: Annotated[
        Any,
        opt.setting(FftOptions, "exclude", "--exclude", panel=opt.METHOD, parser=opt.names, metavar="embeddings,head"),
    ] = None,
    support: Annotated[str | None, opt.setting(FftOptions, "support", "--support", panel=opt.METHOD)] = None,
    lora_rank: Annotated[int | None, opt.setting(FftOptions, "lora_rank", "--lora-rank", panel=opt.METHOD)] = None,
    lora_alpha: Annotated[int | None, opt.setting(FftOptions, "lora_alpha", "--lora-alpha", panel=opt.METHOD)] = None,
    merge: Annotated[bool | None, opt.setting(FftOptions, "merge", "--merge/--no-merge", panel=opt.METHOD)] = None,
    quantize: Annotated[str | None, opt.setting(FftOptions, "quantize", "--quantize", panel=opt.METHOD)] = None,
    optimizer: Annotated[str | None, opt.setting(FftOptions, "optimizer", "--optimizer", panel=opt.TRAINING)] = None,
    low_memory: opt.FftLowMemory = None,
    objective: opt.Objective = None,
    beta: opt.Beta = None,
    length_normalized: opt.LengthNormalized = None,
    epochs: opt.Epochs = None,
    max_steps: opt.MaxSteps = None,
    learning_rate: opt.FftRate = None,
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
    deterministic: opt.Deterministic = None,
    check_memory: opt.CheckMemory = None,
    val_steps: opt.ValSteps = None,
    patience: opt.Patience = None,
    best_by: opt.BestBy = None,
    keep: Annotated[str | None, opt.setting(FftOptions, "keep", "--keep", panel=opt.TRAINING)] = None,
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
    """Fine-tune a model and keep its best checkpoint.

    Trains all weights, or those selected by a method: the weights with the largest gradients (Gradient-Mask Tuning),
    random weights, half of the parameters, or an adapter. The loss covers answer tokens only. Starting from a
    fine-tuned model continues its fine-tuning.

    With --objective dpo, the data are preferences: records of prompt, chosen and rejected.
    """
    launch = settle_launch("fft", processes, shard)
    with Output(as_json=as_json) as console:
        chosen = opt.given(context, "fft", "eval")
        session = Session("fft", console, runs, recipe=recipe, sets=sets, options=chosen, yes=yes, launch=launch)
        run, settled, source = session.open_training(
            resume=resume, output=output, permit=lambda agreed: permit_folder(Kind.MODEL, replace=agreed)
        )
        run_to_end(run, settled, source, console, launch, resume=resume, may_replace=session.replaces)
        result = run.result(FftResult)
        show(console, run, result)
        session.end(result)
        console.next_command("mftctl", "probe", *launch.words, runs=runs)


def show(console: Output, run: Run, result: FftResult) -> None:
    """Prints the result of fine-tuning."""
    kept = f"{result.kept} checkpoint"
    if result.kept_average is not None:
        kept += f", average over {100 * result.kept_average:g} % of the steps"
    score = result.best_score
    console.result(
        {"run": str(run.folder), **result.document()},
        pairs_table(
            f"{result.state} in {run.record.seconds:.0f} s",
            [
                ("validation loss", f"{result.start_loss:.4f} at the start"),
                ("", f"{result.best_loss:.4f} at the best step ({result.best_step} of {result.steps})"),
                ("", f"{result.last_loss:.4f} at the last step"),
                *([] if score is None else [(score.metric, f"{score.value:.4f} at the best step")]),
                *reward_rows(result.rewards),
                *retained_rows(result.retained, "at the start"),
                ("model", f"{result.model} ({kept})"),
                ("peak memory", f"{result.peak_memory_bytes / 1e9:.2f} GB"),
            ],
        ),
    )
