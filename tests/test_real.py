"""Published data as rows: sides never mix, answers are what the pictures show, files are read back."""

import importlib.util
import io
import json
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from data.readers import Folder
from evaluate import family_of
from realdata import digits, emoji, example, gcompris, shapes, stamps, tables, typefaces
from realdata.example import CORNERS, TABLE, Example, Question
from tools import real

WHITE = Image.new("L", (8, 8), 255)
BLACK = Image.new("L", (8, 8), 0)


def inked(shade: int) -> digits.Scans:
    """Scans of one shade all over, for every digit."""
    return {label: [Image.new("L", (8, 8), shade)] for label in range(10)}


@pytest.fixture
def scans(monkeypatch):
    """Training scans are black, held-out ones nearly white."""
    monkeypatch.setattr(digits, "load_scans", lambda: (inked(0), inked(250)))


# -------------------------------------------------------------------------------------------- digits


def test_held_out_scans_stand_in_held_out_pictures_alone(scans):
    examples = digits.digit_examples(40, 40, 0)
    assert {e.test for e in examples} == {True, False}
    for e in examples:
        darkest = min(low for picture in e.pictures for low, _ in picture.getextrema())
        assert (darkest > 150) == e.test, e.name


def seen_in(words: str) -> dict[str, int]:
    """`northwest 3, southeast 7` -> place -> digit."""
    pairs = (phrase.split() for phrase in words.split(", "))
    return {place: int(label) for place, label in pairs}


def test_answers_about_digits_follow_from_what_is_shown(scans):
    checked = Counter()
    for e in digits.digit_examples(200, 0, 3):
        for q in e.questions:
            checked[q.question.split()[0], q.family] += 1
            if q.family == "spatial":
                first, second = q.answer.split()
                place, label = (first, second) if first in CORNERS else (second, first)
                assert seen_in(e.words)[place] == int(label)
            elif q.family == "counting":
                assert int(q.answer) == len(seen_in(e.words))
            elif q.family == "arithmetic":
                a, b = seen_in(e.words).values()
                assert int(q.answer) == (a + b if "sum" in q.question else abs(a - b))
            elif q.family == "odd":
                seen = seen_in(e.words)
                assert list(seen.values()).count(seen[q.answer]) == 1 < len(seen) - 1
            elif q.family == "order":
                frames = [int(label) for label in e.words.split(", ")]
                ways = {"rising": sorted(frames), "falling": sorted(frames)[::-1]}
                said = [way for way, order in ways.items() if order == frames]
                assert [q.answer] == (said or ["neither"]) and len(e.pictures) == 3
    assert len(checked) >= 9, checked


@pytest.mark.slow
def test_the_published_scans_are_split_by_their_pixels():
    pytest.importorskip("sklearn")
    train, held_out = digits.load_scans()
    mine = {scan.tobytes() for side in train.values() for scan in side}
    theirs = {scan.tobytes() for side in held_out.values() for scan in side}
    assert not mine & theirs and len(mine) > 3 * len(theirs) > 900


def test_ink_of_a_scan_is_dark_and_its_paper_stays():
    picture = Image.new("RGB", (32, 32), (240, 240, 240))
    digits.put_scan(picture, BLACK, 3, random.Random(0))
    assert max(picture.getpixel((24, 24))) < 40
    assert picture.getpixel((5, 5)) == (240, 240, 240)
    digits.put_scan(picture, WHITE, 0, random.Random(0))
    assert picture.getpixel((8, 8)) == (240, 240, 240)


# --------------------------------------------------------------------------------------------- tables


def test_an_axis_has_a_nice_unit_and_holds_its_largest_number():
    assert [tables.nice_unit(v) for v in (5, 5.3, 5.4, 47, 0.9, 5.2e6)] == [1, 1, 2, 10, 0.2, 1e6]


def test_numbers_between_two_marks_and_equal_ones_are_not_drawn():
    assert tables.heights_of([10, 20, 50]) == [1, 2, 5]
    assert tables.heights_of([12, 21, 49]) == pytest.approx([1.2, 2.1, 4.9])
    for unreadable in ([15, 20, 50], [20, 21, 50], [1, 20, 50], [-10, 20, 50]):
        assert tables.heights_of(unreadable) is None, unreadable


def test_a_bar_is_as_high_as_its_number():
    picture = tables.bar_picture([("red", 3.2)], random.Random(0))
    column = next(x for x in range(32) if picture.getpixel((x, 31)) == tables.INKS["red"])
    red = [picture.getpixel((column, y)) == tables.INKS["red"] for y in range(32)]
    assert sum(red) == round(3.2 * tables.MARK) + 1


def test_answers_about_charts_follow_from_their_numbers():
    numbers = tables.Numbers("table prices", (10, 21, 48), True, False)
    made = tables.chart_example(numbers, [1.0, 2.1, 4.8], "chart-0", random.Random(1))
    bars = {colour: int(mark) for colour, mark in (bar.split() for bar in made.words.split(", "))}
    assert sorted(bars.values()) == [1, 2, 5] and made.test
    for q in made.questions:
        if q.family == "charts":
            colour, mark = q.answer.split()
            assert bars[colour] == int(mark)
            assert ("highest" not in q.question) or int(mark) == 5
            assert ("lowest" not in q.question) or int(mark) == 1


@pytest.mark.parametrize(
    "heights, answer", [([1, 3, 4], "rising"), ([4, 3, 1], "falling"), ([1, 4, 3], "neither")]
)
def test_a_series_keeps_its_order_in_time(heights, answer):
    numbers = tables.Numbers("table prices", tuple(heights), False, True)
    made = tables.trend_example(numbers, heights, "trend-0", random.Random(0))
    assert made.questions[-1].answer == answer and len(made.pictures) == 3
    assert [int(frame.split()[1]) for frame in made.words.split(", ")] == heights


def test_no_way_of_a_series_is_commoner_than_another():
    def ending_in(answer):
        return Example(answer, (), "", (Question("trend", "?", answer),), False)

    kept = example.as_often([ending_in(a) for a in ["up"] * 9 + ["down"] * 2 + ["none"] * 3], 9)
    assert Counter(e.name for e in kept) == {"up": 2, "down": 2, "none": 2}


def test_groups_are_told_apart_and_sides_by_whole_tables(monkeypatch):
    rows = [{"v": str(10 * i), "year": str(i % 2)} for i in range(1, 7)]
    groups = list(tables.columns_by("harvest", rows, "v", ("year",), False, True))
    assert [g.values for g in groups] == [(10, 30, 50), (20, 40, 60)]
    assert groups[0].title == "harvest v 1" and all(g.test for g in groups)

    apart = [
        tables.Numbers(f"{name} v", (10, 20, 30, 50), test, in_time)
        for name, test in (("a", False), ("b", True))
        for in_time in (True, False)
    ]
    monkeypatch.setattr(tables, "gapminder_numbers", lambda: apart)
    monkeypatch.setattr(tables, "vega_numbers", lambda: [])
    made = tables.table_examples(8, 4, 0)
    assert {(e.source, e.test) for e in made} == {("a v", False), ("b v", True)}


# ------------------------------------------------------------------------------------ other sources


def test_easy_vqas_answers_give_away_a_colour_and_a_shape():
    seen = [("is the shape red?", "yes"), ("is there not a circle?", "no"), ("is it blue?", "no")]
    assert shapes.given_away(seen) == "red circle"
    assert shapes.given_away(seen[:1]) == ""


def test_every_answer_to_a_question_is_as_frequent():
    triples = [("colour?", "red", i) for i in range(8)] + [
        ("colour?", "blue", 9),
        ("only?", "red", 9),
    ]
    kept = shapes.evenly_answered(triples, random.Random(0))
    assert Counter((q, a) for q, a, _ in kept) == {("colour?", "red"): 1, ("colour?", "blue"): 1}


@pytest.mark.parametrize("box", [(0, 0, 9, 6), (50, 57, 63, 63), (20, 30, 22, 32), (3, 3, 59, 40)])
def test_a_window_holds_the_whole_shape(box):
    picture = Image.new("RGB", (64, 64), (230, 240, 250))
    picture.paste((200, 0, 0), box)
    for seed in range(20):
        window = shapes.around_shape(picture, random.Random(seed))
        assert window.size == (32, 32)
        # as many pixels as the shape has, at the window's scale
        scale = 32 / max(32, box[2] - box[0], box[3] - box[1])
        area = (box[2] - box[0]) * (box[3] - box[1]) * scale**2
        green = np.asarray(window, dtype=float)[:, :, 1]
        assert (240 - green).sum() / 240 == pytest.approx(area, rel=0.15)


def test_what_is_described_is_repeated_and_looked_up_in_words():
    """A copy of the description is a training row, as it is a held-out one."""
    made = digits.grid(inked(0), "digits-grid-train-0", False, random.Random(0))
    tasks = Counter()
    for seed in range(40):
        for row in example.training_rows(made, random.Random(seed)):
            if row["task"] == "text":
                turns = row["conversations"]
                tasks["rows"] += 1
                tasks["copies"] += any(turn["value"] == made.words for turn in turns)
                tasks["drills"] += any("each" in turn["value"] for turn in turns)
                assert len(turns) <= 2 * example.TURNS and "image" not in row
    assert tasks["rows"] == 40 and tasks["copies"] > 3 and tasks["drills"] > 3


@pytest.mark.parametrize("ink, name", [("#D22F27", "red"), ("#92D3F5", "blue"), ("#000000", "")])
def test_the_main_colour_is_the_one_that_most_of_a_drawing_has(ink, name):
    drawing = Image.new("RGB", (32, 32), "white")
    drawing.paste(ink, (4, 4, 20, 20))
    drawing.paste("#5C9E31", (20, 20, 22, 22))
    drawing.paste("#3F3F3F", (0, 0, 32, 4))
    expected = name or "green"
    found = emoji.main_colour(drawing)
    assert found == (expected if name else ""), "green is too small to be the main colour"


def test_held_out_emoji_have_no_name_in_any_row(monkeypatch, tmp_path):
    points = [f"{0x1F400 + i:X}" for i in range(40)]
    entry = {"subcategory": "animal", "category": "Animals & Nature", "short_name": "x"}
    data = [entry | {"unified": p, "name": f"NAME{p}"} for p in points]
    data.append(entry | {"unified": "1F441-1F442", "name": "A SEQUENCE"})
    (tmp_path / "data").mkdir()
    (tmp_path / "unicode_codes").mkdir()
    (tmp_path / "data" / "emoji.json").write_text(json.dumps(data))
    (tmp_path / "unicode_codes" / "emoji_zh.json").write_text("{}")
    monkeypatch.setattr(emoji, "package_folder", lambda package, install: tmp_path)
    monkeypatch.setattr(emoji, "openmoji_drawing", lambda e: Image.new("RGB", (32, 32), "#D22F27"))

    made = emoji.emoji_examples(None, 1, 0)
    assert len(made) == 40 and {e.test for e in made} == {True, False}
    for e in made:
        assert bool(e.words) != e.test
        assert not any("name" in q.answer for q in e.questions)
        assert {q.answer for q in e.questions} >= {"red", "animals & nature", "动物和自然"}


def test_stamps_are_split_by_what_they_show(tmp_path):
    nouns = ("owl", "hen", "cat", "dog", "cow", "pig", "fox", "bat", "ant", "bee")
    for folder, kind in (("animals/birds", "A"), ("animals/cartoon", "A happy"), ("money", "A")):
        place = tmp_path / stamps.STAMPS / folder
        place.mkdir(parents=True)
        for noun in nouns:
            Image.new("RGBA", (60, 30), (200, 0, 0, 128)).save(place / f"{noun}.png")
            (place / f"{noun}.txt").write_text(f"{kind} {noun}.\nzh_CN.utf8=鸟。\n")

    made = stamps.stamp_examples(tmp_path, 0)
    sides = {e.name.split("-")[2]: e.test for e in made}
    assert len(sides) == 20, "folders without a group are left out"
    for bird, cartoon in zip(range(10), range(10, 20)):
        assert sides[str(bird)] == sides[str(cartoon)]
    assert {q.answer for e in made for q in e.questions} == {"animals & nature"}
    assert stamps.stamp_examples(None, 0) == []


def resource_of(files: dict[str, bytes], packed: bool) -> bytes:
    """A Qt resource, version 1, of files in one folder "f"."""
    names = b""
    data = b""
    entries = [struct.pack(">IHII", 0, 2, 1, 1)]
    for name, content in [("f", None), *files.items()]:
        place = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        if content is None:
            entries.append(struct.pack(">IHII", place, 2, len(files), 2))
            continue
        stored = struct.pack(">I", len(content)) + zlib.compress(content) if packed else content
        entries.append(struct.pack(">IHII", place, int(packed), 0, len(data)))
        data += struct.pack(">I", len(stored)) + stored
    tree = b"".join(entries)
    head = struct.pack(">4I", 1, 20, 20 + len(tree), 20 + len(tree) + len(data))
    return b"qres" + head + tree + data + names


@pytest.mark.parametrize("packed", [False, True])
def test_a_qt_resource_is_read(packed):
    files = {"a.txt": b"one" * 50, "b.qml": "zwölf".encode()}
    found = gcompris.files_in(resource_of(files, packed))
    assert found == {f"f/{name}": content for name, content in files.items()}
    with pytest.raises(ValueError, match="not a Qt resource"):
        gcompris.files_in(b"PK" + bytes(20))


def test_photographs_are_told_by_their_boards():
    photograph = io.BytesIO()
    Image.new("RGB", (60, 40), "green").save(photograph, "PNG")
    board = """{ "title": qsTr("Moose"), "text": qsTr("It swims. It dives."),
    "x": 1, "image2": "qrc:/r/moose.webp" }"""
    files = {"r/board/board1.qml": board.encode(), "r/moose.webp": photograph.getvalue()}
    ((title, text, picture),) = gcompris.told_photographs(files)
    assert (title, text, picture.size) == ("Moose", "It swims. It dives.", (60, 40))
    assert gcompris.in_a_square(picture).size == (32, 32)
    assert gcompris.photograph_examples(None, 0) == []


def test_codes_and_typefaces_of_grading_are_in_no_training_picture():
    for package in (*typefaces.FAMILIES, "vega_datasets"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    codes = [set(typefaces.airport_codes(side)) for side in (False, True)]
    assert not codes[0] & codes[1] and min(map(len, codes)) > 400
    stems = [{p.stem for p in typefaces.font_files(side)} for side in (False, True)]
    assert not stems[0] & stems[1] and min(map(len, stems)) > 3
    made = typefaces.code_examples(3, 3, 0)
    assert all(e.pictures[0].size == (32, 32) for e in made)


def test_each_letter_stands_in_its_own_cell(monkeypatch):
    face = ImageFont.load_default(size=14)
    monkeypatch.setattr(typefaces, "face_at", lambda path, size: face)
    picture = typefaces.line_picture("I.H", Path("any.ttf"), random.Random(0)).convert("L")
    corners = [(0, 0), (16, 0), (0, 16), (16, 16)]
    cells = [picture.crop((x, y, x + 16, y + 16)) for x, y in corners]
    ink = [cell.point(lambda value: 255 * (value < 128)).histogram()[-1] for cell in cells]
    assert picture.size == (32, 32) and ink[3] == 0 < ink[1] < ink[0] < ink[2], ink


def test_a_missing_package_is_one_line_that_says_what_to_install():
    with pytest.raises(ValueError, match="package no-such is missing: pip install -r requirements"):
        example.package_folder("no_such_package_at_all", "no-such")


# ----------------------------------------------------------------------------------------------- rows


def drawn_table(monkeypatch) -> list[Example]:
    """Examples of four sources without any package."""
    monkeypatch.setattr(digits, "load_scans", lambda: (inked(0), inked(60)))
    made = digits.digit_examples(60, 60, 0)
    for test in (False, True):
        numbers = tables.Numbers("t v", (10, 21, 48), test, False)
        for i in range(6):
            name = f"chart-{'test' if test else 'train'}-{i}"
            made.append(tables.chart_example(numbers, [1, 2.1, 4.8], name, random.Random(i)))
    return made


def test_rows_are_read_back_as_they_were_meant(monkeypatch, tmp_path, encoder, capsys):
    made = drawn_table(monkeypatch)
    monkeypatch.setattr(real, "all_examples", lambda options: made)
    options = real.RealOptions(out=tmp_path / "real", held_out=5)
    real.write_real_data(options)
    table = capsys.readouterr().out
    assert "counting" in table and "handwriting" in table

    # Every row is read and encoded; a video has its frames, a description no picture
    shown = {e.name: e for e in made}
    for side in ("train", "held_out"):
        folder = Folder(options.out / f"{side}.jsonl")
        samples = folder.first()
        assert not folder.faults.counts and len(samples) == len(folder)
        for sample in samples:
            document = encoder(sample)
            pictures = 0 if sample.task == "text" else None
            if sample.task == "video":
                pictures = 3
            if pictures is not None:
                assert len(document.images) == pictures, sample.origin
            assert bool(sample.facts.get("chain")) == has_reasons(sample)

    # Nothing of one side in the other; no more than was asked for
    ids = {
        side: {json.loads(line)["id"] for line in open(options.out / f"{side}.jsonl")}
        for side in ("train", "held_out")
    }
    assert not any(shown[name].test for name in ids["train"])
    assert all(shown[name].test for name in ids["held_out"])
    families = Counter(family_of(s) for s in Folder(options.out / "held_out.jsonl").first())
    assert max(families.values()) <= 5 and "listing" not in families

    # What a ladder is told names what there is
    stages = json.loads((options.out / "stages.json").read_text())
    graded = {family for stage in stages.values() for family in stage.get("graded", ())}
    assert graded <= set(families)
    assert stages["long-cot"]["graded"] == [f for f in families if TABLE[f].reasoning]

    # A second call finds it complete
    real.write_real_data(options)
    said = capsys.readouterr().out
    assert "is complete" in said and "not what this version writes" not in said
    (options.out / "stages.json").write_text("{}")
    real.write_real_data(options)
    assert "not what this version writes" in capsys.readouterr().out


def has_reasons(sample) -> bool:
    """Of a described sample nothing is known about its family."""
    if sample.task == "text":
        return bool(sample.facts.get("chain"))
    return TABLE[family_of(sample)].reasoning


def test_without_apt_a_line_says_what_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(real.shutil, "which", lambda tool: None)
    with real.debian_packages(real.RealOptions()) as folder:
        assert folder is None
    assert "left out what fonts-noto-color-emoji" in capsys.readouterr().out

    with real.debian_packages(real.RealOptions(packages=Path("there"))) as folder:
        assert folder == Path("there")


def test_a_package_that_cannot_be_fetched_costs_itself_alone(monkeypatch, capsys):
    def refused(words, folder):
        raise ValueError(f"{words[0]}: no network")

    monkeypatch.setattr(real.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(real, "shell", refused)
    with real.debian_packages(real.RealOptions()) as folder:
        assert folder is None
    assert "apt-get: no network" in capsys.readouterr().out
