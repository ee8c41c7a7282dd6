"""The tokenizer against the `tokenizers` library, on a published file written here from the toy's
ranks."""

import json
import re
import unicodedata

import pytest
import tokenizers

import tokenizer as ours
from data.sample import Message
from infra.hub import merges_of, printable_bytes
from tokenizer import (
    LONG,
    SPLIT,
    Tokenizer,
    TokenizerOptions,
    compare_tokenizers,
    mixed_texts,
)


@pytest.fixture(scope="module")
def published(tokenizer, tmp_path_factory):
    """tokenizer.json as Qwen publishes it: the merges are read off the ranks, each token from its
    two last parts."""
    shown, merges = printable_bytes(), []

    def word(token: bytes) -> str:
        return "".join(shown[b] for b in token)

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
    assert compare_tokenizers(TokenizerOptions(published, 30_000)) == 0
    tokens, texts, same = map(
        int, re.match(r"(\d+) tokens in (\d+) texts: (\d+) ", capsys.readouterr().out).groups()
    )
    assert tokens >= 30_000 and texts == same >= 8


def test_the_command_fails_and_shows_the_text_when_an_id_differs(published, tmp_path, capsys):
    file = json.loads((published / "tokenizer.json").read_text())
    file["normalizer"] = {"type": "NFD"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert compare_tokenizers(TokenizerOptions(tmp_path, 30_000)) == 1
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
        pytest.param('{"model": ' + "[" * 100_000, id="nested too deeply"),
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


# ---------------------------------------------------------------- what other people's programs read

TURNS = [
    {"role": "user", "content": "hi  \n there"},
    {"role": "assistant", "content": "<think>two, three</think>five"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]},
]
MESSAGES = (
    Message("user", ("hi  \n there",)),
    Message("assistant", ("five",), think="two, three"),
    Message("user", (object(), "\nwhat?")),
)


@pytest.fixture(scope="module", params=["", "you're a\nsystem \\ 你"], ids=["bare", "system"])
def saved(request, tokenizer, tmp_path_factory):
    """A saved tokenizer (without and with NFC) and its directory."""
    directory = tmp_path_factory.mktemp("saved")
    t = Tokenizer(tokenizer.ranks, request.param, nfc=bool(request.param))
    t.save(directory)
    return t, directory


def test_a_saved_tokenizer_is_read_by_the_tokenizers_library(saved):
    t, directory = saved
    library = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert library.get_vocab_size() == len(t)
    for _, text in zip(range(16), mixed_texts(t)):
        ids = t.encode(text)
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert library.decode(ids) == t.decode(ids)
    for name, number in t.special.items():
        assert library.token_to_id(name) == number
        assert library.encode(f"a{name}b", add_special_tokens=False).ids == [
            *t.encode("a"),
            number,
            *t.encode("b"),
        ]
    chain = [t.think, *t.encode("so"), t.unthink, *t.encode("yes"), t.end]
    assert library.decode(chain, skip_special_tokens=True) == "<think>so</think>yes"


def test_a_saved_tokenizer_is_read_by_transformers_with_its_template_and_stops(saved):
    from transformers import AutoTokenizer, GenerationConfig

    t, directory = saved
    auto = AutoTokenizer.from_pretrained(directory)
    assert len(auto) == len(t) and auto.eos_token_id == t.end and auto.pad_token_id == t.pad
    for asked, turns, messages, counts in (
        (True, TURNS, MESSAGES, [1]),
        (False, TURNS[:2], MESSAGES[:2], []),
    ):
        text = auto.apply_chat_template(turns, add_generation_prompt=asked, tokenize=False)
        ids = auto(text, add_special_tokens=False)["input_ids"]
        assert ids == t.render(messages, counts, prompt_only=asked)[0]
    assert set(GenerationConfig.from_pretrained(directory).eos_token_id) == set(t.ends)


def test_a_copy_of_the_published_files_alone_is_the_same_tokenizer(saved, tmp_path):
    t, directory = saved
    (tmp_path / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes())
    read = Tokenizer.load(tmp_path)
    assert read.ranks == t.ranks and read.special == t.special and read.nfc == t.nfc


def test_merges_are_those_that_make_each_token(tokenizer):
    merges = merges_of(tokenizer.ranks)
    assert [a + b for a, b in merges] == [t for t in tokenizer.ranks if len(t) > 1]
    assert all(tokenizer.ranks[part] < tokenizer.ranks[a + b] for a, b in merges for part in (a, b))
    # a token that nothing makes has no merge: of abc, neither ab nor bc is a token
    assert merges_of({b"a": 0, b"b": 1, b"c": 2, b"abc": 3}) == []


def test_both_stop_tokens_end_an_answer(tokenizer):
    assert tokenizer.ends == (
        tokenizer.special["<|im_end|>"],
        tokenizer.special["<|endoftext|>"],
    )
    words = tokenizer.encode("five")
    for ids in (words, *(words + [end] for end in tokenizer.ends)):
        assert tokenizer.decode_answer(ids) == "five"
    assert tokenizer.decode_answer([]) == ""
    assert tokenizer.decode_answer(words + [tokenizer.think]) == "five<think>"


def test_a_rank_file_that_is_cut_short_anywhere_is_an_error_and_never_a_panic(tokenizer, tmp_path):
    """tiktoken would panic in the middle of a run for a byte that has no token."""
    tokenizer.save(tmp_path)
    for other in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / other).unlink()
    file = tmp_path / "tokenizer.tiktoken"
    whole = file.read_bytes()
    for cut in (0, 1, 382, 2000, len(whole) - 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="tokenizer.tiktoken: not a byte-level BPE vocabulary"):
            Tokenizer.load(tmp_path)
