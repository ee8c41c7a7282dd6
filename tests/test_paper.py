"""PAPER.md and FAQ.md: every part of the paper has a place that is there, every question an answer."""

import ast
import json
import re

import pytest
from conftest import ROOT
from test_readme import defined_names

from tools import paper, readme

PLACES = {place for part in paper.PARTS for place in part.places} | {
    place for _, _, places in paper.CITED for place in places
}


@pytest.mark.parametrize("kind", paper.NUMBERS)
def test_every_part_of_the_paper_has_a_line_and_no_line_is_of_another_paper(kind):
    mapped = {part.of for part in paper.PARTS if part.kind == kind}
    assert mapped == set(paper.NUMBERS[kind])


def test_no_part_has_two_lines():
    keys = [(part.kind, part.number) for part in paper.PARTS]
    assert len(keys) == len(set(keys))


def test_a_line_has_a_place_or_says_why_it_has_none():
    for part in paper.PARTS:
        assert part.places or part.remark.startswith(paper.NOT_BUILT), part


@pytest.mark.parametrize("path", sorted({place.partition(": ")[0] for place in PLACES}))
def test_every_place_is_there(path):
    assert (ROOT / path).is_file()
    named = {place.partition(": ")[2] for place in PLACES if place.partition(": ")[0] == path}
    if path.endswith(".py"):
        assert named - {""} <= defined_names(path)
    else:
        assert named == {""}, f"{path} has no functions to name"


def test_a_lost_function_is_noticed():
    assert "AdaLRS" in defined_names("adalrs.py")
    assert "AdaLRS.nothing" not in defined_names("adalrs.py")


def test_the_map_is_up_to_date():
    page = (ROOT / "PAPER.md").read_text(encoding="utf-8")
    for name, block in paper.paper_blocks().items():
        assert f"<!-- {name} -->\n{block}\n<!-- /{name} -->" in page, "run `make readme`"


def test_the_minutes_of_the_faq_are_the_ladders():
    assert readme.faq_blocks()["minutes"] in (ROOT / "FAQ.md").read_text(encoding="utf-8")


def test_commands_of_the_map_are_stages_that_exist():
    page = (ROOT / "PAPER.md").read_text(encoding="utf-8")
    named = re.findall(r"`(pretrain|sft|rl)\.py paper:([\w-]+)`", page)
    assert len(named) >= 8
    for script, stage in named:
        tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
        tables = [n for n in tree.body if isinstance(n, ast.AnnAssign) and n.target.id == "PAPER"]
        assert stage in [key.value for key in tables[0].value.keys]


def test_the_faq_says_who_won_as_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert readme.thinking_sentence("toy") is None
    (tmp_path / "runs" / "toy").mkdir(parents=True)
    for direct, verdict in ((0.9, "loses: of"), (0.7, "wins: of")):
        modes = {"direct_accuracy": direct, "think_accuracy": 0.8}
        results = json.dumps({"seed": 3, "modes": modes})
        (tmp_path / "runs" / "toy" / "results.json").write_text(results)
        sentence = readme.thinking_sentence("toy")
        assert verdict in sentence and f"{direct:.1%}" in sentence and "80.0%" in sentence


# What newcomers ask, and words that their answer must hold.
QUESTIONS = {
    "What is AnyRes here?": ("position_table", "--any-resolution"),
    "Where is Eq. 1?": ("adalrs.py", "--adalrs-rule paper"),
    "How long does it take on my Mac, a CPU, a small GPU?": ("make toy", "Mac"),
    "How do I train on my photos?": ("data.show", "sft.py"),
    "Why does thinking lose (or win)?": ("LOG.md", "--think"),
}


def test_the_five_questions_are_answered_two_clicks_from_the_readme():
    """README links to FAQ.md, whose contents link to each answer."""
    assert "](FAQ.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](PAPER.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "FAQ.md").read_text(encoding="utf-8")
    for question, wanted in QUESTIONS.items():
        answer = page.split(f"\n## {question}\n")[1].split("\n## ")[0]
        assert all(words in answer for words in wanted), question


def anchor_of(heading: str) -> str:
    """As GitHub makes it: small letters, no signs, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_into_pages_meet_a_heading():
    for page in ("README.md", "FAQ.md", "PAPER.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
            if target.startswith("https://"):
                continue
            other = (ROOT / (target or page)).read_text(encoding="utf-8")
            prose = re.sub(r"^```.*?^```", "", other, flags=re.DOTALL | re.MULTILINE)
            anchors = [anchor_of(h) for h in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)]
            assert anchor in anchors, f"{page}: {target}#{anchor}"


def test_every_answer_of_the_faq_is_among_its_contents():
    page = (ROOT / "FAQ.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(#([^)]+)\)", page.split("\n## ")[0])
    headings = [anchor_of(h) for h in re.findall(r"^## (.+)$", page, re.MULTILINE)]
    assert sorted(linked) == sorted(headings)


def test_the_citation_is_the_same_in_both_places():
    """Every author and title of the page stands in the file that machines read."""
    readable = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    section = page.split("\n## How to cite\n")[1]
    authors = re.search(r"author  = \{(.*?)\},\n  journal", section, re.DOTALL)[1]
    names = [name.split(", ") for name in " ".join(authors.split()).split(" and ")]
    written = re.findall(r"family-names: (\w+), given-names: (\w+)", readable)
    assert [tuple(name) for name in names] == written
    for title in re.findall(r"title   = \{(.*?)\}", section):
        assert f'title: "{title}"' in readable
