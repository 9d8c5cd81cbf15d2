"""The `mftctl` command: registers the commands and turns known failures into one message and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from mftctl import __version__
from mftctl.cli.apply import apply
from mftctl.cli.env import env
from mftctl.cli.eval import evaluate
from mftctl.cli.fft import fft
from mftctl.cli.mask import mask_app
from mftctl.cli.mask_train import mask_train
from mftctl.cli.output import Output
from mftctl.cli.probe import probe
from mftctl.cli.report import report
from mftctl.cli.run import run
from mftctl.errors import MftError

HELP = """
Make a fine-tuned language model better by learning which weights to remove.

The path through it: fft, probe, mask-train, apply, eval, report. In an empty folder each of them works without any
option, on a small built-in model and its data. All of it in one go: `mftctl run quickstart`.
"""

_PATH = "The path"
_MORE = "More"


def build_app() -> typer.Typer:
    """The Typer application with all its commands."""
    app = typer.Typer(
        name="mftctl",
        help=HELP,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    app.command(rich_help_panel=_PATH)(fft)
    app.command(rich_help_panel=_PATH)(probe)
    app.command("mask-train", rich_help_panel=_PATH)(mask_train)
    app.command(rich_help_panel=_PATH)(apply)
    app.command("eval", rich_help_panel=_PATH)(evaluate)
    app.command(rich_help_panel=_PATH)(report)
    app.command(rich_help_panel=_MORE)(run)
    app.add_typer(mask_app, name="mask", rich_help_panel=_MORE)
    app.command(rich_help_panel=_MORE)(env)
    return app


def main() -> None:
    """Runs the command line; known failures end with their message and exit code, unknown ones with a traceback."""
    # The libraries' own bars and advice would drown the progress shown here.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        build_app()()
    except MftError as error:
        Output().error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_version(wanted: bool) -> None:
    if wanted:
        Output().text(f"mftctl {__version__}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass
