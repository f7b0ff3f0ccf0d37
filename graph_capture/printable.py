"""Make text safe to print on a terminal.

Names come from users' modules and from files. A terminal would take control
characters in them as commands: set the title, clear the screen, go back a line.
"""

from __future__ import annotations


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return ``text`` with every non-printable character escaped.

    Parameters
    ----------
    lines
        Whether line breaks stay.

    Examples
    --------
    >>> printable("\x1b[2J layer\n")
    '\\x1b[2J layer\\n'
    """
    if text.isprintable():
        return text
    if lines:
        return "\n".join(printable(line) for line in text.split("\n"))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
