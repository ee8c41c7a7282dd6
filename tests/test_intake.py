"""What real files look like: one record costs one record, nothing is lost without a word, nothing
hangs or swells.

Each test is a situation that somebody reported or met. `python tests/test_intake.py 20000` mutates
small files of every kind that often, and prints what became of them.
"""

import base64
import csv
import io
import json
import random
import struct
import sys
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import record
from test_readers import BLUE, RED, colors, encoded, say, tar

from data import container_json, container_tsv, containers, images
from data.containers import fields_of, spans_of
from data.encode import Encoder
from data.images import frames_of, open_image
from data.readers import Folder
from data.sample import BadSample, Faults, Sample, Video
from data.show import ShowOptions, show_samples
from tests.campaign.fuzz import mutated

ENCODED = {name: base64.b64encode(body).decode() for name, body in (("red", RED), ("blue", BLUE))}
QA = {"question": "what?", "answer": "red"}


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    return tmp_path


def written(root: Path, name: str, *rows) -> Path:
    """JSON lines of rows."""
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / name


def one(root: Path, row: dict) -> Sample:
    """The sample that a row becomes."""
    folder = Folder(written(root, "one.jsonl", row))
    assert len(folder) == 1, folder.faults.report()
    return folder[0]


def fault(root: Path, row: dict) -> str:
    """The reason for which a row cannot be used; the row beside it can."""
    folder = Folder(written(root, "one.jsonl", QA, row))
    assert len(folder) == 1 and folder.faults.counts.total() == 1
    return next(iter(folder.faults.counts))


def answers(folder: Folder) -> list[str]:
    return [s.messages[-1].parts[0] for s in folder.first()]


# ---------------------------------------------------- R1: TSV


TABLES = {
    "a lone quote inside a cell": 'question\tanswer\n5" tall?\tyes\nwide?\tno\n',
    "a lone quote at a cell's end": 'question\tanswer\nhow tall? 6"\tyes\nwide?\t6"\n',
    "two of them in different rows": 'question\tanswer\na 5" b\tx\nc\ty\nd 6" e\tz\n',
    "quotes inside a quoted cell": 'question\tanswer\n"say ""hi"" now"\tx\n"a\nb"\ty\n',
    "text after the closing quote": 'question\tanswer\n"a" b " c\tx\nd\ty\n',
    "a quoted header, mark and CRLF": '\ufeff"question"\t"answer"\r\na\tx\r\n"b\r\nc"\ty\r\n',
    "old Mac's line ends": "question\tanswer\ra\tx\rb\ty\r",
    "blank lines": "question\tanswer\n\na\tx\n\n\nb\ty\n\n",
    "no line end at the end": 'question\tanswer\na\tx\nb\t"y z"',
    "empty quoted cells": 'question\tanswer\ttask\n"a"\t"x"\t""\nb\ty\t\n',
    "a quote that ends in the last cell of a line": 'question\tanswer\na\t"x\ny"\nb\tz\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_rows_that_the_csv_module_gives(root, name):
    path = root / "my.tsv"
    path.write_bytes(TABLES[name].encode())
    rows = csv.reader(io.StringIO(TABLES[name].removeprefix("\ufeff"), newline=""), delimiter="\t")
    header, *rows = [row for row in rows if row]
    found = [fields_of(path, a, b) for a, b, _ in spans_of(path)]
    assert [[f[key] for key in header] for f in found] == rows
    assert len(Folder(path)) == len(rows)


def test_random_tables_have_the_rows_that_the_csv_module_gives(root):
    rng = random.Random(0)
    for _ in range(400):
        body = "".join(rng.choice('ab"\t\n"\r ') for _ in range(rng.randrange(60)))
        text = "q\tw\te\tr\tt\ty\n" + body + "\n"
        (root / "my.tsv").write_bytes(text.encode())
        want = [r for r in csv.reader(io.StringIO(text, newline=""), delimiter="\t") if r][1:]
        found = [s for s in spans_of(root / "my.tsv") if not isinstance(s, BadSample)]
        seen = [container_tsv.cells_of((root / "my.tsv").read_bytes()[a:b]) for a, b, _ in found]
        lost = len(want) - len(seen)
        assert seen == want[: len(seen)] and lost in (0, 1)  # 1: the last quote is never closed


def test_a_lone_quote_costs_no_row_and_one_that_is_never_closed_is_named(root):
    rows = ["question\tanswer"] + [f"how tall is {i}?\t{i}" for i in range(1000)]
    rows[11] = 'how tall is 10"?\t10'
    (root / "my.tsv").write_text("\n".join(rows) + "\n")
    assert len(Folder(root / "my.tsv")) == 1000
    rows[901] = '"how tall is 900?\t900'
    (root / "my.tsv").write_text("\n".join(rows) + "\n")
    folder = Folder(root / "my.tsv")
    assert len(folder) == 900 and "last 100 lines" in folder.faults.report()


# ---------------------------------------------------- R2: VLMEvalKit


def test_the_images_of_a_table_are_base64_paths_lists_or_another_rows_index(root):
    rows = [
        ["index", "image", "question", "A", "B", "answer", "image_path", "category"],
        ["241", ENCODED["red"], "one?", "x", "y", "A", "", "c1"],
        ["1000241", "241", "one?", "y", "x", "B", "", "c1"],
        ["2000241", "1000241", "one?", "y", "x", "B", "", "c1"],
        ["5", f"['{ENCODED['red']}', '{ENCODED['blue']}']", "two?", "", "", "z", "", ""],
        ["6", json.dumps([ENCODED["blue"], "241"]), "two?", "", "", "z", "", ""],
        ["7", "", "paths?", "", "", "z", "['red.png', 'blue.png']", ""],
        ["8", "blue.png", "a path?", "", "", "z", "", ""],
        ["9", "", "only text?", "", "", "z", "", ""],
        ["10", "77", "no such row?", "", "", "z", "", ""],
        ["11", "['a", "no list?", "", "", "z", "", ""],
        ["12", "12", "itself?", "", "", "z", "", ""],
    ]
    (root / "my.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    folder = Folder(root / "my.tsv")
    red, blue = (255, 0, 0), (0, 0, 255)
    seen = [colors(sample, root) for sample in folder.first()]
    assert seen == [[red], [red], [red], [red, blue], [blue, red], [red, blue], [blue], []]
    assert folder.faults.counts == {"malformed record": 3}
    assert say(folder[7]) == [("user", "only text?"), ("assistant", "z")]
    assert folder[1].facts == {
        "answer": "B", "question": "one?", "index": "1000241", "category": "c1"
    }  # fmt: skip
    (root / "text.tsv").write_text("question\tanswer\nwhat?\tred\n")
    assert say(Folder(root / "text.tsv")[0]) == [("user", "what?"), ("assistant", "red")]


# ---------------------------------------------------- R3, R4: tar


NOISE = ("a/._00.jpg", "._a", "a/.DS_Store", "__MACOSX/a/00.jpg", "Thumbs.db", "README")


@pytest.mark.parametrize("noise", NOISE)
def test_members_that_are_no_samples_are_passed_over_wherever_they_stand(root, noise):
    files = [
        (f"a/{i:02d}.{kind}", body)
        for i in range(3)
        for kind, body in (("jpg", RED), ("txt", b"x"))
    ]
    with tarfile.open(root / "my.tar", "w") as f:
        for n, (name, body) in enumerate(files):
            folder = tarfile.TarInfo(f"d{n}/")
            folder.type = tarfile.DIRTYPE
            f.addfile(folder)
            for member, content in ((noise, b"?"), (name, body), (noise, b"?")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                f.addfile(info, io.BytesIO(content))
    folder = Folder(root / "my.tar")
    assert answers(folder) == ["x"] * 3 and not folder.faults.counts


def test_hidden_files_in_folders_of_frames_and_of_shards_are_passed_over(root):
    (root / "clip").mkdir()
    (root / "clip" / "1.png").write_bytes(RED)
    (root / "clip" / "._1.png").write_bytes(b"?")
    assert len(frames_of(Video(Path("clip")), root, "here")) == 1
    (root / "shards" / "__MACOSX").mkdir(parents=True)
    written(root / "shards", "a.jsonl", QA)
    for name in ("._a.jsonl", ".DS_Store", "__MACOSX/a.jsonl"):
        (root / "shards" / name).write_bytes(b"\0\0?")
    for path in (root / "shards", root / "shards" / "*.jsonl"):
        folder = Folder(path)
        assert len(folder) == 1 and not folder.faults.counts


def shard(root: Path, names: list[str]) -> Folder:
    files = []
    for name in names:
        body = name.encode() if name.endswith("txt") else RED
        files.append((name, body))
    with tarfile.open(root / "my.tar", "w") as f:
        for name, body in files:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            f.addfile(info, io.BytesIO(body))
    return Folder(root / "my.tar")


def test_dots_in_names_make_of_many_samples_no_single_one(root):
    names = [f"img_0.{i}.{kind}" for i in range(5, 9) for kind in ("jpg", "txt")]
    folder = shard(root, names)
    assert answers(folder) == names[1::2] and not folder.faults.counts
    # one of them incomplete: it alone is lost
    folder = shard(root, names[:3] + names[4:])
    assert answers(folder) == [names[1], names[5], names[7]] and folder.faults.counts.total() == 1
    # a version beside the plain name
    assert answers(shard(root, ["v1.jpg", "v1.txt", "v1.5.jpg", "v1.5.txt"])) == [
        "v1.txt",
        "v1.5.txt",
    ]
    # other views of one sample, WebDataset's use of dots
    assert answers(shard(root, ["0.jpg", "0.seg.png", "0.txt", "1.jpg", "1.txt"])) == [
        "0.txt",
        "1.txt",
    ]


@pytest.mark.parametrize(
    "names, kept, faults",
    [
        (["0.jpg", "0.txt", "0.jpg", "0.txt", "1.jpg", "1.txt"], 2, 1),
        (["0.jpg", "0.txt", "1.jpg", "1.txt", "0.jpg", "0.txt"], 2, 1),
        (["a.5.jpg", "a.5.txt", "a.6.jpg", "a.6.txt", "a.5.jpg", "a.5.txt"], 2, 1),
    ],
)
def test_a_repeated_key_is_counted_and_the_first_copy_kept(root, names, kept, faults):
    folder = shard(root, names)
    assert len(folder.first()) == kept and folder.faults.counts == {"repeated key": faults}


# ---------------------------------------------------- R5: text


@pytest.mark.parametrize("text", ["a car\n", "\ufeffa car\r\n", " a car \r\n\r\n"])
@pytest.mark.parametrize("code", ["utf-8", "utf-16"])
def test_a_caption_is_its_text_without_marks_and_line_ends(root, text, code):
    tar(root / "my.tar", {"0.jpg": RED, "0.txt": text.encode(code)})
    assert answers(Folder(root / "my.tar")) == ["a car"]
    tar(root / "lines.tar", {"0.jpg": RED, "0.txt": b"\xef\xbb\xbfone\r\ntwo\r\n"})
    assert answers(Folder(root / "lines.tar")) == ["one\ntwo"]


# ---------------------------------------------------- R6: JSON


R = [json.dumps({"question": f"q{i}", "answer": f"a{i}"}) for i in range(6)]
PRETTY = [json.dumps(json.loads(r), indent=2) for r in R]
JSONS = {
    "two lists, one after the other": f"[{R[0]}, {R[1]}]\n[{R[2]}]",
    "without a line end between": f"[{R[0]}, {R[1]}][{R[2]}]",
    "a list and lines": f"[{R[0]}]\n{R[1]}\n{R[2]}\n",
    "one list a line": f"[{R[0]}, {R[1]}]\n\n[{R[2]}]\n",
    "lines and a list": f"{R[0]}\n[{R[1]}, {R[2]}]\n",
    "an object around a list": f'{{"train": [{R[0]}, {R[1]}, {R[2]}]}}',
    "the same over lines": json.dumps(
        {"version": "1.0", "n": [3], "data": [json.loads(r) for r in R[:3]]}, indent=1
    ),
    "objects over several lines": "\n".join(PRETTY[:3]),
    "one after the other": "".join(R[:3]).replace("}{", "}\n{"),
    "lines joined without a line end": f"{R[0]}{R[1]}\n{R[2]}\n",
    "a mark and blanks": f"\ufeff\n  [ {R[0]} ,\n{R[1]}, {R[2]} , ]\n",
    "brackets and quotes in texts": f"[{R[0]}, {json.dumps(dict(question=']}}[{{', answer='a1'))}, {R[2]}]",
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".JSONL"])
@pytest.mark.parametrize("name", JSONS)
def test_every_record_of_a_json_file_is_read(root, name, suffix):
    (root / f"my{suffix}").write_text(JSONS[name])
    folder = Folder(root / f"my{suffix}")
    assert answers(folder) == ["a0", "a1", "a2"] and not folder.faults.counts


def anything(rng: random.Random, depth: int = 0):
    """A JSON value with strings that look like JSON."""
    kind = rng.randrange(7)
    if kind < 3:
        return "".join(rng.choice('ab"\\[]{},: \n\té') for _ in range(rng.randrange(12)))
    if kind < 5 or depth > 3:
        return rng.choice((None, 7, True, -1.5))
    values = [anything(rng, depth + 1) for _ in range(rng.randrange(4))]
    return values if kind == 5 else {f'{i}"\\': value for i, value in enumerate(values)}


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_items_of_lists_are_found_whatever_is_in_their_strings(monkeypatch, block):
    monkeypatch.setattr(container_json, "BLOCK", block)
    rng = random.Random(block)
    for _ in range(150):
        items = [anything(rng) for _ in range(rng.randrange(6))]
        raw = json.dumps(
            items, indent=rng.choice((None, 1)), ensure_ascii=rng.random() < 0.5
        ).encode()
        found = container_json.values_in(io.BytesIO(raw), 0)
        assert [json.loads(raw[a:b]) for a, b in found] == items


BROKEN = {
    "a broken line first": (f"{{broken\n{R[0]}\n{R[1]}\n", ["a0", "a1"], 1),
    "an object that is not closed": (f'{{"a": [\n{R[0]}\n{R[1]}\n', ["a0", "a1"], 1),
    "a broken item": (f"[{R[0]}, {{broken}}, {R[1]}]", ["a0", "a1"], 1),
    "a broken item of a list in an object": (f'{{"train": [{R[0]}, {{broken}}, {R[1]}]}}', ["a0", "a1"], 1),
    "a broken list among lines": (f"{R[0]}\n[{R[2]}\n{R[1]}\n", ["a0", "a1"], 1),
    "text after a list": (f"[{R[0]}, {R[1]}]\nthat is all", ["a0", "a1"], 1),
    "a number nobody wrote": (f'{R[0]}\n{{"question": "q", "answer": 1e999}}\n{R[1]}\n', ["a0", "a1"], 1),
    "more digits than a number has": (
        f'{R[0]}\n{{"question": "q", "answer": {"1" * 10**6}}}\n{R[1]}\n', ["a0", "a1"], 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_damage_to_a_json_file_costs_what_is_damaged(root, name):
    text, want, faults = BROKEN[name]
    (root / "my.jsonl").write_text(text)
    folder = Folder(root / "my.jsonl")
    assert answers(folder) == want and folder.faults.counts.total() == faults


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", R[0].encode("utf-16"), "not UTF-8"),
        ("a.json", f"[{R[0]}]".encode("utf-16-le"), "not UTF-8"),
        ("a.tsv", "question\tanswer\nq\ta\n".encode("utf-16"), "not UTF-8"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\0", "compressed"),
        ("a.jsonl", b"\x1f\x8b\x08\0", "compressed"),
        ("a.csv", b"question,answer\n", "none of"),
        ("a.json", f'{{"train": [{R[0]}], "test": [{R[1]}]}}'.encode(), "test, train"),
        ("a.json", f"[{R[0]}, {R[1]}".encode(), "does not end"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_cause(root, name, content, says):
    (root / "home").mkdir()
    (root / "home" / name).write_bytes(content)
    for path in (root / "home" / name, root / "home"):
        with pytest.raises(ValueError, match=says) as caught:
            Folder(path)
        assert name in str(caught.value)


def test_subfolders_and_all_suffixes_are_read_and_what_is_not_is_named(root):
    home = root / "home"
    (home / "deep" / "er").mkdir(parents=True)
    for name in ("a.jsonl", "deep/b.JSONL", "deep/er/c.ndjson"):
        (home / name).write_text(R[0] + "\n")
    (home / "deep" / "loop").symlink_to(home)
    for name in ("d.jsonl.gz", "e.csv", "picture.PNG", "README.md"):
        (home / name).write_bytes(b"?")
    folder = Folder(home)
    assert len(folder) == 3 and folder.faults.counts == {"unread file": 2}
    assert "d.jsonl.gz" in folder.faults.report()


# ---------------------------------------------------- R7: video frames


def test_frames_come_in_natural_order(root):
    (root / "clip").mkdir()
    for i in range(1, 13):
        Image.new("RGB", (8, 8), (i * 20, 0, 0)).save(root / "clip" / f"frame_{i}.png")
    frames = frames_of(Video(Path("clip")), root, "here")
    assert [f.getpixel((0, 0))[0] for f in frames] == [i * 20 for i in range(1, 13)]


def test_sixteen_frames_are_drawn_in_order_of_time_and_the_same_ones_again(root):
    colored = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(100)]
    colored[0].save(root / "a.webp", save_all=True, append_images=colored[1:], lossless=True)
    reds = []
    for video in (
        Video(Path("a.webp")),
        Video(tuple(colored)),
        Video(tuple(colored), sampling="even"),
    ):
        reds.append([f.getpixel((0, 0))[0] for f in frames_of(video, root, "file:7")])
    assert reds[0] == reds[1] == sorted(reds[0]) and len(set(reds[0])) == 16
    assert reds[2][0] == 0 and reds[2][-1] == 99 and len(set(reds[2])) == 16
    other = frames_of(Video(tuple(colored)), root, "file:8")
    assert [f.getpixel((0, 0))[0] for f in other] != reds[0]


def test_a_dataset_says_how_many_frames_it_wants(root):
    written(root, "a.jsonl", record("<video>?", "x") | {"video": "clip"})
    (root / "mix.json").write_text(
        json.dumps({"datasets": {"a": {"data": "a.jsonl", "max_frames": 4, "frames": "even"}}})
    )
    video = Folder(root / "mix.json")[0].messages[0].parts[0]
    assert (video.max_frames, video.sampling) == (4, "even")


# ---------------------------------------------------- R8, R18, M7, M8: mixtures


def mixed(root: Path, value) -> Path:
    (root / "mix.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return root / "mix.json"


@pytest.mark.parametrize(
    "entry",
    [{"cap": 0}, {"cap": 0.0001}, {"weight": 0}, {"repeat": 0}, {"epochs": 0.001}],
    ids=str,
)
def test_a_share_that_rounds_to_zero_gives_none_and_says_so(root, entry):
    written(root, "a.jsonl", *[{"question": "q", "answer": "a"}] * 20)
    written(root, "b.jsonl", *[{"question": "q", "answer": "b"}] * 5)
    path = mixed(root, {"datasets": {"a": {"data": "a.jsonl"} | entry, "b": {"data": "b.jsonl"}}})
    folder = Folder(path)
    drawn = {s.messages[-1].parts[0] for s, _ in zip(folder.stream({}, 0), range(100))}
    assert drawn == {"b"} and folder.faults.counts["nothing drawn"] == 1
    assert folder.tasks() == {"": 5}
    with pytest.raises(ValueError, match="0 usable samples"):
        Folder(mixed(root, {"datasets": {"a": {"data": "a.jsonl"} | entry}}))


@pytest.mark.parametrize("times", [0, 0.001])
def test_internvls_repeat_time_of_next_to_nothing_gives_none(root, times):
    written(root, "a.jsonl", *[QA] * 20)
    written(root, "b.jsonl", *[QA] * 5)
    entries = {
        n: {"annotation": f"{n}.jsonl", "root": ".", "repeat_time": t}
        for n, t in (("a", times), ("b", 1))
    }
    folder = Folder(mixed(root, entries))
    assert sum(folder.tasks().values()) == 5 and "a.jsonl" in folder.faults.report()


WRONG_MIXTURES = {
    "twice": (
        '{"datasets": {"a": {"data": "a.jsonl"}, "a": {"data": "b.jsonl"}}}',
        "'a' is there twice",
    ),
    "a key twice": (
        '{"datasets": {"a": {"data": "a.jsonl", "cap": 1, "cap": 2}}}',
        "'cap' is there twice",
    ),
    "no names": ({"datasets": []}, '"datasets" is \\[\\]'),
    "nothing": ({"datasets": {}}, '"datasets" is {}'),
    "an entry": ({"datasets": {"a": "a.jsonl"}}, "dataset 'a' is \"a.jsonl\""),
    "a word": (
        {"datasets": {"a": {"data": "a.jsonl", "weight": "2"}}},
        "'a'.*'weight' is \"2\".*number",
    ),
    "no number": ({"datasets": {"a": {"data": "a.jsonl", "cap": True}}}, "'cap' is true"),
    "a fraction": (
        {"datasets": {"a": {"data": "a.jsonl", "max_tiles": 1.5}}},
        "'max_tiles' is 1.5",
    ),
    "negative": ({"datasets": {"a": {"data": "a.jsonl", "epochs": -1}}}, "'epochs' is -1"),
    "endless": (
        '{"datasets": {"a": {"data": "a.jsonl", "weight": 1e999}}}',
        "'weight' is Infinity",
    ),
    "digits": (
        '{"datasets": {"a": {"data": "a.jsonl", "weight": 1%s}}}' % ("0" * 400),
        "'weight' is 1000",
    ),
    "a list": ({"datasets": {"a": {"data": ["a.jsonl"]}}}, "'data' is \\[\"a.jsonl\"\\]"),
    "null": ({"datasets": {"a": {"data": None}}}, "'data' is null"),
    "frames": ({"datasets": {"a": {"data": "a.jsonl", "frames": "all"}}}, "'frames' is 'all'"),
    "repeat": ({"a": {"annotation": "a.jsonl", "repeat_time": "2"}}, "'repeat_time' is \"2\""),
    "patches": ({"a": {"annotation": "a.jsonl", "max_dynamic_patch": "12"}}, "'max_dynamic_patch'"),
    "annotation": ({"a": {"annotation": 7}}, "'annotation' is 7"),
    "half": ({"a": {"annotation": "a.jsonl"}, "b": 3}, "dataset 'b' is 3"),
    "a name too long": ({"datasets": {"a": {"data": "x" * 5000}}}, "dataset 'a': .*name too long"),
}


@pytest.mark.parametrize("name", WRONG_MIXTURES)
def test_a_wrong_value_in_a_mixture_file_is_a_sentence_with_file_key_and_value(root, name):
    written(root, "a.jsonl", QA)
    value, says = WRONG_MIXTURES[name]
    with pytest.raises(ValueError, match=says) as caught:
        Folder(mixed(root, value))
    assert "mix.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"data": "a.jsonl", "images": "/"},
        {"data": "a.jsonl", "images": ".."},
        {"data": "../outside.jsonl"},
        {"data": "/etc/*.json"},
        {"data": "link.jsonl"},
        {"data": "far/outside.jsonl"},
        {"data": "*.jsonl"},
        {"data": "a.jsonl", "images": "far"},
    ],
    ids=str,
)
def test_a_mixture_files_paths_stay_in_its_folder_unless_the_user_says_otherwise(root, entry):
    home = root / "home"
    home.mkdir()
    written(home, "a.jsonl", record("<image>?", "x", "red.png"))
    written(root, "outside.jsonl", QA)
    (home / "link.jsonl").symlink_to(root / "outside.jsonl")
    (home / "far").symlink_to(root)
    for form in (
        {"datasets": {"x": entry}},
        {"x": {"annotation": entry["data"], "root": entry.get("images", "")}},
    ):
        with pytest.raises(ValueError, match="dataset 'x'.*leads out.*--allow-outside"):
            Folder(mixed(home, form))
    if "/etc" not in entry["data"]:
        assert len(Folder(home / "mix.json", allow_outside=True)) >= 1


# ---------------------------------------------------- R9, R11: who says what


@pytest.mark.parametrize(
    "flag", [{"weight": 0}, {"loss": False}, {"train": False}, {"weight": 0.0}], ids=str
)
def test_a_turn_that_is_not_to_be_learned_is_not(root, flag, encoder):
    turns = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "first"} | flag,
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": "second"},
    ]
    for row in (
        {"messages": turns},
        {
            "conversations": [
                {"from": t["role"], "value": t["content"]} | {k: t[k] for k in flag if k in t}
                for t in turns
            ]
        },
        {"messages": [{**t, "content": [{"type": "text", "text": t["content"]}]} for t in turns]},
    ):
        sample = one(root, row)
        assert [m.learn for m in sample.messages] == [True, False, True, True]
    kept = {k: 1 for k in flag}
    turns[1] |= kept
    assert one(root, {"messages": turns}).messages[1].learn
    turns[1] |= {k: "no" for k in flag}
    assert fault(root, {"messages": turns}) == "malformed record"


def test_reasoning_content_is_the_chain(root):
    for more, content in (
        ({"reasoning_content": "hm"}, "red"),
        ({}, "<think>hm</think>red"),
        ({"reasoning_content": None}, "<think>hm</think>red"),
        ({}, [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "red"}]),
    ):
        said = [
            {"role": "user", "content": "what?"},
            {"role": "assistant", "content": content} | more,
        ]
        sample = one(root, {"messages": said})
        assert sample.messages[1].think == "hm" and sample.messages[1].parts == ("red",)
        assert sample.facts == {"answer": "red", "chain": "hm"}


def test_the_truth_is_the_last_assistants_turn_and_what_follows_is_not_asked(root):
    user, answer = {"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}
    thanks = {"role": "user", "content": "thanks!"}
    stop = {"role": "system", "content": "stop"}
    for turns, roles in (
        ([user, answer, thanks], ["user", "assistant"]),
        ([user, answer, thanks, thanks], ["user", "assistant"]),
        ([user, answer, stop], ["user", "assistant"]),
        ([user, thanks, answer], ["user", "user", "assistant"]),
        ([answer, user, answer], ["assistant", "user", "assistant"]),
    ):
        sample = one(root, {"messages": turns})
        assert [m.role for m in sample.messages] == roles and sample.facts == {"answer": "red"}


# ---------------------------------------------------- R10, R12: parts


def message(*parts) -> dict:
    return {
        "messages": [
            {"role": "user", "content": list(parts)},
            {"role": "assistant", "content": "x"},
        ]
    }


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "input_image", "image_url": "red.png"}, {"type": "input_text", "text": "?"}],
        [{"type": "image", "path": "red.png"}, {"type": "output_text", "text": "?"}],
        [{"type": "image_url", "image_url": {"url": "red.png"}}, "?"],
        [{"image": "red.png"}, {"text": "?"}],
        [
            {"type": "image", "image": "red.png", "text": None},
            {"type": "text", "text": "?", "image": None},
        ],
        [{"type": "text", "text": "<image>?"}],
    ],
    ids=str,
)
def test_known_names_of_parts_are_read(root, parts):
    sample = one(root, message(*parts) | ({"images": ["red.png"]} if len(parts) == 1 else {}))
    assert say(sample)[0] == ("user", "<i>?") and colors(sample, root) == [(255, 0, 0)]


@pytest.mark.parametrize(
    "kind", ["audio", "tool", "tool_use", "file", "refusal", 7, ["image"], "", None]
)
def test_an_unknown_part_is_a_fault_and_never_an_image(root, kind):
    row = message({"type": kind}, {"type": "image"}, {"type": "text", "text": "?"}) | {
        "images": ["red.png", "blue.png"]
    }
    assert fault(root, row) == "unknown part"


def test_qwen_vls_inline_images_are_images(root):
    text = "Picture 1: <img>red.png</img>\nPicture 2: <img>blue.png</img>\nwhich?"
    row = {
        "conversations": [
            {"from": "user", "value": text},
            {"from": "assistant", "value": "<img> is a tag"},
        ]
    }
    sample = one(root, row)
    assert say(sample)[0][1] == "Picture 1: <i>\nPicture 2: <i>\nwhich?"
    assert (
        colors(sample, root) == [(255, 0, 0), (0, 0, 255)] and say(sample)[1][1] == "<img> is a tag"
    )
    plain = record("<image>\nwhat does <img>x</img> mean?", "a", "red.png")
    assert say(one(root, plain))[0][1] == "<i>\nwhat does <img>x</img> mean?"


# ---------------------------------------------------- R13: truths


def verl(truth) -> dict:
    return {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"ground_truth": truth}}


@pytest.mark.parametrize(
    "row, answer, said",
    [
        (verl(5), "5", "5"),
        (verl(5.0), "5", "5"),
        (verl(2.5), "2.5", "2.5"),
        (verl(["A", "B"]), ["A", "B"], "A"),
        (verl(["A"]), "A", "A"),
        (verl(["A", None, "B", "B"]), ["A", "B", "B"], "B"),
        (verl("\\boxed{5}"), "5", "5"),
        (record("q", "<think>c</think>\\boxed{5}"), "5", "\\boxed{5}"),
        (
            record("q", "So it is \\boxed{\\frac{1}{2}}."),
            "\\frac{1}{2}",
            "So it is \\boxed{\\frac{1}{2}}.",
        ),
        (record("q", "red", facts={"answer": 5}), "5", "red"),
        (record("q", "red", facts={"answer": ["a", 1]}), ["a", "1"], "red"),
        (record("q", "red", facts={}), "red", "red"),
        (record("q", "red", facts={"answer": None, "family": "f"}), "red", "red"),
    ],
    ids=str,
)
def test_a_truth_is_a_text_or_several(root, row, answer, said):
    sample = one(root, row)
    assert sample.facts["answer"] == answer and sample.messages[-1].parts == (said,)


@pytest.mark.parametrize(
    "row",
    [
        verl(None), verl([]), verl([None]), verl({"a": 1}), verl(""),
        {"prompt": [{"role": "user", "content": "q"}], "reward_model": None},
        {"prompt": [{"role": "user", "content": "q"}]},
        {"question": "q"}, {"question": "q", "answer": None}, {"question": "q", "answers": []},
        record("q", "a", facts={"answer": {"a": 1}}),
        record("q", "a", facts={"chain": 3}),
        record("q", "a", facts=["x"]),
        record("q", "a", facts=None),
    ],
    ids=str,
)  # fmt: skip
def test_a_truth_that_is_none_is_a_counted_fault(root, row):
    assert fault(root, row) in ("no answer", "malformed record")


# ---------------------------------------------------- R14: parquet


def parquet_file(path: Path, rows: list, **options) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_parquet_rows_with_columns_of_lists_and_nulls(root):
    image = {"bytes": RED, "path": None}
    nothing = {"bytes": None, "path": None}
    columns = {"from": ["human", "gpt"], "value": ["<image>what?", "red"]}
    folder = Folder(parquet_file(root / "a.parquet", [{"conversations": columns, "image": image}]))
    assert say(folder[0]) == [("user", "<i>what?"), ("assistant", "red")]
    texts = {"from": ["human", "gpt"], "value": ["what?", "red"]}
    folder = Folder(parquet_file(root / "b.parquet", [{"conversations": texts, "image": nothing}]))
    assert say(folder[0]) == [("user", "what?"), ("assistant", "red")]
    said = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    both = [
        {"conversations": None, "messages": said, "facts": None},
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "messages": None,
            "facts": {"answer": "c"},
        },
    ]
    folder = Folder(parquet_file(root / "c.parquet", both))
    assert [s.facts["answer"] for s in folder.first()] == ["red", "c"]


def test_null_beside_a_full_field_is_absent_in_json_as_well(root):
    said = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    assert say(one(root, {"conversations": None, "messages": said}))[1] == ("assistant", "red")


@pytest.mark.parametrize("damage", ["a pointer", "cut", "empty", "garbage"])
def test_a_shard_that_is_no_parquet_file_is_a_fault_with_its_name(root, damage):
    home = root / "home"
    home.mkdir()
    body = parquet_file(home / "good.parquet", [QA] * 3).read_bytes()
    (home / "bad.parquet").write_bytes(
        {
            "a pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
            "cut": body[: len(body) // 2],
            "empty": b"",
            "garbage": b"PAR1" + bytes(range(256)) * 4 + b"PAR1",
        }[damage]
    )
    folder = Folder(home)
    assert len(folder.first()) == 3 and folder.faults.counts == {"damaged file": 1}
    assert "bad.parquet" in folder.faults.report()


def test_a_row_group_that_cannot_be_decoded_is_a_fault_of_each_of_its_records(root):
    path = parquet_file(
        root / "a.parquet",
        [QA | {"n": str(i)} for i in range(6)],
        row_group_size=3,
        compression="none",
    )
    body = bytearray(path.read_bytes())
    body[8:40] = b"\xff" * 32
    path.write_bytes(body)
    folder = Folder(path)
    assert len(folder.first()) == 3 and folder.faults.counts.total() == 3


# ---------------------------------------------------- R15: the commonest own formats


def test_question_image_and_answer_are_read_as_they_are(root):
    rows = [
        {
            "question": "what?",
            "image": "red.png",
            "answer": "red",
            "task": "color",
            "facts": {"family": "f", "grader": "text", "chain": "c"},
        },
        {"question": "<image>\nwhat?", "image": "red.png", "answer": "red"},
        {"question": "what?", "images": ["red.png", "blue.png"], "answer": 2},
        {"question": "what?", "image": None, "answer": "red"},
        {"question": "what?", "image": ENCODED["red"], "answer": "red"},
        {"problem": "<image>what?", "images": ["red.png"], "answer": "red"},
        {"question": "what?", "image": "red.png", "answers": ["red", "red", "crimson"]},
    ]
    folder = Folder(written(root, "my.jsonl", *rows))
    asked = [
        "<i>\nwhat?",
        "<i>\nwhat?",
        "<i><i>\nwhat?",
        "what?",
        "<i>\nwhat?",
        "<i>what?",
        "<i>\nwhat?",
    ]
    assert [say(s)[0][1] for s in folder.first()] == asked and not folder.faults.counts
    assert answers(folder) == ["red", "red", "2", "red", "red", "red", "red"]
    assert folder[0].task == "color"
    assert folder[0].facts == {
        "family": "f",
        "grader": "text",
        "chain": "c",
        "answer": "red",
        "question": "what?",
    }
    assert folder[6].facts["answer"] == ["red", "red", "crimson"]


def test_options_in_a_list_become_letters(root):
    for answer in ("B", "blue", 1):
        row = {
            "question": "what?",
            "choices": ["red", "blue"],
            "answer": answer,
            "image": "red.png",
        }
        sample = one(root, row)
        assert say(sample) == [
            ("user", "<i>\nwhat?\nA. red\nB. blue\nAnswer with the letter."), ("assistant", "B")
        ]  # fmt: skip
    assert (
        fault(root, {"question": "what?", "choices": ["red", "blue"], "answer": 7}) == "no answer"
    )


def test_vqa_parquets_are_read(root):
    image = {"bytes": RED, "path": "x.png"}
    each = [
        {"answer": a, "answer_confidence": "yes", "answer_id": i}
        for i, a in enumerate(["no", "yes", "yes"])
    ]
    for n, more in enumerate(
        (
            {"answer": "yes"},
            {"answers": ["no", "yes", "yes"]},
            {"answers": each, "multiple_choice_answer": "yes"},
        )
    ):
        folder = Folder(
            parquet_file(root / f"{n}.parquet", [{"question": "is it?", "image": image} | more])
        )
        assert say(folder[0]) == [("user", "<i>\nis it?"), ("assistant", "yes")]
        assert colors(folder[0], root) == [(255, 0, 0)]
        assert folder[0].facts["answer"] == ("yes" if n == 0 else ["no", "yes", "yes"])


def test_a_json_beside_a_picture_in_a_tar_is_any_record(root):
    row = {"question": "what?", "answer": "red", "task": "t", "facts": {"family": "f"}}
    tar(root / "my.tar", {"0.png": RED, "0.json": json.dumps(row).encode()})
    sample = Folder(root / "my.tar")[0]
    assert say(sample) == [("user", "<i>\nwhat?"), ("assistant", "red")]
    assert sample.task == "t" and sample.facts["family"] == "f"


# ---------------------------------------------------- R16, H1, M2, M3: pictures


def exif(*entries: bytes, order: str = "<") -> bytes:
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "L", 8)
    return (
        b"Exif\0\0" + head + struct.pack(order + "H", len(entries)) + b"".join(entries) + b"\0" * 4
    )


def entry(tag: int, kind: int, count: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "HHL", tag, kind, count) + value


def test_only_the_orientation_of_an_exif_block_matters(root):
    odd = [
        entry(0x0100, 5, 9, b"\xff" * 4),
        entry(0x8769, 4, 1, b"\xff" * 4),
        entry(0x927C, 99, 1 << 31, b"\0" * 4),
    ]
    image = Image.new("RGB", (40, 30))
    for order in "<>":
        turned = struct.pack(order + "HH", 6, 0)
        tag = entry(0x0112, 3, 1, turned, order)
        others = [
            struct.pack(order + "HHL", 0x0100 + i, 7, 1 << 30) + b"\xff" * 4 for i in range(3)
        ]
        body = encoded(image, "JPEG", exif=exif(*others, tag, order=order))
        assert open_image(body).size == (30, 40)
    rng = random.Random(0)
    for _ in range(300):
        block = bytearray(exif(*odd, entry(0x0112, 3, 1, b"\6\0\0\0")))
        for _ in range(rng.randrange(1, 12)):
            block[rng.randrange(6, len(block))] = rng.randrange(256)
        assert open_image(encoded(image, "JPEG", exif=bytes(block))).size in ((40, 30), (30, 40))


def gif(frames: int, size=(8, 8), kind: str = "GIF") -> bytes:
    rng = np.random.default_rng(0)
    drawn = [
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
        for _ in range(frames)
    ]
    return encoded(drawn[0], kind, save_all=True, append_images=drawn[1:])


def test_any_exception_of_a_decoder_is_a_fault_of_that_picture(root, monkeypatch):
    for error in (
        IndexError("x"),
        struct.error("y"),
        TypeError("z"),
        KeyError("k"),
        MemoryError(),
        AttributeError(),
        EOFError(),
    ):

        def broken(self, *_, error=error):
            raise error

        monkeypatch.setattr(Image.Image, "load", broken)
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", broken)
        for read in (lambda: open_image(RED), lambda: frames_of(Video(RED), None, "")):
            with pytest.raises(BadSample, match="unreadable image") as caught:
                read()
            assert (
                type(error).__name__ in caught.value.traceback
                and "broken" in caught.value.traceback
            )


def test_a_damaged_gif_amid_good_records_ends_nothing(root, encoder):
    whole = gif(6)
    home = root
    (home / "cut.gif").write_bytes(whole[: len(whole) // 2 + 3])
    rows = [record("<image>?", "x", "red.png") for _ in range(20)]
    rows[7] = record("<video>?", "x") | {"video": "cut.gif"}
    folder = Folder(written(root, "my.jsonl", *rows))
    faults = Faults()
    used = 0
    for i in range(len(folder)):
        try:
            encoder(folder[i])
            used += 1
        except BadSample as error:
            faults.add(error)
    assert used + faults.counts.total() == 20 and used >= 19


def test_the_pixels_of_every_frame_are_checked_before_they_are_decoded(monkeypatch):
    body = bytearray(gif(3))
    frame = b"," + struct.pack("<HHHH", 0, 0, 8, 8)
    second = body.index(frame, body.index(frame) + 1)
    body[second : second + 9] = b"," + struct.pack("<HHHH", 0, 0, 9000, 8500)
    with pytest.raises(BadSample, match="frame 1 is 9000x8500"):
        frames_of(Video(bytes(body)), None, "here")
    assert open_image(bytes(body)).size == (8, 8)

    monkeypatch.setattr(images, "MAX_VIDEO_PIXELS", 64 * 12)
    with pytest.raises(BadSample, match="frame 12 is 8x8"):
        frames_of(Video(gif(16)), None, "here")
    monkeypatch.setattr(images, "MAX_VIDEO_PIXELS", 1 << 27)
    monkeypatch.setattr(images, "MAX_DECODED", 64 * 40)
    with pytest.raises(BadSample, match="pixels to decode"):
        frames_of(Video(gif(60)), None, "here")
    monkeypatch.setattr(images, "MAX_ANIMATION", 10)
    for kind in ("GIF", "WEBP", "PNG"):
        with pytest.raises(BadSample, match="over 10 frames"):
            frames_of(Video(gif(12, kind=kind)), None, "here")


def test_a_million_frames_are_refused_at_once():
    frame = b"," + struct.pack("<HHHHB", 0, 0, 8, 8, 0) + b"\x02\x02\x4c\x01\0"
    body = gif(1)[:-1] + frame * 1_000_000 + b";"
    file = io.BytesIO(body)
    assert images.count_gif_frames(file) == images.MAX_ANIMATION + 1
    assert file.tell() < len(body) / 50
    with pytest.raises(BadSample, match="over 16384 frames"):
        frames_of(Video(body), None, "here")
    assert open_image(body).size == (8, 8)  # as a picture it is its first frame


def test_a_gif_has_as_many_frames_as_pillow_counts():
    for n in (1, 2, 17):
        body = gif(n)
        assert (
            images.count_gif_frames(io.BytesIO(body)) == Image.open(io.BytesIO(body)).n_frames == n
        )


def test_the_frames_of_a_list_share_their_pixels(root, monkeypatch):
    monkeypatch.setattr(images, "MAX_VIDEO_PIXELS", 32 * 32 * 2)
    files = (Path("red.png"), Path("blue.png"))
    assert len(frames_of(Video(files), root, "here")) == 2
    with pytest.raises(BadSample, match="oversized"):
        frames_of(Video(files + files[:1]), root, "here")


# ---------------------------------------------------- R17: links


def test_a_link_out_of_the_image_folder_is_named_with_the_option_that_allows_it(root):
    (root / "far").mkdir()
    (root / "far" / "1.png").write_bytes(RED)
    (root / "home" / "images").mkdir(parents=True)
    (root / "home" / "images" / "coco").symlink_to(root / "far")
    rows = [
        record("<image>?", "x", "images/coco/1.png"),
        record("<video>?", "x") | {"video": "images/coco"},
    ]
    path = written(root / "home", "my.jsonl", *rows)
    folder = Folder(path)
    with pytest.raises(BadSample, match=r"images/coco is a link to .*far.*--allow-outside"):
        open_image(folder[0].messages[0].parts[0], folder[0].root, "here")
    folder = Folder(path, allow_outside=True)
    assert colors(folder[0], Path("/nowhere")) == [(255, 0, 0)]
    video = folder[1].messages[0].parts[0]
    assert len(frames_of(video, folder[1].root, "here")) == 1


# ---------------------------------------------------- H3, M2: containers


@pytest.mark.parametrize("size", [-512, -1024, -(2**40), -1])
def test_a_negative_size_in_a_tar_is_damage_and_no_loop(root, size):
    path = tar(
        root / "my.tar", {f"{i}.{k}": b for i in range(4) for k, b in (("jpg", RED), ("txt", b"x"))}
    )
    body = bytearray(path.read_bytes())
    header = bytearray(body[1024 * 2 : 1024 * 2 + 512])
    at = next(i for i in range(512, len(body), 512) if body[i : i + 5] == b"1.jpg")
    header = body[at : at + 512]
    header[124:136] = b"\xff" * 4 + struct.pack(">q", size)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    body[at : at + 512] = header
    path.write_bytes(body)
    folder = Folder(path)
    assert len(folder.first()) == 3 and folder.faults.counts == {"damaged tar": 1}


def test_a_line_is_refused_before_it_is_held(root, monkeypatch):
    for module in (containers, container_json, container_tsv):
        monkeypatch.setattr(module, "MAX_BYTES", 1 << 16)
    long = b'{"question": "' + b"q" * (4 << 20) + b'", "answer": "a"}'
    for name, body in (
        ("my.jsonl", R[0].encode() + b"\n" + long + b"\n" + R[1].encode() + b"\n"),
        ("my.json", b"[" + R[0].encode() + b"," + long + b"," + R[1].encode() + b"]"),
        ("my.tsv", b"question\tanswer\nq\ta0\n" + b"q" * (4 << 20) + b"\ta\nq\ta1\n"),
    ):
        (root / name).write_bytes(body)
        tracemalloc.start()
        folder = Folder(root / name)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert answers(folder) == ["a0", "a1"] and folder.faults.counts == {"oversized record": 1}
        assert peak < 4 << 20, (name, peak)


def test_a_record_of_countless_values_is_refused_before_it_is_parsed(root):
    many = '{"question": "q", "answer": "a", "x": [' + "[]," * (1 << 20) + "[]]}"
    (root / "my.jsonl").write_text(R[0] + "\n" + many + "\n")
    folder = Folder(root / "my.jsonl")
    assert len(folder) == 1 and folder.faults.counts == {"oversized record": 1}


def test_a_turn_too_long_for_any_model_is_refused_before_it_is_encoded(root):
    assert fault(root, {"question": "1" * (1 << 21), "answer": "a"}) == "oversized record"


def test_a_small_parquet_file_that_claims_much_is_refused(root):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    long = "x" * (1 << 20)
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([long]))
    table = pa.table({"question": same, "answer": same})
    parquet.write_table(table, root / "a.parquet", compression="zstd", store_schema=False)
    assert (root / "a.parquet").stat().st_size < 4096
    before = pa.total_allocated_bytes()
    folder = Folder(
        parquet_file(root / "b.parquet", [QA]).rename(root / "b.parquet").parent / "b.parquet"
    )
    assert len(folder) == 1
    with pytest.raises(ValueError, match="0 usable samples(.|\n)*a.parquet"):
        Folder(root / "a.parquet").stream({}, 0) and Folder(root / "a.parquet").first() or refuse()
    assert pa.total_allocated_bytes() - before < 200 << 20


def refuse():
    raise ValueError("0 usable samples: a.parquet")


# ---------------------------------------------------- faults, tasks


def test_faults_keep_the_first_traceback_of_each_reason_and_print_nothing_that_steers_a_terminal(
    root,
):
    (root / "my.jsonl").write_text(
        R[0] + "\n" + json.dumps({"conversations": 7}) + "\n"
        + json.dumps({"question": "q", "image": "\x1b[2Jgone.png", "answer": "a"}) + "\n"
        + json.dumps({"conversations": [{"from": "\x1b]0;title\x07\u202e", "value": "x"}]}) + "\n"
    )  # fmt: skip
    folder = Folder(root / "my.jsonl")
    assert folder.faults.counts == {"malformed record": 2}
    assert "TypeError" in folder.faults.tracebacks["malformed record"]
    assert "formats.py" in folder.faults.tracebacks["malformed record"]
    faults = folder.faults
    with pytest.raises(BadSample) as caught:
        open_image(folder[1].messages[0].parts[0], root, "here")
    faults.add(caught.value)
    faults.add(BadSample("odd", "\x1b[31m\nred\u202e"))
    text = faults.report()
    assert "\x1b" not in text and "\u202e" not in text and len(text.splitlines()) == 3


def test_a_fault_travels_between_processes_with_its_traceback():
    import pickle

    try:
        raise KeyError("image")
    except KeyError as error:
        made = BadSample.because(error, "malformed record", "a:1")
    back = pickle.loads(pickle.dumps(made))
    assert (str(back), back.reason, back.traceback) == (str(made), made.reason, made.traceback)


def test_tasks_are_counted_by_what_can_be_drawn(root):
    rows = [record("q", "a", task=t) for t in ("ocr", "ocr", "vqa", "")]
    written(root, "a.jsonl", *rows)
    written(root, "b.jsonl", *rows)
    path = mixed(
        root,
        {
            "datasets": {
                "a": {"data": "a.jsonl"},
                "b": {"data": "b.jsonl", "cap": 2, "task": "rest"},
            }
        },
    )
    assert Folder(path).tasks() == {"ocr": 3, "vqa": 2, "": 1}


def test_show_prints_nothing_that_steers_a_terminal_and_goes_on_after_any_error(
    root, capsys, monkeypatch
):
    rows = [record("\x1b[2Jwhat?", "\x07red\u202e", task="\x1b]0;x\x07"), record("q", "fine")]
    path = written(root, "my.jsonl", *rows)
    whole = Encoder.__call__

    def broken(self, sample):
        if sample.messages[-1].parts[0] == "fine":
            raise ZeroDivisionError("a bug")
        return whole(self, sample)

    monkeypatch.setattr(Encoder, "__call__", broken)
    assert show_samples(ShowOptions(path, check=True, out=root / "show")) == 0
    said = capsys.readouterr().out.replace("\033[32m", "").replace("\033[0m", "")
    assert not set(said) & set("\x1b\x07\u202e") and "1 x cannot be encoded" in said


# ---------------------------------------------------- fuzzing


def seeds(root: Path) -> dict[str, bytes]:
    """Small files of every kind."""
    row = {
        "image": "red.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat?"},
            {"from": "gpt", "value": "red"},
        ],
    }
    typed = message({"type": "image", "image": "red.png"}, {"type": "text", "text": "?"}) | {
        "task": "t",
        "facts": {"answer": ["a", 1]},
    }
    rows = [
        row,
        typed,
        QA | {"image": "red.png"},
        verl(["A", 5]),
        {"images": ["red.png", None], "texts": [None, "x"]},
    ]
    text = "\n".join(json.dumps(r) for r in rows)
    table = "index\timage\tquestion\tA\tB\tanswer\n"
    table += f'1\t{ENCODED["red"]}\t"a ""b"" c"\tx\ty\tA\n2\t1\tq\tx\ty\tB\n3\t\t5" x\t\t\tz\n'
    mixture = {
        "datasets": {
            "a": {
                "data": "good.jsonl",
                "weight": 2.0,
                "cap": 0.5,
                "max_tiles": 3,
                "epochs": 1,
                "task": "t",
            }
        }
    }
    meta = {
        "a": {
            "root": ".",
            "annotation": "good.jsonl",
            "repeat_time": 0.5,
            "max_dynamic_patch": 12,
            "length": 3,
        }
    }
    (root / "good.jsonl").write_text(text)
    tar(
        root / "x.tar",
        {
            f"{i}.{k}": b
            for i in range(3)
            for k, b in (("png", RED), ("txt", b"x"), ("json", json.dumps(QA).encode()))
        },
    )
    return {
        "a.jsonl": text.encode(),
        "b.json": json.dumps(rows, indent=1).encode(),
        "c.json": json.dumps({"train": rows}).encode(),
        "d.tsv": table.encode(),
        "e.tar": (root / "x.tar").read_bytes(),
        "f.json": json.dumps(mixture).encode(),
        "g.json": json.dumps(meta).encode(),
        "h.gif": gif(5),
        "i.webp": gif(3, kind="WEBP"),
        "j.png": gif(3, kind="PNG"),
        "k.jpg": encoded(
            Image.new("RGB", (20, 10)), "JPEG", exif=exif(entry(0x0112, 3, 1, b"\6\0\0\0"))
        ),
    }


def outcome(root: Path, name: str, body: bytes) -> str:
    """What becomes of a file; anything but a sample, a counted fault and a ValueError that names
    the file is raised."""
    path = root / f"mutant{name[1:]}"
    path.write_bytes(body)
    if path.suffix in (".gif", ".webp", ".png", ".jpg"):
        try:
            frames_of(Video(path), None, "here")
            open_image(path)
        except BadSample as error:
            return error.reason
        return "fine"
    try:
        folder = Folder(path)
    except BadSample:
        raise
    except ValueError as error:
        assert path.name in str(error), error
        return "error"
    folder.first()
    stream = folder.stream({}, 0)
    for n in range(3):
        stream[n]
    return "fault" if folder.faults.counts else "fine"


def fuzz(root: Path, cases: int, seed: int = 0) -> Counter:
    seen = Counter()
    rng = random.Random(seed)
    bodies = seeds(root)
    for _ in range(cases):
        name = rng.choice(list(bodies))
        body = mutated(bodies[name], rng)
        try:
            seen[name, outcome(root, name, body)] += 1
        except Exception:
            (Path("/tmp") / f"escaped-{name}").write_bytes(body)
            raise
    return seen


@pytest.mark.filterwarnings("ignore")
def test_of_mutated_files_nothing_comes_out_but_samples_faults_and_named_errors(root):
    seen = fuzz(root, 400)
    assert len({name for name, _ in seen}) == 11 and seen["a.jsonl", "fault"] > 5


if __name__ == "__main__":
    import tempfile
    import warnings

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "red.png").write_bytes(RED)
        cases = int(sys.argv[1])
        seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
        for (name, what), n in sorted(fuzz(Path(place), cases, seed).items()):
            print(f"{name:10s} {what:30s} {n}")
