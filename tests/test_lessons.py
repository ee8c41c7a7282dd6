"""The lessons: a page's arithmetic is the project's, it stands alone, and it follows its controls."""

import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lessons.__main__ import LESSONS, LessonOptions, write_lesson_pages
from lessons.page import HERE, SHARED_SCRIPT, Lesson, Values, lesson_numbers, lesson_page
from tools.screenshots import Browser

NODE = shutil.which("node")
# Reads [[given, data], ...] and prints the numbers of each.
ANSWER_ALL = """
const requests = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(JSON.stringify(requests.map(([given, data]) => answered(given, data))));
"""
TEXTS = (
    "",
    "3",
    "  red  circle ",
    "it's 12,345.67 and <|im_end|>\n\n<think>no",
    "\\boxed{blue}",
    "são 三 👀\tWE'LL SEE   ",
)


def drawn(lesson: Lesson, rng: random.Random) -> Values:
    """Inputs anywhere within the controls' ranges."""
    if lesson.name == "rows":
        capacity = rng.randint(4, 12)
        longest = min(12, capacity + rng.randint(0, 1))  # some do not fit
        return {"sizes": [rng.randint(1, longest) for _ in range(3)], "capacity": capacity}
    if lesson.name == "routing":
        logits = [[rng.uniform(-9, 9) for _ in range(3)] for _ in range(4)]
        return {"logits": logits, "k": rng.randint(1, 3), "normalise": rng.random() < 0.5}
    if lesson.name == "trial":
        return {
            "exponent": rng.uniform(-3, 0.5),
            "noise": rng.uniform(0, 2),
            "up": rng.randint(2, 5),
            "down": rng.randint(2, 5),
        }
    if lesson.name == "group":
        return {
            "rewards": [rng.randint(0, 4) / 4 for _ in range(4)],
            "lengths": [rng.randint(1, 12) for _ in range(4)],
            "ratios": [rng.uniform(0.5, 1.5) for _ in range(4)],
            "overlong": rng.random() < 0.5,
        }
    return {
        "question": rng.choice(TEXTS),
        "chain": rng.choice(TEXTS),
        "answer": rng.choice(TEXTS[:5]),
        "think": rng.random() < 0.5,
        "pictures": rng.randint(0, 3),
        "everything": rng.random() < 0.5,
        "weighting": rng.choice(["token", "sequence", "sample", "sqrt"]),
    }


def close(a, b) -> bool:
    """Equal but for rounding, at every depth; of two refusals the words do not matter."""
    if isinstance(a, dict):
        same_keys = a.keys() == b.keys()
        return same_keys and ("refused" in a or all(close(a[key], b[key]) for key in a))
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, (int, float)):
        return b == pytest.approx(a, rel=1e-6, abs=1e-9)
    return a == b


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_the_browsers_arithmetic_is_the_projects(lesson):
    rng = random.Random(f"lessons/{lesson.name}")
    given = [lesson.example] + [drawn(lesson, rng) for _ in range(20)]
    expected = [lesson_numbers(lesson, one) for one in given]
    done = subprocess.run(
        [NODE, "-e", SHARED_SCRIPT + lesson.script + ANSWER_ALL],
        input=json.dumps([[one, lesson.data] for one in given]),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    differing = [
        (one, numbers, found)
        for one, numbers, found in zip(given, expected, json.loads(done.stdout), strict=True)
        if not close(numbers, found)
    ]
    assert not differing, differing[0]
    assert sum("refused" not in numbers for numbers in expected) >= 8


def test_a_trial_can_end_in_every_way_that_eq_1_knows():
    trial = next(lesson for lesson in LESSONS if lesson.name == "trial")
    ends = {
        "up": {"exponent": -2.0},
        "stay": {"exponent": -2.5, "noise": 0.5},
        "down": {"exponent": 0.0, "up": 2, "down": 3},
        "abort": {"exponent": 0.3},
    }
    found = {
        name: trial.numbers(trial.example | changed)["action"] for name, changed in ends.items()
    }
    assert found == {name: name for name in ends}


class Controls(HTMLParser):
    """Names of all controls of a page, and what it would load from elsewhere."""

    def __init__(self, page: str):
        super().__init__()
        self.names: list[str] = []
        self.outside: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("input", "select"):
            self.names.append(values["name"])
        self.outside += [values[key] for key in ("src", "srcset") if key in values]
        if tag == "link":
            self.outside.append(values["href"])


def paths_of(value, before: str = "") -> list[str]:
    """Where the leaves of some inputs are, as controls are named."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return [before]
    return [path for key, inner in items for path in paths_of(inner, f"{before}.{key}".lstrip("."))]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_a_page_stands_alone_and_every_input_has_its_control(lesson):
    page = lesson_page(lesson, LESSONS)
    parsed = Controls(page)
    assert parsed.outside == []
    assert sorted(parsed.names) == sorted(paths_of(lesson.example))
    for name, _, _ in lesson.parts:
        assert f'put(\n    "{name}"' in lesson.script or f'put("{name}"' in lesson.script
    assert re.search(r"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-", page)


def test_every_script_has_its_lesson():
    scripts = {path.stem for path in HERE.glob("*.js")} - {"lesson"}
    assert scripts == {lesson.name for lesson in LESSONS}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_agrees_with_every_example_and_follows_its_controls(tmp_path):
    write_lesson_pages(LessonOptions(tmp_path))
    ready = "document.readyState == 'complete' && document.getElementById('controls')"
    text = "document.getElementById('figures').innerText"
    with Browser() as browser:
        for lesson in LESSONS:
            browser.send("Page.navigate", url=(tmp_path / f"{lesson.name}.html").as_uri())
            browser.wait_for(f"{ready} && document.title == {json.dumps(lesson.title)}")
            assert browser.run("document.getElementById('checked').innerText").startswith("✓")
            before = browser.run(text)
            browser.run(
                "{ const form = document.getElementById('controls');"
                " const first = form.querySelector('input');"
                " if (first.type == 'text') first.value += '?'; else first.stepDown();"
                " form.dispatchEvent(new Event('input')); }"
            )
            assert browser.run(text) != before
