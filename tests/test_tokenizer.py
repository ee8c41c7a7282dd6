"""The tokenizer against the `tokenizers` library, on a published file written here from the toy's
ranks."""

import json
import re
import unicodedata

import pytest
import tokenizers

import tokenizer as ours
from tokenizer import LONG, SPLIT, Compare, Tokenizer, main, mixed_texts


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory):
    """tokenizer.json as Qwen publishes it: the merges are read off the ranks, each token from its
    two last parts."""
    shown, merges = ours._printable(), []
    word = lambda token: "".join(shown[b] for b in token)
    for token in sorted((t for t in tokenizer.ranks if len(t) > 1), key=tokenizer.ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            ranks = [tokenizer.ranks.get(a + b, 10**9) for a, b in zip(parts, parts[1:])]
            at = ranks.index(min(ranks))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append((word(parts[0]), word(parts[1])))
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE({word(t): i for t, i in tokenizer.ranks.items()}, merges)
    )
    library.normalizer = tokenizers.normalizers.NFC()
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    directory = tmp_path_factory.mktemp("published")
    library.save(str(directory / "tokenizer.json"))
    return directory


def test_ids_are_those_of_the_tokenizers_library_and_the_command_says_so(published, capsys):
    assert main(Compare(published, 30_000)) == 0
    tokens, texts, same = map(
        int, re.match(r"(\d+) tokens in (\d+) texts: (\d+) ", capsys.readouterr().out).groups()
    )
    assert tokens >= 30_000 and texts == same >= 8


def test_the_command_fails_and_shows_the_text_when_an_id_differs(published, tmp_path, capsys):
    file = json.loads((published / "tokenizer.json").read_text())
    file["normalizer"] = {"type": "NFD"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert main(Compare(tmp_path, 30_000)) == 1
    assert "differs: " in capsys.readouterr().out


def test_a_published_tokenizer_composes_characters_and_ours_does_not(
    published, tokenizer, tmp_path
):
    read = Tokenizer.load(published)
    apart = "e\u0301 ≠ \u1100\u1161"
    assert read.decode(read.encode(apart)) == unicodedata.normalize("NFC", apart) != apart
    assert tokenizer.decode(tokenizer.encode(apart)) == apart
    for t in (read, tokenizer):
        t.save(tmp_path)
        assert Tokenizer.load(tmp_path).nfc == t.nfc


@pytest.mark.parametrize("run", [" ", "\t ", "\n", "\u3000"])
def test_a_very_long_run_of_white_space_is_encoded_as_a_short_one_is(tokenizer, run, monkeypatch):
    text = "a" + run * 3000 + "b " + run * 3000
    short = tokenizer.encode(text)
    monkeypatch.setattr(ours, "LONG", 1000)
    assert tokenizer.encode(text) == short
    monkeypatch.undo()
    assert (
        tokenizer.decode(tokenizer.encode("a" + run * 1_100_000 + "b"))
        == "a" + run * 1_100_000 + "b"
    )
    assert len(run * 1_100_000) > LONG


def test_mixed_texts_hold_every_kind(tokenizer):
    texts = mixed_texts(tokenizer)
    joined = "".join(next(texts) for _ in range(16))
    for kind in ("import ", "你", "\U0001f3fd", "\ufffd", "\t\t", "\n"):
        assert kind in joined, kind
    assert re.search(r"\d{15}", joined) and re.search(r"\s{40}", joined)


def test_streamed_pieces_are_whole_characters_and_join_to_the_decoded_text(tokenizer):
    for text in ("你好 👩‍👩‍👧🏽 café", "plain", ""):
        ids = tokenizer.encode(text) + [tokenizer.end, len(tokenizer) + 5]
        pieces = list(tokenizer.stream(iter(ids)))
        assert "".join(pieces) == tokenizer.decode(ids) == text + "<|im_end|>"
        assert not any("\ufffd" in piece for piece in pieces)
    cut = tokenizer.encode("好")[:-1]  # a character that never becomes whole
    assert len(cut) and "".join(tokenizer.stream(cut)) == tokenizer.decode(cut) == "\ufffd"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        "{}",
        '{"model": {"vocab": {"a": 0, "b": 2}}}',
        '{"model": {"vocab": ["a"]}}',
        '{"model": {"vocab": {"\\u2603": 0}}}',
    ],
)
def test_a_file_that_is_no_vocabulary_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json: not a byte-level BPE vocabulary"):
        Tokenizer.load(tmp_path)


def test_added_tokens_with_other_ids_are_refused(published, tokenizer, tmp_path):
    file = json.loads((published / "tokenizer.json").read_text())
    file["added_tokens"] = [
        {"id": tokenizer.end, "content": "<|im_end|>"},
        {"id": tokenizer.image, "content": "<fim>"},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match="<fim>"):
        Tokenizer.load(tmp_path)
    file["added_tokens"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert Tokenizer.load(tmp_path).ranks == tokenizer.ranks


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"nfc": "yes"}',
        '{"system": 3}',
        '{"pattern": "."}',
        '{"nfc": true, "nfc": false}',
    ],
)
def test_a_template_that_is_not_ours_is_an_error_that_names_it(tokenizer, content, tmp_path):
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).system == tokenizer.system
    (tmp_path / "template.json").write_text(content)
    with pytest.raises(ValueError, match="template.json: "):
        Tokenizer.load(tmp_path)
