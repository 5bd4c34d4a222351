"""Text that others wrote, made harmless for logs, terminals and messages. Pure."""

from __future__ import annotations


def escaped(text: str) -> str:
    """Return the text on one line, with unprintable characters shown as escapes.

    Names of runs and files come from elsewhere: one with a line break could forge a log line, one
    with a control character could control the reader's terminal.
    """
    if text.isprintable():  # as nearly all are
        return text
    # `repr` would escape quotes and backslashes, too, and change names that are harmless.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
