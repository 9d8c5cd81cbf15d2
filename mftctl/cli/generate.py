"""`mftctl generate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from mftctl.cli import options as opt
from mftctl.cli.output import Output
from mftctl.cli.session import Session
from mftctl.experiments.model_source import ModelSource, source_to_measure
from mftctl.experiments.recipe import EvalOptions

if TYPE_CHECKING:
    from mftctl.workflows.generate import Answered

_PROMPTS = "Prompts"


def generate(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint folder or hub id.", show_default="the latest run's"),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", help="Also answer with this mask or delta file applied.", rich_help_panel=opt.INPUT),
    ] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="Prompt; repeatable.", rich_help_panel=_PROMPTS),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Image shown before each --prompt; repeatable.", rich_help_panel=_PROMPTS),
    ] = None,
    sources: Annotated[
        list[str] | None,
        typer.Option("--data", "-d", help="Records whose prompts to answer.", rich_help_panel=_PROMPTS),
    ] = None,
    records: Annotated[
        int, typer.Option("--limit", min=1, help="Use only the first N records.", rich_help_panel=_PROMPTS)
    ] = 5,
    max_new_tokens: Annotated[
        int | None, opt.setting(EvalOptions, "max_new_tokens", "--max-new-tokens", panel=_PROMPTS, default="256")
    ] = None,
    chat_template: opt.ChatTemplate = None,
    template_args: opt.TemplateArgs = None,
    merge_system: opt.MergeSystem = None,
    runs: opt.Runs = Path("runs"),
    device: opt.Device = None,
    attention: opt.Attention = None,
    trust_remote_code: opt.TrustRemoteCode = None,
    as_json: opt.AsJson = False,
) -> None:
    """Show answers of a model to a few prompts, with and without a mask.

    Answers are greedy and appear word by word on a terminal. For figures, use eval.
    """
    with Output(as_json=as_json) as console:
        session = Session("generate", console, runs, options=opt.given(context, "eval"))
        if mask is not None:
            from mftctl.masking.hub_masks import local_mask

            mask = local_mask(mask)
        hint = "mftctl generate MODEL -p PROMPT"
        source = source_to_measure(checkpoint, mask, runs, what="generate", hint=hint)
        recipe = session.settle(source)
        given = list(texts or ())
        if not given and not sources:
            given = [console.ask("Prompt", "--prompt or --data")]
        from mftctl.workflows import generate as answering

        examples = answering.prompt_examples(given, sources or [], records, images or [])
        on_text = console.text if console.is_live else None
        found = answering.generate(recipe, source, examples, console, texts=len(given), on_text=on_text)
        if on_text is None:
            document = {"model": source.model, "mask": source.mask, "answers": [asdict(one) for one in found]}
            console.result(document, *(_view(one, source) for one in found))


def _view(found: Answered, source: ModelSource) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = [
        ("prompt", found.prompt),
        ("reference", found.reference),
        ("answer" if source.mask is None else "without mask", found.answer),
        ("with mask", found.masked_answer),
    ]
    for name, text in rows:
        if text is not None:
            table.add_row(name, escape(text.strip()))
    table.add_row("", "")
    return table
