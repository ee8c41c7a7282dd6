"""Latent classes, video scores, ratings, long chains: replies of all kinds, files through each command."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from curation import classes, long_cot, ratings, video_scores
from curation.annotators import AnnotatorOptions
from curation.classes import entropy_of, even_quotas, kmeans, purity_of
from curation.long_cot import chain_and_answer, overlap_of, without_hints
from curation.oracle import Oracle
from curation.pipeline import Item, Passed
from curation.questions import Scale, refuses, scores_in, words_in
from curation.requests import Response
from curation.rows import write_rows
from data import world
from data.readers import Folder
from data.sample import BadSample, Faults, Message, Sample, Video

ORACLE = AnnotatorOptions(oracle=True)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Commands choose their threads; in the suite, which runs beside others, they keep to one."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


class Says:
    """An annotator that always says the same, and remembers what it was asked."""

    name = "says"

    def __init__(self, *texts):
        self.texts = texts
        self.asked = []

    def annotate(self, requests):
        self.asked += requests
        return [Response(self.texts[i % len(self.texts)], "gone") for i in range(len(requests))]

    def report(self):
        return "says"


def item_for(sample, index=0):
    return Item(index, sample.origin, sample)


def drawn(family, n=1, **changes):
    return [replace(world.sample(i, 0, {family: 1.0}, turns=1), **changes) for i in range(n)]


def written(path, samples):
    faults = Faults()
    assert write_rows(path, [(sample, {}) for sample in samples], faults) == len(samples)
    return path


def history(out):
    return [json.loads(line) for line in out.with_suffix(".history.jsonl").read_text().splitlines()]


def why_dropped(out):
    """The class of each dropped record's reason, by index."""
    lines = [line for line in history(out) if not line["kept"]]
    return {line["index"]: line["history"][-1]["why"].split(": ")[0] for line in lines}


# ---------------------------------------------------------------------------------------- replies

THREE = {name: Scale(1, 5) for name in ("a", "b", "c")}


@pytest.mark.parametrize(
    "reply",
    [
        '{"a": 3, "b": 2, "c": 5}',
        'Sure! ```json\n{"a": "3", "B": 2.0, " c ": "5/5"}\n``` Anything else?',
        '{"c": "5 / 5", "b": "2", "a": "3.0", "why": {"deep": [1]}}',
        '我的评分：{"a": "３", "b": 2, "c": 5}',
    ],
)
def test_scores_are_read_whatever_stands_around_them(reply):
    assert scores_in(reply, THREE) == {"a": 3, "b": 2, "c": 5}


@pytest.mark.parametrize(
    "reply, reason",
    [
        ("", "no scores"),
        ("I would say three, two and five.", "no scores"),
        ("[3, 2, 5]", "no scores"),
        ('{"a": 3, "b": 2, "c": ', "no scores"),
        ("[" * 5000, "no scores"),
        ('{"a":' * 3000, "no scores"),
        ("I'm sorry, but I can't rate this picture.", "refused"),
        ("抱歉，我无法评价这张图片。", "refused"),
        ("对不起", "refused"),
        ('{"a": 3, "b": 2}', "not a score"),
        ('{"a": 3, "b": 2, "c": null}', "not a score"),
        ('{"a": 3, "b": 2, "c": true}', "not a score"),
        ('{"a": 3, "b": 2, "c": [5]}', "not a score"),
        ('{"a": 3, "b": 2, "c": "high"}', "not a score"),
        ('{"a": 3, "b": 2, "c": 4.5}', "not a score"),
        ('{"a": 3, "b": 2, "c": NaN}', "no scores"),
        ('{"a": 3, "b": 2, "c": 1e999}', "no scores"),
        ('{"a": 3, "b": 2, "c": 10000000000000000000000}', "not a score"),
        ('{"a": 3, "b": 2, "c": "5/10"}', "another scale"),
        ('{"a": 3, "b": 2, "c": 0}', "off the scale"),
        ('{"a": 3, "b": 2, "c": 6}', "off the scale"),
        ('{"a": 3, "b": 2, "c": "-1"}', "off the scale"),
    ],
)
def test_what_is_no_score_has_a_class(reply, reason):
    with pytest.raises(BadSample) as error:
        scores_in(reply, THREE)
    assert error.value.reason == reason


def test_refusals_are_told_from_answers():
    refusals = (
        "I cannot help with that.",
        "**Sorry**, no.",
        "As an AI model, I",
        "无法回答",
        "I am unable to",
    )
    answers = (
        "I can see a cat.",
        "the sorry state of it",
        "cannot",
        "can",
        "不是",
        "3",
        "unfortunate",
    )
    assert all(map(refuses, refusals))
    assert not any(map(refuses, answers))
    assert words_in(' "a phrase" ', 20) == "a phrase"
    with pytest.raises(BadSample, match="long reply"):
        words_in("x" * 21, 20)


def test_a_reply_costs_its_own_sample_alone():
    """No answer, a refusal, nonsense and scores among each other: each item has its own mark."""
    good = '{"complexity": 2, "challenge": 1, "relevance": 5}'
    replies = Says(None, "I'm sorry.", "x\x1b[2J", good)
    items = [item_for(sample, i) for i, sample in enumerate(drawn("counting", 4))]
    ratings.Rated(replies)(items)
    assert [item.history[-1].why.split(": ")[0] for item in items[:3]] == [
        "no answer",
        "refused",
        "no scores",
    ]
    assert items[3].alive and items[3].sample.facts["relevance"] == 5
    assert all("\x1b" not in item.history[-1].why for item in items)


def test_a_sample_that_a_server_left_out_is_one_that_the_next_run_asks_about():
    """Its history begins as `Passed.unanswered` knows it; what would fail again begins otherwise."""

    class Silent:
        name = "silent"

        def annotate(self, requests):
            return [Response(None, "no reply: timeout"), Response(None, "no end within 8 tokens")]

    items = [item_for(sample, i) for i, sample in enumerate(drawn("counting", 2))]
    ratings.Rated(Silent())(items)
    passed = [Passed(item.index, item.origin, item.history, None) for item in items]
    assert [one.unanswered for one in passed] == [True, False]
    assert items[1].history[-1].why.startswith("no answer: no end")


# ---------------------------------------------------------------------------------------- ratings


def test_a_file_is_rated_and_files_are_compared(tmp_path, capsys):
    for name, family in (("easy", "attributes"), ("harder", "charts")):
        data = written(tmp_path / f"{name}.jsonl", drawn(family, 12))
        options = ratings.RateOptions(data, tmp_path / f"rated-{name}.jsonl", annotator=ORACLE)
        ratings.rate_file(options)
    capsys.readouterr()
    ratings.ratings_command(
        ratings.RatingTableOptions((tmp_path / "rated-easy.jsonl", tmp_path / "rated-harder.jsonl"))
    )
    table = capsys.readouterr().out.splitlines()
    easy, harder = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[2:]]
    assert easy[:2] == ["rated-easy", "12"] and easy[4] == "5.00 ± 0.00"
    assert float(easy[2].split()[0]) < float(harder[2].split()[0])
    with pytest.raises(ValueError, match="no rated sample"):
        ratings.ratings_of(tmp_path / "easy.jsonl")


def test_what_is_rated_low_is_dropped_and_an_unknown_rating_is_an_error(tmp_path):
    wrong = replace(drawn("counting")[0], origin="wrong")
    wrong = replace(wrong, messages=(wrong.messages[0], Message("assistant", ("9",))))
    data = written(tmp_path / "a.jsonl", [*drawn("counting", 3), wrong])
    options = ratings.RateOptions(
        data, tmp_path / "out.jsonl", annotator=ORACLE, least={"relevance": 3}
    )
    ratings.rate_file(options)
    assert why_dropped(options.out) == {3: "below 3"}
    with pytest.raises(ValueError, match="--least beauty: choose from complexity"):
        ratings.rate_file(replace(options, least={"beauty": 3.0}))


# ----------------------------------------------------------------------------------------- videos


def frames(number):
    return tuple(Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(number))


def video(number=20):
    question = Message("user", (Video(frames(number)), "which way does it move?"))
    facts = {"answer": "up", "words": "northwest red cross, southwest red cross"}
    return Sample((question, Message("assistant", ("up",))), origin="v:1", facts=facts)


def test_sixteen_frames_are_shown_and_minus_one_is_a_refusal():
    replies = Says('{"alignment": 8, "richness": -1, "difficulty": 4}')
    item = item_for(video())
    video_scores.VideoScored(replies)([item])
    assert len(replies.asked[0].pictures) == 16
    reds = [picture.getpixel((0, 0))[0] for picture in replies.asked[0].pictures]
    assert reds == sorted(set(reds))
    assert item.history[-1].why == "refused: alignment 8, richness -1, difficulty 4"


def test_one_picture_is_no_video():
    item = item_for(drawn("counting")[0])
    video_scores.VideoScored(Says("never asked"))([item])
    assert item.history[-1].why.startswith("no video: ")


def test_the_funnel_has_a_line_for_each_threshold(tmp_path, capsys):
    moving = [replace(sample, task="video") for sample in drawn("video", 6)]
    wrong = replace(moving[0], messages=(moving[0].messages[0], Message("assistant", ("nowhere",))))
    still = replace(moving[1], facts=moving[1].facts | {"words": "northwest red cross"})
    shape = moving[2].facts["words"].split(", ")[0].split()[2]
    easy = replace(
        moving[2],
        facts=moving[2].facts | {"answer": shape},
        messages=(moving[2].messages[0], Message("assistant", (shape,))),
    )
    data = written(tmp_path / "v.jsonl", [*moving, wrong, still, easy])
    options = video_scores.VideoScoreOptions(data, tmp_path / "kept.jsonl", annotator=ORACLE)
    video_scores.score_videos(options)
    funnel = capsys.readouterr().out
    lefts = [line.split()[:3] for line in funnel.splitlines() if ">=" in line]
    assert lefts == [["alignment", ">=", "5"], ["richness", ">=", "5"], ["difficulty", ">=", "3"]]
    assert why_dropped(options.out) == {6: "below 5", 7: "below 5", 8: "below 3"}
    with pytest.raises(ValueError, match="--richness 8: scores go from 0 to 7"):
        video_scores.score_videos(replace(options, richness=8))


# ---------------------------------------------------------------------------------------- classes


def blobs(sizes, seed=0):
    """Points around corners far from each other, and which corner each belongs to."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    centers = 10 * torch.eye(len(sizes), 8)
    return centers[labels] + torch.randn(len(labels), 8, generator=generator), labels.tolist()


def test_kmeans_finds_what_is_apart_and_repeats_itself():
    points, labels = blobs([200, 30, 5, 60])
    buckets, centers = kmeans(points, 4, seed=1)
    assert purity_of(buckets.tolist(), labels) == 1 and len(centers) == 4
    assert torch.equal(buckets, kmeans(points, 4, seed=1)[0])

    # The definition: nobody is nearer to another center, and centers are means
    distances = (points[:, None] - centers).square().sum(-1)
    assert torch.equal(distances.argmin(-1), buckets)
    for k in range(4):
        torch.testing.assert_close(centers[k], points[buckets == k].mean(0))


def test_kmeans_of_few_different_points_has_few_buckets():
    points = torch.tensor([[0.0, 1.0]] * 5 + [[3.0, 0.0]] * 2)
    buckets, centers = kmeans(points, 6)
    assert len(centers) == 2 and purity_of(buckets.tolist(), [0] * 5 + [1] * 2) == 1
    with pytest.raises(ValueError, match="at least one"):
        kmeans(points, 0)


def test_an_empty_bucket_takes_the_point_that_fits_worst():
    points = torch.tensor([[0.0], [1.0], [9.0]])
    buckets = torch.tensor([0, 0, 0])
    centers = classes.means_of_buckets(points, buckets, torch.tensor([1.0, 2.0, 30.0]), 2)
    assert centers[1].item() == 9


@pytest.mark.parametrize("sizes", [[5, 5, 5], [100, 3, 50], [1], [0, 7], [2, 2, 90, 1]])
def test_quotas_are_as_equal_as_sizes_allow(sizes):
    for total in range(sum(sizes) + 3):
        quotas = even_quotas(sizes, total)
        assert sum(quotas) == min(total, sum(sizes))
        assert all(0 <= quota <= size for quota, size in zip(quotas, sizes))
        # Whoever has less than another has given all that it has, but for the rest of a division
        most = max(quotas)
        assert all(q >= most - 1 or q == size for q, size in zip(quotas, sizes))


def test_phrases_have_vectors_that_their_neighbours_do_not_change(model, tokenizer):
    phrases = ["how many things", "box of the thing", "count of the dots or things"]
    together = classes.latents(model, tokenizer, phrases)
    alone = torch.cat([classes.latents(model, tokenizer, [phrase]) for phrase in phrases])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))

    # The mean of the last hidden states, in one direction
    ids = torch.tensor([tokenizer.encode(phrases[0])])
    mean = model.hidden(ids).mean(0)
    torch.testing.assert_close(together[0], mean / mean.norm())


def skewed():
    return [*drawn("counting", 40), *drawn("reading", 6), *drawn("odd", 4)]


def test_a_skewed_file_becomes_an_even_one(tmp_path, model, tokenizer, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    data = written(tmp_path / "skewed.jsonl", skewed())
    options = classes.ClassOptions(
        data,
        tmp_path / "even.jsonl",
        annotator=ORACLE,
        embedder=tmp_path / "model",
        buckets=12,
        share=0.4,
    )
    classes.balance_classes(options)
    kept = Folder(options.out).first()
    families = [sample.facts["family"] for sample in kept]
    assert len(kept) == 20
    assert entropy_of(families) > entropy_of([s.facts["family"] for s in skewed()]) + 0.3
    assert all(
        "phrase" in s.facts and "bucket" in s.facts and "latent" not in s.facts for s in kept
    )
    assert set(why_dropped(options.out).values()) == {"group is full"}

    # The same again, and the table
    rows = options.out.read_text()
    classes.balance_classes(options)
    assert options.out.read_text() == rows
    capsys.readouterr()
    classes.compare_classes(classes.ClassTableOptions((data, options.out)))
    before, after = capsys.readouterr().out.splitlines()[2:]
    assert before.endswith("| - | - | - |") and "| 20 | 3 |" in after


@pytest.mark.parametrize("reply", ["", "...", "I'm sorry, I can't.", "12345", "x" * 500, None])
def test_what_is_no_phrase_is_dropped(reply):
    item = item_for(drawn("counting")[0])
    classes.Phrased(Says(reply))([item])
    assert not item.alive


def test_without_an_embedder_or_a_share_it_says_what_to_name(tmp_path):
    data = written(tmp_path / "a.jsonl", drawn("counting", 2))
    options = classes.ClassOptions(data, tmp_path / "b.jsonl", annotator=ORACLE)
    with pytest.raises(ValueError, match="--embedder DIR"):
        classes.balance_classes(options)
    with pytest.raises(ValueError, match="a share of 2 to keep"):
        classes.balance_classes(replace(options, share=2.0))


def test_wrong_answers_are_replaced_and_a_worse_answer_is_taken_back(tmp_path):
    right = drawn("counting", 3)
    wrong = [replace(s, messages=(s.messages[0], Message("assistant", ("0",)))) for s in right]
    data = written(tmp_path / "a.jsonl", [*right, *wrong])
    options = classes.AgainOptions(data, tmp_path / "b.jsonl", annotator=ORACLE)
    classes.answer_again(options)
    kept = Folder(options.out).first()
    assert [s.messages[-1].parts[0] for s in kept] == [s.facts["answer"] for s in right + right]
    assert [s.facts["old_answer"] for s in kept[3:]] == ["0"] * 3

    ratings_of_old = {f"old_{name}": 4 for name in ratings.RATINGS}
    worse = ratings_of_old | dict.fromkeys(ratings.RATINGS, 3) | {"old_answer": "3"}
    item = item_for(replace(wrong[0], facts=worse))
    classes.NoWorse()([item])
    assert item.sample.messages[-1].parts == ("3",)
    assert item.sample.facts["relevance"] == 4 and item.history[-1].did == "changed"


# ----------------------------------------------------------------------------------- long chains


@pytest.mark.parametrize(
    "text, left",
    [
        ("How many dots? Please think step by step.", "How many dots?"),
        ("How many? think first.", "How many?"),
        ("Hint: count rows.\nQuestion: How many?", "How many?"),
        ("How many? Answer the question using a single word or phrase.", "How many?"),
        ("How many?\nPut your final answer within \\boxed{}.", "How many?"),
        ("How many? The final answer MUST BE put in \\boxed{}.", "How many?"),
        ("You are a helpful assistant. How many?", "How many?"),
        ("Let's think step by step. How long is 3.5 + 2?", "How long is 3.5 + 2?"),
        ("\nHow many? think first.", "\nHow many?"),
        ("\nQuestion: How many?", "\nHow many?"),
        ("有几个点？请一步一步思考。", "有几个点？"),
        ("有几个点？请把答案写在\\boxed{}中。", "有几个点？"),
        ("提示：数一数。\n有几个点？", "有几个点？"),
        ("题目：有几个点？", "有几个点？"),
    ],
)
def test_hints_go(text, left):
    assert without_hints(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "What is the hint: on the sign?",
        "Can you think of why it moves first?",
        "Solve 3x = 6. Give x.",
        "Note: the figure is not to scale. Find the area.",
        "You are given a triangle with sides 3, 4 and 5. Find its area.",
        "What should you answer directly?",
        "这个答案是什么？",
        "Write the number that comes next: 1, 2, 3.",
        "\nhow many?\n\n  x = 3\n",
    ],
)
def test_what_asks_stays(text):
    assert without_hints(text) == text


@pytest.mark.parametrize(
    "text, think, chain, answer",
    [
        ("\\boxed{3}", "one, two, three.", "one, two, three.", "3"),
        ("3", "one and two.", "one and two.", "3"),
        ("One. Two. So it is \\boxed{3}.", None, "One. Two.", "3"),
        ("One and two.\n#### 3", None, "One and two.", "3"),
        ("One and two. The answer is 3.", None, "One and two.", "3"),
        ("One and two.\n**Answer:** 3", None, "One and two.", "3"),
        ("一加二。因此，答案是3。", None, "一加二。", "3"),
        (
            "<SUMMARY>I count.</SUMMARY><CAPTION>Dots.</CAPTION><REASONING>One, two.</REASONING>"
            "<CONCLUSION>3</CONCLUSION>",
            None,
            "I count. Dots. One, two.",
            "3",
        ),
        (
            "<thinking>One.</thinking><answer>\\boxed{\\frac{1}{2}}</answer>",
            None,
            "One.",
            "\\frac{1}{2}",
        ),
        ("3", None, "", "3"),
        ("So it is \\boxed{3}", None, "", "3"),
        ("One. It is \\boxed{3}. Again, \\boxed{3}.", None, "One.", "3"),
        ("One. \\boxed{\\frac{1}{2}}, so \\boxed{\\frac{1}{2}}", None, "One.", "\\frac{1}{2}"),
        ("\\boxed{3}", "It is \\boxed{3}.", "It is 3.", "3"),
    ],
)
def test_every_spelling_becomes_a_chain_and_an_answer(text, think, chain, answer):
    assert chain_and_answer(text, think) == (chain, answer)


def test_hostile_texts_take_no_time():
    """Many characters of what patterns could try again and again."""
    for text in (
        "answer is" + " " * 20_000 + "\nx",
        "#### " * 5_000,
        "\n" * 20_000,
        "\\boxed{" * 5_000,
    ):
        chain_and_answer(text)
        without_hints(text)
        refuses(text)


def test_overlap_counts_the_chains_words():
    assert overlap_of("how many dots? 3.", "how many dots? 3") == 1
    assert overlap_of("row one has two, row two has one", "how many dots? 3") == 0
    assert overlap_of("", "x") == 0
    assert overlap_of("三个点", "几个点？") == pytest.approx(2 / 3)


def cot(question="how many things are there?", think=None, said="", **facts):
    base = drawn("counting")[0]
    known = base.facts | facts
    asked = Message("user", (base.messages[0].parts[0], "\n" + question))
    answer = Message("assistant", (said or f"\\boxed{{{known['answer']}}}",), think=think)
    return replace(base, messages=(asked, answer), facts=known)


def test_each_fault_of_a_chain_is_dropped_by_its_step_or_repaired(tmp_path, capsys):
    base = cot()
    truth, chain = base.facts["answer"], base.facts["chain"]
    system = replace(
        cot(think=chain), messages=(Message("system", ("Be good.",)), *cot(think=chain).messages)
    )
    question = "how many things are there?"
    samples = [
        cot(think=chain),
        system,
        cot(question=f"{question} Please think step by step."),
        cot(question="are there things? how many?", think=f"{question} {truth} things."),
        cot(question="and how many things?", think="1 southwest black dog.", said="\\boxed{9}"),
        cot(question="so how many things?", said="x " * 300),
        cot(question="Please think step by step."),
        cot(question="say how many things?", think="word " * 60 + truth),
        cot(question="count the things?", said=f"{chain} The answer is {truth}."),
        cot(question="the number?"),
    ]
    data = written(tmp_path / "raw.jsonl", samples)
    options = long_cot.LongCotOptions(data, tmp_path / "c.jsonl", annotator=ORACLE, share=1.0)
    long_cot.curate_chains(options)
    assert why_dropped(options.out) == {
        1: "duplicate",
        2: "duplicate",
        3: "redundant",
        4: "another answer",
        5: "essay for an answer",
        6: "no question",
        7: "loops",
    }

    kept = Folder(options.out).first()
    assert len(kept) == 3
    assert {s.messages[-1].think for s in kept} == {chain}
    assert {s.messages[-1].parts for s in kept} == {(f"\\boxed{{{truth}}}",)}
    assert "pixels" not in kept[0].facts
    lines = capsys.readouterr().out.splitlines()
    names = [
        "stripped",
        "one form",
        "pictures",
        "guided",
        "not redundant",
        "answer distilled",
        "checked",
    ]
    assert [line[:16].strip() for line in lines[2:9]] == names


@pytest.mark.parametrize(
    "said, reason",
    [
        ("It is \\boxed{3}, or \\boxed{4}.", "several boxes"),
        ("\\boxed{3", "no answer"),
        ("<answer></answer>", "no answer"),
        ("word " * 60, "essay for an answer"),
    ],
)
def test_what_has_no_one_answer_is_dropped(said, reason):
    item = item_for(cot(said=said))
    long_cot.Formed()([item])
    assert item.history[-1].why.split(": ")[0] == reason


@pytest.mark.parametrize(
    "reply", ["", "<think></think>", "I cannot help.", None, "作为一个人工智能，"]
)
def test_a_guide_that_says_nothing_costs_the_sample(reply):
    item = item_for(cot())
    long_cot.Guided(Says(reply), 1000)([item])
    assert not item.alive


def test_the_guide_is_told_the_answer_and_its_tags_and_boxes_go():
    item = item_for(cot())
    guide = Says("<think>I see two rows. It is \\boxed{2}.</think>")
    long_cot.Guided(guide, 1000)([item])
    assert guide.asked[0].fields["answer"] == item.sample.facts["answer"]
    assert item.sample.messages[-1].think == "I see two rows. It is 2."


@pytest.mark.parametrize(
    "reply, why",
    [
        ("Yes.", "by the judge"),
        ("no", "another answer"),
        ("maybe", "no verdict"),
        ("Sorry, no", "no verdict"),
    ],
)
def test_the_judge_is_asked_where_rules_do_not_settle_it(reply, why):
    item = item_for(cot(think="something that does not conclude."))
    judge = Says(reply)
    long_cot.Distilled(judge)([item])
    assert len(judge.asked) == 1 and item.history[-1].why.split(": ")[0] == why

    settled = item_for(cot(think=cot().facts["chain"] + f" {cot().facts['answer']}."))
    long_cot.Distilled(judge)([settled])
    assert len(judge.asked) == 1 and settled.history[-1].why == "by rule"


def test_lengths_are_balanced_over_their_classes():
    short = [cot(think="one two three four")] * 30
    long = [cot(think="word " * 40)] * 10
    items = [item_for(sample, i) for i, sample in enumerate(short + long)]
    classes.EvenOver("even", long_cot.length_class, 0.5)(items)
    alive = [item.index >= 30 for item in items if item.alive]
    assert len(alive) == 20 and sum(alive) == 10


# ----------------------------------------------------------------------------------------- oracle


def test_the_oracle_errs_as_often_as_it_is_told_and_always_on_the_same():
    samples = drawn("counting", 300)
    items = [item_for(sample, i) for i, sample in enumerate(samples)]
    requests = [ratings.Rated(None).request(item) for item in items]
    said = [Oracle(noise, seed=1).annotate(requests) for noise in (0.0, 0.3, 0.3)]
    truths, noisy, again = [[json.loads(r.text)["relevance"] for r in answers] for answers in said]
    assert noisy == again and truths == [5] * 300
    assert 0.15 < sum(a != b for a, b in zip(truths, noisy)) / 300 < 0.33
