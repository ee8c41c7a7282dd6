"""Generation: cached decoding is the training forward, groups share their prompt, sampling follows
the distribution."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EVERY
from PIL import Image
from safetensors.torch import save_file

from data import world
from data.encode import Encoder
from data.images import normalise
from data.sample import Message, Sample, Video
from generate import (
    GenerateOptions,
    answer_prompt,
    build_question,
    generate,
    load_model,
    next_token,
    stream,
)
from infra.checkpoint import commit, seal
from infra.cli import one_line_errors
from infra.device import pick_device
from tokenizer import Tokenizer, train_bpe
from vlm import SailVL

NEVER = 10**6  # an end token that no vocabulary has


@pytest.fixture
def model(model, tokenizer):
    """Untrained, but never prefers the image placeholder, which would end an answer."""
    with torch.no_grad():
        model.language_model.lm_head.weight[tokenizer.image] = 0
    return model.eval()


@pytest.fixture(scope="session")
def prompts(encoder):
    """Sixteen prompts of every kind: pictures, videos, text only."""
    found = [encoder.prompt(world.sample(i, 0, EVERY)) for i in range(60)]
    chosen = (
        [p for p in found if not p[1]][:4] + [p for p in found if len(p[1]) > 1][:4] + found[:8]
    )
    assert len({len(ids) for ids, _ in chosen}) > 6
    return chosen[::3] + chosen[1::3] + chosen[2::3]


@torch.no_grad()
def recompute(model, prompt, ids, temperature=1.0):
    """Log-probabilities (n, V) before each of the answer's tokens, from one forward without
    cache."""
    row = torch.tensor([prompt[0] + ids[:-1]])  # the last token is not fed
    logits = model(row, normalise(prompt[1]) if prompt[1] else None)[0, len(prompt[0]) - 1 :]
    return (logits / temperature).log_softmax(-1)


def stop_in(answers):
    """The token that, taken for the end token, cuts about half of these answers soon, and at
    different lengths."""

    def cuts(token):
        return [n for a in answers if token in a.ids and (n := a.ids.index(token)) < 8]

    found = {token for a in answers for token in a.ids}
    return max(
        found, key=lambda t: (len(set(cuts(t))) > 1, -abs(len(cuts(t)) - len(answers) / 2), t)
    )


def test_greedy_decoding_with_a_cache_is_recomputing_everything_at_each_token(model, prompts):
    answers = generate(model, prompts, NEVER, max_new=12)
    assert len({tuple(a.ids) for a in answers}) > 8  # different prompts, different answers
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.ids) == 12
        assert (
            recompute(model, prompt, answer.ids).argmax(-1).tolist() == answer.ids
        )  # by induction over the tokens


@pytest.mark.slow
def test_cached_and_streamed_decoding_equal_recomputing_everything_over_64_random_prompts(
    model, encoder
):
    rng = np.random.default_rng(0)
    drawn = [encoder.prompt(world.sample(i, 7, EVERY)) for i in range(32)]
    words = [(rng.integers(0, 256, rng.integers(1, 90)).tolist(), []) for _ in range(32)]
    prompts = [p for pair in zip(drawn, words) for p in pair]
    together = generate(model, prompts, NEVER, max_new=8)
    for prompt, answer in zip(prompts, together, strict=True):
        streamed = []
        for rows, ids, scores in stream(model, [prompt], NEVER, max_new=8):
            streamed.append(int(ids))
            row = torch.tensor([prompt[0] + streamed[:-1]])
            with torch.no_grad():  # nothing cached: the whole sequence again for each token
                full = model(row, normalise(prompt[1]) if prompt[1] else None)[0, -1].log_softmax(
                    -1
                )
            assert int(full.argmax()) == streamed[-1] and abs(float(full.max() - scores)) < 1e-5
        assert streamed == answer.ids and len(streamed) == 8


def test_a_stream_yields_each_token_before_the_next_is_computed(model, prompts):
    forwards = []
    model.language_model.register_forward_hook(lambda module, inputs, output: forwards.append(1))
    tokens = stream(model, prompts[:2], NEVER, max_new=5, samples=3, temperature=1.0, seed=2)
    steps = []
    for n, (rows, ids, scores) in enumerate(tokens, 1):
        assert len(forwards) == n and rows.tolist() == list(range(6))
        steps.append(ids.tolist())
    answers = generate(model, prompts[:2], NEVER, max_new=5, samples=3, temperature=1.0, seed=2)
    assert [a.ids for a in answers] == [list(row) for row in zip(*steps)]


def test_any_of_several_stop_tokens_ends_an_answer(model, prompts):
    free = generate(model, prompts, NEVER, max_new=12)
    one = stop_in(free)
    other = next(a.ids[4] for a in free if one not in a.ids)
    for a, b in zip(generate(model, prompts, (one, other), max_new=12), free, strict=True):
        n = min([b.ids.index(t) + 1 for t in (one, other) if t in b.ids], default=12)
        assert a.ids == b.ids[:n] and a.finished == (a.ids[-1] in (one, other))


@pytest.mark.parametrize("temperature, top_k", [(0.0, 0), (0.7, 0), (0.7, 5)])
def test_returned_log_probabilities_are_those_of_the_training_forward(
    model, prompts, tokenizer, temperature, top_k
):
    answers = generate(
        model, prompts, NEVER, max_new=6, samples=2, temperature=temperature, top_k=top_k, seed=1
    )
    assert len(answers) == 2 * len(prompts)
    for answer in answers:
        ids, images = prompts[answer.prompt]
        row, at = (
            torch.tensor([ids + answer.ids[:-1]]),
            torch.arange(len(answer.ids)) + len(ids) - 1,
        )
        with torch.no_grad():
            wanted = model.logprobs(
                row,
                normalise(images) if images else None,
                None,
                None,
                at,
                torch.tensor(answer.ids),
                temperature or 1.0,
            )
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, rtol=0, atol=1e-5)


def test_rows_that_wait_for_their_turn_get_the_same_answers(model, prompts):
    """Prompts once, never more rows than there is room for, and log-probabilities as ever."""
    greedy = generate(model, prompts[:3], NEVER, max_new=6, samples=2)
    inputs = []
    handle = model.language_model.register_forward_hook(
        lambda module, given, output: inputs.append(len(given[0]))
    )
    in_turns = generate(model, prompts[:3], NEVER, max_new=6, samples=2, at_once=4)
    handle.remove()
    tokens = sum(len(ids) for ids, _ in prompts[:3])
    assert inputs == [tokens] + [4] * 5 + [2] * 5
    assert [(a.prompt, a.ids) for a in in_turns] == [(a.prompt, a.ids) for a in greedy]

    # An end in the middle of a turn, and groups that are cut by it
    end = stop_in(greedy)
    how = {"max_new": 6, "samples": 3, "temperature": 1.0, "seed": 5}
    for answer in generate(model, prompts[:3], end, at_once=2, **how):
        ids, images = prompts[answer.prompt]
        assert answer.ids.count(end) == answer.finished and len(answer.ids) <= 6
        row = torch.tensor([ids + answer.ids[:-1]])
        at = torch.arange(len(answer.ids)) + len(ids) - 1
        pixels = normalise(images) if images else None
        with torch.no_grad():
            wanted = model.logprobs(row, pixels, None, None, at, torch.tensor(answer.ids))
        torch.testing.assert_close(torch.tensor(answer.logprobs), wanted, rtol=0, atol=1e-5)


def test_every_answer_of_a_group_draws_its_own_first_token(model, prompts):
    answers = generate(model, prompts[:4], NEVER, max_new=2, samples=8, temperature=1.0)
    assert [a.prompt for a in answers] == [p for p in range(4) for _ in range(8)]
    for p in range(4):
        assert len({a.ids[0] for a in answers if a.prompt == p}) > 1


def test_answers_come_in_the_order_of_their_prompts(model, prompts):
    forth, back = (
        generate(model, prompts, NEVER, max_new=6),
        generate(model, prompts[::-1], NEVER, max_new=6),
    )
    assert [a.prompt for a in forth] == [a.prompt for a in back] == list(range(16))
    assert [a.ids for a in forth] == [a.ids for a in back[::-1]]


def test_a_group_runs_its_image_and_its_prompt_once(model, prompts):
    pictures, tokens = [], []
    model.vision_model.register_forward_hook(
        lambda module, inputs, output: pictures.append(len(inputs[0]))
    )
    model.language_model.register_forward_hook(
        lambda module, inputs, output: tokens.append(len(inputs[0]))
    )
    generate(model, prompts, NEVER, max_new=4, samples=5, temperature=1.0)
    assert pictures == [sum(len(images) for _, images in prompts)]
    assert (
        tokens == [sum(len(ids) for ids, _ in prompts)] + [5 * len(prompts)] * 3
    )  # the last token is not fed


def test_rows_that_have_ended_are_soon_no_longer_computed(model, prompts):
    how = {"max_new": 12, "samples": 4, "temperature": 1.0, "top_k": 3}
    end = stop_in(generate(model, prompts, NEVER, **how))
    rows = []
    model.language_model.register_forward_hook(
        lambda module, inputs, output: rows.append(len(inputs[0]))
    )
    answers = generate(model, prompts, end, **how)
    unended = [n for t in range(1, 12) if (n := sum(len(a.ids) > t for a in answers))]
    assert len(rows) == 1 + len(unended)  # the first forward reads the prompts
    assert unended[-1] < 0.75 * len(answers)
    for computed, needed in zip(rows[1:], unended):
        assert needed <= computed <= needed / 0.75  # dropping copies the cache, so not one by one


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_are_drawn_as_often_as_the_softmax_says(model, prompts, temperature):
    n, bins = 3000, 10
    prompt = min(prompts, key=lambda p: len(p[0]))
    p = recompute(model, prompt, [0], temperature)[0].exp().double()
    drawn = [
        a.ids[0] for a in generate(model, [prompt], NEVER, 1, samples=n, temperature=temperature)
    ]
    order = p.argsort(descending=True)  # bins of about equal probability, likely tokens first
    before = p[order].cumsum(0) - p[order]
    which = torch.empty_like(order).scatter_(0, order, (before * bins).long().clamp(max=bins - 1))
    expected = torch.zeros(bins).double().index_add(0, which, p) * n
    counts = torch.bincount(which[torch.tensor(drawn)], minlength=bins)
    assert expected.min() > 50
    assert (
        (counts - expected).square() / expected
    ).sum() < 34  # chi-square of 9 degrees: one in ten thousand


def test_keeping_one_token_is_greedy(model, prompts):
    greedy = generate(model, prompts, NEVER, max_new=6)
    for how in ({"top_k": 1}, {"top_p": 1e-6}):
        sampled = generate(model, prompts, NEVER, max_new=6, temperature=1.0, **how)
        assert [a.ids for a in sampled] == [a.ids for a in greedy]


@pytest.mark.parametrize(
    "how, allowed",
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_p": 0.7}, {1, 3}),
        ({"top_p": 0.45}, {3}),
        ({"top_p": 0.85}, {0, 1, 3}),
        ({"top_k": 3, "top_p": 0.6}, {1, 3}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p_leave_the_likeliest_tokens_scored_by_the_full_distribution(how, allowed):
    p = torch.tensor([0.15, 0.3, 0.05, 0.5])
    options = {"top_k": 0, "top_p": 1.0} | how
    picked, scores = next_token(
        p.log().expand(2000, 4), 1.0, generator=torch.Generator().manual_seed(0), **options
    )
    assert set(picked.tolist()) == allowed
    torch.testing.assert_close(scores, p.log()[picked])


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 4}], ids=str)
def test_the_end_token_closes_a_finished_answer_and_is_nowhere_else(model, prompts, how):
    end = stop_in(generate(model, prompts, NEVER, max_new=12, **how))
    answers = generate(model, prompts, end, max_new=12, samples=4, **how)
    assert {a.finished for a in answers} == {True, False}
    for a in answers:
        assert len(a.ids) == len(a.logprobs) <= 12
        assert a.finished == (a.ids[-1] == end) and end not in a.ids[:-1]
        assert a.finished or len(a.ids) == 12


def test_an_end_token_cuts_the_answer_and_changes_nothing_before(model, prompts):
    free = generate(model, prompts, NEVER, max_new=12)
    end = stop_in(free)
    first = sorted(
        range(len(prompts)), key=lambda i: end not in free[i].ids
    )  # those that will be cut go first
    free = [free[i] for i in first]
    cut = generate(model, [prompts[i] for i in first], end, max_new=12)
    for a, b in zip(cut, free, strict=True):
        n = b.ids.index(end) + 1 if end in b.ids else 12
        assert a.ids == b.ids[:n] and a.finished == (end in b.ids)
        np.testing.assert_allclose(a.logprobs, b.logprobs[:n], atol=1e-5)
    assert {a.finished for a in cut} == {True, False}


def test_an_image_placeholder_ends_an_answer_unfinished(model, prompts, tokenizer):
    """There are no pixels for it, so the training forward could not be run on what follows."""
    free = generate(model, prompts, NEVER, max_new=12)
    head, stop = model.language_model.lm_head.weight.data, stop_in(free)
    head[[tokenizer.image, stop]] = head[
        [stop, tokenizer.image]
    ]  # where it said `stop` it now says the placeholder
    for prompt, a, b in zip(
        prompts, generate(model, prompts, NEVER, max_new=12), free, strict=True
    ):
        n = b.ids.index(stop) if stop in b.ids else 12
        assert a.ids == b.ids[:n] + [tokenizer.image] * (n < 12) and not a.finished
        assert recompute(model, prompt, a.ids).argmax(-1).tolist() == a.ids


def test_the_other_prompts_of_a_batch_do_not_change_an_answer(model, prompts):
    together = generate(model, prompts, NEVER, max_new=8)
    for prompt, answer in zip(prompts, together, strict=True):
        (alone,) = generate(model, [prompt], NEVER, max_new=8)
        assert alone.ids == answer.ids
        np.testing.assert_allclose(alone.logprobs, answer.logprobs, atol=1e-5)


def test_images_of_different_sizes_may_share_a_batch(model, config, tokenizer):
    encoder = Encoder(tokenizer, replace(config, any_resolution=True))
    rng = np.random.default_rng(0)
    sizes = (32, 32), (48, 90), (20, 64)
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    prompts = [
        encoder.prompt(Sample((Message("user", (picture, "what?")),))) for picture in pictures
    ]
    for prompt, answer in zip(prompts, generate(model, prompts, NEVER, max_new=6), strict=True):
        (alone,) = generate(model, [prompt], NEVER, max_new=6)
        assert alone.ids == answer.ids


def test_a_start_belongs_to_the_prompt_and_not_to_the_answer(model, prompts, tokenizer):
    begun = [(ids + [tokenizer.think, 40], images) for ids, images in prompts]
    given = generate(model, prompts, NEVER, max_new=4, start=[tokenizer.think, 40])
    wanted, without = (
        generate(model, begun, NEVER, max_new=4),
        generate(model, prompts, NEVER, max_new=4),
    )
    assert [a.ids for a in given] == [a.ids for a in wanted] != [a.ids for a in without]


def test_the_seed_alone_decides_what_is_drawn(model, prompts):
    def draw(seed):
        torch.manual_seed(torch.seed() % 1000)  # the global generator must not matter
        return [
            a.ids
            for a in generate(
                model, prompts[:4], NEVER, max_new=4, samples=2, temperature=1.0, seed=seed
            )
        ]

    assert draw(3) == draw(3) != draw(4)


def test_no_prompts_is_an_error(model):
    with pytest.raises(ValueError, match="no prompts"):
        generate(model, [], NEVER)


# -------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def directory(config, tokenizer, tmp_path_factory) -> Path:
    """A saved model."""
    place = tmp_path_factory.mktemp("model")
    SailVL(config).init_weights(0).save_pretrained(place)
    tokenizer.save(place)
    return place


@pytest.fixture
def frames(tmp_path) -> list[Image.Image]:
    """Twelve pictures, as a GIF, as a folder and one by one."""
    pictures = [Image.new("RGB", (32, 32), (20 * i, 0, 0)) for i in range(12)]
    (tmp_path / "clip").mkdir()
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / "clip" / f"{i:03d}.png")
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], loop=0)
    return pictures


@pytest.mark.parametrize("kind", ["gif", "folder", "frames"])
def test_a_video_is_asked_about_as_in_training(frames, kind, tmp_path, encoder):
    """Numbered frames on lines of their own, then the question: as the world's videos are made."""
    video = {
        "gif": (tmp_path / "clip.gif",),
        "folder": (tmp_path / "clip",),
        "frames": tuple(tmp_path / "clip" / f"{i:03d}.png" for i in range(12)),
    }[kind]
    asked = build_question(GenerateOptions("which way?", video=video), "")
    parts = [p for i, f in enumerate(frames, 1) for p in (f"Frame-{i}: ", f, "\n")]
    want = Sample((Message("user", (*parts, "which way?")),))
    ids, images = encoder.prompt(asked)
    want_ids, want_images = encoder.prompt(want)
    assert ids == want_ids and len(images) == 12
    for a, b in zip(images, want_images, strict=True):
        assert np.abs(a.astype(int) - b.astype(int)).max() < 8  # a GIF has a palette
    text = encoder.tokenizer.decode(ids)
    assert "Frame-12: <img>" in text and "</img>\nwhich way?" in text
    few = build_question(GenerateOptions("which way?", video=video, frames=3), "")
    shown = [image[0, 0, 0] for image in encoder.prompt(few)[1]]
    assert len(shown) == 3 and shown[0] < 8 and shown[2] > 212  # the first and the last among them


def test_images_and_text_are_asked_as_readers_give_them(frames, tmp_path, encoder, capsys):
    one, two = tmp_path / "clip" / "000.png", tmp_path / "clip" / "001.png"

    def ids(**how) -> list[int]:
        return encoder.prompt(build_question(GenerateOptions("what?", **how), "think!"))[0]

    def want(*parts) -> list[int]:
        return encoder.prompt(Sample((Message("user", parts),)))[0]

    assert ids() == want("what?") and ids(think=True) == want("what? think!")
    assert ids(image=(one,)) == want(one, "\nwhat?")
    assert ids(image=(one, two)) == want(one, "\n", two, "\nwhat?")
    assert ids(image=(one,), video=(two,)) == want(one, "\n", Video((two,)), "what?")
    assert capsys.readouterr().err == ""
    ids(image=(tmp_path / "clip.gif",))
    assert "--video shows all" in capsys.readouterr().err


def one_line(capsys, options: GenerateOptions) -> str:
    """What a user sees of a mistake: a line, and exit status 1."""
    with pytest.raises(SystemExit) as left, one_line_errors():
        answer_prompt(options)
    assert left.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "Traceback" not in lines[0]
    return lines[0]


def test_what_a_user_does_wrong_is_one_line(directory, tmp_path, capsys):
    def line(**how) -> str:
        return one_line(capsys, GenerateOptions(**({"prompt": "hi", "model": directory} | how)))

    assert line(prompt=" ") == "error: --prompt is empty: what is to be answered?"
    assert "missing image: --image: no file" in line(image=(tmp_path / "gone.png",))
    assert "missing image: --video: no file" in line(video=(tmp_path / "gone.gif",))
    (tmp_path / "text.png").write_text("hello")
    assert "unreadable image: --image" in line(image=(tmp_path / "text.png",))
    assert "no such directory" in line(model=tmp_path / "nowhere")
    assert "no config.json here" in line(model=tmp_path)
    assert "--device nonsense: no such device here" in line(device="nonsense")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_named(directory, capsys):
    with pytest.raises(ValueError, match="--device cuda: no such device here"):
        pick_device("cuda")
    with pytest.raises(ValueError, match="--device cuda: no such device here"):
        load_model(directory, "cuda")


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_both_stop_tokens_end_an_answer_and_neither_is_printed(
    config, tokenizer, tmp_path, capsys, end
):
    model = SailVL(config).init_weights(0).eval()
    ids, _ = Encoder(tokenizer, config).prompt(build_question(GenerateOptions("hi"), ""))
    with torch.no_grad():  # the end is the likeliest first token
        last = model.hidden(torch.tensor([ids]))[-1]
        model.language_model.lm_head.weight[tokenizer.special[end]] = (
            50 * last / last.square().sum()
        )
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    for samples in (1, 2):
        answer_prompt(GenerateOptions("hi", tmp_path, max_new=5, samples=samples))
        assert capsys.readouterr().out == "\n" * samples


def test_control_characters_of_an_answer_are_shown_and_not_obeyed(directory, capsys, monkeypatch):
    written = Tokenizer.load(directory).encode("red\x1b[2Jcar\n")

    def told(*arguments, **how):
        for i in written:
            yield torch.tensor([0]), torch.tensor([i]), torch.tensor([0.0])

    monkeypatch.setattr("generate.stream", told)
    answer_prompt(GenerateOptions("hi", directory))
    assert capsys.readouterr().out == "red\\x1b[2Jcar\n\n"


# ---------------------------------------------------------------------------- loading what there is


def a_checkpoint(run: Path, step: int, config, tokenizer=None, seed: int = 0) -> None:
    temporary = run / "checkpoints" / f"tmp-{step}"
    temporary.mkdir(parents=True)
    SailVL(config).init_weights(seed).save_pretrained(temporary)
    if tokenizer:
        tokenizer.save(temporary)
    (temporary / "state.json").write_text(
        json.dumps({"config": {}, "step": step, "executed": step})
    )
    save_file({}, temporary / "state.safetensors")
    commit(temporary, run / "checkpoints" / f"step-{step:08d}", seal(temporary.iterdir()))


def test_a_run_that_has_not_ended_answers_from_its_newest_whole_checkpoint(
    config, tokenizer, tmp_path, capsys
):
    for step in (9, 10, 200):
        a_checkpoint(tmp_path, step, config, tokenizer, seed=step)

    def loaded() -> torch.Tensor:
        return load_model(tmp_path)[0].language_model.lm_head.weight

    def of(step: int) -> torch.Tensor:
        return SailVL(config).init_weights(step).language_model.lm_head.weight

    assert torch.equal(loaded(), of(200))
    assert "using" in (said := capsys.readouterr().err) and "step-00000200" in said
    newest = tmp_path / "checkpoints" / "step-00000200" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert torch.equal(loaded(), of(10))
    assert newest.is_file()  # the run may be going on: nothing of it is moved

    # a finished model comes first
    SailVL(config).init_weights(7).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    assert torch.equal(loaded(), of(7))


def test_a_checkpoint_without_a_tokenizer_takes_the_runs_or_that_of_its_start(
    config, tokenizer, tmp_path, directory
):
    run = tmp_path / "run"
    a_checkpoint(run, 3, config)
    with pytest.raises(ValueError, match="step-00000003 has no tokenizer, nor has the run's"):
        load_model(run)
    (run / "run.json").write_text(json.dumps({"model": str(directory)}))
    assert load_model(run)[1].ranks == tokenizer.ranks
    tokenizer.save(run)
    (run / "run.json").unlink()
    assert load_model(run)[1].ranks == tokenizer.ranks


def test_a_run_without_a_whole_checkpoint_says_why(config, tokenizer, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint \\(none was written yet"):
        load_model(tmp_path)
    a_checkpoint(tmp_path, 3, config, tokenizer)
    (tmp_path / "checkpoints" / "step-00000003" / "config.json").unlink()
    with pytest.raises(
        ValueError, match="no whole checkpoint \\(step-00000003: config.json is miss"
    ):
        load_model(tmp_path)


def test_a_tokenizer_that_is_larger_than_the_model_is_an_error_at_load(config, tmp_path):
    SailVL(config).init_weights(0).save_pretrained(tmp_path)
    larger = Tokenizer(train_bpe(world.corpus(500), 430), "")
    assert len(larger) > config.text.vocab_size
    larger.save(tmp_path)
    with pytest.raises(ValueError, match=f"the tokenizer has {len(larger)} tokens, the model 448"):
        load_model(tmp_path)
