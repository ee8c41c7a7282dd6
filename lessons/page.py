"""A lesson: numbers small enough to follow by hand, computed here, and once more by the page that shows them.

What it teaches: arithmetic is understood when it is changed and watched. Every lesson is a function of a
few inputs. Here it is the project's own code that computes it (`packing.Rows`, `moe.route`, ...); in the
browser a few lines of JavaScript repeat the arithmetic, so that a slider moves every number after it. The
page begins by comparing its own numbers with those that were computed here, and says whether they agree.

    inputs --the project's functions--> numbers --+                         (written into the page)
           --NAME.js: compute--------> numbers --+--> equal? --> NAME.js: draw --> tables and drawings

A page stands alone: its style, its script and its data are in it, its policy forbids everything else.
Simplified: the JavaScript knows what the inputs of its page can be, and no more (tests/test_lessons.py
compares it with Python on inputs all over their ranges).
"""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from tools.drawing import CSS, el, safe

HERE = Path(__file__).parent
STYLE = CSS + (HERE / "lesson.css").read_text(encoding="utf-8")
SHARED_SCRIPT = (HERE / "lesson.js").read_text(encoding="utf-8")

# What a lesson gets and gives: values that JSON can hold.
Values = dict[str, Any]


@dataclass(frozen=True)
class Lesson:
    """One page.

    name: of its script, NAME.py and NAME.js, and of the page. example: the inputs that it opens with.
    numbers: inputs -> what the project computes of them; raises ValueError for what it refuses.
    controls: finished markup, each control named by its place among the inputs ("sizes.0").
    parts: (id, title, what it shows) of what the script fills. source: where the project does it.
    data: what the script needs to know besides.
    """

    name: str
    title: str
    teaches: str
    example: Values
    numbers: Callable[[Values], Values]
    controls: tuple[str, ...]
    parts: tuple[tuple[str, str, str], ...]
    source: str
    data: Values = field(default_factory=dict)

    @property
    def script(self) -> str:
        return (HERE / f"{self.name}.js").read_text(encoding="utf-8")


def lesson_numbers(lesson: Lesson, given: Values) -> Values:
    """The numbers of some inputs, or {"refused": why}."""
    try:
        return lesson.numbers(given)
    except ValueError as error:
        return {"refused": str(error)}


# ----------------------------------------------------------------------------------------- controls


def attributes_of(values: Values) -> str:
    """Attributes of an element; True stands alone, False is left out."""
    text = ""
    for name, value in values.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        if value is True:
            text += f" {name}"
        elif value is not False:
            text += f' {name}="{safe(shown)}"'
    return text


def named_control(text: str, control: str, *more: str) -> str:
    """A control under its name."""
    return el("label", el("span", safe(text)), control, *more)


def slider(
    path: str,
    text: str,
    low: float,
    high: float,
    value: float,
    step: float = 1,
    power: bool = False,
) -> str:
    """A number that is dragged, beside its value. power: the number is an exponent of ten."""
    limits = {"min": low, "max": high, "step": step, "value": value}
    control = f"<input{attributes_of({'type': 'range', 'name': path} | limits)}>"
    return named_control(text, control, f"<output{attributes_of({'data-power': power})}></output>")


def number_box(path: str, text: str, low: float, high: float, value: float, step: float) -> str:
    """A number that is typed."""
    limits = {"min": low, "max": high, "step": step, "value": value, "required": True}
    return named_control(text, f"<input{attributes_of({'type': 'number', 'name': path} | limits)}>")


def tick_box(path: str, text: str, on: bool) -> str:
    """Yes or no."""
    box = f"<input{attributes_of({'type': 'checkbox', 'name': path, 'checked': on})}>"
    return el("label", box, el("span", safe(text)), cls="tickbox")


def text_box(path: str, text: str, value: str) -> str:
    """A line of text."""
    limits = {"type": "text", "name": path, "value": value, "maxlength": 200}
    return named_control(text, f"<input{attributes_of(limits)}>")


def choice(path: str, text: str, names: tuple[str, ...], value: str) -> str:
    """One of some words."""
    options = ""
    for name in names:
        state = {"value": name, "selected": name == value}
        options += f"<option{attributes_of(state)}>{safe(name)}</option>"
    return named_control(text, f"<select{attributes_of({'name': path})}>{options}</select>")


def controls_row(title: str, *controls: str) -> str:
    """Controls that belong together."""
    return el("fieldset", el("legend", safe(title)), *controls)


# ----------------------------------------------------------------------------------------- the page


def as_script(value: Values) -> str:
    """A value as JavaScript that may stand inside an element."""
    return json.dumps(value, ensure_ascii=False).replace("</", "<\\/")


def page_script(lesson: Lesson) -> str:
    """All that runs in the page: what lessons share, the lesson's own, and its beginning."""
    opening = {
        "example": lesson.example,
        "numbers": lesson_numbers(lesson, lesson.example),
        "data": lesson.data,
    }
    return f"{SHARED_SCRIPT}\n{lesson.script}\nbegin({as_script(opening)});\n"


def lesson_head(lesson: Lesson, script: str) -> str:
    """Character set, width, style, and a policy that lets this very script run and nothing else."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    )
    head += f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    return head + el("title", safe(lesson.title)) + el("style", STYLE)


def lesson_page(lesson: Lesson, others: list[Lesson]) -> str:
    """The page as a string. others: all lessons, for the links between them."""
    script = page_script(lesson)
    links = [lesson_link(other, here=other.name == lesson.name) for other in others]

    # what a reader changes, and what follows from it
    reset = el("button", "back to the example", type="reset")
    form = el("form", *lesson.controls, reset, id="controls", autocomplete="off")
    figures = []
    for name, title, shows in lesson.parts:
        note = el("p", safe(shows), cls="note")
        figures.append(el("section", el("h2", safe(title)), note, el("div", id=name)))
    body = [
        el("nav", *links),
        el("h1", safe(lesson.title)),
        el("p", safe(lesson.teaches), cls="note"),
        form,
        el("p", "This page needs JavaScript, which is all in it.", id="checked", cls="soft"),
        el("p", id="refused", cls="bad", role="alert"),
        el("main", *figures, id="figures"),
        el("footer", el("p", safe(lesson.source), cls="soft")),
        f"<script>{script}</script>",
    ]
    head = lesson_head(lesson, script)
    inside = "\n".join(body)
    return f'<!doctype html>\n<html lang="en">{head}\n<body>\n{inside}\n</body></html>\n'


def lesson_link(lesson: Lesson, here: bool) -> str:
    """A lesson's name in the line above every page; that of the page itself leads nowhere."""
    if here:
        return el("b", safe(lesson.name))
    return el("a", safe(lesson.name), href=f"{lesson.name}.html")
