"""Soup: exact means, tensor by tensor; greedy keeps what helps; strangers are refused."""

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import soup
from soup import Checkpoint, SoupOptions, average, distance, farthest, greedy
from vlm import SailVL


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Commands choose their threads; in the suite, which runs beside others, they keep to one."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def near(state, seed, scale=0.01):
    """A run that began at `state`: every tensor moved a little."""
    g = torch.Generator().manual_seed(seed)
    return {
        k: v + scale * v.std() * torch.randn(v.shape, generator=g) if v.numel() > 1 else v.clone()
        for k, v in state.items()
    }


@pytest.fixture(scope="module")
def start(config):
    return SailVL(config).init_weights(0).state_dict()


def test_a_soup_of_a_model_with_itself_is_itself(start):
    assert (
        all(torch.allclose(v, start[k]) for k, v in average([start, start]).items())
        and distance(start, start) == 0
    )


def test_the_mean_is_taken_in_fp32_and_keeps_the_type():
    small = [
        {"w": torch.full((3,), v, dtype=torch.bfloat16)}
        for v in (1.0, 1.0, 1.0078125, 1.0078125, 1.0078125)
    ]
    assert average(small)["w"].dtype == torch.bfloat16
    assert average(small)["w"][0] == torch.tensor(1.0046875).bfloat16()


def test_a_soup_is_read_one_tensor_at_a_time(start):
    """At no time does the average hold more than one tensor of each model."""
    held = []

    class Counting(Mapping):
        def __init__(self, state):
            self.state = state

        def __getitem__(self, name):
            held.append(name)
            return self.state[name]

        def __iter__(self):
            return iter(self.state)

        def __len__(self):
            return len(self.state)

    average([Counting(start), Counting(start)])
    assert held == [name for name in start for _ in range(2)]


def test_strangers_are_far_and_relatives_near(start, config):
    other = SailVL(config).init_weights(1).state_dict()
    assert distance(start, other) > 0.5 and distance(near(start, 1), near(start, 2)) < 0.05
    with pytest.warns(UserWarning, match="do not share a history"):
        farthest([start, near(start, 1), other])
    assert distance(
        {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([4.0, 3.0])}
    ) == pytest.approx(2**0.5 / 5)


def test_other_architectures_are_refused_by_name(start):
    first = next(iter(start))
    for odd in (
        {k: v for k, v in start.items() if k != first},
        start | {first: torch.zeros(1, 2, 3)},
    ):
        for what in (average, lambda pair: distance(*pair)):
            with pytest.raises(ValueError, match=f"different architectures.*{first}"):
                what([start, odd])


def test_greedy_takes_the_best_first_and_leaves_out_what_hurts():
    """Models are numbers, the target is 2: 1.8 alone, then 2.4 helps, then 9 would not."""
    states = [{"w": torch.tensor([x])} for x in (9.0, 2.4, 1.8)]
    mean, chosen = greedy(states, lambda s: -abs(float(s["w"]) - 2))
    assert chosen == [2, 1] and mean["w"].item() == pytest.approx(2.1)
    mean, chosen = greedy(
        [{"w": torch.tensor([x])} for x in (2.0, 5.0)], lambda s: -abs(float(s["w"]) - 2)
    )
    assert chosen == [0] and mean["w"].item() == 2.0


@pytest.mark.parametrize("tied", [False, True])
def test_the_command_writes_the_mean_and_refuses_strangers(config, tokenizer, tmp_path, tied):
    config = replace(config, text=replace(config.text, tie_word_embeddings=tied))
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        model = SailVL(config).init_weights(seed)
        if name == "b":
            model.load_state_dict(near(model.state_dict(), 1), strict=True)
        model.save_pretrained(tmp_path / name)
        tokenizer.save(tmp_path / name)

    def options(*names, out, **more):
        return SoupOptions(tuple(tmp_path / n for n in names), tmp_path / out, device="cpu", **more)

    soup.cook_soup(options("a", "b", out="mean"))
    a, b, mean = (load_file(tmp_path / n / "model.safetensors") for n in ("a", "b", "mean"))
    for name in a:
        torch.testing.assert_close(mean[name], (a[name] + b[name]) / 2)
    assert Checkpoint(tmp_path / "a").keys() == a.keys()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="say --force"):
        soup.cook_soup(options("a", "c", out="none"))
    assert not (tmp_path / "none").exists()
    with pytest.warns(UserWarning):
        soup.cook_soup(options("a", "c", out="forced", force=True))
    soup.cook_soup(options("a", "b", out="greedy", greedy=True, samples=1))
    for model in ("forced", "greedy"):
        assert (tmp_path / model / "model.safetensors").exists()


# ------------------------------------------------------------------------------------ on own data


@pytest.fixture
def pair(config, tokenizer, tmp_path):
    """Two relatives in bf16, and a held-out file with a picture that is none and one that is gone."""
    first = SailVL(config).init_weights(0)
    for name, seed in (("a", None), ("b", 1)):
        model = SailVL(config).init_weights(0)
        if seed:
            model.load_state_dict(near(first.state_dict(), seed))
        model.bfloat16().save_pretrained(tmp_path / name)
        tokenizer.save(tmp_path / name)

    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = []
    for i, picture in enumerate(("red.png", "bad.png", "gone.png", "red.png")):
        turns = [{"from": "human", "value": f"<image>{i}?"}, {"from": "gpt", "value": "red"}]
        rows.append(json.dumps({"image": picture, "conversations": turns}))
    (tmp_path / "held.jsonl").write_text("\n".join(rows))
    return SoupOptions(
        (tmp_path / "a", tmp_path / "b"),
        tmp_path / "soup",
        greedy=True,
        data=tmp_path / "held.jsonl",
        device="cpu",
    )


def test_a_bad_picture_costs_its_sample_and_the_files_keep_their_type(pair, capsys):
    soup.cook_soup(pair)
    printed = capsys.readouterr().out
    assert "1 x unreadable image" in printed and "1 x missing image" in printed
    assert "greedy soup of" in printed
    stored = load_file(pair.out / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}


def test_what_a_user_did_wrong_is_one_sentence(pair):
    for wrong, words in (
        ({"models": pair.models[:1]}, "at least two"),
        ({"device": "cuda:77"}, "no such device"),
        ({"data": pair.out.parent / "none.jsonl"}, "none.jsonl"),
    ):
        with pytest.raises(ValueError, match=words):
            soup.cook_soup(replace(pair, **wrong))

    lines = pair.data.read_text().splitlines()
    pair.data.write_text(lines[1])
    with pytest.raises(ValueError, match="no sample can be graded"):
        soup.cook_soup(pair)


def test_weights_that_are_not_finite_are_refused(start):
    broken = {k: torch.full_like(v, torch.nan) for k, v in start.items()}
    with pytest.raises(ValueError, match="not finite"):
        farthest([start, broken])
    with pytest.raises(ValueError, match="not finite"):
        farthest([start, start, broken])
    assert distance({"w": torch.zeros(2)}, {"w": torch.zeros(2)}) == 0
