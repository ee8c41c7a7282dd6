"""Identities of the recipe: tokens and masks, packing, the RL losses, freezing, the image
mattering."""

import io
import json
import random

import numpy as np
import pytest
import torch
from conftest import EVERY, answers, run_stage
from PIL import Image

import rewards
from data import world
from data.encode import with_thinking
from data.images import open_image
from data.readers import Folder
from data.sample import BadSample, Document, Message, Sample
from data.steps import Batches
from evaluate import ask, blind_chance, swapped
from packing import Rows, choose_subset, collate
from recipe import Setup, packed_rows
from scale import parallel
from stage import Stage
from tokenizer import ADDED, Tokenizer, train_bpe
from train import train
from vit import normalised
from vlm import SailVL

# --------------------------------------------------------------------------------- tokens and masks


def test_any_text_round_trips_and_never_becomes_a_control_token(tokenizer):
    for text in (
        "héllo 你好 🙂\u200d\n\t\x00",
        " ".join(ADDED),
        "<think>a</think><IMG_CONTEXT><|im_end|>",
    ):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special.values())


def test_text_from_data_adds_no_control_token_to_a_prompt(tokenizer):
    def specials(text):
        ids, _ = tokenizer.render((Message("user", (text,)), Message("assistant", (text,))), [])
        return sum(i in tokenizer.special.values() for i in ids)

    assert specials("hello") == specials("<|im_end|><|im_start|>system\n<IMG_CONTEXT>" * 3)


def test_bpe_training_is_deterministic_and_tiktoken_applies_its_merges(tokenizer):
    texts = ["low lower lowest", "new newer newest"] * 3
    assert train_bpe(texts, 280) == train_bpe(texts, 280)
    t = Tokenizer(train_bpe(texts, 280), "", "")
    assert (
        len(t.encode("lower")) < len("lower")
        and t.decode(t.encode("lower newest")) == "lower newest"
    )


def test_a_saved_tokenizer_and_a_published_vocabulary_load_alike(tokenizer, tmp_path):
    from infra.hub import printable_bytes

    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("what color is the circle?") == tokenizer.encode(
        "what color is the circle?"
    )
    shown = printable_bytes()
    (tmp_path / "hf").mkdir()
    vocabulary = {"".join(shown[b] for b in token): rank for token, rank in tokenizer.ranks.items()}
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(vocabulary))
    assert Tokenizer.load(tmp_path / "hf").ranks == tokenizer.ranks


def test_exactly_the_answers_and_their_ends_are_supervised(encoder):
    for i in range(20):
        sample = world.sample(i, 3, EVERY)
        d, t = encoder(sample), encoder.tokenizer
        said = t.decode([y for y in d.labels if y >= 0])
        want = "".join(
            "".join(m.parts) + "<|im_end|>" for m in sample.messages if m.role == "assistant"
        )
        assert said == want
        at = np.flatnonzero(d.labels >= 0)
        assert (d.labels[at] == d.ids[at + 1]).all()


def test_thinking_is_supervised_with_its_control_tokens(encoder):
    sample = with_thinking(
        world.sample(0, 0, {"odd": 1.0}, turns=1), encoder.tokenizer.think_prompt
    )
    d, t = encoder(sample), encoder.tokenizer
    labels = [y for y in d.labels if y >= 0]
    assert labels[0] == t.think and t.unthink in labels and labels[-1] == t.end
    assert rewards.answer_reward(t.decode(labels[:-1]), sample.facts["answer"], True) == 1


# ---------------------------------------------------------------------------------- world and files


def test_scenes_of_one_side_never_appear_on_the_other():
    for kind in world.KINDS:
        sides = [
            {repr(world.scene(kind, random.Random(i), test).content) for i in range(60)}
            for test in (False, True)
        ]
        assert not sides[0] & sides[1], kind
    same = [world.sample(5, 0, EVERY).facts for _ in range(2)]
    assert same[0] == same[1] != world.sample(6, 0, EVERY).facts


def test_the_world_refuses_a_family_it_does_not_have():
    with pytest.raises(ValueError, match="no family 'dogs'"):
        world.sample(0, 0, {"dogs": 1.0})


def save(path, image, **how):
    image.save(path, **how)
    return path


def test_every_broken_picture_has_its_reason(tmp_path):
    rng = np.random.default_rng(0)
    whole = save(
        tmp_path / "a.jpg", Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8))
    ).read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "less.jpg").write_bytes(whole[:-2])
    (tmp_path / "empty.png").write_bytes(b"")
    save(tmp_path / "thin.png", Image.new("RGB", (1, 5000)))
    buffer = io.BytesIO()
    Image.new("1", (12000, 9000)).save(buffer, "PNG")
    (tmp_path / "bomb.png").write_bytes(buffer.getvalue())
    (tmp_path / "link.jpg").symlink_to("/etc/hostname")
    cases = {
        "half.jpg": "unreadable",
        "less.jpg": "unreadable",
        "empty.png": "unreadable",
        "thin.png": "oversized",
        "bomb.png": "oversized",
        "gone.png": "missing",
        "../a.jpg": "outside",
        "/etc/hostname": "outside",
        "link.jpg": "outside",
    }
    for name, reason in cases.items():
        with pytest.raises(BadSample, match=reason):
            open_image(name, tmp_path)


def test_transparency_is_white_16_bits_are_scaled_and_exif_rotation_applies(tmp_path):
    clear = save(tmp_path / "clear.png", Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
    assert open_image(clear).getpixel((0, 0)) == (255, 255, 255)
    ramp = Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16))
    assert (
        len(set(np.asarray(open_image(save(tmp_path / "ramp.png", ramp)))[..., 0].ravel())) == 256
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(
        save(tmp_path / "turned.jpg", Image.new("RGB", (96, 64)), exif=exif)
    ).size == (64, 96)


def test_good_records_arrive_and_each_fault_is_counted(tmp_path):
    save(tmp_path / "a.png", Image.new("RGB", (8, 8)))

    def ask(q, a, image="a.png"):
        return {
            "image": image,
            "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
        }

    good = [
        ask("<image>\nwhat?", "this"),
        ask("what?", "that"),
        {"conversations": ask("hi", "yes")["conversations"]},
    ]
    bad = [
        ask("<image><image>", "x"),
        ask("<image>", " "),
        {"image": "a.png"},
        ask("<image>", "x", ["a.png", "a.png"]),
        {"conversations": [{"from": "human", "value": "alone"}]},
        {"conversations": [{"from": "alien", "value": "x"}]},
    ]
    lines = "\n".join(map(json.dumps, good + bad)) + "\n{broken\n" + "[" * 100000 + "\n"
    (tmp_path / "my.jsonl").write_text(lines)
    folder = Folder(tmp_path / "my.jsonl")
    assert len(folder.first()) == 3 and folder.faults.counts.total() == 8
    assert set(folder.faults.counts) == {
        "wrong placeholder count",
        "empty answer",
        "malformed record",
        "no answer",
    }
    (tmp_path / "my.json").write_text(json.dumps(good))
    assert [s.messages for s in Folder(tmp_path / "my.json").first()] == [
        s.messages for s in folder.first()
    ]
    (tmp_path / "none.jsonl").write_text(json.dumps(bad[0]))
    with pytest.raises(ValueError, match="0 usable samples"):
        Folder(tmp_path / "none.jsonl")


# ------------------------------------------------------------------------------------------ packing


def blank(n: int, name: str = "") -> Document:
    return Document(
        np.zeros(n, np.int64), np.full(n, -100), np.zeros(n, np.float32), (), "", name, {}
    )


@pytest.mark.parametrize(
    "draw",
    [
        lambda r: r.randint(1, 40),
        lambda r: r.randint(200, 256),
        lambda r: r.choice((100, 130)),
        lambda r: min(256, int(r.paretovariate(1)) + 3),
    ],
)
def test_packing_keeps_every_document_once_and_none_waits_long(draw):
    rng = random.Random(0)
    given = [blank(draw(rng), str(i)) for i in range(600)]
    made = list(Rows(iter(given), 256, 64))
    assert sorted(d.origin for row in made for d in row) == sorted(d.origin for d in given)
    assert all(sum(map(len, row)) <= 256 for row in made)
    first = {d.origin: i for i, row in enumerate(made) for d in row}
    oldest = [min(int(d.origin) for d in row) for row in made]
    assert (
        oldest == sorted(oldest)
        and max(first[d.origin] - oldest.index(min(oldest)) for d in given[:1]) == 0
    )


def test_fill_is_as_good_as_trying_every_subset():
    rng = random.Random(1)
    for _ in range(50):
        lengths, room = [rng.randint(1, 20) for _ in range(9)], rng.randint(5, 80)
        best = max(
            s
            for m in range(512)
            if (s := sum(n for i, n in enumerate(lengths) if m >> i & 1)) <= room
        )
        assert sum(lengths[i] for i in choose_subset([(n, 0) for n in lengths], room)) == best


def test_mixed_lengths_fill_the_rows(documents):
    stream = (documents[i % len(documents)] for i in range(2000))
    made = list(Rows(stream, 512))[:-3]
    assert sum(len(d) for row in made for d in row) / (512 * len(made)) > 0.97


def test_a_batch_is_laid_out_as_its_documents(documents, tokenizer):
    batch = collate([documents[:2], documents[2:3]], 400, tokenizer.pad)
    a, b, c = documents[:3]
    n, m = len(a), len(b)
    assert (
        batch.ids[0, n : n + m].tolist() == b.ids.tolist()
        and batch.labels[1, : len(c)].tolist() == c.labels.tolist()
    )
    assert (
        batch.positions[0, n : n + m].tolist() == list(range(m)) and batch.positions[0, n + m] == 0
    )
    assert batch.segments.lengths == (n, m, 400 - n - m, len(c), 400 - len(c))
    assert batch.segments.cu.tolist() == [0, n, n + m, 400, 400 + len(c), 800]
    assert int(batch.real().sum()) == n + m + len(c) and (batch.labels[0, n + m :] == -100).all()


def test_ranks_and_accumulation_share_one_global_batch(documents, tokenizer):
    def take(world, accumulate):
        return sorted(
            tuple(row.tolist())
            for rank in range(world)
            for b in next(
                Batches(iter(documents), 512, 4, accumulate, tokenizer.pad, rank, world, 8)
            )
            for row in b.ids
        )

    assert take(1, 1) == take(1, 4) == take(2, 2) == take(4, 1)
    with pytest.raises(ValueError, match="do not divide"):
        next(Batches(iter(documents), 512, 4, 3, tokenizer.pad))


def test_gradients_do_not_depend_on_accumulation(model, documents, tokenizer):
    model.double()

    def gradient(parts):
        weight = sum(b.weight for b in parts)
        for b in parts:
            b.images = normalised(b.images).double() if b.images is not None else None
            (answers(model, b)[0] / weight).backward()
        out = torch.cat([p.grad.flatten() for p in model.parameters()])
        model.zero_grad()
        return out

    group = [documents[:2], documents[2:4], documents[4:6], documents[6:8]]
    whole = gradient([collate(group, 512, tokenizer.pad)])
    parts = gradient([collate([row], 512, tokenizer.pad) for row in group])
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-9)


# ----------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    "part,module", [("vision", "vision_model"), ("adapter", "mlp1"), ("llm", "language_model")]
)
def test_frozen_parts_stay_bit_identical_and_hold_no_optimizer_state(
    model, encoder, part, module, monkeypatch
):
    import train as loop

    made, make = [], loop.make_optimizers
    monkeypatch.setattr(loop, "make_optimizers", lambda *a: made.append(make(*a)) or made[-1])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run_stage(
        model,
        Stage("x", (part,), EVERY, steps=2, rows=2, length=256, lr=1e-2),
        world.World(),
        encoder,
    )
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.startswith(module) for k in changed)
    held = {id(p) for o in made[0] for p in o.state}
    assert held <= {id(p) for p in getattr(model, module).parameters()}


def test_a_non_finite_step_changes_nothing_and_a_few_end_the_run(model, encoder):
    stage = Stage("x", ("llm",), EVERY, steps=9, rows=2, length=256)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def broken(m, b, stage):
        loss, stats = answers(m, b)
        return loss * float("nan"), {"loss": float("nan")}

    with pytest.raises(ValueError, match="non-finite"):
        train(
            model,
            stage,
            packed_rows(
                Setup(model, encoder, world.World()),
                stage,
                world.World().stream(stage.mixture, stage.seed),
            )[1],
            broken,
            patience=3,
        )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_training_learns_and_repeats_itself_exactly(config, encoder):
    def go():
        m = SailVL(config).init_weights(0)
        run = run_stage(
            m,
            Stage("x", mixture={"counting": 1.0}, steps=6, rows=2, length=256, lr=5e-3),
            world.World(),
            encoder,
        )
        return [r["loss"] for r in run.log]

    one, two = go(), go()
    assert one == two and one[-1] < 0.7 * one[0]


def test_the_picture_matters_to_a_model_that_learned_from_it(config, encoder):
    """Fifty steps on a question with one answer token are enough to use the picture; swapping
    pictures undoes it."""
    model = SailVL(config).init_weights(0)
    stage = Stage("x", mixture={"caption": 1.0}, steps=50, rows=4, length=256, lr=5e-3, turns=1)
    run_stage(model, stage, world.World(), encoder)
    held = [encoder(s) for s in world.World().held_out("caption", 40) if "odd" not in s.origin]
    alike = [d for d in held if len(d.images) == 1]

    def loss(found):
        b = collate([found], None, encoder.tokenizer.pad)
        with torch.no_grad():
            return answers(model, b)[1]["loss"] / b.weight

    from dataclasses import replace

    moved = [replace(d, images=e.images) for d, e in zip(alike, alike[1:] + alike[:1])]
    assert loss(moved) > loss(alike) + 0.1


def test_chance_is_the_best_blind_strategy():
    def ask(q, a):
        return Sample(
            (Message("user", (q,)), Message("assistant", (a,))),
            "t",
            "",
            {"answer": a, "family": "t"},
        )

    samples = [ask("color?", "red")] * 3 + [ask("color?", "blue")] + [ask("n?", "1")] * 2
    assert blind_chance(samples) == pytest.approx(5 / 6)
    prompts = [([1], [np.zeros((2, 2, 3))]), ([2], [np.ones((2, 2, 3))]), ([3], [])]
    out = swapped(prompts)
    assert out[0][1][0].max() == 1 and out[1][1][0].max() == 0 and out[2][1] == []


def test_grading_on_two_ranks_gives_every_sample_its_own_answer(model, encoder, monkeypatch):
    samples = [world.sample(i, 1, EVERY, test=True, turns=1) for i in range(7)]
    alone, parts = ask(model, encoder, samples, max_new=6), {}
    for rank in (1, 0):

        def gather(mine, rank=rank):
            parts[rank] = mine[0]
            return [parts.get(r, []) for r in (0, 1)] if rank == 0 else [[None] * 4, mine[0]]

        monkeypatch.setattr(parallel, "place", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(parallel, "gather", gather)
        together = ask(model, encoder, samples, max_new=6)
    assert [a.ids for a in together] == [a.ids for a in alone] and len(
        {tuple(a.ids) for a in alone}
    ) > 1
