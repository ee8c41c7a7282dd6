"""Captioner, Caption2QA, side by side, statistics, own pictures and the page: what each promises of a sample.

Whoever annotates here is a script or the oracle, so every test knows what should come out; one is a server.
"""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from test_endpoint import KEY, Server, completion

from curation import caption2qa, caption_statistics, side_by_side
from curation.album import AlbumOptions, GradeAlbumOptions, draw_album, grade_album
from curation.annotators import AnnotatorOptions
from curation.caption2qa import (
    AlikePairs,
    AskQuestions,
    Caption2QAOptions,
    CheckPairs,
    LookAgain,
    QuestionOptions,
    TemplateQuestions,
    pairs_of,
    write_questions,
)
from curation.captioner import CaptionOptions, ReferenceOptions, WriteCaption, caption_files
from curation.pipeline import Item
from curation.recaption import RecaptionOptions, SecondOpinion, recaption
from curation.report import ReviewOptions, write_review
from curation.requests import Prompts, Request, Response
from curation.rows import RowWriter
from curation.told import told_pairs, true_answer
from data.readers import Folder
from data.sample import Message, Sample
from data.world import World
from infra import endpoint

PICTURE = b"a picture"
CAPTION = "Two red cars and a small dog stand in front of a house with the number 12."


class Scripted:
    """Answers by a function of the request; remembers what it was asked."""

    name = "script"

    def __init__(self, say):
        self.say = say
        self.requests: list[Request] = []

    def annotate(self, requests):
        self.requests += requests
        return [Response(self.say(request)) for request in requests]

    def report(self):
        return ""


def sample_saying(text: str, **facts) -> Sample:
    messages = (Message("user", (PICTURE, "\nwhat?")), Message("assistant", (text,)))
    return Sample(messages, origin="x", facts=facts)


def items_saying(*texts: str, **facts) -> list[Item]:
    return [Item(i, "x", sample_saying(text, **facts)) for i, text in enumerate(texts)]


def world_rows(path: Path, n: int) -> Path:
    """Drawn samples as a file."""
    with RowWriter(path) as rows:
        for sample in World().held_out("caption", n):
            rows.write(sample)
    return path


def samples_in(path: Path) -> list[Sample]:
    folder = Folder(path)
    return [folder[index] for index in range(len(folder))]


# ------------------------------------------------------------------------------------- captioner


def test_a_caption_replaces_all_that_was_said_and_the_old_text_stays_a_fact():
    items = items_saying("IMG_17", answer="IMG_17", chain="because", family="odd", words="w")
    WriteCaption(Scripted(lambda request: " a red car \n"), Prompts(), request="What is it?")(items)
    found = items[0].sample
    assert found.messages[0].parts == (PICTURE, "\nWhat is it?")
    assert found.messages[1].parts == ("a red car",)
    assert found.facts == {
        "words": "w",
        "answer": "a red car",
        "alt_text": "IMG_17",
        "caption": "a red car",
        "captioner": "script",
    }


def test_a_share_is_asked_with_its_alt_text_and_a_reference_row_asks_as_the_captioner_will_be_asked():
    say = Scripted(lambda request: "a red car")
    items = items_saying(*["a $5 car"] * 400)
    WriteCaption(say, Prompts(), with_alt=0.25, seed=3)(items)
    asked = Counter(request.task for request in say.requests)
    assert 70 < asked["caption_with_alt"] < 130
    for item, request in zip(items, say.requests, strict=True):
        question = item.sample.messages[0].parts[1]
        assert ("a $5 car" in question) == (request.task == "caption_with_alt")

    # the same ones whoever works on them
    again = Scripted(lambda request: "a red car")
    WriteCaption(again, Prompts(), with_alt=0.25, seed=3)(items_saying(*["a $5 car"] * 400))
    assert [r.task for r in again.requests] == [r.task for r in say.requests]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, "no answer"),
        ("", "empty caption"),
        ("I'm sorry, but I can't help with that.", "refused"),
        ("抱歉，我无法描述这张图片。", "refused"),
        ("<think>a car", "holds markup"),
        ("the car is red and " * 9, "goes round"),
        ("红色的汽车停在" * 9, "goes round"),
        ("word%d " * 3000 % tuple(range(3000)), "too long"),
    ],
)
def test_what_is_no_caption_costs_that_sample_alone(reply, reason):
    items = items_saying("old", "good")
    say = Scripted(lambda request: reply if request.about is items[0].sample else "a red car")
    WriteCaption(say, Prompts())(items)
    assert not items[0].alive and items[0].history[0].why.startswith(reason)
    assert items[1].alive


def test_files_are_captioned_by_the_oracle_and_a_reference_set_is_ready_to_train_on(
    tmp_path, capsys
):
    data = world_rows(tmp_path / "data.jsonl", 12)
    oracle = AnnotatorOptions(oracle=True)
    caption_files(CaptionOptions(data, tmp_path / "captions.jsonl", annotator=oracle))
    for sample in samples_in(tmp_path / "captions.jsonl"):
        assert sample.messages[-1].parts == (sample.facts["words"],)
        assert sample.messages[0].parts[-1] == "\nDescribe the picture."

    caption_files(ReferenceOptions(data, tmp_path / "reference.jsonl", annotator=oracle))
    prompts = Prompts()
    for sample in samples_in(tmp_path / "reference.jsonl"):
        alt_text = sample.facts["alt_text"]
        shown = Request("caption_with_alt", {"alt_text": alt_text})
        possible = ["\n" + prompts.text(request) for request in (shown, Request("caption"))]
        assert sample.messages[0].parts[-1] in possible
    assert "12 asked" in capsys.readouterr().out


# ------------------------------------------------------------------------------------- caption2qa


def checked(pairs, caption=CAPTION, say=None):
    """What CheckPairs leaves of some pairs, and why others went."""
    items = items_saying("-", caption=caption, pairs=[list(pair) for pair in pairs])
    verifier = Scripted(say) if say else None
    CheckPairs(verifier, needed=False)(items)
    return pairs_of(items[0].sample), items[0].sample.facts["rejected"]


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("What does the caption say about cars?", "red", "mentions the caption"),
        ("这段描述里有什么？", "狗", "mentions the caption"),
        ("What colour are the red cars?", "Red.", "gives its answer away"),
        ("How big is the dog?", "<image>", "holds markup"),
        ("What is behind the cars?", "a tree", "not in the caption"),
        ("Are there cars?", "yes", "not in the caption"),
    ],
)
def test_a_pair_that_nobody_should_learn_goes(question, answer, reason):
    good = ("What colour are the cars?", "red")
    assert checked([good, (question, answer)]) == ([good], {reason: 1})


def test_a_question_stands_once_in_a_sample_also_in_nearly_the_same_words():
    pairs = [
        ("What colour are the two cars in front of the house?", "red"),
        ("What colour are the two cars in front of that house?", "red"),
        ("How many cars are in front of the house?", "Two cars"),
    ]
    assert checked(pairs) == ([pairs[0], pairs[2]], {"asked twice": 1})


def test_where_words_cannot_tell_the_caption_is_asked_again():
    pairs = [("Are there cars?", "yes"), ("Is there a cat?", "yes"), ("How many animals?", "1")]
    replies = {"Are there cars?": "Yes, two.", "Is there a cat?": "No.", "How many animals?": "one"}
    kept, out = checked(pairs, say=lambda request: replies[request.fields["question"]])
    assert kept == [pairs[0], pairs[2]]
    assert out == {"not in the caption": 1}
    assert checked(pairs[:1], say=lambda request: "Unanswerable.")[0] == []


def test_words_and_numbers_are_compared_as_a_reader_would():
    assert caption2qa.stands_in("2 cars", CAPTION)
    assert caption2qa.stands_in("a house", CAPTION)
    assert caption2qa.stands_in("红色", "一辆红色的汽车")
    assert not caption2qa.stands_in("three cars", CAPTION)
    assert not caption2qa.stands_in("the", CAPTION)
    assert caption2qa.says_the_same("the red car", "red")
    assert not caption2qa.says_the_same("red", "blue")
    assert not caption2qa.says_the_same("yes", "a red car")


HOSTILE = [
    "no JSON",
    "[" * 5000,
    '{"question": "only one", "answer": 5}',
    '[["a", "b"], null, {"question": ["x"], "answer": "y"}, {"question": "", "answer": "y"}]',
    '[{"question": "a\\ud800", "answer": "b"}]',
    json.dumps([{"question": "q" * 1000, "answer": "a"}]),
]


@pytest.mark.parametrize("reply", HOSTILE, ids=lambda reply: reply[:20])
def test_a_reply_without_pairs_costs_that_sample_alone(reply):
    items = items_saying(CAPTION, CAPTION)
    good = '```json\n{"pairs": [{"question": "What colour are the cars?", "answer": "red"}]}\n```'
    say = Scripted(lambda request: reply if request.about is items[0].sample else good)
    AskQuestions(say, 5)(items)
    assert [item.alive for item in items] == [False, True]
    assert items[0].history[0].why.startswith("no question left: ")
    assert pairs_of(items[1].sample) == [("What colour are the cars?", "red")]


def test_questions_from_templates_are_clear_and_vary_and_are_answered_from_the_caption(tmp_path):
    lines = tmp_path / "templates.tsv"
    lines.write_text("(?P<what>\\w+) is (\\w+)\twhat is $what?\n^\thow many?\n")
    say = Scripted(lambda request: "of " + request.fields["caption"])
    items = items_saying("sky is blue, dog is red, dog is old")
    TemplateQuestions(say, lines, count=5)(items)
    questions = sorted(question for question, _ in pairs_of(items[0].sample))
    assert questions == [
        "how many?",
        "what is sky?",
    ]  # of two dogs nobody can say what "the dog" is
    assert {request.task for request in say.requests} == {"answer_from_caption"}
    assert all(request.pictures == () for request in say.requests)

    lines.write_text("fine\tgood?\n(\tbad?\n")
    with pytest.raises(ValueError, match="templates.tsv:2"):
        TemplateQuestions(say, lines, count=5)


def test_a_caption_whose_answers_the_picture_contradicts_goes():
    pairs = [["a?", "red"], ["b?", "blue"], ["c?", "green"]]
    items = items_saying("-", "-", caption=CAPTION, pairs=pairs)
    seen = {"a?": "red", "b?": "blue", "c?": "black"}
    say = Scripted(lambda request: seen[request.fields["question"]])
    LookAgain(say, least=0.5)(items[:1])
    assert pairs_of(items[0].sample) == [("a?", "red"), ("b?", "blue")]
    LookAgain(Scripted(lambda request: "nothing"), least=0.5)(items[1:])
    assert items[1].history[-1].why == "picture and caption disagree: 0 of 3 answers are the same"


def test_the_same_pair_stands_so_often_in_a_set_and_no_oftener():
    items = items_saying("-", "-", "-", caption=CAPTION, pairs=[["What is it?", "A car."]])
    AlikePairs(2)(items)
    assert [item.alive for item in items] == [True, True, False]


def test_the_oracles_questions_are_true_and_no_turn_holds_the_caption(tmp_path):
    data = world_rows(tmp_path / "data.jsonl", 24)
    options = Caption2QAOptions(
        data,
        tmp_path / "questions.jsonl",
        annotator=AnnotatorOptions(oracle=True),
        questions=QuestionOptions(count=4, look=True),
    )
    write_questions(options)
    found = samples_in(options.out)
    assert len(found) > 15
    for sample in found:
        turns = ["".join(map(str, message.parts[-1:])).strip() for message in sample.messages]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            assert true_answer(sample.facts["words"], question) == answer
        assert sample.facts["answer"] == turns[-1] and "pairs" not in sample.facts
        assert sample.facts["words"] not in turns or len(turns) == 2
    assert max(len(sample.messages) for sample in found) == 8


@pytest.mark.parametrize(
    "family", ["spatial", "attributes", "counting", "charts", "reading", "odd"]
)
def test_what_a_caption_tells_agrees_with_the_worlds_own_questions(family):
    compared = 0
    for sample in World().held_out(family, 60):
        answer = true_answer(sample.facts["words"], sample.facts["question"])
        if answer is not None and not sample.facts["question"].startswith("how high"):
            assert answer == sample.facts["answer"]
            compared += 1
    assert compared > 10 or family == "odd"
    assert told_pairs("no scene at all") == []


# ---------------------------------------------------------------------------- statistics and side by side


def test_numbers_of_captions_by_hand(monkeypatch):
    monkeypatch.setattr(caption_statistics, "find_spec", lambda name: None)
    row = caption_statistics.measure_captions("x", ["A red car.", "A red dog.", "A red car!"])
    assert (row.language, row.captions, row.length) == ("english", 3, 3)
    assert row.pairs == 3 / 3  # a red, red car, red dog
    assert row.triples == 2 / 3
    assert row.kinds == {"noun": None, "verb": None, "adjective": None}
    assert row.row()[-3:] == ["-", "-", "-"]
    chinese = caption_statistics.measure_captions("x", ["一只红色的狗"])
    assert (chinese.language, chinese.length, chinese.pairs) == ("chinese", 6, 5)


@pytest.mark.slow
def test_taggers_count_kinds_of_words():
    pytest.importorskip("textblob", reason="requirements/words.txt")
    pytest.importorskip("jieba", reason="requirements/words.txt")
    row = caption_statistics.measure_captions(
        "x", ["A small red dog is running.", "A small cat is running."]
    )
    assert row.kinds == {"noun": 1.0, "verb": 1.0, "adjective": 1.0}
    row = caption_statistics.measure_captions("x", ["小狗吃红色的苹果"])
    assert row.kinds["noun"] >= 1 and row.kinds["verb"] >= 1


def test_the_table_of_statistics_is_printed_for_files(tmp_path, capsys):
    data = world_rows(tmp_path / "data.jsonl", 9)
    caption_statistics.print_statistics(caption_statistics.StatisticsOptions((data,), samples=5))
    assert re.search(r"\| data.jsonl \| english \| 5 \| \d", capsys.readouterr().out)


def test_a_judge_that_prefers_a_place_says_the_same_of_all():
    for place in "12":
        items = items_saying(CAPTION)
        say = Scripted(lambda request, place=place: json.dumps({"better": place}))
        step = side_by_side.CompareCaptions(say, {})
        first, second = say.annotate(side_by_side.both_orders(items[0].sample, "other"))
        step.mark(items[0], first, second)
        assert items[0].sample.facts["verdict"] == "same"
    asked = [request.fields for request in say.requests]
    assert asked[0]["first"] == asked[1]["second"] == CAPTION


def test_the_sign_test_is_exact():
    assert side_by_side.sign_test(0, 0) == 1
    assert side_by_side.sign_test(5, 5) == 1
    assert side_by_side.sign_test(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 2**10)
    assert side_by_side.sign_test(2, 8) == side_by_side.sign_test(8, 2)


def test_right_captions_win_against_noisy_ones_of_the_same_pictures(tmp_path, capsys):
    data = world_rows(tmp_path / "data.jsonl", 20)
    for name, noise in (("right", 0.0), ("noisy", 0.7)):
        annotator = AnnotatorOptions(oracle=True, noise=noise)
        caption_files(CaptionOptions(data, tmp_path / name / "c.jsonl", annotator=annotator))
    options = side_by_side.CompareOptions(
        tmp_path / "right" / "c.jsonl",
        tmp_path / "compared.jsonl",
        other=tmp_path / "noisy" / "c.jsonl",
        annotator=AnnotatorOptions(oracle=True),
    )
    side_by_side.compare_files(options)
    verdicts = Counter(sample.facts["verdict"] for sample in samples_in(options.out))
    assert verdicts["good"] > 8 and verdicts["bad"] == 0
    assert "sign test" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ own pictures


def drawn_album(folder: Path) -> Path:
    draw_album(AlbumOptions(folder / "album", pictures=24, seed=1))
    (folder / "album" / "0003.txt").write_text("<script>alert(1)</script> \x1b[2J <image>")
    return folder / "album"


def served(request: dict) -> str:
    """What a scripted server says: by the words of our own prompts."""
    text = json.dumps(request["messages"])
    if "JSON alone: [" in text:
        return json.dumps([{"question": "What is in the middle?", "answer": "a red car"}])
    if "for somebody who cannot see it" in text:
        return "A red car <b>in</b> a street."
    return "yes" if re.search("yes or no", text, re.IGNORECASE) else '{"score": 4}'


def check_album_files(out: Path, captions: int) -> None:
    """All that the command promises to leave, read back by the ordinary readers."""
    samples = samples_in(out)
    assert len(samples) == captions
    llava = [json.loads(line) for line in out.with_suffix(".llava.jsonl").read_text().splitlines()]
    assert {"id", "image", "conversations"} == set().union(*llava)
    assert sum(row["id"].endswith("-caption") for row in llava) == captions
    assert len({row["id"] for row in llava}) == len(llava)
    for sample in samples_in(out.with_suffix(".llava.jsonl")):
        assert (sample.root / sample.messages[0].parts[0]).is_file()
    page = out.with_suffix(".report.html").read_text()
    assert "<script" not in page and "\x1b" not in page
    assert (
        len(re.findall('class="card( many)?"', page)) == 24
    )  # all of them: fewer than fifty of either


def test_own_pictures_become_data_with_the_oracle_as_annotator(tmp_path, capsys):
    album = drawn_album(tmp_path)
    out = tmp_path / "new.jsonl"
    oracle = AnnotatorOptions(oracle=True)
    truth = tmp_path / "album.truth.jsonl"
    recaption(RecaptionOptions(truth, out, annotator=oracle, judge=oracle))
    kept = samples_in(out)
    assert all(sample.facts["caption"] == sample.facts["words"] for sample in kept)
    check_album_files(out, len(kept))
    grade_album(GradeAlbumOptions(out, truth))
    row = re.search(r"\| scene \|(.*)\|", capsys.readouterr().out)[1].split("|")
    pictures, stayed, right, answers, true = map(int, row)
    assert pictures == stayed == right and answers == true > stayed
    assert album.is_dir()


def test_a_caption_that_a_second_captioner_does_not_share_goes():
    items = items_saying("a red car in a street", "a red car in a street", "a dog")
    for item in items:
        item.sample = replace(item.sample, facts={"caption": item.sample.messages[-1].parts[0]})
    replies = iter(["A red car, in a street.", "a street in a red car", None])
    SecondOpinion(Scripted(lambda request: next(replies)), 0.7)(items)
    assert [item.alive for item in items] == [True, False, False]
    assert items[1].history[-1].why == (
        "two captioners disagree: 0.67 in common with: a street in a red car"
    )


def test_own_pictures_become_data_with_a_server_as_annotator_and_as_judge(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    album = drawn_album(tmp_path)
    server = Server(lambda handler, request: completion(served(request)))
    named = AnnotatorOptions(url=server.url, name="m", at_once=4)
    options = RecaptionOptions(
        album, tmp_path / "new.jsonl", annotator=named, judge=named, with_alt=1
    )
    recaption(options)

    # Kept are all that can be seen, once; each with its caption and its question
    kept = samples_in(options.out)
    assert {sample.facts["caption"] for sample in kept} == {"A red car <b>in</b> a street."}
    assert {len(sample.facts["pairs"]) for sample in kept} == {1}
    check_album_files(options.out, len(kept))
    outcome = json.loads(options.out.with_suffix(".funnel.json").read_text())
    assert {"picture", "same"} == outcome["reasons"].keys()

    # What a stranger wrote is shown where it belongs, and nothing is asked twice
    asked = len(server.requests)
    assert any("alert(1)" in json.dumps(body) for _, _, body in server.requests)
    recaption(options)
    assert len(server.requests) - asked <= 2  # whether it is there, for annotator and judge
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes()
    server.http.shutdown()
    server.http.server_close()


def test_what_a_server_left_unanswered_is_asked_by_the_next_run(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE", 0.01)
    album = drawn_album(tmp_path)
    down = [True]

    def reply(handler, request):
        text = served(request)
        failing = down[0] and text.startswith("[")  # the questions alone
        return (503, {}, b"") if failing else completion(text)

    server = Server(reply)
    named = AnnotatorOptions(url=server.url, name="m", retries=0, at_once=4)
    options = RecaptionOptions(album, tmp_path / "new.jsonl", annotator=named)
    with pytest.raises(ValueError, match="nothing is left"):
        recaption(options)
    down[0] = False
    recaption(options)
    kept = samples_in(options.out)
    assert kept and {len(sample.facts["pairs"]) for sample in kept} == {1}
    server.http.shutdown()
    server.http.server_close()


def test_own_pictures_that_cannot_be_meant_are_refused_in_a_line(tmp_path):
    album = drawn_album(tmp_path)
    oracle = AnnotatorOptions(oracle=True)
    with pytest.raises(ValueError, match="among the pictures"):
        recaption(RecaptionOptions(album, album / "new.jsonl", annotator=oracle))
    with pytest.raises(ValueError, match="is there already"):
        draw_album(AlbumOptions(album))
    with pytest.raises(ValueError, match="count must be positive"):
        questions = QuestionOptions(count=0)
        recaption(
            RecaptionOptions(album, tmp_path / "o.jsonl", annotator=oracle, questions=questions)
        )
    with pytest.raises(ValueError, match="--questions.look says: give both"):
        questions = QuestionOptions(least_agreement=0.5)
        recaption(
            RecaptionOptions(album, tmp_path / "o.jsonl", annotator=oracle, questions=questions)
        )
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(ValueError, match="rows.jsonl: a row without facts or picture"):
        grade_album(GradeAlbumOptions(tmp_path / "rows.jsonl", tmp_path / "rows.jsonl"))


# --------------------------------------------------------------------------------------------- page


def history_of(tmp_path: Path, dropped: int, rare: int) -> Path:
    """A run of 100 records, of which some were dropped for a common and some for a rare reason."""
    data = tmp_path / "data.jsonl"
    rows = []
    lines = []
    for index in range(100):
        messages = [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": f"<i>{index}"},
        ]
        rows.append({"messages": messages, "facts": {"index": index}})
        reason = "rare" if index < rare else "common"
        events = [{"step": "look", "did": "kept", "why": ""}]
        if index < dropped:
            events = [{"step": "look", "did": "dropped", "why": f"{reason}: <script>"}]
        lines.append({"index": index, "origin": "x", "kept": index >= dropped, "history": events})
    data.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out.jsonl"
    out.write_text("\n".join(map(json.dumps, rows[dropped:])))
    history = tmp_path / "out.history.jsonl"
    history.write_text("\n".join(map(json.dumps, lines)))
    return history


def test_the_page_shows_fifty_of_each_rare_reasons_too_and_nothing_is_markup(tmp_path):
    history = history_of(tmp_path, dropped=45, rare=2)
    page = write_review(ReviewOptions(history, tmp_path / "data.jsonl", kept=50, dropped=20))
    text = page.read_text()
    assert text.count('class="card"') == 70
    assert text.count("&lt;i&gt;") == 50 * 2 + 20  # before and after; dropped ones have no after
    assert "<i>" not in text and "<script" not in text
    assert text.count("look: rare") == 1 and text.count("✗ rare: &lt;script&gt;") == 2
    assert "43 common, 2 rare" in text
    assert text.index("Content-Security-Policy") < text.index("<style>")
    assert (
        write_review(ReviewOptions(history, tmp_path / "data.jsonl", kept=50, dropped=20)) == page
    )
    assert page.read_text() == text


def test_a_run_that_kept_nothing_has_a_page_as_well(tmp_path):
    """It is the run that wants looking at most, and it has no OUT.jsonl."""
    history = history_of(tmp_path, dropped=100, rare=2)
    (tmp_path / "out.jsonl").unlink()
    text = write_review(ReviewOptions(history, tmp_path / "data.jsonl")).read_text()
    assert "98 common, 2 rare" in text and text.count('class="card"') == 50


def test_a_page_about_what_is_no_run_is_refused_in_a_line(tmp_path):
    history = history_of(tmp_path, dropped=3, rare=1)
    with pytest.raises(ValueError, match="name what the run read, --data"):
        write_review(ReviewOptions(history))
    history.write_text("{}\n")
    with pytest.raises(ValueError, match="history.jsonl:1: no line of a history"):
        write_review(ReviewOptions(history))
