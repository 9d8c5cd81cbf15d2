"""Every correct form of an answer becomes a correct program, whatever text surrounds it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mftctl.evaluation.benchmarks.written_programs import Function, written_program

PROMPT = (
    "from typing import List\n\n\ndef helper(x: int) -> int:\n    return x\n\n\n"
    'def double(xs: List[int]) -> List[int]:\n    """Each twice.\n\n    >>> double([1])\n    [2]\n    """\n'
)
ASKED = Function("double", PROMPT)
NAMED = Function("double")
ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n@", "\nassert")
BODY = "    return [2 * helper(x) for x in xs]\n"
WHOLE = f"def double(xs: List[int]) -> List[int]:\n{BODY}"
ALONE = "def double(xs):\n    return [2 * x for x in xs]\n"
DRAFT = "def double(xs):\n    return xs\n"

RESTS = {
    "the rest": BODY,
    "the rest after an empty line": f"\n{BODY}",
    "the rest and another function": f"{BODY}\n\ndef double(xs):\n    return []\n",
    "the rest and a test of its own that fails": f"{BODY}\nassert double([1]) == [3]\n",
    "the rest and the end of a fence": f"{BODY}```\n\nIt doubles.\n\n```python\nprint(double([1]))\n```",
    "the rest and words": f"{BODY}\nThis doubles each.\n",
    "the rest with a comment at the margin": f"    out = []\n# each of them\n{BODY}",
    "the rest in a fence": f"```python\n{BODY}```",
    "the rest in a fence after a sentence": f"The body is:\n\n```\n{BODY}```\nDone.",
    "the rest with a function inside": "    def twice(x):\n        return 2 * x\n\n    return [twice(x) for x in xs]\n",
}
WHOLES = {
    "a whole function": ALONE,
    "a whole function after a space": f" {ALONE}",
    "a whole function after a comment": f"# each twice\n{ALONE}",
    "a whole function after an import": f"from typing import List\n\n\n{WHOLE.replace('helper(x)', 'x')}",
    "a whole function after a future import": f"from __future__ import annotations\n\n{ALONE}",
    "a whole function between sentences": f"Here is the function:\n\n{ALONE}\nIt doubles each number.\n",
    "a whole function and a helper": f"{ALONE.replace('2 * x', 'two(x)')}\n\ndef two(x):\n    return 2 * x\n",
    "a decorated function": f"import functools\n\n@functools.cache\ndef two(x):\n    return 2 * x\n\n\n{ALONE}",
    "an asynchronous helper before": f"async def other():\n    pass\n\n{ALONE}",
    "a named lambda": "double = lambda xs: [2 * x for x in xs]\n",
    "a fence": f"```python\n{ALONE}```",
    "a fence of three tildes": f"~~~python\n{ALONE}~~~",
    "a fence of four": f"````py\n{ALONE}````",
    "a fence with more in its first line": f'```python title="a.py"\n{ALONE}```',
    "a fence without its end": f"```python\n{ALONE}",
    "a fence that ends in the last line of code": f"```python\n{ALONE.rstrip()}```",
    "a fence behind words in its line": f"Answer: ```python\n{ALONE}```",
    "an indented fence": "1. So:\n\n   ```python\n" + "".join(f"   {line}\n" for line in ALONE.splitlines()) + "   ```",
    "code marked by indentation": "So:\n\n" + "".join(f"    {line}\n" for line in ALONE.splitlines()) + "\nDone.\n",
    "a fence with carriage returns": f"```python\n{ALONE}```".replace("\n", "\r\n"),
    "a sentence and a fence": f"Here is the function:\n\n```python\n{ALONE}```\n\nIt doubles each number.",
    "a fence with comments": f"```python\n# each\n# twice\n{ALONE}# done\n```",
    "a fence with imports": f"```python\nimport math\nfrom typing import List\n\n{ALONE}```",
    "a fence with its tests": f"```python\n{ALONE}\nassert double([1]) == [3]\nprint(double('no', 1))\n```",
    "a fence with a main part": f"```python\n{ALONE}\nif __name__ == '__main__':\n    print(double())\n```",
    "a fence with a docstring that has a fence": f'```python\ndef double(xs):\n    """As in ``x``."""\n{ALONE[16:]}```',
    "the question repeated first": f"```python\n{PROMPT}```\n\nThe answer:\n\n```python\n{ALONE}```",
    "an announcement first": f"```python\ndef double(xs):\n    pass\n```\nThen:\n```python\n{ALONE}```",
    "a command first": f"```bash\npip install numpy\n```\n\n```python\n{ALONE}```",
    "its use in another fence": f"```python\n{ALONE}```\n\n```python\nprint(double([1]))\n```\n\n```\n[2]\n```",
    "its helper in a fence before": "```python\ndef two(x):\n    return 2 * x\n```\nand\n```python\n"
    + ALONE.replace("2 * x", "two(x)")
    + "```",
    "its helper in a fence after": "```python\n"
    + ALONE.replace("2 * x", "two(x)")
    + "```\nwith\n```python\ndef two(x):\n    return 2 * x\n```",
    "thoughts first": f"<think>\nMaybe:\n```python\n{DRAFT}```\nNo.\n</think>\n\n```python\n{ALONE}```",
    "thoughts without their beginning": f"{DRAFT}Hm, no.\n</think>\n{ALONE}",
    "the end cut off": f"{ALONE}\nprint(double([1, 2",
    "a word that happens to be Python": f"Sure\n\n{ALONE}\nDone",
}


def run(source: str) -> Any:
    names: dict[str, Any] = {"__name__": "solution"}
    exec(compile(source, "<answer>", "exec", dont_inherit=True), names)
    return names["double"]([1, 2])


@pytest.mark.parametrize("form", RESTS)
def test_a_correct_function_body(form: str) -> None:
    assert run(written_program(RESTS[form], ASKED, ENDS)) == [2, 4]


@pytest.mark.parametrize("form", [form for form in RESTS if "another function" not in form])
def test_a_correct_function_body_without_a_stop_string(form: str) -> None:
    assert run(written_program(RESTS[form], ASKED)) == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(), ENDS], ids=["no ends", "ends"])
@pytest.mark.parametrize("asked", [ASKED, NAMED, Function("")], ids=["prompt", "name", "neither"])
@pytest.mark.parametrize("form", WHOLES)
def test_a_correct_whole_function(form: str, asked: Function, ends: tuple[str, ...]) -> None:
    if not asked.name and form in ("a named lambda", "the question repeated first", "its helper in a fence before"):
        pytest.skip("without a name the first definition counts")
    if not asked.name and form == "an announcement first":
        pytest.skip("without a name nothing tells an announcement")
    answer = WHOLES[form]
    assert run(written_program(answer, asked, ends)) == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(), ENDS], ids=["no ends", "ends"])
@pytest.mark.parametrize("form", WHOLES)
def test_a_wrong_answer_of_the_same_form_stays_wrong(form: str, ends: tuple[str, ...]) -> None:
    wrong = WHOLES[form].replace("2 * ", "3 * ")
    assert wrong != WHOLES[form]
    assert run(written_program(wrong, ASKED, ends)) == [3, 6]


def test_a_whole_function_keeps_preceding_code_of_the_prompt() -> None:
    assert written_program(f"```python\n{WHOLE}```", ASKED) == f"{ASKED.before}{WHOLE.rstrip()}"


def test_text_that_is_not_a_program_is_appended_to_the_prompt() -> None:
    assert written_program("I cannot.", ASKED, ENDS) == f"{PROMPT}I cannot."
    assert written_program("", NAMED) == ""


def test_an_empty_body_alone_is_the_answer() -> None:
    assert run(written_program("    pass\n", ASKED, ENDS)) is None
    assert run(written_program("```python\ndef double(xs):\n    pass\n```", NAMED)) is None


def test_truncated_thinking_does_not_hide_the_question() -> None:
    assert "double" in written_program("<think>\nLet me see", ASKED)


@pytest.mark.slow
@pytest.mark.parametrize("nasty", ["-" * 100_000 + "1", "(" * 5_000, "a" + ".b" * 100_000, "x\0", "```\n" * 3_000])
def test_code_too_deeply_nested_to_compile_is_treated_as_any_answer(nasty: str) -> None:
    assert nasty[:20].strip("`\n") in written_program(nasty, ASKED, ENDS)


def test_warnings_of_an_answer_are_ignored() -> None:
    with warnings.catch_warnings(action="error"):
        source = written_program("    '\\d'\n    return [2, 4]\n", ASKED, ENDS)
    assert source.endswith("    return [2, 4]\n")


@given(st.text(alphabet="`~ \n\tdefxouble():=#'\"\\return12"), st.booleans())
def test_any_text_gives_some_program(text: str, asked: bool) -> None:
    assert isinstance(written_program(text, ASKED if asked else NAMED, ENDS), str)


def test_a_comprehension_run_for_its_effect_is_kept() -> None:
    filled = f"memo = []\n[memo.append(i) for i in range(3)]\n\n\n{ALONE}"
    assert "[memo.append(i)" in written_program(filled, NAMED)
