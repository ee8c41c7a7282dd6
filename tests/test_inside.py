"""Seeing inside: the weights that are shown are those that the model used, every cell is where it says."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import EVERY
from PIL import Image

from attention import Segments, packed_attention, share_heads
from data import world
from data.encode import Encoder
from data.images import normalise
from data.sample import Message, Sample, Video
from evaluate import Graded
from generate import GenerateOptions, answer_prompt, generate
from infra.cli import one_line_errors
from moe import Decisions
from recipe import Setup
from talk.inside import (
    Onlooker,
    attention_weights,
    expert_shares,
    look_inside,
    picture_cuts,
    row_among_samples,
    visual_places,
)
from talk.page import inside_lines, inside_page, inside_picture, veil, view_of, write_view
from tools.ladder import looked_into
from tools.report import write_report
from vlm import PRESETS, SailVL

NEVER = 10**6  # an end token that no vocabulary has


@pytest.fixture
def model(model):
    return model.eval()


@pytest.fixture
def sparse(config, tokenizer):
    """The small model with experts."""
    text = PRESETS["toy-moe"].text
    text = replace(text, vocab_size=448, num_hidden_layers=2)
    return SailVL(replace(config, text=text)).init_weights(0).eval()


@pytest.fixture(scope="module")
def asked() -> Sample:
    """A question about a picture, unanswered."""
    drawn = world.sample(3, 0, {"counting": 1.0}, turns=1)
    return replace(drawn, messages=drawn.messages[:1])


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# ----------------------------------------------------------------------------------------- attention


def test_the_weights_sum_to_one_and_make_the_models_own_output(model, encoder):
    seen = []

    def attend(layer, q, k, v):
        out = packed_attention(q, k, v, segments, causal=True)
        seen.append((q, k, v, out))
        return out

    for i in range(4):
        ids, images = encoder.prompt(world.sample(i, 0, EVERY))
        segments = Segments.of([len(ids)])
        pixels = normalise(images) if images else None
        with torch.no_grad():
            model.hidden(torch.tensor([ids]), pixels, attend=attend)
    assert len(seen) == 4 * len(model.language_model.model.layers)

    for q, k, v, out in seen:
        S, heads, _ = q.shape
        weights = attention_weights(q, k, torch.arange(S))  # (H, S, S)
        assert torch.allclose(weights.sum(-1), torch.ones(heads, S), atol=1e-5)
        assert float(weights.triu(1).abs().max()) == 0  # nothing that comes later
        _, values = share_heads(k, v, heads, dim=1)
        made = torch.einsum("hst,thd->shd", weights, values)
        assert float((made - out).abs().max()) < 1e-5

        # some rows alone are those rows
        few = torch.tensor([0, S // 2, S - 1])
        assert torch.equal(attention_weights(q, k, few), weights[:, few])


def test_being_watched_changes_nothing(model, encoder, asked):
    ids, images = encoder.prompt(asked)
    row = torch.tensor([ids])
    watch = Onlooker(Segments.of([len(ids)]), torch.arange(len(ids)))
    with torch.no_grad():
        plain = model.hidden(row, normalise(images))
        watched = model.hidden(row, normalise(images), attend=watch)
    assert torch.equal(plain, watched)
    assert len(watch.weights) == len(model.language_model.model.layers)


def test_chances_and_entropies_are_those_of_the_answer(model, encoder, asked):
    prompt = encoder.prompt(asked)
    answer = generate(model, [prompt], NEVER, max_new=7)[0]
    inside = look_inside(model, prompt, answer.ids)
    wanted = torch.tensor(answer.logprobs).exp()
    assert torch.allclose(inside.chance, wanted, atol=1e-5)
    assert inside.likeliest[:, 0].tolist() == answer.ids  # greedy
    assert torch.allclose(inside.chances[:, 0], inside.chance)

    with torch.no_grad():
        row = torch.tensor([prompt[0] + answer.ids[:-1]])
        chances = model(row, normalise(prompt[1]))[0, len(prompt[0]) - 1 :].softmax(-1)
    entropy = -(chances * chances.log()).sum(-1)
    assert torch.allclose(inside.entropy, entropy, atol=1e-4)

    # (L, n, S): the row of a token is that of the position before it
    assert inside.attention.shape == (2, 7, len(prompt[0]) + 6)
    assert torch.allclose(inside.attention.sum(-1), torch.ones(2, 7), atol=1e-5)
    assert float(inside.attention[:, 0, len(prompt[0]) :].abs().max()) == 0
    assert float(inside.attention[:, 0, len(prompt[0]) - 1].min()) > 0


def test_experts_are_those_that_the_tokens_took(sparse, encoder, asked):
    prompt = encoder.prompt(asked)
    answer = generate(sparse, [prompt], NEVER, max_new=5)[0].ids
    inside = look_inside(sparse, prompt, answer)
    routing = Decisions()
    with torch.no_grad():
        sparse.hidden(inside.ids[None], normalise(prompt[1]), routing=routing)
    for own, layer in zip(inside.experts, routing, strict=True):
        assert torch.equal(own, layer.indices)

    shares = expert_shares(inside, inside.places)
    assert shares.shape == (2, 8)
    assert torch.allclose(shares.sum(1), torch.ones(2))
    first = inside.experts[0, inside.places].flatten().tolist()
    assert float(shares[0, 3]) == pytest.approx(first.count(3) / len(first))


def test_an_answer_without_tokens_is_an_error(model, encoder, asked):
    with pytest.raises(ValueError, match="no tokens"):
        look_inside(model, encoder.prompt(asked), [])


# -------------------------------------------------------------------------------------------- pictures

CONFIGS = {
    "one tile": {},
    "tiles": {"max_tiles": 6},
    "no thumbnail": {"max_tiles": 6, "thumbnail": False},
    "second pass": {"max_tiles": 6, "msac": True},
    "any resolution": {"any_resolution": True},
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("sizes", [[(96, 64)], [(33, 30)], [(200, 30), (64, 64)]])
def test_every_cell_shows_the_pixels_of_its_visual_token(kind, sizes, config, tokenizer):
    encoder = Encoder(tokenizer, replace(config, **CONFIGS[kind]))
    pictures = [noise(*size) for size in sizes]
    sample = Sample((Message("user", (*pictures, "\nwhat?")),))
    tiles, counts = encoder.images(sample)
    cuts = picture_cuts(encoder, sample)
    assert [cut.picture for cut in cuts] == pictures

    # the pixels of each visual token, in order, as the adapter gets them
    unit = 2 * config.vision.patch_size
    blocks = []
    for tile in tiles:
        for top in range(0, tile.shape[0], unit):
            for left in range(0, tile.shape[1], unit):
                blocks.append(tile[top : top + unit, left : left + unit])

    # a sheet is its picture, resized: no tile stands in another's place
    for cut in cuts:
        for sheet in cut.sheets:
            height, width = sheet.pixels.shape[:2]
            assert np.array_equal(sheet.pixels, np.asarray(cut.picture.resize((width, height))))

    shown = set()
    for sheet in (sheet for cut in cuts for sheet in cut.sheets):
        for (row, column), number in np.ndenumerate(sheet.cells):
            top, left = row * unit, column * unit
            here = sheet.pixels[top : top + unit, left : left + unit]
            assert np.array_equal(here, blocks[number])
            shown.add(int(number))
    assert shown == set(range(sum(counts)))


def test_what_became_of_a_picture_is_said_in_words(config, tokenizer):
    def note(width, height, **how) -> str:
        encoder = Encoder(tokenizer, replace(config, **how))
        sample = Sample((Message("user", (noise(width, height), "\nwhat?")),))
        return picture_cuts(encoder, sample)[0].note

    assert note(32, 32) == "32 x 32 pixels, as it is: 4 visual tokens"
    assert note(90, 40) == "90 x 40 pixels, resized to 32 x 32: 4 visual tokens"
    tiled = "96 x 64 pixels, 3 x 2 tiles + the whole picture, small: 7 of 32 x 32, 28 visual tokens"
    assert note(96, 64, max_tiles=6) == tiled
    whole = note(95, 64, any_resolution=True)
    assert whole == "95 x 64 pixels, resized to 96 x 64: 24 visual tokens"


def test_frames_of_a_video_are_pictures_of_their_own(encoder):
    video = Video(tuple(noise(32, 32) for _ in range(3)), sampling="even")
    cuts = picture_cuts(encoder, Sample((Message("user", (video, "which way?")),)))
    assert [cut.sheets[0].cells.tolist() for cut in cuts] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 9], [10, 11]],
    ]


# ----------------------------------------------------------------------------------------------- the row


def test_the_row_holds_the_conversation_first_and_is_full(model, encoder, asked):
    prompt = encoder.prompt(asked)
    answer = generate(model, [prompt], NEVER, max_new=4)[0].ids
    inside = look_inside(model, prompt, answer)
    row = row_among_samples(encoder, inside, prompt[1])
    assert row[0].task == "this"
    assert row[0].ids.tolist() == prompt[0] + answer
    supervised = row[0].labels[row[0].labels >= 0]
    assert supervised.tolist() == answer
    assert 480 < sum(map(len, row)) <= 512
    assert any(document.images for document in row[1:])


# ---------------------------------------------------------------------------------------------- the page


@pytest.fixture
def view(sparse, encoder, asked):
    answer = generate(sparse, [encoder.prompt(asked)], NEVER, max_new=5)[0].ids
    return view_of(sparse, encoder, asked, answer)


def test_the_page_stands_alone_and_has_a_card_for_each_token(view):
    page = inside_page(view, "<b>how many?\x1b[2J")
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    assert re.search(r"default-src 'none'", page)
    assert "<b>how many" not in page and "&lt;b&gt;how many?\\x1b[2J" in page
    assert page.count('class="token"') == 5 + 1  # and the whole answer
    assert page.count("layer by layer") == 5
    assert "In a row" in page and "Experts" in page
    assert inside_page(view, "q") == inside_page(view, "q")


def test_the_brightest_cell_is_the_one_that_was_looked_at_most(view):
    sheet = view.sheets[0]
    paid = view.by_cell[:, 0].mean(0).numpy()
    cover = np.asarray(veil(paid[sheet.cells], float(paid.max())))  # (rows, columns, LA)
    brightest = sheet.cells.ravel()[cover[:, :, 1].argmin()]
    assert brightest == paid.argmax() and cover[:, :, 1].min() == 0
    row, column = np.argwhere(sheet.cells == brightest)[0] + 1
    assert f"1: row {row}, col {column}" in inside_lines(view)[1]


def test_shares_are_the_attention_that_pictures_get(view):
    places = visual_places(view.inside, view.tokenizer.image)
    assert len(places) == 4
    direct = view.inside.attention[:, :, places].sum(-1).mean(0)
    assert torch.allclose(view.shares, direct)
    assert len(inside_lines(view)) == 1 + 5


def test_an_answer_about_no_picture_has_a_page_too(model, encoder, tmp_path):
    sample = Sample((Message("user", ("how many?",)),))
    answer = generate(model, [encoder.prompt(sample)], NEVER, max_new=3)[0].ids
    view = view_of(model, encoder, sample, answer)
    page = inside_page(view, "how many?")
    assert page.count('class="token"') == 3
    assert "How the pictures were cut" not in page and "Experts" not in page
    assert len(inside_lines(view)) == 4
    assert inside_picture(view, "how many?").width >= 300


def test_a_page_or_a_picture_by_the_files_ending(view, tmp_path):
    write_view(tmp_path / "new" / "a.html", view, "how many?")
    assert (tmp_path / "new" / "a.html").read_text().startswith("<!doctype html>")
    write_view(tmp_path / "a.PNG", view, "how many?")
    with Image.open(tmp_path / "a.PNG") as picture:
        assert picture.width == 5 * 150
    with pytest.raises(
        ValueError, match=r"a.txt: where it looked is a page \(.html\) or a picture"
    ):
        write_view(tmp_path / "a.txt", view, "how many?")


def test_the_ladders_page_has_the_first_answer_of_a_few_families(sparse, encoder, tmp_path):
    graded = []
    for family in ("text", "counting", "counting", "reading", "odd", "video"):
        sample = world.sample(1, 0, {family: 1.0}, turns=1)
        graded.append(Graded(family, "<q>", "", "", 1.0, sample))
    looked, style = looked_into(Setup(sparse, encoder, world.World()), graded)
    titles = re.findall(r"<h3>(\w+): &lt;q&gt;</h3>", looked)
    assert titles == ["counting", "reading", "odd"]
    for number in range(3):
        assert f".looked{number}-0 {{" in style and f'"sheet looked{number}-0"' in looked

    results = {"title": "", "final": {}, "stages": []}
    page = tmp_path / "report.html"
    write_report(page, results, {}, [], [], {}, {}, looked=looked, style=style)
    assert "Where it looked" in page.read_text()
    write_report(page, results, {}, [], [], {}, {})
    assert "Where it looked" not in page.read_text()


def test_generate_shows_what_it_answered(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    noise(32, 32).save(tmp_path / "a.png")
    how = {"prompt": "what?", "model": tmp_path, "image": (tmp_path / "a.png",), "max_new": 4}
    answer_prompt(GenerateOptions(**how))
    plain = capsys.readouterr().out
    answer_prompt(GenerateOptions(**how, show=tmp_path / "a.html"))
    shown = capsys.readouterr()
    assert shown.out == plain and "where it looked: " in shown.err
    assert (tmp_path / "a.html").read_text().count('class="token"') == 5

    wrong = {
        "a.jpg: where it looked is a page": {"show": tmp_path / "a.jpg"},
        "--show looks into one answer": {"show": tmp_path / "a.html", "samples": 2},
    }
    for message, more in wrong.items():
        with pytest.raises(SystemExit), one_line_errors():
            answer_prompt(GenerateOptions(**how, **more))
        assert message in capsys.readouterr().err
