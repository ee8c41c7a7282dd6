"""Evaluation: chance, scores of whole sets, what a sample asks, and the command on files that people have."""

import base64
import io
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import evaluate as evaluation
from data import world
from data.sample import BadSample, Faults, Message, Sample
from evaluate import (
    EvaluateOptions,
    Graded,
    Score,
    blind_chance,
    bounded_batches,
    evaluate,
    evaluate_files,
    evaluation_grader,
    pass_at_k,
    question_of,
    rotations,
    score_of,
    summary,
    whole_circles,
    yes_no_scores,
)
from graders import grade
from infra.cli import command
from scale import parallel


def asked(question, answer, family="t", **facts):
    facts = {"answer": answer, "family": family} | facts
    return Sample(
        (Message("user", (question,)), Message("assistant", (str(answer),))), "t", "", facts
    )


def answers(*words, question="what?", **facts):
    return [asked(question, word, **facts) for word in words]


# ------------------------------------------------------------------------------------------- chance


@pytest.mark.parametrize(
    "samples,chance",
    [
        (answers(*["right"] * 32, *["left"] * 28, *["up"] * 22, *["down"] * 18), 0.32),
        (answers(*["right"] * 8, *["left"] * 7, *["up"] * 5, *["down"] * 5), 8 / 25),
        (answers(*"ABCD" * 25), 0.25),
        (answers(*["yes"] * 50, *["no"] * 50), 0.5),
        (answers(*["yes"] * 90, *["no"] * 10), 0.9),
        (answers("red", "red", "blue", "blue"), 0.5),
        (answers(*map(str, range(40))), 0.0),  # what is said once cannot be known
        (answers("red", "red", "red", "blue") + answers("1", "1", question="n?"), 5 / 6),
        (answers("yes"), 0.0),
        ([], 0.0),
        # ten questions with two answers of their own each, evenly: none of them helps another
        ([asked(f"{i}?", f"{i}{w}") for i in range(10) for w in "ab" * 4], 0.5),
        # asked once each, but the answer to all is known
        ([asked(f"{i}?", "nothing" if i % 4 else str(i)) for i in range(40)], 0.75),
        # of any accepted answer
        (answers(["two", "2"], ["2", "two"], ["two"]), 1.0),
        # in their own grades: every caption shares one phrase of two
        (answers(*[f"red ring, {w}" for w in "aabbcc"], family="caption"), 2 / 3),
    ],
)
def test_chance_is_the_best_blind_strategy(samples, chance):
    assert blind_chance(samples) == pytest.approx(chance)


def test_a_model_that_guesses_scores_about_chance():
    generator = torch.Generator().manual_seed(0)
    for shares in ([0.32, 0.28, 0.2, 0.2], [0.25] * 4, [0.5, 0.5]):
        drawn = torch.multinomial(torch.tensor(shares), 200, True, generator=generator).tolist()
        samples = answers(*[f"word{i}" for i in drawn])
        assert max(shares) - 0.02 <= blind_chance(samples) <= max(shares) + 0.07


def test_the_drawn_worlds_chance_is_below_a_model_that_sees_and_never_nothing_by_a_tie():
    video = world.World().held_out("video", 100)
    commonest = max(
        sum(s.facts["answer"] == a for s in video) for a in {s.facts["answer"] for s in video}
    )
    assert commonest / 100 <= blind_chance(video) + 1e-9 and blind_chance(video) > 0.1


# ---------------------------------------------------------------------------------- scores of sets


@pytest.mark.parametrize(
    "n,correct,k,expected",
    # arXiv 2107.03374, Eq. 1: 1 - C(n-c, k) / C(n, k), by hand
    [(n, 0, k, 0.0) for n, k in ((1, 1), (4, 1), (4, 4), (10, 5))]
    + [(n, n, k, 1.0) for n, k in ((1, 1), (4, 1), (4, 4), (10, 5))]
    + [(n, c, 1, c / n) for n, c in ((2, 1), (3, 1), (3, 2), (4, 1), (4, 3), (10, 7), (200, 3))]
    + [(n, c, n, 1.0) for n, c in ((2, 1), (3, 1), (4, 2), (10, 1), (100, 1))]
    + [
        (4, 1, 2, 1 / 2),
        (4, 2, 2, 5 / 6),
        (4, 3, 2, 1.0),
        (4, 1, 3, 3 / 4),
        (5, 1, 2, 2 / 5),
        (5, 2, 2, 7 / 10),
        (5, 2, 3, 9 / 10),
        (5, 3, 2, 9 / 10),
        (6, 1, 3, 1 / 2),
        (6, 2, 3, 4 / 5),
        (6, 3, 3, 19 / 20),
        (6, 3, 2, 4 / 5),
        (8, 1, 4, 1 / 2),
        (8, 2, 4, 11 / 14),
        (8, 4, 4, 69 / 70),
        (8, 5, 4, 1.0),
        (10, 1, 5, 1 / 2),
        (10, 2, 5, 7 / 9),
        (10, 3, 5, 11 / 12),
        (10, 5, 2, 7 / 9),
        (100, 1, 10, 1 / 10),
    ],
)
def test_pass_at_k_is_the_unbiased_estimator(n, correct, k, expected):
    assert pass_at_k(n, correct, k) == pytest.approx(expected)


def test_pass_at_k_refuses_what_does_not_exist():
    for n, c, k in ((4, 1, 5), (4, 5, 1), (4, 1, 0), (0, 0, 1)):
        with pytest.raises(ValueError, match="does not exist"):
            pass_at_k(n, c, k)


# POPE's script reads the first sentence: no, not or No in it is a no, anything else a yes.
POPE_YES = (
    "yes|Yes|Yes.|Yes, there is.|yes, a dog|a dog||I see it|NO|nothing|Yes. No dog though.|nope|"
    "there is one|Sure|1|none|It is|yes yes|Certainly, it is|cannot say|know|noon|knot|notice"
)
POPE_NO = (
    "no|No|No.|No, there is not.|no dog|not really|It is not|There is no dog|yes and no|No. Yes.|"
    "No dog|is not there|no, yes|I do not see it|yes, no|there is no|not|No, yes|so no, then"
)
POPE = [(text, True) for text in POPE_YES.split("|")] + [
    (text, False) for text in POPE_NO.split("|")
]


def test_yes_and_no_are_counted_as_pope_counts_them():
    assert len(POPE) >= 40
    for text, yes in POPE:
        assert yes_no_scores([text], ["yes"])["yes"] == yes, text

    # tp 3, fp 1, fn 2, tn 4
    said = ["yes"] * 3 + ["yes"] + ["no"] * 2 + ["no"] * 4
    truths = ["yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 4
    figures = yes_no_scores(said, truths)
    assert figures == pytest.approx(
        {"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "f1": 2 / 3, "yes": 0.4}
    )
    assert yes_no_scores(["no"], ["no"])["f1"] == 0 == yes_no_scores([], [])["accuracy"]


@pytest.mark.parametrize(
    "accuracy,n,low,high",
    # by hand from Wilson's formula; the ends of 0 and 1 are z^2 / (n + z^2)
    [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0), (0.9, 50, 0.7864, 0.9565)],
)  # fmt: skip
def test_an_interval_stays_inside_and_is_wilsons(accuracy, n, low, high):
    assert Score(accuracy, 0.0, n).interval == pytest.approx((low, high), abs=1e-4)


def test_scores_of_families_and_categories():
    rows = [("a", "1", 1.0), ("a", "2", 0.0), ("b", "1", 1.0)]
    graded = [
        Graded(f, "q", "t", "s", score, asked("q", "t", f, category=c)) for f, c, score in rows
    ]
    by_family = summary(graded)
    assert by_family["a"].accuracy == 0.5 and by_family["overall"].accuracy == 0.75
    by_category = summary(graded, evaluation.category_of)
    assert by_category["1"].accuracy == 1 and by_category["2"].accuracy == 0
    with pytest.raises(ValueError, match="nothing was graded"):
        summary([])


# ------------------------------------------------------------------------------- what a sample asks


def test_a_question_is_found_wherever_it_stands():
    picture = Image.new("RGB", (8, 8))

    def turn(*parts):
        return Sample((Message("user", parts), Message("assistant", ("a",))))

    assert question_of(turn(picture, "\nwhat is it?")) == "what is it?"
    assert question_of(turn("what is it?", picture)) == "what is it?"
    assert question_of(turn(picture)) == ""
    assert question_of(turn("look\nwho?\nA. cat\nB. dog\nAnswer with the letter.")) == "who?"
    assert question_of(Sample((Message("assistant", ("a",)),))) == ""


@pytest.mark.parametrize(
    "sample,grader",
    [
        (asked("q", "3"), "auto"),
        (asked("q", "red ring", "caption"), "phrases"),
        (asked("q", "0 0 1 1", "grounding"), "box"),
        (asked("q", "0 0 1 1", "grounding", grader="iou"), "iou"),
        (asked("q\nA. cat\nB. dog", "B"), "mcq"),
        (asked("q\n(A) cat\n(B) dog", "(B)"), "mcq"),
        (asked("q", "B"), "auto"),
        (asked("is it?", "Yes"), "yesno"),
        (asked("what?", ["red"] * 6 + ["crimson"] * 4), "vqa"),
        (asked("what?", ["red", "crimson"]), "auto"),
        (asked("is it?\nA. yes\nB. no", "B", grader="auto"), "auto"),
    ],
)
def test_the_form_of_a_question_decides_where_nothing_else_does(sample, grader):
    assert evaluation_grader(sample) == grader


PETS = asked("which?\nA. cat\nB. dog\nC. guinea pig\nAnswer with the letter.", "B")


@pytest.mark.parametrize(
    "said,think,score",
    [
        ("B", False, 1),
        ("The answer is (B).", False, 1),
        ("dog", False, 1),
        ("It is a dog", False, 1),
        ("cat", False, 0),
        ("a cat or a dog", False, 0),
        ("A", False, 0),
        ("A. dog", False, 0),
        ("\\boxed{B}", False, 1),
        ("<think>A?</think>\\boxed{B}", False, 1),
        ("<think>A?</think>\\boxed{B}", True, 1),
        ("<think>\\boxed{B}", True, 0),
        ("B", True, 0),
    ],
)
def test_what_a_completion_is_worth(said, think, score):
    assert score_of(said, PETS, True, think) == score
    assert score_of(said, PETS, False, think) == 0


def test_rewards_and_evaluation_use_one_grader():
    import rewards

    for facts, said in (
        ({"family": "grounding", "answer": "0 0 10 10"}, "0 0 10 9"),
        ({"family": "caption", "answer": "red ring, blue cube"}, "blue cube"),
        ({"grader": "anls", "answer": ["hello", "hallo"]}, "hullo"),
        ({"grader": "vqa", "answer": ["2"] * 3 + ["3"] * 7}, "2"),
        ({"grader": "relaxed", "answer": "100"}, "104"),
    ):
        sample = replace(asked("q", ""), facts={"family": "t"} | facts)
        text = f"<think>c</think>\\boxed{{{said}}}"
        reward = rewards.parts(text, facts, True)["answer"]
        assert (
            score_of(said, sample, True, False) == reward == score_of(text, sample, True, True) > 0
        )


# ----------------------------------------------------------------------------------------- circular


def test_options_go_round_and_all_rotations_must_be_right():
    turned = rotations(PETS)
    assert len(turned) == 3
    for sample in turned:
        assert evaluation.question_options(sample)[sample.facts["answer"]] == "dog"
    assert sorted(s.facts["answer"] for s in turned) == ["A", "B", "C"]
    assert "Answer with the letter." in turned[1].messages[0].parts[0]
    assert rotations(asked("how many?", "3")) == [asked("how many?", "3")]

    def circle(*scores):
        return [Graded("t", "q", "B", "", s, t, "mcq") for s, t in zip(scores, turned)]

    assert [g.score for g in whole_circles(circle(1, 1, 1))] == [1]
    assert [g.score for g in whole_circles(circle(1, 0, 1))] == [0]
    of_file = [asked("q", "A", index=i) for i in (241, 1000241, 2000241, 242)]
    merged = whole_circles([Graded("t", "q", "A", "", s, t) for s, t in zip((1, 1, 0, 1), of_file)])
    assert [g.score for g in merged] == [0, 1]


# ------------------------------------------------------------------------------------------- asking


def test_batches_are_bounded_in_number_and_tokens_and_hold_everything_once():
    lengths = [5, 100, 7, 7, 300, 6, 80]
    parts = list(bounded_batches(lengths, 3, 100))
    assert sorted(i for part in parts for i in part) == list(range(7))
    for part in parts:
        assert len(part) <= 3
        assert len(part) == 1 or len(part) * max(lengths[i] for i in part) <= 100


def test_small_batches_and_windows_give_the_same_answers(model, encoder, monkeypatch):
    samples = [world.sample(i, 1, {"counting": 1.0, "odd": 1.0}, turns=1) for i in range(6)]
    whole = evaluation.ask(model, encoder, samples, max_new=4)
    parts = evaluation.ask(model, encoder, samples, max_new=4, tokens=1)
    monkeypatch.setattr(evaluation, "WINDOW", 2)
    windows = evaluation.ask(model, encoder, samples, max_new=4)
    assert [a.ids for a in whole] == [a.ids for a in parts] == [a.ids for a in windows]


def test_a_bad_picture_costs_its_sample(model, encoder):
    bad = Sample(
        (Message("user", (b"no picture", "what?")), Message("assistant", ("a",))), "t", "x:1"
    )
    bad = Sample(bad.messages, "t", "x:1", {"answer": "a"})
    empty = Sample(bad.messages, "t", "x:2", {})
    good = world.sample(0, 1, {"counting": 1.0}, turns=1)
    faults = Faults()
    scores, graded = evaluate(model, encoder, [bad, good, empty], max_new=3, faults=faults)
    assert scores["overall"].n == 1 == len(graded) and faults.counts.total() == 2
    assert "no truth" in faults.counts
    with pytest.raises(BadSample):
        evaluation.ask(model, encoder, [bad], max_new=3)
    with pytest.raises(ValueError, match="none of 2 samples can be graded"):
        evaluate(model, encoder, [bad, empty], max_new=3, faults=Faults())


# --------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def home(tmp_path_factory, config, tokenizer):
    """A model of one's own, untrained, and files to grade it on."""
    from vlm import SailVL

    root = tmp_path_factory.mktemp("home")
    model = SailVL(config).init_weights(0)
    model.save_pretrained(root / "model")
    tokenizer.save(root / "model")

    Image.new("RGB", (32, 32), "red").save(root / "a.png")
    (root / "bad.png").write_bytes(b"\x89PNG broken")

    def ask(image, question, answer, **more):
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        return {"image": image, "conversations": turns, **more}

    rows = [ask("a.png", f"<image>\nwhat is number {i}?", str(i % 3)) for i in range(6)]
    rows += [ask("a.png", "<image>", "red"), ask("a.png", "what?\n<image>", "red")]
    rows += [ask("bad.png", "<image>\nwhat?", "red"), ask("gone.png", "<image>\nwhat?", "red")]
    facts = {"answer": ["red", "crimson"], "grader": "anls", "category": "color\x1b[31m"}
    rows += [ask("a.png", "<image>\ncolor?", "red", facts=facts)] * 2
    (root / "my.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(buffer, "PNG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    lines = ["index\tquestion\tA\tB\tanswer\timage"]
    lines += [f"{i}\twhich is it {i}?\tcat\tdog\t{'AB'[i % 2]}\t{picture}" for i in range(4)]
    (root / "mcq.tsv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """`parallel.start` would give this process other threads."""
    monkeypatch.setattr(parallel, "start", parallel.Ranks)


def run_command(home, data="my.jsonl", **options):
    options = {
        "data": home / data,
        "model": home / "model",
        "max_new": 4,
        "device": "cpu",
    } | options
    evaluate_files(EvaluateOptions(**options))


def test_the_command_grades_a_file_with_faults(home, capsys):
    run_command(home)
    text = capsys.readouterr().out
    assert "prompt: " in text and "visual tokens" in text and "graded by" in text
    assert "unreadable" in text and "missing" in text
    assert "anls" in text and "category" in text
    assert "\x1b" not in text


def test_answers_are_written_as_they_come_and_the_next_run_goes_on(
    home, capsys, monkeypatch, tmp_path
):
    file = tmp_path / "said.jsonl"
    real = evaluation.generate
    calls = []

    def dying(model, prompts, *rest, **named):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, prompts, *rest, **named)

    # one prompt at a time; killed at the third, in the middle of a line
    monkeypatch.setattr(evaluation, "generate", dying)
    with pytest.raises(KeyboardInterrupt):
        run_command(home, answers=file, tokens=1)
    with open(file, "a") as f:
        f.write('{"name": "half')
    kept = file.read_text().splitlines()[1:3]

    run_command(home, answers=file, tokens=1)
    text = capsys.readouterr().out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert "2 of 12 answers" in text
    assert [json.dumps(r, ensure_ascii=False) for r in rows[1:3]] == kept
    assert {"name", "question", "truth", "said"} <= rows[1].keys() and "prompt" in rows[0][
        "settings"
    ]

    # all there: nothing is asked, the same scores
    asked_so_far = len(calls)
    run_command(home, answers=file, tokens=1)
    assert capsys.readouterr().out.split("family")[1] == text.split("family")[1]
    assert len(calls) == asked_so_far
    with pytest.raises(ValueError, match="another max_new"):
        run_command(home, answers=file, max_new=5)
    with pytest.raises(ValueError, match="not a file of answers"):
        run_command(home, answers=home / "my.jsonl")


def test_multiple_choice_from_a_tsv_whole_and_circular(home, capsys):
    run_command(home, "mcq.tsv")
    assert "mcq" in capsys.readouterr().out
    run_command(home, "mcq.tsv", circular=True)
    text = capsys.readouterr().out
    assert "8 orders of the options of 4 questions" in text and "4  mcq" in text


def test_several_tries_give_pass_at_k(home, capsys):
    run_command(home, tries=2, temperature=1.0, limit=3)
    assert "pass@2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--tries needs --temperature"):
        run_command(home, tries=2)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(grader="vibes"), "--grader 'vibes': choose from auto"),
        (dict(device="abacus"), "--device abacus: no such device here"),
        (dict(data="none.jsonl"), "none.jsonl"),
        (dict(limit=0, data="untrue.jsonl"), "no sample can be asked"),
    ],
)
def test_what_a_user_did_is_one_line(home, options, message):
    row = {
        "messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
    }
    (home / "untrue.jsonl").write_text(json.dumps(row | {"images": ["gone.png"]}) + "\n")
    with pytest.raises((ValueError, OSError), match=message):
        run_command(home, **options)


def test_the_script_reads_its_options_thinks_and_fails_in_one_line(home, capsys):
    words = [
        "--model",
        str(home / "model"),
        "--max-new",
        "4",
        "--device",
        "cpu",
        "--think",
        "--data",
    ]
    with pytest.raises(SystemExit) as left:
        command(evaluate_files, [*words, str(home / "my.jsonl"), "--limit", "2"])
    assert not left.value.code
    assert "think first." in capsys.readouterr().out  # the small tokenizer's request
    with pytest.raises(SystemExit) as left:
        command(evaluate_files, [*words, "gone.jsonl"])
    error = capsys.readouterr().err
    assert left.value.code == 1 and "Traceback" not in error and "gone.jsonl" in error


def test_the_models_score_through_the_command_equals_that_by_hand(home, tmp_path, capsys):
    file = tmp_path / "said.jsonl"
    run_command(home, "mcq.tsv", answers=file)
    rows = [json.loads(line) for line in file.read_text().splitlines()][1:]
    by_hand = sum(grade(r["said"][0][0], r["truth"], "mcq") * r["said"][0][1] for r in rows) / len(
        rows
    )
    assert f"{by_hand:6.1%}" in capsys.readouterr().out
