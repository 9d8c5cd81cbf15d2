"""Only visible characters of any text reach a terminal, wherever the text is inserted."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from mftctl.cli.output import Output, pairs_table
from mftctl.cli.streams import PlainTextConsole
from mftctl.errors import ConfigError
from mftctl.progress import Progress
from tests.cli.running import CommandLine
from tests.cli.test_streams import run_python
from tests.hostile_texts import OBEYED, TEXTS

STYLES = re.compile(r"\x1b\[[0-9;]*m")


def shown(*views: object, width: int = 60) -> str:
    """Output sent to a terminal with colours, stripped of the colours."""
    stream = io.StringIO()
    console = PlainTextConsole(file=stream, force_terminal=True, width=width, color_system="standard", emoji=False)
    for view in views:
        console.print(view)
    return STYLES.sub("", stream.getvalue())


@pytest.mark.slow
@given(TEXTS)
def test_no_view_sends_control_sequences_to_a_terminal(text: str) -> None:
    table = Table(title=escape(text), caption=Text(text))
    table.add_column(escape(text))
    table.add_row(Text(text))
    tree = Tree(escape(text))
    tree.add(Text.assemble((text, "bold")))
    sent = shown(escape(text), Text(text), table, tree, pairs_table("Facts", [(text, text)]))
    assert not OBEYED & set(sent)


def test_the_width_of_a_table_is_that_of_the_shown_text() -> None:
    table = Table("name", "number")
    table.add_row("\x1b]0;PWN\x07", "1")
    lines = shown(table).splitlines()
    assert "\\x1b]0;PWN\\x07" in shown(table)
    assert len({len(line) for line in lines}) == 1


def test_no_text_makes_a_link() -> None:
    assert "http://e" not in shown(Text.from_markup("[link=http://e]here[/link]"))
    assert "8;" not in shown(Text.from_ansi("\x1b]8;;http://e\x1b\\here\x1b]8;;\x1b\\"))


@pytest.mark.slow
@given(TEXTS)
def test_messages_results_and_errors_escape_control_characters(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        out, messages = io.StringIO(), io.StringIO()
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", messages)
        console = Output()
        console.note(text)
        console.warn(text)
        console.progress(Progress(text, 1, 2))
        console.next_command("mftctl", "apply", text, Path(text.replace("\0", "")))
        console.error(ConfigError(text, path=text, key=text, actual=text, problems=[text]))
        console.text(text)
        console.result({}, pairs_table("Facts", [(text, text)]))
        Output(as_json=True).result({text.encode("utf-8", "replace").decode(): text})
    assert not OBEYED & set(out.getvalue() + messages.getvalue())


def test_a_name_with_a_line_break_cannot_fake_another_line() -> None:
    error = ConfigError("Bad.", path="a\n  try: rm -rf /\nError: b", hint="look")
    assert str(error).split("\n") == ["Bad.", "  where: a", "      try: rm -rf /", "    Error: b", "  try: look"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--\x1b]0;PWN"],
        ["\x1b]0;PWN"],
        ["fft", "--\x1b]0;PWN"],
        ["fft", "\x1b]0;PWN"],
        ["fft", "--set", "\x1b]0;PWN=1"],
        ["fft", "--epochs", "\x1b]0;PWN"],
        ["mask", "info", "\x1b]0;PWN"],
        ["run", "\x9b31m"],
        ["eval", "\u202ex"],
    ],
)
def test_no_argument_is_echoed_as_a_control_sequence(mftctl: CommandLine, arguments: list[str]) -> None:
    outcome = mftctl(*arguments)
    assert outcome.code != 0
    assert not OBEYED & set(outcome.stderr + outcome.stdout)


def test_messages_of_other_libraries_are_escaped_too() -> None:
    code = r"prepare_streams()" + "\nimport sys, warnings\n"
    code += r"print('\x1b]0;a\x07', file=sys.stderr); warnings.warn('\x9b1m\u202e'); raise ValueError('\x1b[2J')"
    done = run_python(code)
    assert b"\\x1b]0;a\\x07" in done.stderr
    assert b"ValueError: \\x1b[2J" in done.stderr
    assert not OBEYED & set(done.stderr.decode())


def test_colours_of_our_own_still_reach_a_terminal() -> None:
    code = "prepare_streams()\nfrom rich.console import Console\n"
    code += "Console(stderr=True, force_terminal=True, color_system='standard').print('[red]x[/]')"
    assert run_python(code, TERM="xterm", NO_COLOR="").stderr == b"\x1b[31mx\x1b[0m\n"


def test_even_a_short_task_is_seen_on_a_terminal() -> None:
    with pytest.MonkeyPatch.context() as patch:
        messages = io.StringIO()
        patch.setattr("sys.stderr", messages)
        patch.setattr(messages, "isatty", lambda: True)
        patch.setenv("TERM", "xterm")
        with Output() as console:
            console.progress(Progress("training", 1, 2, loss=1.5))
            console.progress(Progress("training", 2, 2))
    assert "training" in messages.getvalue()
    assert "loss 1.5000" in messages.getvalue()
