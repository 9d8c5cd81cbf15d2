"""A console that obeys no text: what comes from outside is shown, and moves no cursor and sets no title."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from mftctl.visible_text import visible


class PlainTextConsole(Console):
    """Rich's console, with control characters of texts as escapes, and without links."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """A text as it is laid out: escaped before its width is taken."""
        return super().render_str(visible(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is written of anything, whoever made it."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            if control:
                yield segment
                continue
            is_link = style is not None and style.link is not None
            yield Segment(visible(text), style.update_link(None) if style is not None and is_link else style)
