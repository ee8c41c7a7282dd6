"""Readers, mixtures and streams: every format arrives as it was written, and faults cost only themselves.

`python tests/test_readers.py 10000` reads a dataset of that size with 5 % faults of every kind, and
prints what was counted.
"""

import base64
import io
import json
import os
import random
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EVERY
from PIL import Image
from test_data import noise, png, record

from data.encode import Encoder
from data.images import frames_of, open_image
from data.readers import Folder
from data.sample import BadSample, Faults, Message, Sample, Video
from data.show import ShowOptions, show_samples
from data.steps import Batches
from data.stream import RUN, WINDOW, Documents, Order, Walk
from data.world import World
from tokenizer import Tokenizer
from vlm import PRESETS


def encoded(image: Image.Image, kind: str = "PNG", **how) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


RED, BLUE = (encoded(Image.new("RGB", (32, 32), c)) for c in ("red", "blue"))


def say(sample: Sample) -> list:
    """A sample as (role, text with <i> for each image); what a test can compare."""
    return [
        (
            m.role,
            "".join(
                p if isinstance(p, str) else "<v>" if isinstance(p, Video) else "<i>"
                for p in m.parts
            ),
        )
        for m in sample.messages
    ]


def colors(sample: Sample, root: Path) -> list[tuple]:
    return [
        open_image(p, sample.root or root).getpixel((3, 3))
        for m in sample.messages
        for p in m.parts
        if not isinstance(p, str)
    ]


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "blue.png").write_bytes(BLUE)
    return tmp_path


def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as f:
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            f.addfile(info, io.BytesIO(body))
    return path


# ---------------------------------------------------- formats

QA = [("user", "<i>\nwhat?"), ("assistant", "red")]
URL = "data:image/png;base64," + base64.b64encode(RED).decode()
ROWS = {
    "llava": (
        {
            "image": "red.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat?"},
                {"from": "gpt", "value": "red"},
            ],
        },
        QA,
    ),
    "minimind": (
        {
            "image_bytes": "red.png",
            "conversations": json.dumps(
                [
                    {"role": "user", "content": "<image>\nwhat?"},
                    {"role": "assistant", "content": "red"},
                ]
            ),
        },
        QA,
    ),
    "sharegpt": (
        {
            "images": ["red.png", "blue.png"],
            "system": "be brief",
            "conversations": [
                {"from": "human", "value": "<image> or <image>?"},
                {"from": "gpt", "value": "red"},
            ],
        },
        [("system", "be brief"), ("user", "<i> or <i>?"), ("assistant", "red")],
    ),
    "llama-factory": (
        {
            "images": ["red.png"],
            "messages": [
                {"role": "user", "content": "<image>\nwhat?"},
                {"role": "assistant", "content": "red"},
            ],
        },
        QA,
    ),
    "openai": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": URL}},
                        {"type": "text", "text": "\nwhat?"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
            ]
        },
        QA,
    ),
    "hf": (
        {
            "images": ["red.png"],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "\nwhat?"}],
                },
                {"role": "assistant", "content": "red"},
            ],
        },
        QA,
    ),
    "qwen path": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "red.png"},
                        {"type": "text", "text": "\nwhat?"},
                    ],
                },
                {"role": "assistant", "content": "red"},
            ]
        },
        QA,
    ),
    "mark as words": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "what is <image>?"}]},
                {"role": "assistant", "content": "a tag"},
            ]
        },
        [("user", "what is < image>?"), ("assistant", "a tag")],
    ),
    "the_cauldron": (
        {
            "images": ["red.png"],
            "texts": [
                {"user": "what?", "assistant": "red", "source": "x"},
                {"user": "sure?", "assistant": "yes", "source": "x"},
            ],
        },
        QA + [("user", "sure?"), ("assistant", "yes")],
    ),
    "obelics": (
        {"images": [None, "red.png", None], "texts": ["see ", None, " there"], "metadata": "{}"},
        [("assistant", "see <i> there")],
    ),
    "verl": (
        {
            "data_source": "geo",
            "prompt": [{"role": "user", "content": "<image>\nwhat?"}],
            "images": ["red.png"],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "red"},
            "extra_info": {"index": 0},
        },
        QA,
    ),
    "text": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "red"}]},
        [("user", "hi"), ("assistant", "red")],
    ),
}


@pytest.mark.parametrize("container", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_every_format_is_read_as_it_was_written(root, name, container, tokenizer, config):
    row, want = ROWS[name]
    if container == "parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        row = json.loads(json.dumps(row))
        if row.get("images"):  # as Hugging Face stores an image column
            row["images"] = [
                v and {"bytes": (root / v).read_bytes(), "path": v} for v in row["images"]
            ]
        for m in (
            row.get("messages", [])
            if any(isinstance(m["content"], list) for m in row.get("messages", []))
            else []
        ):
            m["content"] = (
                [{"type": "text", "text": m["content"]}]
                if isinstance(m["content"], str)
                else m["content"]
            )  # a column has one type
        parquet.write_table(pa.Table.from_pylist([row, row]), root / "my.parquet", row_group_size=1)
    elif container == "json":
        (root / "my.json").write_text(json.dumps([row, row], indent=2))
    else:
        (root / "my.jsonl").write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n")
    folder = Folder(root / f"my.{container}")
    assert len(folder) == 2 and not folder.faults.counts
    for i in range(2):
        s = folder[i]
        assert (
            say(s) == want
            and colors(s, root) == [(255, 0, 0), (0, 0, 255)][: str(want).count("<i>")]
        )
        assert s.origin == f"my.{container}:{2 * i + 1 if container == 'jsonl' else i + 1}"
        Encoder(tokenizer, config, folder.root)(s)
    if name == "verl":
        assert folder[0].facts == {"answer": "red"} and folder[0].task == "geo"


def test_ratings_below_the_wish_leave_out_their_turns(root):
    row = {
        "images": ["red.png"],
        "texts": [{"user": f"q{i}", "assistant": f"a{i}"} for i in range(3)],
        "relevance_ratings": [5, 2, 4],
        "formatting_ratings": [5, 5, None],
    }
    (root / "my.jsonl").write_text(json.dumps(row))
    (root / "mix.json").write_text(
        json.dumps({"datasets": {"x": {"data": "my.jsonl", "min_rating": 4}}})
    )
    assert [t for _, t in say(Folder(root / "mix.json")[0])] == ["<i>\nq0", "a0", "q2", "a2"]


def test_a_webdataset_shard_gives_captions_conversations_and_pages(root):
    page = {"pages": [{"lines": {"text": ["first", "second"], "bbox": []}}]}
    files = {
        "a/000.png": RED,
        "a/000.txt": b"a red one",
        "a/001.png": BLUE,
        "a/001.json": json.dumps({"caption": "a blue one"}).encode(),
        "a/002.json": json.dumps(ROWS["llava"][0]).encode(),
        "a/002.png": RED,
        "b.png": BLUE,
        "b.json": json.dumps(page).encode(),
        "x" * 150 + ".png": RED,
        "x" * 150 + ".txt": b"a long name",
    }
    folder = Folder(tar(root / "shard-000.tar", files))
    assert [say(folder[i])[-1][1] for i in range(len(folder))] == [
        "a red one",
        "a blue one",
        "red",
        "first\nsecond",
        "a long name",
    ]
    assert [colors(folder[i], root)[0][0] for i in range(5)] == [
        255,
        0,
        255,
        0,
        255,
    ] and not folder.faults.counts
    tar(root / "shard-001.tar", {"c.png": RED, "c.txt": b"another"})
    assert len(Folder(root / "shard-*.tar")) == 6


def test_a_vlmevalkit_table_becomes_questions_with_options(root):
    rows = [
        "index\timage\tquestion\thint\tA\tB\tanswer",
        f'0\t{base64.b64encode(RED).decode()}\t"two\nlines ""quoted"""\tlook\tred\tblue\tA',
        f"1\t{base64.b64encode(BLUE).decode()}\twhat?\t\t\t\tblue",
        "2\t!!!\twhat?\t\t\t\tblue",
    ]
    (root / "my.tsv").write_text("\n".join(rows) + "\n")
    folder = Folder(root / "my.tsv")
    assert say(folder[0]) == [
        ("user", '<i>\nHint: look\ntwo\nlines "quoted"\nA. red\nB. blue\nAnswer with the letter.'),
        ("assistant", "A"),
    ]
    assert say(folder[1]) == [
        ("user", "<i>\nwhat?"),
        ("assistant", "blue"),
    ] and folder.faults.counts == {"malformed record": 1}


@pytest.mark.parametrize("how", ["list", "folder", "gif", "webp"])
def test_a_video_becomes_numbered_frames(root, how, tokenizer, config):
    shades = [(i * 20, 0, 0) for i in range(12)]
    frames = [Image.new("RGB", (32, 32), c) for c in shades]
    (root / "clip").mkdir()
    for i, f in enumerate(frames):
        f.save(root / "clip" / f"{i:03d}.png")
    frames[0].save(root / "clip.gif", save_all=True, append_images=frames[1:], loop=0)
    frames[0].save(root / "clip.webp", save_all=True, append_images=frames[1:], lossless=True)
    value = {
        "list": [f"clip/{i:03d}.png" for i in range(12)],
        "folder": "clip",
        "gif": "clip.gif",
        "webp": "clip.webp",
    }[how]
    row = {
        "video": value,
        "conversations": [
            {"from": "human", "value": "<video>\nwhat?"},
            {"from": "gpt", "value": "a fade"},
        ],
    }
    (root / "my.jsonl").write_text(json.dumps(row))
    encoder = Encoder(tokenizer, config, root)
    seen = encoder.unrolled(Folder(root / "my.jsonl")[0])
    assert say(seen)[0][1] == "".join(f"Frame-{i}: <i>\n" for i in range(1, 13)) + "\nwhat?"
    reds = [p.getpixel((3, 3))[0] for p in seen.messages[0].parts if not isinstance(p, str)]
    assert reds == [i * 20 for i in range(12)]
    assert len(encoder(Folder(root / "my.jsonl")[0]).images) == 12
    for bad in ("../clip", "/etc", "none.gif"):
        with pytest.raises(BadSample, match="outside|missing"):
            frames_of(Video(Path(bad)), root, "here")


def test_the_tile_budget_of_a_dataset_is_shared_by_its_images(root, tokenizer):
    from dataclasses import replace

    config = replace(PRESETS["toy"], max_tiles=12, min_tiles=1)
    Image.new("RGB", (400, 100)).save(root / "wide.png")
    row = {
        "image": ["wide.png"] * 2,
        "conversations": [
            {"from": "human", "value": "<image><image>"},
            {"from": "gpt", "value": "x"},
        ],
    }
    (root / "my.jsonl").write_text(json.dumps(row))
    count = {}
    for most in (0, 8, 1):
        (root / "meta.json").write_text(
            json.dumps(
                {
                    "x": {
                        "root": ".",
                        "annotation": "my.jsonl",
                        "max_dynamic_patch": most,
                        "repeat_time": 1,
                    }
                }
            )
        )
        count[most] = len(Encoder(tokenizer, config)(Folder(root / "meta.json")[0]).images)
    assert count == {0: 10, 8: 10, 1: 2}  # four tiles and a thumbnail each, or one tile


def test_text_after_the_last_image_may_be_cut_and_nothing_else(tokenizer, config):
    picture = Image.new("RGB", (32, 32))
    sample = Sample((Message("user", ("q", picture)), Message("assistant", ("word " * 100,))))
    whole = Encoder(tokenizer, config)(sample)
    short = Encoder(tokenizer, config, max_length=60, long="truncate")(sample)
    assert (
        len(short) == 60
        and (short.ids == whole.ids[:60]).all()
        and (short.labels[:59] == whole.labels[:59]).all()
    )
    end = int(np.flatnonzero(whole.ids == tokenizer.special["</img>"])[0])
    for n in (end, end - 2):
        with pytest.raises(BadSample, match="too long"):
            Encoder(tokenizer, config, max_length=n, long="truncate")(sample)
    with pytest.raises(BadSample, match="too long"):
        Encoder(tokenizer, config, max_length=60)(sample)


# ---------------------------------------------------- mixtures


def written(root: Path, name: str, n: int, **more) -> None:
    (root / f"{name}.jsonl").write_text(
        "".join(json.dumps(record(f"{name} {i}?", f"{name}{i}", **more)) + "\n" for i in range(n))
    )


def take(stream, n: int) -> list[str]:
    return [s.messages[-1].parts[0] for s, _ in zip(stream, range(n))]


def test_a_mixture_is_drawn_by_weight_within_its_epochs_and_caps(root):
    for name, n in (("a", 50), ("b", 200), ("c", 40)):
        written(root, name, n)
    (root / "mix.json").write_text(
        json.dumps(
            {
                "datasets": {
                    "a": {"data": "a.jsonl", "weight": 3.0},
                    "b": {"data": "b.jsonl", "weight": 1.0, "cap": 20, "task": "bee"},
                    "c": {"data": "c.jsonl", "weight": 1.0, "epochs": 2},
                }
            }
        )
    )
    folder = Folder(root / "mix.json")
    seen = Counter(take(folder.stream({}, 0), 4000))
    by = Counter({k: sum(n for a, n in seen.items() if a[0] == k) for k in "abc"})
    assert by["c"] == 80 and set(n for a, n in seen.items() if a[0] == "c") == {2}
    assert len([a for a in seen if a[0] == "b"]) == 20 and 2.6 < by["a"] / by["b"] < 3.4
    a = [x for x in take(folder.stream({}, 0), 500) if x[0] == "a"]
    assert (
        sorted(a[:50]) == sorted(a[50:100]) == sorted(f"a{i}" for i in range(50))
        and a[:50] != a[50:100]
    )
    assert set(x[0] for x in take(folder.stream({"bee": 1.0, "other": 9.0}, 0), 30)) == {"b"}


def test_a_cap_counts_all_tasks_of_a_dataset_and_internvls_repeat_is_a_share_or_a_weight(root):
    rows = [record(f"{i}?", f"a{i}", task="even" if i % 2 == 0 else "odd") for i in range(100)]
    (root / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    written(root, "b", 50)
    (root / "mix.json").write_text(
        json.dumps({"datasets": {"a": {"data": "a.jsonl", "cap": 66, "epochs": 1}}})
    )
    kept = sorted(int(a[1:]) for a in take(Folder(root / "mix.json").stream({}, 0), 1000))
    assert len(kept) == 66 and kept == [i * 100 // 66 for i in range(66)]
    (root / "meta.json").write_text(
        json.dumps(
            {
                "a": {"root": ".", "annotation": "a.jsonl", "repeat_time": 0.3},
                "b": {"root": ".", "annotation": "b.jsonl", "repeat_time": 3},
            }
        )
    )
    seen = Counter(take(Folder(root / "meta.json").stream({}, 0), 3600))
    assert len([a for a in seen if a[0] == "a"]) == 30 and len(seen) == 80
    assert (
        4
        < sum(n for a, n in seen.items() if a[0] == "b")
        / sum(n for a, n in seen.items() if a[0] == "a")
        < 6
    )  # 150 to 30


def test_show_prints_what_is_supervised_in_green_and_check_counts_lengths_tasks_and_faults(
    root, capsys
):
    rows = [
        record("<image>\nwhät?", "réd", "red.png", task="t"),
        record("<image>?", "x", "gone.png"),
        record("hi", "yo"),
    ]
    (root / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (root / "mix.json").write_text(json.dumps({"datasets": {"a": {"data": "a.jsonl"}}}))
    assert show_samples(ShowOptions(root / "mix.json", show=1, check=True, out=root / "show")) == 0
    said = capsys.readouterr().out
    assert (
        "<img><IMG_CONTEXT>...</img>\nwhät?<|im_end|>" in said
        and "\033[32mréd<|im_end|>\033[0m" in said
        and "yo" not in said
    )
    assert (
        "2 samples usable" in said
        and "tasks: t 1, (none) 1" in said
        and "skipped 1 x missing image; first: missing image: a.jsonl:2" in said
    )
    assert open_image(root / "show" / "0-0.png").getpixel((3, 3)) == (255, 0, 0)


def test_image_paths_start_beside_their_own_file(root):
    for name, body in (("x", RED), ("y", BLUE)):
        (root / name).mkdir()
        (root / name / "i.png").write_bytes(body)
        (root / name / "my.jsonl").write_text(json.dumps(record("<image>?", name, "i.png")))
    folder = Folder(root / "*" / "my.jsonl")
    assert [colors(folder[i], Path("/nowhere"))[0] for i in range(2)] == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    "wrong", [{"data": "a.jsonl", "wieght": 1}, {"weight": 1.0}, {"data": "no.jsonl"}]
)
def test_a_mixture_with_an_unknown_key_or_file_is_an_error_that_names_it(root, wrong):
    written(root, "a", 3)
    (root / "mix.json").write_text(json.dumps({"datasets": {"x": wrong}}))
    with pytest.raises(ValueError, match="wieght|data|no.jsonl"):
        Folder(root / "mix.json")


def test_an_epoch_with_an_end_ends(root):
    written(root, "a", 30)
    (root / "mix.json").write_text(
        json.dumps({"datasets": {"x": {"data": "a.jsonl", "epochs": 1}}})
    )
    assert sorted(take(Folder(root / "mix.json").stream({}, 0), 1000)) == sorted(
        f"a{i}" for i in range(30)
    )


# ---------------------------------------------------- order


@pytest.mark.parametrize("n", [1, 1000, RUN, 5 * RUN + 7, 3 * WINDOW + 11])
def test_an_order_is_a_permutation_each_epoch_and_a_function_of_the_number(n):
    order, again = (Order([torch.arange(n)], [1.0], [0], seed=3) for _ in range(2))
    first = [order[i][1] for i in range(n)]
    assert sorted(first) == list(range(n))
    for i in random.Random(0).sample(range(2 * n), min(50, 2 * n)):  # asked in any order
        assert again[i] == order[i]
    if n > 1:
        second = [order[i][1] for i in range(n, 2 * n)]
        assert sorted(second) == list(range(n)) and second != first != list(range(n))
    if n > WINDOW:  # a window holds only a few runs
        assert len({r // RUN for r in first[:WINDOW]}) <= WINDOW // RUN


def test_a_mixture_far_into_the_stream_needs_no_walk_through_it():
    order = Order([torch.arange(1000), torch.arange(50)], [0.9, 0.1], [0, 0], seed=0)
    near = [order[i] for i in range(200)]
    order[10**7]
    assert [order[i] for i in range(200)] == near
    groups = Counter(order[10**7 + i][0] for i in range(3000))
    assert 0.85 < groups[0] / 3000 < 0.95


def test_worker_processes_change_nothing_but_the_time(root, tokenizer, config):
    rows = [record(f"<image> {i}?", f"a{i}", "red.png" if i % 5 else "gone.png") for i in range(40)]
    (root / "my.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    def steps(workers: int) -> tuple[list, Counter]:
        folder, faults = Folder(root / "my.jsonl"), Faults()
        documents = Documents(
            folder.stream({}, 0), Encoder(tokenizer, config, folder.root), faults, workers=workers
        )
        made = [
            b.ids.tolist()
            for _, step in zip(range(6), Batches(documents, 256, 2, 1, 0, buffer=8))
            for b in step
        ]
        documents.close()
        return made, faults.counts

    alone, helped = steps(0), steps(1)
    assert alone[0] == helped[0] and alone[1] == helped[1] and alone[1]["missing image"] > 5


def test_an_iterator_is_no_time_machine():
    walk = Walk(iter("abcdef"))
    assert walk[1] == "b" and walk[4] == "e"
    with pytest.raises(AssertionError, match="cannot go back"):
        walk[2]
    with pytest.raises(IndexError):
        walk[6]


def test_the_world_is_a_function_of_the_number():
    stream = World().stream(EVERY, 5)
    first = [s.facts for s, _ in zip(stream, range(3))]
    assert [stream[i].facts for i in (2, 0, 1)] == [first[2], first[0], first[1]]


# ---------------------------------------------------- faults

ODD = {  # strange, and fine
    "cmyk.jpg": encoded(Image.new("CMYK", (40, 40)), "JPEG"),
    "alpha.png": encoded(Image.new("RGBA", (40, 40), (9, 9, 9, 40))),
    "deep.png": png(3, 1, 16, 0, b"\0" + bytes(6)),
    "palette.png": encoded(Image.new("P", (40, 40))),
    "turned.jpg": encoded(
        Image.new("RGB", (40, 30)),
        "JPEG",
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
    ),
    "moving.gif": encoded(
        Image.new("RGB", (20, 20)),
        "GIF",
        save_all=True,
        append_images=[Image.new("RGB", (20, 20), "red")],
    ),
}
WHOLE = encoded(noise(64, 48), "JPEG")
FLIPPED = bytearray(RED)
FLIPPED[45] ^= 255
PICTURES = {
    "half.jpg": WHOLE[: len(WHOLE) // 2],
    "less.jpg": WHOLE[:-2],
    "empty.png": b"",
    "page.png": b"<!doctype html>",
    "svg.png": b"<svg/>",
    "crc.png": bytes(FLIPPED),
}
LARGE = {"bomb.png": png(9000, 8000, 8, 2, b""), "thin.png": encoded(Image.new("RGB", (1, 5000)))}


def line(*a, **k) -> bytes:
    return json.dumps(record(*a, **k)).encode()


FAULTS = (
    [("unreadable image", lambda k, name=name: line("<image>?", k, name)) for name in PICTURES]
    + [("oversized image", lambda k, name=name: line("<image>?", k, name)) for name in LARGE]
    + [
        ("path outside the image folder", lambda k, name=name: line("<image>?", k, name))
        for name in ("../secret.png", "/etc/hostname", "link.png", "a/../../secret.png")
    ]
    + [
        ("missing image", lambda k: line("<image>?", k, "gone.png")),
        ("missing image", lambda k: line("<image>?", k, "file:///etc/hostname")),
        ("remote image", lambda k: line("<image>?", k, "http://127.0.0.1/x.png")),
        ("wrong placeholder count", lambda k: line("<image><image>?", k, "good.jpg")),
        ("wrong placeholder count", lambda k: line("<image>?", k)),
        ("empty answer", lambda k: line("q", " ")),
        ("empty question", lambda k: line(" ", k)),
        ("malformed record", lambda k: b'{"conversations": [' + b"\xff\xfe" + b"]}"),
        ("malformed record", lambda k: line("\ud800", k)),
        ("malformed record", lambda k: b"[" * 100_000),
        ("malformed record", lambda k: line("q", k)[:-9]),
        ("malformed record", lambda k: b'{"x": NaN, ' + line("q", k)[1:]),
        ("too long", lambda k: line("q" * 3000, k)),
    ]
)


def plant(root: Path, n: int) -> tuple[Counter, Counter]:
    """n samples under root/data, half in JSON lines and half in tar shards, one in twenty broken,
    every kind in turn. Returns the reasons that must be counted and the answers that must
    arrive."""
    home = root / "data"
    home.mkdir(parents=True)
    for name, body in (ODD | PICTURES | LARGE | {"good.jpg": WHOLE}).items():
        (home / name).write_bytes(body)
    (root / "secret.png").write_bytes(RED)
    (home / "link.png").symlink_to(root / "secret.png")
    reasons, answers, names = Counter(), Counter(), [*ODD, "good.jpg", "good.jpg", None]
    with open(home / "a.jsonl", "wb") as f:
        for i in range(n // 2):
            if i % 20 == 7:
                reason, make = FAULTS[i // 20 % len(FAULTS)]
                reasons[reason] += 1
                f.write(make(f"bad{i}") + b"\n")
            else:
                name = names[i % len(names)]
                answers[f"line{i}"] += 1
                f.write(
                    line(
                        "<|im_end|><IMG_CONTEXT> ?" if name is None else "<image>\n<|im_start|>?",
                        f"line{i}",
                        name,
                    )
                    + b"\n"
                )
    for k in range(n // 2 // 250):
        shard = tar(
            home / f"shard-{k:04d}.tar",
            {
                f"{i:05d}.{kind}": body
                for i in range(250)
                for kind, body in (
                    ("jpg", WHOLE if i % 20 != 7 else PICTURES["half.jpg"]),
                    ("txt", f"tar{k}-{i}".encode()),
                )
            },
        )
        reasons["unreadable image"] += 13
        answers.update(f"tar{k}-{i}" for i in range(250) if i % 20 != 7)
        raw = bytearray(shard.read_bytes())
        with tarfile.open(shard) as f:
            where = {m.name: m.offset for m in f}
        # a header whose checksum is wrong: one sample is lost, not the rest of the shard
        raw[where["00100.jpg"] + 150] ^= 255
        reasons["damaged tar"] += 1
        del answers[f"tar{k}-100"]
        if k % 2:
            raw = raw[: where["00249.txt"] + 300]  # a cut
            reasons["damaged tar"] += 1
            del answers[f"tar{k}-249"]
        shard.write_bytes(raw)
    return reasons, answers


OPENED: list[str] | None = None


def watch(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], (str, Path)):
        OPENED.append(str(arguments[0]))


sys.addaudithook(watch)


def resident() -> float:
    """MiB in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def read_to_the_end(home: Path) -> tuple[Counter, Counter, list[float], list[str]]:
    global OPENED
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)}, "")
    OPENED, arrived, memory = [], Counter(), []
    folder = Folder(home)
    for i in range(len(folder)):
        found = Documents(
            [folder[i]],
            Encoder(tokenizer, PRESETS["toy"], folder.root, max_length=2048),
            folder.faults,
        )
        for d in found:
            arrived[tokenizer.decode([y for y in d.labels if y >= 0][:-1])] += 1
        if i % (len(folder) // 10) == 0:
            memory.append(resident())
    opened, OPENED = OPENED, None
    return folder.faults.counts, arrived, memory, opened


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_of_a_dataset_with_every_fault_all_that_is_good_arrives_and_each_fault_is_counted(tmp_path):
    reasons, answers = plant(tmp_path, 1000)
    counts, arrived, memory, opened = read_to_the_end(tmp_path / "data")
    assert counts == reasons and arrived == answers and len(reasons) >= 10
    assert opened and all(
        Path(p).resolve().is_relative_to(tmp_path / "data")
        for p in opened
        if not p.endswith((".py", ".pyc", "statm"))
    )
    assert memory[-1] - memory[3] < 20, memory


if __name__ == "__main__":
    import tempfile
    import time

    with tempfile.TemporaryDirectory() as place:
        reasons, answers = plant(Path(place), int(sys.argv[1]))
        began = time.time()
        counts, arrived, memory, opened = read_to_the_end(Path(place, "data"))
        outside = {
            p
            for p in opened
            if not Path(p).resolve().is_relative_to(Path(place, "data").resolve())
            and not p.endswith((".py", ".pyc", "statm"))
        }
        print(
            f"{sum(arrived.values())} of {sum(answers.values())} good samples arrived, "
            f"{counts.total()} of {reasons.total()} faults counted, in {time.time() - began:.0f} s; "
            f"memory {memory[1]:.0f} MiB after a tenth, {memory[-1]:.0f} at the end; "
            f"opened outside: {len(outside)}"
        )
        print(
            "\n".join(
                f"{n:5d} {reason}"
                + ("" if reasons[reason] == n else f" (expected {reasons[reason]})")
                for reason, n in counts.most_common()
            )
        )
        sys.exit(counts != reasons or arrived != answers or bool(outside))
