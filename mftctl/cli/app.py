"""The `mftctl` command: registers the commands and turns known failures into one message and an exit code."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mftctl import __version__
from mftctl.cli.environment_checks import check_environment, settle_environment
from mftctl.cli.streams import prepare_streams
from mftctl.errors import ConfigError, Interrupted, MftError
from mftctl.experiments.renamed import OPTIONS
from mftctl.files.atomic import known_failures
from mftctl.runtime.process_group import leave
from mftctl.runtime.processes import world_size
from mftctl.runtime.signals import end_as_on_interrupt
from mftctl.text import visible_line

HELP = """
Make a fine-tuned language model better by learning which weights to remove.

The path through it: fft, probe, mask-train, apply, eval, report. In an empty folder each of them works without any
option, on a small built-in model and its data. All of it in one go: `mftctl run quickstart`.
"""


class Listed(NamedTuple):
    """A command as the root's help lists it; its module is imported when it is called.

    Attributes:
        home: Module in `mftctl.cli` and the name in it.
        panel: The group it is listed in.
        summary: First line of its help.
    """

    home: str
    panel: str
    summary: str


_TOGETHER = ("fft", "probe", "mask-train")
"""Commands that can be started as several processes, by accelerate launch or torchrun."""

_STARTS_THEM = ("eval", "run")
"""Those of the others that start several processes themselves."""

_PATH = "The path"
_MORE = "More"
COMMANDS = {
    "fft": Listed("fft.fft", _PATH, "Fine-tune a model up to its best validation point."),
    "probe": Listed("probe.probe", _PATH, "Find the layers that gain most from a mask."),
    "mask-train": Listed("mask_train.mask_train", _PATH, "Learn which weights of a fine-tuned model to remove."),
    "apply": Listed(
        "apply.apply", _PATH, "Write a model and its mask as a normal checkpoint, which every server loads."
    ),
    "eval": Listed("eval.evaluate", _PATH, "Measure loss and exact match on a data file, or a benchmark score."),
    "report": Listed("report.report", _PATH, "Compare all evaluated states: did it help, and is that more than noise?"),
    "run": Listed("run.run", _MORE, "Run a whole experiment from a recipe, and report it."),
    "validate": Listed(
        "validate.validate",
        _MORE,
        "Check all of a recipe that can be checked before training: files, labels, masks, memory, steps.",
    ),
    "mask": Listed("mask.mask_app", _MORE, "Look into mask files, compare them, take them in and give them out."),
    "env": Listed("env.env", _MORE, "Show versions, processors and memory, for a bug report."),
}
_UsageError: Any = typer.BadParameter.__bases__[0]
"""Whatever is wrong with a command line; Typer has no name of its own for it."""


class _Root(TyperGroup):
    """The group of all commands; imports none but the one that is called."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # Typer would end the program itself
            raise Interrupted("Stopped.") from None
        except _UsageError as error:
            error.message = visible_line(error.message)
            if getattr(error, "option_name", None) in OPTIONS:
                error.possibilities = [OPTIONS[error.option_name]]
            raise

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            error.message = visible_line(error.message)
            raise

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name == "eval":
            from mftctl.cli.template_option import with_value

            rest = with_value(rest)
        return name, command if name is None else load_command(name), rest


def load_command(name: str) -> Any:
    """The command of that name, with its module imported.

    Raises:
        ConfigError: Several processes were started for a command that one does, or the environment has names or
            numbers that it cannot work with.
    """
    check_environment(sys.argv[1:])
    if world_size() > 1 and name not in _TOGETHER:
        option = " --processes N" if name in _STARTS_THEM else ""
        raise ConfigError(
            f"{name} is a command for one process.",
            key="WORLD_SIZE",
            expected=f"1, or one of {', '.join(_TOGETHER)}",
            actual=world_size(),
            hint=f"mftctl {name}{option}, without accelerate launch or torchrun",
        )
    module, attribute = COMMANDS[name].home.split(".")
    found = getattr(import_module(f"mftctl.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        return get_command(found)
    alone = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    alone.command(name)(found)
    return get_command(alone)


def build_app() -> typer.Typer:
    """The Typer application, which knows all commands by name and summary."""
    app = typer.Typer(
        name="mftctl",
        cls=_Root,
        help=HELP,
        no_args_is_help=True,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for name, listed in COMMANDS.items():
        app.command(name, help=listed.summary, rich_help_panel=listed.panel)(_not_loaded)
    return app


def _not_loaded() -> None:
    """Stands for a command in the list."""


def main() -> None:
    """Runs the command line; known failures end with their message and exit code, unknown ones with a traceback."""
    # The libraries' own bars and advice would drown the progress shown here.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    prepare_streams()
    settle_environment()
    end_as_on_interrupt()
    try:
        with known_failures():
            build_app()()
    except MftError as error:
        from mftctl.cli.output import Output

        _end_open_runs()
        Output().error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        from mftctl.cli.output import Output

        _end_open_runs()
        Output().note("Stopped.")
        sys.exit(130)
    finally:
        error_type = sys.exc_info()[0]
        if error_type is not None and not issubclass(error_type, SystemExit):
            _end_open_runs()
        leave()


def _end_open_runs() -> None:
    """Nothing, unless the command came as far as to have a run."""
    if "mftctl.experiments.run_folder" in sys.modules:
        from mftctl.experiments.recording import end_open_runs

        end_open_runs()


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mftctl {__version__}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass
