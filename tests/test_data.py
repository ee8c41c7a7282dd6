"""Text to ids, label masks, the drawn world's truth, and the reader: a broken sample costs that
sample alone."""

import io
import json
import random
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import EVERY
from PIL import Image, ImageFile

from data import world
from data.encode import Encoder, chain_of, truth_of, with_thinking
from data.images import open_image
from data.readers import Folder
from data.sample import BadSample, Faults, Message, Sample
from data.stream import Documents
from tokenizer import ADDED, Tokenizer, train_bpe

# ---------------------------------------------------------------------------------------- tokenizer


def any_text(rng: random.Random) -> str:
    """Up to forty characters of any plane, without lone surrogates (they are no Unicode text)."""
    ranges = (
        (0, 0x20),
        (0x20, 0x7F),
        (0x80, 0x250),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1FAFF),
        (0x200B, 0x2060),
        (0, 0x110000),
    )
    codes = (rng.randrange(*rng.choice(ranges)) for _ in range(rng.randrange(40)))
    return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)


def test_any_unicode_text_comes_back_from_its_ids(tokenizer):
    rng = random.Random(0)
    fixed = [
        "",
        " ",
        "\x00\x01\x7f\x9f",
        "\r\n\r\n  \t\u2028",
        "👩‍👩‍👧‍👦🏽 🇨🇳",
        "人工智能助手，你好！",
        "e\u0301 ≠ é",
        "\U0010ffff\ufeff",
    ]
    for text in fixed + [any_text(rng) for _ in range(500)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_text_has_the_id_of_a_control_token(tokenizer):
    rng, controls = random.Random(1), set(tokenizer.special.values())
    for _ in range(300):
        text = "".join(
            rng.choice(ADDED + [any_text(rng), " ", "<", "|>"]) for _ in range(rng.randrange(1, 12))
        )
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not controls & set(ids)


def test_a_prompt_has_the_control_tokens_of_its_template_whatever_the_texts_say(tokenizer):
    rng, controls = random.Random(2), set(tokenizer.special.values())

    def specials(word) -> Counter:
        turns = (
            Message("system", (word(),)),
            Message("user", (word(), Image.new("RGB", (1, 1)), word())),
            Message("assistant", (word(),), think=word()),
            Message("user", (word(),)),
            Message("assistant", (word(),)),
        )
        return Counter(i for i in tokenizer.render(turns, [3])[0] if i in controls)

    template = specials(lambda: "hello")
    assert (
        template[tokenizer.image] == 3
        and template[tokenizer.end] == 5
        and template[tokenizer.think] == 1
    )
    for _ in range(50):
        assert specials(lambda: "".join(rng.choices(ADDED, k=4))) == template


def test_training_bpe_twice_gives_the_same_merges_in_the_same_order():
    texts = world.corpus(60)
    assert list(train_bpe(texts, 330).items()) == list(train_bpe(list(texts), 330).items())
    backwards = train_bpe(texts[::-1], 330)  # ties are broken by content, not by who came first
    assert list(backwards.items()) == list(train_bpe(texts, 330).items()) and len(backwards) == 330


def test_bpe_training_stops_when_no_pair_occurs_twice():
    assert len(train_bpe(["abcd"], 400)) == 256 and len(train_bpe([], 400)) == 256
    assert list(train_bpe(["abab"], 400))[256:] == [
        b"ab"
    ]  # one merge: the pair (ab, ab) occurs once


def test_replaying_the_merges_by_hand_gives_the_encoding(tokenizer):
    """Byte-pair encoding as a definition: inside each word, join the neighbours of lowest rank
    until none is left."""
    import regex

    from tokenizer import SPLIT

    def by_hand(word: str) -> list[int]:
        parts = [bytes([b]) for b in word.encode()]
        while True:
            pairs = [tokenizer.ranks.get(a + b, 10**9) for a, b in zip(parts, parts[1:])]
            if min(pairs, default=10**9) == 10**9:
                return [tokenizer.ranks[p] for p in parts]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]

    rng = random.Random(3)
    texts = world.corpus(40, seed=9) + [any_text(rng) for _ in range(100)]
    assert any(
        len(tokenizer.encode(t)) < len(t.encode()) / 2 for t in texts
    )  # merges are used at all
    for text in texts:
        assert tokenizer.encode(text) == [
            i for word in regex.findall(SPLIT, text) for i in by_hand(word)
        ]


def gpt2_printable() -> dict[int, str]:
    """GPT-2's published byte alphabet, written down again: what prints stands for itself, the rest
    starts at U+0100."""
    prints = [b for b in range(256) if 0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b]
    rest = [b for b in range(256) if b not in prints]
    return {b: chr(b) for b in prints} | {b: chr(0x100 + i) for i, b in enumerate(rest)}


@pytest.mark.parametrize("form", ["ours", "vocab.json", "tokenizer.json"])
def test_a_tokenizer_read_from_disk_encodes_as_the_one_written(tokenizer, tmp_path, form):
    shown = gpt2_printable()
    assert shown[ord(" ")] == "Ġ" and shown[ord("\n")] == "Ċ"
    vocabulary = {"".join(shown[b] for b in token): rank for token, rank in tokenizer.ranks.items()}
    original = Tokenizer(tokenizer.ranks, "你是 a system\n", "think!")
    if form == "ours":
        original.save(tmp_path)
    else:
        template = {"system": original.system, "think_prompt": original.think_prompt}
        (tmp_path / "template.json").write_text(json.dumps(template))
        whole = (
            vocabulary
            if form == "vocab.json"
            else {"model": {"vocab": vocabulary}, "added_tokens": []}
        )
        (tmp_path / form).write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    read = Tokenizer.load(tmp_path)
    assert read.ranks == original.ranks and (read.system, read.think_prompt) == (
        original.system,
        original.think_prompt,
    )
    for text in ("what color is the circle?", " 你好\n\n", "\x00ÿ🙂"):
        assert read.encode(text) == original.encode(text)
    turns = (Message("user", ("q",)), Message("assistant", ("a",)))
    assert read.render(turns, []) == original.render(turns, []) and read.special == original.special


def test_a_directory_without_a_tokenizer_and_a_vocabulary_with_gaps_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer here"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="without gaps"):
        Tokenizer({bytes([b]): b + (b > 7) for b in range(256)})


# --------------------------------------------------------------------------------------- label mask


def runs(document) -> list[list[int]]:
    """The supervised labels, cut where supervision is interrupted."""
    at = np.flatnonzero(document.labels >= 0)
    return [
        document.labels[part].tolist() for part in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    ]


def chat(rng: random.Random, words: list[str]) -> Sample:
    """One to four turns of hostile text, some with pictures in front, some answers with a chain."""
    messages = [Message("system", (rng.choice(words),))] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 4)):
        picture = (Image.new("RGB", (32, 32), "red"),) if rng.random() < 0.4 else ()
        messages.append(Message("user", (*picture, rng.choice(words))))
        messages.append(
            Message(
                "assistant", (rng.choice(words),), think=rng.choice([None, None, rng.choice(words)])
            )
        )
    return Sample(tuple(messages))


def test_supervised_are_exactly_the_assistants_texts_and_their_ends_shifted_by_one(encoder):
    rng, t = random.Random(4), encoder.tokenizer
    words = [
        "yes",
        "<|im_end|>",
        "assistant\n",
        "<|im_start|>assistant\nno",
        "你好 🙂",
        " ",
        "\n\n",
        "</think>",
        "<IMG_CONTEXT>",
    ]
    for i in range(60):
        sample = chat(rng, words) if i % 2 else world.sample(i, 3, EVERY)
        d = encoder(sample)
        said = [m for m in sample.messages if m.role == "assistant"]
        chains = ["" if m.think is None else f"<think>{m.think}</think>" for m in said]
        texts = [c + "".join(m.parts) + "<|im_end|>" for c, m in zip(chains, said, strict=True)]
        assert [t.decode(r) for r in runs(d)] == texts
        assert all(r[-1] == t.end for r in runs(d))
        at = np.flatnonzero(d.labels >= 0)
        assert (d.labels[at] == d.ids[at + 1]).all() and d.labels[-1] == -100
        assert (d.labels[d.labels < 0] == -100).all()


def test_a_chain_is_rendered_between_the_think_ids_and_words_cannot_forge_them(encoder):
    t = encoder.tokenizer
    asked = with_thinking(world.sample(0, 0, {"arithmetic": 1.0}, turns=1), t.think_prompt)
    chain, answer = asked.messages[-1].think, asked.messages[-1].parts[0]
    assert chain and encoder(asked).ids.tolist().count(t.think) == 1
    assert runs(encoder(asked)) == [
        [t.think] + t.encode(chain) + [t.unthink] + t.encode(answer) + [t.end]
    ]
    forged = Sample(
        (Message("user", ("q",)), Message("assistant", (f"<think>{chain}</think>{answer}",)))
    )
    assert t.think not in encoder(forged).ids and t.unthink not in encoder(forged).ids


def test_an_answer_that_is_not_to_be_learned_is_not_supervised(encoder):
    first = Message("assistant", ("first",), learn=False)
    sample = Sample(
        (Message("user", ("a",)), first, Message("user", ("b",)), Message("assistant", ("second",)))
    )
    assert [encoder.tokenizer.decode(r) for r in runs(encoder(sample))] == ["second<|im_end|>"]


def test_supervising_everything_leaves_out_only_the_pictures_and_the_first_token(tokenizer, config):
    d = Encoder(tokenizer, config, everything=True)(world.sample(1, 0, {"video": 1.0}))
    picture = np.isin(d.ids, [tokenizer.special[n] for n in ("<img>", "</img>", "<IMG_CONTEXT>")])
    assert picture.any() and ((d.labels[:-1] >= 0) == ~picture[1:]).all() and d.labels[-1] == -100


def test_a_prompt_is_the_document_up_to_the_last_assistants_opening(encoder):
    for i in range(20):
        sample = world.sample(i, 5, EVERY)
        prompt, arrays = encoder.prompt(sample)
        d, n = encoder(sample), len(prompt)
        assert d.ids[:n].tolist() == prompt and d.ids[n:].tolist() == runs(d)[-1]
        assert all((a == b).all() for a, b in zip(arrays, d.images, strict=True))


def test_a_document_that_is_too_long_or_teaches_nothing_is_a_fault_with_its_origin(
    tokenizer, config
):
    short = Encoder(tokenizer, config, max_length=20)
    with pytest.raises(BadSample, match="too long: here:1") as e:
        short(
            Sample((Message("user", ("q " * 30,)), Message("assistant", ("a",))), origin="here:1")
        )
    assert e.value.reason == "too long"
    with pytest.raises(BadSample, match="nothing to learn: here:2"):
        short(Sample((Message("user", ("q",)),), origin="here:2"))


# -------------------------------------------------------------------------------------------- world


def test_an_index_and_a_seed_are_one_sample_with_the_same_pixels(encoder):
    for i in range(15):
        a, b = encoder(world.sample(i, 7, EVERY)), encoder(world.sample(i, 7, EVERY))
        assert a.ids.tolist() == b.ids.tolist() and a.facts == b.facts
        assert [x.tobytes() for x in a.images] == [x.tobytes() for x in b.images]
    several = {
        encoder(world.sample(i, seed, EVERY, test)).ids.tobytes()
        for i in range(9)
        for seed in (0, 1)
        for test in (False, True)
    }
    assert len(several) > 24  # index, seed and side all matter


def test_training_never_draws_what_is_held_out(monkeypatch):
    drawn, make = [], world.scene

    def recorded(kind, rng, test):
        drawn.append((kind, make(kind, rng, test)))
        return drawn[-1][1]

    monkeypatch.setattr(world, "scene", recorded)

    def contents(draw) -> Counter:
        drawn.clear()
        draw()
        return Counter((kind, repr(s.content)) for kind, s in drawn)

    train = contents(lambda: [world.sample(i, 0, EVERY) for i in range(600)] and world.corpus(200))
    families = [f for f in world.FAMILIES if f != "text"]
    held = contents(lambda: [world.World().held_out(f, 40) for f in families])
    assert len(train) > 400 and len(held) > 100 and not train.keys() & held.keys()
    assert {k for k, _ in train} == {k for k, _ in held} == set(world.KINDS)
    crowded = [world.held_out((kind, i)) for kind in world.KINDS for i in range(400)]
    assert 0.08 < sum(crowded) / len(crowded) < 0.17  # a small share of every kind


def facts_of(family: str, n: int = 150) -> list[tuple[Sample, str]]:
    if family not in world.FAMILIES:
        pytest.skip(f"the world no longer asks about {family}")
    samples = [world.sample(i, 11, {family: 1.0}, turns=1) for i in range(n)]
    return [(s, s.messages[0].parts[-1].strip()) for s in samples]


def test_every_equation_in_a_chain_holds_and_ends_in_the_answer():
    equations = 0
    for family in ("counting", "charts", "arithmetic"):
        for s, _ in facts_of(family):
            for left, right in re.findall(r"(\d+(?: [+-] \d+)+) = (-?\d+)", s.facts["chain"]):
                total = sum(int(n) for n in re.sub(r"([+-]) ", r"\1", left).split())
                assert total == int(right) == int(s.facts["answer"])
                equations += 1
    assert equations > 100


def test_a_count_is_the_number_of_things_in_the_scene():
    for s, _ in facts_of("counting"):
        words = s.facts["words"]
        stated = int(words.split()[-1]) if words.split()[-1].isdigit() else len(words.split(", "))
        assert s.facts["answer"] == str(stated)


def test_a_chart_answer_follows_from_its_bars_and_the_bars_are_the_pictures():
    asked = Counter()
    for s, question in facts_of("charts"):
        bars = {
            color: int(height)
            for color, height in (bar.split() for bar in s.facts["words"].split(", "))
        }
        pixels = np.asarray(s.messages[0].parts[0]).reshape(-1, 3)
        areas = {c: int((pixels == world.COLORS[c]).all(1).sum()) for c in bars}
        assert (
            sorted(bars, key=bars.get) == sorted(areas, key=areas.get) and min(areas.values()) > 0
        )
        named = [c for c in bars if c in question.split()]
        ends = {"highest": max(areas, key=areas.get), "lowest": min(areas, key=areas.get)}
        kind = next((k for k in ends if k in question), "value")
        asked[kind] += 1
        about = named[0] if kind == "value" else ends[kind]
        assert s.facts["answer"] == f"{about} {bars[about]}"
    assert min(asked[k] for k in ("highest", "lowest", "value")) > 10


def test_the_odd_one_out_is_the_only_one_of_its_look():
    for s, _ in facts_of("odd"):
        looks = {
            place: (color, shape)
            for place, color, shape in (p.split() for p in s.facts["words"].split(", "))
        }
        alone = [place for place, look in looks.items() if list(looks.values()).count(look) == 1]
        assert alone == [s.facts["answer"]] and len(looks) > 2


def test_text_samples_say_in_words_what_the_picture_would_show():
    for i in range(30):
        s = world.sample(i, 2, EVERY | {"text": 1.0})
        assert s.task == "text" and all(isinstance(p, str) for m in s.messages for p in m.parts)
        assert s.facts["words"] in s.messages[0].parts[0]


# ------------------------------------------------------------------------------------- broken files


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


def png(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    """A PNG by hand, so that a header can promise what no test should hold in memory."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def record(question: str, answer: str, image=None, **more) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return ({} if image is None else {"image": image}) | {"conversations": turns} | more


GOOD = [
    record("<image>\nwhat?", "a", "good.jpg"),
    record("and this?", "b", "good.png"),
    record("no picture", "c"),
    record("<image> or <image>?", "d", ["good.png", "sub/good.jpg"]),
    record("<image>", "e", ["good.png"]),
    record("think", "<think>hm</think>f"),
    record("from inside", "g", "sub/../good.png"),
]
BAD = [
    (reason, r)
    for reason, records in {
        "unreadable image": [
            record("<image>", "x", name)
            for name in ("half.jpg", "two.jpg", "empty.png", "text.png")
        ],
        "missing image": [record("<image>", "x", name) for name in ("gone.jpg", "sub")],
        "path outside the image folder": [
            record("<image>", "x", name)
            for name in ("../outside.png", "/etc/hostname", "link.png", "sub/../../outside.png")
        ],
        "oversized image": [
            record("<image>", "x", name) for name in ("thin.png", "wide.png", "bomb.png")
        ],
        "wrong placeholder count": [
            record("<image>", "x"),
            record("<image>", "x", []),
            record("<image><image>", "x", "good.png"),
            record("no mark", "x", ["good.png", "good.png"]),
        ],
        "empty answer": [record("q", ""), record("q", " \n"), record("<image>", "", "good.png")],
        "no answer": [{"conversations": [{"from": "human", "value": "alone"}]}],
        "malformed record": [
            {"image": "good.png"},
            {"conversations": [{"from": "alien", "value": "x"}]},
            [],
            7,
            None,
            record("q", None),
            record(None, "x"),
            record("\ud800", "x"),
            record("q", "x", 3),
        ],
        "too long": [record("q " * 2000, "x")],
    }.items()
    for r in records
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures for GOOD and BAD, inside a folder that has a neighbour to escape to."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    noise(40, 30).save(tmp_path / "outside.png")
    noise(40, 30).save(root / "good.png")
    noise(40, 30).save(root / "good.jpg")
    noise(64, 64).save(root / "sub" / "good.jpg")
    whole = (root / "good.jpg").read_bytes()
    (root / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "two.jpg").write_bytes(whole[:-2])
    (root / "empty.png").write_bytes(b"")
    (root / "text.png").write_bytes(b"<svg/>")
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    Image.new("RGB", (1, 5000)).save(root / "thin.png")
    Image.new("RGB", (5000, 1)).save(root / "wide.png")
    (root / "bomb.png").write_bytes(png(9000, 8000, 8, 2, b""))  # 72 million pixels promised
    return root


def lines(records) -> str:
    return "\n".join(json.dumps(r) for r in records)


def test_each_fault_is_counted_under_its_reason_and_every_good_sample_arrives(
    folder, tokenizer, config
):
    mixed = [r for _, r in BAD]
    for i, good in enumerate(GOOD):
        mixed.insert(4 * i, good)
    no_json = "\n{broken\n\n" + "[" * 100_000 + "\n\x00\n"
    (folder.parent / "my.jsonl").write_text(lines(mixed) + no_json + lines(GOOD[:1]))
    source = Folder(folder.parent / "my.jsonl", folder)
    encoder = Encoder(tokenizer, config, source.root, max_length=512)
    arrived = list(Documents(iter(source.first()), encoder, source.faults))
    assert source.faults.counts == Counter(reason for reason, _ in BAD) + Counter(
        {"malformed record": 3}
    )
    answers = [tokenizer.decode(runs(d)[-1][:-1]) for d in arrived]
    assert answers == ["a", "b", "c", "d", "e", "<think>hm</think>f", "g", "a"]
    assert [len(d.images) for d in arrived] == [1, 1, 0, 2, 1, 0, 1, 1]
    assert arrived[0].origin == "my.jsonl:1" and arrived[1].origin == "my.jsonl:5"
    for (
        reason,
        n,
    ) in source.faults.counts.items():  # the report has one line a reason, with a place to look at
        assert re.search(
            rf"skipped {n} x {reason}; first: {reason}: my.jsonl:\d+", source.faults.report()
        )


def test_a_lone_picture_without_a_mark_comes_before_the_question(folder):
    (folder.parent / "my.jsonl").write_text(lines([GOOD[1], GOOD[0]]))
    without, marked = (
        s.messages[0].parts for s in Folder(folder.parent / "my.jsonl", folder).first()
    )
    assert [type(p) for p in without] == [type(p) for p in marked]
    assert (without[1], marked[1]) == ("\nand this?", "\nwhat?")


def test_a_chain_in_a_record_becomes_think_ids(folder, tokenizer, config):
    (folder.parent / "my.jsonl").write_text(lines([GOOD[5]]))
    d = Encoder(tokenizer, config)(Folder(folder.parent / "my.jsonl").first()[0])
    chain, answer = tokenizer.encode("hm"), tokenizer.encode("f")
    assert runs(d) == [[tokenizer.think] + chain + [tokenizer.unthink] + answer + [tokenizer.end]]


def test_a_json_list_and_json_lines_are_read_alike(folder):
    spread = "\n  " + json.dumps(GOOD + [BAD[-2][1]], indent=2)
    (folder.parent / "my.json").write_text(spread)
    (folder.parent / "my.jsonl").write_text(
        "\n" + lines(GOOD + [BAD[-2][1]]).replace("\n", "\r\n\r\n")
    )
    a, b = (Folder(folder.parent / name, folder) for name in ("my.json", "my.jsonl"))
    assert [(s.messages, s.task, s.facts) for s in a.first()] == [
        (s.messages, s.task, s.facts) for s in b.first()
    ]
    assert len(a.first()) == len(GOOD) and a.faults.counts == b.faults.counts == {
        "malformed record": 1
    }


def test_strict_makes_the_first_fault_an_error(folder, tokenizer, config):
    (folder.parent / "record.jsonl").write_text(lines([GOOD[0], record("q", "")]))
    with pytest.raises(BadSample, match="empty answer: record.jsonl:2"):
        Folder(folder.parent / "record.jsonl", folder, strict=True)
    (folder.parent / "image.jsonl").write_text(
        lines([GOOD[0], record("<image>", "x", "gone.jpg"), GOOD[1]])
    )
    source = Folder(folder.parent / "image.jsonl", folder, strict=True)
    stream = iter(
        Documents(iter(source.first()), Encoder(tokenizer, config, source.root), source.faults)
    )
    assert next(stream).origin == "image.jsonl:1"
    with pytest.raises(BadSample, match="missing image: image.jsonl:2"):
        next(stream)


def test_nothing_usable_is_an_error_that_says_why(folder, tokenizer, config):
    (folder.parent / "bad.jsonl").write_text(lines([record("q", "")] * 3))
    with pytest.raises(ValueError, match="0 usable samples\n.*3 x empty answer"):
        Folder(folder.parent / "bad.jsonl", folder)
    (folder.parent / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match="0 usable samples"):
        Folder(folder.parent / "none.jsonl", folder)
    with pytest.raises(ValueError, match="no such file"):
        Folder(folder.parent / "not there.jsonl", folder)
    (folder.parent / "cut.json").write_text(json.dumps(GOOD)[:-5])
    with pytest.raises(ValueError, match="not a JSON list"):
        Folder(folder.parent / "cut.json", folder)
    (folder.parent / "image.jsonl").write_text(
        lines([record("<image>", "x", "gone.jpg")])
    )  # endless, all of it bad
    source = Folder(folder.parent / "image.jsonl", folder)
    with pytest.raises(ValueError, match="7 samples in a row(.|\n)*7 x missing image"):
        next(
            iter(
                Documents(
                    source.stream({}, 0),
                    Encoder(tokenizer, config, source.root),
                    source.faults,
                    patience=7,
                )
            )
        )


def test_a_good_sample_makes_the_reader_patient_again(encoder):
    good = Sample((Message("user", ("q",)), Message("assistant", ("a",))))
    bad, faults = Sample((Message("user", ("q",)),)), Faults()
    assert len(list(Documents(iter([bad, bad, good] * 5), encoder, faults, patience=3))) == 5
    assert faults.counts == {"nothing to learn": 10}


def test_an_epoch_gives_every_sample_once_in_an_order_of_the_seed(folder):
    rows = [record(f"q{i}", f"a{i}", task="xy"[i % 2]) for i in range(10)]
    (folder.parent / "my.jsonl").write_text(lines(rows))
    source = Folder(folder.parent / "my.jsonl", folder)

    def take(n, mixture, seed):
        return [s.messages[1].parts[0] for s, _ in zip(source.stream(mixture, seed), range(n))]

    odd = {f"a{i}" for i in range(1, 10, 2)}
    epochs = take(10, {"y": 1.0, "elsewhere": 5.0}, 0)
    assert set(epochs[:5]) == set(epochs[5:]) == odd and epochs[:5] != epochs[5:]
    assert take(30, {}, 0) == take(30, {}, 0) != take(30, {}, 1)
    share = sum(a in odd for a in take(2000, {"x": 1.0, "y": 3.0}, 0)) / 2000
    assert abs(share - 0.75) < 0.04


# ----------------------------------------------------------------------------------------- pictures


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height", [(9000, 8000), (12000, 9000), (65000, 65000)])
def test_a_decompression_bomb_is_refused_by_its_header_alone(tmp_path, monkeypatch, width, height):
    (tmp_path / "bomb.png").write_bytes(png(width, height, 8, 2, b""))
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were asked for")
    )
    with pytest.raises(BadSample, match="image"):
        open_image("bomb.png", tmp_path)


@pytest.mark.parametrize("kind, pixel", [("L", 1), ("RGB", 3)])
def test_sixteen_bit_pictures_are_scaled_and_not_saturated(tmp_path, kind, pixel):
    values = [0, 255, 256, 0x1234, 0x8000, 0xFF00, 0xFFFF]
    row = b"".join(struct.pack(">H", v) * pixel for v in values)
    (tmp_path / "deep.png").write_bytes(
        png(len(values), 1, 16, {"L": 0, "RGB": 2}[kind], b"\0" + row)
    )
    seen = np.asarray(open_image("deep.png", tmp_path))
    assert (
        seen.shape == (1, 7, 3) and (seen[0] == np.array([v >> 8 for v in values])[:, None]).all()
    )


def test_what_is_transparent_becomes_white_and_what_is_half_becomes_half(tmp_path):
    for name, alpha, rest in (("clear", 0, 255), ("half", 128, 127), ("solid", 255, 0)):
        Image.new("RGBA", (3, 3), (255, 0, 0, alpha)).save(tmp_path / f"{name}.png")
        Image.new("RGBA", (3, 3), (255, 0, 0, alpha)).save(
            tmp_path / f"{name}.webp", lossless=True, exact=True
        )
        for kind in ("png", "webp"):
            seen = open_image(f"{name}.{kind}", tmp_path).getpixel((1, 1))
            assert max(abs(a - b) for a, b in zip(seen, (255, rest, rest))) <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.gif", transparency=0)
    seen = open_image("palette.gif", tmp_path)
    assert (seen.getpixel((0, 0)), seen.getpixel((1, 0))) == ((255, 255, 255), (0, 0, 255))


@pytest.mark.parametrize(
    "orientation, corner",
    [(1, "top left"), (3, "bottom right"), (6, "top right"), (8, "bottom left")],
)
def test_a_photograph_is_turned_as_its_exif_says(tmp_path, orientation, corner):
    """The one red quarter of a 48 x 32 picture moves to the corner that the orientation sends the
    top left to."""
    image, exif = Image.new("RGB", (48, 32), "white"), Image.Exif()
    image.paste((255, 0, 0), (0, 0, 24, 16))
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    seen = np.asarray(open_image("turned.jpg", tmp_path)).astype(int)
    assert seen.shape == ((48, 32, 3) if orientation in (6, 8) else (32, 48, 3))
    h, w = seen.shape[0] // 2, seen.shape[1] // 2
    red = {
        f"{a} {b}": seen[i * h : (i + 1) * h, j * w : (j + 1) * w, 1].mean() < 60
        for i, a in enumerate(("top", "bottom"))
        for j, b in enumerate(("left", "right"))
    }
    assert [k for k, v in red.items() if v] == [corner]


def test_every_mode_arrives_as_rgb_of_its_size(tmp_path):
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"):
        assert open_image(Image.new(mode, (5, 4))).mode == "RGB" and open_image(
            Image.new(mode, (5, 4))
        ).size == (5, 4)
    Image.new("CMYK", (5, 4)).save(tmp_path / "print.jpg")
    assert open_image("print.jpg", tmp_path).getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_damage_to_a_file_is_a_picture_or_a_fault_and_nothing_else(tmp_path):
    rng, whole = random.Random(0), {}
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "hello", 1.5
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        buffer = io.BytesIO()
        noise(20, 16).save(
            buffer, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {})
        )
        whole[kind] = buffer.getvalue()
    seen = Counter()
    for _ in range(500):
        data = bytearray(whole[rng.choice(list(whole))])
        for _ in range(rng.choice((1, 2, 5))):
            data[rng.randrange(min(len(data), rng.choice((60, 200, 10**6))))] = rng.randrange(256)
        (tmp_path / "damaged").write_bytes(
            data[: rng.randrange(1, len(data))] if rng.random() < 0.2 else data
        )
        try:
            assert open_image("damaged", tmp_path).mode == "RGB"
            seen["fine"] += 1
        except BadSample as e:
            seen[e.reason] += 1
    assert seen["fine"] > 25 and seen["unreadable image"] > 50


# -------------------------------------------------------- rarer ways in which a record can be wrong


def read_one(folder, r) -> tuple[int, Faults]:
    (folder.parent / "my.jsonl").write_text(lines([GOOD[2], r]))
    source = Folder(folder.parent / "my.jsonl", folder)
    return len(source.first()), source.faults


def test_a_picture_that_no_user_asks_about_costs_only_its_record(folder):
    usable, faults = read_one(
        folder, {"image": "good.png", "conversations": [{"from": "gpt", "value": "a caption"}]}
    )
    assert usable == 1 and faults.counts.total() == 1


@pytest.mark.parametrize(
    "name",
    ["nul\0.png", "x" * 300 + ".png", "\ud800.png", "loop.png"],
    ids=["nul", "long", "surrogate", "loop"],
)
def test_a_path_that_no_file_system_takes_costs_only_its_record(folder, tokenizer, config, name):
    (folder / "loop.png").symlink_to("loop.png")
    (folder.parent / "my.jsonl").write_text(lines([GOOD[2], record("<image>", "x", name)]))
    source = Folder(folder.parent / "my.jsonl", folder)
    found = Documents(iter(source.first()), Encoder(tokenizer, config, source.root), source.faults)
    assert len(list(found)) == 1 and source.faults.counts.total() == 1


@pytest.mark.parametrize("more", [{"task": ["a"]}, {"facts": None}, {"facts": ["x"]}], ids=str)
def test_a_label_of_the_wrong_type_costs_only_its_record(folder, more):
    usable, faults = read_one(folder, record("q", "a", **more))
    assert usable == 1 and faults.counts == {"malformed record": 1}


def test_a_byte_order_mark_does_not_make_a_list_unreadable(folder):
    (folder.parent / "my.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(Folder(folder.parent / "my.json", folder).first()) == len(GOOD)


def test_a_request_to_think_keeps_a_picture_that_ends_the_question(folder):
    (folder.parent / "my.jsonl").write_text(lines([record("what?\n<image>", "a", "good.png")]))
    asked = with_thinking(
        Folder(folder.parent / "my.jsonl", folder).first()[0], "think first."
    ).messages[0]
    assert (
        sum(not isinstance(p, str) for p in asked.parts) == 1 and "think first." in asked.parts[-1]
    )


def test_the_truth_of_a_record_with_a_chain_is_the_answer_after_it(folder):
    (folder.parent / "my.jsonl").write_text(lines([GOOD[5]]))
    assert Folder(folder.parent / "my.jsonl").first()[0].facts["answer"] == "f"


def test_a_chain_that_is_not_to_be_learned_is_not_supervised(encoder):
    first = Message("assistant", ("first",), think="chain", learn=False)
    sample = Sample(
        (Message("user", ("a",)), first, Message("user", ("b",)), Message("assistant", ("second",)))
    )
    assert [encoder.tokenizer.decode(r) for r in runs(encoder(sample))] == ["second<|im_end|>"]


# ------------------------------------------------------------------------------- question and truth


def talk(*turns, **more) -> Sample:
    """(role, text) or (role, text, chain) turns as a sample."""
    messages = tuple(Message(t[0], (t[1],), think=t[2] if len(t) > 2 else None) for t in turns)
    return Sample(messages, origin="here:1", **more)


U, A = "user", "assistant"


@pytest.mark.parametrize(
    "sample, truth, chain, answer",
    [
        # the world's: facts, and a plain answer
        (talk((U, "q"), (A, "5"), facts={"answer": "5", "chain": "c"}), "5", "c", r"\boxed{5}"),
        # <think>c</think>\boxed{5}, with and without facts that a reader made of its text
        (talk((U, "q"), (A, r"\boxed{5}", "c")), "5", "c", r"\boxed{5}"),
        (
            talk((U, "q"), (A, r"\boxed{5}", "c"), facts={"answer": r"\boxed{5}"}),
            "5",
            "c",
            r"\boxed{5}",
        ),
        # words around the box stay
        (talk((U, "q"), (A, r"It is \boxed{5}.", "c")), "5", "c", r"It is \boxed{5}."),
        (talk((U, "q"), (A, "5", "c")), "5", "c", r"\boxed{5}"),
        # the chain of the turn itself comes before that of the facts
        (talk((U, "q"), (A, "5", "own"), facts={"chain": "other"}), "5", "own", r"\boxed{5}"),
        # no chain at all
        (talk((U, "q"), (A, r"\frac{1}{2}")), r"\frac{1}{2}", "", r"\boxed{\frac{1}{2}}"),
        # a truth that is a number, none, or one of several
        (talk((U, "q"), (A, "five"), facts={"answer": 5}), "5", "", r"\boxed{5}"),
        (talk((U, "q"), (A, "five"), facts={"answer": None}), "five", "", r"\boxed{five}"),
        (
            talk((U, "q"), (A, "x"), facts={"answer": ["A", r"\boxed{B}", None]}),
            ["A", "B"],
            "",
            r"\boxed{A}",
        ),
        # nobody answered, but the truth is known
        (talk((U, "q"), facts={"answer": "5"}), "5", "", r"\boxed{5}"),
    ],
)
def test_truth_chain_and_the_thinking_question_of_every_kind_of_sample(
    sample, truth, chain, answer, encoder
):
    assert truth_of(sample) == truth and chain_of(sample) == chain
    asked = with_thinking(sample, "think!")
    user, last = asked.messages
    assert user.parts == ("q think!",) and last.parts == (answer,) and last.think == chain
    assert asked.facts["answer"] == truth and asked.facts.get("chain", "") == chain
    assert truth_of(asked) == truth and chain_of(asked) == chain
    # once more changes the prompt alone: the box is not boxed again
    assert with_thinking(asked, "now!").messages[1] == last
    t = encoder.tokenizer
    want = [t.think, *t.encode(chain), t.unthink, *t.encode(answer), t.end]
    assert runs(encoder(asked)) == [want]


def test_what_follows_the_last_answer_is_not_asked(encoder):
    """Two users in a row, an assistant first, a user last: the truth is the last assistant turn."""
    for turns in (
        [(U, "q"), (A, "5"), (U, "thanks!")],
        [(A, "hello"), (U, "q"), (A, "5"), (U, "and"), (U, "why?")],
        [(U, "look"), (U, "q"), (A, "5")],
        [("system", "be brief"), (U, "q"), (A, "5")],
    ):
        sample = talk(*turns)
        at = turns.index((A, "5"))
        assert truth_of(sample) == "5"
        asked = with_thinking(sample, "think!").messages
        assert [m.parts[0] for m in asked[:-2]] == [text for _, text in turns[: at - 1]]
        assert (asked[-2].parts, asked[-1].parts) == (("q think!",), (r"\boxed{5}",))
        before = talk(*turns[:at])
        assert encoder.prompt(sample)[0] == encoder.prompt(before, reply=True)[0]
        assert encoder.prompt(sample, reply=True)[0][:-3] != encoder.prompt(sample)[0][:-3]


@pytest.mark.parametrize(
    "sample, reason",
    [
        (talk((A, "a caption")), "no question"),
        (talk(("system", "s"), (A, "a caption")), "no question"),
        (talk((U, "q")), "no truth"),
        (talk((U, "q"), (A, " ")), "no truth"),
        (talk((U, "q"), (A, "5"), facts={"answer": []}), "no truth"),
        (talk((U, "q"), (A, "5"), facts={"answer": "  "}), "no truth"),
    ],
)
def test_no_question_or_no_truth_is_a_fault_that_names_the_sample(sample, reason):
    with pytest.raises(BadSample, match=f"{reason}: here:1") as e:
        with_thinking(sample, "think!")
    assert e.value.reason == reason


def test_a_prompt_without_a_question_is_a_fault(encoder):
    with pytest.raises(BadSample, match="no question: here:1"):
        encoder.prompt(talk((A, "a caption")))


def test_a_box_of_the_data_keeps_its_picture_and_is_asked_with_the_think_prompt(folder, tokenizer):
    """A LLaVA row with a chain and a box, read from disk: what long-CoT, RL and evaluation all
    ask."""
    row = record("<image>\nhow many?", r"<think>one, two.</think>\boxed{2}", "good.png")
    (folder.parent / "my.jsonl").write_text(lines([row]))
    sample = Folder(folder.parent / "my.jsonl", folder).first()[0]
    asked = with_thinking(sample, "think!")
    assert truth_of(sample) == "2" and chain_of(sample).strip() == "one, two."
    assert asked.messages[0].parts[1] == "\nhow many? think!"
    assert asked.messages[1].parts == (r"\boxed{2}",) and "one, two." in asked.messages[1].think


# --------------------------------------------------------------------------------------- the limits


def test_an_encoder_has_no_limit_of_its_own_and_a_stage_gives_its_rows(tokenizer, config):
    """A stage of 16,384 or 20,480 tokens must not lose its long samples to a default."""
    long = Sample((Message("user", ("q",)), Message("assistant", ("word " * 20_000,))))
    encoder = Encoder(tokenizer, config)
    assert len(encoder(long)) > 20_480
    with pytest.raises(BadSample, match="too long: .*the limit is 20480"):
        Encoder(tokenizer, config, max_length=20_480)(long)
    documents = Documents([long, long], Encoder(tokenizer, config, max_length=20_480))
    assert list(documents) == [] and documents.faults.counts == {"too long": 2}


def test_an_unknown_weighting_or_rule_for_long_samples_is_an_error(tokenizer, config):
    with pytest.raises(ValueError, match="--weighting 'words': choose from token, sequence"):
        Encoder(tokenizer, config, weighting="words")
    with pytest.raises(ValueError, match="--long 'cut': choose drop or truncate"):
        Encoder(tokenizer, config, long="cut")
