"""Text that others wrote, made safe to print.

What it teaches: a terminal obeys control characters. A caption, a file name or an answer of the
model that holds some can clear the screen, retitle the window, or hide what was printed before.

    "red\\x1b[2Jcar"  ->  "red\\\\x1b[2Jcar"

Everything that came from data, from a file's name or out of a model goes through `printable`
before it reaches a terminal or a log that people read there.
"""

import unicodedata
from typing import IO, Any

# control, format (they turn the direction of writing around), surrogate, line and paragraph ends
UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
# joiners that scripts and emoji need: they move nothing
HARMLESS = "\u200c\u200d"


class Terminal:
    """A stream for people. Where it fails (a full disk behind it, a terminal that is closed) nothing is
    said, and nothing ends."""

    def __init__(self, file: IO[str]):
        self.file = file

    def write(self, text: str) -> int:
        try:
            return self.file.write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            self.file.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def printable(text: object, lines: bool = False) -> str:
    """The text with every control character as its escape; `lines` leaves line ends and tabs alone."""
    allowed = HARMLESS + ("\n\t" if lines else "")
    shown = []
    for character in str(text):
        unsafe = unicodedata.category(character) in UNSAFE and character not in allowed
        shown.append(escaped(character) if unsafe else character)
    return "".join(shown)


def escaped(character: str) -> str:
    """A character as Python would write it in a string: \\n, \\x1b, \\u202e."""
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
