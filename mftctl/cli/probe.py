"""`mftctl probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mftctl.cli import completion
from mftctl.cli import options as opt
from mftctl.cli.output import Output
from mftctl.cli.session import Session
from mftctl.experiments.probe_results import FastProbe, Group, GroupProbe, ProbeResult, StructureProbe, TrainedProbe
from mftctl.experiments.recipe import EvalOptions, ProbeOptions
from mftctl.experiments.results import Score
from mftctl.experiments.run_folder import Run
from mftctl.text import counted
from mftctl.workflows.command_run import run_to_end
from mftctl.workflows.multi_process.process_count import settle_launch


def probe(
    context: typer.Context,
    model: opt.Model = None,
    data: opt.Data = None,
    val_data: opt.ValData = None,
    val_fraction: opt.ValFraction = None,
    recipe: opt.RecipeName = None,
    sets: opt.Sets = None,
    chat_template: opt.ChatTemplate = None,
    template_args: opt.TemplateArgs = None,
    merge_system: opt.MergeSystem = None,
    learn: opt.LearnAnswers = None,
    bad_records: opt.BadRecords = None,
    bad_records_max: opt.BadRecordsMax = None,
    groups: Annotated[
        Any,
        opt.setting(ProbeOptions, "groups", "--groups", panel=opt.MASKING, parser=opt.group_sizes, default=""),
    ] = None,
    unit: Annotated[str | None, opt.setting(ProbeOptions, "unit", "--unit", panel=opt.MASKING)] = None,
    layers: Annotated[
        str | None,
        opt.setting(ProbeOptions, "layers", "--layers", panel=opt.MASKING, default="all", offered=completion.layers),
    ] = None,
    target: opt.Target = None,
    preset: opt.Preset = None,
    ratio: opt.Ratio = None,
    by: Annotated[
        str | None,
        opt.setting(ProbeOptions, "by", "--by", panel=opt.SCORE, metavar="loss|exact_match|TASK"),
    ] = None,
    task_data: Annotated[
        list[str] | None,
        opt.setting(EvalOptions, "task_data", "--task-data", panel=opt.SCORE, default="the published data"),
    ] = None,
    limit: Annotated[int | None, opt.setting(EvalOptions, "limit", "--limit", panel=opt.SCORE)] = None,
    data_fraction: Annotated[
        float | None, opt.setting(ProbeOptions, "data_fraction", "--data-fraction", panel=opt.TRAINING)
    ] = None,
    epochs: Annotated[
        float | None,
        opt.setting(ProbeOptions, "epochs", "--epochs", panel=opt.TRAINING, default="mask-train's"),
    ] = None,
    best_by: opt.BestBy = None,
    fast: Annotated[bool | None, opt.setting(ProbeOptions, "fast", "--fast/--no-fast", panel=opt.TRAINING)] = None,
    batch_tokens: opt.BatchTokens = None,
    low_memory: opt.LowMemory = None,
    prefix_cache_gb: opt.PrefixCache = None,
    deterministic: opt.Deterministic = None,
    check_memory: opt.CheckMemory = None,
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
) -> None:
    """Find the layers or projections that benefit most from a mask.

    Learns a mask for each group of consecutive layers, and for all layers at once, on part of the data with everything
    else fixed, and ranks the groups by validation loss or, with --by, by the answers under each mask. The next
    mask-train uses the best group.

    With --fast nothing is trained: one gradient pass predicts the effect of removing weights from each group. This
    ranks groups of equal size; it does not show how many layers to mask, or whether a mask helps at all.

    With --unit projection, the groups are the kinds of projections, such as q_proj, each in all probed layers. With
    --unit head or neuron, which need --fast, the predicted effect is shown for each attention head or MLP neuron.
    """
    launch = settle_launch("probe", processes, shard)
    with Output(as_json=as_json) as console:
        chosen = opt.given(context, "probe", "mask_train", "eval")
        session = Session("probe", console, runs, recipe=recipe, sets=sets, options=chosen, launch=launch)
        run, settled, source = session.open_training(resume=resume)
        run_to_end(run, settled, source, console, launch, resume=resume)
        result = run.result(ProbeResult)
        show(console, run, result)
        options = ("--layers", "all", "--ratio", "auto") if isinstance(result, StructureProbe) else ()
        console.next_command("mftctl", "mask-train", *options, *launch.words, runs=runs)


def show(console: Output, run: Run, result: ProbeResult) -> None:
    """Prints the ranking of a probe."""
    if isinstance(result, StructureProbe):
        console.result({"run": str(run.folder), **result.document()}, *_structure_tables(run, result))
        return
    if not isinstance(result, GroupProbe):
        return
    table = _trainings(run, result) if isinstance(result, TrainedProbe) else _promises(run, result)
    console.result({"run": str(run.folder), **result.document()}, table)
    projection = f", projection {result.recommended_projection}" if result.recommended_projection else ""
    console.note(f"Recommended: layers {result.recommended_layers}{projection}")
    if isinstance(result, FastProbe) and result.recommended_projection:
        console.warn(
            "Predictions rank kinds of projections only roughly. Train their masks (without --fast) before you rely on "
            "the order."
        )
    if not _gains(result):
        console.warn(
            "No group beat the unmasked model. Use more records (--data-fraction) or more answers (--limit) to tell "
            "groups apart."
        )


def _gains(result: GroupProbe) -> bool:
    """Checks whether the recommended group beats the unmasked model."""
    if not isinstance(result, TrainedProbe) or result.unmasked_score is None:
        return result.groups[0].change < 0
    change = result.groups[0].score_change or 0.0
    return change > 0 if result.unmasked_score.higher_is_better else change < 0


def _trainings(run: Run, result: TrainedProbe) -> Table:
    score = result.unmasked_score
    title = f"Validation loss by masked group; unmasked {result.unmasked_loss:.4f} ({run.record.seconds:.0f} s)"
    if score is not None:
        unmasked = f"{score.value:.4f}{_error(score.standard_error)} of {score.samples}"
        title = (
            f"{_score_name(result.by, score)} and loss by masked group; "
            f"unmasked {unmasked} and {result.unmasked_loss:.4f} ({run.record.seconds:.0f} s)"
        )
    table = Table(title=title, title_justify="left", min_width=min(len(title), 76))
    columns = ("start", "best", "change") if score is None else ("score", "change", "loss", "change")
    table.add_column(_heading(result))
    for name in columns:
        table.add_column(name, justify="right")
    for group in result.groups:
        cells = [f"{group.best_loss:.4f}", f"{group.change:+.4f}"]
        if group.score is None or group.score_change is None:
            cells = [f"{group.start_loss:.4f}", *cells]
        else:
            cells = [f"{group.score:.4f}", f"{group.score_change:+.4f}", *cells]
        table.add_row(escape(group.name), *cells, style=_style(group, result))
    return table


def _score_name(by: str, score: Score) -> str:
    """Returns the name of the score a probe ranks by, such as `gsm8k exact_match,strict-match`."""
    return score.metric if by == score.metric else f"{by} {score.metric}"


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" ± {standard_error:.4f}"


def _promises(run: Run, result: GroupProbe) -> Table:
    title = f"Predicted change of the training loss with a mask, to first order ({run.record.seconds:.0f} s)"
    caption = None
    if isinstance(result, FastProbe) and (found := result.agreement) is not None:
        measured = f"{found.rank_correlation:+.2f} over {counted(found.groups, 'group')}"
        caption = f"Rank correlation with the trained {escape(found.run)}: {measured}"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", min_width=len(title))
    has_weights = any(group.weights for group in result.groups)
    table.add_column(_heading(result))
    table.add_column("predicted", justify="right")
    if has_weights:
        table.add_column("weights", justify="right")
    for group in result.groups:
        weights = [f"{group.weights or 0:,}"] if has_weights else []
        table.add_row(escape(group.name), f"{group.change:+.4f}", *weights, style=_style(group, result))
    return table


def _heading(result: GroupProbe) -> str:
    return "projection" if any(group.projection for group in result.groups) else "layers"


def _style(group: Group, result: GroupProbe) -> str | None:
    return "bold" if group.name == result.recommended else None


def _structure_tables(run: Run, result: StructureProbe) -> tuple[Table, Table]:
    """The tables of a probe of heads or neurons: by layer, and the best ones."""
    title = (
        f"Predicted change of the training loss by {result.unit}, to first order: {result.change:+.4f} "
        f"over {result.units:,} ({run.record.seconds:.0f} s)"
    )
    caption = f"Best 10 %: {result.best_units:,} {result.unit}s with {result.best_share:.0%} of the predicted change"
    layers = Table(title=title, title_justify="left", caption=caption, caption_justify="left", min_width=60)
    for name in ("layer", f"{result.unit}s", "predicted", "in best 10 %", "their share"):
        layers.add_column(name, justify="right")
    for layer in result.layers:
        cells = (str(layer.layer), f"{layer.units:,}", f"{layer.change:+.4f}", f"{layer.best:,}")
        layers.add_row(*cells, f"{layer.best_share:.0%}")
    file = escape(str(run.folder / result.file))
    best = Table(title=f"Best {result.unit}s", title_justify="left", caption=f"All of them: {file}", min_width=60)
    best.caption_justify = "left"
    for name in ("layer", result.unit, "predicted"):
        best.add_column(name, justify="right")
    for item in result.best:
        best.add_row(str(item.layer), str(item.index), f"{item.change:+.5f}")
    return layers, best
