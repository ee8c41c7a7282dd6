"""Resampling: shares follow the rule, thinning keeps what differs, and the measures are those of hand-counted texts."""

import json

import pytest

from curation import balance
from curation.balance import balanced, distinct, ngrams, template_share, thinned
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


def test_thinning_keeps_every_text_of_its_own_and_about_the_cap_of_one_phrase():
    repeated, own = (
        ["this is a photo of a cat"] * 500,
        [f"w{i} x{i} y{i} z{i} v{i}" for i in range(300)],
    )
    kept = thinned(repeated + own, cap=20)
    assert [i for i in kept if i >= 500] == list(range(500, 800)) and len(
        [i for i in kept if i < 500]
    ) == 20
    opened = [
        f"this is a photo of w{i} x{i} y{i} z{i} v{i} u{i}" for i in range(300)
    ]  # a common opening, the rest their own
    assert len(thinned(opened, cap=20)) == 300
    assert (
        thinned(repeated + own, 20, seed=1)
        == thinned(repeated + own, 20, seed=1)
        != thinned(own + repeated, 20, seed=1)
    )


def test_the_commands_balance_a_mixture_and_thin_a_file_to_readable_records(tmp_path, capsys):
    assert balance.example(balance.Example(tmp_path / "a.jsonl", 2000)) == 0
    assert balance.thin(balance.Ngrams(tmp_path / "a.jsonl", tmp_path / "b.jsonl", cap=5)) == 0
    before, chance, after = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    for n in range(2, 6):  # distinct-1 to distinct-4
        assert float(after[n]) > float(chance[n])
    assert float(after[-1][:-1]) < 0.8 * float(chance[-1][:-1])
    kept, was = (
        Folder(tmp_path / "b.jsonl"),
        {s.messages for s in Folder(tmp_path / "a.jsonl").first()},
    )
    assert (
        len(kept) == int(after[1]) < 2000
        and not kept.faults.counts
        and all(s.messages in was for s in kept.first())
    )

    (tmp_path / "mix.json").write_text(
        json.dumps({"datasets": {n: {"data": f"{n}.jsonl"} for n in "ab"}})
    )
    assert (
        balance.datasets(balance.Datasets(tmp_path / "mix.json", tmp_path / "new.json", 2.0)) == 0
    )
    found = json.loads((tmp_path / "new.json").read_text())["datasets"]
    assert found["a"]["weight"] / found["b"]["weight"] == pytest.approx((2000 / len(kept)) ** 0.5)
