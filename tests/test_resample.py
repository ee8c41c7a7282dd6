"""Resampling: shares follow the rule, the cap holds in every script, measures are as counted by hand."""

import json
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from curation import balance
from curation.balance import balanced, distinct, ngrams, template_share, thinned, words
from data.readers import Folder


def test_shares_follow_sizes_temperature_or_targets():
    assert balanced([100, 300]) == [0.25, 0.75]
    assert balanced([100, 400], 2.0) == pytest.approx([1 / 3, 2 / 3])  # square roots
    assert balanced([1, 10**6], 1e9) == pytest.approx([0.5, 0.5], rel=1e-6)
    assert balanced([7, 9], targets=[1.0, 3.0]) == [0.25, 0.75]
    for wrong in (
        {"temperature": 0.0},
        {"targets": [1.0]},
        {"targets": [0.0, 0.0]},
        {"targets": [2.0, -1.0]},
    ):
        with pytest.raises(ValueError, match="must be positive"):
            balanced([1, 2], **wrong)


def test_distinct_and_template_share_of_texts_counted_by_hand():
    assert ngrams("A b, A", 2) == [("a", "b"), ("b", ","), (",", "a")] and ngrams("one", 4) == [
        ("one",)
    ]
    assert distinct(["a b a b", "a b"], 1) == 2 / 6 and distinct(["a b a b", "a b"], 2) == 2 / 4
    assert template_share(["the red cat is " + w for w in "xyz"] + ["other"], top=1) == 3 / 4


PHOTO = "this is a photo of"


def test_thinning_keeps_every_text_of_its_own_and_the_cap_of_one_phrase():
    repeated = ["this is a photo of a cat"] * 500
    own = [f"w{i} x{i} y{i} z{i} v{i}" for i in range(300)]
    kept = thinned(repeated + own, cap=20)
    assert [i for i in kept if i >= 500] == list(range(500, 800))
    assert len([i for i in kept if i < 500]) == 20
    again = thinned(repeated + own, 20, seed=1)
    assert again == thinned(repeated + own, 20, seed=1) != kept


def test_a_common_opening_may_be_tolerated():
    opened = [f"{PHOTO} w{i} x{i} y{i} z{i} v{i} u{i}" for i in range(300)]
    assert len(thinned(opened, cap=20)) == 20
    assert len(thinned(opened, cap=20, tolerance=0.5)) == 300
    copies = [f"{PHOTO} a cat"] * 300
    assert len(thinned(copies, cap=20, tolerance=0.5)) == 20


ENGLISH = [f"{PHOTO} {a} {b} near the {c}" for a in "abcd" for b in "efgh" for c in "ijkl"]
CHINESE = [
    f"这张图片中有一只{a}色的{b}在{c}上" for a in "红绿蓝黑" for b in "猫狗鸟鱼" for c in "桌床车树"
]
JAPANESE = [f"この画像には{a}い{b}があります" for a in "赤青白黒" for b in "猫犬鳥魚家船"]


@pytest.mark.parametrize("texts", [ENGLISH, CHINESE, JAPANESE, ENGLISH + CHINESE])
@pytest.mark.parametrize("cap", [1, 3, 10])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_no_ngram_is_in_more_kept_texts_than_the_cap(texts, cap, n):
    texts = texts * 3
    kept = thinned(texts, cap, n, seed=5)
    held = Counter(gram for i in kept for gram in set(ngrams(texts[i], n)))
    assert 0 < len(kept) and max(held.values()) == cap

    # Nothing is left out without need: every other text holds an n-gram that is used up.
    for i in set(range(len(texts))) - set(kept):
        assert any(held[gram] >= cap for gram in ngrams(texts[i], n))


def test_words_of_scripts_without_spaces_are_characters():
    assert words("一只红色的猫，在3张桌子上。") == [
        *"一只红色的猫",
        ",",
        "在",
        "3",
        *"张桌子上",
        "。",
    ]
    assert words("ＡＩ model で猫を見る") == ["ai", "model", *"で猫を見る"]
    assert words("고양이가 있다") == ["고양이가", "있다"]
    assert words("Cafe\u0301 is") == ["café", "is"] and words("𠮷野") == ["𠮷", "野"]
    assert ngrams("红色的猫", 4) == [tuple("红色的猫")] and ngrams("", 4) == ngrams("  ", 1) == []


def test_the_measures_count_chinese_by_characters():
    assert distinct(["红的猫", "红的狗"], 1) == 4 / 6
    assert distinct(["红的猫", "红的狗"], 2) == 3 / 4
    assert template_share([f"图片中有{w}" for w in "猫狗鸟"] + ["别的"], top=1) == 3 / 4


def test_texts_without_words_repeat_nothing():
    assert thinned(["", "", " ", "a"], cap=1) == [0, 1, 2, 3]
    assert distinct([""], 2) == 0


@pytest.mark.parametrize("wrong", [{"cap": 0}, {"cap": 5, "n": 0}, {"cap": 5, "tolerance": 1.0}])
def test_thinning_that_cannot_work_is_refused(wrong):
    with pytest.raises(ValueError, match="must be positive"):
        thinned(["a"], **wrong)


def test_the_commands_balance_a_mixture_and_thin_a_file_to_readable_records(tmp_path, capsys):
    balance.write_example(balance.ExampleOptions(tmp_path / "a.jsonl", 2000))
    thin = balance.ThinOptions(tmp_path / "a.jsonl", tmp_path / "b.jsonl", cap=5)
    balance.balance(thin)
    lines = capsys.readouterr().out.splitlines()[1:4]
    before, chance, after = (line.split() for line in lines)
    for n in range(2, 6):  # distinct-1 to distinct-4
        assert float(after[n]) > float(chance[n])
    assert float(after[-1][:-1]) < 0.8 * float(chance[-1][:-1])
    assert before[1] == "2000"

    kept = Folder(tmp_path / "b.jsonl")
    was = {s.messages for s in Folder(tmp_path / "a.jsonl").first()}
    assert len(kept) == int(after[1]) < 2000 and not kept.faults.counts
    assert all(s.messages in was for s in kept.first())

    mix = {"datasets": {name: {"data": f"{name}.jsonl"} for name in "ab"}}
    (tmp_path / "mix.json").write_text(json.dumps(mix))
    options = balance.BalanceOptions(tmp_path / "mix.json", tmp_path / "new.json", 2.0)
    balance.balance(options)
    found = json.loads((tmp_path / "new.json").read_text())["datasets"]
    ratio = found["a"]["weight"] / found["b"]["weight"]
    assert ratio == pytest.approx((2000 / len(kept)) ** 0.5)
    with pytest.raises(ValueError, match="beside"):
        balance.balance(replace(options, out=tmp_path / "sub" / "new.json"))
    meta = {"m": {"annotation": "a.jsonl", "root": ""}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="no mixture file"):
        balance.balance(replace(options, mix=tmp_path / "meta.json"))


def test_pictures_of_thinned_records_are_found_and_a_broken_record_costs_itself(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "data" / "red.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red picture"}]
    rows = [json.dumps({"image": "red.png", "conversations": turns})] * 4 + ["{}"]
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(rows))
    options = balance.ThinOptions(
        tmp_path / "data" / "a.jsonl", tmp_path / "out" / "b.jsonl", cap=3
    )
    balance.balance(options)
    printed = capsys.readouterr().out
    assert "wrote 3 rows" in printed and "1 x malformed record" in printed
    for sample in Folder(tmp_path / "out" / "b.jsonl").first():
        assert (sample.root / sample.messages[0].parts[0]).is_file()
