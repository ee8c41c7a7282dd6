"""Judges: noise is what its label says, a filter keeps what it should, and a table counts right."""

import json
import random
from collections import Counter
from itertools import islice

import pytest
from PIL import Image

from claims.judges import JudgesClaimOptions, claim_judges
from claims.titles import LABELS
from curation.judges import (
    QUESTIONS,
    AnnotateOptions,
    FilterOptions,
    MeasureOptions,
    Repeated,
    Tally,
    Uniform,
    UniformOptions,
    annotate_captions,
    filter_captions,
    measure_judges,
    read_reply,
    read_whole,
    remember,
    uniform_captions,
)
from curation.noise import (
    NOISE,
    SPOILED,
    NoiseOptions,
    alignment,
    check_of,
    noisy_samples,
    richness,
    write_noisy,
)
from curation.oracle import Oracle
from curation.pipeline import Item
from curation.requests import PROMPTS, Prompts, Request, Response
from data.sample import Message, Sample
from data.world import KINDS, scene
from tools.clipart import SHARE, ClipartOptions, write_clipart

TOY_PROMPTS = PROMPTS / "toy"
SCENE = "northwest red circle, southeast blue cross"


@pytest.mark.parametrize(
    "caption, vir, ita",
    [
        (SCENE, 5, 5),
        ("northwest green circle, southeast blue cross", 5, 2),
        ("northwest green circle, southeast black cross", 5, 1),
        (f"{SCENE}, northeast red cross", 5, 2),
        ("northwest red circle, blue cross", 4, 4),
        ("northwest red circle", 3, 3),
        ("northwest red circle, northwest red circle", 3, 2),
        ("circle", 2, 2),
        ("picture", 1, 1),
        ("wnhrtotse dre", 1, 1),
        ("text A1X", 3, 1),
    ],
)
def test_scores_are_what_the_rule_says(caption, vir, ita):
    assert (richness(caption, SCENE), alignment(caption, SCENE)) == (vir, ita)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "video"])
def test_noise_does_what_its_name_says(kind):
    rng = random.Random(0)
    for _ in range(60):
        words = scene(kind, rng, test=False).words()
        spoiled = {name: spoil(words, rng) for name, spoil in SPOILED.items()}

        # An untruth costs alignment alone, something left out costs both the same
        assert (richness(words, words), alignment(words, words)) == (5, 5)
        assert alignment(spoiled["attribute"], words) < 3 <= richness(spoiled["attribute"], words)
        assert alignment(spoiled["object"], words) == 2
        assert richness(spoiled["object"], words) == 5
        left = spoiled["omission"]
        assert 2 <= alignment(left, words) == richness(left, words) <= 4
        assert richness(spoiled["gibberish"], words) == alignment(spoiled["gibberish"], words) == 1
        assert alignment(spoiled["short"], words) == richness(spoiled["short"], words) < 3


@pytest.mark.parametrize(
    "caption, checked",
    [
        (SCENE, SCENE),
        ("northwest green circle", "northwest green no circle"),
        ("red circle, red circle", "red circle, red no circle"),
        ("circle, northeast red cross", "circle, northeast no red cross"),
        ("text A1X", "text no A1X"),
        ("wnhr tse", "wnhr no tse"),
    ],
)
def test_a_check_marks_where_a_phrase_begins_to_be_false(caption, checked):
    assert check_of(caption, SCENE) == f"{SCENE}; {checked}"


def test_noisy_samples_are_the_same_for_the_same_seed():
    first = list(islice(noisy_samples(3, rate=0.7), 120))
    again = list(islice(noisy_samples(3, rate=0.7), 120))
    assert [s.messages[-1] for s in first] == [s.messages[-1] for s in again]

    # All kinds come, at about the rate that was asked for
    kinds = Counter(sample.facts["noise"] for sample in first)
    assert set(kinds) == {"none", *NOISE}
    assert 0.15 < kinds["none"] / 120 < 0.45


@pytest.mark.parametrize(
    "question, text, said",
    [
        ("vir", "4", 4),
        ("vir", 'Sure:\n```json\n{"score": 2}\n```', 2),
        ("ita", "Score: 3/5.", 3),
        ("ita", '{"score": "high"}', None),
        ("ita", '{"score": 7}', None),
        ("ita", '{"score": true}', None),
        ("ita", "between 3 and 4", None),
        ("ita", "I cannot see pictures.", None),
        ("ita_yesno", "Yes, it does.", "yes"),
        ("ita_yesno", "no", "no"),
        ("vir_yesno", '{"answer": "No"}', "no"),
        ("vir_yesno", "red circle", None),
        ("vir_yesno", None, None),
    ],
)
def test_a_reply_is_read_or_is_none(question, text, said):
    assert read_reply(question, Response(text)) == said


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """200 captions of the drawn world, half of them spoiled."""
    path = tmp_path_factory.mktemp("captions") / "noisy.jsonl"
    write_noisy(NoiseOptions(path, samples=200, rate=0.6))
    return path


def ask_oracle(options, noise=0.0):
    options.annotator.oracle = True
    options.annotator.noise = noise
    return options


def test_the_filter_keeps_what_scores_three_in_both(captions, tmp_path):
    out = tmp_path / "kept.jsonl"
    filter_captions(ask_oracle(FilterOptions(captions, out)))

    # In the order in which they came, all that should be kept and nothing else
    good = [s.messages for s in read_whole(captions) if min(s.facts["vir"], s.facts["ita"]) >= 3]
    kept = list(read_whole(out))
    assert [sample.messages[-1] for sample in kept] == [messages[-1] for messages in good]
    assert all(sample.facts["judge_ita_yesno"] == "yes" for sample in kept)

    # And why the others went
    lines = out.with_suffix(".history.jsonl").read_text().splitlines()
    ends = [json.loads(line)["history"][-1] for line in lines]
    dropped = {end["why"].split(":")[0] for end in ends if end["did"] == "dropped"}
    assert dropped == {"vir below 3", "ita below 3"}


def test_scored_captions_become_uniform_questions(captions, tmp_path):
    scored = tmp_path / "scored.jsonl"
    annotate_captions(ask_oracle(AnnotateOptions(captions, scored)))
    out = tmp_path / "train.jsonl"
    options = UniformOptions(scored, out, dimension="vir", train="yesno", prompts=TOY_PROMPTS)
    uniform_captions(options)
    rows = list(read_whole(out))

    # As many of each score, asked as the judge will be
    by_score = Counter(row.facts["vir"] for row in rows)
    assert set(by_score) == {1, 2, 3, 4, 5}
    assert len(set(by_score.values())) == 1
    for row in rows:
        assert row.messages[-1].parts == ("yes" if row.facts["vir"] >= 3 else "no",)
        assert row.messages[0].parts[-1].startswith("\nmuch? ")


def test_uniform_takes_no_more_than_it_is_told_and_drops_what_has_no_score():
    scores = [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, None, 9]
    items = []
    for index, score in enumerate(scores):
        facts = {"ita": score} if score else {}
        items.append(Item(index, str(index), Sample((Message("assistant", ("x",)),), facts=facts)))
    Uniform("ita", size=7)(items)

    kept = Counter(item.sample.facts["ita"] for item in items if item.alive)
    assert kept == {1: 2, 2: 2, 3: 2}
    assert items[-2].history[-1].why.startswith("no score")
    assert items[-1].history[-1].why.startswith("no score")


def test_what_a_server_left_out_is_no_judgement():
    """Measured as unreadable, a server that was down would be a judge that drops everything."""
    item = Item(0, "x", Sample((Message("assistant", ("x",)),)))
    remember(item, "ita", None, Response(None, "no reply: timeout"))
    assert not item.alive and item.history[-1].why == "no reply: timeout"
    read = Item(1, "y", Sample((Message("assistant", ("y",)),)))
    remember(read, "ita", None, Response("perhaps"))
    assert read.alive and read.sample.facts["judge_ita"] is None


def test_a_chain_without_a_lesson_to_say_it_in_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give --train with them"):
        uniform_captions(UniformOptions(tmp_path / "a.jsonl", tmp_path / "b.jsonl", chain="chain"))


def test_a_caption_of_many_pictures_describes_none():
    titles = ["gramastar"] * 3 + ["Winter Hat", "Pear", "Pear"]
    items = []
    for index, title in enumerate(titles):
        messages = (Message("user", ("?",)), Message("assistant", (title,)))
        items.append(Item(index, str(index), Sample(messages)))
    Repeated(2)(items)
    assert [item.alive for item in items] == [False] * 3 + [True] * 3


def test_a_judge_may_say_first_what_it_sees(captions, tmp_path):
    out = tmp_path / "train.jsonl"
    options = UniformOptions(captions, out, train="score", prompts=TOY_PROMPTS, chain="words")
    uniform_captions(options)
    for row in read_whole(out):
        assert row.messages[-1].think == row.facts["words"]

    # And its chain is no part of what is read
    assert read_reply("ita", Response("<think>red dots 4</think>2")) == 2


def test_precision_and_recall_are_those_of_what_is_dropped():
    tally = Tally()
    for said, score in [(1, 1), (2, 2), ("no", 2), (4, 1), (2, 5), (3, 3), ("yes", 4), (None, 5)]:
        tally.add(said, score)

    # Of five that were dropped three should be, and one that should be was not
    assert tally.dropping == (3 / 5, 3 / 4)
    assert tally.keeping == (2 / 3, 2 / 4)
    assert (tally.captions, tally.unread) == (8, 1)


def test_a_table_says_how_good_a_judge_is(captions, tmp_path, capsys):
    out = tmp_path / "measured.jsonl"
    measure_judges(ask_oracle(MeasureOptions(captions, out), noise=0.2))
    numbers = json.loads(out.with_suffix(".table.json").read_text())

    # A verdict of the oracle is wrong one time in five; kinds of noise add up to all captions
    tally = Tally(**numbers["ita_yesno"]["all"])
    assert tally.captions == 200
    assert 0.08 < (tally.missed + tally.lost) / 200 < 0.32
    kinds = [Tally(**of_kind) for kind, of_kind in numbers["ita"].items() if kind != "all"]
    assert sum(kind.captions for kind in kinds) == 200
    precision, recall = tally.dropping
    assert f"| ita_yesno | {precision:.3f} | {recall:.3f} |" in capsys.readouterr().out


def test_what_cannot_be_read_is_counted_in_the_table(captions, tmp_path, monkeypatch):
    monkeypatch.setattr(Oracle, "say_ita", lambda self, request, words: "it is a nice picture")
    out = tmp_path / "measured.jsonl"
    measure_judges(ask_oracle(MeasureOptions(captions, out, ask=("ita",))))
    tally = Tally(**json.loads(out.with_suffix(".table.json").read_text())["ita"]["all"])
    assert (tally.unread, tally.missed, tally.kept) == (200, 0, 0)


def test_captions_without_truth_measure_nobody(tmp_path):
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]}
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="no truth"):
        measure_judges(ask_oracle(MeasureOptions(path, tmp_path / "out.jsonl")))


def test_an_unknown_question_is_an_error(captions, tmp_path):
    options = FilterOptions(captions, tmp_path / "out.jsonl", ask=("beauty",))
    with pytest.raises(ValueError, match="no question beauty: choose from vir, ita"):
        filter_captions(ask_oracle(options))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("folder", [None, TOY_PROMPTS])
def test_every_question_has_prompts_for_large_and_small_models(question, folder):
    asked = Prompts(folder).text(Request(question, {"caption": SCENE}))
    assert SCENE in asked
    assert (len(asked) < 80) == (folder is not None)


@pytest.mark.slow
def test_the_claim_runs_from_noise_to_table_and_not_twice(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "start")
    tokenizer.save(tmp_path / "start")
    options = JudgesClaimOptions(
        tmp_path / "start", tmp_path / "out", seeds=1, steps=4, pool=250, tested=40
    )
    claim_judges(options)
    table = (tmp_path / "out" / "table.md").read_text()
    for question in QUESTIONS:
        assert f"| {question} |" in table
    assert (tmp_path / "out" / "seed-0" / "judge" / "model.safetensors").is_file()

    # Finished seeds are read again
    before = (tmp_path / "out" / "seed-0" / "numbers.json").stat().st_mtime_ns
    claim_judges(options)
    assert (tmp_path / "out" / "seed-0" / "numbers.json").stat().st_mtime_ns == before


SVG = """<svg><metadata><cc:Work rdf:about=""><dc:title>{title}</dc:title><rdf:li>stars</rdf:li>
<rdf:li>hash(0x8a09834)</rdf:li></cc:Work></metadata></svg>"""


def test_clipart_pairs_pictures_with_their_titles(tmp_path):
    packages = tmp_path / "packages"
    titles = {
        "a/star": "Fish &amp;\n chips",
        "a/untitled": "",
        "b/broken": "broken",
        "b/alone": "alone",
    }
    for name, title in titles.items():
        drawn = packages / SHARE / "svg" / f"{name}.svg"
        drawn.parent.mkdir(parents=True, exist_ok=True)
        drawn.write_text(SVG.format(title=title))
        picture = packages / SHARE / "png" / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (300, 100)).save(picture)
    (packages / SHARE / "png" / "b" / "broken.png").write_bytes(b"no picture")
    (packages / SHARE / "png" / "b" / "alone.png").unlink()

    # What has no title, no picture or a broken one is left out
    write_clipart(ClipartOptions(tmp_path / "out", packages, side=60))
    (row,) = read_whole(tmp_path / "out" / "titles.jsonl")
    assert row.messages[-1].parts == ("Fish & chips",)
    assert (row.facts["keywords"], row.facts["folder"]) == (["stars"], "a")
    with Image.open(tmp_path / "out" / "images" / "a" / "star.png") as picture:
        assert (picture.size, picture.getpixel((0, 0))) == ((60, 20), (255, 255, 255))


def test_titles_of_clipart_have_a_hundred_labels():
    scores = json.loads(LABELS.read_text())["ita"]
    assert len(scores) == 100
    assert set(scores.values()) == {1, 2, 3, 4, 5}
