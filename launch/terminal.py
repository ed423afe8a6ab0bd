"""What Trifold prints: one console, which never passes a control character on to the terminal.

File names, column names and values of config.json come from strangers. An escape sequence in one of them could
clear the screen or forge a line, so each control character is printed as its Python escape.
"""

import io
import re
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

# C0 without tab and newline, DEL and C1; marks that reverse the direction of the text after them; lone
# surrogates (bytes that were no UTF-8)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def visible(text: str) -> str:
    r"""The text with each control character as its escape: ESC becomes `\x1b`."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


class Terminal(Console):
    """A rich console that shows control characters as escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def print_line(self, text: str, **options: Any) -> None:
        """Print text as it is: no markup, no highlighting, no wrapping."""
        self.print(text, **PLAIN | options)


def use_utf8() -> None:
    """Write UTF-8 to stdout and stderr, whatever the locale: Latin-1 has no sign for most of what a model
    writes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
