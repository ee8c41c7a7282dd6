"""Write the five lessons: `python -m lessons`, then open runs/lessons/rows.html.

What it teaches: the list of lessons is here, in the order of a reader of the paper; every page links to
the others and needs no other file.
"""

from dataclasses import dataclass
from pathlib import Path

from infra.cli import command
from lessons import group, mask, routing, rows, trial
from lessons.page import Lesson, lesson_page

LESSONS: list[Lesson] = [lesson.LESSON for lesson in (rows, mask, routing, trial, group)]


@dataclass
class LessonOptions:
    """Write the pages, and say where."""

    out: Path = Path("runs/lessons")  # folder of the pages


def write_lesson_pages(options: LessonOptions) -> None:
    """A page for each lesson."""
    options.out.mkdir(parents=True, exist_ok=True)
    for lesson in LESSONS:
        path = options.out / f"{lesson.name}.html"
        path.write_text(lesson_page(lesson, LESSONS), encoding="utf-8")
        print(f"{path}  {lesson.title}")


if __name__ == "__main__":
    command(write_lesson_pages)
