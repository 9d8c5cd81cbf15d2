"""Untrusted chat templates: their resource limits and failures."""

from __future__ import annotations

import resource
import signal
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from mftctl.data import template_limits
from mftctl.data.formats import to_example
from mftctl.data.rendering import Renderer
from mftctl.data.template_choice import TemplateChoice, choose_template
from mftctl.data.template_limits import limited, render_template
from mftctl.errors import DataError, ModelError
from tests.conftest import build_tokenizer

TURNS = [{"role": "user", "content": "A"}]

DOUBLED = "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
TOO_MUCH = {
    "doubled": DOUBLED,
    "multiplied": "{{ 'a' * 10**10 }}",
    "padded": "{{ 'a'.ljust(10**11) }}",
    "formatted": "{{ '%099999999999d' % 1 }}",
    "centred": "{{ 'a' | center(10**11) }}",
    "replaced": "{{ ('a' * 10**5).replace('a', 'b' * 10**5) }}",
}
TOO_LONG = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 10 ** (10**10) }}",
    "constant": "{{ (10**(10**6))**40 }}",
}
FAILING = {
    "types": "{{ 1 + 'a' }}",
    "division": "{{ 1 / 0 }}",
    "include": "{% include 'x' %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks": "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
    "said": "{{ raise_exception('a' * 10**6) }}",
}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short time limit, so that the tests are fast."""
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("template", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_takes_too_much_memory_is_stopped(template: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ModelError, match="exceeds the resource limits") as caught:
        render_template(TURNS, template)
    assert caught.value.actual == "more memory than allowed"
    assert "at most 5 s, 512 MiB and 16,777,216 characters" in str(caught.value.expected)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


@pytest.mark.slow
@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("template", TOO_LONG.values(), ids=TOO_LONG)
def test_a_template_that_takes_too_long_is_stopped(template: str) -> None:
    handler, start = signal.getsignal(signal.SIGVTALRM), time.process_time()
    with pytest.raises(ModelError, match="exceeds the resource limits") as caught:
        render_template(TURNS, template)
    assert caught.value.actual in ("more than 0.2 s", "more memory than allowed")
    assert time.process_time() - start < 2
    assert signal.getsignal(signal.SIGVTALRM) is handler
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


@pytest.mark.slow
def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(ModelError, match="exceeds the resource limits") as caught:
        render_template(TURNS, "{{ 'a' * 20000000 }}")
    assert caught.value.actual == "a text of 20,000,000 characters"
    assert render_template(TURNS, "{{ 'a' * 1000000 }}")[0] == "a" * 1_000_000


@pytest.mark.parametrize("template", FAILING.values(), ids=FAILING)
def test_a_template_that_fails_is_one_error_with_the_record(template: str) -> None:
    renderer = Renderer(build_tokenizer(chat_template=template), "all", datetime.now(UTC))
    with pytest.raises(DataError, match="fails on this record") as caught:
        renderer.render(to_example({"prompt": "a", "completion": "b"}, "x:1"))
    assert caught.value.path == "x:1"
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("template", FAILING.values(), ids=FAILING)
def test_a_template_that_fails_can_be_chosen(template: str) -> None:
    tokenizer = build_tokenizer(chat_template=template)
    choose_template(tokenizer, TemplateChoice())
    assert tokenizer.chat_template == template


def test_a_template_that_exceeds_a_limit_cannot_be_chosen() -> None:
    with pytest.raises(ModelError, match="exceeds the resource limits"):
        choose_template(build_tokenizer(chat_template=TOO_MUCH["multiplied"]), TemplateChoice())


@pytest.mark.parametrize("template", [TOO_MUCH["multiplied"], FAILING["division"]])
def test_rendering_by_other_libraries_has_the_same_limits(template: str) -> None:
    tokenizer: Any = build_tokenizer(chat_template=template)
    with pytest.raises((ModelError, DataError)) as caught:
        limited(tokenizer.apply_chat_template)(TURNS, tokenize=False)
    assert caught.value.key == "chat_template"
