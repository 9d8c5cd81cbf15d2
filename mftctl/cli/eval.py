"""`mftctl eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from mftctl.cli import options as opt
from mftctl.cli.output import Output
from mftctl.cli.session import Session
from mftctl.cli.template_option import OWN
from mftctl.errors import ConfigError
from mftctl.experiments.deciding_keys import deciding_keys
from mftctl.experiments.model_source import ModelSource, ancestry, source_to_measure
from mftctl.experiments.recipe import EvalOptions, Recipe
from mftctl.experiments.recipe_files import parse_recipe
from mftctl.experiments.results import EvalResult
from mftctl.experiments.run_folder import Run, list_runs
from mftctl.experiments.run_inputs import RunInputs
from mftctl.experiments.run_record import RunStatus
from mftctl.experiments.state_names import WRITTEN
from mftctl.workflows.command_run import run_to_end, use_device
from mftctl.workflows.multi_process.process_count import settle_launch


def evaluate(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Checkpoint folder or hub id.",
            show_default="the latest run's, and the models it was made from",
        ),
    ] = None,
    model_option: Annotated[str | None, typer.Option("--model", "-m", hidden=True)] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            "--mask",
            help="Evaluate the model with this mask or delta file applied: a file, or OWNER/NAME[@REVISION][:FILE] on "
            "the hub.",
            rich_help_panel=opt.INPUT,
        ),
    ] = None,
    test_data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", "-d", help="Test data to measure on.", show_default="the run's", rich_help_panel=opt.INPUT
        ),
    ] = None,
    retain_data: opt.RetainData = None,
    recipe: opt.RecipeName = None,
    sets: opt.Sets = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            "--chat-template",
            metavar="[FILE|NAME]",
            help="Apply a chat template to benchmark prompts: the tokenizer's own, or the given Jinja file or named "
            "template, which is also applied to test data.",
            rich_help_panel=opt.RECORDS,
        ),
    ] = None,
    no_chat_template: Annotated[
        bool,
        typer.Option(
            "--no-chat-template", help="Do not apply a chat template to benchmark prompts.", rich_help_panel=opt.RECORDS
        ),
    ] = False,
    template_args: opt.TemplateArgs = None,
    merge_system: opt.MergeSystem = None,
    learn: opt.LearnAnswers = None,
    bad_records: opt.BadRecords = None,
    bad_records_max: opt.BadRecordsMax = None,
    tasks: Annotated[Any, opt.setting(EvalOptions, "tasks", "--tasks", panel="Evaluation", parser=opt.names)] = None,
    task_data: Annotated[
        list[str] | None,
        opt.setting(EvalOptions, "task_data", "--task-data", panel="Evaluation", default="the published data"),
    ] = None,
    prompts: Annotated[str | None, opt.setting(EvalOptions, "prompts", "--prompts", panel="Evaluation")] = None,
    limit: Annotated[int | None, opt.setting(EvalOptions, "limit", "--limit", panel="Evaluation")] = None,
    engine: Annotated[str | None, opt.setting(EvalOptions, "engine", "--engine", panel="Evaluation")] = None,
    base_url: Annotated[str | None, opt.setting(EvalOptions, "base_url", "--base-url", panel="Server")] = None,
    served_model: Annotated[
        str | None, opt.setting(EvalOptions, "served_model", "--served-model", panel="Server")
    ] = None,
    concurrent_requests: Annotated[
        int | None, opt.setting(EvalOptions, "concurrent_requests", "--concurrent-requests", panel="Server")
    ] = None,
    tensor_parallel: Annotated[
        int | None, opt.setting(EvalOptions, "tensor_parallel", "--tensor-parallel", panel="vLLM")
    ] = None,
    gpu_memory_share: Annotated[
        float | None, opt.setting(EvalOptions, "gpu_memory_share", "--gpu-memory-share", panel="vLLM", default="vLLM's")
    ] = None,
    max_model_length_tokens: Annotated[
        int | None,
        opt.setting(
            EvalOptions, "max_model_length_tokens", "--max-model-length", panel="vLLM", default="as long as needed"
        ),
    ] = None,
    batch_size: Annotated[
        Any, opt.setting(EvalOptions, "batch_size", "--batch-size", panel="Evaluation", parser=opt.whole_number_or_word)
    ] = None,
    max_new_tokens: Annotated[
        int | None, opt.setting(EvalOptions, "max_new_tokens", "--max-new-tokens", panel="Evaluation")
    ] = None,
    samples: Annotated[int | None, opt.setting(EvalOptions, "samples", "--samples", panel="Evaluation")] = None,
    temperature: Annotated[
        float | None, opt.setting(EvalOptions, "temperature", "--temperature", panel="Evaluation")
    ] = None,
    predictions: Annotated[
        str | None, opt.setting(EvalOptions, "predictions", "--predictions", panel="Evaluation")
    ] = None,
    save_samples: Annotated[
        bool | None, opt.setting(EvalOptions, "save_samples", "--save-samples", panel="Evaluation")
    ] = None,
    unsafe_code: Annotated[
        bool | None, opt.setting(EvalOptions, "unsafe_code", "--unsafe-code", panel="Evaluation")
    ] = None,
    generate: Annotated[
        bool | None, opt.setting(EvalOptions, "generate", "--generate/--no-generate", panel="Evaluation")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an interrupted evaluation of the same model, reusing its outputs.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Also repeat measurements that already exist.")] = False,
    processes: opt.Processes = None,
    shard: opt.ShardOption = None,
    runs: opt.Runs = Path("runs"),
    seed: opt.Seed = None,
    device: opt.Device = None,
    attention: opt.Attention = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    no_cache: opt.NoCache = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure loss and exact match on a data file, or run benchmarks.

    Without a model, measures the latest result and the models it was made from, skipping what was measured before.
    """
    launch = settle_launch("eval", processes, shard)
    with Output(as_json=as_json) as console:
        chosen = _with_template(opt.given(context, "eval"), without=no_chat_template)
        session = Session("eval", console, runs, recipe=recipe, sets=sets, options=chosen, launch=launch)
        options, model = session.settle().eval, checkpoint or model_option
        written = options.predictions
        if options.engine == "openai" and model is None and not written:
            raise _nothing_served()
        sources = [ModelSource(written, state=WRITTEN)] if written else _sources(model, mask, session)
        evaluated = [_evaluate_once(session, source, resume=resume, again=again) for source in sources]
        show(console, evaluated)
        console.next_command("mftctl", "report", runs=runs)


def _with_template(chosen: dict[str, Any], *, without: bool) -> dict[str, Any]:
    """Resolves `--chat-template` to recipe keys: whether benchmark prompts use a template, and which one.

    Raises:
        ConfigError: A template is both requested and ruled out.
    """
    named = chosen.get("chat_template")
    if without and named is not None:
        raise ConfigError(
            "--chat-template and --no-chat-template are mutually exclusive.",
            key="--no-chat-template",
            actual="both options",
            hint="--no-chat-template --set chat_template=... to apply a template to test data only",
        )
    rest = {key: value for key, value in chosen.items() if key != "chat_template" or value != OWN}
    if named is not None or without:
        rest["eval.chat_template"] = not without
    return rest


def show(console: Output, runs: list[Run]) -> None:
    """Prints the results of one or more evaluations."""
    table = Table(title="Evaluation", title_justify="left")
    for name in ("model", "data", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("value", "± s.e.", "n"):
        table.add_column(name, justify="right")
    for run in runs:
        result = run.result(EvalResult)
        for dataset in result.datasets:
            for metric in dataset.metrics:
                error = metric.standard_error
                table.add_row(
                    escape(result.state),
                    escape(dataset.name),
                    escape(metric.name),
                    f"{metric.value:.4f}",
                    "" if error is None else f"{error:.4f}",
                    str(metric.samples),
                )
            tokens, seconds = dataset.generated_tokens, dataset.seconds
            if tokens and seconds is not None:
                speed = f"{tokens:,} tokens in {seconds:.0f} s, {tokens / max(seconds, 1e-9):.0f} tokens/s"
                console.note(f"{dataset.name}: {speed}, scoring included")
    results = [{"run": str(run.folder), **run.record.result} for run in runs]
    console.result(results[0] if len(results) == 1 else {"evaluations": results}, table)


def _sources(model: str | None, mask: Path | None, session: Session) -> list[ModelSource]:
    if mask is not None:
        from mftctl.masking.hub_masks import local_mask

        mask = local_mask(mask)
    hint = "mftctl eval MODEL --data FILE"
    source = source_to_measure(model, mask, session.root, what="eval", hint=hint)
    return [source] if model is not None else ancestry(session.root, source)


def _nothing_served() -> ConfigError:
    return ConfigError(
        "A server serves one model, which must be named.",
        key="MODEL",
        expected="the checkpoint that is served: its tokenizer and configuration are read, not its weights",
        hint="mftctl eval MODEL --engine openai --base-url URL",
    )


def _evaluate_once(session: Session, source: ModelSource, *, resume: bool, again: bool) -> Run:
    """Returns a finished evaluation: an earlier identical one unless `again`, otherwise a new one."""
    recipe = session.settle(source)
    if not (recipe.test_data or recipe.retain_data or recipe.eval.tasks):
        recipe = session.with_answer("test_data", "Data to measure on", "--data (or --retain, --tasks)", source)
    for run in list_runs(session.root)[0]:
        if not again and _measured(run, recipe, source):
            session.console.note(f"{source.state}: already measured by {run.name}")
            return run
    session.console.note(f"{source.state}: {source.model}" + (f" with mask {source.mask}" if source.mask else ""))
    use_device(recipe, session.launch)
    run = (_interrupted(session, recipe, source) if resume else None) or session.create(recipe, source)
    run_to_end(run, recipe, source, session.console, session.launch)
    return run


def _interrupted(session: Session, recipe: Recipe, source: ModelSource) -> Run | None:
    """Returns the latest stopped or killed evaluation of the same model and data, or None."""
    for run in reversed(list_runs(session.root)[0]):
        if run.record.status in (RunStatus.RUNNING, RunStatus.INTERRUPTED) and _is_same(run, recipe, source):
            run.go_on()
            session.console.note(f"Resuming: {run.folder}")
            return run
    return None


def _measured(run: Run, recipe: Recipe, source: ModelSource) -> bool:
    # Only files in a run folder are certain not to have changed since; a server may serve something else by now.
    if recipe.eval.engine == "openai":
        return False
    return run.record.status == RunStatus.FINISHED and bool(source.parents) and _is_same(run, recipe, source)


def _is_same(run: Run, recipe: Recipe, source: ModelSource) -> bool:
    """Checks whether a run evaluates the same model on the same data with the same settings."""
    record = run.record
    if recipe.chat_template is not None and Path(recipe.chat_template).exists():
        return False  # the file may have changed since
    inputs = RunInputs.read(record.inputs)
    return (
        record.command == "eval"
        and (inputs.model, inputs.mask) == (source.model, source.mask)
        and deciding_keys(parse_recipe(record.config), "eval") == deciding_keys(recipe, "eval")
    )
