"""Charts: every kind in both languages is drawn, read back and asked about, and what is wrong is dropped.

Answers are computed twice, from the spec and from the drawn figure; the second is what is tested here most,
as a wrong answer in a hundred thousand charts is seen by nobody.
"""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from curation import charts
from curation.annotators import AnnotatorOptions
from curation.chart_check import ChartCheckOptions, chart_fault, check_charts
from curation.chart_pictures import (
    Canvas,
    check_letters,
    check_places,
    figure_of,
    pixels_of,
    read_back,
)
from curation.chart_questions import ASKS, PLAIN, questions_of, spec_table
from curation.chart_specs import (
    KINDS,
    LANGUAGES,
    ChartStyle,
    invent_spec,
    spec_of,
    validate_spec,
)
from curation.charts import ChartOptions, chart_conversation, make_charts
from curation.requests import Response
from data.readers import Folder
from data.sample import BadSample, Message, Sample

BAR = {
    "kind": "bar",
    "language": "en",
    "title": "Rainfall by month",
    "x": "month",
    "y": "rainfall",
    "unit": "mm",
    "categories": ["Jan", "Feb", "Mar"],
    "series": {"": [40, 10.5, 30]},
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Commands choose their threads; in the suite, which runs beside others, they keep to one."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def chart(spec, canvas=Canvas(), seed=0):
    """A spec as the pipeline makes a sample of it, with every question that it has an answer to."""
    check_letters(spec, canvas)
    figure = figure_of(spec, canvas)
    check_places(figure)
    shown = read_back(figure, spec)
    asked = questions_of(spec, random.Random(seed), len(ASKS), {}, canvas.plain)
    sample = Sample((Message("user", (pixels_of(figure),)),), "chart")
    talk = chart_conversation(sample, [(one.question, one.answer) for one in asked])
    facts = {"shown": shown.record(), "asked": [vars(one) for one in asked]}
    return replace(talk, facts=facts | {"language": spec.language})


# ------------------------------------------------------------------------------- drawn and asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("language", [pytest.param("en", marks=pytest.mark.slow), "zh"])
def test_what_is_drawn_is_what_was_meant_and_all_answers_agree(kind, language):
    """Numbers, names, title, label and colours are read back off the figure; Chinese letters are there."""
    for seed in range(1 if language == "zh" else 4):
        spec = invent_spec(random.Random(seed), kind, language)
        validate_spec(spec)
        assert spec_of(json.loads(json.dumps(spec.record()))) == spec

        sample = chart(spec, Canvas(320))
        shown = sample.facts["shown"]
        assert shown["title"] == spec.title
        for series, row in spec_table(spec).items():
            assert shown["table"][series] == pytest.approx(row)
        for series, points in spec.series.items() if kind == "scatter" else ():
            assert shown["points"][series] == [list(point) for point in points]
        assert chart_fault(sample) == ""
        assert len(sample.facts["asked"]) >= 4


@pytest.mark.parametrize("kind", ["bar", "pie", "box", "heatmap"])
def test_a_plain_chart_has_no_letter_and_answers(kind):
    spec = invent_spec(random.Random(3), kind, "zh", plain=True)
    sample = chart(spec, Canvas(64, plain=True))
    picture = sample.messages[0].parts[0]
    assert picture.size == (64, 64) and len(picture.getcolors(4096)) > 2
    assert chart_fault(sample) == ""
    assert {asked["ask"] for asked in sample.facts["asked"]} <= {*PLAIN}


def test_every_question_is_asked_of_some_chart_in_both_languages():
    for language in LANGUAGES:
        found = set()
        for seed in range(4):
            for kind in KINDS:
                spec = invent_spec(random.Random(seed), kind, language)
                found |= {a.ask for a in questions_of(spec, random.Random(seed), 20, {})}
        assert found == set(ASKS)


def test_what_has_no_single_answer_is_not_asked():
    level = spec_of(BAR | {"series": {"": [30, 30, 30]}})
    asked = {one.ask for one in questions_of(level, random.Random(0), 20, {})}
    assert asked.isdisjoint({"highest", "lowest", "difference", "comparison", "place", "colour"})
    two = spec_of(BAR | {"series": {"a": [1, 2, 3], "b": [3, 2, 1]}})
    asked = {one.ask for one in questions_of(two, random.Random(0), 20, {})}
    assert asked.isdisjoint({"count", "place"})


def test_questions_are_drawn_by_their_rates():
    spec = spec_of(BAR)
    only = questions_of(spec, random.Random(0), 5, {"kind": 1.0, "sum": 0.0})
    assert [one.ask for one in only] == ["kind"]
    rates = {"kind": 9.0, "sum": 1.0}
    firsts = [questions_of(spec, random.Random(s), 1, rates)[0].ask for s in range(400)]
    assert 0.84 < firsts.count("kind") / 400 < 0.96


# --------------------------------------------------------------------------------- the other sum


@pytest.fixture(scope="module")
def bars():
    return chart(spec_of(BAR | {"style": {"colors": ["red", "blue", "green"]}}), Canvas(240))


@pytest.mark.parametrize("damage", ["bar", "name", "answer", "words", "color"])
def test_the_check_notices(bars, damage):
    """A bar of another height, another name under it, a wrong answer, a question about somebody else."""
    assert chart_fault(bars) == ""
    facts = json.loads(json.dumps(bars.facts))
    row = facts["shown"]["table"][""]
    if damage == "bar":
        row["Jan"] = 5.0
    if damage == "name":
        facts["shown"]["table"][""] = dict(zip(("Feb", "Jan", "Mar"), row.values()))
    if damage == "color":
        facts["shown"]["colors"]["Jan"] = "pink"
    if damage == "answer":
        facts["asked"][0]["answer"] += "0"
    if damage == "words":
        value = next(asked for asked in facts["asked"] if asked["ask"] == "value")
        value["names"] = ["Dec"]
    fault = chart_fault(replace(bars, facts=facts))
    expected = {"answer": "not in the conversation", "words": "name not in the question"}
    assert fault.startswith(expected.get(damage, "answer differs"))


# -------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"kind": "radar"}, "unknown kind"),
        ({"language": "fr"}, "unknown language"),
        ({"title": " "}, "text missing"),
        ({"title": "x" * 61}, "text too long"),
        ({"title": "图" * 31}, "text too long"),
        ({"title": "a\x1b[2Jb"}, "unprintable text"),
        ({"title": 7}, "not a text"),
        ({"series": {}}, "empty"),
        ({"series": {"": [0, 0, 0]}}, "empty"),
        ({"series": {"": [1, 2]}}, "lengths differ"),
        ({"series": {"": [1, float("nan"), 2]}}, "not a number"),
        ({"series": {"": [1, float("inf"), 2]}}, "not a number"),
        ({"series": {"": [1, "2", 3]}}, "not a number"),
        ({"series": {"": [1, True, 3]}}, "not a number"),
        ({"series": {"": [1, [2, 3], 3]}}, "not a number"),
        ({"series": {"": [1, 1e300, 2]}}, "number too large"),
        ({"series": {"": [[[1]]]}}, "not a list"),
        ({"series": [1, 2, 3]}, "not an object"),
        ({"categories": ["a", "A ", "b"]}, "names repeat"),
        ({"series": {"_a": [1, 2, 3], "b": [1, 2, 3]}}, "hidden name"),
        ({"categories": ["a"], "series": {"": [1]}}, "too few categories"),
        ({"categories": [*"abcdefghijklm"], "series": {"": [1] * 13}}, "too many categories"),
        ({"series": {name: [1, 2, 3] for name in "abcde"}}, "too many series"),
        ({"kind": "pie", "series": {"": [5, -1, 3]}}, "negative pie"),
        ({"kind": "pie", "series": {"": [500, 1, 300]}}, "slice too thin"),
        ({"kind": "area", "series": {"": [5, -1, 3]}}, "negative area"),
        ({"kind": "box", "series": {"": [1, 2, 3]}}, "not a number"),
        ({"kind": "box", "series": {"": [[1, 2], [1, 2], [2, 3]]}}, "too few values"),
        ({"kind": "histogram", "series": {"": [1, 2, 9]}, "edges": [0, 2, 4]}, "bad edges"),
        ({"kind": "histogram", "series": {"": [1, 2]}, "edges": [0, 4, 2]}, "bad edges"),
        ({"kind": "scatter", "series": {"": [1, 2, 3]}}, "not a number"),
        ({"kind": "scatter", "series": {"": [[1, 2]] * 121}}, "too many points"),
        ({"style": {"sparkle": True}}, "unknown style"),
        ({"style": {"palette": "neon"}}, "unknown style"),
    ],
)
def test_specs_that_cannot_be_read_are_refused_by_reason(changes, reason):
    validate_spec(spec_of(BAR))
    with pytest.raises(BadSample) as fault:
        validate_spec(spec_of(BAR | changes))
    assert fault.value.reason == reason


@pytest.mark.parametrize("title", ["Apples 🍎", "一月降雨量"])
def test_letters_that_the_font_has_not_are_refused(title):
    """English is written in a font without Chinese."""
    check_letters(spec_of(BAR), Canvas())
    with pytest.raises(BadSample) as fault:
        check_letters(spec_of(BAR | {"title": title}), Canvas())
    assert fault.value.reason == "no glyph"


def test_labels_outside_or_on_each_other_are_refused():
    check_places(figure_of(spec_of(BAR), Canvas()))
    lines = {"a": [10, 20, 30], "b": [10.1, 20.1, 30.1]}
    for changes, reason in (
        ({"kind": "line", "series": lines, "style": {"printed": True}}, "texts overlap"),
        ({"title": "W" * 60}, "text cut off"),
    ):
        spec = spec_of(BAR | changes)
        validate_spec(spec)
        with pytest.raises(BadSample) as fault:
            check_places(figure_of(spec, Canvas()))
        assert fault.value.reason == reason


def test_a_missing_package_and_senseless_options_are_one_line(monkeypatch, tmp_path):
    out = tmp_path / "charts.jsonl"
    for options, message in (
        (ChartOptions(out=out, kinds={"radar": 1.0}), "--kinds radar: choose from bar, line"),
        (ChartOptions(out=out, languages={"en": -1.0}), "--languages: rates are positive"),
        (ChartOptions(out=out, plain=True, asks={"value": 1.0}), "--asks value: choose from kind"),
        (ChartOptions(out=out, questions=0, caption=False), "nothing would be asked"),
    ):
        with pytest.raises(ValueError, match=message):
            make_charts(options)
    monkeypatch.setattr(charts, "PACKAGES", ("no_such_package",))
    with pytest.raises(ValueError, match="pip install -r requirements/charts.txt"):
        make_charts(ChartOptions(out=out))
    assert not out.exists()


# ------------------------------------------------------------------------------------- pipeline


def written(path: Path) -> list[Sample]:
    folder = Folder(path)
    return [folder[index] for index in range(len(folder))]


def test_from_nothing_to_rows_that_resume_to_the_same_bytes(tmp_path, capsys):
    """Killed between chunks, the rest is drawn, and files are those of a run that was never stopped."""
    options = ChartOptions(out=tmp_path / "a" / "c.jsonl", count=4, chunk=1, plain=True, pixels=64)
    make_charts(options)
    assert check_charts(ChartCheckOptions(options.out)) == 0
    assert "4 charts" in capsys.readouterr().out
    for sample in written(options.out):
        assert sample.task == "chart" and sample.facts["answer"] == sample.messages[-1].parts[0]
        assert sample.facts["family"] in PLAIN

    # The same run with its last two chunks lost, and a line torn
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    other = replace(options, out=tmp_path / "b" / "c.jsonl", sheet=tmp_path / "sheet.png")
    ledger = tmp_path / "b" / "c.work" / "0.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(True)[:2]) + b'{"torn')
    kept = {row["images"][0] for row in map(json.loads, options.out.read_text().splitlines()[:2])}
    lost = [path for path in (tmp_path / "b" / "c.images").iterdir() if path.name not in str(kept)]
    for path in (other.out, *lost):
        path.unlink()
    assert len(lost) == 2
    make_charts(other)
    assert other.out.read_bytes() == options.out.read_bytes()
    for path in (tmp_path / "a" / "c.images").iterdir():
        assert (tmp_path / "b" / "c.images" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_specs_of_a_file_are_drawn_and_bad_ones_counted(tmp_path):
    specs = [BAR, BAR | {"kind": "radar"}, BAR | {"series": {"": [1, 2]}}]
    lines = [json.dumps(spec) for spec in specs] + ["{torn", "[" * 100_000]
    (tmp_path / "specs.jsonl").write_text("\n".join(lines))
    options = ChartOptions(data=tmp_path / "specs.jsonl", out=tmp_path / "c.jsonl", questions=9)
    make_charts(options)
    (sample,) = written(options.out)
    assert 'titled "Rainfall by month"' in sample.facts["caption"]
    assert "The highest value is 40, at Jan." in sample.facts["caption"]
    assert len(sample.messages) == 20
    funnel = json.loads((tmp_path / "c.funnel.json").read_text())
    assert funnel["reasons"]["read"] == {"no JSON": 2}
    assert funnel["reasons"]["valid"] == {"unknown kind": 1, "lengths differ": 1}


class Model:
    """Writes specs as models do: in fences, of another kind, in words, or not at all."""

    name = "a model"

    def __init__(self):
        self.asked = []

    def annotate(self, requests):
        self.asked += requests
        said = [f"Sure!\n```json\n{json.dumps(BAR)}\n```", "no", json.dumps(BAR | {"kind": "pie"})]
        return [Response(text) for text in (*said, "[" * 9000)] + [Response(None, "a timeout")]

    def report(self):
        return "5 asked"


def test_specs_are_asked_for_and_whatever_comes_back_costs_one_chart(tmp_path, monkeypatch, capsys):
    model = Model()
    monkeypatch.setattr(charts, "open_annotator", lambda options, seed: model)
    options = ChartOptions(
        out=tmp_path / "c.jsonl",
        count=5,
        kinds={"bar": 1.0},
        languages={"en": 1.0},
        annotator=AnnotatorOptions(oracle=True),
    )
    make_charts(options)
    assert len(written(options.out)) == 1 and "5 asked" in capsys.readouterr().out
    reasons = json.loads((tmp_path / "c.funnel.json").read_text())["reasons"]["spec"]
    assert reasons == {"no JSON": 2, "another chart": 1, "a timeout": 1}
    fields = model.asked[0].fields
    assert fields["kind"] == "bar" and fields["language"] == "en" and " / " in fields["topic"]


def test_the_oracle_writes_specs(tmp_path):
    options = ChartOptions(
        out=tmp_path / "c.jsonl",
        count=6,
        plain=True,
        pixels=64,
        annotator=AnnotatorOptions(oracle=True, noise=0.5),
        seed=1,
    )
    make_charts(options)
    reasons = json.loads((tmp_path / "c.funnel.json").read_text())["reasons"]
    assert 0 < reasons["valid"]["empty"] < 6


@pytest.mark.slow
def test_two_hundred_charts_of_all_kinds_are_valid(tmp_path):
    """Nearly all invented specs survive, in all sixteen kinds and languages, whatever their style."""
    options = ChartOptions(out=tmp_path / "c.jsonl", count=200, pixels=320, questions=14)
    make_charts(options)
    samples = written(options.out)
    assert len(samples) > 190
    made = {(s.facts["category"], s.facts["language"]) for s in samples}
    assert made == {(kind, language) for kind in KINDS for language in LANGUAGES}
    assert check_charts(ChartCheckOptions(options.out)) == 0
    assert {vars(ChartStyle(**s.facts["spec"]["style"]))["palette"] for s in samples} > {"soft"}
