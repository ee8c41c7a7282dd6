"""Tables as Markdown: what pages hold, and what terminals show well enough.

What it teaches: one way to write a thing that everybody writes by hand, so that all look the same.

    markdown(("rule", "score"), ("safe", "0.91"), align="lr")

    | rule | score |
    |---|---:|
    | safe | 0.91 |
"""

from typing import Sequence

RULES = {"l": "---", "r": "---:"}


def markdown(*rows: Sequence[object], align: str = "") -> list[str]:
    """Lines of a table, one for each row of cells, the first one its head.

    align: a letter for each column, l or r; "": all left. Raises ValueError for another number of cells.
    """
    columns = len(rows[0])
    if any(len(cells) != columns for cells in rows):
        raise ValueError(f"a table of {columns} columns has a row of another length: {rows}")
    head, *body = ["| " + " | ".join(map(str, cells)) + " |" for cells in rows]
    rules = [RULES[letter] for letter in align or "l" * columns]
    return [head, "|" + "|".join(rules) + "|", *body]
