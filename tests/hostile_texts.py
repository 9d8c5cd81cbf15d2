"""Texts that caused failures, or could: anything that a terminal, page, table or figure might interpret."""

from __future__ import annotations

from hypothesis import strategies as st

HOSTILE = (
    "\x1b]0;PWN\x07",  # sets the terminal title
    "\x1b[2J\x1b[31mred",
    "\x9b31m\x85next",  # the same as C1 controls
    "a\rb\x08\x7f\0",
    "\u202egnp.exe\u2066\u2069\u200f",
    "one\u2028two\u2029three",
    "two\nlines\n\n# and a heading",
    "[bold red]x[/] [link=http://e]y[/link] :key:",
    "<img src=x onerror=alert(1)><script>alert(1)</script>&lt;b&gt;",
    "![x](http://e/x.png)[y](javascript:alert(1)) [z]: http://e",
    "a|b `c` *d* _e_ ~~f~~ $g$ #h",
    "$x^{$ \\frac $$",
    "=1+1",
    "+1",
    "-2+3",
    "@SUM(A1)",
    "\t=cmd|' /C calc'!A0",
    "\uff1d1",
    "\"; ' , ;",
    "\\textbf{x} \\input{/etc/passwd} & % _ ^ ~ {",
    "[8pt]x",
    "_hidden",
    "- item",
    "1. one",
    " ",
    "\U0001f600 \u4e2d\u0301 \U000e0041",
    "\ud800",
    "%s {0} {{ 7*7 }} ${HOME} $(id)",
)

TEXTS = st.sampled_from(HOSTILE) | st.text(st.characters(), max_size=40)
"""These, and whatever hypothesis thinks of."""

OBEYED = frozenset(
    map(chr, [*range(9), *range(11, 32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F)])
) | frozenset(map(chr, [*range(0x2066, 0x206A), *range(0xD800, 0xE000)]))
"""Characters that no output may hold, other than in JSON, which spells them itself."""
