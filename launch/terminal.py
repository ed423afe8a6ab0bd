"""What Trifold prints: one console, which never passes a control character on to the terminal.

File names, column names and values of config.json come from strangers. An escape sequence in one of them
could clear the screen or forge a line, so each control character is printed as its Python escape. Passwords
and keys are masked.
"""

import io
import os
import re
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

# C0 without tab and newline, DEL and C1; marks that reverse the direction of the text after them; lone
# surrogates (bytes that were no UTF-8)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}

# NAME:PASSWORD@ or a token before @ in a URL (a port is neither), a signature in its query, a hub token
_SECRET = re.compile(
    r"(?<=://)[^\s/:@]*:(?!\d+/)\S+(?=@)"
    r"|(?<=://)[^\s/:@]{16,}(?=@)"
    r"|(?<=X-Amz-Signature=)[^&\s]+|(?<=X-Amz-Credential=)[^&\s]+|(?<=X-Amz-Security-Token=)[^&\s]+"
    r"|\bhf_[A-Za-z0-9]{16,}"
)
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)(_ID|_KEY)?$", re.IGNORECASE)
_MASK = "***"


def visible(text: str) -> str:
    r"""The text with secrets masked and each control character as its escape: ESC becomes `\x1b`."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], mask_secrets(text))


def mask_secrets(text: str) -> str:
    """Mask passwords in URLs, hub tokens, and values of variables such as AWS_SECRET_ACCESS_KEY."""
    for name, value in os.environ.items():
        if len(value) >= 8 and value in text and _SECRET_NAME.search(name):
            text = text.replace(value, _MASK)
    return _SECRET.sub(_MASK, text)


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
