"""The report: a page that nothing in it can turn into something else, and that shows what it is given."""

import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from tools import report
from tools.drawing import ticks

HOSTILE = "\x1b[2J<script>alert(1)</script>\u202e\x00\ud800 \"'&"


@pytest.fixture
def page(tmp_path):
    """A report of two stages whose every text is hostile."""
    stage = {
        "name": HOSTILE,
        "metric": HOSTILE,
        "seconds": 12.0,
        "before": 0.1,
        "after": 0.8,
        "chance": 0.2,
        "samples": 10,
        "lower_is_better": False,
    }
    worse = stage | {"name": "worse", "before": 0.9}
    score = {"accuracy": 0.8, "chance": 0.2, "error": 0.1, "n": 10}
    card = {
        "family": HOSTILE,
        "question": HOSTILE,
        "truth": HOSTILE,
        "said": f"<think>{HOSTILE}</think>{HOSTILE}",
        "score": 1,
        "mode": "think",
        "images": [Image.new("RGB", (32, 32), "red")],
    }
    decision = {
        "step": 8,
        "made": 8,
        "lost": (4, 8),
        "action": "an action of tomorrow",
        "scale": 1.5,
        "before": math.nan,
        "error": math.nan,
        "trial": math.nan,
    }
    losses = [3.0, math.nan, math.inf, *(1 / (i + 1) for i in range(20))]
    run = {"losses": losses, "lrs": [1e-3] * 23, "decisions": [decision], "seconds": 1.0}
    results = {
        "title": HOSTILE,
        "stages": [stage, worse],
        "final": {HOSTILE: score, "overall": score},
        "families_after": {HOSTILE: {"overall": 0.5}},
    }
    swap = {HOSTILE: {"own": 0.8, "swapped": 0.2, "chance": 0.2}}
    packed = [[(30, True), (10, False), (2, None)]]
    router = {HOSTILE: [0.5, 0.5]}
    path = tmp_path / "report.html"
    pair = {
        "shown": "first",
        "family": HOSTILE,
        "question": HOSTILE,
        "truth": HOSTILE,
        "direct": HOSTILE,
        "think": HOSTILE,
        "direct_score": 0,
        "think_score": 1,
        "images": [],
    }
    parts = ([card], packed, router, swap)
    report.write_report(path, results, {HOSTILE: run}, *parts, pairs=[pair])
    return path.read_text(encoding="utf-8")


class Tags(HTMLParser):
    """The elements of a page, in order."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_no_control_character_and_no_markup_of_others_is_in_the_page(page):
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", page)
    tags = Tags()
    tags.feed(page)
    assert "script" not in {tag for tag, _ in tags.found}
    assert not [name for _, attributes in tags.found for name in attributes if name[:2] == "on"]
    assert r"\x1b[2J&lt;script&gt;" in page  # what was there is still to be read


def test_the_policy_comes_first_and_allows_nothing_from_outside(page):
    tags = Tags()
    tags.feed(page)
    metas = [attributes for tag, attributes in tags.found if tag == "meta"]
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("<body>")
    sources = [attributes["src"] for _, attributes in tags.found if "src" in attributes]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)


def test_a_stage_that_moved_the_wrong_way_is_marked(page):
    rows = re.findall(r"<tr>(?:(?!</tr>).)*</tr>", page)
    assert [("✗" in row) for row in rows if "0.800" in row and "<b>" in row] == [False, True]


def test_a_section_without_data_is_left_out(tmp_path):
    path = tmp_path / "report.html"
    results = {"title": "empty", "stages": [], "final": {}}
    report.write_report(path, results, {}, [], [], {}, {})
    assert "<section>" not in path.read_text(encoding="utf-8")


def test_the_same_data_give_the_same_bytes(tmp_path):
    stage = {"losses": [3.0, 2.0, 1.0], "seconds": 1.0}
    for name in ("one", "two"):
        results = {"title": "same", "stages": [], "final": {}}
        report.write_report(tmp_path / name, results, {"basic": stage}, [], [], {}, {})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    "low, high, wanted",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 130, [0, 50, 100]), (2.1, 2.9, [2.2, 2.4, 2.6, 2.8])],
)
def test_ticks_are_round_numbers_inside_the_axis(low, high, wanted):
    assert ticks(low, high) == pytest.approx(wanted)
