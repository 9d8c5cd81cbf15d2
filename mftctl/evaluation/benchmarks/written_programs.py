"""Extracts the program from an answer: a function body, a whole function, fenced code, code surrounded by prose.

Several readings of an answer are tried in turn; the first that compiles and gives the function a body counts.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from mftctl.evaluation.lm.stop_strings import cut_at

_THOUGHTS_END = "</think>"
_FENCE = re.compile(r"^(?P<before>[^`~\n]*?)(?P<fence>`{3,}|~{3,})[^`~\n]*$")
_MOST_READINGS = 600
_MOST_BLOCKS = 40
"""Each block is compiled; a sensible answer has far fewer."""


@dataclass(frozen=True, slots=True)
class Function:
    """The function that an answer should define.

    Attributes:
        name: Name of the function; empty if any definition will do.
        prompt: The start of the function and the code before it, if given; empty otherwise.
    """

    name: str
    prompt: str = ""

    @property
    def before(self) -> str:
        """Imports and other functions of the prompt, before the function itself."""
        start = _definition(self.name).search(self.prompt)
        return "" if start is None else self.prompt[: start.start()]


@dataclass(frozen=True, slots=True)
class _Reading:
    source: str
    is_stub: bool


def written_program(output: str, function: Function, ends: Sequence[str] = ()) -> str:
    """Extracts the program from an output, without thinking, surrounding prose and the model's own tests.

    Args:
        output: The model's output.
        function: The requested function.
        ends: Strings that end a function body; whole functions need none.

    Returns:
        A program that compiles, if there is such a reading; otherwise the prompt followed by the output.
    """
    text = output.replace("\r\n", "\n").replace("\r", "\n").rpartition(_THOUGHTS_END)[2]
    stub: str | None = None
    for reading in islice(_readings(text, function, ends), _MOST_READINGS):
        if reading is not None and not reading.is_stub:
            return reading.source
        if reading is not None and stub is None:
            stub = reading.source
    if stub is not None:
        return stub
    blocks, _ = _fenced(text)
    return function.prompt + (blocks[0] if blocks else cut_at(text, ends))


def _readings(text: str, function: Function, ends: Sequence[str]) -> Iterator[_Reading | None]:
    blocks, head = _fenced(text)
    goes_on = bool(function.prompt) and head.lstrip("\n")[:1].isspace()
    if goes_on:
        yield from _completions(head, function, ends)
    for place, block in enumerate(blocks):
        if function.name in block:
            yield from _whole_programs(_with_helpers(blocks, place, function.name), function)
            yield from _whole_programs(block, function)
    yield from _whole_programs(head, function)
    if function.prompt:
        for block in blocks:
            yield from _completions(block, function, ends)
        if not goes_on:
            yield from _completions(head, function, ends)
    yield from _whole_programs(cut_at(head, ends), function)


def _fenced(text: str) -> tuple[list[str], str]:
    """The contents of the fenced blocks, of which the last may be unclosed, and the text before the first."""
    blocks: list[str] = []
    head: list[str] = []
    block: list[str] | None = None
    fence, indent = "", 0
    for line in text.split("\n"):
        if block is None:
            opening = _FENCE.match(line)
            if opening is not None:
                fence, block = opening["fence"], []
                indent = len(opening["before"]) if opening["before"].isspace() else 0
            elif not blocks:
                head.append(line)
        elif line.rstrip().endswith(fence):
            last = line.rstrip().removesuffix(fence)
            blocks.append("\n".join([*block, last] if last.strip() else block))
            block = None
        else:
            # A fence within a list is indented together with its content.
            block.append(line[indent:] if not line[:indent].strip() else line)
    blocks = blocks if block is None else [*blocks, "\n".join(block)]
    return blocks[:_MOST_BLOCKS], "\n".join(head)


def _with_helpers(blocks: Sequence[str], place: int, name: str) -> str:
    """A block with the other blocks that contain only definitions: an answer may come in several pieces."""
    seen = _bound(_parsed(blocks[place]))
    before: list[str] = []
    after: list[str] = []
    for other, block in enumerate(blocks):
        tree = _parsed(block)
        names = _bound(tree)
        if other == place or tree is None or name in names or names & seen or not _only_defines(tree):
            continue
        seen |= names
        (before if other < place else after).append(block)
    return "\n\n".join([*before, blocks[place], *after])


def _only_defines(tree: ast.Module) -> bool:
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return bool(tree.body) and all(isinstance(statement, kinds) for statement in tree.body)


def _whole_programs(text: str, function: Function) -> Iterator[_Reading | None]:
    """Readings of the text, or of the longest part of it that is a program, that define the function."""
    for code in _programs_in(text, function.name):
        for source in dict.fromkeys((function.before + code, code)):
            yield _reading(source, function.name)


def _programs_in(text: str, name: str) -> Iterator[str]:
    """Parts of a text that are programs and define the function, earliest start and latest end first."""
    if not text.strip():
        return
    tree = _parsed(text)
    if tree is not None:
        if _defines(tree, name):
            yield text
        return
    lines = text.split("\n")
    first = next((n for n, line in enumerate(lines) if _definition(name).match(line)), None)
    if first is None:
        yield from _indented_program(lines, name)
        return
    flush = [n for n, line in enumerate(lines) if line.strip() and not line[0].isspace()]
    starts = [n for n in flush if n <= first]
    ends = [len(lines), *reversed([n for n in flush if n > first])]
    for start in starts:
        for end in ends:
            part = "\n".join(lines[start:end])
            tree = _parsed(part)
            if tree is not None and _defines(tree, name):
                yield part
                break


def _indented_program(lines: Sequence[str], name: str) -> Iterator[str]:
    """Code blocks that Markdown marks by indentation."""
    found = next((n for n, line in enumerate(lines) if _definition(name).match(line.lstrip())), None)
    if found is None:
        return
    margin = lines[found][: len(lines[found]) - len(lines[found].lstrip())]
    inside = [not line.strip() or line.startswith(margin) for line in lines]
    start, end = found, found
    while start > 0 and inside[start - 1]:
        start -= 1
    while end < len(lines) and inside[end]:
        end += 1
    code = textwrap.dedent("\n".join(lines[start:end]))
    if code != "\n".join(lines):
        yield from _programs_in(code, name)


def _completions(text: str, function: Function, ends: Sequence[str]) -> Iterator[_Reading | None]:
    """The prompt with the text up to its end, or with the longest part of the text that compiles with it."""
    yield _completed(_up_to(text, ends), function)
    yield _completed(text, function)
    lines = text.split("\n")
    flush = [n for n, line in enumerate(lines) if n and line.strip() and not line[0].isspace()]
    for end in reversed(flush):
        yield _completed("\n".join(lines[:end]) + "\n", function)


def _up_to(text: str, ends: Sequence[str]) -> str:
    """The text up to the first end; an unindented comment is not an end if the function continues after it."""
    start = 0
    while True:
        place = start + len(cut_at(text[start:], ends))
        if not text[place : place + 2] == "\n#" or not _goes_on(text[place + 1 :]):
            return text[:place]
        start = text.find("\n", place + 1)


def _goes_on(text: str) -> bool:
    lines = (line for line in text.split("\n") if line.strip() and not line.lstrip().startswith("#"))
    return next(lines, "x")[0].isspace()


def _completed(text: str, function: Function) -> _Reading | None:
    return _reading(function.prompt + text, function.name) if text.strip() else None


def _reading(source: str, name: str) -> _Reading | None:
    """The source without its own tests, if it compiles."""
    tree = _parsed(source)
    if tree is None or not _compiles(tree):
        return None
    return _Reading(_without_own_tests(source, tree), _is_stub(tree, name))


def _parsed(source: str) -> ast.Module | None:
    # Generated code may be nested too deeply for the compiler; its warnings are of no interest here.
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _compiles(tree: ast.Module) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(tree, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _definition(name: str) -> re.Pattern[str]:
    """Matches a line that starts the function, or any function or class if there is no name."""
    if not name:
        return re.compile(r"^(?:async\s+)?(?:def|class)\s+\w", re.MULTILINE)
    return re.compile(rf"^(?:(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b|{re.escape(name)}\s*=)", re.MULTILINE)


def _defines(tree: ast.Module, name: str) -> bool:
    return name in _bound(tree) if name else bool(_bound(tree))


def _bound(tree: ast.AST | None) -> set[str]:
    """The names that a program defines, excluding those local to its functions and classes."""
    names: set[str] = set()
    for node in () if tree is None else ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        else:
            names |= _bound(node)
    return names


def _is_stub(tree: ast.Module, name: str) -> bool:
    """True if the function is only a stub: a docstring, `...`, `pass` or `raise NotImplementedError`."""
    found = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    body = next((node.body for node in reversed(found) if node.name == name), None)
    return body is not None and all(_says_nothing(statement) for statement in body)


def _says_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise):
        error = statement.exc.func if isinstance(statement.exc, ast.Call) else statement.exc
        return isinstance(error, ast.Name) and error.id == "NotImplementedError"
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, ast.Pass)


def _without_own_tests(source: str, tree: ast.Module) -> str:
    """The source without statements that demonstrate or test the function, and without prose that parses as Python."""
    dropped: set[int] = set()
    kept: set[int] = set()
    for statement in tree.body:
        end = statement.lineno if statement.end_lineno is None else statement.end_lineno
        (dropped if _shows_or_tries(statement) else kept).update(range(statement.lineno, end + 1))
    gone = dropped - kept
    if not gone:
        return source
    lines = source.split("\n")
    return "\n".join("" if number in gone else line for number, line in enumerate(lines, start=1))


def _shows_or_tries(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr):
        return isinstance(statement, ast.Assert)
    value = statement.value
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id == "print"
    return not isinstance(value, ast.Constant | ast.ListComp | ast.SetComp | ast.DictComp)  # for effect
