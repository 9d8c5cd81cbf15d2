"""The `mftctl` command: registers the commands and turns known failures into one message and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import warnings
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

The workflow: fft, probe, mask-train, apply, eval, report. In an empty folder, each of them works without any options,
on a small built-in model and its data. To run the whole workflow at once: `mftctl run quickstart`.
"""


class Listed(NamedTuple):
    """A command as listed in the top-level help; its module is imported when the command is called.

    Attributes:
        home: Module in `mftctl.cli` and the function in it.
        panel: The help panel it is listed in.
        summary: The first line of its help.
    """

    home: str
    panel: str
    summary: str


_TOGETHER = ("fft", "probe", "mask-train")
"""Commands that accelerate launch or torchrun can start as several processes."""

_STARTS_THEM = ("eval", "run")
"""The other commands that can start several processes themselves."""

_PATH = "Workflow"
_MORE = "Other commands"
COMMANDS = {
    "fft": Listed("fft.fft", _PATH, "Fine-tune a model and keep its best checkpoint."),
    "probe": Listed("probe.probe", _PATH, "Find the layers or projections that benefit most from a mask."),
    "mask-train": Listed("mask_train.mask_train", _PATH, "Learn which weights of a fine-tuned model to remove."),
    "apply": Listed(
        "apply.apply",
        _PATH,
        "Apply a mask or a delta file to a model and write an ordinary checkpoint that any server can load.",
    ),
    "eval": Listed("eval.evaluate", _PATH, "Measure loss and exact match on a data file, or run benchmarks."),
    "report": Listed("report.report", _PATH, "Compare all evaluated models: did the mask help, and beyond noise?"),
    "run": Listed("run.run", _MORE, "Run a whole experiment from a recipe and write its report."),
    "validate": Listed(
        "validate.validate",
        _MORE,
        "Check everything in a recipe that can be checked before training: files, labels, masks, memory, steps.",
    ),
    "average": Listed("average.average", _MORE, "Average checkpoints of the same model into an ordinary checkpoint."),
    "delta": Listed("delta.delta", _MORE, "Store what fine-tuning changed in a model as a small file."),
    "delta merge": Listed("delta_merge.merge", _MORE, "Merge the changes of several delta files onto their base."),
    "delta export": Listed(
        "delta_exchange.export", _MORE, "Export a delta file of linear layers as a Super-Tuning adapter of peft."
    ),
    "delta import": Listed("delta_exchange.import_", _MORE, "Convert a Super-Tuning adapter of peft to a delta file."),
    "interpolate": Listed(
        "interpolate.interpolate",
        _MORE,
        "Choose by validation how far to go from the model before fine-tuning to the fine-tuned one.",
    ),
    "generate": Listed(
        "generate.generate", _MORE, "Show answers of a model to a few prompts, with and without a mask."
    ),
    "data": Listed("data.data_app", _MORE, "Look at training data, and fetch the data of benchmarks."),
    "cache": Listed("cache.cache_app", _MORE, "Manage the cache of prepared data."),
    "mask": Listed("mask.mask_app", _MORE, "Inspect, compare, import, export and upload mask files."),
    "env": Listed("env.env", _MORE, "Show versions and hardware for a bug report."),
}
_UsageError: Any = typer.BadParameter.__bases__[0]
"""Base class of all command-line usage errors, for which Typer has no public name."""


class _Root(TyperGroup):
    """The group of all commands; imports only the one that is called."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # Typer would exit by itself
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
        if " ".join(args[:2]) in COMMANDS:  # a name of two words
            args = [" ".join(args[:2]), *args[2:]]
        name, command, rest = super().resolve_command(ctx, args)
        if name == "eval":
            from mftctl.cli.template_option import with_value

            rest = with_value(rest)
        return name, command if name is None else load_command(name), rest


def load_command(name: str) -> Any:
    """Returns the command with this name, after importing its module.

    Raises:
        ConfigError: Several processes were started for a single-process command, or the environment contains names or
            numbers that the command cannot work with.
    """
    check_environment(sys.argv[1:])
    if world_size() > 1 and name not in _TOGETHER:
        option = " --processes N" if name in _STARTS_THEM else ""
        raise ConfigError(
            f"{name} runs as a single process.",
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
    """Returns the Typer application with all commands registered by name and summary."""
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
    """Placeholder for a command whose module is not imported yet."""


def _quiet_libraries() -> None:
    """Turns off the libraries' own progress bars and advice, which would drown out the progress shown here."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # On CPUs with AVX512-BF16, importing it, as peft does, recommends a package for inference in 4 bits.
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)
    # peft 0.21 asks transformers 5 by the old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def main() -> None:
    """Runs the command line; known failures end with a message and an exit code, unknown ones with a traceback."""
    _quiet_libraries()
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
    """Marks open runs as ended, if the command got as far as creating one."""
    if "mftctl.experiments.run_folder" in sys.modules:
        from mftctl.experiments.recording import end_open_runs

        end_open_runs()


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"mftctl {__version__}\n")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass
